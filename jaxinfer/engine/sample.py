"""One sample on the host: its text, its logprobs, and whether the new tokens end it."""

from typing import Any

import numpy as np

from jaxinfer.engine.detokenize import TextStream
from jaxinfer.engine.emit import Emitted
from jaxinfer.engine.request import Output, Request, TokenLogprob, Update, non_finite, stop_ids
from jaxinfer.engine.sequence import Sequence
from jaxinfer.ops.sampling import NON_FINITE


class Sample:
    """Takes the tokens of one sequence as they arrive; `limit` is what `max_new_tokens` follows from (see `Output`),
    `dtype` is for errors."""

    def __init__(
        self,
        request: Request,
        sequence: Sequence,
        tokenizer: Any,
        eos: tuple[int, ...],
        dtype: str,
        limit: str,
        arrived: float,
    ):
        params = request.params
        self.sequence = sequence
        self._dtype, self._limit = dtype, limit
        self._error: str | None = None
        self._request = request
        self.arrived = arrived
        self._first: float | None = None
        self._stops = set(stop_ids(params, eos))
        self._stream = None if tokenizer is None else TextStream(tokenizer, request.prompt_token_ids, params.stop)
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: list[TokenLogprob | None] = [None] * len(request.prompt_token_ids)

    def add_prompt_logprobs(self, start: int, scored: Emitted) -> None:
        """Logprobs of the tokens from start + 1 on, arrays [count, ...]."""
        top = self._request.params.prompt_logprobs
        count = min(len(scored.tokens), len(self._prompt_logprobs) - start - 1)
        wrong = _first_wrong(scored.logprob[:count])
        if wrong is not None and self._error is None:
            self._error = non_finite(f"prompt token {start + 1 + wrong} (prefill)", self._dtype)
        for offset in range(count):
            self._prompt_logprobs[start + 1 + offset] = _token_logprob(scored, offset, top)

    def add(self, tokens: list[int], emitted: Emitted | None, phase: str, now: float) -> Update:
        """New tokens and, where logprobs were asked for, their arrays [count, ...]; `phase` is prefill or decode. The
        update's output is set when the sample is finished; tokens beyond the stop are dropped."""
        self._first = self._first or now
        params, reason = self._request.params, None
        if emitted is not None and (wrong := _first_wrong(emitted.logprob)) is not None:
            tokens = [*tokens[:wrong], NON_FINITE]
        if self._error is not None:
            tokens, reason = [], "error"
        for count, token in enumerate(tokens, 1):
            if token == NON_FINITE:
                tokens, reason = tokens[: count - 1], "error"
                where = f"new token {len(self._token_ids) + count} ({phase})"
                self._error = non_finite(where, self._dtype)
                break
            if token in self._stops and len(self._token_ids) + count > params.min_new_tokens:
                tokens, reason = tokens[:count], "stop"
                break
        known = len(self._token_ids)
        self._token_ids += tokens
        if params.logprobs is not None:
            self._logprobs += [_token_logprob(emitted, offset, params.logprobs) for offset in range(len(tokens))]
        text = ""
        if self._stream is not None:
            # a stop token is not part of the text, but the name of a special one may complete a stop string
            silent = reason == "stop" and not self._stream.is_special(tokens[-1])
            text = self._stream.append(tokens[:-1] if silent else tokens)
        if reason is None and len(self._token_ids) >= self.sequence.params.max_new_tokens:
            reason = "length"
        if self._stream is not None:
            if reason:
                text += self._stream.finish()  # may complete a stop string whose bytes were held back
            if self._stream.stopped is not None:
                reason = "stop"
                del self._token_ids[self._stream.stopped_tokens :], self._logprobs[self._stream.stopped_tokens :]
                tokens = self._token_ids[known:]
        return Update(
            self._request.id, self.sequence.index, tokens, text, self._output(reason, now) if reason else None
        )

    def aborted(self, now: float) -> Update:
        return Update(self._request.id, self.sequence.index, [], "", self._output("abort", now))

    def _output(self, reason: str, now: float) -> Output:
        params = self._request.params
        return Output(
            id=self._request.id,
            index=self.sequence.index,
            text="" if self._stream is None else self._stream.text,
            token_ids=list(self._token_ids),
            finish_reason=reason,
            limit=self._limit if reason == "length" else None,
            prompt_tokens=len(self._request.prompt_token_ids),
            completion_tokens=len(self._token_ids),
            ttft_s=(self._first or now) - self.arrived,
            latency_s=now - self.arrived,
            logprobs=None if params.logprobs is None else self._logprobs,
            prompt_logprobs=None if params.prompt_logprobs is None else self._prompt_logprobs,
            error=self._error if reason == "error" else None,
            meta=self._request.meta,
        )


def _first_wrong(logprobs: np.ndarray) -> int | None:
    """The first that is no number or minus infinity."""
    finite = np.isfinite(logprobs)
    return None if finite.all() else int(finite.argmin())


def _token_logprob(emitted: Emitted, at: int, top: int) -> TokenLogprob:
    likeliest = zip(emitted.top_ids[at][:top], emitted.top_logprobs[at][:top])
    likeliest = [(int(token), float(logprob)) for token, logprob in likeliest if logprob > -np.inf]
    return TokenLogprob(int(emitted.tokens[at]), float(emitted.logprob[at]), int(emitted.rank[at]), likeliest)
