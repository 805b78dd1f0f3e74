"""A study's figures, as PDF and PNG, from its cells alone: `write_figures`."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxinfer import style
from jaxinfer.checkpoint.files import write_whole
from jaxinfer.study import figure_batch, figure_gpus, figure_scaling, figure_time
from jaxinfer.study.results import Cell, ResultsError, by_experiment, by_model, read_cells

SCALING = {"strong": figure_scaling.strong, "weak": figure_scaling.weak, "batch": figure_batch.batch}
Drawing = tuple[str, Callable[[Sequence[Cell]], tuple[Any, str]], Sequence[Cell]]


def write_figures(folder: Path | str) -> list[Path]:
    """Writes figures/NAME.pdf and .png of a study's folder, and figures/README.md with a caption for each; returns
    their paths. What the cells do not hold is left out, and README.md says so.

    Raises:
      ResultsError: there is no cell, or no matplotlib; OSError: a file that cannot be written.
    """
    folder = Path(folder)
    cells, _ = read_cells(folder)
    written, captions, skipped = [], [], []
    try:
        with style.paper():
            for name, draw, own in _drawings(cells):
                figure, text = draw(own)
                if figure is None:
                    skipped.append(f"{name}: {_lacking(draw)}")
                    continue
                written += style.save_all(figure, folder / "figures" / name)
                captions.append(f"## {name}\n\n![{name}]({name}.png)\n\n{text} {_bars(draw)}\n".replace(" \n", "\n"))
    except style.StyleError as error:
        raise ResultsError(str(error)) from None
    page = "# Figures of this study\n\nMade from `cells/` alone by `python -m jaxinfer.study figures`.\n\n"
    page += "\n".join(captions)
    if skipped:
        page += "\n## Left out\n\n" + "".join(f"- {each}\n" for each in skipped)
    write_whole(folder / "figures" / "README.md", page.encode(errors="backslashreplace"))
    return [*written, folder / "figures" / "README.md"]


def _drawings(cells: Sequence[Cell]) -> Iterator[Drawing]:
    for name, own in by_experiment(cells).items():
        if (draw := SCALING.get(own[0].kind)) is not None:
            yield name, draw, own
        yield f"{name}-phases", figure_time.phases, own
        models = by_model(own)
        for model, its in models.items():
            of_model = f"-{model}" if len(models) > 1 else ""
            if own[0].kind != "correctness":
                yield f"{name}-stages{of_model}", figure_time.stages, its
            yield f"{name}-gpus{of_model}", figure_gpus.timeline, its


def _lacking(draw: Any) -> str:
    if draw is figure_time.stages:
        return "no cell has the times of a stage (out.profile.json)"
    if draw is figure_gpus.timeline:
        return "no cell has samples of GPUs (out.gpu.csv)"
    if draw is figure_time.phases:
        return "no cell has its phases (out.metrics.json)"
    return "fewer than two points that can be compared"


def _bars(draw: Any) -> str:
    return "Bars: least and most of the repeats, or what they allow of a ratio." if draw in SCALING.values() else ""
