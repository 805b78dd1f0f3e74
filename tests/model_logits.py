"""Logits of a checkpoint through the project's own stage code, chunk by chunk, on any mesh: what tests compare."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from convert.run import convert
from hf_models import make_hf_folder
from jaxinfer.checkpoint.load import load
from jaxinfer.checkpoint.reader import Reader
from jaxinfer.engine.forward import Decoder
from jaxinfer.models.config import ModelConfig
from jaxinfer.parallel import collectives
from jaxinfer.parallel.axes import parse_mesh
from jaxinfer.parallel.mesh import make_mesh, mesh_sizes
from jaxinfer.parallel.placement import Parameter, Rules, local_size, partition_spec
from jaxinfer.parallel.stages import balance

TOLERANCE = 2e-4
VOCABULARY = 131  # prime: no mesh divides it
TOKENS = 70


def logits(reader, model, tokens, mesh="", stage_layers=None, chunks=None, page_size=16, dtype=np.float32):
    """tokens [T] to float32 logits [T, V]; `reader` is of the checkpoint, `chunks` the lengths to cut T into."""
    mesh = make_mesh(parse_mesh(mesh))
    sizes, rules = mesh_sizes(mesh), Rules()
    stages = sizes["stage"]
    decoder = Decoder(model, stage_layers or balance(model.num_layers, stages))
    parameters = decoder.parameters()
    params = load(reader, parameters, mesh, rules, dtype)
    specs = jax.tree.map(lambda p: partition_spec(p, rules), parameters, is_leaf=lambda p: isinstance(p, Parameter))
    pages = -(-len(tokens) // page_size) + 1
    kv_heads = local_size("kv_heads", model.num_kv_heads, rules, sizes) * sizes["tensor"]
    pool_spec = P("stage", "data", None, None, "tensor", None)
    shape = (stages, sizes["data"], pages, page_size, kv_heads, model.head_dim)
    pools = tuple(
        [jax.device_put(jnp.zeros(shape, dtype), NamedSharding(mesh, pool_spec)) for _ in decoder.slots] for _ in "kv"
    )
    # a shuffled table: page order must not matter
    table = jnp.asarray(np.random.default_rng(0).permutation(np.arange(1, pages))[None], jnp.int32)

    @jax.jit
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(specs, ([pool_spec] * len(decoder.slots),) * 2, P(), P()),
        out_specs=(P(None, ("stage", "tensor")), ([pool_spec] * len(decoder.slots),) * 2),
        check_vma=False,
    )
    def run(params, pools, tokens, start):
        with jax.default_matmul_precision("highest"):
            ends = decoder.ends(params["ends"])
            positions = start + jnp.arange(tokens.shape[0])[None]
            x = ends.embedding(tokens, positions[0])[None]
            stage = jax.lax.axis_index("stage")
            for turn in range(stages):  # each stage in its turn; the others' passes write to the null page
                at = jnp.where(stage == turn, positions, -1)
                lengths = jnp.asarray([prompt_length])
                y, pools = decoder.run_stage(params, pools, x, at, lengths, table)
                x = collectives.to_next_stage(y) if turn < stages - 1 else collectives.from_last_stage(y)
            return ends.logits(x[0]), pools

    prompt_length = len(tokens)
    out, start = [], 0
    for size in chunks or [len(tokens)]:
        part, pools = run(params, pools, jnp.asarray(tokens[start : start + size]), start)
        out.append(np.asarray(part)[:, : model.vocab_size])
        start += size
    return np.concatenate(out)


def compare(
    tmp_path, family="llama", mesh="", tokens=TOKENS, chunks=None, stage_layers=None, page_size=16, **overrides
):
    """Logits of a tiny random model of a family (hf_models.py) against transformers', in float32, within TOLERANCE.

    overrides: fields of its config."""
    sizes = {"vocab_size": VOCABULARY, "num_hidden_layers": 3, "max_position_embeddings": 128}
    model = make_hf_folder(tmp_path / "hf", family, **sizes | {"attn_implementation": "eager"} | overrides)
    convert(tmp_path / "hf", tmp_path / "ckpt")
    prompt = np.random.default_rng(1).integers(0, VOCABULARY, tokens)
    with torch.no_grad():
        expected = model(torch.tensor(prompt)[None]).logits[0].numpy()
    reader = Reader(tmp_path / "ckpt")
    config = ModelConfig.from_json(reader.manifest.model)
    found = logits(reader, config, prompt, mesh, stage_layers, chunks, page_size)
    assert np.abs(expected).max() > 0.5, "a model that says nothing proves nothing"
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)
