"""``python -m jaxinfer.plan``: what fits where, why not and what would do; predictions beside what GPUs measured."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from convert.run import convert
from jaxinfer.parallel.axes import LayoutError, parse_mesh
from jaxinfer.plan.__main__ import main
from jaxinfer.plan.hardware import GPUS, Gpus, parse_gpus, recognise
from jaxinfer.plan.layouts import Ask, consider
from jaxinfer.plan.source import read_source
from jaxinfer.presets import FOLDER, load_preset
from processes import own_environment

ROOT = Path(__file__).parents[1]
GIB = 1 << 30
MEMORY_OFF, TPOT_OFF = 0.05, 0.20  # that a prediction may be
CHECK = ("--preset", "tiny", "--check", "--mesh", "tensor=2", "--batch", 2, "--context", 64, "--new-tokens", 8)
MEASURED = [line for line in (ROOT / "tests/data/plan_h200.csv").read_text().splitlines() if line[0] != "#"][1:]
slow = pytest.mark.slow


@pytest.fixture
def plan(capsys, tmp_path):
    """Runs the command in here: its lines and what --json wrote."""

    def run(*words, status: int = 0) -> tuple[list[str], dict]:
        file = tmp_path / "new" / "plan.json"
        with pytest.raises(SystemExit) as end:
            main([*map(str, words), "--json", str(file)])
        out, err = capsys.readouterr()
        assert end.value.code == status, out + err
        return (out + err).splitlines(), json.loads(file.read_text()) if status < 2 else {}

    return run


def test_the_command_says_at_once_that_70b_cannot_be_cut_six_ways():
    words = ["--preset", "llama-2-70b", "--gpus", "6xA100-80", "--mesh", "tensor=6"]
    done = subprocess.run([sys.executable, "-m", "jaxinfer.plan", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "llama-2-70b: 68,976,648,192 parameters in bfloat16 (the cache too), on 6 x A100-80"
    assert lines[2].startswith("CANNOT BE: --mesh tensor=6: heads=64 cannot be cut 6 ways (tensor); legal: 1, 2, 4, 8,")
    assert lines[3].startswith("would do: --mesh stage=3,tensor=2 on these 6: TPOT ")
    assert lines[4].startswith("would do: 2 x A100-80, --mesh tensor=2: TPOT ")


@pytest.mark.parametrize(
    ("preset", "gpus", "mesh", "answer", "would_do"),
    [
        ("falcon-180b", "12xA100-80", "tensor=12", r"CANNOT BE: .*heads=232 cannot be cut 12 ways .*1, 2, 4, 8, 29", 2),
        ("openllama-7b", "1xT4", None, r"DOES NOT FIT: .*weights 12853, .* 90% of 14909 MiB is 13418", 3),
        ("alia-40b", "1xA100-80", None, r"DOES NOT FIT: .*weights 77122, .* 90% of 81039 MiB is 72935", 2),
        ("llama-2-70b", "T4", None, r"DOES NOT FIT: .*weights 131563, ", 1),
    ],
)
def test_the_first_lines_say_why_not_and_what_would_do(plan, preset, gpus, mesh, answer, would_do):
    lines, data = plan("--preset", preset, "--gpus", gpus, *(("--mesh", mesh) if mesh else ()), status=1)
    assert re.match(answer, lines[2])
    shown = [line.removeprefix("would do: ") for line in lines[3:] if line.startswith("would do: ")]
    assert shown == data["advice"] and len(shown) == would_do
    assert lines[3 : 3 + would_do] == [f"would do: {each}" for each in shown], "before any table"
    assert not data["fits"] and data["largest"] == {"batch": 0, "context": 0}


def planned(gpus: str, words: tuple, text: str) -> dict[str, str]:
    """The options of the plan that a line of advice stands for."""
    options = dict(zip(words[::2], words[1::2])) | {"--gpus": gpus}
    text = text.split(": TPOT ")[0]
    if found := re.search(r"(\d+) x ([\w-]+)(?: \((\d+) nodes of (\d+)\))?", text):
        count, kind, nodes, per_node = found.groups()
        options["--gpus"] = f"{nodes}x{per_node}x{kind}" if nodes else f"{count}x{kind}"
    elif found := re.search(r"\bone (\S+)$", text):
        options["--gpus"] = found[1]
    return options | dict(re.findall(r"(--[a-z-]+) ([\w=,]+)", text))


@pytest.mark.parametrize(
    ("preset", "gpus", "words", "least"),
    [
        ("llama-2-70b", "6xA100-80", ("--mesh", "tensor=6"), 2),
        ("openllama-7b", "T4", (), 3),
        pytest.param("llama-3.1-70b", "1xT4", (), 1, marks=slow),
        pytest.param("llama-3.1-70b", "2xT4", ("--context", "4096", "--dtype", "bfloat16"), 1, marks=slow),
        pytest.param("openllama-7b", "8xT4", ("--dtype", "bfloat16"), 1, marks=slow),
        pytest.param("gemma-2-9b", "T4", ("--dtype", "bfloat16", "--batch", "1", "--context", "300"), 2, marks=slow),
        pytest.param("openllama-7b", "A100-40", ("--dtype", "float32", "--batch", "16"), 5, marks=slow),
        pytest.param("llama-3.1-8b", "1xA100-40", ("--batch", "4000"), 1, marks=slow),
        pytest.param(
            "llama-3.1-8b", "1xA100-40", ("--batch", "1", "--new-tokens", "100000", "--dtype", "float32"), 3, marks=slow
        ),
        pytest.param("llama-2-70b", "2x2xA100-40", ("--batch", "256"), 2, marks=slow),
    ],
)
def test_what_would_do_does(plan, preset, gpus, words, least):
    _, data = plan("--preset", preset, "--gpus", gpus, *words, status=1)
    assert len(data["advice"]) >= least
    for text in data["advice"]:
        options = planned(gpus, words, text)
        asked = [each for pair in options.items() for each in pair]
        assert asked != ["--gpus", gpus, *words], f"no change: {text}"
        plan("--preset", preset, *asked)
        if "--context" in text and gpus == options["--gpus"]:
            more = options | {"--context": int(options["--context"]) + 16}
            plan("--preset", preset, *[each for pair in more.items() for each in pair], status=1)


def test_a_smaller_dtype_would_do(plan):
    words = "--preset", "openllama-7b", "--dtype"
    _, data = plan(*words, "float32", "--gpus", "A100-40", "--batch", 16, status=1)
    assert any(each.startswith("--dtype bfloat16 with ") for each in data["advice"])
    lines, _ = plan(*words, "bfloat16", "--gpus", "8xT4", status=1)
    assert lines[3].startswith("would do: --dtype float16 with --mesh ")


def test_nothing_would_do(plan, monkeypatch):
    monkeypatch.setattr("jaxinfer.plan.__main__.advise", lambda *_: [])
    lines, _ = plan("--preset", "llama-2-70b", "--gpus", "T4", status=1)
    assert lines[3] == "nothing of these GPUs would do"


def test_a_batch_that_the_cache_does_not_hold(plan):
    words = "--preset", "llama-3.1-8b", "--gpus", "A100-40", "--context", 4096
    _, data = plan(*words, "--batch", 200, status=1)
    assert re.match(r"batch: the cache holds (\d+) of 200 sequences of 4096 tokens", data["layouts"][0]["reason"])
    smaller = next(int(found[1]) for each in data["advice"] if (found := re.match(r"--batch (\d+) ", each)))
    _, most = plan(*words, "--batch", smaller)
    assert most["largest"]["batch"] == smaller
    plan(*words, "--batch", smaller + 1, status=1)


def test_weights_to_the_byte(plan):
    words = "--preset", "openllama-3b", "--gpus", "2xH200", "--mesh"
    norms = (2 * 26 + 1) * 3200
    for mesh, numbers in (("data=2", 3_426_473_600), ("tensor=2", (3_426_473_600 - norms) // 2 + norms)):
        _, data = plan(*words, mesh)
        assert data["parameters"] == 3_426_473_600
        assert data["layouts"][0]["memory"]["weights"] == 2 * numbers


def test_the_cache_by_hand(plan):
    words = "--preset", "llama-2-70b", "--gpus", "2x4xA100-64", "--mesh", "stage=2,tensor=4"
    lines, data = plan(*words, "--batch", 64, "--context", 1000)
    layout = data["layouts"][0]
    assert layout["stage_layers"] == [40, 40]
    pages = 64 * 63 + 1  # 1000 tokens are 63 pages of 16; one null page
    heads = 8 // 4
    assert layout["memory"]["pages"] == pages
    assert layout["memory"]["cache"] == pages * 16 * 2 * 40 * heads * 128 * 2
    text = "\n".join(lines)
    assert "on 8 x A100-64 (2 nodes of 4)" in lines[0]
    assert "0-39 (40)" in text and "40-79 (40)" in text and "4-7" in text
    assert "4,033 pages of 16 tokens" in text and "layers: 40,40; balanced" in text


def test_uneven_stages_say_what_they_cost(plan):
    lines, data = plan("--preset", "openllama-3b", "--gpus", "4xT4", "--mesh", "stage=4", "--batch", 4)
    assert sorted(data["layouts"][0]["stage_layers"]) == [6, 6, 7, 7]
    assert any("the stages with fewer wait, 7.1% of all stages' time" in line for line in lines)


def test_every_layout_is_listed_and_the_illegal_say_why(plan):
    lines, data = plan("--preset", "llama-2-70b", "--gpus", "6xA100-80", "--context", 1024, "--batch", 6)
    found = {tuple(parse_mesh(each["mesh"]).values()): each for each in data["layouts"]}
    every = {(s, d, t) for s in (1, 2, 3, 6) for d in (1, 2, 3, 6) for t in (1, 2, 3, 6) if s * d * t == 6}
    assert set(found) == every and len(data["layouts"]) == len(every)
    legal = [each for each in data["layouts"] if each["fits"]]
    whole = {"tensor=6", "stage=2,tensor=3", "data=2,tensor=3", "data=6"}  # illegal, or the whole model on each GPU
    assert {each["mesh"] for each in legal} == {each["mesh"] for each in data["layouts"]} - whole
    rates = [each["predicted"]["tokens_per_s"] for each in legal]
    assert rates == sorted(rates, reverse=True) and data["layouts"][: len(legal)] == legal
    text = "\n".join(lines)
    assert all(re.search(rf"│ {each['mesh']} +│", text) for each in legal)
    for (_, _, tensor), layout in found.items():
        if tensor in (3, 6):
            assert layout["reason"].startswith(f"heads=64 cannot be cut {tensor} ways")
        elif not layout["fits"]:
            assert layout["reason"].startswith("memory: needs ")
        if not layout["fits"]:
            assert f"  {layout['mesh']}: {layout['reason']}" in text


@pytest.mark.parametrize(
    ("text", "gpus"),
    [
        ("2xT4", Gpus(GPUS["T4"], 2, 1)),
        ("2x4xA100-64", Gpus(GPUS["A100-64"], 2, 4)),
        ("8xA100-64", Gpus(GPUS["A100-64"], 2, 4)),
        ("v100", Gpus(GPUS["V100-32"], 1, 1)),
        ("16xH200", Gpus(GPUS["H200"], 2, 8)),
        ("1x6xA100-80", Gpus(GPUS["A100-80"], 1, 6)),
    ],
)
def test_gpus(text, gpus):
    assert parse_gpus(text) == gpus


@pytest.mark.slow
def test_a_node_size_that_was_stated_is_kept(plan):
    words = "--preset", "llama-2-70b", "--mesh", "tensor=4", "--gpus"
    (two, _), (one, data) = plan(*words, "4x2xA100-80"), plan(*words, "8xA100-80")
    assert "on 4 x A100-80 (2 nodes of 2)" in two[0] and two[1:4] == plan(*words, "2x2xA100-80")[0][1:4]
    assert one[0].endswith("on 4 x A100-80") and one[2] != two[2]
    idle = "4 of 8 GPUs stay idle: mesh tensor=4 takes 4"
    assert idle in data["notes"] and f"note: {idle}" in one and f"note: {idle}" in two
    assert str(parse_gpus("1x2xA100-80").of(4)) == "4 x A100-80 (2 nodes of 2)"


@pytest.mark.parametrize("text", ["0xT4", "2x0xT4", "8", "2x2x2xT4", "-1xT4", "", "T4x8x", "K80", "4xA100"])
def test_gpus_that_are_none(text, plan):
    with pytest.raises(LayoutError, match=r"gpus: (found .*legal is 8xA100-40|unknown type .*legal: T4, V100-16)"):
        parse_gpus(text)
    lines, _ = plan("--preset", "tiny", f"--gpus={text}", status=2)
    assert len(lines) == 1 and lines[0].startswith("jaxinfer.plan: error: argument --gpus: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--preset", "tiny"), "--gpus is missing"),
        (("--gpus", "T4"), "--preset --model --config"),
        (("--preset", "tiny", "--gpus", "T4", "--check"), "leave --gpus out"),
        (("--preset", "tinny", "--gpus", "T4"), "tiny"),
        (("--preset", "tiny", "--gpus", "4xT4", "--mesh", "tensor=8"), "mesh tensor=8 needs 8 GPUs, --gpus gives 4"),
        (("--preset", "tiny", "--gpus", "4xT4", "--mesh", "rows=2"), "rows"),
        (("--preset", "tiny", "--gpus", "T4", "--context", 5000), "5000 is beyond the model's longest, 4096"),
        (("--preset", "tiny", "--gpus", "T4", "--batch", 0), "--batch: found '0', legal is a whole number of at least"),
        (("--preset", "tiny", "--gpus", "T4", "--memory-fraction", 1.5), "legal is above 0 and up to 1"),
        (("--config", "no/config.json", "--gpus", "T4"), "no/config.json"),
        (("--model", "no", "--gpus", "T4"), "no"),
    ],
)
def test_options_that_are_wrong(plan, words, message):
    lines, _ = plan(*words, status=2)
    assert len(lines) == 1 and lines[0].startswith("jaxinfer.plan: error: ") and message in lines[0]


def test_a_config_that_is_none(plan, tmp_path):
    contradiction = '{"architectures": ["LlamaForCausalLM"], "model_type": "mistral", "sliding_window": 8}'
    for content, message in (
        ("{", "not JSON"),
        ("[1]", "found list, legal is an object"),
        ("{}", "architectures"),
        (contradiction, "model_type: 'mistral' is not that of architectures 'LlamaForCausalLM'"),
    ):
        (tmp_path / "config.json").write_text(content, "utf-8-sig")  # a byte order mark is not what is wrong
        lines, _ = plan("--config", tmp_path / "config.json", "--gpus", "T4", status=2)
        assert len(lines) == 1 and message in lines[0]


def test_preset_config_folder_and_checkpoint_are_one_model(plan, tiny, tmp_path):
    convert(tiny, tmp_path / "ckpt", quiet=True)
    found = []
    for words in (("--config", tiny / "config.json"), ("--model", tiny), ("--model", tmp_path / "ckpt")):
        _, data = plan(*words, "--gpus", "2xA100-40", "--batch", 3, "--dtype", "float16")
        found.append(data | {"model": ""})
    assert found[0] == found[1] == found[2] and found[0]["fits"]
    config = tmp_path / "config.json"
    config.write_text(json.dumps(load_preset("falcon-40b").config))
    words = "--gpus", "2xA100-80", "--dtype", "bfloat16"
    (_, preset), (_, own) = plan("--preset", "falcon-40b", *words), plan("--config", config, *words)
    assert preset["layouts"] == own["layouts"] and preset["parameters"] == own["parameters"]


def test_bfloat16_becomes_float16_where_there_is_none_and_it_says_so(plan):
    words = "--preset", "openllama-3b", "--context", 512, "--batch", 1, "--gpus"
    lines, data = plan(*words, "T4")
    assert data["dtype"] == "float16" and "in float16" in lines[0]
    note = "note: the model's bfloat16 is not there on this GPU: float16 (generate needs --dtype float16)"
    assert note in lines and note.removeprefix("note: ") in data["notes"]
    lines, data = plan(*words, "A100-40")
    assert data["dtype"] == "bfloat16" and note not in lines
    lines, data = plan(*words, "T4", "--dtype", "bfloat16", status=1)
    assert "legal here: float16, float32" in lines[2]


@pytest.mark.parametrize("place", ["/dev/null/plan.json", "."])
def test_a_json_that_cannot_be_written_is_refused_before_the_plan(capsys, tmp_path, place):
    with pytest.raises(SystemExit) as end:
        main(["--preset", "tiny", "--gpus", "T4", "--json", str(tmp_path / place)])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out and err.startswith("jaxinfer.plan: error: --json: ")


@pytest.mark.slow
def test_tpot_is_compared_at_one_batch(plan):
    words = "--preset", "llama-2-70b", "--gpus", "6xA100-80", "--context"
    lines, data = plan(*words, 4096)
    fit = {each["mesh"]: each["batch"] for each in data["layouts"] if each["fits"]}
    few = min(fit.values())
    line = next(line for line in lines if line.startswith("lowest TPOT"))
    found = re.fullmatch(
        r"lowest TPOT with (\d+) at once: --mesh (\S+); most tokens/s with (\d+) at once: --mesh (\S+)", line
    )
    assert few < max(fit.values()) and int(found[1]) == few and int(found[3]) == fit[found[4]]
    _, alike = plan(*words, 4096, "--batch", few)
    assert found[2] == min(alike["layouts"], key=lambda each: each.get("predicted", {}).get("tpot_s", 9))["mesh"]
    lines, _ = plan(*words, 4096, "--batch", few)
    assert f"lowest TPOT: --mesh {found[2]}; most tokens/s: --mesh {alike['layouts'][0]['mesh']}" in lines


def test_json_has_what_the_screen_says(plan):
    lines, data = plan("--preset", "llama-3.1-8b", "--gpus", "H200", "--batch", 8, "--context", 2048)
    layout = data["layouts"][0]
    predicted = layout["predicted"]
    assert sum(predicted["parts"].values()) == pytest.approx(predicted["tpot_s"])
    assert lines[2].startswith(f"FITS: --mesh {layout['mesh']}: TPOT {predicted['tpot_s'] * 1e3:.3g} ms")
    largest = data["largest"]
    assert lines[3].startswith(f"holds {largest['batch']:,} sequences of 2,048 tokens at once, or 8 of ")
    assert layout["holds"] >= 8 and largest["batch"] >= 8 and 2048 <= largest["context"] <= 131072
    memory = layout["memory"]
    assert memory["headroom"] == memory["limit"] - memory["weights"] - memory["workspace"] - memory["cache"] >= 0


def test_more_bytes_take_longer_and_better_links_less():
    def tpot(gpus: str, tensor: int, batch: int) -> float:
        ask = Ask(load_preset("llama-2-70b").model, "bfloat16", 1024, 256, batch)
        return consider(ask, parse_gpus(gpus), parse_mesh(f"tensor={tensor}")).prediction.tpot_s

    assert tpot("4xH200", 4, 1) < tpot("4xA100-80", 4, 1) < tpot("2x2xA100-80", 4, 1)
    assert tpot("4xH200", 4, 1) < tpot("4xH200", 4, 64)
    assert tpot("4xH200", 4, 1) < tpot("2xH200", 2, 1)


def test_the_known_good_layouts_of_presets_name_gpus_of_the_plan():
    for path in FOLDER.glob("*.yaml"):
        assert set(load_preset(path.stem).layouts) <= set(GPUS)


def test_devices_that_are_here_are_recognised():
    assert recognise("NVIDIA H200", int(139.8 * GIB)).name == "H200"
    assert recognise("NVIDIA A100-SXM4-40GB", int(39.4 * GIB)).name == "A100-40"
    assert recognise("NVIDIA A100-SXM4-80GB", int(79.2 * GIB)).name == "A100-80"
    assert recognise("Tesla V100-SXM2-16GB", int(15.8 * GIB)).name == "V100-16"
    assert recognise("NVIDIA H100 NVL", int(93 * GIB)) is None, "another memory"
    assert recognise("cpu", 16 * GIB) is None


@pytest.mark.parametrize("line", MEASURED)
def test_predictions_against_h200(line):
    preset, mesh, batch, context, peak, in_use, tpot = line.split(";")
    sizes = parse_mesh("" if mesh == "one" else mesh)
    ask = Ask(load_preset(preset).model, "bfloat16", int(context), 256, int(batch))
    layout = consider(ask, Gpus(GPUS["H200"], 1, sizes["stage"] * sizes["tensor"]), sizes)
    memory = layout.memory
    assert memory.needed / GIB == pytest.approx(float(peak), rel=MEMORY_OFF)
    assert (memory.weights + memory.cache) / GIB == pytest.approx(float(in_use), rel=MEMORY_OFF)
    assert layout.prediction.tpot_s * 1e3 == pytest.approx(float(tpot), rel=TPOT_OFF)


def check_of_tiny(data: dict, ranks: int) -> None:
    """XLA's count of arguments is weights, cache and a few counters; measured is what CPU devices do not say."""
    assert data["mesh"] == "tensor=2" and data["device"] == "cpu" and len(data["ranks"]) == ranks
    for held, whole, limit, tpot in data["ranks"]:
        assert held["measured"] is None and whole["measured"] is None and limit["predicted"] > whole["predicted"]
        assert held["predicted"] < held["xla"] < 1.25 * held["predicted"]
        assert held["xla"] <= whole["xla"]
        assert tpot["predicted"] is None and tpot["measured"] > 0
    model = read_source("tiny", None, None).model
    norms = (2 * model.num_layers + 1) * model.hidden_size
    weights = 4 * ((918_656 - norms) // 2 + norms)
    pages = 2 * 4 + 1
    cache = pages * 16 * 2 * model.num_layers * model.num_kv_heads // 2 * model.head_dim * 4
    assert data["ranks"][0][0]["predicted"] == weights + cache


@pytest.mark.slow
def test_check_on_two_virtual_devices(tmp_path):
    words = [*CHECK, "--cpu-devices", 2, "--json", tmp_path / "check.json"]
    done = subprocess.run(
        [sys.executable, "-m", "jaxinfer.plan", *map(str, words)],
        cwd=ROOT,
        env=own_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    check_of_tiny(json.loads((tmp_path / "check.json").read_text()), 1)
    assert "tiny on tensor=2 of cpu, float32, 2 x 64 tokens" in done.stdout and "do not report memory" in done.stdout


@pytest.mark.parametrize(
    ("words", "answer", "table"),
    [
        (("tiny", "--cpu-devices", "8", "--mesh", "stage=8"), "CANNOT BE: --mesh stage=8: .*legal: 1 to 4", False),
        pytest.param(
            ("llama-2-70b", "--memory-fraction", "0.01"),
            r"DOES NOT FIT: --mesh tensor=1: memory: needs \d+ MiB",
            True,
            marks=slow,
        ),
    ],
)
def test_check_of_what_does_not_fit_ends_with_1(words, answer, table):
    command = [sys.executable, "-m", "jaxinfer.plan", "--check", "--preset", *words]
    done = subprocess.run(command, cwd=ROOT, env=own_environment(), capture_output=True, text=True)
    assert done.returncode == 1 and re.match(answer, done.stdout), done.stdout + done.stderr
    assert ("headroom" in done.stdout) == table and not done.stderr


@pytest.mark.slow
@pytest.mark.slurm
def test_check_of_two_processes_under_srun(slurm_bed, tmp_path):
    words = [*CHECK, "--cpu-devices", 1, "--json", tmp_path / "check.json"]
    command = [sys.executable, "-m", "jaxinfer.plan", *words]
    done = slurm_bed.srun(command, 2, 1, ["--kill-on-bad-exit=1"], timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("tiny on tensor=2") == 1, "the first process alone says it"
    check_of_tiny(json.loads((tmp_path / "check.json").read_text()), 2)
