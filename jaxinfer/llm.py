"""The Python interface: a checkpoint on a mesh, from prompts to text."""

import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from pathlib import Path
from typing import Any

import jax

from jaxinfer.checkpoint.manifest import Manifest, WithoutChecksums, read_manifest
from jaxinfer.cluster.cpu import check_thread_pool, use_virtual_devices
from jaxinfer.compile_cache import use_compile_cache
from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.cut import choose_cut
from jaxinfer.engine.device import claim_memory
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.params import SamplingParams
from jaxinfer.engine.prompt import shown
from jaxinfer.engine.request import Output, Request, Update
from jaxinfer.inputs import InputRecord, parse_record, prompt_fields, record_id, token_ids
from jaxinfer.parallel.axes import parse_mesh
from jaxinfer.telemetry.phases import Phases
from jaxinfer.telemetry.progress import Progress

Prompt = str | Sequence[int] | Mapping[str, Any]
Params = SamplingParams | Mapping[str, Any]


@dataclass(frozen=True)
class Completion:
    """What a prompt became: `samples` holds n outputs, and the properties are those of the first.

    `finish_reason` is ``stop``, ``length`` or ``error``: the logits were NaN or infinite, which spares the other
    prompts. Then `error` says at which token and what to try, and text and tokens are those before it."""

    prompt_token_ids: list[int]
    samples: list[Output]

    @property
    def text(self) -> str:
        return self.samples[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.samples[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.samples[0].finish_reason

    @property
    def limit(self) -> str | None:
        """What a finish reason of ``length`` is of: ``max_new_tokens`` or ``context``."""
        return self.samples[0].limit

    @property
    def error(self) -> str | None:
        return self.samples[0].error

    @property
    def meta(self) -> Any:
        """What the prompt had under this name."""
        return self.samples[0].meta


@dataclass(frozen=True)
class Score:
    """Natural logprobs of a text's tokens, each given those before it; the first has none."""

    token_ids: list[int]
    logprobs: list[float | None]

    @property
    def total(self) -> float:
        return sum(each for each in self.logprobs if each is not None)


class LLM:
    """A model that runs on a mesh of devices.

        llm = LLM("build/tinystories", mesh="stage=2,tensor=2", cpu_devices=4)
        for story in llm.generate(["Once upon a time", "The cat"], SamplingParams(max_new_tokens=40)):
            print(story.text)

    A prompt is a text, a list of token ids, or a dict with the fields of an input line: ``prompt``,
    ``prompt_token_ids`` or ``messages``, any sampling field, and ``meta``, which comes out again. Requests without a
    seed draw by their id, which is their place unless a dict gives one: the same call gives the same text. Under
    several processes each makes the same calls and gets the same results. A call that Ctrl-C or an error ends leaves
    nothing behind: the next one works, in one process; several no longer agree then.

    Args:
      checkpoint: the folder that ``python -m convert`` wrote; or, for ``load_format="dummy"``, the manifest alone of a
        published model: ``load_preset("falcon-40b").manifest`` (`jaxinfer.presets`).
      mesh: sizes of the axes ``stage``, ``data``, ``tensor``, as text or mapping; one left out is 1.
      dtype: of weights, activations and cache; the checkpoint's if None.
      stage_layers: layers per stage, as ``7,7,6,6`` or a sequence, or ``measured:OUT.profile.json`` (`choose_cut`);
        balanced if None.
      cpu_devices: run on this many virtual CPU devices.
      compile_cache: folder that keeps compiled programs for later runs, or ``none``; ``~/.cache/jaxinfer/xla`` on GPUs
        if None (see `use_compile_cache`).
      loading: told (bytes loaded, bytes in all) while the weights load.
      beat: told where this process is: phase, step, and whether it may wait for others.
      phases: where the main thread's time goes (`Phases`), a new one if None.
      wait: return when the weights are loaded; otherwise the first request waits for them, and `loading` is called from
        another thread.
      options: further fields of `EngineConfig`.

    Raises:
      ValueError: an option or a layout that cannot be; ThreadPoolError: CPU devices that could deadlock.
    """

    def __init__(
        self,
        checkpoint: str | Path | Manifest,
        mesh: str | Mapping[str, int] = "",
        *,
        dtype: str | None = None,
        stage_layers: str | Sequence[int] | None = None,
        cpu_devices: int | None = None,
        compile_cache: str | None = None,
        loading: Callable[[int, int], None] = lambda done, total: None,
        beat: Callable[[str, int, bool], None] = lambda phase, step, waits: None,
        phases: Phases | None = None,
        wait: bool = True,
        **options: Any,
    ):
        legal = [field.name for field in fields(EngineConfig)]
        unknown = [name for name in options if name not in legal]
        if unknown:
            legal += ["cpu_devices", "compile_cache", "loading", "beat", "phases", "wait"]
            raise ValueError(f"{unknown[0]}: no such option; legal: {', '.join(legal)}")
        sizes = parse_mesh(mesh if isinstance(mesh, str) else ",".join(f"{axis}={size}" for axis, size in mesh.items()))
        if stage_layers is not None:
            text = stage_layers if isinstance(stage_layers, str) else ",".join(map(str, stage_layers))
            manifest = checkpoint if isinstance(checkpoint, Manifest) else read_manifest(checkpoint)
            stage_layers = choose_cut(text, manifest.model, sizes, dtype or manifest.dtype).stage_layers
        config = EngineConfig(mesh=sizes, dtype=dtype, stage_layers=stage_layers, **options)
        if cpu_devices is not None:
            use_virtual_devices(cpu_devices)
        claim_memory()
        check_thread_pool()
        if warning := use_compile_cache(compile_cache):
            warnings.warn(warning, stacklevel=2)
        if phases is None:
            phases = Phases()
            jax.devices()  # from here on they are ready
            phases.started()
        with phases.within("load"):
            self.engine = Engine(checkpoint, config, loading, beat, phases)
        if (warning := self.engine.manifest.warning(self.engine.folder)) and jax.process_index() == 0:
            warnings.warn(warning, WithoutChecksums, stacklevel=2)
        if wait:
            self.engine.wait_loaded()
        self._running: weakref.ref[Generator] | None = None  # who runs, or was interrupted; None: nobody

    def add(self, record: InputRecord) -> Request:
        """Takes a request in, to run with the next `updates`.

        Raises:
          ValueError: one that can never run: its prompt, a token id or a sampling parameter is not legal.
        """
        self._sweep()
        with self.engine.phases.within("preprocess"):
            request = Request(record.id, token_ids(record, self.engine.tokenizer), record.params, record.meta)
            self.engine.add(request)
        return request

    def updates(self) -> Iterator[Update]:
        """Runs what was added, and yields new tokens and text as they appear. Closing it drops what is unfinished."""
        return self._run()

    def stream(
        self, prompts: Prompt | Sequence[Prompt], params: Params | Sequence[Params] | None = None
    ) -> Iterator[Update]:
        """Yields each prompt's new tokens and text as they appear; `request_id` is the prompt's own id or its place.

        Raises:
          ValueError: a prompt that can never run, with its place; then none runs.
        """
        return self._run(lambda: self._add_all(_pairs(prompts, params)))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params | Sequence[Params] | None = None,
        *,
        progress: bool = False,
    ) -> list[Completion]:
        """Runs prompts to their end, one completion for each, in their order; `params` for all or one for each.

        A warning says how many samples ended with the finish reason ``error``, if any (see `Completion`).

        Raises:
          ValueError: a prompt that can never run, with its place; then none runs.
        """
        completions = self._complete(prompts, params, progress)
        failed = [output.error for each in completions for output in each.samples if output.error is not None]
        if failed:
            warnings.warn(f"{len(failed)} samples ended with an error, the first with {failed[0]}", stacklevel=2)
        return completions

    def _complete(
        self, prompts: Prompt | Sequence[Prompt], params: Params | Sequence[Params] | None, progress: bool = False
    ) -> list[Completion]:
        pairs = _pairs(prompts, params)
        requests: dict[str, Request] = {}
        samples: dict[str, list[Output]] = defaultdict(list)
        bar = Progress("generate", "prompts", len(pairs), shown=progress)
        try:
            for update in self._run(lambda: requests.update(self._add_all(pairs))):
                found = samples[update.request_id]
                if update.output is not None:
                    found.append(update.output)
                ended = update.output is not None and len(found) == requests[update.request_id].params.n
                bar.update(int(ended), len(update.token_ids))
        finally:
            bar.close()
        return [
            Completion(request.prompt_token_ids, sorted(samples[name], key=lambda output: output.index))
            for name, request in requests.items()
        ]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        params: Params | None = None,
    ) -> list[Completion]:
        """Answers one conversation or a list of them; a message is ``{"role": ..., "content": ...}``."""
        several = isinstance(messages, list | tuple) and messages and not isinstance(messages[0], Mapping)
        return self.generate([{"messages": talk} for talk in (messages if several else [messages])], params)

    def score(self, texts: str | Sequence[str] | Sequence[Sequence[int]]) -> list[Score]:
        """Logprobs of each text's tokens, a BOS token that the tokenizer adds included.

        Raises:
          FloatingPointError: logits that are NaN or infinite: at which token of which text, and what to try.
        """
        params = SamplingParams(max_new_tokens=0, prompt_logprobs=0)
        completions = self._complete(texts, params)
        for place, completion in enumerate(completions):
            if completion.error is not None:
                raise FloatingPointError(f"text {place}: {completion.error}")
        return [
            Score(
                completion.prompt_token_ids,
                [None if each is None else each.logprob for each in completion.samples[0].prompt_logprobs],
            )
            for completion in completions
        ]

    def warm_up(
        self, prompts: Prompt | Sequence[Prompt], params: Params | Sequence[Params] | None = None
    ) -> dict[str, float]:
        """Compiles every program that `generate` will need for these prompts, and runs each once on nothing: the next
        call with them, or with others of their lengths and parameters, waits for no program. What the engine learnt of
        outputs' lengths is forgotten. See `Engine.warm_up`.

        Raises:
          ValueError: a prompt that can never run, with its place; RuntimeError: requests are unfinished.
        """
        self._sweep()
        self.engine.forget()
        try:
            self._add_all(_pairs(prompts, params))
            return self.engine.warm_up()
        finally:
            self.drop()
            self.engine.forget()

    def drop(self) -> None:
        """Ends what is unfinished, now."""
        for name in self.engine.unfinished():
            self.engine.abort(name)
        self._running = None

    def _run(self, add: Callable[[], Any] | None = None) -> Iterator[Update]:
        """What `add` adds, or was added before, to its end.

        Nothing else may run meanwhile. Whether this does is asked of the generator itself, which an interrupt may
        leave at any line, its last ones too: then `_sweep` does the rest."""

        def run() -> Generator[Update]:
            self._sweep()
            left = self.engine.unfinished()
            if self._running is not None or (add is not None and left):
                raise RuntimeError(
                    f"{len(left)} requests of this LLM are unfinished; finish or close their stream first"
                )
            self._running = this
            try:
                if add is not None:
                    add()
                while self.engine.has_unfinished():
                    yield from self.engine.step()
            finally:
                self.drop()

        generator = run()
        this = weakref.ref(generator)
        return generator

    def _sweep(self) -> None:
        """Drops what an interrupted call left."""
        if self._running is not None:
            generator = self._running()
            if generator is None or generator.gi_frame is None:
                self.drop()

    def _add_all(self, pairs: list[tuple[Prompt, Params | None]]) -> dict[str, Request]:
        requests = {}
        for place, (prompt, own) in enumerate(pairs):
            try:
                request = self.add(_record(prompt, own, place))
            except ValueError as error:
                raise ValueError(f"prompt {place}: {error}") from error
            requests[request.id] = request
        return requests


def _pairs(prompts: Any, params: Any) -> list[tuple[Any, Any]]:
    """Each prompt with its parameters, whatever it is: `_record` looks."""
    alone = isinstance(prompts, str | bytes | Mapping) or not hasattr(prompts, "__iter__")
    prompts = [prompts] if alone else list(prompts)
    if not alone and prompts and isinstance(prompts[0], Integral):
        prompts = [prompts]
    each = params if isinstance(params, list | tuple) else [params] * len(prompts)
    if len(each) != len(prompts):
        raise ValueError(f"params: found {len(each)} for {len(prompts)} prompts; legal: one for all or one for each")
    return list(zip(prompts, each))


def _record(prompt: Any, params: Any, place: int) -> InputRecord:
    if params is not None and not isinstance(params, SamplingParams | Mapping):
        raise ValueError(f"params: found {shown(params)}; legal: SamplingParams or a dict of its fields")
    fields = prompt_fields(prompt)
    defaults = params if isinstance(params, SamplingParams) else SamplingParams.from_dict(params or {})
    return parse_record(fields, place + 1, record_id(fields, str(place)), defaults)
