"""The Python interface: a checkpoint on a mesh, from prompts to text."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from pathlib import Path
from typing import Any

from jaxinfer.checkpoint.manifest import Manifest, read_manifest
from jaxinfer.cluster.cpu import check_thread_pool, use_virtual_devices
from jaxinfer.compile_cache import use_compile_cache
from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.device import claim_memory
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.params import SamplingParams
from jaxinfer.engine.request import Output, Request, Update
from jaxinfer.inputs import InputRecord, parse_record, token_ids
from jaxinfer.parallel.axes import parse_mesh
from jaxinfer.parallel.stages import parse_stage_layers
from jaxinfer.telemetry.progress import Progress

Prompt = str | Sequence[int] | Mapping[str, Any]
Params = SamplingParams | Mapping[str, Any]


@dataclass(frozen=True)
class Completion:
    """What a prompt became: `samples` holds n outputs, and the properties are those of the first."""

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
    ``prompt_token_ids`` or ``messages``, and any sampling field. Requests without a seed draw by their id, which is
    their place unless a dict gives one: the same call gives the same text. Under several processes each makes the same
    calls and gets the same results.

    Args:
      checkpoint: the folder that ``python -m convert`` wrote; or, for ``load_format="dummy"``, the manifest alone of a
        published model: ``load_preset("falcon-40b").manifest`` (`jaxinfer.presets`).
      mesh: sizes of the axes ``stage``, ``data``, ``tensor``, as text or mapping; one left out is 1.
      dtype: of weights, activations and cache; the checkpoint's if None.
      stage_layers: layers per stage, as ``7,7,6,6`` or a sequence; balanced if None.
      cpu_devices: run on this many virtual CPU devices.
      compile_cache: folder that keeps compiled programs for later runs, or ``none``; ``~/.cache/jaxinfer/xla`` on GPUs
        if None (see `use_compile_cache`).
      loading: told (bytes loaded, bytes in all) while the weights load.
      beat: told where this process is: phase, step, and whether it may wait for others.
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
        wait: bool = True,
        **options: Any,
    ):
        legal = [field.name for field in fields(EngineConfig)]
        unknown = [name for name in options if name not in legal]
        if unknown:
            legal += ["cpu_devices", "compile_cache", "loading", "beat", "wait"]
            raise ValueError(f"{unknown[0]}: no such option; legal: {', '.join(legal)}")
        sizes = parse_mesh(mesh if isinstance(mesh, str) else ",".join(f"{axis}={size}" for axis, size in mesh.items()))
        if stage_layers is not None:
            text = stage_layers if isinstance(stage_layers, str) else ",".join(map(str, stage_layers))
            manifest = checkpoint if isinstance(checkpoint, Manifest) else read_manifest(checkpoint)
            stage_layers = parse_stage_layers(text, manifest.model["num_layers"], sizes["stage"])
        config = EngineConfig(mesh=sizes, dtype=dtype, stage_layers=stage_layers, **options)
        if cpu_devices is not None:
            use_virtual_devices(cpu_devices)
        claim_memory()
        check_thread_pool()
        if warning := use_compile_cache(compile_cache):
            warnings.warn(warning, stacklevel=2)
        self.engine = Engine(checkpoint, config, loading, beat)
        if wait:
            self.engine.wait_loaded()
        self._open: dict[str, Request] = {}

    def add(self, record: InputRecord) -> Request:
        """Takes a request in, to run with the next `updates`.

        Raises:
          ValueError: one that can never run: its prompt, a token id or a sampling parameter is not legal.
        """
        request = Request(record.id, token_ids(record, self.engine.tokenizer), record.params)
        self.engine.add(request)
        self._open[request.id] = request
        return request

    def updates(self) -> Iterator[Update]:
        """Runs what was added, and yields new tokens and text as they appear. Closing it drops what is unfinished."""
        try:
            while self.engine.has_unfinished():
                yield from self.engine.step()
        finally:
            self.drop()

    def stream(
        self, prompts: Prompt | Sequence[Prompt], params: Params | Sequence[Params] | None = None
    ) -> Iterator[Update]:
        """Yields each prompt's new tokens and text as they appear; `request_id` is the prompt's own id or its place.

        Raises:
          ValueError: a prompt that can never run, with its place; then none runs.
        """
        self._add_all(prompts, params)
        yield from self.updates()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params | Sequence[Params] | None = None,
        *,
        progress: bool = False,
    ) -> list[Completion]:
        """Runs prompts to their end, one completion for each, in their order; `params` for all or one for each.

        Raises:
          ValueError: a prompt that can never run, with its place; then none runs.
        """
        requests = self._add_all(prompts, params)
        samples: dict[str, list[Output]] = defaultdict(list)
        wanted = {request.id: request.params.n for request in requests}
        bar = Progress("generate", "prompts", len(requests), shown=progress)
        for update in self.updates():
            if update.output is not None:
                samples[update.request_id].append(update.output)
            ended = update.output is not None and len(samples[update.request_id]) == wanted[update.request_id]
            bar.update(int(ended), len(update.token_ids))
        bar.close()
        return [
            Completion(request.prompt_token_ids, sorted(samples[request.id], key=lambda output: output.index))
            for request in requests
        ]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        params: Params | None = None,
    ) -> list[Completion]:
        """Answers one conversation or a list of them; a message is ``{"role": ..., "content": ...}``."""
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations = messages if several else [messages]
        return self.generate([{"messages": [dict(each) for each in talk]} for talk in conversations], params)

    def score(self, texts: str | Sequence[str] | Sequence[Sequence[int]]) -> list[Score]:
        """Logprobs of each text's tokens, a BOS token that the tokenizer adds included."""
        params = SamplingParams(max_new_tokens=1, prompt_logprobs=0)
        return [
            Score(
                completion.prompt_token_ids,
                [None if each is None else each.logprob for each in completion.samples[0].prompt_logprobs],
            )
            for completion in self.generate(texts, params)
        ]

    def _add_all(self, prompts: Prompt | Sequence[Prompt], params: Params | Sequence[Params] | None) -> list[Request]:
        if self._open:
            raise RuntimeError(
                f"{len(self._open)} requests of this LLM are unfinished; finish or close their stream first"
            )
        if isinstance(prompts, str | Mapping) or (len(prompts) and isinstance(prompts[0], Integral)):
            prompts = [prompts]
        each = params if isinstance(params, Sequence) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(
                f"params: found {len(each)} for {len(prompts)} prompts; legal: one for all or one for each"
            )
        requests = []
        for place, (prompt, own) in enumerate(zip(prompts, each)):
            try:
                requests.append(self.add(_record(prompt, own, place)))
            except ValueError as error:
                self.drop()
                raise ValueError(f"prompt {place}: {error}") from error
        return requests

    def drop(self) -> None:
        """Ends what is unfinished, now."""
        for name in self._open:
            self.engine.abort(name)
        self._open.clear()


def _record(prompt: Prompt, params: Params | None, place: int) -> InputRecord:
    if isinstance(prompt, str):
        fields: dict[str, Any] = {"prompt": prompt}
    elif isinstance(prompt, Mapping):
        fields = dict(prompt)
    else:
        fields = {"prompt_token_ids": [int(each) for each in prompt]}
    defaults = params if isinstance(params, SamplingParams) else SamplingParams.from_dict(params or {})
    return parse_record(fields, place + 1, str(fields.get("id", place)), defaults)
