"""What the scheduler is told once: slots, pages and the shapes of programs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SchedulerConfig:
    shards: int  # D, data shards, each with its own slots and pages
    stages: int  # S, pipeline stages = decode microbatches
    max_batch: int  # sequences per shard that may hold slots at once
    pages: int  # per shard, the null page included
    page_size: int  # tokens
    decode_steps: int  # K
    prefill_shapes: tuple[tuple[int, int], ...]  # (R, C)
    prefill_ticks: int  # entering ticks of the largest R * C between two decode blocks while sequences decode
    patience: int = 128  # decode blocks wider than need be that cost about as much as compiling a narrower program

    def __post_init__(self):
        for name in ("shards", "stages", "max_batch", "page_size", "decode_steps", "prefill_ticks", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: found {getattr(self, name)}, legal is at least 1")
        if self.pages < 2:
            raise ValueError(f"pages: found {self.pages}, legal is at least 2 (page 0 is the null page)")
        if not self.prefill_shapes or min(min(shape) for shape in self.prefill_shapes) < 1:
            raise ValueError(f"prefill_shapes: found {self.prefill_shapes}, legal is (R, C), ... all at least 1")

    @property
    def rows(self) -> int:
        """Slots per microbatch and shard; where stages do not divide max_batch, some stay empty."""
        return -(-self.max_batch // self.stages)

    @property
    def slots(self) -> int:
        return self.stages * self.rows

    @property
    def prefill_tokens(self) -> int:
        """Token slots of a shard that may enter between two decode blocks while sequences decode."""
        return self.prefill_ticks * max(rows * chunk for rows, chunk in self.prefill_shapes)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)
