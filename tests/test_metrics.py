"""Figures of a run: what they count, from updates whose times are known."""

import re
import subprocess
import time

import pytest

from jaxinfer.engine.request import Output, Stats, Update
from jaxinfer.telemetry.manifest import describe_run, git_commit
from jaxinfer.telemetry.metrics import RunMetrics, percentiles, rows
from jaxinfer.telemetry.peaks import memory_bandwidth
from jaxinfer.telemetry.software import cuda_text, gpu_versions, nccl_text


def output(name: str, index: int, tokens: int, ttft: float, latency: float, limit="max_new_tokens") -> Output:
    return Output(name, index, "", list(range(tokens)), "length" if limit else "stop", limit, 10, tokens, ttft, latency)


def stats(**counts) -> dict:
    return vars(Stats()) | counts


def test_percentiles():
    values = percentiles([i / 100 for i in range(101)])
    assert values == pytest.approx({"mean": 0.5, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0})
    assert percentiles([]) is None


def test_summary_of_two_requests_one_with_two_samples():
    metrics = RunMetrics()
    metrics.add(Update("a", 0, [0], ""))
    time.sleep(0.05)
    metrics.add(Update("a", 0, [1, 2], "", output("a", 0, 3, ttft=0.1, latency=0.5)))
    metrics.add(Update("a", 1, [0], "", output("a", 1, 1, ttft=0.2, latency=0.2, limit="context")))
    metrics.add(Update("b", 0, list(range(11)), "", output("b", 0, 11, ttft=0.3, latency=2.3)))
    counts = stats(
        decode_seconds=2.0,
        decode_bytes=2_400_000_000_000,
        stage_ticks=100,
        idle_stage_ticks=25,
        steady_stage_ticks=50,
        compiled_programs=3,
        load_bytes=6_853_000_000,
        load_seconds=1.25,
        work_seconds=0.5,
    )
    summary = metrics.summary(counts, "NVIDIA H200")
    assert (summary["requests"], summary["samples"]) == (2, 3)
    assert (summary["prompt_tokens"], summary["output_tokens"]) == (20, 15)
    assert summary["output_tokens_per_s"] == pytest.approx(15 / 0.5)
    assert summary["total_tokens_per_s"] == pytest.approx(35 / 0.5) and summary["work_s"] == 0.5
    assert summary["ttft_s"]["mean"] == pytest.approx(0.2)
    assert summary["tpot_s"]["mean"] == pytest.approx((0.2 + 0.2) / 2)  # one sample has a single token, hence none
    assert 0.05 <= summary["itl_s"]["max"] < 0.5
    assert (summary["bubble_share"], summary["steady_bubble_share"]) == (0.25, 0.0)
    assert summary["share_of_peak"] == pytest.approx(1.2 / 4.8)
    assert summary["ended_by_limit"] == {"max_new_tokens": 2, "context": 1}
    table = dict(rows(summary, {"bad lines": 1, "already finished": 0}))
    assert table["requests"] == "2 (3 samples)"
    assert table["ended by a limit"] == "2 by max_new_tokens, 1 by context"
    assert table["bad lines"] == "1" and "already finished" not in table
    assert table["bubble in ticks"] == "25.0% of stage-ticks empty, 0.0% in steady decode"
    assert table["decode bandwidth"] == "1,200.0 GB/s per device, 25.0% of 4,800 GB/s"
    assert "3 programs" in table["wall time"]
    assert table["load"] == "6.853 GB in 1.25 s (5.5 GB/s)"
    assert summary["load_bytes_per_s"] == pytest.approx(6.853e9 / 1.25)


def test_nothing_ran():
    summary = RunMetrics().summary(stats(), "cpu")
    assert summary["ttft_s"] is summary["bubble_share"] is summary["decode_bytes_per_s"] is None
    assert dict(rows(summary, {}))["TTFT in ms"] == "-" and "ended by a limit" not in dict(rows(summary, {}))
    metrics = RunMetrics()
    metrics.add(Update("a", 0, [], "", output("a", 0, 0, ttft=0.1, latency=0.1, limit=None)))
    summary = metrics.summary(stats(), "cpu")
    assert summary["ended_by_limit"] == {"max_new_tokens": 0, "context": 0} and summary["ttft_s"] is None


@pytest.mark.parametrize(
    ("kind", "gigabytes"),
    [
        ("NVIDIA H200", 4800),
        ("NVIDIA H100 80GB HBM3", 3350),
        ("NVIDIA H100 PCIe", 2000),
        ("NVIDIA H100 NVL", 3938),
        ("NVIDIA GH200 480GB", 4000),
        ("NVIDIA A100-SXM4-40GB", 1555),
        ("NVIDIA A100-SXM4-80GB", 2039),
        ("NVIDIA A100 80GB PCIe", 1935),
        ("NVIDIA A100-PCIE-40GB", 1555),
        ("NVIDIA A100-SXM-64GB", 1640),
        ("AMD Instinct MI250X", 1638),
        ("Tesla V100-SXM2-32GB", 900),
        ("Tesla T4", 320),
        ("NVIDIA L40S", 864),
        ("NVIDIA L4", 300),
        ("NVIDIA A10G", 600),
        ("cpu", None),
        ("NVIDIA T400", None),
    ],
)
def test_peak_bandwidth(kind, gigabytes):
    assert memory_bandwidth(kind) == (gigabytes and gigabytes * 1e9)


def test_a_run_is_described(tmp_path):
    run = describe_run("1.2.3", {"dtype": "float32"}, {"stage": 2}, ["node1", "node2"])
    assert run["versions"]["jaxinfer"] == "1.2.3" and run["versions"]["jax"]
    assert run["hosts"] == ["node1", "node2"] and run["mesh"] == {"stage": 2}
    assert run["devices"]["count"] >= 1 and run["command"]
    assert run["gpus"] == [] and run["driver"] is run["cuda"] is run["nccl"] is None  # on CPU devices


def test_versions_in_words():
    assert (cuda_text(12080), cuda_text(13000), nccl_text(22703), nccl_text(21805)) == (
        "12.8",
        "13.0",
        "2.27.3",
        "2.18.5",
    )


@pytest.mark.gpu
def test_versions_of_this_machine():
    found = gpu_versions()
    assert all(re.fullmatch(r"\d+(\.\d+)+", text) for text in found.values()), found


def test_the_commit_and_whether_files_differ_from_it(tmp_path):
    assert git_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.invalid"]
    (tmp_path / "file").write_text("a")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-qm", "a"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert git_commit(tmp_path) == commit
    (tmp_path / "file").write_text("b")
    assert git_commit(tmp_path) == f"{commit}+"
