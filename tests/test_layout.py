"""Meshes, splits and memory: what cannot be is refused with the dimension, the value and what is legal."""

import json
from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.run import convert
from hf_models import make_hf_folder
from jaxinfer.checkpoint.load import local_piece
from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.device import check_dtype
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.forward import Decoder
from jaxinfer.engine.memory import choose_batch, choose_chunk, plan_memory
from jaxinfer.models.families import from_hf
from jaxinfer.models.leaves import Leaf
from jaxinfer.parallel.axes import LayoutError, parse_mesh
from jaxinfer.parallel.mesh import make_mesh
from jaxinfer.parallel.placement import Parameter, Rules, check_layout, global_shape, local_shape, partition_spec
from jaxinfer.parallel.stages import balance, parse_stage_layers, slots

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}


def test_parse_mesh():
    assert parse_mesh("stage=2,tensor=4") == {"stage": 2, "data": 1, "tensor": 4}
    assert parse_mesh("") == {"stage": 1, "data": 1, "tensor": 1}


@pytest.mark.parametrize(
    "text, message",
    [
        ("pipeline=2", "unknown axis 'pipeline'.*stage, data, tensor"),
        ("stage=2,stage=2", "'stage' is given twice"),
        ("stage=0", "stage='0' is not a positive"),
        ("tensor", "tensor='' is not a positive"),
        ("tensor=2.5", "'2.5' is not a positive"),
    ],
)
def test_parse_mesh_refuses(text, message):
    with pytest.raises(LayoutError, match=message):
        parse_mesh(text)


def test_more_devices_than_there_are():
    with pytest.raises(LayoutError, match="stage=4,data=1,tensor=4 needs 16 devices, found 8"):
        make_mesh(parse_mesh("stage=4,tensor=4"))


def test_balance():
    assert balance(26, 4) == (7, 7, 6, 6)
    assert balance(80, 8) == (10,) * 8
    with pytest.raises(LayoutError, match="stage=7: the model has 6 layers; legal: 1 to 6"):
        balance(6, 7)


def test_parse_stage_layers():
    assert parse_stage_layers("7, 7,6,6", 26, 4) == (7, 7, 6, 6)
    for text, message in {
        "7,7,6": "gives 3 stages, the mesh has stage=4",
        "7,7,6,5": "adds up to 25 layers, the model has 26",
        "7,7,6,x": "not a list of positive whole numbers",
        "13,13,0,0": "not a list of positive whole numbers",
    }.items():
        with pytest.raises(LayoutError, match=message):
            parse_stage_layers(text, 26, 4)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_slots_hold_every_layer_once(stage_layers):
    held = slots(tuple(stage_layers))
    assert len(held) == max(stage_layers)
    for stage, count in enumerate(stage_layers):
        layers = [slot[stage] for slot in held]
        first = sum(stage_layers[:stage])
        assert layers == [*range(first, first + count), *[None] * (len(held) - count)]


@pytest.mark.parametrize("tensor", [1, 2, 4, 8, 16, 32, 64])
def test_llama_70b_runs_over(tensor):
    check_layout({"heads": 64, "kv_heads": 8, "mlp": 28672}, Rules(), {"stage": 1, "data": 1, "tensor": tensor})


def test_llama_70b_over_six_is_refused_with_every_reason():
    with pytest.raises(LayoutError) as error:
        check_layout({"heads": 64, "kv_heads": 8, "mlp": 28672}, Rules(), {"stage": 1, "data": 1, "tensor": 6})
    text = str(error.value)
    assert "heads=64 cannot be cut 6 ways (tensor); legal: 1, 2, 4, 8, 16, 32, 64" in text
    assert "kv_heads=8 cannot be cut 6 ways" in text and "or a multiple of 8" in text
    assert "mlp=28672 cannot be cut 6 ways" in text


def test_a_mesh_axis_used_twice_names_the_parameter():
    twice = Parameter("q", (("q", Leaf((4, 2, 8), ("heads", "head_dim", "embed"))),), 1)
    with pytest.raises(LayoutError, match="q: the rules use a mesh axis twice"):
        partition_spec(twice, Rules(embed=("tensor",)))


@given(
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([(4, 1), (4, 2), (4, 4), (8, 2)]),
    st.integers(5, 40),
)
def test_shards_put_together_are_the_leaves(stage, tensor, heads, vocabulary):
    """Queries, their output and vocabulary are cut without loss or overlap; each device holds its queries' KV head."""
    rules, sizes = Rules(), {"stage": stage, "data": 1, "tensor": tensor}
    queries, keys = heads
    table = {
        "q": Leaf((queries, 2, 6), ("heads", "head_dim", "embed")),
        "k": Leaf((keys, 2, 6), ("kv_heads", "head_dim", "embed")),
        "q_bias": Leaf((queries, 2), ("heads", "head_dim")),
        "k_bias": Leaf((keys, 2), ("kv_heads", "head_dim")),
        "o": Leaf((6, queries, 2), ("embed", "heads", "head_dim")),
        "embed": Leaf((vocabulary, 6), ("vocab", "embed")),
    }
    arrays = {name: np.random.default_rng(0).normal(size=leaf.shape) for name, leaf in table.items()}

    def local(parameter, **coords):
        coords = {"stage": 0, "data": 0} | coords
        piece = local_piece(parameter, rules, sizes, coords, np.float64)
        array = piece.allocate()
        for name, index, view in piece.views(array):
            view[...] = arrays[name][index]
        assert array.shape == local_shape(parameter, rules, sizes)
        return array

    qk = Parameter("qk", (("q", table["q"]), ("k", table["k"])), 1)
    biases = Parameter("biases", (("q_bias", table["q_bias"]), ("k_bias", table["k_bias"])), 0)
    own_queries = queries // tensor
    for rank in range(tensor):
        own = slice(rank * own_queries, (rank + 1) * own_queries)
        first = rank * own_queries // (queries // keys)
        last = ((rank + 1) * own_queries - 1) // (queries // keys)
        q, k = np.split(local(qk, tensor=rank), [own_queries * 2])
        assert (q == arrays["q"][own].reshape(-1, 6)).all()
        assert (k == arrays["k"][first : last + 1].reshape(-1, 6)).all()
        q, k = np.split(local(biases, tensor=rank), [own_queries * 2])
        assert (q == arrays["q_bias"][own].ravel()).all() and (k == arrays["k_bias"][first : last + 1].ravel()).all()
    o = Parameter("o", (("o", table["o"]),), 2)
    whole = np.concatenate([local(o, tensor=rank) for rank in range(tensor)], axis=1)
    assert whole.shape == global_shape(o, rules, sizes) and (whole == arrays["o"].reshape(6, -1)).all()
    embed = Parameter("embed", (("embed", table["embed"]),), 1)
    parts = [local(embed, stage=s, tensor=t) for s in range(stage) for t in range(tensor)]
    whole = np.concatenate(parts)
    assert whole.shape == global_shape(embed, rules, sizes)
    assert (whole[:vocabulary] == arrays["embed"]).all() and not whole[vocabulary:].any()


def test_memory_plan_counts_the_weights_to_the_byte(tmp_path):
    model = make_hf_folder(tmp_path / "hf", tie_word_embeddings=False)
    config = from_hf(json.loads((tmp_path / "hf" / "config.json").read_text()))
    plan = plan_memory(
        Decoder(config, (2,)),
        EngineConfig(prefill_chunk=512, max_batch=64),
        Rules(),
        parse_mesh(""),
        np.float32,
        config.max_context,
        10**9,
    )
    assert plan.weights == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert plan.page == 2 * 2 * 16 * prod((config.num_kv_heads, config.head_dim)) * 4


def test_what_does_not_fit_is_refused_before_it_is_loaded():
    config = from_hf(LLAMA_70B)
    decoder = Decoder(config, (80,))
    with pytest.raises(LayoutError) as error:
        plan_memory(
            decoder,
            EngineConfig(prefill_chunk=512, max_batch=64),
            Rules(),
            parse_mesh(""),
            np.float16,
            4096,
            80 * 2**30,
        )
    text = str(error.value)
    assert "weights 131563" in text, "137,953,820,672 bytes"
    assert "90% of 81920 MiB is 73728" in text
    sizes = parse_mesh("tensor=4")
    fits = plan_memory(
        decoder, EngineConfig(prefill_chunk=512, max_batch=64), Rules(), sizes, np.float16, 4096, 80 * 2**30
    )
    assert fits.weights + fits.workspace + fits.pages * fits.page <= 0.9 * 80 * 2**30


def test_chunk_and_workspace_with_and_without_kernels():
    """70B over 8 cards: activations of a large chunk fit beside the weights, gathered pages and scores do not."""
    config, sizes, rules = from_hf(LLAMA_70B), parse_mesh("tensor=8"), Rules()
    rest = rules, sizes, np.float16, 4096

    def chunk(kernels, limit, **settings):
        return choose_chunk(
            Decoder(config, (80,), kernels), EngineConfig(**{"max_batch": 64} | settings), *rest, limit * 2**30
        )

    assert chunk("off", 80) == chunk("interpret", 80) == 512
    assert chunk("on", 80) == 8192 and chunk("on", 80, prefill_chunk=100) == 100
    assert chunk("on", 80, max_batch=1) == 4096, "as much as one context"
    assert chunk("on", 19) == 2048, "a quarter of what the weights leave"

    def workspace(kernels, chunk, mesh="tensor=8"):
        settings, sizes = EngineConfig(prefill_chunk=chunk, max_batch=64, kernels=kernels), parse_mesh(mesh)
        decoder = Decoder(config, balance(80, sizes["stage"]), kernels)
        return plan_memory(decoder, settings, rules, sizes, np.float16, 4096, 80 * 2**30).workspace

    hidden, mlp, heads = 8192, 28672 // 8, 64 // 8 * 128
    assert workspace("on", 8192) > 8192 * (4 * hidden + 3 * mlp + 3 * heads) * 2
    assert workspace("on", 8192) < workspace("off", 8192) / 2
    ticks = 8192 + 8192 + 2048 + 512  # tokens of the sizes that there are, each with what is between the stages
    between = workspace("on", 8192, "stage=2,tensor=8") - workspace("on", 8192)
    assert 0.9 < between / (ticks * hidden * 2) < 1, "two stages hold those, and half of one stage's logits"


def test_batch_fills_the_cache_where_kernels_run():
    config, rules = from_hf(LLAMA_70B), Rules()

    def batch(kernels, mesh, context, **settings):
        decoder = Decoder(config, (80,), kernels)
        where = rules, parse_mesh(mesh), np.float16, context, 80 * 2**30
        return choose_batch(decoder, EngineConfig(**settings), *where)

    assert batch("off", "tensor=8", 1280) == batch("interpret", "tensor=8", 1280) == 64
    # 40 KiB of cache per token and card, some 55 GiB beside the weights
    assert batch("on", "tensor=8", 1280) == 1024
    assert batch("on", "tensor=8", 131072) == 1024, "the admission sees to it that those which are long have room"
    assert batch("on", "tensor=2", 4096) == 128, "little is left beside the weights"
    assert batch("on", "tensor=8", 1280, max_batch=7) == 7


def test_prefill_shapes():
    def shapes(chunk, **settings):
        return EngineConfig(prefill_chunk=chunk, **{"max_batch": 64} | settings).prefill_shapes()

    assert shapes(512) == ((1, 512), (4, 128), (16, 32)) and shapes(26, max_batch=3) == ((1, 26),)
    assert shapes(8192) == ((16, 512), (256, 32), (64, 32), (16, 32))
    assert shapes(3000) == ((5, 512), (80, 32), (16, 32)), "never more than the chunk"
    assert shapes(8192, kernels="off") == ((1, 8192), (4, 2048), (16, 512)), "the plain form gathers each row's pages"
    assert EngineConfig(prefill_chunk=8192, max_batch=256).ticks_per_block() == 8
    assert EngineConfig(prefill_chunk=512, max_batch=256).ticks_per_block() == 128


def test_the_engine_refuses_before_it_allocates(tmp_path):
    make_hf_folder(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "ckpt", quiet=True)
    for config, message in [
        (EngineConfig(mesh={"tensor": 3}), "heads=4 cannot be cut 3 ways"),
        (EngineConfig(mesh={"stage": 3}), "stage=3: the model has 2 layers"),
        (EngineConfig(mesh={"stage": 2}, stage_layers=(2, 1)), "adds up to 3 layers, the model has 2"),
        (EngineConfig(mesh={"stage": 2}, stage_layers=(2, 0)), "leaves a stage without a layer"),
        (EngineConfig(pages=4), "pages: 4 is too few for one context of 128 tokens; legal: at least 9"),
        (EngineConfig(memory_fraction=1e-6), "memory: needs"),
    ]:
        with pytest.raises(LayoutError, match=message):
            Engine(tmp_path / "ckpt", config)


@dataclass
class Card:
    """What JAX says of a device, for cards that are not here."""

    compute_capability: str
    device_kind: str


def test_bfloat16_is_refused_where_the_card_has_none():
    with pytest.raises(LayoutError, match=r"Tesla T4 has 7\.5; legal here: float16, float32"):
        check_dtype(jnp.dtype("bfloat16"), Card("7.5", "Tesla T4"))
    check_dtype(jnp.dtype("float16"), Card("7.5", "Tesla T4"))
    check_dtype(jnp.dtype("bfloat16"), Card("8.0", "NVIDIA A100-SXM4-40GB"))
    check_dtype(jnp.dtype("bfloat16"), Card("gfx90a", "AMD Instinct MI250X"))
    check_dtype(jnp.dtype("bfloat16"), jax.local_devices()[0])
