"""What XLA makes of the programs: no step may write a weight or a cache pool anew, in whatever layout."""

import math
import re

import jax
import pytest

from convert.run import convert
from engine_run import make_engine
from hf_models import make_hf_folder
from jaxinfer.engine.params import SamplingParams
from jaxinfer.engine.request import Request

# sizes that give every weight and pool a number of elements that no activation has
MODEL = {
    "vocab_size": 347,
    "hidden_size": 88,
    "intermediate_size": 184,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 12,
    "tie_word_embeddings": False,
}
# for split-K products XLA pads weights of odd width, so writes them anew; real models' widths are multiples of 64
GPU_MODEL = MODEL | {"vocab_size": 2752, "hidden_size": 704, "intermediate_size": 1600, "head_dim": 96}
ENGINE = {"max_batch": 4, "prefill_chunk": 26, "max_context": 64}
# what names, joins or hands on arrays that are there already
PASSES_ON = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call"}
IN_PLACE = (" scatter(", " dynamic-update-slice(", "output_to_operand_aliasing")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([a-z][a-z0-9-]*)\(")


def computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation by its name."""
    found, lines = {}, []
    for line in text.splitlines():
        if heading := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            lines = found[heading[1]] = []
        else:
            lines.append(line)
    return found


def written_anew(text: str, sizes: set[int]) -> list[str]:
    """The instructions that write an array of so many elements to new memory."""
    parts = computations(text)
    fused = {name for lines in parts.values() for line in lines for name in re.findall(r"calls=%?([\w.-]+)", line)}
    found = []
    for line in (line for name, lines in parts.items() if name not in fused for line in lines):
        match = INSTRUCTION.match(line)
        if match is None or match[2] in PASSES_ON or match[2].endswith("-done"):
            continue
        shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
        inside = [other for name in re.findall(r"calls=%?([\w.-]+)", line) for other in parts[name]]
        in_place = any(each in other for other in [line, *inside] for each in IN_PLACE)
        if not in_place and any(math.prod(map(int, filter(None, shape.split(",")))) in sizes for shape in shapes):
            found.append(line.strip())
    return found


def converted(folder, model: dict):
    make_hf_folder(folder / "hf", num_hidden_layers=3, **model)
    convert(folder / "hf", folder / "ckpt", quiet=True)
    return folder / "ckpt"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return converted(tmp_path_factory.mktemp("hlo"), MODEL)


@pytest.fixture(scope="module")
def gpu_checkpoint(tmp_path_factory):
    return converted(tmp_path_factory.mktemp("gpu"), GPU_MODEL)


def check_programs(checkpoint, mesh: str, dtype: str, requests: int = 4) -> None:
    engine = make_engine(checkpoint, mesh, dtype=dtype, **ENGINE | {"max_batch": max(4, requests)})
    for name in range(requests):
        engine.add(Request(str(name), [3, 4, 5], SamplingParams(max_new_tokens=6, ignore_eos=True)))
    while engine.has_unfinished():
        engine.step()
    engine.wait_loaded()
    runner = engine._runner
    weights = {each.addressable_data(0).size for each in jax.tree.leaves(runner._params)}
    matrices = {size for size in weights if size > engine.model.hidden_size}  # norms are as small as an activation
    pools = [each.addressable_data(0).size for each in (*runner._state.k, *runner._state.v)]
    programs = [(key.kind, program.as_text()) for key, program in runner.programs.compiled().items()]
    assert {name for name, _ in programs} == {"decode", "prefill"}
    for name, text in programs:
        assert not written_anew(text, matrices | set(pools)), name
        donated = {int(output) for output in re.findall(r"\{(\d+)\}: \(\d+, \{\}", text.partition("\n")[0])}
        assert donated >= set(range(len(pools))), name  # the pools are the first outputs


# one row, and with tensor=4 one KV head per device: what XLA makes copies of most easily
@pytest.mark.parametrize(
    "mesh, requests",
    [("", 4), ("", 1), pytest.param("tensor=2", 4, marks=pytest.mark.slow), ("tensor=4", 1), ("stage=2", 4)],
)
def test_no_step_writes_weights_or_cache_anew(checkpoint, mesh, requests):
    check_programs(checkpoint, mesh, "float32", requests)


# without tensor parallelism, one launch does all layers of up to 4 rows; 9 go layer by layer on each stage
@pytest.mark.gpu
@pytest.mark.parametrize("requests", [1, 4, 9])
@pytest.mark.parametrize("mesh", ["", "tensor=2", "tensor=4", "stage=2"])
def test_nor_on_a_gpu(gpu_checkpoint, mesh, requests):
    needed = int(mesh[-1:] or 1)
    if jax.device_count() < needed:
        pytest.skip(f"{mesh} needs {needed} GPUs, found {jax.device_count()}")
    check_programs(gpu_checkpoint, mesh, "bfloat16", requests)
