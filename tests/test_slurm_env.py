"""What a task reads from its environment: environments that Slurm 22.05 gave to tasks, in data/slurm_envs."""

import json
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.cluster.slurm import ClusterError, Step, expand_counts, expand_hosts, read_step

CAPTURES = {
    file.stem: json.loads(file.read_text())["processes"]
    for file in sorted((Path(__file__).parent / "data" / "slurm_envs").glob("*.json"))
}
NO_STEP = {"batch-script", "salloc-shell"}
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
        assert {(step.hosts, step.tasks, step.job, step.port) for step in steps} == {
            (steps[0].hosts, steps[0].tasks, steps[0].job, steps[0].port)
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


def test_host_names_of_several_widths():
    hosts = ("a01", "a02", "a03", "a7", "b2")
    assert [step.hosts for tasks in read("task-per-node").values() for _, step in tasks] == [hosts] * 5


def test_steps_of_one_job_have_ports_of_their_own():
    steps = [tasks[0][1] for tasks in read("batch-steps-at-once").values()]
    assert len({step.job for step in steps}) == 1
    assert len({step.port for step in steps}) == len(steps) == 3
    assert all(1024 < step.port < 65536 for step in steps)


def test_a_requeued_job_is_another_run():
    runs = read("requeued")
    job = next(iter(runs.values()))[0][1].job
    assert list(runs) == [f"{job}.0.0", f"{job}.0.1"]


@pytest.mark.parametrize(
    "change", [{"SLURM_NODEID": "2"}, {"SLURM_LOCALID": "2"}, {"SLURM_STEP_TASKS_PER_NODE": "2"}], ids=str
)
def test_variables_that_contradict_are_refused(change):
    env = CAPTURES["gpus-per-node"][0]["env"]
    with pytest.raises(ClusterError, match=next(iter(change))):
        read_step({**env, **change})


@pytest.mark.parametrize(
    "text, hosts",
    [
        ("node1", ["node1"]),
        ("a[01-03,7],b2", ["a01", "a02", "a03", "a7", "b2"]),
        ("a[7,01],b2", ["a7", "a01", "b2"]),
        ("n[099-101]", ["n099", "n100", "n101"]),
        ("rack[1-2]n[08-09]", ["rack1n08", "rack1n09", "rack2n08", "rack2n09"]),
        ("gpu-[1-2]-ib.example.org,login", ["gpu-1-ib.example.org", "gpu-2-ib.example.org", "login"]),
    ],
)
def test_host_list(text, hosts):
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize("text", ["", "a[1-2", "a1,,a2", "a[x-2]", "a[]", "a[1-]", "a]1[", "a[3-1]"])
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
