"""What goes into the engine and what comes out of it."""

from dataclasses import dataclass, replace
from typing import Any

from jaxinfer.engine.params import SamplingParams
from jaxinfer.engine.prompt import check_unicode, shown, whole_numbers


@dataclass(frozen=True)
class Request:
    """A prompt of token ids and how to continue it; `meta` comes out again with each sample."""

    id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    meta: Any = None


def checked(request: Request) -> Request:
    """With the ids as a list of Python's integers.

    Raises:
      ValueError: the field that is of another kind.
    """
    if not isinstance(request.id, str):
        raise ValueError(f"id: found {shown(request.id)}, legal is a string")
    check_unicode("id", request.id)
    if not isinstance(request.params, SamplingParams):
        raise ValueError(f"params: found {shown(request.params)}, legal is SamplingParams")
    return replace(request, prompt_token_ids=whole_numbers("prompt_token_ids", request.prompt_token_ids))


@dataclass(frozen=True)
class TokenLogprob:
    """A token's logprob (natural log, of the raw logits), its rank (1 is the likeliest) and the likeliest tokens."""

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]

    def to_json(self) -> dict[str, Any]:
        top = [{"token_id": token, "logprob": logprob} for token, logprob in self.top]
        return {"token_id": self.token_id, "logprob": self.logprob, "rank": self.rank, "top": top}


@dataclass(frozen=True)
class Output:
    """One finished sample. Times are seconds since the request was added and the weights were loaded, on this process's
    clock.

    `finish_reason` is ``stop`` (end-of-sequence token, stop token or stop string), ``length``, ``abort``, or ``error``
    where the logits were NaN or infinite: `error` says at which token, and what to try; text and tokens are those
    before it. `limit` is None, or which one a ``length`` is of: ``max_new_tokens``, or ``context`` where the request
    asked for more tokens than its prompt leaves room for. `token_ids` keep the stop token; `text` has neither it nor
    the stop string. `prompt_logprobs` starts with None: nothing comes before the first token. `meta` is the
    request's."""

    id: str
    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    limit: str | None
    prompt_tokens: int
    completion_tokens: int
    ttft_s: float
    latency_s: float
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    error: str | None = None
    meta: Any = None


@dataclass(frozen=True)
class Update:
    """What one step added to a sample: new tokens and text, and the whole `output` when it is finished."""

    request_id: str
    index: int
    token_ids: list[int]
    text: str
    output: Output | None = None


@dataclass
class Stats:
    """Counts over the engine's life. Bytes are per device; stage-ticks count every stage in every tick."""

    load_seconds: float = 0.0  # until this process's weights are on its devices
    load_bytes: int = 0  # read by this process
    prefill_dispatches: int = 0
    decode_dispatches: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_bytes: int = 0  # weights and cached keys and values that the decode steps had to read
    stage_ticks: int = 0
    idle_stage_ticks: int = 0
    steady_stage_ticks: int = 0
    steady_idle_stage_ticks: int = 0
    preemptions: int = 0
    work_seconds: float = 0.0  # from each first scheduling to the last result, less `compile_seconds` in between
    compiled_programs: int = 0
    compile_seconds: float = 0.0


def non_finite(where: str, dtype: str) -> str:
    """The error of a sample whose logits are NaN or infinite."""
    weights = "the weights of the checkpoint hold NaN, infinite or far too large numbers"
    advice = {
        "float16": f"numbers above 65,504 overflow: try dtype bfloat16 or float32; if that is no better, {weights}",
        "bfloat16": f"try dtype float32; if that is no better, {weights}",
        "float32": weights,
    }
    return f"non-finite logits (NaN or infinite) at {where}, in {dtype}: {advice[dtype]}"


def stop_ids(params: SamplingParams, eos_token_ids: tuple[int, ...]) -> tuple[int, ...]:
    """The tokens that end a request."""
    return tuple(params.stop_token_ids) + (() if params.ignore_eos else eos_token_ids)
