"""A real Slurm for tests: `slurm_bed` starts slurm/testbed once per pytest worker, with four nodes of two GPUs.

A test that uses it carries ``@pytest.mark.slurm``. After each test nothing of its jobs is left: they are cancelled,
whatever it left running is killed.
"""

import contextlib
import os
import shlex
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import attrs
import psutil
import pytest

from processes import own_environment

TESTS = Path(__file__).parent
TESTBED = TESTS.parent / "slurm" / "testbed"
GONE = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "OUT_OF_MEMORY")  # a job's last states
SHOWN = 6000  # characters of an output that a failure shows


@attrs.frozen
class Bed:
    """One running testbed. `env` is the environment of a client, and with it that of jobs."""

    name: str
    folder: Path
    env: dict[str, str]
    clients: list[subprocess.Popen] = attrs.field(factory=list)

    def run(
        self, command: Sequence, timeout: float = 60, env: Mapping[str, str] | None = None, **options
    ) -> subprocess.CompletedProcess:
        """Any client command (``squeue``, ``sacct``, ...), to its end; `env` is added to the bed's."""
        client = self.start(command, env, **options)
        try:
            out, err = client.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            # one SIGINT only makes srun print where it stands; SIGTERM ends it and its step
            client.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                client.wait(10)
            client.kill()
            out, err = client.communicate()
            text = f"stdout:\n{out[-SHOWN:]}\nstderr:\n{err[-SHOWN:]}"
            raise AssertionError(f"{shlex.join(client.args)}: no end after {timeout} s\n{text}") from None
        finally:
            self.clients.remove(client)
        return subprocess.CompletedProcess(client.args, client.returncode, out, err)

    def start(self, command: Sequence, env: Mapping[str, str] | None = None, **options) -> subprocess.Popen:
        """A client command in the background, its output in pipes."""
        client = subprocess.Popen(
            [str(word) for word in command],
            **{
                "env": {**self.env, **(env or {})},
                "stdin": subprocess.DEVNULL,
                "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE,
                "text": True,
                **options,
            },
        )
        self.clients.append(client)
        return client

    def srun_command(
        self, args: Sequence, nodes: int = 1, tasks_per_node: int = 1, options: Sequence[str] = ()
    ) -> list[str]:
        """``srun`` of `nodes` times `tasks_per_node` tasks, with `options` of srun; for :meth:`start`."""
        return ["srun", f"-N{nodes}", f"--ntasks-per-node={tasks_per_node}", *options, *map(str, args)]

    def srun(
        self,
        args: Sequence,
        nodes: int = 1,
        tasks_per_node: int = 1,
        options: Sequence[str] = (),
        timeout: float = 120,
        env: Mapping[str, str] | None = None,
        **popen,
    ) -> subprocess.CompletedProcess:
        """Runs `args` as tasks of a job of their own, or of a step of the job that `env` or `options` names."""
        return self.run(self.srun_command(args, nodes, tasks_per_node, options), timeout, env, **popen)

    def sbatch(
        self, script: str | Path, options: Sequence[str] = (), env: Mapping[str, str] | None = None, **popen
    ) -> int:
        """Submits a script, given as a file's path or as its text; returns the job's id."""
        command = ["sbatch", "--parsable", *options]
        if isinstance(script, Path):
            command.append(script)
        else:
            file = self.folder / f"job-{uuid.uuid4().hex}.sh"
            file.write_text(script)
            command.append(file)
        done = self.run(command, env=env, **popen)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split(";")[0])

    def scontrol(self, *args) -> str:
        done = self.run(["scontrol", *args])
        assert done.returncode == 0, done.stderr
        return done.stdout

    def scancel(self, *args) -> None:
        done = self.run(["scancel", *args])
        assert done.returncode == 0, done.stderr

    def job(self, job: int) -> dict[str, str]:
        """The fields of ``scontrol show job``: JobState, Restarts, ExitCode, NodeList, ..."""
        words = self.scontrol("show", "job", "--oneliner", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: int, states: Sequence[str] = GONE, timeout: float = 60) -> str:
        """Waits until the job is in one of `states`, and returns which."""
        states = [states] if isinstance(states, str) else states

        def look() -> str | None:
            state = self.job(job)["JobState"]
            return state if state in states else None

        return until(look, timeout, lambda: f"job {job} is in none of the states {', '.join(states)}: {self.job(job)}")

    def processes(self, job: int | None = None) -> list[psutil.Process]:
        """What lives of jobs on the nodes, the oldest first. The process ids are those of this machine."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                env = process.environ()
                ours = env.get("SLURM_CONF") == self.env["SLURM_CONF"] and "SLURMD_NODENAME" in env
                if ours and "SLURM_JOB_ID" in env and job in (None, int(env["SLURM_JOB_ID"])):
                    found.append(process)
        return sorted(found, key=psutil.Process.create_time)

    def ranks(self, job: int | None = None, step: int | None = None) -> dict[int, list[psutil.Process]]:
        """The processes of each task of a job's steps, by SLURM_PROCID; what srun started comes first."""
        ranks: dict[int, list[psutil.Process]] = {}
        for process in self.processes(job):
            with contextlib.suppress(psutil.Error):
                env = process.environ()
                # the batch script's own processes have a SLURM_PROCID too, and no SLURM_STEP_NODELIST
                if "SLURM_STEP_NODELIST" in env and process.name() != "srun":
                    if step in (None, int(env["SLURM_STEP_ID"])):
                        ranks.setdefault(int(env["SLURM_PROCID"]), []).append(process)
        return dict(sorted(ranks.items()))

    def stray(self, job: int | None = None, grace: float = 5) -> list[str]:
        """The processes that still live of jobs after `grace` seconds: for ``assert not bed.stray()``."""
        end = time.monotonic() + grace
        while (left := self.processes(job)) and time.monotonic() < end:
            time.sleep(0.1)
        texts = []
        for process in left:
            with contextlib.suppress(psutil.Error):
                texts.append(f"{process.pid} {shlex.join(process.cmdline())}")
        return texts

    def clear(self) -> None:
        """Ends every client, job and process of a job."""
        for client in self.clients:
            client.kill()
            client.communicate()
        self.clients.clear()
        if jobs := self._jobs():
            self.run(["scancel", "--full", "--signal=KILL", *jobs])
            self.run(["scancel", *jobs])
            until(lambda: not self._jobs(), 30, lambda: f"jobs that cannot be cancelled: {self._jobs()}")
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()

    def _jobs(self) -> list[str]:
        return self.run(["squeue", "--noheader", "--format=%A"]).stdout.split()


def until(look: Callable, timeout: float, complaint: Callable[[], str]):
    """Calls `look` until it returns something true, and returns that; the test fails after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not (result := look()):
        if time.monotonic() > end:
            pytest.fail(f"{complaint()} (after {timeout} s)")
        time.sleep(0.1)
    return result


@contextlib.contextmanager
def testbed(name: str, *options: str) -> Iterator[Bed]:
    """A bed of its own, with `options` of start.sh. Skips the test, with the reason, where none can be started."""
    required = os.environ.get("JAXINFER_TEST_SLURM") == "1"  # where it must run, no start is a failure

    def refuse(reason: str) -> None:
        (pytest.fail if required else pytest.skip)(f"no Slurm testbed: {reason}")

    if os.geteuid() != 0:
        refuse("it needs root")
    if shutil.which("srun") is None or shutil.which("slurmctld") is None:
        refuse("Slurm is not installed (slurm/testbed/install.sh)")
    command = [TESTBED / "start.sh", "--name", name, "--owner", str(os.getpid()), *options]
    clean = {key: value for key, value in own_environment().items() if not key.startswith(("SLURM", "SRUN"))}
    try:
        done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=120)
        if done.returncode:
            refuse(f"start.sh failed:\n{done.stderr[-SHOWN:]}")
        folder = Path(done.stdout.rsplit(" ", 1)[1].strip()).parent
        env = {
            **clean,
            "SLURM_CONF": str(folder / "etc" / "slurm.conf"),
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
            "JAX_PLATFORMS": "cpu",
            # with conftest's folder: ranks and tests share what one of them compiled
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "NPROC": "16",  # four for each CPU device of a process: with fewer, collectives can deadlock
        }
        bed = Bed(name, folder, env)
        yield bed
        bed.clear()
    finally:
        subprocess.run([TESTBED / "stop.sh", "--name", name], check=True, stdout=subprocess.DEVNULL, timeout=60)


_beds: list[Bed] = []


@pytest.fixture(scope="session")
def slurm_bed() -> Iterator[Bed]:
    """The worker's bed: four nodes, each with two GPUs (for scheduling only) and 32 CPUs."""
    with testbed(f"test-{os.getpid()}", "--nodes", "4", "--gpus", "2") as bed:
        _beds.append(bed)
        yield bed
        _beds.clear()


@pytest.fixture(autouse=True)
def _no_jobs_left() -> Iterator[None]:
    yield
    for bed in _beds:
        bed.clear()
