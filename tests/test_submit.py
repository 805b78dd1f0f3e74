"""``python -m slurm.submit``: presets, the script that it makes, and whole rounds on a real Slurm with accounting."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hf_models import make_hf_folder
from slurm.inside import step_options
from slurm.presets import Cluster, PresetError, find_cluster, read_cluster
from slurm.runs import UsageError
from slurm.shards import ShardError, unfinished
from slurm.submit import main
from slurm_bed import testbed as start_bed
from slurm_bed import until

ROOT = Path(__file__).resolve().parents[1]
PRESETS = sorted((ROOT / "configs" / "clusters").glob("*.yaml"))
GENERIC = ROOT / "configs" / "clusters" / "generic.yaml"
LEAST = 'about: "test"\nmemory: "2G"\ntime: "0:10:00"\n'
# nodes of CPUs, one task each
CPU = (
    "--gpus-per-node=0",
    "--tasks-per=node",
    "--cpus-per-node=2",
    "--memory=2G",
    "--time=10",
    "--python",
    sys.executable,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_hf_folder(folder / "hf")
    command = [sys.executable, "-m", "convert", "--source", folder / "hf", "--output", folder / "ckpt"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder / "ckpt"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "in.jsonl"
    path.write_text("".join(f'{{"prompt_token_ids": [{i + 3}]}}\n' for i in range(8)))
    return path


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "slurm.submit", *map(str, arguments)]


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=60)


def round_of(model, prompts, folder, *arguments, cluster=GENERIC) -> tuple:
    place = ("--cluster", cluster, "--model", model, "--prompts", prompts, "--output-dir", folder, "--poll-s", "0.3")
    return (*place, *arguments)


# ---- presets


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_are_legal(path):
    assert bool(read_cluster(path, {}).gpus_per_node) == (path.stem != "testbed")
    assert find_cluster(path.stem) == find_cluster(str(path)) == path


def test_there_are_four_presets():
    assert [path.stem for path in PRESETS] == ["generic", "leonardo-booster", "testbed", "two-node-t4"]


def test_show_cluster_is_a_line_of_json(tmp_path):
    done = run("--show-cluster", "leonardo-booster")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    about = shown.pop("about")
    assert "A100-64GB" in about and done.stdout.count("\n") == 1
    assert shown == {
        "cluster": "leonardo-booster", "gpu": "A100-64", "gpus_per_node": 4, "nodes": 1, "tasks_per_node": 4,
        "cpus_per_node": 32, "memory": "494000M", "time": "24:00:00",
    }  # fmt: skip
    mine = tmp_path / "my cluster.yaml"
    mine.write_text(LEAST + "gpu: T4\ntasks_per: node\n")
    shown = json.loads(run("--show-cluster", mine, "--gpus-per-node", "0", "--nodes", "3").stdout)
    assert shown["cluster"] == "my cluster" and shown["gpu"] is None and shown["nodes"] == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LEAST + "patition: x\n", "unknown field 'patition'; did you mean 'partition'? legal: about, partition"),
        (LEAST + "1: x\n", "unknown field 1; legal: about"),
        (LEAST + 'nodes: "2"\n', "nodes: found '2', legal is a whole number from 1"),
        (LEAST + "nodes: 0\n", "nodes: found 0, legal is a whole number from 1"),
        (LEAST + "nodes: true\n", "nodes: found True, legal is a whole number"),
        (LEAST + "qos: 3\n", "qos: found 3, legal is null or a text of one line"),
        (LEAST + "gpu_option: gpu\n", "gpu_option: found 'gpu', legal is gres or gpus-per-node or gpus-per-task or"),
        (LEAST + "gpu: A100\n", "gpu: found 'A100', legal is null or one of T4, V100-16,"),
        (LEAST + "gpu: [T4]\n", "gpu: found ['T4'], legal is null or one of T4, V100-16,"),
        (LEAST + "gpus_per_node: 0\n", "tasks_per: found gpu with gpus_per_node 0, legal is node"),
        (LEAST + "gpus_per_node: 4\n", "cpus_per_node: found 1 for 4 tasks"),
        (LEAST + "env: {A: 1}\n", "env: found {'A': 1}, legal is NAME: \"text\" pairs, numbers in quotes"),
        (LEAST + 'env: {"A B": "1"}\n', "env: found {'A B': '1'}, legal"),
        (LEAST + "setup: source x\n", "setup: found 'source x', legal is a list of texts"),
        (LEAST + 'setup: ["a\\nb"]\n', "setup: found ['a\\nb'], legal is a list of texts of one line"),
        ('about: "x"\nmemory: 2G\ntime: 24:00:00\n', "time: found 86400, legal is a text such as \"24:00:00\""),
        ('about: "x"\nmemory: 2 GB\ntime: "10"\n', "memory: found '2 GB', legal is a text such as \"200G\""),
        ('about: "x"\ntime: "10"\n', "memory is missing: memory of a node, 200G say"),
        ("- a\n", "found list, legal are lines of FIELD: VALUE"),
        ("a: [\n", "no YAML: while parsing"),
    ],
)  # fmt: skip
def test_wrong_presets_take_one_line(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(PresetError) as raised:
        read_cluster(path, {})
    assert str(raised.value).startswith(f"{path}: ") and message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"gpus_per_node": 4, "cpus_per_node": 32}, ["--ntasks-per-node=4", "--cpus-per-task=8", "--gpus-per-node=4"]),
        (
            {"gpus_per_node": 4, "cpus_per_node": 32, "tasks_per": "node", "gpu_option": "gres", "gpu_type": "a100"},
            ["--ntasks-per-node=1", "--cpus-per-task=32", "--gres=gpu:a100:4"],
        ),
        (
            {"gpus_per_node": 2, "cpus_per_node": 5, "gpu_option": "gpus-per-task"},
            ["--ntasks-per-node=2", "--cpus-per-task=2", "--gpus-per-task=1"],
        ),
        ({"gpus_per_node": 0, "tasks_per": "node"}, ["--ntasks-per-node=1", "--cpus-per-task=1"]),
        ({"gpu_option": "none"}, ["--ntasks-per-node=1", "--cpus-per-task=1"]),
    ],
)
def test_what_a_job_asks_for(fields, options):
    cluster = Cluster(about="test", memory="2G", time="10", **fields)
    ends = ["--mem=2G", "--time=10", "--signal=B:USR1@120"]
    assert cluster.sbatch_options() == ["--nodes=1", *options, *ends]


def test_what_a_step_asks_for():
    cluster = Cluster(
        about="test", memory="2G", time="10", nodes=2, gpus_per_node=4, cpus_per_node=32, gpu_option="gres"
    )
    env = {"SLURM_JOB_ID": "5", "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_CPUS_PER_NODE": "64,20(x2)"}
    asked = ["--job-name=me", "--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--cpus-per-task=5", "--gres=gpu:4"]
    assert step_options(cluster, "me", env) == asked
    # of salloc's shell, which is a step that others may overlap, and of a step that would never let go
    assert step_options(cluster, "me", env | {"SLURM_STEP_ID": "4294967290"}) == asked
    assert step_options(cluster, "me", env | {"SLURM_STEP_ID": "0"}) == [*asked, "--overlap"]
    with pytest.raises(UsageError, match="found 3 cores of a node for 4 tasks"):
        step_options(cluster, "me", env | {"SLURM_JOB_CPUS_PER_NODE": "3"})


# ---- the script


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "more", [(), ("--nodes", 3, "--account", "me"), ("--array", 4)], ids=["plain", "nodes", "array"]
)
def test_dry_run_is_a_script(path, more, model, prompts, tmp_path):
    arguments = round_of(model, prompts, tmp_path / "run", *more, "--dry-run", cluster=path)
    done = run(*arguments, "--", "--stop", "it's $HOME")
    assert done.returncode == 0, done.stderr
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) < 60 and lines[0] == "#!/usr/bin/env bash" and "set -euo pipefail" in lines
    assert "#SBATCH --requeue" in lines and "#SBATCH --signal=B:USR1@120" in lines
    settings = done.stdout.split("# ---- the job")[0] + '\necho "$RUN"; printf %s "$*"'
    shown = subprocess.run(["bash", "-c", settings], capture_output=True, text=True, check=True)
    assert shown.stdout.startswith(f"{tmp_path / 'run'}\n") and shown.stdout.endswith("--stop it's $HOME")
    assert not (tmp_path / "run").exists()


def test_script_ends_as_the_one_for_hands(model, prompts, tmp_path):
    for more, name in (
        ((), "generate.sh"),
        (("--nodes", 2), "generate-multi.sh"),
        (("--array", 2), "generate-array.sh"),
    ):
        made = run(*round_of(model, prompts, tmp_path / "run", *more, "--dry-run")).stdout
        mark = "# ---- the job\n"
        assert made.split(mark)[1] == (ROOT / "slurm" / name).read_text().split(mark)[1]


def without_model(prompts, folder, *arguments) -> tuple:
    place = ("--cluster", GENERIC, "--prompts", prompts, "--output-dir", folder, "--poll-s", "0.3")
    return (*place, *arguments)


@pytest.mark.parametrize("more", [(), ("--nodes", 2), ("--array", 2)], ids=["plain", "nodes", "array"])
def test_a_preset_takes_the_place_of_a_model(prompts, tmp_path, more):
    arguments = ("--preset", "tiny", "--random-weights", *more, "--dry-run", "--", "--n", "2")
    done = run(*without_model(prompts, tmp_path / "run", *arguments))
    assert done.returncode == 0, done.stderr
    assert "\nset -- --preset tiny --random-weights --n 2\n" in done.stdout
    # the job's own line, with a word for run_step's command
    line = done.stdout[done.stdout.rindex("run_step $PYTHON") :]
    settings = done.stdout.split("# ---- the job")[0] + "PART=part OUTPUT=out\nrun_step() { printf '%s\\n' \"$*\"; }\n"
    shown = subprocess.run(["bash", "-uc", settings + line], capture_output=True, text=True, check=True).stdout
    assert "--model" not in shown and shown.endswith("--mesh auto --preset tiny --random-weights --n 2\n")


def test_a_preset_with_its_model(model, prompts, tmp_path):
    arguments = round_of(model, prompts, tmp_path / "run", "--preset", "tiny", "--dry-run")
    done = run(*arguments)
    assert done.returncode == 2 and f"{model}: not what preset tiny expects: vocab_size: found 96, " in done.stderr
    done = run(*round_of(model, prompts, tmp_path / "run", "--random-weights", "--dry-run"))
    assert done.returncode == 0 and f"\nMODEL={model}\n" in done.stdout and "\nset -- --random-weights\n" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --model CKPT_DIR, or --preset NAME --random-weights"),
        (("--preset", "tiny"), "give --model CKPT_DIR, or --preset NAME --random-weights"),
        (("--preset", "falcon-4b", "--random-weights"), "unknown 'falcon-4b'; did you mean falcon-40b"),
        (("--preset", "tiny", "--", "--random-weights"), "give --model"),
    ],
)
def test_mistakes_about_presets_take_one_line(prompts, tmp_path, arguments, message):
    done = run(*without_model(prompts, tmp_path / "run", *arguments))
    lines = [line for line in done.stderr.splitlines() if not line.startswith((" ", "usage:"))]
    assert done.returncode == 2 and len(lines) == 1 and message in lines[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--model", "none"), "none: no checkpoint (manifest.json is missing)"),
        (("--prompts", "none.jsonl"), "none.jsonl: No such file or directory"),
        (("--prompts", "README.md"), "README.md: the name ends in '.md', legal is .jsonl"),
        (("--cluster", "none.yaml"), "none.yaml: No such file or directory"),
        (
            ("--cluster", "leonardo"),
            "unknown 'leonardo'; did you mean leonardo-booster? legal: generic, leonardo-booster, ",
        ),
        (("--time", "soon"), "generic.yaml: time: found 'soon', legal is"),
        (("--array", "0"), "--array: found 0, legal is 1 or more"),
        (("--", "--preset", "tiny"), "--preset after --: give it before, or leave it"),
        (("--", "--output", "x"), "--output after --: give it before, or leave it"),
        (("--follow", "none"), "none: submit.json is missing: no job was submitted"),
        (("--status", "none"), "none: submit.json is missing: no job was submitted"),
        (("--collect", "none"), "none: submit.json is missing: no job was submitted"),
        (("--inside",), "--inside: SLURM_JOB_ID is not set, so this is no allocation of Slurm's"),
        (("--inside", "--array", "2"), "--inside runs one step and waits: found --array beside it"),
        (("--show-cluster", "none"), "cluster: unknown 'none'; legal: generic, "),
        (("--collect", "none", "--follow", "none"), "--follow: not allowed with argument --collect"),
    ],
)
def test_mistakes_take_one_line(model, prompts, tmp_path, capsys, monkeypatch, change, message):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    try:
        status = main([*map(str, round_of(model, prompts, tmp_path / "run", *change))])
    except SystemExit as ended:
        status = ended.code
    out, err = capsys.readouterr()
    assert status == 2 and not out
    lines = [line for line in err.splitlines() if not line.startswith((" ", "usage:"))]
    assert len(lines) == 1 and message in lines[0]


def test_works_without_jax():
    program = "import sys, slurm.submit, slurm.shards, jaxinfer.plot; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_unfinished_shards(tmp_path):
    prompts = tmp_path / "in.jsonl"
    ids = "abcdefgh"
    lines = [f'{{"id": "{name}", "prompt_token_ids": [3], "n": 2}}\n' for name in ids]
    prompts.write_text("".join(lines[:5]) + "not a prompt\n" + "".join(lines[6:]))
    parts = [tmp_path / f"{shard}.jsonl" for shard in range(4)]
    both = [[f'{{"id": "{name}", "index": {index}}}\n' for index in (0, 1)] for name in ids]
    parts[0].write_text("".join([*both[0], *both[4]]))
    parts[1].write_text("".join([*both[1], '{"id": "6", "line": 6, "error": "no JSON"}\n']))
    parts[2].write_text("".join([*both[2], both[6][0], both[6][1][:9]]))  # killed while it wrote
    assert unfinished(prompts, parts) == [2, 3]
    parts[2].write_text("".join([*both[2], *both[6]]))
    parts[3].write_text("".join([*both[3], '{"id": "h", "line": 8, "error": "too long"}\n']))
    assert unfinished(prompts, parts) == []
    parts[0].write_text("surely not\n")
    with pytest.raises(ShardError, match=r"0\.jsonl, line 1: not a result"):
        unfinished(prompts, parts)


# ---- whole rounds


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    with start_bed(f"submit-{os.getpid()}", "--nodes", "2", "--accounting") as bed:
        bed.env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # what one job compiled the next need not
        yield bed


@pytest.fixture
def submit(bed, model, prompts):
    def submit(folder, *arguments, status=0) -> str:
        done = bed.run(command(*round_of(model, prompts, folder, *CPU, *arguments)), cwd=ROOT, timeout=90)
        assert done.returncode == status, done.stderr
        return done.stderr

    yield submit
    bed.clear()


def ids(path: Path) -> list[int]:
    return sorted(int(json.loads(line)["id"]) for line in path.read_text().splitlines())


@pytest.mark.slurm
@pytest.mark.slow
def test_whole_round(bed, submit, tmp_path):
    said = submit(tmp_path / "run", "--", "--max-new-tokens", "10")
    assert re.search(r"job \d+ submitted", said) and "RUNNING on node1" in said and "is complete: " in said
    names = {path.name for path in (tmp_path / "run").iterdir()}
    files = "job.sh job.log logs submit.json sacct.json out.jsonl out.metrics.json out.run.json out.png"
    assert names == set(files.split())
    assert {path.name for path in (tmp_path / "run" / "logs").glob("rank-*")} == {"rank-0-node1.log"}
    assert ids(tmp_path / "run" / "out.jsonl") == list(range(1, 9))
    job = json.loads((tmp_path / "run" / "submit.json").read_text())["job"]
    accounted = json.loads((tmp_path / "run" / "sacct.json").read_text())
    records = accounted["records"]
    assert [record["id"] for record in records] == [job, f"{job}.batch", f"{job}.0"]
    assert all(record["state"] == "COMPLETED" and record["elapsed_s"] > 0 for record in records)
    assert all(record["nodes"] == ["node1"] and record["energy_j"] is None for record in records)
    assert records[2]["cpu_s"] > 1 and records[0]["cpu_s"] >= records[2]["cpu_s"]
    assert (records[2]["max_rss_bytes"] or 1 << 27) > 1 << 26, "where Slurm looked before the step ended"
    figures = {name: records[0][name] for name in ("elapsed_s", "cpu_s", "allocated_cpu_s", "energy_j")}
    assert accounted.items() >= {"job": job, "state": "COMPLETED", **figures}.items()
    assert (tmp_path / "run" / "out.png").read_bytes().startswith(b"\x89PNG")
    # the same command once more: nothing is left to do
    assert "is complete" in submit(tmp_path / "run", "--", "--max-new-tokens", "10")
    assert ids(tmp_path / "run" / "out.jsonl") == list(range(1, 9))


@pytest.mark.slurm
@pytest.mark.slow
def test_whole_round_of_a_preset(bed, prompts, tmp_path):
    arguments = ("--preset", "tiny", "--random-weights", *CPU, "--", "--max-new-tokens", "10")
    done = bed.run(command(*without_model(prompts, tmp_path / "run", *arguments)), cwd=ROOT, timeout=90)
    assert done.returncode == 0, done.stderr
    assert ids(tmp_path / "run" / "out.jsonl") == list(range(1, 9))
    bed.clear()


def ask(bed, *arguments, status=0) -> dict:
    """The line of JSON that the command prints."""
    done = bed.run(command(*arguments), cwd=ROOT)
    assert done.returncode == status and done.stdout.count("\n") == 1, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slurm
@pytest.mark.slow
def test_array_submitted_watched_and_collected_in_steps(bed, model, prompts, tmp_path):
    folder = tmp_path / "a run"
    known = ask(bed, *round_of(model, prompts, folder, *CPU, "--array", "2", "--no-follow"))
    assert known == {"job": known["job"], "run": str(folder)}
    assert not (folder / "sacct.json").exists()
    done = bed.run(command("--collect", folder), cwd=ROOT)
    assert done.returncode == 2 and f"job {known['job']} is " in done.stderr and "nothing to collect yet" in done.stderr
    found = ask(bed, "--status", folder)
    assert found["state"] in ("PENDING", "RUNNING", "CONFIGURING") and found["ended"] is False, found
    assert found["job"] == known["job"] and found["expected"] == 8
    while not (found := ask(bed, "--status", folder))["ended"]:
        pass
    assert found["state"] == "COMPLETED" and found["results"] == 8
    done = bed.run(command("--collect", folder), cwd=ROOT)
    assert done.returncode == 0 and "is complete" in done.stderr and not done.stdout, done.stderr
    assert [json.loads(line)["id"] for line in open(folder / "out.jsonl")] == [str(i) for i in range(1, 9)]
    assert ids(folder / "parts" / "0.jsonl") == [1, 3, 5, 7]
    assert (folder / "out.png").exists()
    accounted = json.loads((folder / "sacct.json").read_text())
    assert len([record for record in accounted["records"] if re.fullmatch(r"\d+_[01]", record["id"])]) == 2
    assert accounted["job"] == known["job"] and accounted["cpu_s"] > 2
    bed.clear()


@pytest.mark.slurm
def test_failure_shows_the_log(bed, submit, tmp_path):
    said = submit(tmp_path / "run", "--", "--max-context", "1", status=1)
    shown = said.split("last lines of ")
    assert shown[1].startswith(f"{tmp_path}/run/job.log") and shown[2].startswith(f"{tmp_path}/run/logs/rank-0-node1")
    assert "max_context" in shown[2] and "CANCELLED" not in shown[2]
    assert "ended: FAILED" in said.splitlines()[-1] and str(tmp_path / "run" / "logs") in said.splitlines()[-1]


@pytest.mark.slurm
@pytest.mark.slow
def test_failed_array_shows_the_shard_that_failed(bed, submit, model, prompts, tmp_path):
    spoilt, folder = tmp_path / "spoilt.jsonl", tmp_path / "run"
    spoilt.write_text(prompts.read_text().replace("[4]}", "[4], "))  # line 2, of shard 1
    arguments = round_of(model, spoilt, folder, *CPU, "--array", "2", "--", "--strict", "--max-new-tokens", "3")
    done = bed.run(command(*arguments), cwd=ROOT, timeout=90)
    said, job = done.stderr, json.loads((folder / "submit.json").read_text())["job"]
    assert done.returncode == 1 and f"job {job}, task 1 ended: FAILED" in said
    (log,) = (folder / "logs" / "1").glob("rank-0-*.log")
    assert re.findall(r"---- last lines of (\S+)", said) == [str(folder / "job-1.log"), str(log)]
    assert "error: line 2 (id '2')" in said and "task 0 ended" not in said
    assert said.splitlines()[-1].startswith(
        f"job {job} ended: FAILED (1 COMPLETED, 1 FAILED); results of shard 1 are missing; the same command continues; "
    )
    assert "out.png shows the results of 1 of 2 shards" in said
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG") and ids(folder / "parts" / "0.jsonl") == [
        1,
        3,
        5,
        7,
    ]


@pytest.mark.slurm
def test_refusal_of_sbatch_is_shown_as_it_is(bed, submit, tmp_path):
    said = submit(tmp_path / "run", "--partition", "nowhere", status=1)
    assert said == (
        "sbatch: error: invalid partition specified: nowhere\n"
        "sbatch: error: Batch job submission failed: Invalid partition name specified\n"
    )


@pytest.mark.slurm
@pytest.mark.slow
def test_leaves_the_job_and_comes_back(bed, submit, model, prompts, tmp_path):
    folder = tmp_path / "run"
    long = ("--", "--max-new-tokens", "120", "--ignore-eos", "--max-batch", "1", "--decode-steps", "1")
    client = bed.start(command(*round_of(model, prompts, folder, *CPU, *long)), cwd=ROOT)
    until(lambda: (folder / "logs" / "started").exists(), 30, lambda: "no start")
    client.send_signal(signal.SIGINT)
    _, said = client.communicate(timeout=10)
    bed.clients.remove(client)
    job = json.loads((folder / "submit.json").read_text())["job"]
    assert client.returncode == 130
    assert f"job {job} goes on. Follow it: python -m slurm.submit --follow {folder}   end it: scancel {job}" in said
    # as if it had been killed before it had noted the job
    told = json.loads((folder / "submit.json").read_text())
    (folder / "submit.json").write_text(json.dumps(told | {"job": None}))
    assert f"job {job} is RUNNING" in submit(folder, status=2)
    assert ask(bed, "--status", folder)["job"] == job
    done = bed.run(command("--follow", folder, "--poll-s", "0.3"), cwd=ROOT, timeout=60)
    assert done.returncode == 0 and f"job {job} is complete" in done.stderr
    assert ids(folder / "out.jsonl") == list(range(1, 9))


@pytest.mark.slurm
@pytest.mark.long
def test_steps_of_an_allocation(bed, model, prompts, tmp_path):
    folder, bad = tmp_path / "it's 5%j", tmp_path / "bad"
    good = command(*round_of(model, prompts, folder, *CPU, "--nodes", 2, "--inside", "--", "--max-new-tokens", 4))
    fails = command(*round_of(model, prompts, bad, *CPU, "--inside", "--", "--max-context", 1))
    large = command(*round_of(model, prompts, tmp_path / "large", *CPU, "--nodes", 3, "--inside"))
    lines = [*(f"{shlex.join(each)}; echo status $?" for each in (good, fails, large)), 'echo "job $SLURM_JOB_ID"']
    # GPUs that the steps do not ask for
    wishes = ("-N2", "--ntasks-per-node=1", "--cpus-per-task=2", "--gpus-per-node=1")
    done = bed.run(["salloc", *wishes, "bash", "-c", "\n".join(lines)], cwd=ROOT, timeout=120)
    assert re.findall(r"status (\d+)", done.stdout) == ["0", "2", "2"], done.stderr
    job = re.search(r"job (\d+)", done.stdout)[1]
    assert ids(folder / "out.jsonl") == list(range(1, 9)) and (folder / "out.png").exists()
    assert {path.name for path in (folder / "logs").glob("rank-*")} == {"rank-0-node1.log", "rank-1-node2.log"}
    assert (folder / "job.log").read_text() == ""
    accounted = json.loads((folder / "sacct.json").read_text())
    (step,) = accounted["records"]
    assert step["id"] == f"{job}.0" and step["nodes"] == ["node1", "node2"] and "gpu" not in step["tres"]
    assert accounted["state"] == "COMPLETED" and accounted["cpu_s"] == step["cpu_s"] > 2
    assert "max_context" in done.stderr.split("last lines of ")[2] and "ended: FAILED (exit status 2)" in done.stderr
    assert f"error: --nodes: found 3, legal is 1 to 2, which job {job} has" in done.stderr
    assert ask(bed, "--status", folder).items() >= {"job": job, "state": "COMPLETED", "ended": True}.items()


@pytest.mark.slurm
def test_without_accounting_is_a_warning(slurm_bed, model, prompts, tmp_path):
    done = slurm_bed.run(
        command(*round_of(model, prompts, tmp_path / "run", *CPU, "--", "--max-context", "1")), cwd=ROOT, timeout=60
    )
    assert done.returncode == 1 and "ended: FAILED" in done.stderr
    assert "WARNING: no accounting: Slurm accounting storage is disabled" in done.stderr
