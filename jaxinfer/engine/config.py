"""The engine's settings, checked once before anything is allocated."""

from collections.abc import Mapping
from dataclasses import dataclass, field

DTYPES = ("bfloat16", "float16", "float32")
KERNELS = ("auto", "on", "off")
LOAD_FORMATS = ("checkpoint", "dummy")
MOST_STEPS = 1024  # of a decode block
LARGEST_PAGE = 1024  # tokens
LONG_ROW, SHORT_ROW = 512, 32  # tokens per row of a prefill tick


@dataclass(frozen=True)
class EngineConfig:
    """How to run: nothing here changes which tokens a request gets, `dtype`, `load_format` and `seed` excepted.

    Attributes:
      mesh: sizes of the axes ``stage``, ``data``, ``tensor``; one left out is 1.
      dtype: of weights, activations and cache; None takes the checkpoint's.
      stage_layers: layers per stage; None balances them.
      max_batch: sequences that are in work at once, per data shard, at most; None takes 64, and with kernels up to
        1024. Fewer are where the cache would not carry them to their ends, or more would gain nothing.
      page_size: tokens per cache page.
      pages: cache pages per data shard; None fills what memory is left after the weights.
      memory_fraction: share of a device's whole memory that weights, workspace and cache may take, where JAX has taken
        as much (`device.claim_memory`).
      decode_steps: decode steps per dispatch.
      prefill_chunk: prompt tokens per prefill tick and data shard, at most; None takes 512, and with kernels as many as
        let matmuls run at full rate, where memory has room for them.
      prefill_ticks: prefill ticks of that size between two decode blocks while something decodes; None grows with
        max_batch, so that slots fill, and are refilled, before many steps run with few of them.
      max_context: prompt and output tokens of one request; None takes the model's.
      load_threads: threads of each process that read the checkpoint; None takes its cores, at most 8.
      load_format: ``checkpoint``, or ``dummy``: random weights, with nothing read but the manifest (and a tokenizer).
      kernels: ``on``, ``off``, or ``auto``: on where the GPU can run them and the dtype is not float32.
      seed: of requests that bring none, and of dummy weights.
    """

    mesh: Mapping[str, int] = field(default_factory=dict)
    dtype: str | None = None
    stage_layers: tuple[int, ...] | None = None
    max_batch: int | None = None
    page_size: int = 16
    pages: int | None = None
    memory_fraction: float = 0.9
    decode_steps: int = 8
    prefill_chunk: int | None = None
    prefill_ticks: int | None = None
    max_context: int | None = None
    load_threads: int | None = None
    load_format: str = "checkpoint"
    kernels: str = "auto"
    seed: int = 0

    def __post_init__(self):
        for name in ("max_batch", "page_size", "decode_steps", "prefill_chunk", "prefill_ticks", "load_threads"):
            value = getattr(self, name)
            if not isinstance(value, int | None):
                raise ValueError(f"{name}: found {value!r}, legal is a whole number")
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value} is below 1")
        if self.decode_steps > MOST_STEPS:
            raise ValueError(f"decode_steps: {self.decode_steps} is above {MOST_STEPS}: a block cannot be interrupted")
        if self.page_size > LARGEST_PAGE:
            raise ValueError(
                f"page_size: {self.page_size} is above {LARGEST_PAGE}: a sequence fills its last page by half"
            )
        if self.pages is not None and self.pages < 2:
            raise ValueError(f"pages: {self.pages} is below 2 (one page is the null page)")
        if self.max_context is not None and self.max_context < 2:
            raise ValueError(f"max_context: {self.max_context} is below 2")
        if not 0 < self.memory_fraction <= 1:
            raise ValueError(f"memory_fraction: {self.memory_fraction} is not in (0, 1]")
        if self.load_format not in LOAD_FORMATS:
            raise ValueError(f"load_format: {self.load_format!r} is not one of {', '.join(LOAD_FORMATS)}")
        if self.kernels not in KERNELS:
            raise ValueError(f"kernels: {self.kernels!r} is not one of {', '.join(KERNELS)}")
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype: {self.dtype!r} is not one of {', '.join(DTYPES)}")

    def prefill_shapes(self) -> tuple[tuple[int, int], ...]:
        """(rows, tokens per row) of prefill ticks, once `prefill_chunk` and `max_batch` are known. A prompt may take
        several rows.

        Without kernels, or for a small chunk: all of `prefill_chunk` tokens, in one row to 16. A large chunk has short
        rows, which leave little empty behind a prompt's end, in ticks of three sizes for many and few waiting tokens;
        and long rows for long prompts, where the kernel reads the cache less often.
        """
        chunk = self.prefill_chunk
        if self.kernels == "off" or chunk < 2048:
            rows = [rows for rows in (1, 4, 16) if chunk % rows == 0 and chunk // rows >= 8 and rows <= self.max_batch]
            return tuple((each, chunk // each) for each in rows or [1])
        sizes = [size // LONG_ROW * LONG_ROW for size in (chunk, chunk // 4, chunk // 16) if size >= LONG_ROW]
        return (sizes[0] // LONG_ROW, LONG_ROW), *((size // SHORT_ROW, SHORT_ROW) for size in sizes)

    def ticks_per_block(self) -> int:
        """`prefill_ticks`, or what it is where none is set, once `prefill_chunk` and `max_batch` are known."""
        # many slots should be full before much is decoded: a step of few rows costs nearly what one of all does
        return self.prefill_ticks or max(1, max(2048, self.max_batch * 256) // max(512, self.prefill_chunk))

    def table_widths(self, max_context: int) -> tuple[int, ...]:
        """Block table widths that programs are compiled for, in pages: each four times the one before."""
        full = -(-max_context // self.page_size)
        widths = [full]
        while widths[-1] > 16:
            widths.append(-(-widths[-1] // 4))
        return tuple(reversed(widths))
