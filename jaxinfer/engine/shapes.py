"""The sizes that programs come in: rows of decode blocks, and what a prefill tick of some shape takes and costs."""

from collections.abc import Iterable

TICK_TOKENS = 256  # what a prefill tick costs beside its tokens, in tokens: reading the weights, launches
WIDE = 64  # rows; up to about as many a step takes as long as reading the weights


def row_buckets(rows: int) -> tuple[int, ...]:
    """Rows per microbatch that decode programs are compiled for, up to `rows`: 1, 4, 16, 64, and from there on each
    WIDE more, since many rows cost arithmetic whether somebody uses them or not."""
    buckets = [size for size in (1, 4, 16) if size < rows]
    return (*buckets, *range(WIDE, rows, WIDE), rows)


def covering(needed: int, rows: int) -> int:
    """The least of `row_buckets` with so many rows."""
    return next(bucket for bucket in row_buckets(rows) if bucket >= needed)


def cost(shape: tuple[int, int]) -> int:
    """Of a prefill tick of (rows, tokens per row), in tokens."""
    return shape[0] * shape[1] + TICK_TOKENS


def taken(left: Iterable[int], shape: tuple[int, int]) -> list[int]:
    """Of sequences with so many tokens left, in order, what a shard's rows of this shape take: each sequence as many
    rows as it fills, until there are no more."""
    (rows, chunk), found = shape, []
    for tokens in left:
        if not rows:
            break
        used = min(rows, -(-tokens // chunk))
        found.append(min(tokens, used * chunk))
        rows -= used
    return found
