"""``python -m jaxinfer.generate`` as a user runs it: whole commands on real checkpoints."""

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from converting import without_checksums
from hf_models import make_hf_folder
from jaxinfer import generate
from processes import free_port, own_environment

ROOT = Path(__file__).resolve().parents[1]
STORIES = ROOT / "examples" / "tinystories"
SMALL = ("--dtype", "float32", "--max-batch", "4", "--prefill-chunk", "32", "--decode-steps", "4")
COMPILED = TemporaryDirectory(prefix="jaxinfer-test-")
FOUR = ("--mesh", "stage=2,tensor=2", "--cpu-devices", "4")


def convert(source: Path, output: Path) -> Path:
    command = [sys.executable, "-m", "convert", "--source", source, "--output", output, "--dtype", "float32"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return output


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random model without a tokenizer: 96 tokens, context 128."""
    folder = tmp_path_factory.mktemp("tiny")
    make_hf_folder(folder / "hf", num_hidden_layers=4)
    return convert(folder / "hf", folder / "ckpt")


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    return convert(STORIES / "model", tmp_path_factory.mktemp("stories") / "ckpt")


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "jaxinfer.generate", *map(str, arguments)]


def environment() -> dict[str, str]:
    """A user's: nothing of the tests' own settings for JAX, but what one command compiled the next need not."""
    own = own_environment("NPROC", "JAX_PLATFORMS")
    return own | {"JAX_COMPILATION_CACHE_DIR": COMPILED.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def run(*arguments, status: int = 0, stdin: str | None = None) -> subprocess.CompletedProcess:
    done = subprocess.run(
        command(*arguments), cwd=ROOT, env=environment(), input=stdin, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == status, done.stderr
    return done


def in_process(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    """Status and standard error; JAX starts with the tests' own devices."""
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        generate.main()
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize("option", ["--prompt", "--stop"])
def test_an_argument_that_is_not_utf8(monkeypatch, capsys, option):
    status, error = in_process(monkeypatch, capsys, "--model", "absent", "--prompt", "a", option, "caf\udce9")
    assert status == 2 and f"error: argument {option}: not UTF-8: byte 0xe9 at byte 4 of 'caf\\udce9'" in error
    # the bytes of UTF-8 in a locale that is ASCII
    status, error = in_process(monkeypatch, capsys, "--model", "absent", "--prompt", "a", option, "caf\udcc3\udca9")
    assert status == 2 and "absent" in error and "UTF-8" not in error


def write_lines(path: Path, lines) -> Path:
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return path


def results(path: Path) -> dict[tuple[str, int], dict]:
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    found = {(line["id"], line["index"]): line for line in lines if "error" not in line}
    assert len(found) == sum("error" not in line for line in lines), "a result is there twice"
    return found


def tokens(path: Path) -> dict[tuple[str, int], tuple]:
    return {key: (line["token_ids"], line["finish_reason"]) for key, line in results(path).items()}


def random_lines(count: int) -> list[dict]:
    draw = random.Random(5)
    return [
        {
            "id": f"r{i}",
            "prompt_token_ids": [draw.randrange(3, 96) for _ in range(draw.randrange(1, 60))],
            "max_new_tokens": draw.randrange(1, 40),
            "n": draw.choice([1, 1, 3]),
        }
        for i in range(count)
    ]


def test_bad_lines_are_told_and_the_rest_runs(tiny, tmp_path):
    prompts = write_lines(
        tmp_path / "in.jsonl",
        [
            {"id": "good", "prompt_token_ids": [5, 6, 7]},
            b"{bad json",
            {"id": "typo", "prompt_token_ids": [5], "max_new_token": 3},
            {"id": "long", "prompt_token_ids": [5] * 128},
            {"id": "range", "prompt_token_ids": [5, 96]},
            {"id": "empty", "prompt_token_ids": []},
            {"id": "good", "prompt_token_ids": [5]},
            {"id": "text", "prompt": "Once"},
            b'{"id": "bytes\xff"}',
            {"id": "bias", "prompt_token_ids": [5], "logit_bias": {"96": 1}},
            {"prompt_token_ids": [9] * 100, "n": 2, "max_new_tokens": 3, "logprobs": 2, "temperature": 1, "seed": 3},
            {"id": "fits", "prompt_token_ids": [9] * 127},
        ],
    )
    out = tmp_path / "out.jsonl"
    done = run("--model", tiny, "--prompts", prompts, "--output", out, "--max-new-tokens", 5, *SMALL, *FOUR)
    found = results(out)
    assert sorted(found) == [("11", 0), ("11", 1), ("fits", 0), ("good", 0)]
    assert len(found["good", 0]["token_ids"]) <= 5 and found["good", 0]["prompt_tokens"] == 3
    assert found["fits", 0]["completion_tokens"] == 1 and found["fits", 0]["finish_reason"] == "length"
    assert (found["fits", 0]["limit"], found["11", 0]["limit"]) == ("context", "max_new_tokens")
    for index in (0, 1):
        line = found["11", index]
        fields = "id index text token_ids finish_reason limit prompt_tokens completion_tokens ttft_s latency_s"
        assert list(line) == [*fields.split(), "logprobs"]
        assert [each["token_id"] for each in line["logprobs"]] == line["token_ids"]
        assert all(len(each["top"]) == 2 and each["logprob"] <= 0 for each in line["logprobs"])
        assert 0 < line["ttft_s"] <= line["latency_s"]
    errors = {line["line"]: line for line in map(json.loads, out.read_text().splitlines()) if "error" in line}
    expected = {
        2: ("2", "bad JSON"),
        3: ("typo", "did you mean 'max_new_tokens'"),
        4: ("long", "128 tokens; legal: up to 127"),
        5: ("range", "token id 96 is out of range; legal: 0 to 95"),
        6: ("empty", "at least 1 token"),
        7: ("good", "used by line 1"),
        8: ("text", "no tokenizer"),
        9: ("9", "not UTF-8"),
        10: ("bias", "token id 96"),
    }
    assert sorted(errors) == sorted(expected)
    for number, (name, message) in expected.items():
        assert errors[number]["id"] == name and message in errors[number]["error"]
        assert re.search(f"jaxinfer.generate: line {number} .*{re.escape(message)}", done.stderr)
    assert "WARNING: 9 of 12 lines are bad and did not run" in done.stderr
    metrics = json.loads((tmp_path / "out.metrics.json").read_text())
    assert metrics["bad lines"] == 9 and metrics["requests"] == 3 and metrics["samples"] == 4
    assert metrics["output_tokens"] == sum(len(line["token_ids"]) for line in found.values())
    described = json.loads((tmp_path / "out.run.json").read_text())
    assert described["runs"][0]["mesh"] == {"stage": 2, "data": 1, "tensor": 2}
    assert described["runs"][0]["devices"]["count"] == 4
    assert described["settings"]["max_new_tokens"] == 5
    # once more: what is finished stays as it was, the bad lines are tried again
    before = tokens(out)
    done = run("--model", tiny, "--prompts", prompts, "--output", out, "--max-new-tokens", 5, *SMALL, *FOUR)
    assert tokens(out) == before
    assert len(out.read_text().splitlines()) == 4 + 9


def second_is_refused(first: subprocess.Popen, *arguments) -> None:
    """A second run on the output of one that has looked at it and loads its model."""
    while not arguments[-1].with_suffix(".run.json").exists():
        assert first.poll() is None
        time.sleep(0.005)
    first.send_signal(signal.SIGSTOP)
    try:
        assert f"{arguments[-1]}: another run is writing to it" in run(*arguments, status=2).stderr
    finally:
        first.send_signal(signal.SIGCONT)


@pytest.mark.slow
def test_killed_and_run_again_equals_undisturbed(tiny, tmp_path):
    prompts = write_lines(tmp_path / "in.jsonl", random_lines(60))
    arguments = ("--model", tiny, "--prompts", prompts, "--temperature", 0.9, *SMALL)
    run(*arguments, "--output", tmp_path / "whole.jsonl")
    whole = tokens(tmp_path / "whole.jsonl")
    assert len(whole) == sum(line["n"] for line in random_lines(60))
    out = tmp_path / "out.jsonl"
    kills, before = 0, 0
    while kills < 2:
        going = subprocess.Popen(
            command(*arguments, "--output", out), cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL
        )
        if not kills:
            second_is_refused(going, *arguments, "--output", out)
        while going.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < before + 20):
            time.sleep(0.005)
        going.send_signal(signal.SIGKILL)
        assert going.wait() == -signal.SIGKILL, "the run was over before it was killed"
        kills, before = kills + 1, out.read_bytes().count(b"\n")
        with open(out, "a") as file:
            file.write('{"id": "r59", "index": 0, "te')  # what a crash of the machine leaves
    assert 20 <= before < len(whole)
    done = run(*arguments, "--output", out)
    assert tokens(out) == whole
    assert "already finished" in done.stderr
    runs = json.loads((tmp_path / "out.run.json").read_text())["runs"]
    assert len(runs) == 3
    last = out.read_bytes()
    assert "nothing to run" in run(*arguments, "--output", out).stderr
    assert out.read_bytes() == last


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_signal_puts_back_what_has_not_begun(tiny, tmp_path, number):
    prompts = write_lines(tmp_path / "in.jsonl", random_lines(40))
    arguments = ("--model", tiny, "--prompts", prompts, "--output", tmp_path / "out.jsonl", *SMALL)
    whole = ("--model", tiny, "--prompts", prompts, "--output", tmp_path / "whole.jsonl", *SMALL)
    run(*whole)
    process = subprocess.Popen(command(*arguments), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out.jsonl").exists() or (tmp_path / "out.jsonl").read_text().count("\n") < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 0, error
    metrics = json.loads((tmp_path / "out.metrics.json").read_text())
    assert metrics["stopped_by"] == number.name
    assert 0 < metrics["unfinished"] < 40
    assert f"stopped by {number.name}: {metrics['unfinished']} of 40 requests are left" in error
    run(*arguments)
    assert tokens(tmp_path / "out.jsonl") == tokens(tmp_path / "whole.jsonl")
    assert json.loads((tmp_path / "out.metrics.json").read_text())["unfinished"] == 0


@pytest.mark.slow
def test_two_processes_write_once_and_agree_with_one(tiny, tmp_path):
    prompts = write_lines(tmp_path / "in.jsonl", [*random_lines(8), {"id": "bad"}])
    arguments = ("--model", tiny, "--prompts", prompts, "--temperature", 0.9, *SMALL)
    run(*arguments, "--output", tmp_path / "one.jsonl")
    one = tokens(tmp_path / "one.jsonl")
    out = tmp_path / "two.jsonl"

    def pair(*more) -> list[str]:
        port = free_port()
        where = (
            "--mesh",
            "stage=2,tensor=2",
            "--cpu-devices",
            2,
            "--coordinator",
            f"127.0.0.1:{port}",
            "--num-processes",
            2,
        )
        both = [
            subprocess.Popen(
                command(*arguments, "--output", out, *where, *more, "--process-id", rank),
                cwd=ROOT,
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in (0, 1)
        ]
        errors = [each.communicate(timeout=300)[1] for each in both]
        assert [each.returncode for each in both] == [0, 0], errors
        return errors

    profile = tmp_path / "profile"
    renewed = (tiny / "manifest.json").read_bytes()
    without_checksums(tiny)
    first, second = pair("--profile", profile, "--profile-steps", "3:5")
    assert len(list(profile.glob("rank-*/**/*.xplane.pb"))) == 2
    # stage, rank and device of a row, then times: both processes are in the table that process 0 shows
    rows = re.findall(r"^ +(\d) +(\d) +(\d)( +[\d.]+){7} +[\d,]+ *$", first, re.MULTILINE)
    assert {row[1] for row in rows} == {"0", "1"} and "profile of steps" not in second
    assert "bubble in time" in first and "imbalance" in first
    measured = json.loads((tmp_path / "two.profile.json").read_text())
    assert [(each["rank"], each["stage"]) for each in measured["devices"]] == [(0, 0), (0, 0), (1, 1), (1, 1)]
    # exchanges between the processes are known from each other too
    decoding = [each["programs"]["decode"] for each in measured["devices"]]
    assert all(each["unmatched"] < 0.05 * each["unhidden"] for each in decoding)
    assert tokens(out) == one
    assert "output tokens/s" in first and "output tokens/s" not in second
    warnings = f"{tiny}: made by an older version, so damage to its manifest or tokenizer would go unseen"
    assert (first + second).count(warnings) == 1
    (tiny / "manifest.json").write_bytes(renewed)  # adding checksums makes no other model of it
    assert json.loads((tmp_path / "two.run.json").read_text())["runs"][0]["devices"]["processes"] == 2
    # half of it is lost: process 0 looks at what is there, both do the rest
    lines = [line for line in out.read_text().splitlines(keepends=True) if "error" not in line]
    out.write_text("".join(lines[: len(lines) // 2]))
    copy = tmp_path / "copy.json"  # each process may have its own
    copy.write_bytes((tmp_path / "two.profile.json").read_bytes())
    first, _ = pair("--stage-layers", f"measured:{copy}")
    assert "older version" not in first and f"stage-layers: 2,2 by {copy}: the cut that was measured, " in first
    assert tokens(out) == one
    *_, last = json.loads((tmp_path / "two.run.json").read_text())["runs"]
    assert last["stage_layers_from"]["stage_layers"] == [2, 2] == last["stage_layers_from"]["measured_with"]


@pytest.mark.slow
def test_a_profile_of_a_short_run(stories, tmp_path):
    arguments = ("--model", stories, "--prompt", "Once", "--profile", tmp_path / "p", "--ignore-eos")
    shown = run(*arguments, "--max-new-tokens", 30).stderr
    # a tick, then four blocks of eight steps
    assert "--profile-steps 20:30: these requests take at most 5 steps; traced are 1:4" in shown
    assert "profile of steps 1 to 4, as-run: ms per decode step, mean of 32" in shown


@pytest.mark.slow
def test_text_on_the_screen(stories):
    done = run(
        "--model", stories, "--prompt", "Once upon a time", "--prompt", "The cat", "--max-new-tokens", 12, *SMALL
    )
    shown = dict(re.findall(r"=== (\d)\n(.*?)\n(?=\n|$)", done.stdout, re.DOTALL))
    assert shown["1"].startswith("Once upon a time, there was") and shown["2"].startswith("The cat ")
    assert "output tokens/s" in done.stderr and "Traceback" not in done.stderr


def test_what_is_refused_leaves_no_output_and_takes_none_away(tiny, tmp_path, monkeypatch, capsys):
    prompts = write_lines(tmp_path / "in.jsonl", [{"prompt_token_ids": [3, 4]}])
    out = tmp_path / "out.jsonl"
    arguments = ("--model", tiny, "--prompts", prompts, "--output", out, "--max-new-tokens", 2)
    (tmp_path / "out.gpu.csv").touch()
    (tmp_path / "out.gpu.rank-7.csv").touch()  # of a run that was killed
    assert in_process(monkeypatch, capsys, *arguments, "--mesh", "stage=5")[0] == 2
    assert list(tmp_path.iterdir()) == [prompts]
    assert in_process(monkeypatch, capsys, *arguments, "--mesh", "tensor=1")[0] == 0
    whole = out.read_bytes()
    assert in_process(monkeypatch, capsys, *arguments[:-1], 3, "--mesh", "stage=5")[0] == 2
    assert out.read_bytes() == whole


def test_without_a_gpu_nothing_is_watched(tiny, tmp_path, monkeypatch, capsys):
    prompts = write_lines(tmp_path / "in.jsonl", [{"prompt_token_ids": [3, 4]}])
    out, samples = tmp_path / "out.jsonl", tmp_path / "out.gpu.csv"
    arguments = ("--model", tiny, "--prompts", prompts, "--output", out, "--max-new-tokens", 2, "--mesh", "tensor=1")
    samples.touch()  # of earlier runs
    (tmp_path / "out.gpu.rank-0.csv").touch()
    assert in_process(monkeypatch, capsys, *arguments, "--monitor", "auto")[0] == 0
    metrics = json.loads((tmp_path / "out.metrics.json").read_text())
    assert metrics["gpus"] is None and metrics["energy"] is None
    assert {path.name.partition(".")[2] for path in tmp_path.glob("out.*")} == {"jsonl", "run.json", "metrics.json"}
    samples.touch()
    assert in_process(monkeypatch, capsys, *arguments)[0] == 0
    assert samples.exists(), "nothing ran: they are still those of the results"


def test_an_output_that_is_no_file_takes_lines_and_nothing_else(tiny, tmp_path, monkeypatch, capsys):
    prompts = write_lines(tmp_path / "in.jsonl", [{"id": "日本", "prompt_token_ids": [3, 4]}, {"id": "bad"}])
    arguments = ("--model", tiny, "--prompts", prompts, "--max-new-tokens", 2, "--mesh", "tensor=1", "--output")
    devices, screen = set(os.listdir("/dev")), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, "ascii"))  # cannot show the name
    status, err = in_process(monkeypatch, capsys, *arguments, "/dev/null", "--print")
    sys.stdout.flush()
    assert status == 0 and screen.getvalue().startswith(b"=== \\u65e5\\u672c\n"), err
    status, err = in_process(monkeypatch, capsys, *arguments, "/dev/full")
    assert status == 2 and "error: /dev/full: No space left on device, after 0 lines" in err
    out, into = os.pipe()
    status, err = in_process(monkeypatch, capsys, *arguments, f"/dev/fd/{into}")
    os.close(into)
    with open(out) as pipe:
        found = [json.loads(line) for line in pipe]
    assert status == 0 and [line["id"] for line in found] == ["bad", "日本"], err
    assert set(os.listdir("/dev")) == devices and list(tmp_path.iterdir()) == [prompts]


@pytest.mark.slow
def test_standard_input_in_and_settings_refused_when_changed(stories, tmp_path):
    out = tmp_path / "out.jsonl"
    arguments = (
        "--model",
        stories,
        "--prompts",
        "-",
        "--output",
        out,
        "--max-new-tokens",
        6,
        "--max-context",
        64,
        *SMALL,
    )
    run(*arguments, stdin="One day\n\nThe dog\n")
    assert sorted(results(out)) == [("1", 0), ("3", 0)]
    done = run(*arguments, "--top-k", 5, stdin="One day\n\nThe dog\n", status=2)
    assert done.stderr.count("\n") == 1
    assert "has results of other settings (top_k: 0 -> 5); choose another output, --overwrite" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a"], "give --model CKPT_DIR, or --preset NAME --random-weights"),
        (["--model", "{tiny}"], "give --prompts or --prompt"),
        (["--model", "{tiny}", "--prompt", "a", "--prompts", "-"], "give --prompts or --prompt"),
        (["--model", "{tiny}", "--prompt", "a", "--top-k", "five"], "argument --top-k: invalid int value: 'five'"),
        (["--model", "{tiny}", "--prompt", "a", "--top-p", "7"], "top_p: 7.0 is not legal"),
        (["--model", "{tiny}", "--prompt", "a", "--logit-bias", "5"], "legal is ID=BIAS,ID=BIAS"),
        (["--model", "{tiny}", "--prompt", "a", "--temprature", "1"], "unrecognized arguments: --temprature"),
        (["--model", "{tiny}", "--prompt", "a", "--dtype", "int3"], "argument --dtype: invalid choice: 'int3'"),
        (["--model", "{tiny}", "--prompt", "a", "--max-batch", "0"], "max_batch: 0 is below 1"),
        (["--model", "{tiny}", "--prompt", "a", "--mesh", "tensr=2"], "unknown axis 'tensr'"),
        (
            ["--model", "{tiny}", "--prompt", "a", "--mesh", "tensor=16"],
            "needs 16 devices, found 8 (cpu); --cpu-devices N",
        ),
        (
            ["--model", "{tiny}", "--prompt", "a", "--mesh", "tensor=3"],
            "heads=4 cannot be cut 3 ways (tensor); legal: 1, 2, 4",
        ),
        (["--model", "{tiny}", "--prompt", "a", "--mesh", "stage=5"], "stage=5: the model has 4 layers; legal: 1 to 4"),
        (["--model", "{tiny}", "--prompt", "a", "--output", "{out}"], "no line could run"),
        (
            ["--model", "{tiny}", "--prompt", "a", "--stage-layers", "1,2", "--mesh", "stage=2"],
            "adds up to 3 layers, the model has 4",
        ),
        (["--model", "{tiny}", "--prompt", "a", "--cpu-devices", "0"], "cpu_devices: found 0, legal is 1 to 1024"),
        (["--model", "{tiny}", "--prompt", "a", "--cpu-devices", "100000"], "found 100000, legal is 1 to 1024"),
        (["--model", "{tiny}", "--prompt", "a", "--page-size", "100000"], "page_size: 100000 is above 1024"),
        (["--model", "{tiny}", "--prompt", "a", "--output", "-"], "/dev/stdout takes the lines"),
        (["--model", "{tiny}", "--prompt", "a", "--pages", "1"], "pages: 1 is below 2"),
        (["--model", "/no/such", "--prompt", "a"], "/no/such: no such checkpoint folder"),
        (["--model", str(STORIES / "model"), "--prompt", "a"], "a Hugging Face folder, not a checkpoint"),
        (["--model", "{tiny}", "--prompts", "/no/such.txt"], "/no/such.txt: No such file or directory"),
        (["--model", "{tiny}", "--prompts", "{bad}", "--strict"], "line 2 (id '2'): prompt: found a number"),
        (
            ["--model", "{tiny}", "--prompts", "{text}", "--strict"],
            "line 1 (id '1'): prompt: the checkpoint has no tokenizer",
        ),
        (["--model", "{tiny}", "--prompts", "{empty}"], "there is no prompt in it"),
        (["--model", "{tiny}", "--prompt", "a", "--process-id", "0"], "belong together"),
        (["--model", "{tiny}", "--prompts", "{ids}", "--stage-layers", "measured:/no.json"], "/no.json: No such file"),
        (["--model", "{tiny}", "--prompts", "{ids}", "--stage-layers", "measured:{ids}"], "'model' is missing or"),
        (["--model", "{tiny}", "--prompt", "a", "--profile-steps", "7:5"], "legal is FIRST:LAST"),
        (["--model", "{tiny}", "--prompts", "{ids}", "--profile", "/dev/null/x"], "/dev/null"),
        (["--model", "{tiny}", "--prompts", "{bad}", "--output", "{bad}"], "--output is the file of prompts"),
        (["--model", "{tiny}", "--prompts", "{bad}", "--output", "/dev/null/x.jsonl"], "/dev/null"),
    ],
    ids=lambda value: None if isinstance(value, list) else re.sub(r"\W+", "-", value)[:40],
)
def test_mistakes_take_one_line(tiny, tmp_path, monkeypatch, capsys, arguments, message):
    files = {
        "tiny": tiny,
        "bad": write_lines(tmp_path / "bad.jsonl", [{"prompt_token_ids": [3]}, {"prompt": 5}]),
        "text": write_lines(tmp_path / "text.txt", [b"some text"]),
        "ids": write_lines(tmp_path / "ids.jsonl", [{"prompt_token_ids": [3]}]),
        "out": tmp_path / "out.jsonl",
        "empty": write_lines(tmp_path / "empty.jsonl", [b" "]),
    }
    status, error = in_process(monkeypatch, capsys, *(each.format(**files) for each in arguments))
    assert status == 2
    *before, line = error.splitlines()
    assert all("no tokenizer" in each or "WARNING" in each or "mesh: " in each for each in before)
    assert line.startswith("jaxinfer.generate: error: ")
    assert message in line


def test_help_teaches():
    done = run("--help")
    assert "examples:" in done.stdout and "--mesh stage=2,tensor=2 --cpu-devices 4" in done.stdout
    assert "--repetition-penalty" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_importing_the_package_starts_nothing():
    code = "import sys, jaxinfer; assert 'jax' not in sys.modules; from jaxinfer import LLM, SamplingParams"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
