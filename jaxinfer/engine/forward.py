"""One stage's layers over its part of the paged cache. Runs on one device's shard inside `jax.shard_map`."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.llama import Ends, Layer
from jaxinfer.ops import rope
from jaxinfer.ops.attention import paged_attention, write_pages
from jaxinfer.ops.decode_attention import decode_attention
from jaxinfer.ops.prefill_attention import prefill_attention
from jaxinfer.parallel.placement import Parameter
from jaxinfer.parallel.stages import slots

Arrays = Mapping[str, jax.Array]
NO_WINDOW = 2**30


@dataclass(frozen=True)
class Decoder:
    """The model over its stages: Flax describes it once, the steps bind plain dicts of arrays to that description."""

    config: ModelConfig
    stage_layers: tuple[int, ...]
    kernels: str = "off"  # on, off, or interpret: the kernels' own code, slowly, without a GPU

    @cached_property
    def slots(self) -> list[tuple[int | None, ...]]:
        return slots(self.stage_layers)

    @cached_property
    def _described(self) -> tuple[Any, list[Any]]:
        return nnx.split(Ends(self.config)), [nnx.split(Layer(self.config, layers)) for layers in self.slots]

    def parameters(self) -> dict[str, Any]:
        """The tree of `Parameter`s that the loader fills with arrays: ``{"ends": {...}, "layers": [{...}, ...]}``."""
        (_, ends), layers = self._described
        return {"ends": dict(nnx.to_pure_dict(ends)), "layers": [dict(nnx.to_pure_dict(state)) for _, state in layers]}

    def ends(self, arrays: Arrays) -> Ends:
        graph, state = self._described[0]
        return _bind(graph, state, arrays)

    def run_stage(
        self,
        params: Mapping[str, Any],
        pools: tuple[list[jax.Array], list[jax.Array]],
        x: jax.Array,
        positions: jax.Array,
        prompt_lengths: jax.Array,
        tables: jax.Array,
    ) -> tuple[jax.Array, tuple[list[jax.Array], list[jax.Array]]]:
        """x [B, T, H] through this stage's layers; positions [B, T] are -1 where a token is not live.

        Pools are local, [1, 1, P, page_size, K, D] per layer slot. Returns x, and the pools with new keys and values.
        """
        stage = jax.lax.axis_index("stage")
        cos, sin = rope.angles(self.config.rope, self.config.head_dim, positions, prompt_lengths)
        k_pools, v_pools = list(pools[0]), list(pools[1])
        for slot, layers in enumerate(self.slots):
            graph, state = self._described[1][slot]
            layer = _bind(graph, state, {name: array[0] for name, array in params["layers"][slot].items()})
            window = self._window(layers, stage)

            def run(x, k_pool, v_pool, layer=layer, window=window):
                written = []

                def attend(q, k, v):
                    written.append(write_pages(k_pool[0, 0], k, tables, positions))
                    written.append(write_pages(v_pool[0, 0], v, tables, positions))
                    with jax.named_scope("paged_attention"):
                        if self.kernels == "off":
                            return paged_attention(q, *written, tables, positions, window)
                        kernel = decode_attention if q.shape[1] == 1 else prefill_attention
                        return kernel(q, *written, tables, positions, window, self.kernels == "interpret")

                x = layer(x, cos, sin, attend)
                return x, written[0][None, None], written[1][None, None]

            with jax.named_scope(f"layer_slot_{slot}"):
                here = [layer is not None for layer in layers]
                if all(here):
                    x, k_pools[slot], v_pools[slot] = run(x, k_pools[slot], v_pools[slot])
                else:  # an empty slot costs no compute; all ranks of a tensor group take the same branch
                    x, k_pools[slot], v_pools[slot] = jax.lax.cond(
                        jnp.array(here)[stage], run, lambda *same: same, x, k_pools[slot], v_pools[slot]
                    )
        return x, (k_pools, v_pools)

    def _window(self, layers: tuple[int | None, ...], stage: jax.Array) -> jax.Array | None:
        windows = [None if layer is None else self.config.windows[layer] for layer in layers]
        if not any(windows):
            return None
        return jnp.array([window or NO_WINDOW for window in windows])[stage]


def _bind(graph: Any, state: Any, arrays: Arrays) -> Any:
    """The module with arrays in place of its parameters' descriptions; happens while tracing only."""
    bound = jax.tree.map(lambda leaf: leaf, state, is_leaf=lambda leaf: isinstance(leaf, Parameter))
    nnx.replace_by_pure_dict(bound, dict(arrays))
    return nnx.merge(graph, bound)
