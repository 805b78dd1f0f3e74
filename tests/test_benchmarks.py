"""Floors of known shapes, and that the benchmarks measure, write and draw what they say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import balance, draw, floor, latency, monitor, throughput
from benchmarks.common import fields
from benchmarks.draw import DrawError, read
from benchmarks.limits import Limits
from benchmarks.long_context import slope
from benchmarks.report import Row, with_goals, write
from benchmarks.shapes import hf_config, model_config, random_prompts
from benchmarks.throughput import lengths
from jaxinfer.engine import costs
from jaxinfer.models.families import from_hf
from jaxinfer.parallel.axes import parse_mesh

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
H200 = Limits(copy_bytes_per_s=4.2e12, matmul_flops_per_s=790e12)
ONE = parse_mesh("")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-3.1-8b", 8_030_261_248), ("llama-2-70b", 68_976_648_192), ("openllama-3b", 3_426_473_600)],
)
def test_parameters_of_published_models(name, parameters):
    assert costs.count_parameters(model_config(name)) == parameters


def test_a_decode_step_reads_all_but_the_embedding_and_the_cache_once():
    model = model_config("llama-3.1-8b")
    weights = 2 * (8_030_261_248 - 128256 * 4096)
    assert floor.step_bytes(model, 1, 0, 2) == weights
    per_token = 2 * 32 * 8 * 128 * 2  # keys and values, layers, KV heads, head width, bytes
    assert floor.step_bytes(model, 16, 1000, 2) == weights + 16 * 1000 * per_token
    # the figure: 3.6 ms at 4.2 TB/s
    assert floor.step_seconds(model, 1, 640, 2, H200, ONE) == pytest.approx(3.6e-3, rel=0.01)
    tied = from_hf(hf_config("llama-3.1-8b") | {"tie_word_embeddings": True})
    assert floor.step_bytes(tied, 1, 0, 2) == weights  # the table is the head


def test_large_batches_are_bound_by_arithmetic():
    model = model_config("llama-3.1-8b")
    seconds = floor.step_seconds(model, 4096, 1, 2, H200, ONE)
    assert seconds > 4096 * 2 * floor.decode_weights(model) / 790e12
    assert floor.step_bytes(model, 4096, 1, 2) / 4.2e12 < seconds


def test_prefill_counts_layers_attention_and_one_head_per_prompt():
    model = model_config("llama-3.1-8b")
    layer = 4096 * (32 + 8 + 8) * 128 + 32 * 128 * 4096 + 3 * 4096 * 14336
    tokens = 64 * 512
    attention = 4 * 4096 * 32 * 64 * (512 * 513 // 2)
    once = layer - 2 * 4096 * 8 * 128  # the last layer's, but for keys and values
    layers = 2 * tokens * (32 * layer - once) + 2 * 64 * once
    assert floor.prefill_flops(model, [512] * 64) == layers + attention + 2 * 64 * 4096 * 128256


def test_a_mesh_divides_what_it_can():
    model = model_config("llama-2-70b")
    one, tensor, stage = (
        floor.step_seconds(model, 1, 0, 2, H200, parse_mesh(each)) for each in ("", "tensor=8", "stage=8")
    )
    assert tensor == pytest.approx(one / 8)
    assert stage == pytest.approx(one)  # a token passes the stages one after the other
    prefill = [floor.prefill_seconds(model, [512], H200, parse_mesh(each)) for each in ("", "stage=2,tensor=4")]
    assert prefill[1] == pytest.approx(prefill[0] / 8)


def test_work_is_the_same_every_time():
    assert lengths(100, (128, 1024)) == lengths(100, (128, 1024))
    assert min(lengths(5000, (3, 5))) == 3 and max(lengths(5000, (3, 5))) == 5
    first, again = random_prompts(512, [4, 9], 1), random_prompts(512, [4, 9], 1)
    assert first == again and [len(each) for each in first] == [4, 9]
    assert random_prompts(512, [4, 9], 2) != first


def test_slope_leaves_the_first_tokens_out():
    # 9 seconds for the first two blocks, then 8 tokens a second
    points = [[(0.0, 1), (9.0, 9), (10.0, 17), (11.0, 25)]] * 2
    assert slope(points, 8) == (0.125, 17)
    with pytest.raises(ValueError, match="new-tokens: too few"):
        slope(points, 20)


def test_goals_are_for_one_kind_of_work_on_one_kind_of_device():
    rows = [Row("TPOT, B=1", "ms", 4.0, 3.6), Row("TTFT, B=1", "ms", 9.0, 5.0)]
    first, second = with_goals(rows, "latency", "llama-3.1-8b", "", "NVIDIA H200")
    assert (first.goal, first.peers, first.of_floor) == (3.95, {"vLLM 0.23": 4.86}, pytest.approx(0.9))
    assert second == rows[1]
    assert with_goals(rows, "latency", "llama-3.1-8b", "tensor=2", "NVIDIA H200") == rows
    assert with_goals(rows, "latency", "llama-3.1-8b", "", "NVIDIA A100") == rows
    long = [Row("B=16, S=32768, decode", "GB/s", 3000.0, 4000.0)]
    assert with_goals(long, "long_context", "llama-3.1-8b", "", "NVIDIA H200")[0].goal == pytest.approx(3400)


def test_engine_fields():
    assert fields("kernels=off,decode_steps=16,memory_fraction=0.5") == {
        "kernels": "off",
        "decode_steps": 16,
        "memory_fraction": 0.5,
    }


@pytest.mark.slow
def test_latency_writes_what_draw_reads(tmp_path):
    found = tmp_path / "deep" / "latency.json"
    command = [sys.executable, "-m", "benchmarks.latency", "--model", "tiny", "--cpu-devices", "1", "--batch", "1,2"]
    command += ["--prompt-tokens", "16", "--new-tokens", "9", "--repeats", "1", "--json", str(found)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    data = json.loads(found.read_bytes())
    names = ["TPOT, B=1", "TTFT, B=1", "output, B=1", "TPOT, B=2", "TTFT, B=2", "output, B=2"]
    assert [row["name"] for row in data["rows"]] == names
    assert all(row["value"] > 0 and row["floor"] > 0 for row in data["rows"])
    assert data["benchmark"] == "latency" and data["model"] == "tiny" and "--new-tokens" in data["command"]
    assert {"started", "commit", "versions", "devices", "limits", "mesh_text"} <= data.keys()
    with pytest.raises(DrawError, match="none is drawn on a CPU"):
        read([found])
    gpu = tmp_path / "gpu.json"
    gpu.write_text(json.dumps(data | {"devices": {"kind": "NVIDIA H200"}}))
    groups = read([gpu])
    assert [group.title for group in groups] == [f"tiny, latency: {name}" for name in names]
    draw.draw(groups, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_balance_tells_what_it_predicts(tmp_path, monkeypatch):
    found = tmp_path / "balance.json"
    size = ["--batch", "4", "--prompt-tokens", "8", "--new-tokens", "120", "--rounds", "1"]
    place = ["--model", "tiny", "--mesh", "stage=2", "--cut", "3,1"]
    monkeypatch.setattr(sys, "argv", ["balance", *place, *size, "--json", str(found)])
    balance.main()
    details = json.loads(found.read_bytes())["details"]
    assert details["given"] == [3, 1] and sum(details["measured"]) == 4
    assert len(details["profile"]["layers"]["decode"]) == 4 and details["predicted_gain_ms"] >= 0
    assert {name: len(each) for name, each in details["steps_ms"].items()} == {"given": 1, "measured": 1}


@pytest.mark.slow
def test_throughput_counts_tokens(tmp_path, monkeypatch):
    found = tmp_path / "throughput.json"
    size = ["--requests", "6", "--prompt-range", "4:20", "--new-tokens", "5", "--max-batch", "2"]
    monkeypatch.setattr(sys, "argv", ["throughput", "--model", "tiny", *size, "--json", str(found)])
    throughput.main()
    data = json.loads(found.read_bytes())
    output, both, requests = (row["value"] * data["details"]["seconds"] for row in data["rows"])
    prompts = sum(lengths(6, (4, 20)))
    assert (output, both, requests) == pytest.approx((30, 30 + prompts, 6))
    assert data["details"]["engine"]["compiled_programs"] == 0  # the first run compiled them all
    assert data["details"]["engine"]["prefill_tokens"] == prompts


@pytest.mark.parametrize(
    ("command", "options", "text"),
    [
        (latency, "--model none.json", "model: 'none.json': No such file"),
        (latency, "--model tiny --new-tokens 1", "at least 2"),
        (latency, "--model tiny --batch 1,0", "legal is N,N"),
        (latency, "--model tiny --engine kernels", "legal is NAME=VALUE"),
        (latency, "--model tiny --mesh tensr=2", "unknown axis 'tensr'"),
        (latency, "--model tiny --engine kernls=off", "kernls: no such option"),
        (latency, "--model tiny --engine mesh=tensor=2", "mesh cannot be set there"),
        (latency, "--model tiny --batch 1 --engine decode_steps=1.5", "decode_steps: found 1.5, legal is a whole"),
        (latency, "--model tiny --batch 1 --prompt-tokens 4090 --new-tokens 9", "4,099 together, legal is the model's"),
        (latency, "--model none.json --peer", "model: 'none.json': No such file"),
        (latency, "--model tiny --json /dev/null/x.json", "/dev/null/x.json: cannot be written"),
        (monitor, "--model tiny --rounds 1", "legal is at least 2"),
        (throughput, "--model tiny --prompt-range 9:3", "legal is LOW:HIGH"),
        (draw, "none.json --output x.png", "none.json: No such file"),
    ],
)
def test_mistakes_take_one_line(command, options, text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *options.split()])
    with pytest.raises(SystemExit) as ended:
        command.main()
    message = capsys.readouterr().err or str(ended.value)
    assert ended.value.code == 2 and len(message.splitlines()) == 1 and text in message


def test_draw_refuses_what_it_cannot_compare(tmp_path):
    report = {"benchmark": "startup", "model": "tiny", "mesh_text": ""}
    write(tmp_path / "a.json", report, [Row("warm", "s", 3.0)])
    with pytest.raises(DrawError, match="no figure with a floor"):
        read([tmp_path / "a.json"])
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(DrawError, match=r"b\.json: not the JSON of a benchmark"):
        read([tmp_path / "b.json"])
    write(tmp_path / "c.json", report, [Row("warm", "s", 3.0, goal=15.0, peers={"vLLM": 55.0})])
    (group,) = read([tmp_path / "c.json"])
    assert (group.goal, group.of) == (1, "the goal")
    assert group.bars == {"jaxinfer": (5.0, "3 s"), "vLLM": (15 / 55, "55 s")}


def test_on_a_cpu_no_share_of_a_floor_is_drawn(tmp_path):
    rows = [
        Row("TPOT, B=1", "ms", 0.5, floor=12.4, peers={"transformers": 1.0, "vLLM": 2.0}),
        Row("TTFT, B=1", "ms", 9.0, 5.0),
    ]
    report = {"benchmark": "latency", "model": "tiny", "mesh_text": "", "devices": {"kind": "cpu"}}
    write(tmp_path / "cpu.json", report, rows)
    (group,) = read([tmp_path / "cpu.json"])
    assert group.of == "the best peer"
    assert {name: part for name, (part, _) in group.bars.items()} == {"jaxinfer": 2, "transformers": 1, "vLLM": 0.5}
    write(tmp_path / "gpu.json", report | {"devices": {"kind": "NVIDIA H200"}}, rows)
    groups = read([tmp_path / "gpu.json"])
    assert [each.of for each in groups] == ["the floor"] * 2 and groups[0].bars["jaxinfer"][0] == 24.8
    draw.draw([group, *groups], tmp_path / "both.pdf")
    assert (tmp_path / "both.pdf").read_bytes().startswith(b"%PDF")
