"""A study's cells as jobs of a real Slurm of two nodes, and as steps of an allocation."""

import json
import os
import sys

import pytest

from slurm_bed import testbed as start_bed
from slurm_bed import until
from test_study import write
from test_study_run import QUICK, TWO, results, states, summary

pytestmark = [pytest.mark.slurm, pytest.mark.long]
DONE = {"tiny-baseline-stage1": ("done", 1), "tiny-stage2": ("done", 1)}


@pytest.fixture(scope="module")
def bed():
    with start_bed(f"study-{os.getpid()}", "--nodes", "2", "--gpus", "0", "--accounting") as bed:
        yield bed


def study(path, out):
    words = [sys.executable, "-m", "jaxinfer.study", "run", path, "--output", out]
    return [*words, "--cluster", "testbed", "--poll-s", "0.5"]


def test_cells_are_jobs_which_a_killed_study_finds_again(bed, tmp_path):
    path, out = write(tmp_path, settings=QUICK, experiments=TWO), tmp_path / "out"
    first = bed.start(study(path, out))
    until(lambda: sum(bool(state["job"]) for state in states(out).values()) == 2, 120, lambda: str(states(out)))
    jobs = {name: state["job"] for name, state in states(out).items()}
    first.kill()
    first.communicate()
    bed.clients.remove(first)
    done = bed.run(study(path, out), timeout=400)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("submitted before") == 2 and "2 measured, 0 skipped, 0 failed" in done.stderr
    assert summary(out) == DONE and {name: state["job"] for name, state in states(out).items()} == jobs
    for folder, nodes in (("tiny-baseline", 1), ("tiny-stage2", 2)):
        [cell] = out.glob(f"cells/correctness/{folder}*")
        assert json.loads((cell / "cell.json").read_text())["x"]["nodes"] == nodes
        sacct = json.loads((cell / "sacct.json").read_text())
        assert sacct["elapsed_s"] > 0 and sacct["state"] == "COMPLETED"
        assert json.loads((cell / "out.run.json").read_text())["runs"][-1]["devices"]["processes"] == nodes
    before = results(out)
    again = bed.run(study(path, out))
    assert "2 measured, 0 to run" in again.stderr and results(out) == before


def test_a_job_that_fails_says_why_and_the_others_run(bed, tmp_path):
    good = {"kind": "correctness", "meshes": ["stage=1"], "against": "first"}
    experiments = {"bad": good | {"settings": {"pages": 2}}, "good": good}
    path, out = write(tmp_path, settings=QUICK, experiments=experiments), tmp_path / "out"
    done = bed.run(study(path, out), timeout=400)
    assert done.returncode == 1, done.stderr
    found = {each.parent.parent.name: json.loads(each.read_text()) for each in out.glob("cells/*/*/state.json")}
    assert found["good"]["state"] == "done" and found["bad"]["state"] == "failed"
    assert "FAILED" in found["bad"]["why"] and "pages" in found["bad"]["why"], found["bad"]["why"]


def test_in_an_allocation_cells_are_its_steps(bed, tmp_path):
    path, out = write(tmp_path, settings=QUICK, experiments=TWO), tmp_path / "out"
    done = bed.run(["salloc", "-N2", *study(path, out)], timeout=400)
    assert done.returncode == 0, done.stderr
    assert "steps of this allocation" in done.stderr and summary(out) == DONE
    for cell in out.glob("cells/*/*"):
        assert "--inside" in json.loads((cell / "cell.json").read_text())["command"]
