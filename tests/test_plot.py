"""The picture of a run, from output files as generate writes them."""

import json
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxinfer import style
from jaxinfer.plot import PlotError, _figure, _names, draw, phases, read_run

METRICS = {
    "unfinished": 0,
    "wall_s": 10.0,
    "work_s": 8.0,
    "output_tokens_per_s": 123.4,
    "engine": {"load_seconds": 3.0, "compile_seconds": 2.0, "prefill_seconds": 1.5, "decode_seconds": 6.0},
}


def write_run(path: Path, count: int = 50, metrics: dict | None = METRICS, more: str = "") -> Path:
    draws = random.Random(count)
    lines = [
        {"id": str(i), "index": 0, "ttft_s": (ttft := draws.uniform(0.1, 2)), "latency_s": ttft + draws.uniform(0.5, 4),
         "completion_tokens": draws.randint(1, 64)}
        for i in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + more)
    if metrics is not None:
        path.with_suffix(".metrics.json").write_text(json.dumps(metrics))
    return path


def size(picture: Path) -> tuple[int, int]:
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    return struct.unpack(">II", data[16:24])


def pixels(picture: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(picture)


def test_figures_are_those_of_the_lines(tmp_path):
    torn = '{"id": "bad", "line": 3, "error": "too long"}\n{"id": "51", "ttf'
    run = read_run(write_run(tmp_path / "out.jsonl", 50, more=torn), "out")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()[:50]]
    assert run.ttft.tolist() == [line["ttft_s"] for line in lines]
    assert run.latency.tolist() == [line["latency_s"] for line in lines]
    assert run.tokens.tolist() == [line["completion_tokens"] for line in lines]
    assert run.errors == 1 and run.metrics == METRICS


def test_loading_is_not_part_of_the_wall_time():
    assert phases(METRICS) == {"load": 3.0, "compile": 2.0, "prefill": 1.5, "decode": 6.0, "other": 0.5}


@pytest.mark.parametrize("metrics", [METRICS, None, {"unfinished": 7, "stopped_by": None}])
def test_one_run(tmp_path, metrics):
    draw([write_run(tmp_path / "out.jsonl", metrics=metrics)], tmp_path / "out.png")
    assert min(size(tmp_path / "out.png")) > 800
    bars = {tuple(colour) for colour in (pixels(tmp_path / "out.png")[::4, ::4, :3].reshape(-1, 3) * 255).round()}
    decode, compiling = (0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)
    assert decode in bars and (compiling in bars) == (metrics == METRICS)


def test_command_compares_runs(tmp_path):
    runs = []
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        runs.append(write_run(tmp_path / name / "out.jsonl", 20 + ord(name), METRICS if name != "b" else None))
    done = plot(*runs, "--output", tmp_path / "new" / "all.png")
    assert done.returncode == 0, done.stderr
    assert min(size(tmp_path / "new" / "all.png")) > 800


def test_phases_are_the_processes_own_where_they_were_measured():
    names = ["start", "load", "preprocess", "compile", "prefill", "decode", "write", "other"]
    ranks = [{name: float(place + rank) for place, name in enumerate(names)} | {"rank": rank} for rank in (0, 1)]
    assert list(phases(METRICS | {"phases": ranks}).items()) == [(name, at + 0.5) for at, name in enumerate(names)]


def test_runs_of_one_name_are_told_by_what_differs_of_their_folders():
    strong = [Path(f"runs/strong/stage={count}/out.jsonl") for count in (1, 2)]
    assert _names(strong) == ["stage=1", "stage=2"]
    assert _names([*strong, Path("runs/weak/stage=1/out.jsonl")]) == [
        "strong/stage=1",
        "strong/stage=2",
        "weak/stage=1",
    ]
    assert _names([Path("runs/out.jsonl"), Path("runs/a/out.jsonl")]) == ["runs", "a"]
    assert _names([Path("a/x.jsonl"), Path("b/y.jsonl")]) == ["x", "y"]


def test_eleven_runs_look_different_and_all_stand_in_a_legend_that_is_whole(tmp_path):
    paths = []
    for count in range(11):
        folder = tmp_path / "strong" / f"stage={count},tensor=2,{'a long name ' * 8}-0123456789abcdef"
        folder.mkdir(parents=True)
        paths.append(write_run(folder / "out.jsonl", 20 + count))
    with style.paper():
        figure = _figure([read_run(path, name) for path, name in zip(paths, _names(paths))])
        figure.draw_without_rendering()
        (legend,) = figure.legends
        texts = legend.get_texts()
        assert len(texts) == 11 + 5
        whole = figure.bbox
        for each in texts:
            box = each.get_window_extent()
            assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1
        forms = {(each.get_color(), each.get_marker(), str(each.get_linestyle())) for each in figure.axes[0].lines}
        assert len(forms) == 11
        assert min(axes.get_window_extent().height for axes in figure.axes) > 0.8 * 2.2 * figure.dpi / 1.5


def test_a_single_result_is_enough(tmp_path):
    draw([write_run(tmp_path / "out.jsonl", 1)], tmp_path / "out.png")
    assert size(tmp_path / "out.png")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no result in it"),
        ('{"id": "1", "line": 1, "error": "x"}\n', "no result in it"),
        ('{"a": 1}\n', "line 1: not a result"),
        ("[]\n", "line 1: not a result"),
        ("%PDF\n", "line 1: not a result"),
    ],
)
def test_what_is_no_output_is_refused(tmp_path, text, message):
    (tmp_path / "out.jsonl").write_text(text)
    with pytest.raises(PlotError, match=f"out.jsonl.*{message}"):
        draw([tmp_path / "out.jsonl"], tmp_path / "out.png")


def test_mistakes_take_one_line(tmp_path):
    run = write_run(tmp_path / "out.jsonl")
    for arguments, text in (
        ((tmp_path / "none.jsonl", "--output", "x.png"), "none.jsonl: No such file"),
        ((run, "--output", run / "x.png"), "x.png: cannot be written"),
        ((run, "--output", tmp_path / "x.docx"), "docx"),
    ):
        done = plot(*arguments)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith("jaxinfer.plot: error: ") and text in done.stderr


def test_without_matplotlib_and_without_jax(tmp_path):
    run = write_run(tmp_path / "out.jsonl")
    program = "import sys; sys.modules['matplotlib'] = None; sys.argv = ['plot', *sys.argv[1:]]; "
    program += "from jaxinfer.plot import main; status = main(); assert 'jax' not in sys.modules; sys.exit(status)"
    command = [sys.executable, "-c", program, run, "--output", tmp_path / "x.png"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2, "jaxinfer.plot: error: matplotlib is not installed: pip install -e '.[plot]' brings it\n"
    )  # fmt: skip


def plot(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "jaxinfer.plot", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)
