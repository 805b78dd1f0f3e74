"""The engine's compiled programs and the sharding of what they take and give."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.emit import Features
from jaxinfer.engine.forward import Decoder
from jaxinfer.engine.steps import DecodeInputs, PrefillInputs, State, decode_block, prefill_tick
from jaxinfer.parallel.mesh import VOCAB_AXES, mesh_sizes
from jaxinfer.parallel.placement import Parameter, Rules, local_size, partition_spec

POOL = P("stage", "data", None, None, "tensor", None)


class Programs:
    """Compiles a program the first time that its bucket is needed: table width, prefill shape, features; `compiling` is
    called before and after each."""

    def __init__(
        self,
        decoder: Decoder,
        config: EngineConfig,
        mesh: Mesh,
        rules: Rules,
        dtype: Any,
        compiling: Callable[[], None],
    ):
        self._compiling = compiling
        self._decoder, self._config, self._mesh, self._rules, self._dtype = decoder, config, mesh, rules, dtype
        self._compiled: dict[Any, Any] = {}
        self.compile_seconds = 0.0
        self._params_spec = jax.tree.map(
            lambda parameter: partition_spec(parameter, rules),
            decoder.parameters(),
            is_leaf=lambda leaf: isinstance(leaf, Parameter),
        )

    @property
    def count(self) -> int:
        return len(self._compiled)

    def rows(self) -> int:
        """Decode rows of one microbatch and data shard."""
        return -(-self._config.max_batch // self._mesh.shape["stage"])

    def _state_spec(self, counts: bool) -> State:
        slots = len(self._decoder.slots)
        keys = {f"{rows}x{length}": P("stage", "data") for rows, length in self._config.prefill_shapes()}
        by_data = P("data")
        return State(
            [POOL] * slots,
            [POOL] * slots,
            by_data,
            by_data,
            by_data,
            P("stage", "data"),
            keys,
            P("data", None, VOCAB_AXES) if counts else None,
        )

    def new_state(self, pages: int) -> State:
        """Everything zero, made on the devices."""
        model, sizes = self._decoder.config, mesh_sizes(self._mesh)
        stages, shards, tensor = sizes["stage"], sizes["data"], sizes["tensor"]
        kv_heads = local_size("kv_heads", model.num_kv_heads, self._rules, sizes) * tensor
        slots = len(self._decoder.slots)

        def zeros() -> State:
            def pool():
                return jnp.zeros((stages, shards, pages, self._config.page_size, kv_heads, model.head_dim), self._dtype)

            def row(dtype):
                return jnp.zeros((shards, stages, self.rows()), dtype)

            def hidden(*shape):
                return jnp.zeros((stages, shards, *shape, model.hidden_size), self._dtype)

            prefill = {f"{rows}x{length}": hidden(rows, length) for rows, length in self._config.prefill_shapes()}
            pools = [pool() for _ in range(slots)], [pool() for _ in range(slots)]
            return State(*pools, row(jnp.int32), row(jnp.int32), row(bool), hidden(self.rows(), 1), prefill, None)

        shardings = jax.tree.map(partial(NamedSharding, self._mesh), self._state_spec(counts=False))
        return jax.jit(zeros, out_shardings=shardings)()

    def with_counts(self, state: State) -> State:
        """Adds the token counts, which only requests with penalties, bias or min_new_tokens need."""
        sizes = mesh_sizes(self._mesh)
        width = (
            local_size("vocab", self._decoder.config.vocab_size, self._rules, sizes) * sizes["stage"] * sizes["tensor"]
        )
        shape = (sizes["data"], sizes["stage"] * self.rows(), width)
        sharding = NamedSharding(self._mesh, P("data", None, VOCAB_AXES))
        return state._replace(counts=jax.jit(lambda: jnp.zeros(shape, jnp.int32), out_shardings=sharding)())

    def replicated(self, tree: Any) -> Any:
        """Host arrays, equal on all processes, as arrays on every device."""
        sharding = NamedSharding(self._mesh, P())
        return jax.tree.map(
            lambda each: jax.make_array_from_callback(each.shape, sharding, lambda index: each[index]), tree
        )

    def decode(self, params: Any, state: State, inputs: DecodeInputs, sampling: Any, features: Features):
        key = ("decode", inputs.tables.shape, features, state.counts is None)
        body = partial(decode_block, self._decoder, features, self._config.decode_steps)
        return self._run(key, body, 1, params, state, inputs, sampling)

    def prefill(self, params: Any, state: State, inputs: PrefillInputs, sampling: Any, features: Features):
        key = ("prefill", inputs.tokens.shape, inputs.tables.shape, features, state.counts is None)
        return self._run(key, partial(prefill_tick, self._decoder, features), 2, params, state, inputs, sampling)

    def _run(self, key: Any, body: Any, outputs: int, params: Any, state: State, inputs: Any, sampling: Any) -> Any:
        if key not in self._compiled:
            # float32 means float32: no tf32 in place of it on the GPU
            precision = "highest" if np.dtype(self._dtype) == np.float32 else "default"

            def precise(*arguments):
                with jax.default_matmul_precision(precision):
                    return body(*arguments)

            spec = self._state_spec(counts=state.counts is not None)
            mapped = jax.shard_map(
                precise,
                mesh=self._mesh,
                in_specs=(self._params_spec, spec, P(), P()),
                out_specs=(spec, *(P(),) * outputs),
                check_vma=False,
            )
            self._compiling()
            began = time.perf_counter()
            lowered = jax.jit(mapped, donate_argnums=1).lower(params, state, inputs, sampling)
            self._compiled[key] = lowered.compile()
            self.compile_seconds += time.perf_counter() - began
            self._compiling()
        return self._compiled[key](params, state, inputs, sampling)
