"""Cells of a study as they are run: measured once, whatever ends the study in between."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from jaxinfer.study.errors import StudyError
from jaxinfer.study.process import ended
from jaxinfer.study.state import locked
from processes import own_environment
from test_study import ROOT, study_command, write

QUICK = {"kernels": "off", "max_new_tokens": 3, "prefill_chunk": 32, "max_batch": 4}
TWO = {"correctness": {"meshes": ["stage=1", "stage=2"], "against": "first"}}
THREE = {"correctness": {"meshes": ["stage=1", "stage=2", "data=2"], "against": "first"}}


def start(*arguments):
    words = [sys.executable, "-m", "jaxinfer.study", *map(str, arguments)]
    return subprocess.Popen(words, cwd=ROOT, env=own_environment(), stderr=subprocess.PIPE, text=True)


def states(out):
    """Of each cell, by its name without the hash."""
    found = {path.parent.name.rpartition("-")[0]: path for path in out.glob("cells/*/*/state.json")}
    return {name: json.loads(path.read_text()) for name, path in found.items()}


def summary(out):
    return {name: (state["state"], state["attempts"]) for name, state in states(out).items()}


def results(out):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.glob("cells/*/*/out.jsonl")}


def wait_for(holds, process=None, seconds=240, pause=0.02):
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it did not come"
        assert process is None or process.poll() is None, process.stderr.read()
        time.sleep(pause)


def gone(processes):
    return not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in processes)


@pytest.mark.slow
def test_a_study_measures_what_is_missing_and_nothing_twice(tmp_path):
    path, out = write(tmp_path, settings=QUICK, experiments=TWO), tmp_path / "out"
    done = study_command("run", path, "--output", out)
    assert done.returncode == 0, done.stderr
    assert "2 cells on this host, 8 CPU devices: 2 to run" in done.stderr
    assert "2 measured, 0 skipped, 0 failed" in done.stderr
    assert summary(out) == {"tiny-baseline-stage1": ("done", 1), "tiny-stage2": ("done", 1)}
    lock = json.loads((out / "lock.json").read_text())
    assert (out / "study.yaml").read_bytes() == path.read_bytes() and len(lock["cells"]) == 2
    for folder in lock["cells"]:
        names = {each.name for each in (out / folder).iterdir()}
        wanted = {"cell.json", "state.json", "command.sh", "out.jsonl", "out.run.json", "out.metrics.json", "logs"}
        assert names >= wanted and not any(name.endswith(".partial") for name in names)
        assert json.loads((out / folder / "cell.json").read_text())["hash"] == folder.rpartition("-")[2]
    before = results(out)
    again = study_command("run", path, "--output", out)
    assert again.returncode == 0 and "2 measured, 0 to run" in again.stderr
    assert results(out) == before and len(before) == 2
    # another mesh: one cell is an orphan, says so and stays; what fits is skipped with the reason
    only = {"correctness": {"meshes": ["stage=16"], "against": "stage=1"}}
    changed = study_command("run", write(tmp_path, settings=QUICK, experiments=only), "--output", out)
    assert changed.returncode == 0, changed.stderr
    assert "tiny-stage2-" in changed.stderr and "an orphan, which stays (the study file has no such" in changed.stderr
    assert "skipped: the mesh needs 16 devices, cpu_devices gives 8" in changed.stderr
    assert results(out) == before and states(out)["tiny-stage2"]["orphan"]
    skipped = next(out.glob("cells/*/tiny-stage16-*"))
    assert {each.name for each in skipped.iterdir()} == {"cell.json", "state.json"}


@pytest.mark.long
@pytest.mark.parametrize("moment", ["in a cell", "between cells", "while a state is written"])
def test_killed_at_any_moment_every_cell_is_measured_once(tmp_path, moment):
    path, out = write(tmp_path, settings=QUICK, experiments=THREE), tmp_path / "out"
    study = start("run", path, "--output", out)

    def first_is(name):
        return states(out).get("tiny-baseline-stage1", {}).get("state") == name

    def writing():  # the process stands still while we look
        if not first_is("done"):
            return False
        study.send_signal(signal.SIGSTOP)
        if any(out.glob("cells/*/tiny-stage2-*/*.partial")):
            return True
        study.send_signal(signal.SIGCONT)
        return False

    if moment == "in a cell":
        wait_for(lambda: first_is("done") and states(out)["tiny-stage2"]["state"] == "running", study)
        wait_for(lambda: any(out.glob("cells/*/tiny-stage2-*/out.jsonl")), study)
    elif moment == "between cells":
        wait_for(lambda: first_is("done"), study, pause=0)
    else:
        wait_for(writing, study, pause=0)
    children = psutil.Process(study.pid).children(recursive=True)
    before = results(out)
    study.kill()
    study.wait()
    if moment == "in a cell":
        assert children
    wait_for(lambda: gone(children))
    done = study_command("run", path, "--output", out)
    assert done.returncode == 0, done.stderr
    assert {name: state["state"] for name, state in states(out).items()} == dict.fromkeys(states(out), "done")
    after = results(out)
    first = next(each for each in after if "baseline" in each.parent.name)
    assert len(after) == 3 and after[first] == before[first]
    attempts = {name: state["attempts"] for name, state in states(out).items()}
    assert attempts["tiny-baseline-stage1"] == 1 and attempts["tiny-data2"] == 1
    assert attempts["tiny-stage2"] == 2 if moment == "in a cell" else attempts["tiny-stage2"] in (1, 2)
    assert all(len(lines.splitlines()) == 3 for _, lines in after.values())


@pytest.mark.long
def test_a_study_that_runs_is_not_run_twice_and_an_interrupt_stops_its_cell(tmp_path):
    path, out = write(tmp_path, settings=QUICK, experiments=TWO), tmp_path / "out"
    study = start("run", path, "--output", out)
    wait_for(lambda: "running" in str(states(out)), study)
    wait_for(lambda: psutil.Process(study.pid).children(), study)
    second = study_command("run", path, "--output", out)
    assert second.returncode == 2
    assert f"{out}: another study runs in it (process {study.pid} on " in second.stderr
    assert f"process {study.pid} on" in study_command("status", out).stdout
    children = psutil.Process(study.pid).children(recursive=True)
    study.send_signal(signal.SIGINT)
    said = study.communicate(timeout=60)[1]
    assert study.returncode == 130 and gone(children)
    assert "interrupted; what is measured stays; go on with: python -m jaxinfer.study run" in said
    assert "Traceback" not in said
    assert states(out)["tiny-baseline-stage1"]["state"] == "waiting"
    assert "interrupted" in study_command("status", out).stdout


@pytest.mark.long
def test_a_cell_that_fails_says_why_and_the_others_run(tmp_path):
    good = {"kind": "correctness", "meshes": ["stage=1"], "against": "first"}
    experiments = {"bad": good | {"settings": {"pages": 2}}, "good": good}
    path, out = write(tmp_path, settings=QUICK, experiments=experiments), tmp_path / "out"
    done = study_command("run", path, "--output", out)
    assert done.returncode == 1, done.stderr
    found = {path.parent.parent.name: json.loads(path.read_text()) for path in out.glob("cells/*/*/state.json")}
    assert found["good"]["state"] == "done" and found["bad"]["state"] == "failed"
    assert (
        found["bad"]["why"].startswith("exit status 2: jaxinfer.generate: error: ") and "pages" in found["bad"]["why"]
    )
    assert f"FAILED: bad/tiny-baseline-stage1: {found['bad']['why']}" in done.stderr
    assert "1 measured, 0 skipped, 1 failed" in done.stderr


@pytest.mark.long
def test_a_full_disk_ends_the_study_in_one_line_and_nothing_is_lost(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs a file system of its own: mount is not allowed here")
    try:
        filler = disk / "filler"
        filler.write_bytes(bytes((2 << 20) - 9 * 4096))  # room for what the study writes, not for a cell's files
        path = write(
            tmp_path, settings=QUICK, experiments={"correctness": TWO["correctness"] | {"meshes": ["stage=1"]}}
        )
        done = study_command("run", path, "--output", disk / "out")
        assert done.returncode == 1, done.stderr
        last = done.stderr.strip().splitlines()[-1]
        assert "No space left on device; what is measured stays, and the same command goes on" in last
        assert "Traceback" not in done.stderr and "done" not in str(states(disk / "out"))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_what_a_command_leaves_in_its_log_says_why_it_failed(tmp_path):
    log = tmp_path / "log"
    log.write_text("loading\nValueError: no such thing\nsrun: error: node1: exit code 1\nsome table\n")
    assert ended(1, log) == "exit status 1: ValueError: no such thing"
    assert ended(-9, log).startswith("killed by SIGKILL, which the kernel sends where memory runs out; ValueError")
    log.write_text("\n")
    assert ended(3, log) == f"exit status 3; nothing in {log}"


PROGRAM = """
import sys
from pathlib import Path
from jaxinfer.study.process import run
run(["sh", "-c", "sleep 300"], {}, Path(sys.argv[1]), 0)
"""


def test_a_cell_dies_with_its_study(tmp_path):
    study = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path / "log")], cwd=ROOT, stdin=subprocess.DEVNULL)
    wait_for(lambda: psutil.Process(study.pid).children(), None)
    child = psutil.Process(study.pid).children()
    study.kill()
    study.wait()
    wait_for(lambda: gone(child), None, 10)


HOLD = """
import os, sys, time
from pathlib import Path
from jaxinfer.study.state import locked
with locked(Path(sys.argv[1]), print) as keep:
    if os.fork() == 0:  # a cell's process, which outlives the study by a second
        time.sleep(1)
        os._exit(0)
    print("held", flush=True)
    time.sleep(300)
"""


def test_a_folder_is_one_studys_and_waits_for_the_cells_of_a_killed_one(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    with pytest.raises(StudyError, match=f"another study runs in it .process {first.pid} on "), locked(tmp_path, print):
        pass
    first.kill()
    first.wait()
    said = []
    with locked(tmp_path, said.append):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert said in ([], ["a cell of a study that was killed still runs; waiting for its end"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("squeue", "sbatch", "status", "state"),
    [
        ("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", "", 2, ("waiting", 0)),
        ("squeue: fatal: Could not establish a configuration source", "", 2, ("waiting", 0)),
        ("", "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", 2, ("waiting", 0)),
        ("", "sbatch: error: Batch job submission failed: Invalid account", 1, ("failed", 1)),
    ],
)
def test_a_slurm_that_does_not_answer_fails_no_cell(tmp_path, squeue, sbatch, status, state):
    for name, said in (("squeue", squeue), ("sbatch", sbatch)):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{said}' >&2\nexit {int(bool(said))}\n")
        (tmp_path / name).chmod(0o755)
    words = [sys.executable, "-m", "jaxinfer.study", "run", write(tmp_path, settings=QUICK, experiments=TWO)]
    words += ["--output", tmp_path / "out", "--cluster", "testbed", "--poll-s", "0.5"]
    environment = own_environment(PATH=f"{tmp_path}:{os.environ['PATH']}")
    done = subprocess.run([*map(str, words)], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == status, done.stderr
    assert summary(tmp_path / "out") == dict.fromkeys(("tiny-baseline-stage1", "tiny-stage2"), state)
    if status == 2:
        last = done.stderr.splitlines()[-1]
        assert last.startswith("jaxinfer.study: error: Slurm does not answer: ") and (squeue or sbatch) in last
        assert "run this on a login node where squeue works" in last and "FAILED" not in done.stderr
    else:
        assert "not submitted: sbatch: error: Batch job submission failed: Invalid account" in done.stderr


def test_what_is_missing_is_said_before_anything_runs(tmp_path):
    out, path = tmp_path / "out", write(tmp_path)
    nowhere = {"tiny": {"checkpoint": str(tmp_path / "none")}}
    for arguments, changes, message in (
        (
            ("--cluster", "testbed"),
            {},
            "cluster testbed: no Slurm here (sbatch is not on the PATH); run this on a login",
        ),
        (
            (),
            {"models": nowhere},
            f"models.tiny: {tmp_path}/none: no such checkpoint folder; python -m convert --source",
        ),
        (("--only", "week"), {}, "--only: unknown experiment 'week'"),
    ):
        path = write(tmp_path, **changes)
        words = [sys.executable, "-m", "jaxinfer.study", "run", str(path), "--output", str(out), *arguments]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=own_environment(PATH="/nowhere"))
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert done.stderr.startswith("jaxinfer.study: error: ") and done.stderr.count("\n") == 1
        assert not out.exists()
