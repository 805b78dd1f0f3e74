"""Which programs given requests can need: those that a rehearsal runs, and where a request may end early, more."""

from collections.abc import Callable, Sequence

from jaxinfer.engine.programs import Program
from jaxinfer.engine.rehearsal import rehearse
from jaxinfer.engine.request import stop_ids
from jaxinfer.engine.runner import Runner
from jaxinfer.engine.scheduler_config import SchedulerConfig
from jaxinfer.engine.sequence import Sequence as Sample
from jaxinfer.engine.shapes import covering, row_buckets

BEAT_DISPATCHES = 50


def needed_programs(
    runner: Runner,
    config: SchedulerConfig,
    samples: Sequence[Sample],
    eos: tuple[int, ...],
    beat: Callable[[int], None],
) -> list[Program]:
    """Programs for `samples`, which begin together in a new scheduler, in about the order of their first use; `beat` is
    told of each few dispatches.

    Sequences that end early leave others that no rehearsal foresees: of any number of rows up to all of them, tables of
    any width up to the longest, ticks of any shape.
    """
    found: dict[Program, None] = {}
    for number, dispatch in enumerate(rehearse(config, samples)):
        if number % BEAT_DISPATCHES == 0:
            beat(number)
        found[runner.program(dispatch)] = None
    if any(stop_ids(each.params, eos) or each.params.stop for each in samples):
        decoding = [each for each in samples if each.params.max_new_tokens > 1]
        at_once = -(-min(config.max_batch, len(decoding)) // config.stages)
        rows = [each for each in row_buckets(config.rows) if decoding and each <= covering(at_once, config.rows)]
        longest = max(each.cache_tokens for each in samples)
        more = runner.may_follow(rows, config.prefill_shapes, longest, any(each.score for each in samples))
        found |= dict.fromkeys(more)
    return list(found)
