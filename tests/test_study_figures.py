"""A study's figures: there for what the cells hold, legends inside, the figures of the tables, the same bytes again."""

import shutil
import subprocess
import sys

import numpy as np
import pytest

import study_cells
from jaxinfer import style
from jaxinfer.study import figure_batch, figure_gpus, figure_scaling, figure_time
from jaxinfer.study.figures import write_figures
from jaxinfer.study.results import by_experiment, read_cells
from study_cells import cell, gpu_csv, metrics


def inside(figure) -> None:
    """All text of the figure and its legend is on the canvas."""
    figure.draw_without_rendering()
    whole = figure.bbox
    texts = [text for each in figure.legends for text in each.get_texts()]
    for axes in figure.axes:
        texts += [axes.xaxis.label, axes.yaxis.label]
        for axis, (low, high) in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim()))):
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    for text in texts:
        if text.get_text() and text.get_visible():
            box = text.get_window_extent()
            assert box.x0 >= -1 and box.x1 <= whole.x1 + 1 and box.y0 >= -1 and box.y1 <= whole.y1 + 1, text


def own(folder, name):
    return by_experiment(read_cells(folder)[0])[name]


def medians(axes):
    """The points of each series with bars."""
    return [each[0].get_xydata().tolist() for each in axes.containers]


def test_scaling_shows_the_tables_figures_beside_the_ideal(tmp_path):
    study_cells.study(tmp_path)
    with style.paper():
        figure, text = figure_scaling.strong(own(tmp_path, "strong"))
        inside(figure)
        upper, lower = figure.axes
        assert medians(upper) == [pytest.approx(np.array([[1, 1], [2, 8 / 4.4], [4, 3.2]]))]
        assert medians(lower)[0][2] == pytest.approx([4, 80])
        ideal = next(each for each in upper.lines if each.get_label() == "ideal")
        assert ideal.get_xydata().tolist() == [[1, 1], [2, 2], [4, 4]]
        bars = upper.containers[0][2][0].get_segments()
        assert bars[1][:, 1].tolist() == pytest.approx([7.6 / 4.6, 2])
        assert [each.get_text() for each in lower.get_xticklabels()] == ["1", "2", "4"]
        assert upper.get_ylabel() == "speed-up" and lower.get_ylabel() == "efficiency in %" and "n0" in text
        figure, _ = figure_scaling.weak(own(tmp_path, "weak"))
        inside(figure)
        assert medians(figure.axes[0])[0][1] == pytest.approx([2, 2 * 8.1 / 8.2])


def test_kinds_of_meshes_and_models_are_series_of_their_own(tmp_path):
    for model in ("a-model", "another-model-of-a-longer-name"):
        for mesh, count in (("stage=1", 1), ("stage=2", 2), ("tensor=2", 2), ("stage=2,tensor=2", 4), ("stage=4", 4)):
            cell(tmp_path, "strong", mesh, metrics((8.0 / count,)), model=model, devices=count)
    with style.paper():
        figure, _ = figure_scaling.strong(own(tmp_path, "strong"))
        inside(figure)
        labels = [each.get_text() for each in figure.legends[0].get_texts()]
        assert len(labels) == 5 and labels[-1] == "ideal"
        assert "a-model, stage × tensor" in [" ".join(each.split()) for each in labels]
        # each begins at one device; stage × tensor goes on at tensor=2, which is no series of its own
        assert [[count for count, _ in each] for each in medians(figure.axes[0])] == [[1, 2, 4]] * 4


def test_batch_marks_the_knee(tmp_path):
    study_cells.study(tmp_path)
    with style.paper():
        figure, text = figure_batch.batch(own(tmp_path, "batch"))
        inside(figure)
        assert [axes.get_ylabel() for axes in figure.axes] == ["tokens/s", "latency in s", "host memory\nin GiB"]
        assert medians(figure.axes[0])[0] == pytest.approx(np.array([[1, 64], [4, 204.8], [16, 409.6], [64, 512]]))
        rings = [[each.get_xydata()[0].tolist() for each in axes.lines if len(each.get_xydata()) == 1]
                 for axes in figure.axes]  # fmt: skip
        assert rings == [[pytest.approx([4, 204.8])], [[4, 1.25]], []] and "Kleinrock" in text
        assert figure.legends[0].get_texts()[-1].get_text() == "knee"


def test_bars_are_as_long_as_the_times(tmp_path):
    study_cells.study(tmp_path)
    with style.paper():
        figure, _ = figure_time.phases(own(tmp_path, "strong"))
        inside(figure)
        widths = [bar.get_width() for each in figure.axes[0].containers for bar in each]
        assert sum(widths[:8]) == pytest.approx(29.83) and len(widths) == 3 * 8
        figure, _ = figure_time.stages(own(tmp_path, "strong"))
        inside(figure)
        labels = [each.get_text() for each in figure.axes[0].get_yticklabels()]
        assert labels == ["stage=1:  0", "stage=2:  0", "1", "stage=4:  0", "1", "2", "3"]
        assert [figure.axes[0].containers[5 * place][0].get_width() for place in (0, 2)] == pytest.approx([2, 2.2])
        figure, _ = figure_time.stages(own(tmp_path, "cut"))
        assert len(figure.axes[0].get_yticklabels()) == 4  # A and B of the first round


def test_timeline_is_of_the_largest_cell_with_samples(tmp_path):
    for count in (1, 2):
        gpu_csv(cell(tmp_path, "strong", f"stage={count}", metrics((4.0,)), devices=count) / "out.gpu.csv", count)
    cell(tmp_path, "strong", "stage=4", metrics((4.0,)), devices=4)
    with style.paper():
        figure, text = figure_gpus.timeline(own(tmp_path, "strong"))
        inside(figure)
        assert "stage=2" in text and len(figure.axes) == 3
        values = figure.axes[0].lines[1].get_ydata()
        assert np.nanmax(values) == 94 and np.nanmin(values) == 0
        many = cell(tmp_path, "strong", "stage=16", metrics((1.0,)), devices=16) / "out.gpu.csv"
        gpu_csv(many, 16)
        figure, text = figure_gpus.timeline(own(tmp_path, "strong"))
        assert "Mean of 16 GPUs" in text and len(figure.axes[0].lines) == 1
        many.write_text("time_s,host\nx,y\n")
        assert "stage=2" in figure_gpus.timeline(own(tmp_path, "strong"))[1]


def test_samples_that_were_not_taken_are_no_zeros(tmp_path):
    (tmp_path / "out.gpu.csv").write_text("time_s,host,gpu,utilization_percent,power_w\n0,n,0,50,\n0.1,n,0,70,\n")
    (samples,) = figure_gpus.read_samples(tmp_path / "out.gpu.csv").values()
    assert samples["utilization_percent"].tolist() == [50, 70] and np.isnan(samples["power_w"]).all()
    binned = figure_gpus._binned(np.array([0.0, 0.1, 2.5]), np.array([1.0, 3.0, np.nan]), np.array([0, 1, 2, 3.0]))
    assert binned[0] == 2 and np.isnan(binned[1:]).all()


@pytest.mark.slow
def test_figures_are_functions_of_the_cells_alone_and_say_what_is_missing(tmp_path):
    for mesh, count in (("stage=1", 1), ("stage=2", 2)):
        cell(tmp_path, "strong", mesh, metrics((8.0 / count,)), devices=count)
    cell(tmp_path, "weak", "stage=1", None, state="failed", why="out of memory")
    kept = {path.name: path.read_bytes() for path in write_figures(tmp_path)}
    names = {"strong", "strong-phases"}
    assert kept.keys() == {f"{name}.{kind}" for name in names for kind in ("pdf", "png")} | {"README.md"}
    said = kept["README.md"].decode()
    assert "weak: fewer than two points" in said and "strong-gpus: no cell has samples of GPUs" in said
    assert "strong-stages: no cell has the times of a stage" in said
    shutil.rmtree(tmp_path / "figures")
    assert {path.name: path.read_bytes() for path in write_figures(tmp_path)} == kept


def test_without_matplotlib_one_line_names_the_extra(tmp_path):
    cell(tmp_path, "strong", "stage=1", metrics((8.0,)))
    program = "import sys; sys.modules['matplotlib'] = None; from jaxinfer.study.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", program, "figures", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == (
        "jaxinfer.study: error: matplotlib is not installed: pip install -e '.[plot]' brings it\n"
    )
