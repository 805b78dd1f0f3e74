"""Results on disk: whole lines, whatever happens, and nothing written twice by the run that goes on."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jaxinfer import outputs
from jaxinfer.checkpoint.files import write_whole
from jaxinfer.engine.params import SamplingParams
from jaxinfer.engine.request import Output, TokenLogprob
from jaxinfer.inputs import InputError, InputRecord
from jaxinfer.outputs import OutputError, Writer, beside, changes, output_line, prepare, take_back

SETTINGS = {"model": "abc", "dtype": "float32", "temperature": 0.0}
PARAMS = SamplingParams()


def request(name: str, n: int = 1, prompt: str = "a") -> InputRecord:
    return InputRecord(1, name, "prompt", prompt, PARAMS.merge({"n": n}))


def line(name: str, index: int = 0, **more) -> str:
    return json.dumps({"id": name, "index": index, "text": "é", **more}) + "\n"


def begin(path: Path, records, settings=SETTINGS, overwrite=False, anyway=False) -> set[str]:
    with Writer(path) as writer:
        return prepare(writer, records, settings, {"command": "c"}, overwrite, anyway)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "deep" / "out.jsonl"


def test_a_line_has_the_fields_of_the_command(out):
    score = TokenLogprob(5, -0.5, 1, [(5, -0.5), (6, -2.0)])
    output = Output("a", 1, "hé", [5], "stop", None, 3, 1, 0.12345678, 0.2, [score], [None, score])
    begin(out, [request("a")])
    with Writer(out) as writer:
        writer.write(output_line(output))
    scored = {
        "token_id": 5,
        "logprob": -0.5,
        "rank": 1,
        "top": [{"token_id": 5, "logprob": -0.5}, {"token_id": 6, "logprob": -2.0}],
    }
    assert out.read_text("utf-8").count("hé") == 1
    assert json.loads(out.read_text("utf-8")) == {
        "id": "a",
        "index": 1,
        "text": "hé",
        "token_ids": [5],
        "finish_reason": "stop",
        "limit": None,
        "prompt_tokens": 3,
        "completion_tokens": 1,
        "ttft_s": 0.123457,
        "latency_s": 0.2,
        "logprobs": [scored],
        "prompt_logprobs": [None, scored],
    }
    plain = output_line(Output("a", 0, "", [], "length", "context", 3, 0, 0.1, 0.2))
    assert "logprobs" not in plain and "prompt_logprobs" not in plain
    assert (plain["finish_reason"], plain["limit"]) == ("length", "context")
    assert "meta" not in plain and output_line(replace(output, meta=[1]))["meta"] == [1]
    assert output_line(replace(output, error="x", meta={"a": 0})) == {
        "id": "a", "index": 1, "error": "x", "meta": {"a": 0},
    }  # fmt: skip


def test_files_beside_the_output():
    assert beside(Path("x/out.jsonl"), "metrics") == Path("x/out.metrics.json")
    assert beside(Path("out.txt"), "run") == Path("out.txt.run.json")


def test_lines_appear_as_they_are_written(out):
    with Writer(out) as writer:
        for count in (1, 2):
            writer.write({"id": str(count)})
            assert len(out.read_text().splitlines()) == count


WHOLE = line("a") + line("b") + line("c", 0) + line("c", 1)


@pytest.mark.parametrize(
    ("found", "kept", "finished"),
    [
        (WHOLE, WHOLE, "abc"),
        (WHOLE + '{"id": "d", "ind', WHOLE, "abc"),  # torn inside
        (WHOLE + line("d")[:-1], WHOLE, "abc"),  # torn at its end: nobody knows whether the line was to be longer
        (WHOLE + "\0\0\0", WHOLE, "abc"),
        (line("c", 1) + line("a"), line("a"), "a"),  # one sample of two
        (json.dumps({"id": "b", "line": 2, "error": "bad"}) + "\n" + line("a"), line("a"), "a"),
        (line("gone") + line("a"), line("gone") + line("a"), "a"),  # of an input that has no such id any more
        ("", "", ""),
    ],
)
def test_what_a_run_that_goes_on_finds(out, found, kept, finished):
    records = [request("a"), request("b"), request("c", n=2), request("d"), InputError(5, "e", "bad")]
    begin(out, records)
    out.write_text(found)
    assert begin(out, records) == set(finished)
    assert out.read_text() == kept
    assert begin(out, records) == set(finished)  # and once more
    assert out.read_text() == kept
    assert [path.name for path in sorted(out.parent.iterdir())] == ["out.jsonl", "out.run.json"]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ("not json\n" + line("a"), "line 1: not a result"),
        (line("a") + '{"question": 1}\n' + line("b"), "line 2: not a result"),
        (line("a") + line("a"), "line 2: id 'a', index 0 is there twice"),
        (line("a") + "[1]\n" + line("b"), "line 2: not a result"),
    ],
)
def test_a_file_that_is_no_output_stays_as_it_is(out, found, message):
    begin(out, [request("a")])
    out.write_text(found)
    with pytest.raises(OutputError, match=message):
        begin(out, [request("a")])
    assert out.read_text() == found


def test_changed_settings_are_refused_unless_told_otherwise(out):
    records = [request("a"), request("b")]
    begin(out, records)
    out.write_text(line("a"))
    changed = SETTINGS | {"temperature": 0.7, "model": "def"}
    with pytest.raises(
        OutputError, match=r"model: 'abc' -> 'def'; temperature: 0\.0 -> 0\.7.*--overwrite.*--resume-anyway"
    ):
        begin(out, records, changed)
    assert out.read_text() == line("a")
    assert begin(out, records) == {"a"}
    assert begin(out, records, changed, anyway=True) == {"a"}
    assert begin(out, records, changed) == {"a"}  # what was said once stays said
    assert begin(out, records, changed, overwrite=True) == set()
    assert out.read_text() == ""


def test_a_changed_prompt_of_a_finished_id_is_refused(out):
    begin(out, [request("a"), request("b")])
    out.write_text(line("a"))
    assert begin(out, [request("a"), request("b", prompt="other"), request("new")]) == {"a"}
    with pytest.raises(OutputError, match="the prompt or sampling fields of id 'a'"):
        begin(out, [request("a", prompt="other"), request("b")])
    assert begin(out, [request("b")]) == set()  # nothing of a is asked for
    assert begin(out, [request("a")]) == {"a"}  # which is not forgotten
    with pytest.raises(OutputError, match="id 'a'"):
        begin(out, [request("a", prompt="other")])


def test_results_without_their_settings_are_refused(out):
    begin(out, [request("a")])
    out.write_text(line("a"))
    run_file = out.with_name("out.run.json")
    for damage in (run_file.unlink, lambda: run_file.write_text("{")):
        damage()
        with pytest.raises(OutputError, match=r"out\.run\.json, which tells the settings they were made with, is"):
            begin(out, [request("a")])
    assert begin(out, [request("a")], anyway=True) == {"a"}
    assert begin(out, [request("a")]) == {"a"}


def test_the_run_file_tells_every_start(out):
    begin(out, [request("a")])
    out.write_text(line("a"))
    begin(out, [request("a"), request("b")])
    run = json.loads(out.with_name("out.run.json").read_text())
    assert run["settings"] == SETTINGS
    assert run["runs"] == [{"command": "c"}] * 2
    assert sorted(run["prompts"]) == ["a", "b"]


def test_a_link_to_an_output_stays_one_when_a_torn_line_is_dropped(out):
    begin(out, [request("a"), request("b")])
    out.write_text(line("a") + line("b")[:-5])
    link = out.with_name("link.jsonl")
    link.symlink_to(out)
    for kind in ("run", "metrics"):
        if beside(out, kind).exists():
            beside(out, kind).rename(beside(link, kind))
    assert begin(link, [request("a"), request("b")]) == {"a"}
    assert link.is_symlink() and out.read_text() == line("a")


@pytest.mark.parametrize("text", ["[]", "5", '{"settings": null, "prompts": {}, "runs": []}', '{"settings": {}}'])
def test_a_run_file_of_another_shape_is_damaged(out, text):
    begin(out, [request("a")])
    out.write_text(line("a"))
    beside(out, "run").write_text(text)
    with pytest.raises(OutputError, match="is damaged"):
        begin(out, [request("a")])
    assert begin(out, [request("a")], anyway=True) == {"a"}


def test_two_runs_do_not_write_to_one_output(out):
    records = [request("a"), request("b", n=2)]
    begin(out, records)
    out.write_text(line("a") + line("b", 1))

    def refused():
        for again in (lambda: Writer(out), lambda: begin(out, [], overwrite=True)):
            with pytest.raises(OutputError, match="another run is writing to it"):
                again()

    with Writer(out) as writer:
        refused()
        assert prepare(writer, records, SETTINGS, {}, False, False) == {"a"}
        assert out.read_text() == line("a")
        refused()  # although the file is another one now
        writer.clear()
        take_back(out)
        writer.write({"id": "b"})
    with Writer(out):
        assert out.read_text() == '{"id": "b"}\n'


# The second opens the file, the first then puts another in its place: a lock on what is gone would be nobody's.
LATE = """
import fcntl, sys
from pathlib import Path
from jaxinfer import outputs
lock = outputs._lock
def late(file, path):
    print("open", flush=True)
    sys.stdin.readline()
    outputs._lock = lock
    lock(file, path)
outputs._lock = late
with outputs.Writer(Path(sys.argv[1])) as writer:
    writer.write({"id": "second"})
"""


@pytest.mark.parametrize("replaced", [True, False])
def test_a_lock_is_on_the_file_that_has_the_name(out, replaced):
    begin(out, [request("a")])
    out.write_text(line("a") + line("b") if replaced else "")
    with Writer(out) as writer:
        second = subprocess.Popen([sys.executable, "-c", LATE, out], stdin=-1, stdout=-1, text=True)
        assert second.stdout.readline() == "open\n"
        writer.keep([(0, len(line("a").encode()))]) if replaced else out.unlink()
    second.communicate("go\n", timeout=60)
    assert second.returncode == 0
    assert [json.loads(each)["id"] for each in out.open()] == ["a", "second"][1 - replaced :]


@pytest.mark.parametrize("what", ["fifo", "link", "stdout", "file"])
def test_a_stream_has_no_files_beside_it(tmp_path, what):
    path = tmp_path / "out"
    if what == "fifo":
        os.mkfifo(path)
    elif what == "link":
        path.symlink_to("/dev/stdout")
    script = f"""
from pathlib import Path
from jaxinfer import outputs
with outputs.Writer(Path({"/dev/stdout" if what == "stdout" else str(path)!r})) as writer:
    assert outputs.prepare(writer, [], {{}}, {{}}, False, False) == set()
    writer.note("metrics", {{}})
    for each in range(2000):
        writer.write({{"id": str(each), "text": "x" * 100}})
"""
    with open(tmp_path / "taken", "wb") as taken:
        reader = subprocess.Popen(["cat", path], stdout=taken) if what == "fifo" else None
        subprocess.run([sys.executable, "-c", script], check=True, stdout=taken, timeout=60)
        if reader:
            reader.wait(60)
    found = path if what == "file" else tmp_path / "taken"
    assert [json.loads(each)["id"] for each in found.open()] == [str(each) for each in range(2000)]
    left = {each.name for each in tmp_path.iterdir()} - {"out", "taken"}
    assert left == ({"out.run.json", "out.metrics.json"} if what == "file" else set())


def test_a_pipe_that_nobody_reads(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "out")
    monkeypatch.setattr(outputs, "READER_SECONDS", 0.2)
    with pytest.raises(OutputError, match="nobody reads from this pipe"):
        Writer(tmp_path / "out")


def test_a_reader_that_has_gone(tmp_path):
    out, into = os.pipe()
    with Writer(Path(f"/dev/fd/{into}")) as writer:
        writer.write({"id": "a"})
        os.close(out)
        with pytest.raises(OutputError, match=r"Broken pipe, after 1 lines"):
            writer.write({"id": "b"})
    os.close(into)


def test_a_whole_file_goes_into_streams_and_new_folders(tmp_path):
    out, into = os.pipe()
    write_whole(Path(f"/dev/fd/{into}"), b"whole")
    os.close(into)
    assert os.read(out, 99) == b"whole"
    write_whole(tmp_path / "new" / "folder" / "a.json", b"whole")
    assert (tmp_path / "new" / "folder" / "a.json").read_bytes() == b"whole"
    with pytest.raises(OSError, match="No space left"):
        write_whole(Path("/dev/full"), b"whole")
    with pytest.raises(OSError) as error:
        write_whole(Path("/proc/x.json"), b"whole")
    assert error.value.filename == "/proc/x.json"
    assert os.path.realpath("/dev/full") == "/dev/full" and not Path("/dev/full").is_file()


def test_changes_name_what_differs():
    assert changes({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == ["b: 2 -> 3", "c: None -> 4"]


# The limit on a file's size is a full disk that a test can have: the last write is cut, the next one fails.
FULL = """
import resource, sys
from pathlib import Path
from jaxinfer.outputs import OutputError, Writer
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
writer = Writer(Path(sys.argv[1]))
if sys.argv[2:]:
    try:
        writer.keep([(0, 99), (0, 99)])
    except OutputError as error:
        print(error)
try:
    for each in range(20):
        writer.write({"id": str(each), "text": "x" * 20})
except OutputError as error:
    print(error)
"""


def test_a_full_disk_leaves_whole_lines(out):
    out.parent.mkdir()
    done = subprocess.run([sys.executable, "-c", FULL, str(out)], capture_output=True, text=True, check=True)
    lines = out.read_text().splitlines(keepends=True)
    assert [json.loads(line)["id"] for line in lines] == ["0", "1"]
    assert lines[-1].endswith("\n")
    assert f"{out}: File too large; all {out.stat().st_size} bytes before this result are whole" in done.stdout


def test_a_full_disk_leaves_nothing_half_written(out):
    out.parent.mkdir()
    out.write_bytes(b"x" * 99 + b"\n")
    done = subprocess.run([sys.executable, "-c", FULL, out, "keep"], capture_output=True, text=True, check=True)
    assert "cannot be rewritten without its unfinished lines: File too large" in done.stdout
    assert out.read_bytes() == b"x" * 99 + b"\n" and list(out.parent.iterdir()) == [out]
    script = "import sys, jaxinfer.checkpoint.files as f, pathlib as p; f.write_whole(p.Path(sys.argv[1]), b'x' * 9000)"
    full = ["prlimit", "--fsize=4096", sys.executable, "-c", script, out.with_name("new.json")]
    done = subprocess.run(full, capture_output=True, text=True, check=False)
    assert "File too large" in done.stderr and list(out.parent.iterdir()) == [out]


def test_an_output_that_cannot_be(tmp_path):
    with pytest.raises(OutputError, match="Is a directory"):
        begin(tmp_path, [request("a")])
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"Not a directory|File exists"):
        begin(tmp_path / "file" / "out.jsonl", [request("a")])
