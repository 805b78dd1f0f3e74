"""Faults by phase, under a real srun: each ends the whole job within its bound, and rank 0 says last who it was."""

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest

from convert.run import convert
from hf_models import make_hf_folder
from jaxinfer.checkpoint.manifest import read_manifest

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

TESTS = Path(__file__).parent
STUCK, COMPILE, DEAD = 5, 12, 5
START = 90  # importing takes long where other tests keep all cores busy
BOUNDS = ("--stuck-s", STUCK, "--load-stuck-s", STUCK, "--compile-stuck-s", COMPILE, "--dead-s", DEAD)
SLACK = 15  # to notice, to print stacks, to end every process, on two busy cores


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    make_hf_folder(folder / "hf", num_hidden_layers=2)
    convert(folder / "hf", folder / "ckpt", quiet=True)
    lines = [json.dumps({"id": str(i), "prompt_token_ids": [i + 3, 7, 9]}) + "\n" for i in range(4)]
    (folder / "in.jsonl").write_text("".join(lines))
    return folder / "ckpt"


def options(checkpoint, tmp_path, *more):
    return ["--model", checkpoint, "--prompts", checkpoint.parent / "in.jsonl", "--output", tmp_path / "out.jsonl",
            "--mesh", "stage=2", "--max-new-tokens", 60, "--max-batch", 4, "--prefill-chunk", 16, "--decode-steps", 4,
            "--ignore-eos", *BOUNDS, "--start-s", START, *more]  # fmt: skip


def run_two(bed, tmp_path, command, before=""):
    """Two ranks on two nodes, `before` in bash first; the status and each rank's standard error."""
    if before:
        command = ["bash", "-c", f'{before}\nexec "$@"', "bash", *command]
    done = bed.srun(command, nodes=2, options=["--error", tmp_path / "%t.err"], timeout=2 * START)
    return done.returncode, [(tmp_path / f"{each}.err").read_text() for each in (0, 1)]


def generate(*arguments):
    return [sys.executable, "-m", "jaxinfer.generate", *arguments]


def faulty(rank, phase, fault, *arguments):
    return [sys.executable, TESTS / "faulty_generate.py", rank, phase, fault, "--", *arguments]


KILLED = r"died in {phase}.*killed by signal 9 \(SIGKILL\)"
STOPPED = r"is stuck in {phase}.*its process is stopped"
GONE = r"died in {phase}.*its process or its node is gone"
SILENT = r"is dead: no sign of life for \d+ s, last in {phase}"
RAISED = r"failed in {phase}.*RuntimeError: an error on purpose"
HUNG = r"is stuck in {phase}.*no progress for \d+ s"
PHASES = ("start", "load", "compile", "prefill", "decode")
TABLE = [
    *((1, phase, "kill", KILLED, 0) for phase in PHASES),
    *((1, phase, "stop", STOPPED, STUCK) for phase in ("start", "load", "prefill", "decode")),
    (1, "compile", "stop", STOPPED, COMPILE),
    *((1, phase, "raise", RAISED, 0) for phase in PHASES),
    (1, "load", "hang", HUNG, STUCK),
    (1, "end", "hang", HUNG, STUCK),
    (0, "load", "kill", KILLED, 0),
    (0, "decode", "stop", STOPPED, STUCK),
    (0, "decode", "raise", RAISED, 0),
    (1, "decode", "kill-monitor", GONE, 0),
    (1, "decode", "stop-monitor", SILENT, DEAD),
]


@pytest.mark.parametrize("rank, phase, fault, text, bound", TABLE, ids=["-".join(map(str, row[:3])) for row in TABLE])
def test_fault_ends_the_job_and_names_the_rank(slurm_bed, checkpoint, tmp_path, rank, phase, fault, text, bound):
    status, logs = run_two(slurm_bed, tmp_path, faulty(rank, phase, fault, *options(checkpoint, tmp_path)))
    ended = time.time()
    began = re.search(r"fault at ([\d.]+)", logs[rank])
    assert began, logs
    assert status not in (0, 2)
    last = logs[0].splitlines()[-1]
    assert re.search(rf"^jaxinfer.generate: rank {rank}/2 on node\d.* {text.format(phase=phase)}", last), logs
    assert phase == "start" or "(CPU 0: cpu)" in last
    assert ended - float(began[1]) < bound + SLACK
    if fault in ("stop", "hang"):
        assert "the stacks of its process" in logs[rank] and "faulty_generate.py" in logs[rank], logs[rank]
    assert not slurm_bed.stray()


def refused(bed, tmp_path, command, text, before=""):
    """A fault that the user can mend: status 2, and rank 0 says at last what it is, on which rank."""
    status, logs = run_two(bed, tmp_path, command, before)
    assert status == 2, logs
    last = [line for line in logs[0].splitlines() if not line.startswith("slurmstepd")][-1]
    assert re.search(rf"^jaxinfer.generate: error: {text}", last), logs
    assert "Traceback" not in "".join(logs)
    assert not bed.stray()
    return logs


def test_another_version(slurm_bed, checkpoint, tmp_path):
    command = faulty(1, "start", "version", *options(checkpoint, tmp_path))
    refused(slurm_bed, tmp_path, command, r"rank 1/2 on node2 has jaxinfer 0\.0\.1, rank 0 on node1 has \d")


def test_another_option(slurm_bed, checkpoint, tmp_path):
    before = 'if [ $SLURM_PROCID = 1 ]; then set -- "$@" --temperature 0.5; fi'
    text = "rank 1 on node2 has another prompts or options than rank 0 on node1"
    refused(slurm_bed, tmp_path, generate(*options(checkpoint, tmp_path)), text, before)


def test_a_wrong_option(slurm_bed, checkpoint, tmp_path):
    told = r"unrecognized arguments: --bogus{} \(--help explains\) \(rank {}/2 on node\d, in start\)"
    command = generate(*options(checkpoint, tmp_path, "--port", 61008))
    for rank in (0, 1):
        before = f"if [ $SLURM_PROCID = {rank} ]; then set -- \"$@\" --bogus=$'caf\\xe9'; fi"
        refused(slurm_bed, tmp_path, command, told.format(r"=caf\\udce9", rank), before)
    logs = refused(slurm_bed, tmp_path, [*command, "--bogus"], told.format("", "[01]"))
    assert "".join(logs).count("--bogus") == 1, logs
    text = "--prompts - works with one process"
    logs = refused(slurm_bed, tmp_path, [*command, "--prompts", "-"], text)
    assert "".join(logs).count(text) == 1, logs


def test_checkpoint_that_one_node_does_not_see(slurm_bed, checkpoint, tmp_path):
    before = 'if [ $SLURM_PROCID = 1 ]; then set -- "$@" --model /no/such; fi'
    text = r"/no/such: no such checkpoint folder.*\(rank 1/2 on node2 \(CPU 0: cpu\), in start\)"
    refused(slurm_bed, tmp_path, generate(*options(checkpoint, tmp_path)), text, before)


@pytest.mark.parametrize("damage, text", [("flip", "its bytes changed"), ("cut", "truncated"), ("remove", "missing")])
def test_damaged_shard(slurm_bed, checkpoint, tmp_path, damage, text):
    copy = tmp_path / "ckpt"
    shutil.copytree(checkpoint, copy)
    name = next(name for name in read_manifest(copy).chunks if "layers.1.down/" in name)  # of rank 1 only
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).unlink()
    if damage != "remove":
        (copy / name).write_bytes(data if damage == "flip" else data[:-5])
    expected = rf"{re.escape(str(copy / name))}: {text}.*\(rank 1/2 on node2 \(CPU 0: cpu\), in load\)"
    arguments = options(checkpoint, tmp_path, "--model", copy)
    refused(slurm_bed, tmp_path, generate(*arguments), expected)
    assert not list(tmp_path.glob("out.*"))  # nothing that looks like results


def test_port_in_use(slurm_bed, checkpoint, tmp_path):
    listener = f"import socket, time; kept = socket.create_server(('', 61007)); time.sleep({START})"
    before = f'if [ $SLURM_PROCID = 0 ]; then {sys.executable} -c "{listener}" & fi; sleep 1'
    command = generate(*options(checkpoint, tmp_path, "--port", 61007))
    text = "rank 0/2 on node1: port 61007 cannot be used: Address already in use; choose another"
    began = time.time()
    refused(slurm_bed, tmp_path, command, text, before)
    assert time.time() - began < START - 5  # rank 1 does not look for rank 0 until the bound for the start


def test_rank_that_never_starts(slurm_bed, checkpoint, tmp_path):
    before = "if [ $SLURM_PROCID = 1 ]; then exec sleep 80; fi"
    command = generate(*options(checkpoint, tmp_path, "--start-s", 4))
    status, logs = run_two(slurm_bed, tmp_path, command, before)
    assert status
    assert "1 of 2 ranks are there after 4 s; missing: rank 1 (node2)" in logs[0].splitlines()[-1]
    assert not slurm_bed.stray()


def test_full_disk(slurm_bed, checkpoint, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    before = f"if [ $SLURM_PROCID = 0 ]; then mount -t tmpfs -o size=180k tmpfs {out}; fi"
    arguments = options(checkpoint, tmp_path, "--output", out / "out.jsonl", "--logprobs", 20)
    try:
        text = r"\S+out.jsonl: No space left on device; all \d+ bytes before this result are whole.*\(rank 0/2 on node1"
        refused(slurm_bed, tmp_path, generate(*arguments), text, before)
        slurm_bed.srun(["cp", "-r", out, tmp_path / "kept"], options=["-w", "node1"])
        assert not list((tmp_path / "kept").glob("*.partial"))
        kept = (tmp_path / "kept" / "out.jsonl").read_text()
        assert kept.endswith("\n")
        assert all(json.loads(line)["finish_reason"] == "length" for line in kept.splitlines())
    finally:
        slurm_bed.srun(["umount", out], options=["-w", "node1"])


@pytest.fixture
def small_memory():
    """A control group with 600 MB, of either version."""
    name = f"jaxinfer-test-{os.getpid()}"
    for folder, limit in (
        (f"/sys/fs/cgroup/memory/{name}", "memory.limit_in_bytes"),
        (f"/sys/fs/cgroup/{name}", "memory.max"),
    ):
        group = Path(folder)
        try:
            group.mkdir()
            (group / limit).write_text("600000000")
        except OSError:
            if group.exists():
                group.rmdir()
            continue
        yield group
        group.rmdir()
        return
    pytest.skip("needs a memory control group, which this machine does not let us make")


def test_out_of_memory(slurm_bed, checkpoint, tmp_path, small_memory):
    before = f"if [ $SLURM_PROCID = 1 ]; then echo $$ > {small_memory}/cgroup.procs; fi"
    command = faulty(1, "decode", "memory", *options(checkpoint, tmp_path))
    status, logs = run_two(slurm_bed, tmp_path, command, before)
    assert status == 1
    text = r"rank 1/2 on node2 .* died in decode.*SIGKILL\); out of memory: the kernel's OOM killer took it \(0\."
    assert re.search(text, logs[0].splitlines()[-1]), logs
    assert not slurm_bed.stray()
