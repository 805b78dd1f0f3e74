"""slurm/testbed: beds beside each other, and nothing of one is left, however it ended."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from slurm_bed import TESTBED, until
from slurm_bed import testbed as start_bed

pytestmark = pytest.mark.slurm
REGISTRY = Path("/run/slurm-testbed")


def traces(name: str) -> list[str]:
    """What there is of a bed: its entry and run folder, and processes that know that folder."""
    found = [str(link) for link in REGISTRY.glob("*") if link.is_symlink() and link.readlink().name == name]
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environ, command = (folder / "environ").read_bytes(), (folder / "cmdline").read_bytes()
        except OSError:  # it has just ended
            continue
        if f"slurm-testbed/{name}".encode() in environ + command:
            found.append(command.replace(b"\0", b" ").decode())
    return found


def ownerless_links() -> list[str]:
    """Network links of beds that are not there; beds of other tests may just come or go."""
    names = [found[0] for link in os.listdir("/sys/class/net") if (found := re.findall(r"^stb(\d+)", link))]
    return [number for number in names if not (REGISTRY / number).is_symlink()]


@pytest.fixture
def name(request):
    name = f"{request.node.name[5:35]}-{os.getpid()}"
    yield name
    subprocess.run([TESTBED / "stop.sh", "--name", name], check=True, capture_output=True)


def test_two_beds_and_their_own_jobs(name):
    with start_bed(f"other-{name}", "--names", "a01,a02,b7", "--gpus", "0") as other:
        with start_bed(name, "--nodes", "2", "--gpus", "3") as bed:
            assert sorted(other.srun(["hostname"], 3).stdout.split()) == ["a01", "a02", "b7"]
            seen = bed.srun(["sh", "-c", "echo $(hostname) $CUDA_VISIBLE_DEVICES"], 2, options=["--gpus-per-node=3"])
            assert sorted(seen.stdout.splitlines()) == ["node1 0,1,2", "node2 0,1,2"]
            bed.sbatch("#!/bin/bash\nsetsid sleep 1000 &\nsrun sleep 1000\n", ["-o", "/dev/null"])
            until(lambda: len(bed.processes()) > 3, 20, lambda: "the job does not run")
        assert not traces(name)
        # the first one still works
        assert other.srun(["hostname"]).returncode == 0
    assert not traces(f"other-{name}")


def test_the_job_scripts_are_taken_as_they_are(name):
    scripts = [path for path in sorted(TESTBED.parent.glob("*.sh")) if "#SBATCH" in path.read_text()]
    assert len(scripts) == 6
    with start_bed(name) as bed:
        for script in scripts:
            done = bed.run(["sbatch", "--test-only", "--account=ACCOUNT", script])
            assert done.returncode == 0, f"{script.name}: {done.stderr}"


def test_bed_ends_with_its_owner(name):
    owner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    try:
        command = [TESTBED / "start.sh", "--name", name, "--nodes", "1", "--owner", str(owner.pid)]
        subprocess.run(command, check=True, capture_output=True)
        assert traces(name)
    finally:
        owner.kill()
        owner.wait()
    until(lambda: not traces(name), 10, lambda: f"there still is {traces(name)}")


def test_nothing_is_left_of_a_start_that_fails(name, tmp_path):
    fake = tmp_path / "slurmd"
    fake.write_text("#!/bin/sh\necho no node today >&2\nexit 1\n")
    fake.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([TESTBED / "start.sh", "--name", name], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "no node today" in done.stderr
    assert not traces(name)
    until(lambda: not ownerless_links(), 10, lambda: f"of no bed: {ownerless_links()}")


def test_a_start_that_is_killed_can_be_cleaned_up(name):
    start = subprocess.Popen([TESTBED / "start.sh", "--name", name], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until(lambda: len(traces(name)) > 3, 20, lambda: "no start")
    start.send_signal(signal.SIGKILL)
    start.communicate()
    subprocess.run([TESTBED / "stop.sh", "--name", name], check=True, capture_output=True)
    assert not traces(name)


def test_a_name_that_is_taken(name):
    with start_bed(name, "--nodes", "1"):
        again = subprocess.run([TESTBED / "start.sh", "--name", name], capture_output=True, text=True)
        assert again.returncode == 2 and f"a bed '{name}' is there already" in again.stderr
        assert traces(name)
