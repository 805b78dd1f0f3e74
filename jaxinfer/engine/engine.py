"""The loop from requests to tokens. Every process runs it on the same requests and reads the same results."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import xxhash

from jaxinfer.checkpoint.manifest import TOKENIZER, Manifest, read_manifest
from jaxinfer.checkpoint.verify import check_tokenizer
from jaxinfer.cluster.distributed import everyone
from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.device import check_dtype, device_memory
from jaxinfer.engine.emit import Emitted
from jaxinfer.engine.fit import fit_or_advise
from jaxinfer.engine.loading import Loading, Told, load_weights
from jaxinfer.engine.memory import explained
from jaxinfer.engine.needed import needed_programs
from jaxinfer.engine.programs import WITHOUT_COMMAND_BUFFERS, Program
from jaxinfer.engine.rehearsal import rehearse
from jaxinfer.engine.request import Request, Stats, Update, checked
from jaxinfer.engine.runner import Result, Runner
from jaxinfer.engine.sample import Sample
from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.engine.scheduler_config import SchedulerConfig
from jaxinfer.engine.sequence import DecodeBlock, PrefillTick, Sequence, State
from jaxinfer.models.config import ModelConfig
from jaxinfer.ops.cuda import gpu
from jaxinfer.parallel.axes import parse_mesh
from jaxinfer.parallel.mesh import make_mesh, mesh_sizes
from jaxinfer.parallel.peer import connect
from jaxinfer.parallel.placement import Rules
from jaxinfer.telemetry import ranges
from jaxinfer.telemetry.phases import Phases
from jaxinfer.tokenizer import load_tokenizer


class Engine:
    """Loads a checkpoint onto a mesh and turns requests into tokens: `add`, then `step` while `has_unfinished`.

    `checkpoint` is its folder, or for random weights a manifest alone (and then there is no tokenizer).

    The weights load in a thread: `wait_loaded` waits for them, or else the first `step`. Until then requests can be
    added, and what they need be compiled.

    An error or an interrupt (Ctrl-C) may leave `add`, `abort` or `step` at any line: that drops all unfinished
    requests, and what is added then runs as in a new engine. Of several processes all would have to leave alike.

    `loading` is told (bytes read so far, bytes in all) while this process's weights load; `beat` where it is: phase,
    step, and whether it is inside JAX, which may wait for other processes; `phases` keeps the time.

    Raises:
      LayoutError: a mesh that the model cannot have or that does not fit, before anything is allocated.
      ValueError: a manifest alone, and no random weights.
    """

    def __init__(
        self,
        checkpoint: str | Path | Manifest,
        config: EngineConfig,
        loading: Callable[[int, int], None] = lambda done, total: None,
        beat: Callable[[str, int, bool], None] = lambda phase, step, waits: None,
        phases: Phases | None = None,
    ):
        self.phases = phases or Phases()
        alone = isinstance(checkpoint, Manifest)
        if alone and config.load_format != "dummy":
            raise ValueError(f"load_format: found {config.load_format!r} with a manifest alone; legal: dummy")
        self.folder, self.config = None if alone else Path(checkpoint), config
        self.manifest = checkpoint if alone else read_manifest(checkpoint)
        self.model: ModelConfig = ModelConfig.from_json(self.manifest.model)
        self.dtype = jnp.dtype(config.dtype or self.manifest.dtype)
        self.max_context = min(config.max_context or self.model.max_context, self.model.max_context)
        device = jax.local_devices()[0]
        check_dtype(self.dtype, device)
        self.mesh = make_mesh(parse_mesh("") | dict(config.mesh))
        sizes, model = mesh_sizes(self.mesh), self.model
        beat("load", 0, True)
        limit, share = _least_memory()
        beat("load", 0, False)
        config = replace(config, memory_fraction=min(config.memory_fraction, share))
        fitted = fit_or_advise(model, config, sizes, self.dtype, device, self.max_context, limit, gpu(device))
        self.fitted, self.config, self.memory = fitted, fitted.config, fitted.memory
        decoder, config, self.stage_layers = fitted.decoder, self.config, fitted.decoder.stage_layers
        self.stats = Stats()
        self._beat, self.steps = beat, 0
        self.decode_sum = "psum"  # over `tensor`: by which way; with the reason where kernels are on and it is psum
        peers = self._connect() if decoder.kernels == "on" and sizes["tensor"] > 1 else None
        self._loading, self._loaded = Loading(self._load, loading), False
        with self.loading_stops_at_error():
            self.tokenizer = None if alone else self._tokenizer()
        self._runner = Runner(
            decoder,
            config,
            self.mesh,
            Rules(),
            self.dtype,
            self.memory.pages,
            self.max_context,
            peers,
            lambda: beat("compile", self.steps, False),
            self.phases,
        )
        self.scheduler = Scheduler(
            SchedulerConfig(
                shards=sizes["data"],
                stages=sizes["stage"],
                max_batch=config.max_batch,
                pages=self.memory.pages,
                page_size=config.page_size,
                decode_steps=config.decode_steps,
                prefill_shapes=config.prefill_shapes(),
                prefill_ticks=config.ticks_per_block(),
            )
        )
        self._prepared = self._foreseen = False
        self._warm_up_seconds = 0.0
        self._samples: dict[Sequence, Sample] = {}
        self._open: dict[str, list[Sequence]] = {}
        self._next_uid = 0
        self._torn = False  # inside `add`, `abort` or `step`, or left there
        self._in_flight: deque[tuple[PrefillTick | DecodeBlock, Result, float]] = deque()
        self._last_read = 0.0
        self._worked: float | None = None  # until then, work is counted; None: there is none

    def add(self, request: Request) -> None:
        """Takes a request in; its samples are the sequences 0 to n - 1.

        Raises:
          ValueError: a request that is none, an id in use, an empty prompt or one that fills the context, a token id or
            a sampling parameter outside the vocabulary, stop strings without a tokenizer, or more tokens than the cache
            can ever hold.
        """
        self._mend()
        request = checked(request)
        prompt, params, model = tuple(request.prompt_token_ids), request.params, self.model
        vocabulary = model.vocab_size
        if request.id in self._open:
            raise ValueError(f"id {request.id!r} is in use by an unfinished request")
        if not prompt:
            raise ValueError("the prompt is empty; legal: at least 1 token")
        wrong = next((token for token in prompt if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise ValueError(f"token id {wrong} is out of range; legal: 0 to {vocabulary - 1}")
        most, of = (
            (self.max_context - 1, "max_context - 1") if params.max_new_tokens else (self.max_context, "max_context")
        )
        if len(prompt) > most:
            raise ValueError(f"the prompt has {len(prompt)} tokens; legal: up to {most} ({of})")
        params.check_vocabulary(vocabulary)
        if params.stop and self.tokenizer is None:
            raise ValueError("stop: the checkpoint has no tokenizer, hence no text to look in; legal: stop_token_ids")
        room = self.max_context - len(prompt)
        capped, limit = params, "max_new_tokens"
        if params.max_new_tokens > room:
            limit = "context"
            capped = params.merge({"max_new_tokens": room, "min_new_tokens": min(params.min_new_tokens, room)})
        sequences = []
        for index in range(params.n):
            if params.seed is None:
                seed = xxhash.xxh32_intdigest(f"{self.config.seed}/{request.id}/{index}".encode())
            else:
                seed = (params.seed + index) % 2**32
            scored = params.prompt_logprobs is not None and index == 0
            own = capped if scored or params.prompt_logprobs is None else capped.merge({"prompt_logprobs": None})
            sequences.append(Sequence(self._next_uid, request.id, index, prompt, own, seed, scored, model.anew_at))
            self._next_uid += 1
        self._torn = True
        try:
            for sequence in sequences:
                self.scheduler.add(sequence)
        except ValueError:  # the first if any: all ask for the same pages
            self._torn = False
            raise
        if not self._open:
            self._runner.forget_requirements()
            self._prepared, self._foreseen, self._worked = False, False, None
        self._runner.require(params, sequences[0].cache_tokens)
        now = time.perf_counter()
        for sequence in sequences:
            own = replace(request, params=sequence.params)
            of_model = self.tokenizer, model.eos_token_ids, self.dtype.name
            self._samples[sequence] = Sample(own, sequence, *of_model, limit, now)
        self._open[request.id] = sequences
        self._torn = False

    def abort(self, request_id: str) -> list[Update]:
        """Ends a request now; what it has so far comes back with the finish reason ``abort``."""
        self._mend()
        now = time.perf_counter()
        updates = []
        self._torn = True
        for sequence in self._open.pop(request_id, []):
            if sequence in self._samples:
                self.scheduler.abort(sequence)
                updates.append(self._samples.pop(sequence).aborted(now))
        self._torn = False
        return updates

    def has_unfinished(self) -> bool:
        return not self._torn and self.scheduler.has_unfinished

    def unfinished(self) -> list[str]:
        """Ids of the requests."""
        return [] if self._torn else list(self._open)

    def _mend(self) -> None:
        """Starts over if `add`, `abort` or `step` was left halfway: nothing of what they write can be trusted then, and
        the state on the devices may have gone with the dispatch that it was given to."""
        if not self._torn:
            return
        self.scheduler = self.scheduler.emptied()
        self._samples, self._open, self._prepared = {}, {}, False
        self._in_flight.clear()
        self._runner.reset()
        self._torn = False

    def put_back(self) -> list[str]:
        """Drops the requests that have not begun, so that those which have can end soon; the ids of the dropped."""
        self._mend()
        names = [
            name
            for name, sequences in self._open.items()
            if all(each.state is State.WAITING and not each.output for each in sequences)
        ]
        for name in names:
            self.abort(name)
        return names

    def prepare(self) -> None:
        """Begins to compile what the requests so far will need."""
        if not self._prepared and self.scheduler.has_unfinished:
            self._runner.compile_ahead(self.scheduler.ahead())
            self._prepared = True

    def wait_loaded(self) -> None:
        """Waits until the weights are on the devices; loads them again if that was interrupted.

        Raises:
          CheckpointError: they cannot be read.
          OutOfMemory: a device has less room than planned.
        """
        if not self._loaded:
            with self.phases.within("load"), self.loading_stops_at_error(), self._explained("load"):
                self._runner.begin(self._loading.wait())
            self._loaded = True
            self.arrive()

    def arrive(self) -> None:
        """The requests so far count as added now: what came before is no wait of theirs."""
        now = time.perf_counter()
        for sample in self._samples.values():
            sample.arrived = now

    def foresee(self) -> None:
        """Begins to compile every program that the requests so far can need, in a new engine and if nothing else is
        added until they have ended; `warm_up` waits for them."""
        with self._warming():
            samples = [each for sequences in self._open.values() for each in sequences]
            programs = needed_programs(
                self._runner,
                self.scheduler.config,
                samples,
                self.model.eos_token_ids,
                lambda number: self._beat("compile", number, False),
            )
            self._runner.compile_all(programs, self.scheduler.ahead())
            self._foreseen = self._prepared = True

    def warm_up(self) -> dict[str, float]:
        """Compiles what `foresee` says and runs each program once on nothing: these requests will then wait for no
        program, and count as added now. How many programs (``programs``), and how long this took beside loading
        (``seconds``).

        Raises:
          CheckpointError: the weights cannot be read; OutOfMemory: a device has less room than planned.
        """
        self._mend()
        if not self._foreseen:
            self.foresee()
        self.wait_loaded()
        self._torn = True
        with self._warming(), self._explained("compile"):
            self._runner.warm_up(lambda number: self._beat("compile", number, True))
        self._torn = False
        self.stats.compiled_programs = self._runner.programs.count
        self.arrive()
        return {"programs": self.stats.compiled_programs, "seconds": self._warm_up_seconds}

    @contextmanager
    def _warming(self) -> Iterator[None]:
        with self.phases.within("compile"):
            began = time.perf_counter()
            yield
            self._warm_up_seconds += time.perf_counter() - began

    def forget(self) -> None:
        """Back to where it was before its first request, with all programs: what it learnt of outputs' lengths goes.

        Raises:
          RuntimeError: requests are unfinished.
        """
        self._mend()
        if self._open:
            raise RuntimeError(f"{len(self._open)} requests are unfinished")
        self.wait()
        self._in_flight.clear()
        self.scheduler = self.scheduler.emptied()

    def loading_stops_at_error(self) -> AbstractContextManager[None]:
        """An error in here ends the loading of weights too."""
        return self._loading.stops_at_error()

    def _explained(self, doing: str) -> Any:
        return explained(self.memory, self.config, doing)

    def step(self) -> list[Update]:
        """Enqueues the next dispatch, then reads the one before: the device works while the host looks at tokens.

        Raises:
          OutOfMemory: a device has less room than planned.
        """
        self._mend()
        self._torn = True
        updates = self._step()
        self._torn = False
        return updates

    def _step(self) -> list[Update]:
        self.prepare()
        self.wait_loaded()
        with self.phases.within("decode"):
            return self._dispatch()

    def _dispatch(self) -> list[Update]:
        if self._worked is None:
            self._worked = self._working()
        dispatch = self.scheduler.schedule()
        self.steps += 1
        if dispatch is not None:
            self.phases.was(_phase(dispatch))
            run = self._runner.prefill if isinstance(dispatch, PrefillTick) else self._runner.decode
            self._count(dispatch)
            self._beat(_phase(dispatch), self.steps, True)
            steps = 1 if isinstance(dispatch, PrefillTick) else self.config.decode_steps
            with ranges.step(_phase(dispatch), self.steps - 1, steps), self._explained(_phase(dispatch)):
                result, programs = run(dispatch), self._runner.programs
            self._in_flight.append((dispatch, result, self._working()))
            self.stats.compiled_programs, self.stats.compile_seconds = programs.count, programs.compile_seconds
        elif not self._in_flight:
            if self.scheduler.has_unfinished:
                raise RuntimeError("the scheduler has unfinished sequences but nothing to dispatch or to wait for")
            return []
        if len(self._in_flight) < 2 and dispatch is not None:
            return []
        dispatch, result, dispatched = self._in_flight.popleft()
        with self.phases.within(_phase(dispatch)):
            updates = self._read(dispatch, result, dispatched)
        if updates:
            now = self._working()
            self.stats.work_seconds += now - self._worked
            self._worked = now if self.scheduler.has_unfinished else None
        return updates

    def _working(self) -> float:
        """A clock that stands still while the main thread waits for a program to be compiled."""
        return time.perf_counter() - self._runner.programs.compile_seconds

    def compiled(self) -> dict[Program, jax.stages.Compiled]:
        """The programs so far; waits for those that are being compiled."""
        return self._runner.programs.compiled()

    @property
    def command_buffers(self) -> bool:
        """Whether XLA puts programs into such: CUDA graphs."""
        return self.mesh.devices.flat[0].platform != "cpu"

    def most_steps(self, up_to: int) -> int:
        """How many dispatches the requests so far take, if all get max_new_tokens; counted up to `up_to`."""
        sequences = [each for own in self._open.values() for each in own]
        return sum(1 for _ in islice(rehearse(self.scheduler.config, sequences), up_to))

    def watch_programs(self) -> None:
        """Waits for what is being compiled, which no traced step may wait for, and notes from here on which programs
        run, for `drop_command_buffers`."""
        self._runner.programs.settle()
        self._runner.programs.ran.clear()

    def drop_command_buffers(self) -> bool:
        """Compiles the programs that ran since `watch_programs` without command buffers, slower but with their parts in
        a trace, and runs them so. False where devices have none: nothing changes."""
        if not self.command_buffers:
            return False
        self._runner.programs.set_apart(WITHOUT_COMMAND_BUFFERS)
        return True

    def take_command_buffers(self) -> None:
        """Back to the programs as they were."""
        self._runner.programs.rejoin()

    def wait(self) -> None:
        """Until the devices, all of this process, have done what was enqueued."""
        self._runner.wait()

    def _read(self, dispatch: PrefillTick | DecodeBlock, result: Result, dispatched: float) -> list[Update]:
        self._beat(_phase(dispatch), self.steps, True)
        with self._explained(_phase(dispatch)):
            emitted, scored = result.read()
        self._beat(_phase(dispatch), self.steps, False)
        now, working = time.perf_counter(), self._working()
        took = working - max(dispatched, self._last_read)
        self._last_read = working
        if isinstance(dispatch, PrefillTick):
            self.stats.prefill_seconds += took
            at = {
                row.seq: (slice(None), shard, index)
                for shard, rows in enumerate(dispatch.stages[-1])
                for index, row in enumerate(rows)
                if row is not None
            }
            self._take_scores(dispatch, scored)
            arrays = jax.tree.map(lambda each: each[None], emitted)
        else:
            self.stats.decode_seconds += took
            owners = enumerate(dispatch.owners)
            at = {seq: (slice(None), shard, slot) for shard, row in owners for slot, seq in enumerate(row) if seq}
            arrays = emitted
        updates = []
        for sequence, tokens in self.scheduler.complete(dispatch, emitted.tokens):
            sample = self._samples.get(sequence)
            if sample is None:
                continue
            if isinstance(dispatch, DecodeBlock):
                self.stats.decode_tokens += len(tokens)
            details = _emitted_rows(arrays, at[sequence]) if sequence.params.logprobs is not None else None
            update = sample.add(tokens, details, _phase(dispatch), now)
            if update.output is not None:
                self._finish(sequence)
            if update.token_ids or update.text or update.output is not None:
                updates.append(update)
        return updates

    def _finish(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        del self._samples[sequence]
        if not any(each in self._samples for each in self._open[sequence.request_id]):
            del self._open[sequence.request_id]

    def _take_scores(self, tick: PrefillTick, scored: Emitted | None) -> None:
        for shard, rows in enumerate(tick.stages[-1]):
            for index, row in enumerate(rows):
                if row is not None and row.score and row.seq in self._samples:
                    part = jax.tree.map(lambda each: each[shard, index, : row.count], scored)
                    self._samples[row.seq].add_prompt_logprobs(row.start, part)

    def _count(self, dispatch: PrefillTick | DecodeBlock) -> None:
        stats, scheduler = self.stats, self.scheduler
        if isinstance(dispatch, PrefillTick):
            stats.prefill_dispatches += 1
            stats.prefill_tokens += sum(row.count for rows in dispatch.stages[0] for row in rows if row is not None)
        else:
            stats.decode_dispatches += 1
            cached = sum(sequence.fed for row in dispatch.owners for sequence in row if sequence is not None)
            per_token = self.memory.page // self.config.page_size
            ticks = dispatch.steps * self.mesh.shape["stage"]
            read_cache = dispatch.steps * cached * per_token // self.mesh.shape["data"]
            stats.decode_bytes += ticks * self._weight_bytes_per_tick + read_cache
        stats.stage_ticks, stats.idle_stage_ticks = scheduler.bubble.total, scheduler.bubble.idle
        stats.steady_stage_ticks = scheduler.steady_bubble.total
        stats.steady_idle_stage_ticks = scheduler.steady_bubble.idle
        stats.preemptions = scheduler.preemptions

    def _tokenizer(self) -> Any:
        # random weights need no more of the folder than its manifest
        if self.config.load_format != "dummy" or (self.folder / TOKENIZER).is_dir():
            check_tokenizer(self.folder, self.manifest)
        return load_tokenizer(self.folder)

    def _connect(self) -> jax.Array | None:
        """What decode steps sum over; None where `psum` has to do."""
        self._beat("load", 0, True)
        peers, reason = connect(self.mesh, everyone)
        self._beat("load", 0, False)
        self.decode_sum = "peer" if peers is not None else f"psum: {reason}"
        return peers

    def _load(self, told: Told) -> Any:
        stats = self.stats
        params, stats.load_bytes, stats.load_seconds = load_weights(
            self.folder, self.manifest, self.fitted, self.mesh, self.dtype, told
        )
        self.phases.beside("load", stats.load_seconds)
        # a decode tick reads every weight on the device, but of an untied embedding only a row per sequence
        embed = params["ends"]["embed"].addressable_data(0).nbytes
        self._weight_bytes_per_tick = self.memory.weights - (0 if self.model.tied else embed)
        return params


def _least_memory() -> tuple[int, float]:
    """`device_memory` of the device that has least, of all processes: they must decide alike."""
    found = [tuple(each) for own in everyone([device_memory(device) for device in jax.local_devices()]) for each in own]
    return min(limit for limit, _ in found), min(share for _, share in found)


def _phase(dispatch: PrefillTick | DecodeBlock) -> str:
    return "prefill" if isinstance(dispatch, PrefillTick) else "decode"


def _emitted_rows(arrays: Emitted, at: tuple[Any, ...]) -> Emitted:
    """The steps [K, ...] in which one row emitted a token."""
    rows = jax.tree.map(lambda each: each[at], arrays)
    emitted = rows.tokens != -1
    return jax.tree.map(lambda each: each[emitted], rows)
