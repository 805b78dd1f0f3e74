"""The doctor across ranks: what must be equal and is not, who is missing, and how equal lines are shown."""

import pytest

from doctoring import gpu, levels
from jaxinfer.doctor import compare
from jaxinfer.doctor.finding import Report, error, ok
from jaxinfer.doctor.show import merge

pytestmark = pytest.mark.slow


def reports(*facts: dict, hosts: str = "abcd") -> list[Report]:
    return [Report(rank, hosts[rank], each) for rank, each in enumerate(facts)]


def test_versions_name_the_rank_and_both_values():
    right, wrong = {"versions": {"jax": "0.10.2"}}, {"versions": {"jax": "0.10.1", "jax-cuda12-plugin": "0.10.1"}}
    lines = compare.versions(reports(right, right, wrong))
    assert levels(lines) == ["error", "error"]
    assert lines[0].text == "jax: rank 2 on c has '0.10.1', the others '0.10.2'"
    assert lines[1].text == "jax-cuda12-plugin: rank 2 on c has '0.10.1', the others none"
    assert [line.level for line in compare.versions(reports(right, right))] == ["ok"]


def test_flags():
    lines = compare.flags(
        reports({"flags": {"XLA_FLAGS": "--a", "NCCL_DEBUG": "INFO"}}, {"flags": {"XLA_FLAGS": "--b"}})
    )
    assert {(line.level, line.text) for line in lines} == {
        ("warning", "NCCL_DEBUG: rank 1 on b has none, the others 'INFO'"),
        ("error", "XLA_FLAGS: rank 1 on b has '--b', the others '--a'"),
    }


@pytest.mark.parametrize("seconds, level", [(0.2, "ok"), (-3.0, "warning"), (31.0, "error")])
def test_clocks(seconds, level):
    (line,) = compare.clocks(reports({"clock_s": 0.0}, {"clock_s": seconds}))
    assert line.level == level and (level == "ok" or f"rank 1 on b by {abs(seconds)} s" in line.text)


def test_manifests():
    lines = compare.manifests(reports({"manifest": "x"}, {"manifest": "x"}, {"manifest": "y"}))
    assert lines[0].level == "error" and "rank 2 on c" in lines[0].text
    assert compare.manifests(reports({"manifest": "x"}, {"manifest": "x"}))[0].level == "ok"
    assert compare.manifests(reports({}, {})) == []
    # a rank that could not read it has said so itself
    assert compare.manifests(reports({"manifest": "x"}, {"manifest": None})) == []


def test_own_name_that_leads_to_itself():
    good, bad = {"own_addresses": ["10.0.0.1"]}, {"own_addresses": ["127.0.1.1"]}
    (line,) = compare.own_names(reports(good, bad))
    assert line.level == "error" and "b is 127.0.1.1 there" in line.text and "/etc/hosts" in line.fix
    assert compare.own_names(reports(good, good))[0].level == "ok"
    assert compare.own_names(reports(bad, bad, hosts="aa")) == []  # one node may


def test_gpus_taken_twice_or_not_at_all():
    both = compare.shared_gpus(reports({"gpus": [gpu()]}, {"gpus": [gpu()]}, hosts="aa"))
    assert both[0].level == "error" and "GPU GPU-0 of a: rank 0 and rank 1" in both[0].text
    assert compare.shared_gpus(reports({"gpus": [gpu()]}, {"gpus": [gpu()]})) == []
    idle = compare.shared_gpus(reports({"gpus": [gpu()], "gpus_on_node": 4}))
    assert idle[0].level == "warning" and "gave 4 GPUs, the ranks there use 1" in idle[0].text


def test_gpus_of_different_kinds():
    (line,) = compare.kinds(reports({"gpus": [gpu()]}, {"gpus": [gpu()]}, {"gpus": []}))
    assert line.level == "warning" and "rank 2 on c has no GPU, the others 1 NVIDIA H200" in line.text


def test_missing_ranks_are_named_with_their_hosts():
    (line,) = compare.missing_ranks({2: "did not come in 5 s", 1: "x"}, ["a", "b", ""], "a:77")
    assert line.level == "error" and line.text == "rank 1 on b x; rank 2 on an unknown host did not come in 5 s"


def test_equal_findings_are_one_line_and_the_worst_come_last():
    ranks = reports({}, {}, {})
    for rank in ranks:
        rank.add([ok("disk", f"{rank.rank} GB/s"), ok("host", "same")])
    ranks[1].add([error("gpu", "broken", "replace it")])
    lines = merge(ranks, [ok("clock", "fine")])
    assert [(line.finding.level, line.finding.name, line.ranks) for line in lines] == [
        ("ok", "disk", (0, 1, 2)),
        ("ok", "host", (0, 1, 2)),
        ("ok", "clock", ()),
        ("error", "gpu", (1,)),
    ]
