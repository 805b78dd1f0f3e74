"""The job scripts of slurm/, submitted by hand as a user would, to a real Slurm of CPUs; prompts in shards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_models import make_hf_folder
from slurm.shards import ShardError, expected, merge, split
from slurm_bed import until

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("generate.sh", "generate-multi.sh", "generate-array.sh", "convert.sh")
CPU = ("--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=2", "--mem=2000", "--time=10")
COMPILED = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # what one job compiled the next need not
PROMPTS = [
    '{"id": "a", "prompt_token_ids": [5, 9, 17], "max_new_tokens": 12}',
    '{"prompt_token_ids": [8, 4], "n": 2}',
    "",
    "{bad",
    '{"prompt_token_ids": [60, 61, 62, 63]}',
    '{"id": "long", "prompt_token_ids": [7], "max_new_tokens": 40, "ignore_eos": true}',
]


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_is_short_and_asks_for_what_a_run_needs(name):
    text = (ROOT / "slurm" / name).read_text()
    assert len(text.splitlines()) < 60
    assert os.access(ROOT / "slurm" / name, os.X_OK)
    for line in ("#SBATCH --signal=B:USR1@120", "#SBATCH --requeue", "#SBATCH --open-mode=append", "set -euo pipefail"):
        assert f"\n{line}\n" in text
    subprocess.run(["bash", "-n", ROOT / "slurm" / name], check=True)
    subprocess.run(["bash", "-n", ROOT / "slurm" / "step.sh"], check=True)


# ---- on the bed


def submit(bed, script: str, folder: Path, *options, arguments=(), **variables) -> int:
    """Submits slurm/`script` from the repository's folder, with a log in `folder`."""
    env = {"PYTHON": sys.executable, "RUN": folder, "MESH": "auto", **COMPILED, **variables}
    command = ["sbatch", "--parsable", *CPU, f"--output={folder}.log", *options, f"slurm/{script}", *arguments]
    done = bed.run(command, env={name: str(value) for name, value in env.items()}, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def ended(bed, job: int, folder: Path, state: str = "COMPLETED", timeout: float = 90) -> str:
    """Waits for the job; returns the log of the batch script."""
    found = bed.wait(job, timeout=timeout)
    logs = [Path(f"{folder}.log"), *sorted(folder.glob("logs/**/rank-*.log"))]
    text = {str(log): log.read_text() for log in logs if log.exists()}
    assert found == state, "\n".join(f"---- {name}\n{log}" for name, log in text.items())
    return Path(f"{folder}.log").read_text()


def results(path: Path) -> list[str]:
    """The lines of an output without their times, sorted."""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert all(("error" in line) != ("ttft_s" in line) for line in lines)
    return sorted(json.dumps({name: line[name] for name in line if not name.endswith("_s")}) for line in lines)


def left(path: Path) -> int:
    return json.loads((path.parent / f"{path.stem}.metrics.json").read_text())["unfinished"]


@pytest.fixture(scope="module")
def model(slurm_bed, tmp_path_factory):
    """Converted by convert.sh."""
    folder = tmp_path_factory.mktemp("convert")
    make_hf_folder(folder / "hf")
    variables = {"SOURCE": folder / "hf", "CKPT": folder / "ckpt", "LOGS": folder / "logs"}
    job = submit(slurm_bed, "convert.sh", folder, "--ntasks=1", **variables)
    ended(slurm_bed, job, folder)
    assert "runs on token ids" in (folder / "logs" / "rank-0-node1.log").read_text()
    return folder / "ckpt"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "in.jsonl"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


@pytest.fixture(scope="module")
def plain(slurm_bed, model, prompts, tmp_path_factory):
    """A run on one node, by generate.sh."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    job = submit(slurm_bed, "generate.sh", folder, MODEL=model, PROMPTS=prompts)
    ended(slurm_bed, job, folder)
    return folder


@pytest.mark.slurm
@pytest.mark.slow
def test_one_node(slurm_bed, plain):
    lines = results(plain / "out.jsonl")
    assert len(lines) == 6 and left(plain / "out.jsonl") == 0
    assert "output tokens/s" in (plain / "logs" / "rank-0-node1.log").read_text()
    assert not slurm_bed.stray()


@pytest.mark.slurm
@pytest.mark.slow
def test_two_nodes_say_the_same(slurm_bed, plain, model, prompts, tmp_path):
    job = submit(slurm_bed, "generate-multi.sh", tmp_path / "run", MODEL=model, PROMPTS=prompts)
    ended(slurm_bed, job, tmp_path / "run")
    assert results(tmp_path / "run" / "out.jsonl") == results(plain / "out.jsonl")
    logs = sorted(path.name for path in (tmp_path / "run" / "logs").glob("rank-*"))
    assert logs == ["rank-0-node1.log", "rank-1-node2.log"]
    assert "stage=2" in (tmp_path / "run" / "logs" / logs[0]).read_text()


@pytest.mark.slurm
@pytest.mark.slow
def test_array_of_shards_merges_to_the_same(slurm_bed, plain, model, prompts, tmp_path):
    run = tmp_path / "run"
    job = submit(slurm_bed, "generate-array.sh", run, "--array=0-1", MODEL=model, PROMPTS=prompts)
    until(lambda: not slurm_bed.run(["squeue", "-h", "-j", str(job)]).stdout, 90, lambda: f"job {job} runs on")
    parts = sorted((run / "parts").glob("?.jsonl"))
    command = [sys.executable, "-m", "slurm.shards", "merge", prompts, *parts, "--output", run / "out.jsonl"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + Path(f"{run}.log").read_text()
    assert results(run / "out.jsonl") == results(plain / "out.jsonl")
    assert [json.loads(line)["id"] for line in open(run / "out.jsonl")] == ["a", "2", "2", "4", "5", "long"]


@pytest.mark.slurm
@pytest.mark.slow
def test_signal_ahead_of_the_limit_twice(slurm_bed, model, tmp_path):
    """Once before there is any result, once in the middle: back into the queue, and nothing is lost or twice."""
    run, prompts = tmp_path / "run", write(tmp_path / "in.jsonl", *({"prompt_token_ids": [i + 3]} for i in range(40)))
    slow = ["--max-batch", "1", "--decode-steps", "1", "--max-new-tokens", "100", "--ignore-eos", "--grace-s", "1"]
    job = submit(slurm_bed, "generate.sh", run, arguments=slow, MODEL=model, PROMPTS=prompts)

    def usr1(restarts: int) -> None:
        slurm_bed.scancel("--batch", "--signal=USR1", job)
        until(lambda: slurm_bed.job(job)["Restarts"] == str(restarts), 30, lambda: Path(f"{run}.log").read_text())

    started, output = run / "logs" / "started", run / "out.jsonl"
    until(started.exists, 20, lambda: "no start")
    usr1(1)
    until(lambda: output.exists() and len(output.read_bytes().splitlines()) > 5, 60, lambda: "no results")
    usr1(2)
    kept = output.read_bytes()
    assert kept.endswith(b"\n") and 0 < left(output) < 40
    ended(slurm_bed, job, run)
    assert output.read_bytes().startswith(kept)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted(int(line["id"]) for line in lines) == list(range(1, 41)) and left(output) == 0
    assert {line["completion_tokens"] for line in lines} == {100}


@pytest.mark.slurm
def test_failure_is_passed_on_and_not_repeated(slurm_bed, tmp_path):
    run = tmp_path / "run"
    job = submit(slurm_bed, "generate.sh", run, MODEL=tmp_path / "none")
    ended(slurm_bed, job, run, "FAILED")
    fields = slurm_bed.job(job)
    assert fields["ExitCode"] == "2:0" and fields["Restarts"] == "0"
    assert str(tmp_path / "none") in (run / "logs" / "rank-0-node1.log").read_text()


@pytest.mark.slurm
def test_failure_after_the_signal_is_not_repeated_either(slurm_bed, tmp_path):
    run, program = tmp_path / "run", tmp_path / "python"
    program.write_text(f"#!/bin/bash\ntrap 'exit 3' USR1\ntouch {tmp_path}/up\nwhile true; do sleep 0.1; done\n")
    program.chmod(0o755)
    job = submit(slurm_bed, "generate.sh", run, PYTHON=program)
    until((tmp_path / "up").exists, 20, lambda: "no start")
    slurm_bed.scancel("--batch", "--signal=USR1", job)
    ended(slurm_bed, job, run, "FAILED")
    assert slurm_bed.job(job)["ExitCode"] == "3:0" and slurm_bed.job(job)["Restarts"] == "0"


@pytest.mark.slurm
def test_signal_that_kills_a_starting_task_is_no_failure(slurm_bed, tmp_path):
    """Rank 0 is killed by the signal, rank 1 by Slurm for rank 0's sake."""
    run, program = tmp_path / "run", tmp_path / "python"
    ignore = "if [ $SLURM_PROCID = 1 ]; then trap '' USR1; fi"
    program.write_text(f"#!/bin/bash\n{ignore}\ntouch {tmp_path}/up-$SLURM_PROCID\nexec sleep 60\n")
    program.chmod(0o755)
    job = submit(slurm_bed, "generate-multi.sh", run, PYTHON=program)
    until(lambda: len(list(tmp_path.glob("up-*"))) == 2, 20, lambda: "no start")
    slurm_bed.scancel("--batch", "--signal=USR1", job)
    until(lambda: slurm_bed.job(job)["Restarts"] == "1", 20, lambda: Path(f"{run}.log").read_text())


@pytest.mark.slurm
@pytest.mark.slow
def test_attempts_that_add_nothing_come_to_an_end(slurm_bed, tmp_path):
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    (run / "logs" / "idle").write_text("2 attempts\nbefore\n")
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    job = submit(slurm_bed, "generate.sh", run, PYTHON=program)
    until(lambda: slurm_bed.ranks(job), 20, lambda: "no start")
    slurm_bed.scancel("--batch", "--signal=USR1", job)
    log = ended(slurm_bed, job, run, "FAILED")
    assert "three attempts added nothing" in log and slurm_bed.job(job)["Restarts"] == "0"


@pytest.mark.slurm
@pytest.mark.slow
def test_requeue_of_one_array_task_leaves_the_others(slurm_bed, tmp_path):
    """The last task's SLURM_JOB_ID is that of the whole array."""
    run, program = tmp_path / "run", tmp_path / "python"
    (tmp_path / "in.txt").write_text("a\nb\n")
    program.write_text(f'#!/bin/sh\n[ "$2" = slurm.shards ] && exec {sys.executable} "$@"\nexec sleep 60\n')
    program.chmod(0o755)
    job = submit(slurm_bed, "generate-array.sh", run, "--array=0-1", PYTHON=program, PROMPTS=tmp_path / "in.txt")
    tasks = {}

    def both() -> bool:
        for line in slurm_bed.scontrol("show", "job", "--oneliner", job).splitlines():
            fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
            if fields["ArrayTaskId"].isdigit():  # else tasks that wait together
                tasks[fields["ArrayTaskId"]] = int(fields["JobId"])
        return set(tasks) == {"0", "1"} and all(slurm_bed.ranks(each) for each in tasks.values())

    until(both, 20, lambda: f"not both run: {tasks}")
    assert tasks["1"] == job  # else this test shows nothing
    slurm_bed.scancel("--batch", "--signal=USR1", f"{job}_1")
    until(lambda: slurm_bed.job(f"{job}_1")["Restarts"] == "1", 20, lambda: "no requeue")
    other = slurm_bed.job(f"{job}_0")
    assert other["JobState"] == "RUNNING" and other["Restarts"] == "0"


# ---- shards


def write(path: Path, *lines) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def result(name: str, index: int = 0) -> dict:
    return {"id": name, "index": index, "text": name}


@pytest.fixture
def five(tmp_path):
    return write(tmp_path / "five.jsonl", *({"prompt": f"p{i}"} for i in range(3)), {"id": "x", "prompt": "", "n": 2})


def test_every_line_is_in_one_shard_with_its_number(tmp_path, prompts):
    whole = expected(prompts)
    assert whole == [("a", 1), ("2", 2), ("4", 1), ("5", 1), ("long", 1)]
    for count in (1, 2, 3, 7):
        found = []
        for shard in range(count):
            split(prompts, shard, count, tmp_path / "part.jsonl")
            found += expected(tmp_path / "part.jsonl")
        assert sorted(found) == sorted(whole)


def test_shard_out_of_range(tmp_path, prompts):
    with pytest.raises(ShardError, match="found 2 of 2, legal is 0 to 1"):
        split(prompts, 2, 2, tmp_path / "part.jsonl")


def test_merge_is_in_the_order_of_the_prompts(tmp_path, five):
    one = write(tmp_path / "1.jsonl", result("x", 1), result("2"), result("x", 0))
    two = write(tmp_path / "2.jsonl", result("3"), {"id": "1", "line": 1, "error": "too long"})
    assert merge(five, [one, two], tmp_path / "out.jsonl") == 5
    lines = [json.loads(line) for line in open(tmp_path / "out.jsonl")]
    assert [(line["id"], line.get("index")) for line in lines] == [
        ("1", None), ("2", 0), ("3", 0), ("x", 0), ("x", 1)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([result("1"), result("2"), result("x", 0), result("x", 1)], "id '3': result 0 of 1 is in none"),
        ([result("1"), result("2"), result("3"), result("x", 0)], "id 'x': result 1 of 2 is in none"),
        ([result("1"), result("1")], "line 2: id '1', result 0 is in .*line 1 already"),
        ([result(name) for name in "1234"] + [result("x", 1), result("x")], "id '4': in the parts but not in"),
        ([{"text": "?"}], "line 1: not a result"),
    ],
)
def test_merge_refuses(tmp_path, five, lines, message):
    with pytest.raises(ShardError, match=message):
        merge(five, [write(tmp_path / "part.jsonl", *lines)], tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
