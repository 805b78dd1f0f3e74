"""The doctor: whole runs of one process and of several, with something wrong."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest

from convert.run import convert
from hf_models import make_hf_folder
from processes import free_port, own_environment

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor")
    make_hf_folder(folder / "hf")
    convert(folder / "hf", folder / "ckpt", quiet=True)
    return folder / "ckpt"


def start(*arguments, cwd: Path = ROOT, **environment: str) -> subprocess.Popen:
    env = own_environment("NPROC", "XLA_FLAGS")
    command = [sys.executable, "-m", "jaxinfer.doctor", *map(str, arguments)]
    settings = {**env, "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.Popen(command, cwd=cwd, env=settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def start_ranks(ranks: Iterable[int], count: int, port: int, *arguments, changes=()) -> list[subprocess.Popen]:
    """Those `ranks` of `count`; `changes` of a rank: options of `start` for it alone."""
    place = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", count]
    return [start(*arguments, *place, "--process-id", rank, **dict(changes).get(rank, {})) for rank in ranks]


def start_all(count: int, *arguments, changes=()) -> list[subprocess.Popen]:
    return start_ranks(range(count), count, free_port(), *arguments, changes=changes)


def finish(processes: list[subprocess.Popen], timeout: float = 100) -> list[tuple[int, str, str]]:
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, out, err) for process, (out, err) in zip(processes, outputs)]


def test_alone(checkpoint, tmp_path):
    answer = tmp_path / "answer.json"
    ((status, out, err),) = finish([start("--model", checkpoint, "--output-dir", tmp_path, "--json", answer)])
    assert status == 0, out + err
    assert "all-reduce: one device (cpu)" in out and "no error" in out.splitlines()[-1]
    data = json.loads(answer.read_text())
    assert data["errors"] == 0 and data["ranks"][0]["facts"]["versions"]["jax"] and data["collective"][0]["end"] == "ok"
    assert list(tmp_path.iterdir()) == [answer]


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--process-id", 0], "belong together"),
        (["--timeout-s", 0], "legal is above 0"),
        (["--coordinator", "x", "--num-processes", 2, "--process-id", 0], "legal is host:port"),
    ],
)
def test_wrong_use(arguments, text):
    ((status, _, err),) = finish([start(*arguments)])
    assert status == 2 and text in err and "Traceback" not in err


def test_help():
    ((status, out, _),) = finish([start("--help")])
    assert status == 0 and "srun -N2" in out


@pytest.mark.slow
def test_four_ranks(checkpoint):
    first, *others = finish(start_all(4, "--model", checkpoint))
    assert first[0] == 0, first
    assert "all-reduce: 4 devices (cpu): 8 KiB in" in first[1] and "versions: equal on all ranks" in first[1]
    assert "checkpoint: the same on all ranks" in first[1] and "no errors" in first[1].splitlines()[-1]
    assert [other[:2] for other in others] == [(0, "")] * 3


@pytest.mark.slow
def test_one_rank_is_different(checkpoint, tmp_path):
    copy = tmp_path / "other"
    shutil.copytree(ROOT / "jaxinfer", copy / "jaxinfer", ignore=shutil.ignore_patterns("__pycache__"))
    with open(copy / "jaxinfer" / "__init__.py", "a") as file:
        file.write('\n__version__ = "99"\n')
    (tmp_path / "file").touch()
    wrong = {"cwd": copy, "PYTHONPATH": str(copy), "XLA_FLAGS": "--xla_cpu_enable_fast_math=false"}
    wrong |= {"http_proxy": "http://10.255.255.1:3128", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "file")}
    shutil.copytree(checkpoint, copy / "ckpt")
    (copy / "ckpt" / "manifest.json").unlink()
    changes = {0: {"cwd": checkpoint.parent}, 1: wrong}
    processes = start_all(2, "--model", "ckpt", "--timeout-s", 40, changes=changes)
    (status, out, err), (other, _, _) = finish(processes)
    assert (status, other) == (1, 1), out + err
    host = socket.gethostname()
    for text in (
        f"flags: XLA_FLAGS: rank 1 on {host} has '--xla_cpu_enable_fast_math=false', the others none",
        f"versions: jaxinfer: rank 1 on {host} has '99 (sources ",
        f"proxy (rank 1 on {host}): http_proxy set",
        f"checkpoint (rank 1 on {host}): ckpt: incomplete checkpoint",
        f"compile cache (rank 1 on {host}): {tmp_path / 'file'}: not a folder",
        "all-reduce: 2 devices",
    ):
        assert text in out, out


@pytest.mark.slow
def test_a_rank_is_missing():
    began = time.monotonic()
    (status, out, err), (other, nothing, _) = finish(start_ranks((0, 2), 3, free_port(), "--start-s", 6))
    assert (status, other) == (1, 1) and nothing == "" and time.monotonic() - began < 60
    assert "ranks: rank 1 on an unknown host did not come in 6 s" in out and "not tried, since ranks are missing" in out
    assert "waiting for rank 1" in err


@pytest.mark.slow
def test_an_all_reduce_that_hangs_ends_in_its_bound():
    began = time.monotonic()
    processes = start_all(2, "--timeout-s", 10)
    doctor, children = psutil.Process(processes[1].pid), []
    while not children and time.monotonic() - began < 60:
        children = doctor.children(recursive=True)
        time.sleep(0.01)
    for child in children:
        child.send_signal(signal.SIGSTOP)
    (status, out, err), (other, _, _) = finish(processes)
    assert (status, other) == (1, 1), out + err
    assert time.monotonic() - began < 60
    assert (
        f"all-reduce: hangs: of 2 ranks 2 were not done; rank 1 on {socket.gethostname()}: its process is stopped"
        in out
    )
    assert "firewall" in out and not any(child.is_running() for child in children)


@pytest.mark.slow
def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as server:
        ((status, out, _),) = finish(start_ranks([0], 2, server.getsockname()[1], "--start-s", 3))
    assert status == 1 and "cannot be used" in out and "rank 1 on an unknown host cannot come" in out


@pytest.mark.slurm
@pytest.mark.slow
def test_under_srun(slurm_bed, checkpoint):
    done = slurm_bed.srun(
        [sys.executable, "-m", "jaxinfer.doctor", "--model", checkpoint], nodes=2, tasks_per_node=2, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("jaxinfer.doctor") == 1 and "4 tasks on 2 nodes" in done.stdout
    assert "no errors" in done.stdout and "on 4 ranks" in done.stdout.splitlines()[-1]
    assert "all-reduce: 4 devices (cpu)" in done.stdout
    assert not slurm_bed.stray()


@pytest.mark.slurm
def test_job_script(slurm_bed, checkpoint, tmp_path):
    settings = {"MODEL": str(checkpoint), "RUN": str(tmp_path / "run"), "PYTHON": sys.executable}
    options = ["--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1", "--mem=1G", f"--output={tmp_path}/log"]
    job = slurm_bed.sbatch(ROOT / "slurm" / "doctor.sh", options, env=settings, cwd=ROOT)
    state = slurm_bed.wait(job, timeout=120)
    log = (tmp_path / "log").read_text()
    assert state == "COMPLETED" and "no errors" in log and "on 2 ranks" in log, log
    answer = json.loads((tmp_path / "run" / "answer.json").read_text())
    assert answer["errors"] == 0 and len(answer["ranks"]) == 2
    assert len(list((tmp_path / "run" / "logs").iterdir())) == 2
