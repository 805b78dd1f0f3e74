"""What a trace calls the work on the devices: stage, layer, part, collective."""

import json
import re

import jax.numpy as jnp
import pytest

from hf_models import make_hf_folder
from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.emit import Features
from jaxinfer.engine.forward import Decoder
from jaxinfer.engine.programs import Program, Programs
from jaxinfer.models.families import from_hf
from jaxinfer.parallel.axes import parse_mesh
from jaxinfer.parallel.mesh import make_mesh
from jaxinfer.parallel.placement import Rules
from jaxinfer.telemetry.phases import Phases
from test_families import FAMILIES

WORK = re.compile(r"(dot|convolution|gather|scatter|sort|custom-call|exponential|all-\w+|collective-\w+)$")
LAYER = r"stage/layer_\d\d(_(\d\d|x))*/(attention|mlp)/"
OTHERS = "stage/angles|embed|head|sample|logprobs|bookkeeping|all_reduce_stage|send_stage|all_gather_data"
NAMED = re.compile(rf"{LAYER}|({OTHERS})(/|$)")
COLLECTIVE = re.compile(r"(all_reduce|all_gather|all_to_all|send)_(stage|data|tensor)(_tensor)?/[^/]*$")


def lowered(folder, family, kind, features):
    make_hf_folder(folder, family, **FAMILIES[family])
    model = from_hf(json.loads((folder / "config.json").read_text()))
    config = EngineConfig(mesh=parse_mesh("stage=2,tensor=2"), max_batch=4, prefill_chunk=32, decode_steps=4)
    decoder = Decoder(model, (model.num_layers - 1, 1))
    programs = Programs(decoder, config, make_mesh(config.mesh), Rules(), jnp.float32, 9, None, lambda: None, Phases())
    shape = (2, 0) if kind == "decode" else config.prefill_shapes()[0]
    return programs.lower(Program(kind, *shape, 2, features, features.adjust))


def names(compiled: str) -> list[tuple[str, str]]:
    """(opcode, op_name) of each instruction that works."""
    found = []
    for line in compiled.splitlines():
        each = re.match(r"\s+(?:ROOT )?%?\S+ = .*? ([a-z][a-z-]*)\(", line)
        if each and WORK.match(each[1]):
            name = re.search(r'op_name="([^"]*)"', line)
            found.append((each[1], name[1] if name else ""))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", "decode"),
        ("llama", "prefill"),
        *(pytest.param(family, "decode", marks=pytest.mark.long) for family in FAMILIES if family != "llama"),
    ],
)
def test_all_that_works_has_the_name_of_its_part(tmp_path, family, kind):
    features = Features(sample=True, adjust=True, logprobs=True, score=kind == "prefill")
    program = lowered(tmp_path / "hf", family, kind, features)
    found = names(program.compile({"xla_backend_optimization_level": 0}).as_text())
    assert sum(opcode == "dot" for opcode, _ in found) >= 5
    assert {each for each in found if each[1] and not NAMED.search(each[1])} == set()
    lost = [each for each in found if not each[1]]
    assert len(lost) < 0.1 * len(found), lost  # XLA drops the names of some that it rewrites
    collectives = [name for opcode, name in found if re.match("all-|collective-", opcode)]
    assert len(collectives) >= 5 and [each for each in collectives if not COLLECTIVE.search(each)] == []
