"""Energy of the host's processors and their memory as Linux counts it (RAPL under powercap): of all that runs there."""

import re
from pathlib import Path

from jaxinfer.telemetry.counter import Counter

POWERCAP = Path("/sys/class/powercap")


class Rapl:
    """The zones of a host that do not overlap: each ``package-N``, and its ``dram``, which is no part of it. The same
    ones seen through memory-mapped registers (``intel-rapl-mmio``) are left out."""

    def __init__(self, root: Path = POWERCAP):
        self._zones: list[tuple[Path, Counter]] = []
        try:
            found = sorted(path for path in root.iterdir() if re.fullmatch(r"intel-rapl(:\d+){1,2}", path.name))
            for path in found:
                if re.match("package|dram", (path / "name").read_text()):
                    top = int((path / "max_energy_range_uj").read_text()) + 1
                    self._zones.append((path / "energy_uj", Counter(top)))
        except (OSError, ValueError):
            self._zones = []

    def joules(self) -> float | None:
        """Since the first call; look more often than the counters wrap around (minutes). None where there is none, or
        where it is not for every user to read, as on most systems (CVE-2020-8694)."""
        try:
            return sum(counter(int(path.read_text())) for path, counter in self._zones) / 1e6 if self._zones else None
        except (OSError, ValueError):
            return None
