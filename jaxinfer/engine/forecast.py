"""Whether the pages of a shard will suffice: each sequence grows by a token per step, and gives all back at its end."""

from collections.abc import Sequence as Several

import numpy as np

from jaxinfer.engine.lengths import OutputLengths
from jaxinfer.engine.sequence import Sequence, State
from jaxinfer.engine.shard import Shard


class Forecast:
    """Of all shards, as they are when it is made; `add` says what came to one since."""

    def __init__(self, shards: Several[Shard], lengths: OutputLengths, page_size: int, decode_steps: int):
        self._page_size, self._steps = page_size, decode_steps
        self._survival = lengths.survival([_made(seq) for shard in shards for seq in shard.residents])
        self._guessing = self._survival.at.size > 0
        self._cached = [np.array([_cached(seq) for seq in shard.residents], np.int64) for shard in shards]
        self._final = [self._finals(shard.residents) for shard in shards]

    def peak(self, place: int, seq: Sequence) -> int:
        """Pages of a shard at the moment when most are held, with one more sequence."""
        now, then = np.append(self._cached[place], _cached(seq)), np.append(self._final[place], self._finals([seq]))
        order = np.argsort(now - then, kind="stable")
        now, then = now[order], then[order]
        left, count = then - now, np.arange(1, len(order) + 1)
        # until the k-th last one ends, those after it grow by as much as it has left, and on to the end of a block
        ahead = left + -left % self._steps
        last = int(np.argmax(np.cumsum(now) + count * left + (count - 1) * (ahead - left)))
        held = self._pages(np.minimum(now + ahead[last], then)[: last + 1])
        if not self._guessing:
            return held
        # a sum of guesses is off by the root of their number
        return held + int(2 * left.mean() * np.sqrt(last + 1)) // self._page_size

    def add(self, place: int, seq: Sequence) -> None:
        self._cached[place] = np.append(self._cached[place], _cached(seq))
        self._final[place] = np.append(self._final[place], self._finals([seq]))

    def held_at_end(self, waiting: Several[Sequence]) -> float:
        """Pages that one of these, or of those that are in, has at its end, on the average."""
        final = np.concatenate([*self._final, self._finals(waiting)])
        return float(np.mean(-(-final // self._page_size)))

    def _pages(self, tokens: np.ndarray) -> int:
        return int((-(-tokens // self._page_size)).sum())

    def _finals(self, sequences: Several[Sequence]) -> np.ndarray:
        """Tokens that each will have in the cache at its end."""
        prompts = np.array([len(seq.prompt) for seq in sequences], np.int64)
        limits = [seq.params.max_new_tokens for seq in sequences]
        outputs = self._survival.expect(list(map(_made, sequences)), limits, [seq.arrival for seq in sequences])
        return prompts + np.maximum(outputs - 1, 0)  # the last new token never enters the cache


def _made(seq: Sequence) -> int:
    """Output tokens, those included that are on their way."""
    return seq.fed - len(seq.prompt) + 1 if seq.state is State.RUNNING else _cached(seq) - len(seq.prompt)


def _cached(seq: Sequence) -> int:
    if seq.state is State.WAITING:
        return len(seq.prompt) + len(seq.output)
    return seq.fed if seq.state is State.RUNNING else seq.target
