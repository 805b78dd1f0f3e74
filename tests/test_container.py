"""The container, really built: a Debian base, the wheels of a CPU installation, and runs of it on the testbed."""

import concurrent.futures
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import jaxinfer
from slurm_bed import until

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "slurm/build-container.sh"
TOOLS = ("apptainer", "mmdebstrap", "setpriv", "unshare")
MAKE_S = 600  # bound of each step of the build
# root of this machine may lack a capability that Apptainer's root would have
AS_ROOT = {"APPTAINER_NO_PRIVS": "1"}
GREEDY = ("--max-new-tokens", "100", "--ignore-eos", "--dtype", "float32")
COMPILED = ROOT / "build" / "compiled"
KEEP = {"JAX_COMPILATION_CACHE_DIR": str(COMPILED), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
PROMPTS = ROOT / "examples" / "tinystories" / "prompts.jsonl"

pytestmark = [pytest.mark.slow, pytest.mark.slurm]


def run(*command, env=None, ok=True, **options) -> subprocess.CompletedProcess:
    """Runs `command` to its end; its standard output and error are one text."""
    done = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, **{name: str(value) for name, value in (env or {}).items()}},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": MAKE_S, **options},
    )
    assert not ok or done.returncode == 0, done.stdout[-6000:]
    return done


def as_nobody(*command, network=True) -> list:
    """`command` as an ordinary user, who is to build the image; without a network if told so."""
    drop = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", *command]
    return drop if network else ["unshare", "--net", *drop]


@pytest.fixture(scope="module")
def place():
    """A folder with the scripts and a home that an ordinary user may use, and the settings of build-container.sh."""
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the base, Debian 12, has Python 3.11, and whoever downloads its wheels needs the same")
    missing = [f"{tool} is not installed" for tool in TOOLS if not shutil.which(tool)]
    if os.geteuid() != 0:
        missing.insert(0, "it needs root")
    if missing:
        required = os.environ.get("JAXINFER_TEST_SLURM") == "1"
        (pytest.fail if required else pytest.skip)(
            f"no container: {', '.join(missing)} (slurm/testbed/install-apptainer.sh)"
        )
    with tempfile.TemporaryDirectory(prefix="jaxinfer-container-") as folder:
        folder = Path(folder)
        folder.chmod(0o755)
        shutil.copytree(ROOT / "slurm", folder / "slurm")
        for name in ("home", "bundle"):
            (folder / name).mkdir()
            shutil.chown(folder / name, "nobody", "nogroup")
        settings = {
            "EXTRA": "cpu",
            "PYTHON": sys.executable,
            "BUNDLE": folder / "bundle",
            "SIF": folder / "bundle" / "jaxinfer.sif",
            "HOME": folder / "home",
            "APPTAINER_TMPDIR": folder / "home",
        }
        yield folder, settings


def make_base(folder: Path, settings: dict) -> None:
    """base.sif from slurm/base.def on a Debian of our own; kept in build/ as long as the definition stays."""
    name = hashlib.sha256((ROOT / "slurm" / "base.def").read_bytes()).hexdigest()[:12]
    kept = ROOT / "build" / f"container-base-{name}.sif"
    base = settings["BUNDLE"] / "base.sif"
    if kept.exists():
        copy(kept, base)
        return
    rootfs = folder / "rootfs"
    options = ("--variant=apt", "--mode=root", "--skip=check/qemu", "--dpkgopt=force-unsafe-io")
    run("mmdebstrap", *options, "bookworm", rootfs)
    # what an ordinary user cannot copy
    shutil.rmtree(rootfs / "dev")
    (rootfs / "dev").mkdir()
    run("chown", "-hR", "nobody:nogroup", rootfs)
    env = {**settings, "BOOTSTRAP": "localimage", "BASE": rootfs}
    run(*as_nobody(folder / SCRIPT, "base"), env=env, cwd=folder)
    shutil.rmtree(rootfs)
    kept.parent.mkdir(exist_ok=True)
    copy(base, kept)


def copy(image: Path, to: Path) -> None:
    """Whole or not there: others look for `to` meanwhile."""
    shutil.copyfile(image, f"{to}.{os.getpid()}")
    os.replace(f"{to}.{os.getpid()}", to)


def test_root_is_told_to_build_as_somebody_else(tmp_path):
    if os.geteuid() != 0 or not shutil.which("apptainer"):
        pytest.skip("it needs root and Apptainer (slurm/testbed/install-apptainer.sh)")
    if any(line.startswith(("root:", "0:")) for line in open("/etc/subuid")):
        pytest.skip("Apptainer takes this root: /etc/subuid has it")
    for half in ("base", "download"):
        done = run(ROOT / SCRIPT, half, env={"BUNDLE": tmp_path / "bundle"}, ok=False)
        assert done.returncode == 2 and len(done.stdout.splitlines()) == 1, done.stdout
        assert done.stdout.startswith(
            "error: Apptainer builds as an ordinary user here, not as root, who is not in /etc"
        )
        assert "runuser -u USER -- " in done.stdout and not (tmp_path / "bundle").exists()


@pytest.fixture(scope="module")
def image(place):
    folder, settings = place
    with concurrent.futures.ThreadPoolExecutor() as pool:
        base = pool.submit(make_base, folder, settings)
        # the checkout may be root's alone, so its user downloads
        own = {name: value for name, value in settings.items() if name != "HOME"}
        run(ROOT / SCRIPT, "wheels", env={**own, **AS_ROOT})
        base.result()
    run("chown", "-R", "nobody:nogroup", settings["BUNDLE"])
    done = run(*as_nobody(folder / SCRIPT, "build", network=False), env=settings, cwd=folder)
    assert "\njax 0." in done.stdout  # of %test
    return settings["SIF"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("container") / "model"
    source = ROOT / "examples" / "tinystories" / "model"
    run(sys.executable, "-m", "convert", "--source", source, "--output", path, "--dtype", "float32", cwd=ROOT)
    return path


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory):
    """Tokens by request, of one process without a container."""
    output = tmp_path_factory.mktemp("plain") / "out.jsonl"
    generate = [sys.executable, "-m", "jaxinfer.generate", "--cpu-devices", "1"]
    run(*generate, "--model", model, "--prompts", PROMPTS, "--output", output, *GREEDY, cwd=ROOT)
    return tokens(output)


def tokens(output: Path) -> dict[str, list[int]]:
    lines = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line["token_ids"] for line in lines}


def test_image_is_what_was_downloaded(image):
    labels = json.loads(run("apptainer", "inspect", "--json", image).stdout)["data"]["attributes"]["labels"]
    assert labels["org.opencontainers.image.version"] == jaxinfer.__version__
    assert labels["jaxinfer.jax"] == "cpu"
    release = (image.parent / "app" / "release").read_text()
    assert f"COMMIT={labels['org.opencontainers.image.revision']}\n" in release
    inside = ("apptainer", "exec", image, "ls", "/opt/jaxinfer", "/opt/jaxinfer/configs/clusters")
    listed = run(*inside, env=AS_ROOT).stdout
    assert "generic.yaml" in listed and "wheels" not in listed
    helped = run("apptainer", "run", image, "--help", env=AS_ROOT).stdout
    assert "usage: jaxinfer.generate" in helped


def test_packages_of_the_host_stay_out_and_variables_of_slurm_get_in(image, tmp_path):
    for name in ("jax", "json", "jaxinfer"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('leaked')")
    look = "import jax, json, jaxinfer, os, slurm; print(jaxinfer.__file__, os.environ['SLURM_PROCID'])"
    env = {"PYTHONPATH": tmp_path, "PYTHONHOME": tmp_path, "SLURM_PROCID": 3, **AS_ROOT}
    for folder in (tmp_path, ROOT):  # -c and -m look into the current folder first
        inside = ("apptainer", "exec", "--no-home", "--bind", folder, "--pwd", folder, image, "python", "-c", look)
        found = run(*inside, env=env).stdout
        assert found.startswith("/opt/jaxinfer/venv/lib/") and found.endswith(" 3\n")


def test_build_names_what_is_missing(place, tmp_path):
    folder, settings = place
    app = tmp_path / "app"
    (app / "wheels").mkdir(parents=True)
    env = {**settings, "BUNDLE": tmp_path}

    def complaint(**more) -> str:
        done = run(folder / SCRIPT, "build", env={**env, **more}, ok=False)
        assert done.returncode == 2
        return done.stdout

    assert complaint(PATH="/bin/nowhere:" + str(fake_path(tmp_path))).startswith("error: apptainer is not on the PATH")
    assert complaint().startswith(f"error: {tmp_path}/base.sif is missing")
    (tmp_path / "base.sif").touch()
    assert f"{app} is missing or not whole" in complaint()
    for name in ("one", "two", "three"):
        (app / "wheels" / f"{name}-1-py3-none-any.whl").write_text(name)
    sums = run("sha256sum", *sorted(f"./{path.relative_to(app)}" for path in app.rglob("*.whl")), cwd=app).stdout
    (app / "SHA256SUMS").write_text(sums)
    (app / "wheels" / "one-1-py3-none-any.whl").unlink()
    (app / "wheels" / "two-1-py3-none-any.whl").write_text("damaged")
    text = complaint()
    assert "./wheels/one-1-py3-none-any.whl: FAILED" in text and "./wheels/two-1-py3-none-any.whl: FAILED" in text
    assert "three-1" not in text
    for name in ("one", "two", "four"):
        (app / "wheels" / f"{name}-1-py3-none-any.whl").write_text(name)
    assert complaint().endswith("remove\n./wheels/four-1-py3-none-any.whl\n")
    assert "legal are cuda12, cuda13, cpu" in complaint(EXTRA="rocm")


def fake_path(folder: Path) -> Path:
    """A folder for PATH with what the script needs, except Apptainer."""
    path = folder / "bin"
    path.mkdir()
    for tool in ("bash", "dirname"):
        (path / tool).symlink_to(shutil.which(tool))
    return path


def test_srun_on_two_nodes_gives_the_tokens_of_a_plain_run(slurm_bed, image, model, plain, tmp_path):
    output = tmp_path / "out.jsonl"
    COMPILED.mkdir(parents=True, exist_ok=True)
    binds = f"{model},{PROMPTS.parent},{tmp_path},{COMPILED}"
    inside = ["apptainer", "exec", "--no-home", "--no-mount", "tmp", "--bind", binds, "--pwd", "/", image]
    secret = tmp_path / "secret"  # neither munge nor a home folder in there
    secret.write_bytes(os.urandom(32))
    secret.chmod(0o600)
    generate = ["python", "-m", "jaxinfer.generate", "--model", model, "--prompts", PROMPTS, "--output", output]
    done = slurm_bed.srun(
        [*inside, *generate, *GREEDY],
        nodes=2,
        options=("--kill-on-bad-exit=1", "--cpus-per-task=2"),
        env={**AS_ROOT, **KEEP, "JAXINFER_SECRET_FILE": str(secret)},
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    assert "mesh: stage=2" in done.stderr
    assert tokens(output) == plain
    assert not slurm_bed.stray()


def test_job_is_stopped_and_requeued_and_does_the_rest(slurm_bed, image, model, plain, tmp_path):
    """slurm/generate-container.sh: the signals of its time limit pass through the container."""
    run_folder, log_file = tmp_path / "run", tmp_path / "log"
    # a link that leads out of what is bound for its own sake; without the host's /tmp, where all of this lies
    (tmp_path / "link").symlink_to(model)
    env = {
        "SIF": image,
        "MODEL": tmp_path / "link",
        "RUN": run_folder,
        "COMPILED": COMPILED,
        "APPTAINER_NO_MOUNT": "tmp",
        **AS_ROOT,
        **KEEP,
    }
    options = ("--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=2", "--mem=2000", f"--output={log_file}")
    command = ["sbatch", "--parsable", *options, "slurm/generate-container.sh", "--max-batch", "1", *GREEDY]
    done = slurm_bed.run(command, env={name: str(value) for name, value in env.items()}, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    job = int(done.stdout)
    output = run_folder / "out.jsonl"

    def log() -> str:
        logs = [log_file, *run_folder.glob("logs/rank-*.log")]
        return "\n".join(f"---- {path}\n{path.read_text()}" for path in logs if path.exists())

    until(lambda: output.exists() and output.stat().st_size, 120, log)
    slurm_bed.scancel("--signal=USR1", "--batch", job)
    assert slurm_bed.wait(job, timeout=120) == "COMPLETED", log()
    assert slurm_bed.job(job)["Restarts"] == "1", log()
    assert "stopped by SIGUSR1" in (run_folder / "logs" / "rank-0-node1.log").read_text(), log()
    assert tokens(output) == plain
    assert not slurm_bed.stray(job)
