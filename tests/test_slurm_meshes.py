"""Runs started by srun on one to four nodes: the tokens of one process, whatever the mesh and the distribution."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from convert.run import convert
from hf_models import make_hf_folder

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = ["--dtype", "float32", "--max-batch", "4", "--prefill-chunk", "16", "--decode-steps", "2"]
PROMPTS = [[5, 60, 33, 8], [90, 4, 17, 17, 28, 51, 6, 80, 12, 44, 7, 19], [11, 3], [70, 71, 29, 40, 88, 9, 35]]
DEAD_PROXY = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "all_proxy"), "http://127.0.0.1:9")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds ``ckpt``, and ``PART.jsonl`` for the prompts of all, first and last."""
    folder = tmp_path_factory.mktemp("slurm_meshes")
    make_hf_folder(folder / "hf", num_hidden_layers=4, num_key_value_heads=4, tie_word_embeddings=False)
    convert(folder / "hf", folder / "ckpt", quiet=True)
    for part, prompts in (("all", PROMPTS), ("first", PROMPTS[:2]), ("last", PROMPTS[2:])):
        lines = [json.dumps({"id": str(prompt), "prompt_token_ids": prompt}) for prompt in prompts]
        (folder / f"{part}.jsonl").write_text("\n".join(lines))
    return folder


def command(folder, output: Path, prompts: str = "all", devices: int = 1, mesh: str | None = None) -> list[str]:
    words = ["--model", folder / "ckpt", "--prompts", folder / f"{prompts}.jsonl", "--output", output]
    words += ["--cpu-devices", devices, "--max-new-tokens", 4, "--ignore-eos", *OPTIONS]
    words += [] if mesh is None else ["--mesh", mesh]
    return [sys.executable, "-m", "jaxinfer.generate", *map(str, words)]


def tokens(output: Path) -> dict[str, list[int]]:
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line["token_ids"] for line in lines}


@pytest.fixture(scope="module")
def alone(folder, slurm_bed):
    """The tokens of one process on one device, without Slurm."""
    words = command(folder, folder / "alone.jsonl")
    subprocess.run(words, cwd=ROOT, env=slurm_bed.env, check=True, capture_output=True, timeout=120)
    found = tokens(folder / "alone.jsonl")
    assert len(found) == len(PROMPTS)
    return found


def run_of(output: Path) -> dict:
    return json.loads(output.with_name(f"{output.stem}.run.json").read_text())["runs"][-1]


@pytest.mark.parametrize(
    "nodes, tasks, devices, mesh, chosen, options",
    [
        (1, 1, 2, None, "tensor=2", []),
        (1, 2, 1, None, "tensor=2", []),
        (2, 2, 1, None, "stage=2,tensor=2", ["--distribution=cyclic"]),
        (4, 1, 1, None, "stage=4", []),
        (4, 2, 1, "stage=2,tensor=4", None, []),
    ],
    ids=["one-task-two-devices", "one-node", "two-nodes-cyclic", "four-nodes", "four-nodes-two-tasks"],
)
def test_tokens_of_one_process(folder, slurm_bed, alone, tmp_path, nodes, tasks, devices, mesh, chosen, options):
    output = tmp_path / "out.jsonl"
    words = command(folder, output, devices=devices, mesh=mesh)
    done = slurm_bed.srun(words, nodes, tasks, ["--kill-on-bad-exit=1", *options], timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    assert tokens(output) == alone
    # node by node, so that tensor is inside a node
    assert run_of(output)["hosts"] == [f"node{node}" for node in range(1, nodes + 1) for _ in range(tasks)]
    place = run_of(output)["slurm"]
    assert place["nodes"] == [f"node{node}" for node in range(1, nodes + 1)] and place["job"].isdigit()
    metrics = json.loads(output.with_name("out.metrics.json").read_text())
    for kind in ("phases", "memory"):
        assert [(each["rank"], each["host"]) for each in metrics[kind]] == list(enumerate(run_of(output)["hosts"]))
    # rank 0 alone says which mesh it is
    assert re.findall(r"mesh: (\S+) ", done.stderr) == ([chosen] if chosen else [])
    assert not slurm_bed.stray()


def test_steps_of_one_job_at_once_behind_a_proxy_that_is_dead(folder, slurm_bed, alone, tmp_path):
    parts = {"all": "tensor=2", "first": "auto", "last": "data=2"}
    script = ["#!/bin/bash"]
    for part, mesh in parts.items():
        words = command(folder, tmp_path / f"{part}.jsonl", part, mesh=mesh)
        script.append(f"srun --overlap {shlex.join(words)} >{tmp_path}/{part}.log 2>&1 & {part}=$!")
    script += ["status=0", *(f"wait ${part} || status=1" for part in parts), "exit $status"]
    options = ["--nodes=2", "--ntasks-per-node=1", f"--output={tmp_path}/job.log"]
    job = slurm_bed.sbatch("\n".join(script), options, env=DEAD_PROXY)
    state = slurm_bed.wait(job, timeout=240)
    logs = {part: (tmp_path / f"{part}.log").read_text() for part in parts}
    assert state == "COMPLETED", "\n".join(logs.values())[-8000:]
    for part in parts:
        found = tokens(tmp_path / f"{part}.jsonl")
        assert found == {name: alone[name] for name in found}
        assert len(found) == {"all": 4, "first": 2, "last": 2}[part]
        assert run_of(tmp_path / f"{part}.jsonl")["hosts"] == ["node1", "node2"]
    assert re.findall(r"mesh: (\S+) ", logs["first"]) == ["stage=2"]
    assert not slurm_bed.stray(job)
