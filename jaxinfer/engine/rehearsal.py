"""What a scheduler will do for given requests, found out without a device: it decides by counts alone."""

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np

from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.engine.scheduler_config import SchedulerConfig
from jaxinfer.engine.sequence import DecodeBlock, PrefillTick, Sequence


def rehearse(config: SchedulerConfig, sequences: Iterable[Sequence]) -> Iterator[PrefillTick | DecodeBlock]:
    """The dispatches of the engine's loop for sequences that begin together and all run to their max_new_tokens, one by
    one: what a dispatch says of its sequences (their pages) holds until the next is asked for. The sequences themselves
    stay as they are; the dispatches are of copies."""
    scheduler = Scheduler(config)
    for each in sequences:
        copy = Sequence(
            each.uid, each.request_id, each.index, each.prompt, each.params, each.seed, each.score, each.anew_at
        )
        scheduler.add(copy)
    fed: dict[Sequence, tuple[int, bool]] = {}  # fed and in_flight, after the last dispatch that had it
    results: deque = deque()
    while scheduler.has_unfinished:
        dispatch = scheduler.schedule()
        if dispatch is not None:
            yield dispatch
            results.append((dispatch, _tokens(dispatch, fed)))
        if dispatch is None or len(results) == 2:  # the engine reads one dispatch late
            for seq, _ in scheduler.complete(*results.popleft()):
                if len(seq.output) >= seq.params.max_new_tokens:
                    scheduler.finish(seq)


def _tokens(dispatch: PrefillTick | DecodeBlock, fed: dict[Sequence, tuple[int, bool]]) -> np.ndarray:
    """What `Scheduler.complete` takes: 0 wherever the device would have a token."""
    if isinstance(dispatch, PrefillTick):
        leaving = dispatch.stages[-1]
        fed.update({row.seq: (row.seq.fed, False) for rows in leaving for row in rows if row and row.final})
        return np.array([[0 if row and row.final else -1 for row in rows] for rows in leaving])
    tokens = np.full((dispatch.steps, len(dispatch.owners), len(dispatch.owners[0])), -1)
    for shard, owners in enumerate(dispatch.owners):
        for at, seq in enumerate(owners):
            if seq is not None:
                before, carried = fed[seq]
                # a pass that enters leaves in the same block, or else in the next one
                tokens[: carried + seq.fed - before - seq.in_flight, shard, at] = 0
                fed[seq] = seq.fed, seq.in_flight
    return tokens
