"""The style of the figures: series told apart, legends inside the canvas, the same bytes again."""

import subprocess
import sys

import pytest

from jaxinfer import style


def test_no_two_series_look_alike():
    forms = [style.line(place) for place in range(84)]
    assert len({(form["color"], form["marker"], str(form["linestyle"])) for form in forms}) == 84
    assert len({form["marker"] for form in forms[:12]}) == 12
    fills = [style.fill(place) for place in range(64)]
    assert len({(form["facecolor"], form["hatch"]) for form in fills}) >= 16
    assert len({form["facecolor"] for form in fills[:8]}) == 8


def test_wrapped_text_loses_nothing():
    for text in ("stage=2,tensor=4/one-and-another word", "x" * 50, "", "a"):
        lines = style.wrapped(text, 12).split("\n")
        assert max(map(len, lines)) <= 12
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert style.wrapped("stage=2,tensor=4", 9) == "stage=2,\ntensor=4"


@pytest.mark.parametrize(
    "labels",
    [
        ["a", "b"],
        [f"stage={place},tensor=2" for place in range(11)],
        ["no space to break at".replace(" ", "") * 20] * 3,
    ],
)
def test_legends_are_inside_the_canvas_and_leave_the_axes_their_height(labels):
    with style.paper():
        figure, axes = style.canvas(style.COLUMN, 2.4)
        handles = [axes.plot([0, 1], [0, place], **style.line(place))[0] for place in range(len(labels))]
        axes.set(xlabel="devices", ylabel="speed-up")
        figure.draw_without_rendering()
        before = axes.get_window_extent().height
        made = style.legend(figure, handles, labels)
        figure.draw_without_rendering()
        box, whole = made.get_window_extent(), figure.bbox
        assert 0 <= box.x0 and box.x1 <= whole.x1 and 0 <= box.y0 and box.y1 <= whole.y1
        assert axes.get_window_extent().height > 0.85 * before
        assert figure.get_size_inches()[0] == style.COLUMN


def test_pdf_and_png_are_the_same_bytes_again_whatever_the_user_has_set(tmp_path):
    import matplotlib

    kept = []
    for colour in ("red", "blue"):
        with matplotlib.rc_context({"axes.facecolor": colour}), style.paper():
            figure, axes = style.canvas(style.COLUMN, 2)
            axes.plot([0, 1], [0, 1], **style.line(0))
            paths = style.save_all(figure, tmp_path / "batch-0.5")
        assert [path.name for path in paths] == ["batch-0.5.png", "batch-0.5.pdf"]
        kept.append([path.read_bytes() for path in paths])
    assert kept[0] == kept[1]
    assert kept[0][1].startswith(b"%PDF") and kept[0][0].startswith(b"\x89PNG")


def test_what_cannot_be_drawn_takes_one_line(tmp_path):
    with style.paper():
        figure, _ = style.canvas(1, 1)
        with pytest.raises(style.StyleError, match=r"x\.docx: .*docx"):
            style.save(figure, tmp_path / "x.docx")
        with pytest.raises(style.StyleError, match=r"x\.png: File exists"):
            (tmp_path / "file").touch()
            style.save(figure, tmp_path / "file" / "x.png")
    program = "import sys; sys.modules['matplotlib'] = None\nfrom jaxinfer import style\nwith style.paper(): pass"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "StyleError: matplotlib is not installed: pip install -e '.[plot]'" in done.stderr
