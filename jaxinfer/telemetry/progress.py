"""How far a run is: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 10.0


class Progress:
    """Counts `unit` out of `total` and shows the tokens per second; silent where `shown` is false."""

    def __init__(self, what: str, unit: str, total: int = 0, shown: bool = True, scale: bool = False):
        self.what, self.unit, self.total = what, unit, total
        self._shown, self._scale = shown, scale
        self._done = 0
        self._tokens = 0
        self._began = self._said = time.monotonic()
        self._lines = 0
        self._bar: Any = None
        if shown and sys.stderr.isatty():
            self._bar = tqdm(
                total=total,
                desc=what,
                unit=unit if scale else f" {unit}",
                unit_scale=scale,
                dynamic_ncols=True,
                file=sys.stderr,
            )

    def update(self, done: int = 0, tokens: int = 0) -> None:
        """`done` more are finished, `tokens` more tokens exist."""
        self._done += done
        self._tokens += tokens
        if self._bar is not None:
            if self._tokens:
                self._bar.set_postfix_str(self._rate(), refresh=False)
            self._bar.update(done)
        elif self._shown and time.monotonic() - self._said > LINE_SECONDS:
            self._line()

    def to(self, done: int, total: int) -> None:
        """`done` are finished, out of a total that is known by now."""
        self.total = total
        if self._bar is not None:
            self._bar.total = total
        self.update(done - self._done)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._lines:
            self._line()

    def write(self, text: str) -> None:
        """A line on standard output that does not break the bar."""
        if self._bar is not None:
            tqdm.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def _rate(self) -> str:
        return f"{self._tokens / max(time.monotonic() - self._began, 1e-9):,.0f} tok/s"

    def _line(self) -> None:
        self._said = time.monotonic()
        self._lines += 1
        done, total = (tqdm.format_sizeof(each) if self._scale else f"{each:,} " for each in (self._done, self.total))
        rate = f", {self._tokens:,} tokens, {self._rate()}" if self._tokens else ""
        print(f"{self.what}: {done.strip()}/{total}{self.unit}{rate}", file=sys.stderr, flush=True)
