"""Waiting told from transfers, layers' times, and the cut that they give."""

import json
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.run import convert
from engine_run import make_engine
from hf_models import make_hf_folder
from jaxinfer.engine.cut import choose_cut, identity, shape
from jaxinfer.engine.params import SamplingParams
from jaxinfer.engine.request import Request
from jaxinfer.parallel.axes import LayoutError
from jaxinfer.parallel.stages import fastest
from jaxinfer.telemetry.breakdown import breakdown
from jaxinfer.telemetry.devices import own_devices
from jaxinfer.telemetry.layers import layer_of
from jaxinfer.telemetry.profile import Profile
from jaxinfer.telemetry.profile_file import report
from jaxinfer.telemetry.waiting import durations, from_json, to_json, with_waiting
from jaxinfer.telemetry.xplane import Span

LAYER = "jit(decode)/while/body/stage/layer_00_01/mlp"
SIZES = {"stage": 2, "data": 1, "tensor": 1}


def span(start_us, end_us, op="dot", scope=LAYER, over=None, program="decode"):
    return Span(start_us * 1e3, end_us * 1e3, program, op, f"{scope}/{over}" if over else scope, over is not None)


def matched(devices, sizes):
    """The spans of each place with their waits in us, after all have told all."""
    told = json.loads(json.dumps([to_json({place: durations(spans)}) for place, spans in devices.items()]))
    everyone = from_json(told)
    return {place: with_waiting(spans, place, sizes, everyone) for place, spans in devices.items()}


def waits(spans):
    return [None if each.waits is None else each.waits / 1e3 for each in spans if each.communicates]


def test_the_last_to_come_waits_for_nobody():
    # clocks are far apart; stage 1 comes 30 us late, then stage 0 is 5 us late; a transfer takes 4 us
    first = [
        span(0, 10),
        span(10, 44, "psum", over="all_reduce_stage"),
        span(44, 60),
        span(60, 64, "psum", over="all_reduce_stage"),
    ]
    second = [
        span(900, 940),
        span(940, 944, "psum", over="all_reduce_stage"),
        span(944, 955),
        span(955, 964, "psum", over="all_reduce_stage"),
    ]
    found = matched({(0, 0, 0): first, (1, 0, 0): second}, SIZES)
    assert waits(found[0, 0, 0]) == pytest.approx([30, 0]) and waits(found[1, 0, 0]) == pytest.approx([0, 5])
    decode = breakdown(found[0, 0, 0], 2, {"decode": 1})["decode"]
    times = {name: decode[name] * 1e3 for name in ("compute", "transfer", "waiting", "unhidden", "unmatched")}
    assert times == pytest.approx({"compute": 26, "transfer": 8, "waiting": 30, "unhidden": 38, "unmatched": 0})
    assert decode["layers"] == [[0, pytest.approx(0.034), 0]]
    devices = [
        {"rank": 0, "host": "h", "device": 0, "stage": stage, "programs": breakdown(spans, 2, {"decode": 1}, stage)}
        for stage, spans in enumerate(found.values())
    ]
    both = report({"mesh": SIZES, "stage_layers": [1, 1]}, {"as-run": devices}, 0.0)
    assert both["bubble"] == {"empty_ticks": 0, "time": pytest.approx((30 + 5) / 128)}
    assert both["layers"]["decode"] == pytest.approx([0.034, 0.059])


def test_who_takes_part_goes_by_the_axes():
    # the stages of tensor groups: sums inside a group are no business of the other's; one stage alone has a third
    def device(sum_us, all_us, more=()):
        begin = [span(0, sum_us, "psum.1", over="all_reduce_tensor")]
        return [*begin, *more, span(500, 500 + all_us, "psum.2", over="all_reduce_stage_tensor")]

    branch = [span(200, 209, "psum.3", over="all_reduce_tensor")]
    devices = {
        (0, 0, 0): device(10, 100),
        (0, 0, 1): device(14, 90),
        (1, 0, 0): device(50, 70, branch),
        (1, 0, 1): device(40, 75, [branch[0]._replace(end=206e3)]),
    }
    found = matched(devices, {"stage": 2, "data": 1, "tensor": 2})
    assert waits(found[0, 0, 0]) == pytest.approx([0, 30]) and waits(found[0, 0, 1]) == pytest.approx([4, 20])
    assert waits(found[1, 0, 0]) == pytest.approx([10, 3, 0]) and waits(found[1, 0, 1]) == pytest.approx([0, 0, 5])


def test_a_slot_has_a_layer_of_each_stage():
    assert layer_of("jit(decode)/stage/layer_03_19/mlp/dot", 1) == 19 and layer_of("layer_07", 0) == 7
    assert layer_of("jit(decode)/stage/layer_12_x/mlp/dot", 1) is layer_of("jit(decode)/head/dot", 0) is None


def test_what_cannot_be_matched_is_transfer():
    # stage 0's trace began one exchange earlier; a collective of no axes that we know; one whose partner has no trace
    first = [
        *(span(at, at + length, "psum", over="all_reduce_stage") for at, length in ((0, 99), (200, 20), (300, 30)))
    ]
    first.append(span(400, 440, "psum.9", over="unheard_of"))
    second = [*(span(at, at + length, "psum", over="all_reduce_stage") for at, length in ((0, 5), (100, 35)))]
    found = matched({(0, 0, 0): first, (1, 0, 0): second}, SIZES)
    assert waits(found[0, 0, 0]) == [None, 15, 0, None] and waits(found[1, 0, 0]) == [0, 5]
    decode = breakdown(found[0, 0, 0], 2, {"decode": 1})["decode"]
    assert decode["unmatched"] == pytest.approx(0.139) and decode["transfer"] == pytest.approx(0.174)
    alone = with_waiting(second, (1, 0, 0), SIZES, {(1, 0, 0): durations(second)})
    assert waits(alone) == [None, None]


def test_waiting_under_compute_costs_nothing():
    spans = [
        span(0, 40),
        span(10, 70, "send", over="send_stage")._replace(waits=50e3),  # waits to 60, 20 us of it alone
        span(70, 80),
    ]
    decode = breakdown(spans, 2, {"decode": 1})["decode"]
    times = {name: decode[name] * 1e3 for name in ("compute", "transfer", "waiting", "hidden")}
    assert times == pytest.approx({"compute": 50, "transfer": 10, "waiting": 20, "hidden": 30})


def profiled(cut, layers, ends, before=0.0):
    """The profile of layers that take so many us; `before` is the gap ahead of a layer that not all stages have."""
    devices, done = [], 0
    names = [
        [sum(cut[:stage]) + slot if slot < count else None for stage, count in enumerate(cut)]
        for slot in range(max(cut))
    ]
    for stage, count in enumerate(cut):
        spans, now = [], 0.0
        for slot in range(count):
            name = "_".join("x" if each is None else f"{each:02}" for each in names[slot])
            now += 2 if slot < min(cut) else before
            length = layers[done + slot]
            spans.append(span(now, now + length, f"dot.{slot}", scope=f"jit(decode)/stage/layer_{name}/mlp"))
            now += length
        spans.append(span(now, now + ends, "head", scope="jit(decode)/head"))
        done += count
        programs = breakdown(spans, len(cut), {"decode": 1}, stage)
        devices.append({"rank": stage, "host": "h", "device": 0, "stage": stage, "programs": programs})
    head = {
        "model": "m",
        "mesh": {"stage": len(cut), "data": 1, "tensor": 1},
        "stage_layers": list(cut),
        "dtype": "float32",
    }
    return report(head, {"as-run": devices}, 0.02)


@pytest.mark.parametrize("cut, imbalance", [((3, 3), 0), ((2, 4), 0.2), ((5, 1), 1 / 3), ((1, 5), 1 / 3)])
def test_cuts_of_unlike_balance(cut, imbalance):
    found = profiled(cut, [100] * 6, ends=100)
    assert found["imbalance"]["decode"] == pytest.approx(imbalance) and found["imbalance"]["prefill"] is None
    assert found["bubble"] == {"empty_ticks": 0.02, "time": pytest.approx(0)}
    # a gap between kernels is the layer's, but for the first kernel's of a trace
    assert found["layers"]["decode"] == pytest.approx([0.102] * 6, abs=0.003)
    assert found["ends"]["decode"] == pytest.approx([0.1, 0.1])


def test_an_uneven_slot_is_not_its_layers():
    found = profiled((4, 2), [100, 110, 120, 130, 140, 150], ends=50, before=12)
    assert found["layers"]["decode"] == pytest.approx([0.1, 0.112, 0.121, 0.131, 0.14, 0.152], abs=0.003)
    assert found["uneven_slot_ms"]["decode"] == pytest.approx(0.011, abs=1e-6)
    assert profiled((3, 3), [100] * 6, ends=50)["uneven_slot_ms"]["decode"] is None


def test_one_launch_has_no_layers():
    spans = [span(0, 50, scope="jit(decode)/stage/decode_layers/ffi_call"), span(50, 60, scope="jit(decode)/head")]
    devices = [{"rank": 0, "host": "h", "device": 0, "stage": 0, "programs": breakdown(spans, 1, {"decode": 1})}]
    found = report({"mesh": {"stage": 1}, "stage_layers": [4]}, {"as-run": devices}, None)
    assert found["layers"]["decode"] is None and "one launch did all layers" in found["layers_why"]
    assert found["stages"][0]["decode"]["compute"] == pytest.approx(0.06)


@given(st.lists(st.floats(0.1, 9), min_size=1, max_size=8), st.lists(st.floats(0, 9), min_size=1, max_size=4))
def test_fastest_is_fastest(times, ends):
    if len(ends) > len(times):
        with pytest.raises(LayoutError, match="legal: 1 to"):
            fastest(times, ends)
        return

    def slowest(cut):
        starts = [sum(cut[:stage]) for stage in range(len(cut))]
        return max(sum(times[at : at + count]) + end for at, count, end in zip(starts, cut, ends, strict=True))

    cuts = [
        tuple(after - before for before, after in zip((0, *inner), (*inner, len(times)), strict=True))
        for inner in combinations(range(1, len(times)), len(ends) - 1)
    ]
    found = fastest(times, ends)
    assert found in cuts and slowest(found) == pytest.approx(min(map(slowest, cuts)))


MODEL = {"num_layers": 6, "hidden_size": 64, "eos_token_ids": [2], "bos_token_id": 1}
PLACE = {"stage": 2, "data": 1, "tensor": 1}


def written(path, **changes):
    found = profiled((5, 1), [100, 100, 100, 100, 100, 300], ends=50) | {"shape": shape(MODEL)} | changes
    path.write_text(json.dumps(found))
    return f"measured:{path}"


def test_a_measured_cut(tmp_path):
    text = written(tmp_path / "p.json", step_ms={"decode": 0.6, "prefill": None})
    cut = choose_cut(text, MODEL | {"eos_token_ids": [7]}, PLACE, "float32")
    assert cut.stage_layers == (4, 2)
    source = cut.source
    # 5 layers and the ends were slowest; now 4 layers are as slow as the last two
    assert source["predicted_gain_ms"] == pytest.approx(0.1, abs=0.01)
    assert source["predicted_step_ms"] == pytest.approx(0.5, abs=0.01)
    assert source["measured_with"] == [5, 1] and source["stage_layers"] == [4, 2]
    assert "4,2 by" in cut.told() and "less than measured with 5,1" in cut.told()
    # other stages: the cut holds, a time is not predicted
    other = choose_cut(text, MODEL, {"stage": 3, "data": 1, "tensor": 1}, "float32")
    assert other.stage_layers in {(3, 2, 1), (2, 3, 1)}
    assert other.source["predicted_gain_ms"] is None and "no time" in other.told()
    assert choose_cut("2,4", MODEL, PLACE, "float32").stage_layers == (2, 4)
    (tmp_path / "copy.json").write_bytes((tmp_path / "p.json").read_bytes())
    assert identity(text) == identity(f"measured:{tmp_path / 'copy.json'}") != identity(written(tmp_path / "q.json"))
    assert identity("2,4") == "2,4" and identity(None) is None


def test_the_even_cut_stays_for_what_is_noise(tmp_path):
    layers = {"decode": [0.1, 0.1, 0.004, 0.1, 0.098, 0.0], "prefill": None}
    assert fastest(layers["decode"], [0.05, 0.05]) == (2, 4)  # by 2 us of a step of 600
    assert choose_cut(written(tmp_path / "a", layers=layers), MODEL, PLACE, "float32").stage_layers == (3, 3)
    # 4,2 is faster, unless a slot that one stage leaves empty costs more than that
    layers = {"decode": [0.1, 0.1, 0.1, 0.1, 0.2, 0.2], "prefill": None}
    for cost, cut in ((0.001, (4, 2)), (0.08, (3, 3))):
        changes = {"layers": layers, "uneven_slot_ms": {"decode": cost}, "ends": {"decode": [0, 0]}}
        assert choose_cut(written(tmp_path / f"{cost}", **changes), MODEL, PLACE, "float32").stage_layers == cut


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"shape": "0" * 16}, "measured on 'm', which has as many layers but is another model"),
        ({"stage_layers": [4, 1]}, "measured on 'm', of 5 layers, this model has 6"),
        ({"layers": {"decode": None}, "layers_why": "one launch"}, "it has no times of layers: 'one launch'"),
        ({"layers": {"decode": [1, 2]}}, "'layers' is missing or not as it is written"),
        ({"layers": {"decode": [1, 2, 3, 4, 5, -6]}}, "'layers' is missing or not as it is written"),
        ({"layers": {}}, "'decode' is missing"),
        ({"ends": {"decode": [1]}}, "'ends' is missing or not as it is written"),
        ({"stage_layers": [6]}, "'stage_layers' is missing or not as it is written"),
        ({"mesh": 5}, "not as it is written"),
        ({"layers": {"decode": [10**400] * 6}}, "not as it is written"),
        ({"stage_layers": 6}, "not as it is written"),
        ({"step_ms": {"decode": None}}, "'step_ms' is missing or not as it is written"),
    ],
    ids=str,
)
def test_profiles_that_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        choose_cut(written(tmp_path / "p.json", **changes), MODEL, PLACE, "float32")
    assert "stage-layers: " in str(error.value) and "\n" not in str(error.value)


def traced(checkpoint, folder, cut, mesh="stage=2"):
    """The profile of a real run."""
    engine = make_engine(checkpoint, mesh, stage_layers=cut)
    profile = Profile(folder, 4, 9, rank=0)
    for name in range(4):
        engine.add(Request(str(name), [3, 4, 5], SamplingParams(max_new_tokens=60, ignore_eos=True)))
    while engine.has_unfinished():
        profile.before(engine.steps, engine)
        engine.step()
    profile.finish(engine)
    devices = own_devices(profile.windows[0].folder, engine.mesh, 0, lambda value: [value])
    head = {"mesh": dict(engine.mesh.shape), "stage_layers": list(cut)}
    return report(head, {"as-run": [each | {"host": "here"} for each in devices]}, None)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["stage=2", pytest.param("stage=2,tensor=2", marks=pytest.mark.long)])
def test_a_real_run(tmp_path, mesh):
    make_hf_folder(tmp_path / "hf", num_hidden_layers=6, hidden_size=256, intermediate_size=768)
    convert(tmp_path / "hf", tmp_path / "ckpt", quiet=True)
    found = traced(tmp_path / "ckpt", tmp_path / "traces", (5, 1), mesh)
    long, short = (each["decode"] for each in found["stages"])
    assert long["compute"] > short["compute"] and short["waiting"] > long["waiting"]
    assert found["imbalance"]["decode"] > 0 and found["bubble"]["time"] > 0
    assert len(found["layers"]["decode"]) == 6 and min(found["layers"]["decode"]) > 0
    for each in found["devices"]:
        decode = each["programs"]["decode"]
        assert decode["unmatched"] < 0.05 * decode["unhidden"] and decode["waiting"] > 0
        layers = [layer for layer, _, _ in decode["layers"]]
        assert layers == ([0, 1, 2, 3, 4], [5])[each["stage"]]
        own = sum(busy for _, busy, _ in decode["layers"]) + decode["ends"]
        assert own == pytest.approx(decode["compute"] + decode["transfer"], rel=0.02)
    assert sum(found["layers"]["decode"]) < 2 * found["step_ms"]["decode"]
