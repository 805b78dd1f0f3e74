"""A whole study of the embedded model on a Slurm of two nodes, killed at any moment: as jobs and in an allocation."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import yaml

from slurm_bed import testbed as start_bed
from slurm_bed import until

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "examples" / "tinystories"
pytestmark = [pytest.mark.slurm, pytest.mark.long]


@pytest.fixture(scope="module")
def bed():
    with start_bed(f"study-{os.getpid()}", "--nodes", "2", "--accounting") as bed:
        yield bed


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study file and the cluster's preset beside it, in a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("a study")
    command = [sys.executable, "-m", "convert", "--source", SOURCE / "model", "--output", folder / "model"]
    subprocess.run([*command, "--dtype", "float32"], cwd=ROOT, check=True, capture_output=True)
    preset = yaml.safe_load((ROOT / "configs" / "clusters" / "testbed.yaml").read_text())
    (folder / "two.yaml").write_text(yaml.safe_dump(preset | {"python": sys.executable}))
    (folder / "study.yaml").write_text(
        yaml.safe_dump({
            "study": "two-nodes",
            "title": "Two nodes of CPUs",
            "question": "Does a study come to its end on a cluster, whatever ends it before?",
            "models": {"tinystories": {"checkpoint": str(folder / "model")}},
            "prompts": {"file": str(SOURCE / "prompts.jsonl")},
            "cluster": str(folder / "two.yaml"),
            "settings": {"dtype": "float32", "max_new_tokens": 16, "compile_cache": str(ROOT / "build" / "compiled")},
            "repeats": 2,
            "experiments": {
                "correctness": {"meshes": ["stage=2,tensor=2"], "against": "stage=1"},
                "strong": {"meshes": ["stage=1", "stage=2"]},
            },
        })
    )  # fmt: skip
    return folder / "study.yaml"


def command(study: Path, output: Path) -> list[str]:
    return [sys.executable, "-m", "jaxinfer.study", "run", str(study), "--output", str(output), "--poll-s", "0.5"]


def cells(output: Path) -> dict[str, Path]:
    """The folders by experiment and name, without the hash."""
    return {f"{path.parent.name}/{path.name.rpartition('-')[0]}": path for path in output.glob("cells/*/*")}


def json_files(paths: Iterable[Path]) -> list[dict]:
    return [json.loads(path.read_text()) for path in paths]


def check_result(output: Path) -> None:
    """All is measured, by two nodes where the mesh has two, with Slurm's own figures; tables and figures come of it."""
    assert len(cells(output)) == 4
    for name, folder in cells(output).items():
        accounted = json.loads((folder / "sacct.json").read_text())
        assert json.loads((folder / "state.json").read_text())["state"] == "done"
        assert accounted["state"] == "COMPLETED" and accounted["cpu_s"] > 1 and accounted["energy_j"] is None
        hosts = json.loads((folder / "out.run.json").read_text())["runs"][-1]["hosts"]
        assert hosts == (["node1"] if name.endswith("stage1") else ["node1", "node2"])
        assert len((folder / "out.jsonl").read_text().splitlines()) == 6
    strong = cells(output)["strong/tinystories-stage2"]
    assert json.loads((strong / "out.metrics.json").read_text())["repeats"]["count"] == 2
    assert json.loads((strong / "out.profile.json").read_text())["windows"]
    done = subprocess.run(
        [sys.executable, "-m", "jaxinfer.study", "tables", output], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "stage=2,tensor=2" in (output / "tables" / "correctness.csv").read_text()


def killed(bed, command: list[str], moment: Callable[[], object]) -> None:
    """Starts the study and kills it with -9 at a moment."""
    client = bed.start(command, cwd=ROOT)
    until(lambda: moment() or client.poll() is not None, 900, lambda: "the moment did not come")
    assert client.poll() is None, client.communicate()
    client.kill()
    client.communicate()
    bed.clients.remove(client)


def test_cells_as_jobs(bed, study, tmp_path):
    output = tmp_path / "jobs of mine"
    run = command(study, output)

    def job(name: str) -> str | None:
        folder = cells(output).get(name)
        return folder and (folder / "submit.json").exists() and json.loads((folder / "submit.json").read_text())["job"]

    # while the first jobs are submitted, while one runs, and in the second experiment
    killed(bed, run, lambda: job("correctness/tinystories-baseline-stage1"))
    first = job("correctness/tinystories-baseline-stage1")
    killed(bed, run, lambda: list(output.glob("cells/correctness/*stage2-tensor2*/logs/rank-0-*")))
    killed(bed, run, lambda: list(output.glob("cells/strong/*/logs/rank-0-*")))
    done = bed.run(run, cwd=ROOT, timeout=1500)
    assert done.returncode == 0, done.stderr
    check_result(output)
    # no job was lost, and none was run again
    assert job("correctness/tinystories-baseline-stage1") == first
    assert [each["attempts"] for each in json_files(output.glob("cells/*/*/state.json"))] == [1] * 4
    ids = bed.run(["sacct", "--allocations", "--noheader", "--parsable2", "--format=JobID"]).stdout.split()
    assert sorted(ids) == sorted(job(name) for name in cells(output))
    again = bed.run(run, cwd=ROOT)
    assert again.returncode == 0 and "0 to run" in again.stderr


def test_cells_as_steps_of_an_allocation(bed, study, tmp_path):
    output = tmp_path / "steps"
    run = shlex.join(command(study, output))
    moment = f"ls {shlex.quote(str(output))}/cells/correctness/*stage2-tensor2-*/logs/rank-0-*"
    script = f"""{run} &
        until {moment} >/dev/null 2>&1; do sleep 0.2; done; kill -9 $!; wait $!; echo first $?
        {run}; echo second $?"""
    done = bed.run(
        ["salloc", "-N2", "--ntasks-per-node=1", "--cpus-per-task=2", "bash", "-c", script], cwd=ROOT, timeout=1500
    )
    assert f"first {128 + signal.SIGKILL}" in done.stdout and "second 0" in done.stdout, done.stderr
    check_result(output)
    assert sorted(each["attempts"] for each in json_files(output.glob("cells/*/*/state.json"))) == [1, 1, 1, 2]
    assert not bed.stray()
