"""Traces of some steps, and what is made of them."""

import typing
from collections import Counter
from pathlib import Path

import pytest
from jax.profiler import ProfileData

from convert.run import convert
from engine_run import make_engine
from hf_models import make_hf_folder
from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.params import SamplingParams
from jaxinfer.engine.programs import WITHOUT_COMMAND_BUFFERS
from jaxinfer.engine.request import Request
from jaxinfer.telemetry.breakdown import breakdown, left_out, show
from jaxinfer.telemetry.devices import own_devices
from jaxinfer.telemetry.hlo import Instruction, Program, programs
from jaxinfer.telemetry.profile import Profile, Window, clamped, taken
from jaxinfer.telemetry.xplane import Span, read


def span(start_us, end_us, program="decode", op="dot", scope="", communicates=False):
    return Span(start_us * 1e3, end_us * 1e3, program, op, scope, communicates)


def test_each_nanosecond_counts_once():
    spans = [
        span(0, 100, "prefill", "a"),
        span(150, 200, op="a", scope="jit(decode)/layer_slot_0/attention/paged_attention/dot"),
        span(190, 230, op="b", scope="jit(decode)/layer_slot_0/attention/psum", communicates=True),  # 10 us hidden
        span(235, 245, op="c", scope="jit(decode)/layer_slot_0/mlp/dot"),  # after a launch gap of 5 us
        span(345, 350, op="d"),  # after 100 us without work
    ]
    found = breakdown(spans, 1, {})
    assert set(found) == {"prefill", "decode"} and found["prefill"]["compute"] == pytest.approx(0.1)
    decode = found["decode"]
    times = {name: decode[name] * 1e3 for name in ("compute", "unhidden", "hidden", "launch", "idle")}
    assert times == pytest.approx({"compute": 65, "unhidden": 30, "hidden": 10, "launch": 5, "idle": 150})
    parts = {name: [time * 1e3 for time in times.values()] for name, times in decode["parts"].items()}
    assert parts["paged_attention"] == pytest.approx([50, 0]) and parts["attention"] == pytest.approx([0, 40])
    assert parts["mlp"] == pytest.approx([10, 0]) and parts["other"] == pytest.approx([5, 0])


def test_steps_are_counted_by_what_repeats():
    # six ticks of three stages are two steps; what runs once around the loop does not count
    spans = [span(0, 10, op="before"), *(span(20 * tick, 20 * tick + 10, op=op) for tick in range(1, 7) for op in "ab")]
    assert breakdown(sorted(spans), 3, {})["decode"]["steps"] == 2
    assert breakdown(sorted(spans), 3, {})["decode"]["compute"] == pytest.approx(0.07 / 2)
    assert breakdown(sorted(spans), 3, {"decode": 7})["decode"]["compute"] == pytest.approx(0.07 / 7)  # who knows, says


def test_a_gpus_trace(tmp_path):
    names = ["hlo_op", "hlo_module", "program_id", "name"]
    text = "".join(
        f'stat_metadata {{ key: {n} value {{ id: {n} name: "{name}" }} }}\n' for n, name in enumerate(names, 1)
    )
    kernels = ["gemm_fusion_dot", "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(args)", "MemcpyD2H"]
    text += "".join(
        f'event_metadata {{ key: {n} value {{ id: {n} name: "{name}" }} }}\n' for n, name in enumerate(kernels, 1)
    )

    def event(kernel, start_us, duration_us, op, scope):
        stats = f'stats {{ metadata_id: 1 str_value: "{op}" }} stats {{ metadata_id: 2 str_value: "jit_decode" }}'
        stats += (
            f'stats {{ metadata_id: 3 uint64_value: 4 }} stats {{ metadata_id: 4 str_value: "jit(decode)/{scope}" }}'
        )
        times = f"offset_ps: {start_us}000000 duration_ps: {duration_us}000000"
        return f"events {{ metadata_id: {kernel} {times} {stats if op else ''} }}\n"

    gemm, reduce = event(1, 0, 50, "gemm_fusion_dot.1", "mlp/dot"), event(2, 40, 30, "all-reduce-start.2", "mlp/psum")
    lines = {
        "Stream #13(Compute)": gemm,
        "Stream #14(Compute)": reduce,
        "Stream #15(MemcpyD2H)": event(3, 75, 9, "", ""),
    }
    lines["XLA Ops"] = gemm + reduce  # says the same again
    text += "".join(f'lines {{ id: {n} name: "{name}" {events} }}\n' for n, (name, events) in enumerate(lines.items()))
    data = ProfileData.text_proto_to_serialized_xspace(f'planes {{ id: 1 name: "/device:GPU:3" {text} }}')
    (tmp_path / "a.xplane.pb").write_bytes(data)
    ((device, spans),) = read(tmp_path / "a.xplane.pb").devices.items()
    decode = breakdown(spans, 1, {})["decode"]
    assert device == 3 and decode["steps"] == 1 and decode["kernels"] == 2
    times = [decode[name] * 1e3 for name in ("compute", "unhidden", "hidden", "launch", "idle")]
    assert times == pytest.approx([50, 20, 10, 0, 0])
    assert decode["parts"] == {"mlp": {"compute": pytest.approx(0.05), "communication": pytest.approx(0.03)}}


def test_an_h200s_trace(capsys, monkeypatch):
    # CUDA graphs of an 8B model, cut down to two layers: the end of a dispatch, and the next with a last step that was
    # cut; before them what a compiler tries out
    (spans,) = read(Path(__file__).parent / "data" / "h200_decode.xplane.pb").devices.values()
    found = breakdown(spans, 1, {})
    assert set(found) == {"decode"} and found["decode"]["steps"] == 2
    kernels = Counter((each.op.rstrip("_.0123456789"), "/".join(each.scope.split("/")[4:-1])) for each in spans)
    for slot, times in ((0, 3), (1, 2)):
        layer = f"layer_slot_{slot}"
        assert kernels["fusion", f"{layer}/attention"] == kernels["fusion", f"{layer}/mlp"] == times  # one kernel
        assert kernels["custom-call", f"{layer}/attention"] == kernels["custom-call", f"{layer}/mlp"] == times  # cuBLAS
        assert kernels["pallas_call", f"{layer}/attention/paged_attention/decode_attention"] == times
    assert kernels["gemm_fusion_dot_general", "head"] == 2
    parts = {name: times["compute"] for name, times in found["decode"]["parts"].items()}
    assert sum(parts.values()) == pytest.approx(
        found["decode"]["compute"], rel=0.05
    )  # a kernel begins before others end
    assert 0.25 < parts["head"] < 0.27 and 2 * 0.1 < parts["mlp"] < 3 * 0.1 and parts["other"] < 0.02
    # the device waited for what tried things out: no idle time of decode, and no compute
    assert 0.05 < left_out(spans) < 0.2 and found["decode"]["idle"] < 0.06
    monkeypatch.setenv("COLUMNS", "80")
    times = found["decode"] | {"idle": 1234.5}
    show([{"rank": 127, "device": 7, "stage": 15, "programs": {"decode": times}, "left_out": left_out(spans)}], "p")
    shown = capsys.readouterr().err
    assert "left out: 0." in shown and "1,234.5" in shown and "kern." in shown and "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_kernels_with_the_name_of_a_library():
    def scope(part):
        return f"jit(decode)/while/body/{part}"

    program = Program(
        {
            "fusion.7": Instruction("fusion", scope("attention/mul"), "fusion"),
            "custom-call.1": Instruction("custom-call", scope("attention/dot"), ""),
            "all-reduce.1": Instruction("all-reduce", scope("attention/psum"), ""),
            "custom-call.2": Instruction("custom-call", scope("decode_layers/ffi_call"), ""),
            "fusion.8": Instruction("fusion", scope("mlp/mul"), "fusion"),
        },
        ["fusion.7", "custom-call.1", "all-reduce.1", "custom-call.2", "fusion.8"],
    )
    names = ["fusion_7", "Memset 0", "nvjet_tss", "ncclDevKernel_AllReduce", "fusion_7", "MemcpyD2D", "fusion_7"]
    found = list(program.attribute((name, "command_buffer_1") for name in names))
    assert [op for op, _ in found] == [
        *("fusion.7", "custom-call.1", "custom-call.1", "all-reduce.1", "fusion.8", "MemcpyD2D", "fusion.7")
    ]
    assert found[5][1].scope == scope("mlp/mul")  # nothing there would launch it: with the one before
    ((op, instruction),) = program.attribute([("whatever", "custom-call.2")])  # outside of a graph
    assert op == "custom-call.2" and instruction.scope == scope("decode_layers/ffi_call")


def message(*fields):
    """Protobuf: (number, integer or bytes) each."""

    def varint(value):
        return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)

    parts = []
    for number, value in fields:
        if isinstance(value, int):
            parts.append(varint(number << 3) + varint(value))
        else:
            parts.append(varint(number << 3 | 2) + varint(len(value)) + value)
    return b"".join(parts)


def test_a_programs_order_and_scopes():
    """The tick of a stage: a sum that XLA fused, a branch, the head; weights that XLA converts ahead of all."""
    numbers = iter(range(1, 99))

    def instruction(name, opcode, scope="", operands=(), calls=()):
        number = next(numbers)
        fields = [(1, name.encode()), (2, opcode.encode()), (7, message((2, scope.encode()))), (35, number)]
        fields += [(36, each) for each in operands] + [(38, each) for each in calls]
        return number, message(*fields)

    tick = "jit(decode)/while/body"
    converts, kept = (
        instruction("wrapped_convert.1", "fusion"),
        instruction("wrapped_convert.2", "fusion", "XlaModule:"),
    )
    summed = instruction("psum.7-fusion.1", "fusion", f"{tick}/embed/all_reduce_stage_tensor/psum")
    masked = instruction("select_fusion", "fusion", f"{tick}/all_reduce_stage/mul")
    branch = instruction("gemm_fusion_dot.2", "fusion", f"{tick}/stage/layer_01_x/mlp/dot_general", [converts[0]])
    choice = instruction("cond", "conditional", f"{tick}/stage/layer_01_x/cond", [], [20])
    head = instruction("gemm_fusion_dot.1", "fusion", f"{tick}/head/dot_general", [kept[0]])
    ours = instruction("ffi_call.1", "custom-call", f"{tick}/stage/layer_02_x/mlp/down/all_reduce_tensor/ffi_call")
    entry = [kept, summed, masked, choice, ours, head]
    module = message(
        (3, message((1, b"branch"), (2, converts[1]), (2, branch[1]), (5, 20))),
        (3, message((1, b"entry"), *((2, each) for _, each in entry), (5, 10))),
        (
            7,
            message(
                (1, message((1, 10), (2, message(*((1, number) for number, _ in entry))))),
                (1, message((1, 20), (2, message((1, converts[0]), (1, branch[0]))))),
            ),
        ),
    )
    hlo = message((1, module))
    metadata = message((2, b"jit_decode(1)"), (5, message((6, hlo))))
    space = message((1, message((2, b"/host:metadata"), (4, message((1, 1), (2, metadata))))))
    ((name, program),) = programs(memoryview(space)).items()
    assert name == "jit_decode(1)"
    # what the branch runs stands where it runs: the head's kernel has the name of the branch's
    inside = ["wrapped_convert.1", "gemm_fusion_dot.2"]
    assert program.order == [
        "wrapped_convert.2",
        "psum.7-fusion.1",
        "select_fusion",
        *inside,
        "ffi_call.1",
        "gemm_fusion_dot.1",
    ]
    scopes = {name: each.scope for name, each in program.instructions.items()}
    assert scopes["wrapped_convert.1"] == scopes["gemm_fusion_dot.2"]
    assert scopes["wrapped_convert.2"] == scopes["gemm_fusion_dot.1"]
    exchanging = {name for name, each in program.instructions.items() if each.exchanges}
    assert exchanging == {"psum.7-fusion.1", "ffi_call.1"}
    kernels = ["wrapped_convert_1", "psum_7_fusion_1", "select_fusion", "gemm_fusion_dot_1", "all_reduce"]
    found = [
        op for op, _ in program.attribute((kernel, "command_buffer") for kernel in [*kernels, "gemm_fusion_dot_1"])
    ]
    assert found[3:] == ["gemm_fusion_dot.2", "ffi_call.1", "gemm_fusion_dot.1"]


def test_a_real_trace(tmp_path, capsys):
    make_hf_folder(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "ckpt", quiet=True)
    engine = make_engine(tmp_path / "ckpt", "stage=2,tensor=2")
    profile = Profile(tmp_path / "traces", 4, 6, rank=3)
    for name in range(4):
        engine.add(Request(str(name), [3, 4, 5], SamplingParams(max_new_tokens=40, ignore_eos=True)))
    while engine.has_unfinished():
        profile.before(engine.steps, engine)
        engine.step()
    profile.finish(engine)
    assert len(list((tmp_path / "traces" / "rank-3").rglob("*.xplane.pb"))) == 1
    (window,) = profile.windows
    devices = own_devices(window.folder, engine.mesh, 3, lambda value: [value])
    assert [(each["rank"], each["device"], each["stage"]) for each in devices] == [(3, n, n // 2) for n in range(4)]
    for each in devices:
        decode = each["programs"]["decode"]
        assert decode["steps"] == 3 * 4  # three dispatches
        assert min(decode[name] for name in ("compute", "transfer", "kernels")) > 0
        assert decode["transfer"] + decode["waiting"] == pytest.approx(decode["unhidden"])
        computing, communicating = (
            {name for name, times in decode["parts"].items() if times[kind]} for kind in ("compute", "communication")
        )
        assert computing >= {"attention", "paged_attention", "mlp", "head", "sample", "embed"}
        assert communicating >= {"attention", "mlp", "embed"} and "paged_attention" not in communicating
        in_parts = sum(sum(times.values()) for times in decode["parts"].values())
        assert in_parts > 0.99 * (decode["compute"] + decode["unhidden"])
    assert profile.windows == [Window("as-run", tmp_path / "traces" / "rank-3" / "as-run", 4, 6, 3, True)]  # on a CPU
    ((newest,), mesh) = (tmp_path / "traces" / "rank-3").rglob("*.xplane.pb"), engine.mesh
    for spans in read(newest).devices.values():  # what is there says the same as the count of the host
        assert breakdown(spans, mesh.shape["stage"], {})["decode"]["steps"] == 3 * 4
    show(devices, "steps 4 to 6")
    shown = capsys.readouterr().err
    assert "steps 4 to 6: ms per decode step" in shown and "paged_attention" in shown


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 9, 14, 23, 30, 43, 1000])
@pytest.mark.parametrize("asked", [(0, 0), (20, 30), (3, 5), (500, 500)])
@pytest.mark.parametrize("windows", [1, 2])
def test_steps_that_never_come_are_not_waited_for(steps, asked, windows):
    first, last = clamped(*asked, steps, windows)
    count = last - first + 1
    assert 0 <= first <= asked[0] and 1 <= count <= asked[1] - asked[0] + 1
    if asked[0] + taken(asked[1] - asked[0] + 1, windows) <= steps:
        assert (first, last) == asked
    elif steps >= taken(1, windows):
        assert first + taken(count, windows) <= steps
        assert first + taken(count, windows) == steps or first == asked[0]
        assert first >= min(asked[0], steps // 4)


class Apart(Engine):
    """As if programs of a CPU had command buffers; it takes the option of XLA's, which changes nothing there."""

    options = WITHOUT_COMMAND_BUFFERS

    def drop_command_buffers(self):
        self._runner.programs.set_apart(self.options)
        return True


class Refused(Apart):
    options: typing.ClassVar = {"xla_no_such_option": ""}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Apart, Refused])
def test_a_second_window_has_programs_of_its_own(tmp_path, kind):
    make_hf_folder(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "ckpt", quiet=True)
    config = EngineConfig(dtype="float32", max_batch=4, prefill_chunk=32, decode_steps=4)
    engine, profile = kind(tmp_path / "ckpt", config), Profile(tmp_path / "traces", 3, 5, rank=0)
    passes, times = [], []
    for traced in (True, False):
        tokens, compiling, began = {}, [], engine.steps
        for name in range(4):
            engine.add(Request(str(name), [3, 4, 5], SamplingParams(max_new_tokens=50, ignore_eos=True)))
        while engine.has_unfinished():
            if traced:
                profile.before(engine.steps - began, engine)
            tokens |= {update.request_id: update.output.token_ids for update in engine.step() if update.output}
            compiling.append(engine.stats.compile_seconds)
        profile.finish(engine)
        assert engine._runner.programs._apart == {}  # later steps run as ever
        passes.append(tokens)
        times.append(compiling)
    assert passes[0] == passes[1] and len(tokens) == 4
    assert times[1][0] == times[1][-1] == times[0][-1]
    folder = tmp_path / "traces" / "rank-0"
    as_run = Window("as-run", folder / "as-run", 3, 5, 3, True)
    if kind is Refused:
        assert profile.windows == [as_run] and "xla_no_such_option" in profile.why
        return
    assert profile.windows == [as_run, Window("structure", folder / "structure", 7, 9, 3, False)]
    assert len(list((folder / "structure").rglob("*.xplane.pb"))) == 1
    # compiled ahead of it, and counted as such
    assert times[0][4] == times[0][5] < times[0][6] == times[0][-1]
