"""The engine's compiled programs and the sharding of what they take and give."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.emit import Features
from jaxinfer.engine.forward import Decoder
from jaxinfer.engine.params import MOST_BIASES, MOST_STOP_IDS
from jaxinfer.engine.steps import DecodeInputs, PrefillInputs, State, decode_block, prefill_tick
from jaxinfer.ops.sampling import SamplingArrays, sampling_arrays
from jaxinfer.parallel.axes import AXES, VOCAB_AXES
from jaxinfer.parallel.mesh import mesh_sizes
from jaxinfer.parallel.placement import Parameter, Rules, global_shape, local_size, partition_spec
from jaxinfer.telemetry.phases import Phases

POOL = P("stage", "data", None, None, "tensor", None)
# XLA's command buffers are CUDA graphs on a GPU: a trace names nothing inside of them
WITHOUT_COMMAND_BUFFERS = {"xla_gpu_enable_command_buffer": ""}
COMPILING_AT_ONCE = 4  # by a process that is alone; several compile one by one, all in the same order


class Program(NamedTuple):
    """What a program is compiled for: r = `rows` rows per microbatch (decode), or R = `rows` rows of C = `tokens`
    tokens (prefill), block tables of W = `width` pages, what requests need, whether the state counts tokens."""

    kind: str
    rows: int
    tokens: int
    width: int
    features: Features
    counts: bool


class Programs:
    """Compiles a program before its first use, or ahead of it, in threads; `compiling` is called while `run` waits, at
    each program that is ready. `peers`: see `peer.connect`; the programs' params then have it too, under this name."""

    def __init__(
        self,
        decoder: Decoder,
        config: EngineConfig,
        mesh: Mesh,
        rules: Rules,
        dtype: Any,
        pages: int,
        peers: jax.Array | None,
        compiling: Callable[[], None],
        phases: Phases,
    ):
        self._compiling, self._pages, self._peers, self._phases = compiling, pages, peers, phases
        self._decoder, self._config, self._mesh, self._rules, self._dtype = decoder, config, mesh, rules, dtype
        self._sizes = mesh_sizes(mesh)
        self._compiled: dict[Program, Future] = {}
        self._alone = jax.process_count() == 1
        self._threads = ThreadPoolExecutor(COMPILING_AT_ONCE if self._alone else 1, "compile")
        self._tracing = threading.Lock()
        self.compile_seconds = 0.0  # that `run` waited
        self.ran: dict[Program, None] = {}  # in order; whoever wants to know empties it before
        self._apart: dict[Program, Future] = {}  # what `run` takes in place of the usual ones

    @property
    def count(self) -> int:
        return len(self._compiled)

    def rows(self) -> int:
        """Decode rows of one microbatch and data shard."""
        return -(-self._config.max_batch // self._sizes["stage"])

    def slots(self) -> int:
        return self._sizes["stage"] * self.rows()

    def sampling_rows(self) -> SamplingArrays:
        """Host arrays of greedy rows [Dp, slots], as wide as the most that a request may ask for."""
        ends = max(16, len(self._decoder.config.eos_token_ids))
        shape = self._sizes["data"], self.slots()
        return sampling_arrays(shape, n_bias=MOST_BIASES, n_stop=MOST_STOP_IDS + ends)

    def new_state(self) -> State:
        """Everything zero, made on the devices; without counts."""
        return self._zeros(self._state(counts=False))

    def with_counts(self, state: State) -> State:
        """Adds the token counts, which only requests with penalties, bias or min_new_tokens need."""
        with self._waiting():
            return state._replace(counts=self._zeros(self._state(counts=True).counts))

    def replicated(self, tree: Any) -> Any:
        """Host arrays, equal on all processes, as arrays on every device."""
        sharding = NamedSharding(self._mesh, P())
        return jax.tree.map(
            lambda each: jax.make_array_from_callback(each.shape, sharding, lambda index: each[index]), tree
        )

    def inputs(self, program: Program) -> DecodeInputs | PrefillInputs:
        """Host arrays of zeros, for the caller to fill in."""
        stages, shards = self._sizes["stage"], self._sizes["data"]
        if program.kind == "decode":
            shape = (shards, stages * program.rows)
            return DecodeInputs(
                active=np.zeros(shape, bool),
                keep=np.zeros(shape, bool),
                limit=np.zeros(shape, np.int32),
                prompt_length=np.zeros(shape, np.int32),
                tables=np.zeros((*shape, program.width), np.int32),
            )
        shape, of_tokens = (stages, shards, program.rows), (shards, program.rows, program.tokens)
        start, count, prompt_length, slot = (np.zeros(shape, np.int32) for _ in range(4))
        return PrefillInputs(
            tokens=np.zeros(of_tokens, np.int32),
            start=start,
            count=count,
            prompt_length=prompt_length,
            slot=slot,
            final=np.zeros(shape, bool),
            tables=np.zeros((*shape, program.width), np.int32),
            whole=None if self._decoder.config.anew_at is None else np.zeros(shape, np.int32),
            targets=np.zeros(of_tokens, np.int32) if program.features.score else None,
        )

    def compile_ahead(self, programs: Iterable[Program]) -> None:
        """Begins to compile programs, in this order; all processes name the same."""
        for program in programs:
            if program not in self._compiled:
                self._compiled[program] = self._threads.submit(self._compile, program)

    def forget_failed(self) -> None:
        """Those that could not be compiled are tried again when they are next wanted."""
        failed = [program for program, future in self._compiled.items() if future.done() and future.exception()]
        for program in failed:
            del self._compiled[program]

    def run(
        self,
        program: Program,
        params: Any,
        state: State,
        inputs: DecodeInputs | PrefillInputs,
        sampling: SamplingArrays | None,
    ) -> Any:
        """What `decode_block` or `prefill_tick` returns; `state` is gone after that."""
        self.compile_ahead([program])
        # several processes do not run programs, which wait for each other, while they tune kernels together
        needed = [self._compiled[program]] if self._alone else list(self._compiled.values())
        if not _all_done(needed):
            with self._waiting():
                self.wait(needed)
        self.ran[program] = None
        compiled = self._apart.get(program, self._compiled[program])
        return compiled.result()(params, state, inputs, sampling)

    def set_apart(self, options: Mapping[str, str]) -> None:
        """Compiles the programs that `ran` with other options of XLA's, and waits for them; `run` takes these until
        `rejoin`. All processes call it after the same steps."""
        apart = {program: self._threads.submit(self._compile, program, options) for program in self.ran}
        with self._waiting():
            for future in apart.values():
                self._compiling()
                future.result()
        self._apart = apart

    def rejoin(self) -> None:
        """Back to the usual programs."""
        self._apart = {}

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        with self._phases.within("compile"):
            began = time.perf_counter()
            yield
            self.compile_seconds += time.perf_counter() - began

    def wait(self, needed: list[Future] | None = None) -> None:
        """Until these, or all that began, are compiled."""
        needed = list(self._compiled.values()) if needed is None else needed
        while not _all_done(needed):
            self._compiling()
            wait([each for each in self._compiled.values() if not each.done()], return_when=FIRST_COMPLETED)
        self._compiling()

    def settle(self) -> None:
        """Until all that began are compiled; counts as compiling."""
        with self._waiting():
            self.wait()

    def compiled(self) -> dict[Program, jax.stages.Compiled]:
        """All programs so far; waits for those that are being compiled."""
        return {program: future.result() for program, future in self._compiled.items()}

    def _compile(self, program: Program, options: Mapping[str, str] | None = None) -> jax.stages.Compiled:
        with self._tracing:  # it holds Python's lock: side by side, all would be late
            began = time.perf_counter()
            lowered = self.lower(program)
            traced = time.perf_counter() - began
        began = time.perf_counter()
        compiled = lowered.compile(options)
        self._phases.beside("compile", traced + time.perf_counter() - began)
        return compiled

    def lower(self, program: Program) -> jax.stages.Lowered:
        features = program.features
        if program.kind == "decode":
            body, outputs = partial(decode_block, self._decoder, features, self._config.decode_steps), 1
        else:
            body, outputs = partial(prefill_tick, self._decoder, features), 2
        # float32 means float32: no tf32 in place of it on the GPU
        precision = "highest" if np.dtype(self._dtype) == np.float32 else "default"

        def precise(*arguments):
            with jax.default_matmul_precision(precision):
                return body(*arguments)

        precise.__name__ = program.kind  # what traces call it
        params, state = self._params(), self._state(program.counts)
        specs = jax.tree.map(lambda each: each.sharding.spec, (params, state))
        mapped = jax.shard_map(
            precise,
            mesh=self._mesh,
            in_specs=(*specs, P(), P()),
            out_specs=(specs[1], *(P(),) * outputs),
            check_vma=False,
        )
        rows = None
        if features.reads_rows:
            rows = self.sampling_rows()
            rows = jax.tree.map(lambda each: self._shape(each.shape, each.dtype, P()), rows)
        return jax.jit(mapped, donate_argnums=1).lower(params, state, self.inputs(program), rows)

    def _shape(self, shape: tuple[int, ...], dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self._mesh, spec))

    def _params(self) -> Any:
        """The shapes of the weights, and of the table of peers if there is one."""
        weights = jax.tree.map(
            lambda parameter: self._shape(
                global_shape(parameter, self._rules, self._sizes), self._dtype, partition_spec(parameter, self._rules)
            ),
            self._decoder.parameters(),
            is_leaf=lambda leaf: isinstance(leaf, Parameter),
        )
        if self._peers is None:
            return weights
        return weights | {"peers": self._shape(self._peers.shape, self._peers.dtype, P(*AXES))}

    def _state(self, counts: bool) -> State:
        """The shapes of the state."""
        model, sizes = self._decoder.config, self._sizes
        stages, shards, tensor = sizes["stage"], sizes["data"], sizes["tensor"]
        kv_heads = local_size("kv_heads", model.num_kv_heads, self._rules, sizes) * tensor
        columns = local_size("vocab", model.vocab_size, self._rules, sizes) * stages * tensor
        cache = (stages, shards, self._pages, self._config.page_size, kv_heads, model.head_dim)

        def row(dtype):
            return self._shape((shards, stages, self.rows()), dtype, P("data"))

        def hidden(*shape):
            return self._shape((stages, shards, *shape, model.hidden_size), self._dtype, P("stage", "data"))

        k, v = ([self._shape(cache, self._dtype, POOL) for _ in self._decoder.slots] for _ in range(2))
        shapes = self._config.prefill_shapes()
        return State(
            k=k,
            v=v,
            token=row(jnp.int32),
            position=row(jnp.int32),
            flying=row(bool),
            x=hidden(self.rows(), 1),
            prefill_x={f"{rows}x{length}": hidden(rows, length) for rows, length in shapes} if stages > 1 else {},
            counts=self._shape((shards, self.slots(), columns), jnp.int32, P("data", None, VOCAB_AXES))
            if counts
            else None,
        )

    @staticmethod
    def _zeros(shapes: Any) -> Any:
        def zeros():
            return jax.tree.map(lambda each: jnp.zeros(each.shape, each.dtype), shapes)

        return jax.jit(zeros, out_shardings=jax.tree.map(lambda each: each.sharding, shapes))()


def _all_done(futures: Iterable[Future]) -> bool:
    return all(each.done() for each in futures)
