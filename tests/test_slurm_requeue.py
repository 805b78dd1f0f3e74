"""Runs that Slurm interrupts: every result is there once, and as if nothing had happened."""

import json
import random
import shlex
import sys
from pathlib import Path

import pytest

from convert.run import convert
from hf_models import make_hf_folder
from slurm_bed import until

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[1]
REQUESTS = 200
# small batches, so that a run has a middle
OPTIONS = ["--dtype", "float32", "--max-batch", "8", "--prefill-chunk", "32", "--decode-steps", "2", "--ignore-eos"]
SAMPLED = ["--max-new-tokens", "12", "--temperature", "0.8", "--seed", "7"]
CPU = ["--gpus-per-node=0", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--mem=2000"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds ``ckpt`` and ``in.jsonl``."""
    folder = tmp_path_factory.mktemp("slurm_requeue")
    make_hf_folder(folder / "hf", num_key_value_heads=4)
    convert(folder / "hf", folder / "ckpt", quiet=True)
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 96) for _ in range(draw.randint(2, 12))] for _ in range(REQUESTS)]
    (folder / "in.jsonl").write_text("\n".join(json.dumps({"prompt_token_ids": prompt}) for prompt in prompts))
    return folder


def command(folder, output: Path) -> list[str]:
    words = ["--model", folder / "ckpt", "--prompts", folder / "in.jsonl", "--output", output, "--cpu-devices", 1]
    return [sys.executable, "-m", "jaxinfer.generate", *map(str, words), *OPTIONS, *SAMPLED]


def results(output: Path) -> list[str]:
    """The lines without their times, sorted."""
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    return sorted(json.dumps({name: line[name] for name in line if not name.endswith("_s")}) for line in lines)


def count(output: Path) -> int:
    return output.read_bytes().count(b"\n") if output.exists() else 0


def beside(output: Path, kind: str) -> dict:
    return json.loads(output.with_name(f"{output.stem}.{kind}.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(folder, slurm_bed):
    """One process without Slurm."""
    output = folder / "undisturbed.jsonl"
    done = slurm_bed.run(command(folder, output), timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    found = results(output)
    assert len(found) == REQUESTS
    return found


def test_job_that_is_requeued_twice(folder, slurm_bed, undisturbed, tmp_path):
    output, log = tmp_path / "out.jsonl", tmp_path / "job.log"
    script = f"#!/bin/bash\nsrun --kill-on-bad-exit=1 {shlex.join(command(folder, output))}\n"
    options = ["--requeue", "--open-mode=append", f"--output={log}", *CPU]
    job = slurm_bed.sbatch(script, options)
    for restarts, enough in enumerate((5, 60), 1):
        until(lambda: count(output) >= enough, 120, lambda: f"{count(output)} results\n{log.read_text()}")
        slurm_bed.scontrol("requeue", job)
        until(lambda: slurm_bed.job(job)["JobState"] != "COMPLETING", 30, lambda: "the job goes on")
        assert slurm_bed.job(job)["Restarts"] == str(restarts)
        assert not slurm_bed.stray(job)
        assert enough <= count(output) < REQUESTS, "it was not interrupted in the middle"
    assert slurm_bed.wait(job, timeout=180) == "COMPLETED", log.read_text()[-4000:]
    assert results(output) == undisturbed
    assert beside(output, "metrics")["unfinished"] == 0
    assert len(beside(output, "run")["runs"]) == 3
    assert not slurm_bed.stray(job)


def test_sigterm_to_the_step_puts_the_rest_back(folder, slurm_bed, undisturbed, tmp_path):
    output = tmp_path / "out.jsonl"
    words = slurm_bed.srun_command(command(folder, output), nodes=2, options=["--job-name=stopped"])
    client = slurm_bed.start(words)
    until(lambda: count(output) >= 5, 120, lambda: f"{count(output)} results")
    job = slurm_bed.run(["squeue", "--noheader", "--name=stopped", "--format=%A"]).stdout.strip()
    slurm_bed.scancel("--signal=TERM", f"{job}.0")
    _, err = client.communicate(timeout=60)
    assert client.returncode == 0, err[-4000:]
    metrics, written = beside(output, "metrics"), count(output)
    assert metrics["stopped_by"] == "SIGTERM"
    assert 0 < metrics["unfinished"] == REQUESTS - written
    assert f"stopped by SIGTERM: {metrics['unfinished']} of {REQUESTS} requests are left" in err
    assert not slurm_bed.stray(int(job))

    done = slurm_bed.srun(command(folder, output), nodes=2, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    metrics = beside(output, "metrics")
    assert (metrics["unfinished"], metrics["stopped_by"], metrics["already finished"]) == (0, None, written)
    assert results(output) == undisturbed


def test_signal_ahead_of_the_time_limit(folder, slurm_bed, tmp_path):
    """Slurm itself sends it, within the first 60 of the job's 120 s, and the job script puts the job back."""
    run, log = tmp_path / "run", tmp_path / "job.log"
    (tmp_path / "in.jsonl").write_text('{"prompt_token_ids": [5, 6]}\n' * 3000)
    env = {"MODEL": folder / "ckpt", "PROMPTS": tmp_path / "in.jsonl", "RUN": run, "PYTHON": sys.executable}
    options = [f"--output={log}", *CPU, "--time=2", "--signal=B:USR1@60", "slurm/generate-multi.sh"]
    arguments = [*OPTIONS, "--max-new-tokens", "100", "--grace-s", "2"]
    submitted = slurm_bed.run(
        ["sbatch", "--parsable", *options, *arguments], env={name: str(env[name]) for name in env}, cwd=ROOT
    )
    assert submitted.returncode == 0, submitted.stderr
    job = int(submitted.stdout)
    until(lambda: slurm_bed.job(job)["Restarts"] == "1", 150, lambda: log.read_text())
    text = log.read_text()
    assert " USR1: stopping" in text and "goes back into the queue" in text, text
    assert not slurm_bed.stray(job)
    output = run / "out.jsonl"
    before = output.read_bytes() if output.exists() else b""
    if before:  # else a slow machine was still compiling
        metrics = beside(output, "metrics")
        assert metrics["stopped_by"] == "SIGUSR1" and metrics["unfinished"] == 3000 - before.count(b"\n")
    until(lambda: count(output) > before.count(b"\n"), 90, lambda: log.read_text())
    # up to the first restart's results, and with every line whole
    found = output.read_bytes()
    assert found.startswith(before)
    names = [json.loads(line)["id"] for line in found[: found.rindex(b"\n")].splitlines()]
    assert len(set(names)) == len(names)
