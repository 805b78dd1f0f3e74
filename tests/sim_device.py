"""The device as the scheduler sees it, in plain Python, tick by tick, with a model whose tokens betray any mistake.

Each stage has a paged cache of its own. A stage writes what it receives for a position into its page and hands on a
hash of all that it finds through the block table up to there; the token is a hash of what leaves the last stage. So a
page that is shared, stale, overwritten or never written, a token fed twice or not at all, changes what follows.

What is written is turned one way in sequences of up to `anew_at` tokens and another way in longer ones.
"""

from dataclasses import dataclass
from types import SimpleNamespace

from jaxinfer.engine.sequence import DecodeBlock, PrefillTick, Sequence

VOCABULARY = 1009


def request(uid: int, prompt_length: int, new: int, seed: int = 0, params=None, anew_at=None) -> Sequence:
    prompt = tuple(hash((uid, seed, i)) % VOCABULARY for i in range(prompt_length))
    return Sequence(uid, f"r{uid}", 0, prompt, params or SimpleNamespace(max_new_tokens=new), seed, anew_at=anew_at)


def _turned(value: int, length: int, anew_at: int | None) -> int:
    return hash((value, anew_at is not None and length > anew_at))


def _hand_on(stage: int, seen: list[int]) -> int:
    return hash((stage, *seen))


def _sample(seed: int, value: int) -> int:
    return hash((seed, value)) % VOCABULARY


def alone(seq: Sequence, stages: int) -> list[int]:
    """The tokens of a sequence that has the model for itself and needs no pages."""
    caches: list[list[int]] = [[] for _ in range(stages)]
    output: list[int] = []
    pending = list(seq.prompt)
    while len(output) < seq.params.max_new_tokens:
        for value in pending:
            for stage, cache in enumerate(caches):
                cache.append(_turned(value, len(seq.prompt) + len(output), seq.anew_at))
                value = _hand_on(stage, cache)
        output.append(_sample(seq.seed, value))
        pending = output[-1:]
        if len(seq.prompt) + len(output) - 1 == seq.anew_at:
            caches, pending = [[] for _ in range(stages)], [*seq.prompt, *output]
    return output


@dataclass
class _Pass:
    """One token of one slot on its way through the stages, or None in the conveyor where nothing runs."""

    value: int
    position: int


class SimDevice:
    """State [D][slots] of tokens, positions and passes in flight; caches [S][D][pages][page_size]."""

    def __init__(self, config):
        self.config = config
        shards, stages, slots = config.shards, config.stages, config.slots
        self.token = [[-1] * slots for _ in range(shards)]
        self.position = [[0] * slots for _ in range(shards)]
        # [D][S]: rows of the microbatch that each stage receives in the next decode tick
        self.decoding = [[[None] * config.rows for _ in range(stages)] for _ in range(shards)]
        self.shape = None
        self.prefilling: list = []  # [S - 1][D][R]: (row, values) that stage index + 1 receives next
        self.cache = [
            [[[None] * config.page_size for _ in range(config.pages)] for _ in range(shards)] for _ in range(stages)
        ]
        self.busy = 0  # stage-ticks of the last decode block with at least one row in them

    def run(self, dispatch):
        return self._prefill(dispatch) if isinstance(dispatch, PrefillTick) else self._decode(dispatch)

    def _through(self, stage: int, shard: int, seq: Sequence, table, position: int, length: int, value: int) -> int:
        size, cache = self.config.page_size, self.cache[stage][shard]
        assert 0 not in table, "the null page is in a block table"
        cache[table[position // size]][position % size] = _turned(value, length, seq.anew_at)
        seen = [value for page in table[: position // size + 1] for value in cache[page]][: position + 1]
        assert None not in seen, "a position is read that nothing was written to"
        return _hand_on(stage, seen)

    def _prefill(self, tick: PrefillTick) -> list[list[int]]:
        stages, (rows, chunk) = self.config.stages, tick.shape
        assert tick.shape in self.config.prefill_shapes
        if tick.shape != self.shape:
            assert not any(row for stage in tick.stages[1:] for shard in stage for row in shard), "two shapes in flight"
            self.prefilling = [[[None] * rows for _ in range(self.config.shards)] for _ in range(stages - 1)]
            self.shape = tick.shape
        tokens = [[-1] * rows for _ in range(self.config.shards)]
        entering = [
            [row and (row, list(row.seq.tokens[row.start : row.start + row.count])) for row in shard]
            for shard in tick.stages[0]
        ]
        working = [entering, *self.prefilling]
        for s, stage in enumerate(working):
            for d, shard in enumerate(stage):
                ends = {}  # several rows of a sequence follow each other
                for row in filter(None, tick.stages[s][d]):
                    assert ends.setdefault(row.seq, row.start) == row.start, "rows of a sequence are out of order"
                    ends[row.seq] += row.count
                for r, inside in enumerate(shard):
                    row = tick.stages[s][d][r]
                    if row is None:
                        shard[r] = None
                        continue
                    assert inside is not None and inside[0] is row, "a row is not where it should be by now"
                    assert 1 <= row.count <= chunk
                    values = [
                        self._through(s, d, row.seq, row.pages, row.start + i, row.seq.target, value)
                        for i, value in enumerate(inside[1])
                    ]
                    shard[r] = row, values
                    if s == stages - 1 and row.final:
                        tokens[d][r] = _sample(row.seq.seed, values[-1])
                        self.token[d][row.seq.slot] = tokens[d][r]
                        self.position[d][row.seq.slot] = row.start + row.count
        self.prefilling = working[:-1]
        return tokens

    def _decode(self, block: DecodeBlock) -> list[list[list[int]]]:
        stages, rows, steps = self.config.stages, self.config.rows, block.steps
        tokens = [[[-1] * (stages * block.rows) for _ in range(self.config.shards)] for _ in range(steps)]
        self.busy = 0
        for d, owners in enumerate(block.owners):
            conveyor = self.decoding[d]
            for t in range(steps * stages):
                for s in range(stages):
                    m = (t - s) % stages
                    for b in range(block.rows):
                        slot, at = m * rows + b, m * block.rows + b
                        owner = owners[at]
                        if s == 0:
                            fed = owner is not None and self.position[d][slot] < owner.limit
                            conveyor[0][b] = _Pass(self.token[d][slot], self.position[d][slot]) if fed else None
                        elif t < s and not block.keep[d][at]:
                            conveyor[s][b] = None
                        if inside := conveyor[s][b]:
                            at = inside.position
                            inside.value = self._through(s, d, owner, owner.pages, at, at + 1, inside.value)
                    self.busy += any(conveyor[s][: block.rows])
                m = (t + 1) % stages
                for b, inside in enumerate(conveyor[-1][: block.rows]):
                    if inside:
                        slot, at = m * rows + b, m * block.rows + b
                        self.token[d][slot] = _sample(owners[at].seed, inside.value)
                        self.position[d][slot] = inside.position + 1
                        step = t // stages
                        assert tokens[step][d][at] == -1
                        tokens[step][d][at] = self.token[d][slot]
                # rows beyond the bucket stay what they are, whatever that is
                moved = [[None] * rows, *conveyor[:-1]]
                conveyor[:] = [new[: block.rows] + old[block.rows :] for new, old in zip(moved, conveyor, strict=True)]
        return tokens
