"""From the scheduler's decisions to device programs: builds their arrays, runs them, starts the copy of results."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.emit import Emitted, Features
from jaxinfer.engine.forward import Decoder
from jaxinfer.engine.params import SamplingParams
from jaxinfer.engine.programs import Programs
from jaxinfer.engine.request import stop_ids
from jaxinfer.engine.sequence import DecodeBlock, PrefillTick, Sequence
from jaxinfer.engine.steps import DecodeInputs, PrefillInputs
from jaxinfer.ops.sampling import SamplingArrays, sampling_arrays, set_row
from jaxinfer.parallel.mesh import mesh_sizes
from jaxinfer.parallel.placement import Rules


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
    """Holds the weights, the device state and the rows' sampling parameters."""

    def __init__(
        self,
        decoder: Decoder,
        config: EngineConfig,
        mesh: Mesh,
        rules: Rules,
        dtype: Any,
        params: Any,
        pages: int,
        max_context: int,
        compiling: Callable[[], None],
    ):
        self.programs = Programs(decoder, config, mesh, rules, dtype, compiling)
        self._params = params
        self._eos = decoder.config.eos_token_ids
        self._state = self.programs.new_state(pages)
        sizes = mesh_sizes(mesh)
        self._shards, self._stages = sizes["data"], sizes["stage"]
        self._slots = self._stages * self.programs.rows()
        self._page_size = config.page_size
        self._widths = config.table_widths(max_context)
        self._sampling = sampling_arrays((self._shards, self._slots))
        self._owners: dict[tuple[int, int], Sequence] = {}
        self._on_device: SamplingArrays | None = None
        self._required = Features()

    def forget_requirements(self) -> None:
        """Back to plain greedy programs; only when nothing is unfinished."""
        self._required = Features()

    def require(self, params: SamplingParams) -> None:
        """From here on, programs can do what these parameters need. It lasts while requests are unfinished: a set of
        features that followed each batch's mix would compile a program per mix."""
        self._required = Features(*map(max, self._required, _required(params)))

    def decode(self, block: DecodeBlock) -> Result:
        shape = (self._shards, self._stages * block.rows)
        active, keep = np.zeros(shape, bool), np.asarray(block.keep, bool)
        limit, prompt_length = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        rows = [
            (shard, slot, sequence)
            for shard, owners in enumerate(block.owners)
            for slot, sequence in enumerate(owners)
            if sequence is not None
        ]
        tables = self._tables(shape, [((d, s), sequence.pages) for d, s, sequence in rows])
        for shard, slot, sequence in rows:
            active[shard, slot] = True
            limit[shard, slot] = sequence.limit
            prompt_length[shard, slot] = len(sequence.prompt)
        inputs = DecodeInputs(active, keep, limit, prompt_length, tables)
        features = self._features(score=False)
        self._state, emitted = self.programs.decode(
            self._params, self._state, inputs, self._row_sampling(features), features
        )
        return Result(emitted).start_copy()

    def prefill(self, tick: PrefillTick) -> Result:
        rows, length = tick.shape
        shape = (self._stages, self._shards, rows)
        start, count, prompt_length, slot = (np.zeros(shape, np.int32) for _ in range(4))
        final = np.zeros(shape, bool)
        tokens = np.zeros((self._shards, rows, length), np.int32)
        live = [
            ((stage, shard, row), each)
            for stage, shards in enumerate(tick.stages)
            for shard, shard_rows in enumerate(shards)
            for row, each in enumerate(shard_rows)
            if each is not None
        ]
        for at, each in live:
            start[at], count[at], final[at] = each.start, each.count, each.final
            prompt_length[at], slot[at] = len(each.seq.prompt), each.seq.slot
            if at[0] == 0:
                tokens[at[1], at[2], : each.count] = each.seq.tokens[each.start : each.start + each.count]
                self._own(each.seq)
        features = self._features(score=any(each.seq.score for _, each in live))
        targets = None
        if features.score:
            targets = np.zeros_like(tokens)
            for (stage, shard, row), each in live:
                if stage == self._stages - 1:
                    known = each.seq.tokens[each.start + 1 : each.start + each.count + 1]
                    targets[shard, row, : len(known)] = known
        tables = self._tables(shape, [(at, each.pages) for at, each in live])
        inputs = PrefillInputs(tokens, start, count, prompt_length, slot, final, tables, targets)
        self._state, emitted, scored = self.programs.prefill(
            self._params, self._state, inputs, self._row_sampling(features), features
        )
        return Result(emitted, scored).start_copy()

    def _tables(self, shape: tuple[int, ...], pages: list[tuple[Any, Any]]) -> np.ndarray:
        longest = max((len(each) for _, each in pages), default=1)
        width = next(width for width in self._widths if width >= longest)
        tables = np.zeros((*shape, width), np.int32)
        for at, each in pages:
            tables[at][: len(each)] = each
        return tables

    def _own(self, sequence: Sequence) -> None:
        """Writes the sampling row of a sequence that has just got its slot."""
        key = (sequence.shard, sequence.slot)
        if self._owners.get(key) is not sequence:
            self._owners[key] = sequence
            set_row(self._sampling, key, sequence.params, sequence.seed, stop_ids(sequence.params, self._eos))
            self._on_device = None

    def _row_sampling(self, features: Features) -> SamplingArrays | None:
        if not (features.sample or features.adjust):
            return None
        if self._on_device is None:
            self._on_device = self.programs.replicated(jax.tree.map(np.copy, self._sampling))
        return self._on_device

    def _features(self, score: bool) -> Features:
        features = self._required._replace(score=score)
        if features.adjust and self._state.counts is None:
            self._state = self.programs.with_counts(self._state)
        return features


def _required(params: SamplingParams) -> Features:
    adjust = (
        params.repetition_penalty != 1
        or params.presence_penalty
        or params.frequency_penalty
        or params.logit_bias
        or params.min_new_tokens
    )
    return Features(params.temperature > 0, bool(adjust), params.logprobs is not None)
