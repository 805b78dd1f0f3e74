"""From the scheduler's decisions to device programs: builds their arrays, runs them, starts the copy of results."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.emit import Emitted, Features
from jaxinfer.engine.forward import Decoder
from jaxinfer.engine.params import SamplingParams
from jaxinfer.engine.programs import Program, Programs
from jaxinfer.engine.request import stop_ids
from jaxinfer.engine.sequence import Ahead, DecodeBlock, PrefillTick, Sequence
from jaxinfer.engine.steps import DecodeInputs, PrefillInputs, State
from jaxinfer.ops.sampling import SamplingArrays, set_row
from jaxinfer.parallel.mesh import mesh_sizes
from jaxinfer.parallel.placement import Rules
from jaxinfer.telemetry.phases import Phases


@dataclass
class Result:
    """What a dispatch emitted, on its way to the host: see steps.py for the shapes."""

    emitted: Emitted
    scored: Emitted | None = None

    def start_copy(self) -> "Result":
        for each in jax.tree.leaves((self.emitted, self.scored)):
            each.copy_to_host_async()
        return self

    def read(self) -> tuple[Emitted, Emitted | None]:
        """Waits for the device."""
        return jax.tree.map(np.asarray, (self.emitted, self.scored))


class Runner:
    """Holds the weights, the device state and the rows' sampling parameters.

    Programs can be compiled before `begin` brings the weights."""

    def __init__(
        self,
        decoder: Decoder,
        config: EngineConfig,
        mesh: Mesh,
        rules: Rules,
        dtype: Any,
        pages: int,
        max_context: int,
        peers: jax.Array | None,
        compiling: Callable[[], None],
        phases: Phases,
    ):
        self.programs = Programs(decoder, config, mesh, rules, dtype, pages, peers, compiling, phases)
        self._peers = peers
        self._params: Any = None
        self._state: State | None = None
        self._counts = False  # the state counts tokens
        self._eos = decoder.config.eos_token_ids
        self._stages = mesh_sizes(mesh)["stage"]
        self._page_size = config.page_size
        self._widths = config.table_widths(max_context)
        # kernels read as far as sequences reach, so that a wide table costs them nothing and spares a program
        self._whole_tables = decoder.kernels != "off"
        self._sampling = self.programs.sampling_rows()
        self._owners: dict[tuple[int, int], Sequence] = {}
        self._on_device: SamplingArrays | None = None
        self._required = Features()
        self._longest = 1  # tokens of an unfinished request, at its end
        self._foreseen: list[Program] = []  # see `compile_all`
        self._needless: set[Program] = set()  # that a guess names and nothing will run

    def begin(self, params: Any) -> None:
        """Takes the weights and makes the state."""
        self._params = params if self._peers is None else params | {"peers": self._peers}
        self._make_state()

    def wait(self) -> None:
        """Until each device of this process has done what was enqueued; a result is read from one of them."""
        jax.block_until_ready(self._state)

    def reset(self) -> None:
        """Forgets all sequences, and what was dispatched."""
        self._owners, self._on_device = {}, None
        self.forget_requirements()
        self.programs.forget_failed()
        if self._params is not None:
            self._make_state()

    def _make_state(self) -> None:
        with suppress(Exception):  # lost with a dispatch, or spoilt by one that failed
            jax.block_until_ready(self._state)
        self._state, self._counts = None, False  # the old one gives its memory back first
        self._state = self.programs.new_state()

    def compile_ahead(self, ahead: Ahead) -> None:
        """Begins to compile what the waiting requests will probably need."""
        self.programs.compile_ahead(each for each in self._guessed(ahead) if each not in self._needless)

    def compile_all(self, programs: list[Program], ahead: Ahead) -> None:
        """Begins to compile `programs`, which are all that the waiting requests can need, whatever `ahead` says."""
        self._foreseen, self._needless = programs, set(self._guessed(ahead)).difference(programs)
        self.programs.compile_ahead(programs)

    def _guessed(self, ahead: Ahead) -> list[Program]:
        features = self._required._replace(score=ahead.score)
        prefills = [
            self._program("prefill", *shape, self._width(self._pages(tokens)), features)
            for shape, tokens in ahead.prefills
        ]
        first, last = (self._width(self._pages(tokens)) for tokens in ahead.decodes)
        widths = [width for width in self._widths if first <= width <= last] if ahead.rows else []
        decodes = [self._program("decode", ahead.rows, 0, width, self._required) for width in widths]
        # decoding soon follows the first prefill
        return [*prefills[:1], *decodes, *prefills[1:]]

    def program(self, dispatch: PrefillTick | DecodeBlock) -> Program:
        """The one that runs a dispatch, the scheduler's latest."""
        if isinstance(dispatch, DecodeBlock):
            pages = max(len(sequence.pages) for row in dispatch.owners for sequence in row if sequence is not None)
            return self._program("decode", dispatch.rows, 0, self._width(pages), self._required)
        live = [each for shards in dispatch.stages for rows in shards for each in rows if each is not None]
        features = self._required._replace(score=any(each.score for each in live))
        pages = max((len(each.pages) for each in live), default=1)
        return self._program("prefill", *dispatch.shape, self._width(pages), features)

    def may_follow(
        self, rows: Iterable[int], shapes: Iterable[tuple[int, int]], tokens: int, score: bool
    ) -> Iterator[Program]:
        """All programs of these row buckets and shapes of ticks for sequences of up to so many tokens."""
        widths = self._widths[: self._widths.index(self._width(self._pages(tokens))) + 1]
        widths = widths[-1:] if self._whole_tables else widths
        for width in widths:
            yield from (self._program("decode", each, 0, width, self._required) for each in rows)
            for scores in (False, True)[: 1 + score]:
                features = self._required._replace(score=scores)
                yield from (self._program("prefill", *shape, width, features) for shape in shapes)

    def warm_up(self, beat: Callable[[int], None]) -> None:
        """Waits for what `compile_all` began, and runs each twice on no rows: on a GPU the first call brings kernels
        there, which takes seconds, and the second makes the CUDA graph. `beat` is told ahead of each."""
        counted = self.programs.compile_seconds
        self.programs.wait()
        for number, program in enumerate(2 * self._foreseen):
            beat(number)
            self._result(program, self.programs.inputs(program)).read()
        self.programs.compile_seconds = counted  # no request waited

    def _program(self, kind: str, rows: int, tokens: int, width: int, features: Features) -> Program:
        return Program(kind, rows, tokens, width, features, self._counts or features.adjust)

    def forget_requirements(self) -> None:
        """Back to plain greedy programs; only when nothing is unfinished."""
        self._required, self._longest = Features(), 1

    def require(self, params: SamplingParams, tokens: int) -> None:
        """From here on, programs can do what these parameters and so many cached tokens need. It lasts while requests
        are unfinished: a set of features that followed each batch's mix would compile a program per mix."""
        self._required = Features(*map(max, self._required, _required(params)))
        self._longest = max(self._longest, tokens)

    def decode(self, block: DecodeBlock) -> Result:
        rows = [
            ((shard, at), sequence)
            for shard, owners in enumerate(block.owners)
            for at, sequence in enumerate(owners)
            if sequence is not None
        ]
        program = self.program(block)
        inputs = self.programs.inputs(program)
        inputs.keep[:] = block.keep
        for at, sequence in rows:
            inputs.active[at] = True
            inputs.limit[at], inputs.prompt_length[at] = sequence.limit, len(sequence.prompt)
            inputs.tables[at][: len(sequence.pages)] = sequence.pages
        return self._result(program, inputs)

    def prefill(self, tick: PrefillTick) -> Result:
        live = [
            ((stage, shard, row), each)
            for stage, shards in enumerate(tick.stages)
            for shard, shard_rows in enumerate(shards)
            for row, each in enumerate(shard_rows)
            if each is not None
        ]
        program = self.program(tick)
        inputs = self.programs.inputs(program)
        for (stage, shard, row), each in live:
            at, tokens = (stage, shard, row), each.seq.tokens
            inputs.start[at], inputs.count[at], inputs.final[at] = each.start, each.count, each.final
            inputs.prompt_length[at], inputs.slot[at] = len(each.seq.prompt), each.seq.slot
            inputs.tables[at][: len(each.pages)] = each.pages
            if inputs.whole is not None:
                inputs.whole[at] = each.seq.target
            if stage == 0:
                inputs.tokens[shard, row, : each.count] = tokens[each.start : each.start + each.count]
                self._own(each.seq)
            if program.features.score and stage == self._stages - 1:
                known = tokens[each.start + 1 : each.start + each.count + 1]
                inputs.targets[shard, row, : len(known)] = known
        return self._result(program, inputs)

    def _result(self, program: Program, inputs: DecodeInputs | PrefillInputs) -> Result:
        if program.counts and not self._counts:
            self._state, self._counts = self.programs.with_counts(self._state), True
        sampling = self._row_sampling() if program.features.reads_rows else None
        self._state, *emitted = self.programs.run(program, self._params, self._state, inputs, sampling)
        return Result(*emitted).start_copy()

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._page_size)

    def _width(self, pages: int) -> int:
        if self._whole_tables:
            pages = max(pages, self._pages(self._longest))
        return next(width for width in self._widths if width >= pages)

    def _own(self, sequence: Sequence) -> None:
        """Writes the sampling row of a sequence that has just got its slot."""
        key = (sequence.shard, sequence.slot)
        if self._owners.get(key) is not sequence:
            self._owners[key] = sequence
            set_row(self._sampling, key, sequence.params, sequence.seed, stop_ids(sequence.params, self._eos))
            self._on_device = None

    def _row_sampling(self) -> SamplingArrays:
        if self._on_device is None:
            self._on_device = self.programs.replicated(jax.tree.map(np.copy, self._sampling))
        return self._on_device


def _required(params: SamplingParams) -> Features:
    adjust = (
        params.repetition_penalty != 1
        or params.presence_penalty
        or params.frequency_penalty
        or params.logit_bias
        or params.min_new_tokens
    )
    return Features(params.temperature > 0, bool(adjust), params.logprobs is not None)
