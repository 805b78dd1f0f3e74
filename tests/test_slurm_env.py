"""What a task reads from its environment: environments that Slurm 22.05 gave to tasks, in data/slurm_envs."""

import json
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.cluster.launch import find_launch, missed_srun, slurm_place
from jaxinfer.cluster.slurm import ClusterError, Step, expand_counts, expand_hosts, read_step
from jaxinfer.cluster.visible import visible_devices

CAPTURES = {
    file.stem: json.loads(file.read_text())["processes"]
    for file in sorted((Path(__file__).parent / "data" / "slurm_envs").glob("*.json"))
}
NO_STEP = {"batch-script", "salloc-shell", "batch-from-a-step"}
NO_SHARES = {"tasks-share-a-gpu", "unequal-gpus-per-node"}  # more tasks than GPUs on a node
STEPS = sorted(CAPTURES.keys() - NO_STEP - NO_SHARES)


def read(name: str) -> dict[str, list[tuple[dict, Step]]]:
    """The captured processes of each step of a command, with what is read from their environment."""
    steps = defaultdict(list)
    for process in CAPTURES[name]:
        step = read_step(process["env"])
        assert step is not None
        steps[step.run].append((process, step))
    return steps


def gpus_of(process: dict, step: Step) -> list[str] | None:
    """The node's own numbers of a task's GPUs."""
    if step.gpus is None:
        return None
    env = process["env"]
    # --gpu-bind=none sets nothing: all are there
    on_node = [str(index) for index in range(int(env["SLURM_GPUS_ON_NODE"]))]
    visible = env["CUDA_VISIBLE_DEVICES"].split(",") if "CUDA_VISIBLE_DEVICES" in env else on_node
    return [visible[index] for index in step.gpus]


def test_captures_are_there():
    assert len(STEPS) > 30


@pytest.mark.parametrize("name", STEPS)
def test_every_task_of_a_step_has_its_place(name):
    for tasks in read(name).values():
        for process, step in tasks:
            assert step.hosts[step.node] == process["host"]
            assert step.num_processes == len(tasks) == int(process["env"]["SLURM_STEP_NUM_TASKS"])
            assert step.task == int(process["env"]["SLURM_PROCID"])
        steps = [step for _, step in tasks]
        assert {(step.hosts, step.tasks, step.job, step.ports) for step in steps} == {
            (steps[0].hosts, steps[0].tasks, steps[0].job, steps[0].ports)
        }
        in_order = sorted(steps, key=lambda step: step.process_id)
        assert [step.process_id for step in in_order] == list(range(len(tasks)))
        # node by node: a node's processes follow each other
        assert [(step.node, step.local) for step in in_order] == [
            (node, local) for node, count in enumerate(steps[0].tasks) for local in range(count)
        ]


@pytest.mark.parametrize("name", STEPS)
def test_gpus_of_a_node_are_shared_out_once(name):
    for tasks in read(name).values():
        nodes = defaultdict(list)
        for process, step in tasks:
            nodes[process["host"]].append((gpus_of(process, step), process["env"].get("SLURM_GPUS_ON_NODE")))
        for given_gpus in nodes.values():
            if given_gpus[0][1] is None:
                assert all(gpus is None for gpus, _ in given_gpus)
                continue
            own = [gpu for gpus, _ in given_gpus for gpu in gpus]
            assert len(own) == len(set(own)) == int(given_gpus[0][1])


@pytest.mark.parametrize("name", sorted(NO_STEP))
def test_no_step_outside_of_srun(name):
    assert [read_step(process["env"]) for process in CAPTURES[name]] == [None]


@pytest.mark.parametrize("name", sorted(NO_SHARES))
def test_gpus_that_do_not_divide_are_refused(name):
    env = CAPTURES[name][0]["env"]
    with pytest.raises(ClusterError, match=r"a01: . visible GPUs do not divide among . tasks; legal is"):
        read_step(env)


def test_process_ids_follow_nodes_where_task_ids_do_not():
    def ids(name):
        return [(step.task, step.process_id) for tasks in read(name).values() for _, step in tasks]

    assert ids("gpus-per-node") == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert ids("cyclic") == [(0, 0), (1, 2), (2, 1), (3, 3)]
    # hosts b2 a01 b2 a01 a7; Slurm lists a7 first
    assert ids("arbitrary") == [(0, 3), (1, 1), (2, 4), (3, 2), (4, 0)]


def test_gpus_are_indices_into_what_the_task_sees():
    def gpus(name):
        return [step.gpus for tasks in read(name).values() for _, step in tasks]

    assert gpus("gpus-per-task") == [(0,)] * 4
    assert gpus("bind-map") == [(0,)] * 4
    assert gpus("gpus-per-node") == gpus("bind-none") == [(0,), (1,), (0,), (1,)]
    assert gpus("task-per-node") == [(0, 1)] * 5
    assert gpus("no-gpus") == [None] * 4


def test_gpus_of_the_machine_count_where_slurm_says_nothing():
    env = CAPTURES["no-gpus"][1]["env"]
    assert read_step(env).gpus is None
    assert read_step(env, gpus_present=4).gpus == (2, 3)
    assert read_step({**env, "CUDA_VISIBLE_DEVICES": ""}, gpus_present=4).gpus is None


@pytest.mark.parametrize(
    ("listed", "names"),
    [
        ("0,1", ["0", "1"]),
        (" 3, 1 ,07", ["3", "1", "7"]),
        ("0,-1,1", ["0"]),
        ("0,1,", ["0", "1"]),
        ("0,,1", ["0"]),
        ("1gpu2,2", ["1", "2"]),
        ("GPU-8932f937,GPU-1b", ["GPU-8932f937", "GPU-1b"]),
        ("GPU-8932f937,1", ["GPU-8932f937"]),
        ("1,GPU-8932f937", ["1"]),
        ("MIG-5a/1/0", ["MIG-5a/1/0"]),
        ("0,0", []),
        *((none, []) for none in ("", " ", "-1", "-1,0", "none", "void", "NoDevFiles", "all", "gpu0", "\u00b2", ",0")),
    ],
)
def test_cuda_visible_devices_as_cuda_reads_it(listed, names):
    assert visible_devices({"CUDA_VISIBLE_DEVICES": listed}) == names
    alone = {**CAPTURES["one-task"][0]["env"], "CUDA_VISIBLE_DEVICES": listed}
    assert read_step(alone, gpus_present=4).gpus == (tuple(range(len(names))) or None)
    two = {**CAPTURES["gpus-per-node"][1]["env"], "CUDA_VISIBLE_DEVICES": listed}
    if len(names) < 2:  # fewer than Slurm gave to the node: they are this task's alone
        assert read_step(two).gpus == (tuple(range(len(names))) or None)


def test_no_cuda_visible_devices():
    assert visible_devices({}) is None


def test_host_names_of_several_widths():
    hosts = ("a01", "a02", "a03", "a7", "b2")
    assert [step.hosts for tasks in read("task-per-node").values() for _, step in tasks] == [hosts] * 5


def test_steps_of_one_job_have_ports_of_their_own():
    steps = [tasks[0][1] for tasks in read("batch-steps-at-once").values()]
    assert len({step.job for step in steps}) == 1
    assert len({step.ports[0] for step in steps}) == len(steps) == 3
    assert all(1024 < port < 65536 for step in steps for port in step.ports)


def test_jobs_that_have_a_port_in_common_differ_in_the_next():
    env = CAPTURES["no-gpus"][0]["env"]
    jobs = [read_step({**env, "SLURM_JOB_ID": str(7 + number)}).ports for number in range(256)]
    assert jobs[0][0] == jobs[64][0] and not set(jobs[0][1:]) & set(jobs[64])
    # all at once on one node, each with the first of its ports that is left
    taken = set()
    for ports in jobs:
        taken.add(next(port for port in ports if port not in taken))
    assert len(taken) == 256


def test_a_requeued_job_is_another_run():
    runs = read("requeued")
    job = next(iter(runs.values()))[0][1].job
    assert list(runs) == [f"{job}.0.0", f"{job}.0.1"]


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_NODEID": "2"},
        {"SLURM_LOCALID": "2"},
        {"SLURM_PROCID": "4"},
        {"SLURM_STEP_TASKS_PER_NODE": "2"},
        {"SLURM_STEP_TASKS_PER_NODE": "0(x2)"},
    ],
    ids=str,
)
def test_variables_that_contradict_are_refused(change):
    env = CAPTURES["gpus-per-node"][0]["env"]
    with pytest.raises(ClusterError, match=next(iter(change))):
        read_step({**env, **change})


@pytest.mark.parametrize("value", [None, ""], ids=["unset", "empty"])
@pytest.mark.parametrize(
    "name", ["STEP_NODELIST", "STEP_TASKS_PER_NODE", "NODEID", "LOCALID", "PROCID", "JOB_ID"], ids=lambda name: name
)
def test_a_variable_that_is_missing_is_named(name, value):
    env = {**CAPTURES["gpus-per-node"][1]["env"], f"SLURM_{name}": value}
    rank = "?" if name == "PROCID" else "1"
    if value is None:
        del env[f"SLURM_{name}"]
    elif name == "PROCID":
        rank = ""
    with pytest.raises(ClusterError) as raised:
        read_step(env)
    text = str(raised.value)
    assert text.startswith(f"SLURM_{name} is not set for rank {rank} on a01; srun sets it"), text
    assert "--coordinator HOST:PORT" in text and "\n" not in text


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("STEP_NODELIST", "n[a-b]", "host list: found [a-b], legal are numbers and ranges such as [01-03,7]"),
        ("STEP_NODELIST", "n[\u00b2]", "host list: found [\u00b2], legal are numbers"),
        ("STEP_TASKS_PER_NODE", "two", "tasks per node: found 'two', legal is a list such as 2(x3),1"),
        ("NODEID", "-1", "found '-1', legal is a whole number"),
        ("LOCALID", "0x1", "found '0x1', legal is a whole number"),
        ("PROCID", "one", "found 'one', legal is a whole number"),
        ("JOB_ID", "17_2", "found '17_2', legal is a whole number"),
        ("STEP_ID", "first", "found 'first', legal is a whole number"),
        ("RESTART_COUNT", "\u00b2", "found '\u00b2', legal is a whole number"),
        ("GPUS_ON_NODE", "gpu:2", "found 'gpu:2', legal is a whole number"),
    ],
)
def test_a_variable_that_is_odd_is_named(name, value, problem):
    env = {**CAPTURES["gpus-per-node"][1]["env"], f"SLURM_{name}": value}
    env.pop("SLURMD_NODENAME")
    with pytest.raises(ClusterError) as raised:
        read_step(env)
    rank = value if name == "PROCID" else "1"
    text = str(raised.value)
    assert text.startswith(f"SLURM_{name}={value} of rank {rank}: {problem}"), text
    assert "; srun sets it" in text and "--coordinator HOST:PORT" in text and "\n" not in text


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_RESTART_COUNT": ""},
        {"SLURM_STEP_ID": ""},
        {"SLURM_GPUS_ON_NODE": ""},
        {"SLURM_JOB_NUM_NODES": None, "SLURM_NNODES": None, "SLURM_NTASKS": None, "SLURM_JOB_NODELIST": None},
        {"SLURMD_NODENAME": None, "SLURM_TASKS_PER_NODE": None, "SLURM_STEP_NUM_TASKS": None},
    ],
    ids=str,
)
def test_what_nothing_follows_from_may_be_missing(change):
    given = CAPTURES["gpus-per-node"][1]["env"]
    env = {name: value for name, value in {**given, **change}.items() if value is not None}
    assert read_step(env) == read_step(given)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("batch", 4294967291),
        ("extern", 4294967292),
        ("interactive", 4294967290),
        ("4294967294", 4294967294),
        ("4294967290", 4294967290),
        ("70000", 70000),
    ],
)
def test_steps_that_slurm_names_itself(text, number):
    step = read_step({**CAPTURES["gpus-per-node"][1]["env"], "SLURM_STEP_ID": text})
    assert step.step == number and all(1024 < port < 65536 for port in step.ports)


def test_a_step_of_another_job_left_in_a_batch_script_is_none():
    # sbatch on a01, in a shell that srun had started there, of a job on a02 and b2
    (process,) = CAPTURES["batch-from-a-step"]
    assert process["env"]["SLURM_STEP_NODELIST"] == "a01" and process["host"] == "a02"
    assert find_launch(process["env"]) is None
    assert "this job has 4 tasks, but without srun" in missed_srun(process["env"], None)


def test_where_a_run_is_in_words():
    (process,) = CAPTURES["batch-from-a-step"]
    job = process["env"]["SLURM_JOB_ID"]
    assert slurm_place(process["env"], None) == {"job": job, "step": None, "nodes": ["a02"]}
    env = CAPTURES["gpus-per-node"][1]["env"]
    launch = find_launch(env)
    found = slurm_place(env, launch)
    assert found == {
        "job": env["SLURM_JOB_ID"],
        "step": env["SLURM_STEP_ID"],
        "nodes": list(dict.fromkeys(launch.hosts)),
    }
    assert slurm_place({}, None) is None and slurm_place({}, find_launch({}, "localhost:5000", 1, 0)) is None


@pytest.mark.parametrize(
    ("name", "warning"),
    [
        ("one-task", None),
        ("batch-step", None),
        ("het-one-step", None),
        ("batch-script", "this job has 4 tasks, but without srun in front of the command one process runs alone"),
        ("salloc-shell", "this job has 4 tasks, but without srun"),
        ("salloc-interactive-step", "this job has 4 tasks, but without srun"),
        ("salloc-step-in-interactive-step", None),
        ("batch-step-one-of-two-tasks", "this step has one task, its job 2: the others idle"),
        ("batch-step-one-exact", "this step has one task, its job 4: the others idle"),
        ("batch-step-one-overlap", "this step has one task, its job 4: the others idle"),
    ],
)
def test_a_process_alone_in_a_job_of_several_tasks_is_warned(name, warning):
    env = CAPTURES[name][0]["env"]
    said = missed_srun(env, find_launch(env))
    assert (said is None) if warning is None else said.startswith(warning)
    assert missed_srun(env, find_launch({}, "localhost:5000", 1, 0)) is None  # the options say what is meant


@pytest.mark.slurm
def test_only_slurm_knows_the_tasks_of_a_job_on_one_node(slurm_bed):
    code = "import os; from jaxinfer.cluster.launch import *; print(missed_srun(os.environ, find_launch(os.environ)))"
    program = ["srun", "-n1", sys.executable, "-c", code]
    done = slurm_bed.run(["salloc", "--quiet", "-N1", "-n2", *program])
    assert "this step has one task, its job 2: the others idle" in done.stdout, done.stderr
    assert slurm_bed.run(["salloc", "--quiet", "-N1", "-n1", *program]).stdout == "None\n"


@pytest.mark.parametrize(
    "text, hosts",
    [
        ("node1", ["node1"]),
        ("a[01-03,7],b2", ["a01", "a02", "a03", "a7", "b2"]),
        ("a[7,01],b2", ["a7", "a01", "b2"]),
        ("n[099-101]", ["n099", "n100", "n101"]),
        ("rack[1-2]n[08-09]", ["rack1n08", "rack1n09", "rack2n08", "rack2n09"]),
        ("n[1-02],n1", ["n1", "n2", "n1"]),
        ("gpu-[1-2]-ib.example.org,login", ["gpu-1-ib.example.org", "gpu-2-ib.example.org", "login"]),
    ],
)
def test_host_list(text, hosts):
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize("text", ["", "a[1-2", "a1,,a2", "a[x-2]", "a[a-b]", "a[]", "a[1-]", "a]1[", "a[3-1]"])
def test_no_host_list(text):
    with pytest.raises(ClusterError, match="host list: found"):
        expand_hosts(text)


@st.composite
def host_lists(draw) -> tuple[str, list[str]]:
    parts, hosts = [], []
    name = st.from_regex(r"[a-z][a-z-]{0,5}", fullmatch=True)
    for _ in range(draw(st.integers(1, 4))):
        prefix, suffix = draw(name), draw(st.sampled_from(["", "-ib", ".cluster"]))
        if draw(st.booleans()):
            parts.append(f"{prefix}{suffix}")
            hosts.append(f"{prefix}{suffix}")
            continue
        ranges = []
        for _ in range(draw(st.integers(1, 3))):
            low, count, width = draw(st.integers(0, 999)), draw(st.integers(1, 20)), draw(st.integers(1, 4))
            numbers = [f"{number:0{width}d}" for number in range(low, low + count)]
            ranges.append(numbers[0] if count == 1 else f"{numbers[0]}-{numbers[-1]}")
            hosts += [f"{prefix}{number}{suffix}" for number in numbers]
        parts.append(f"{prefix}[{','.join(ranges)}]{suffix}")
    return ",".join(parts), hosts


@given(host_lists())
def test_host_lists_come_back(drawn):
    text, hosts = drawn
    assert expand_hosts(text) == hosts


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 9)), min_size=1))
def test_counts_come_back(runs):
    text = ",".join(f"{count}(x{times})" if times > 1 else str(count) for count, times in runs)
    assert expand_counts(text) == [count for count, times in runs for _ in range(times)]


@pytest.mark.parametrize("text", ["", "2(x)", "x3", "2(3)", "2,,1", "-1"])
def test_no_counts(text):
    with pytest.raises(ClusterError, match="tasks per node: found"):
        expand_counts(text)
