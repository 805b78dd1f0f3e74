"""One stage's layers over its part of the paged cache. Runs on one device's shard inside `jax.shard_map`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.models import llama
from jaxinfer.models.block import Ops as LayerOps
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.ends import Ends
from jaxinfer.models.families import leaves
from jaxinfer.models.layers import layer_class
from jaxinfer.ops import alibi, rope
from jaxinfer.ops.add_norm import add_rms_norm
from jaxinfer.ops.attention import paged_attention, rotate_and_write
from jaxinfer.ops.cuda import Gpu
from jaxinfer.ops.decode_attention import decode_attention
from jaxinfer.ops.decode_layers import Sizes, decode_layers, fits
from jaxinfer.ops.norm import add_then_norm
from jaxinfer.ops.prefill_attention import prefill_attention
from jaxinfer.ops.rope_write import rope_and_write
from jaxinfer.parallel import collectives
from jaxinfer.parallel.placement import Parameter
from jaxinfer.parallel.stages import slots

Arrays = Mapping[str, jax.Array]
NO_WINDOW = 2**30


class Ops(NamedTuple):
    """What layers are made of beside matmuls: plain forms, or the kernels that do the same."""

    add_norm: Callable
    rope_and_write: Callable
    decode_attention: Callable
    prefill_attention: Callable


def _ops(kernels: str) -> Ops:
    if kernels == "off":
        return Ops(add_then_norm, rotate_and_write, paged_attention, paged_attention)
    fused = add_rms_norm, rope_and_write, decode_attention, prefill_attention
    return Ops(*(partial(each, interpret=kernels == "interpret") for each in fused))


@dataclass(frozen=True)
class Decoder:
    """The model over its stages: Flax describes it once, the steps bind plain dicts of arrays to that description."""

    config: ModelConfig
    stage_layers: tuple[int, ...]
    kernels: str = "off"  # on, off, or interpret: the kernels' own code, slowly, without a GPU
    gpu: Gpu | None = None  # where layers can run in one launch

    @cached_property
    def slots(self) -> list[tuple[int | None, ...]]:
        return slots(self.stage_layers)

    @cached_property
    def _described(self) -> tuple[Any, list[Any]]:
        table, layer = leaves(self.config), layer_class(self.config)
        ends = nnx.split(Ends(self.config, table))
        return ends, [nnx.split(layer(self.config, table, layers)) for layers in self.slots]

    def parameters(self) -> dict[str, Any]:
        """The tree of `Parameter`s that the loader fills with arrays: ``{"ends": {...}, "layers": [{...}, ...]}``."""
        (_, ends), layers = self._described
        return {"ends": dict(nnx.to_pure_dict(ends)), "layers": [dict(nnx.to_pure_dict(state)) for _, state in layers]}

    def ends(self, arrays: Arrays) -> Ends:
        graph, state = self._described[0]
        return _bind(graph, state, arrays)

    @jax.named_scope("stage")
    def run_stage(
        self,
        params: Mapping[str, Any],
        pools: tuple[list[jax.Array], list[jax.Array]],
        x: jax.Array,
        positions: jax.Array,
        lengths: jax.Array,
        tables: jax.Array,
        last: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[list[jax.Array], list[jax.Array]]]:
        """x [B, T, H] through this stage's layers; positions [B, T] are -1 where a token is not live;
        lengths [B]: see `rope.angles`.

        Pools are local, [1, 1, P, page_size, K, D] per layer slot. Returns x, and the pools with new keys and values.
        With `last` [B], where there is one stage, only that token of each row comes out, [B, 1, H]: nobody reads the
        others once the last layer has cached their keys and values.
        """
        stage = jax.lax.axis_index("stage")
        config = self.config
        with jax.named_scope("angles"):
            if config.rope is None:
                cos, sin = rope.no_angles(config.head_dim, positions)
            else:
                cos, sin = rope.angles(config.rope, config.head_dim, positions, lengths)
        ops = _ops(self.kernels)
        decodes = x.shape[1] == 1
        attention = ops.decode_attention if decodes else ops.prefill_attention
        scores = {"scale": config.query_scale, "softcap": config.attention_softcap}
        if config.alibi:  # no kernel knows it
            attention, scores["slopes"] = paged_attention, alibi.own_slopes(config.num_heads)
        reduce = partial(collectives.tensor_sum, peers=params.get("peers") if decodes else None)
        k_pools, v_pools = list(pools[0]), list(pools[1])
        together = self._together(x, k_pools[0].shape[3])
        if together is not None:
            with jax.named_scope("decode_layers"):
                x, k_pools[: together.layers], v_pools[: together.layers] = self._run_together(
                    together, params, (k_pools, v_pools), x, cos, sin, positions, tables, stage
                )
        delta = None  # what the layers so far have yet to add to x
        done = 0 if together is None else together.layers
        for slot, layers in enumerate(self.slots[done:], done):
            graph, state = self._described[1][slot]
            layer = _bind(graph, state, {name: array[0] for name, array in params["layers"][slot].items()})
            window = self._window(layers, stage)

            needed = partial(_token, index=last if slot == len(self.slots) - 1 else None)

            def run(x, delta, k_pool, v_pool, layer=layer, window=window, needed=needed):
                written = []

                def attend(qkv):
                    with jax.named_scope("rope_and_write"):
                        q, *pools = ops.rope_and_write(qkv, cos, sin, k_pool[0, 0], v_pool[0, 0], tables, positions)
                    written.extend(pool[None, None] for pool in pools)
                    with jax.named_scope("paged_attention"):
                        return attention(q, *pools, tables, positions, window, **scores)

                return *layer(x, delta, LayerOps(attend, ops.add_norm, reduce, needed)), *written

            def run_alone(x, k_pool, v_pool, run=run):
                x, delta, *written = run(x, None, k_pool, v_pool)
                return _added(x, delta), *written

            with jax.named_scope(layer_name(layers)):
                here = [layer is not None for layer in layers]
                if all(here):
                    x, delta, k_pools[slot], v_pools[slot] = run(x, delta, k_pools[slot], v_pools[slot])
                else:  # an empty slot costs no compute; all ranks of a tensor group take the same branch
                    x, delta = _added(x, delta), None  # of the layer before
                    x, k_pools[slot], v_pools[slot] = jax.lax.cond(
                        jnp.array(here)[stage], run_alone, lambda *same: same, x, k_pools[slot], v_pools[slot]
                    )
        with jax.named_scope(layer_name(self.slots[-1])):
            return _added(x, delta), (k_pools, v_pools)

    def _together(self, x: jax.Array, page: int) -> Sizes | None:
        """The layers that one launch can do: decoding few rows, without tensor parallelism, slots that no stage leaves
        empty."""
        full = [slot for slot, layers in enumerate(self.slots) if None not in layers]
        config, alone = self.config, jax.lax.axis_size("tensor") == 1
        if self.kernels != "on" or self.gpu is None or x.shape[1] > 1 or not alone or not full:
            return None
        if not llama.in_one_launch(config):
            return None
        biases = {"qkv_bias": config.qkv_bias, "o_bias": config.o_bias}
        biases |= {"gate_up_bias": config.mlp_bias, "down_bias": config.mlp_bias}
        sizes = Sizes(
            rows=x.shape[0],
            width=config.hidden_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            mlp=config.mlp_width,
            layers=len(full),
            page=page,
            eps=config.norm_eps,
            half=x.dtype == jnp.float16,
            activation=config.activation,
            biases=tuple(name for name, there in biases.items() if there),
        )
        return sizes if fits(sizes, self.gpu) else None

    def _run_together(self, sizes, params, pools, x, cos, sin, positions, tables, stage):
        slots = range(sizes.layers)
        windows = [self._window(self.slots[slot], stage) for slot in slots]
        windows = jnp.array([NO_WINDOW if window is None else window for window in windows], jnp.int32)
        layers = [{name: array[0] for name, array in params["layers"][slot].items()} for slot in slots]
        local = [[pool[0, 0] for pool in each[: sizes.layers]] for each in pools]
        x, k_pools, v_pools = decode_layers(x, cos, sin, positions, tables, windows, layers, *local, sizes, self.gpu)
        return x, [pool[None, None] for pool in k_pools], [pool[None, None] for pool in v_pools]

    def _window(self, layers: tuple[int | None, ...], stage: jax.Array) -> jax.Array | None:
        windows = [None if layer is None else self.config.windows[layer] for layer in layers]
        if not any(windows):
            return None
        return jnp.array([window or NO_WINDOW for window in windows])[stage]


def layer_name(layers: tuple[int | None, ...]) -> str:
    """What a trace calls a layer slot, by the layers that the stages hold there: ``layer_07`` of one stage,
    ``layer_03_19`` of two, ``layer_15_x`` where the second holds none."""
    return "_".join(["layer", *("x" if layer is None else f"{layer:02}" for layer in layers)])


def _token(x: jax.Array, index: jax.Array | None) -> jax.Array:
    """Of each row of x [B, T, ...] the token at `index` [B], as [B, 1, ...]; all without an index."""
    return x if index is None else jnp.take_along_axis(x, index.reshape(-1, *(1,) * (x.ndim - 1)), axis=1)


def _added(x: jax.Array, delta: jax.Array | None) -> jax.Array:
    with jax.named_scope("mlp"):  # whose output it is
        return x if delta is None else x + delta


def _bind(graph: Any, state: Any, arrays: Arrays) -> Any:
    """The module with arrays in place of its parameters' descriptions; happens while tracing only."""
    bound = jax.tree.map(lambda leaf: leaf, state, is_leaf=lambda leaf: isinstance(leaf, Parameter))
    nnx.replace_by_pure_dict(bound, dict(arrays))
    return nnx.merge(graph, bound)
