"""Figures of a run: latencies as a reader of the stream sees them, rates, and decode's share of the device's peak.

TTFT is the time from a request's arrival to its first token, its wait in the queue included, latency that to its last
one; TPOT the time per token after the first, one value per sample; ITL the time between two deliveries to one sample,
each of up to as many tokens as decode steps share a dispatch. Rates are of the work: from the first scheduling to the
last result, less the time in between that the main thread waited for programs to be compiled.
"""

import time
from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxinfer.telemetry.peaks import memory_bandwidth
from jaxinfer.telemetry.phases import PHASES

PERCENTILES = (50, 90, 99)


def percentiles(seconds: Any) -> dict[str, float] | None:
    """mean, p50, p90, p99 and max; None of nothing."""
    if not len(seconds):
        return None
    values = np.asarray(seconds, np.float64)
    shares = {f"p{share}": float(np.percentile(values, share)) for share in PERCENTILES}
    return {"mean": float(values.mean()), **shares, "max": float(values.max())}


class RunMetrics:
    """Counts what the engine emits; times are of this process's clock."""

    def __init__(self) -> None:
        self._began = self._ended = time.perf_counter()
        self._ttft, self._tpot, self._itl = array("d"), array("d"), array("d")
        self._latency = array("d")
        self._last: dict[tuple[str, int], float] = {}
        self._requests: set[str] = set()
        self._samples = 0
        self._limits = {"max_new_tokens": 0, "context": 0}
        self._prompt_tokens = 0
        self._output_tokens = 0
        self._failed = 0
        self._first_failure: str | None = None

    def add(self, update: Any) -> None:
        """An `Update` of the engine, as soon as it is there."""
        key, now = (update.request_id, update.index), time.perf_counter()
        if update.token_ids:
            self._ended = now
            if key in self._last:
                self._itl.append(now - self._last[key])
            self._last[key] = now
        output = update.output
        if output is None:
            return
        self._last.pop(key, None)
        self._samples += 1
        if output.limit is not None:
            self._limits[output.limit] += 1
        if output.error is not None:
            self._failed += 1
            self._first_failure = self._first_failure or f"id {output.id!r}, index {output.index}: {output.error}"
        self._output_tokens += output.completion_tokens
        if output.id not in self._requests:
            self._requests.add(output.id)
            self._prompt_tokens += output.prompt_tokens
        if output.completion_tokens:
            self._ttft.append(output.ttft_s)
            self._latency.append(output.latency_s)
        if output.completion_tokens > 1:
            self._tpot.append((output.latency_s - output.ttft_s) / (output.completion_tokens - 1))

    @property
    def window(self) -> tuple[float, float]:
        """From where it began to count to the last token, as `time.perf_counter`."""
        return self._began, self._ended

    @property
    def output_tokens(self) -> int:
        return self._output_tokens

    def summary(self, stats: Mapping[str, Any], device_kind: str) -> dict[str, Any]:
        """All figures as JSON; `stats` are the engine's counts, of which the same call may be made once more later."""
        wall, work = time.perf_counter() - self._began, stats["work_seconds"]
        seconds = stats["decode_seconds"]
        bandwidth, peak = stats["decode_bytes"] / seconds if seconds else None, memory_bandwidth(device_kind)
        return {
            "requests": len(self._requests),
            "samples": self._samples,
            "ended_by_limit": self._limits,
            "failed": self._failed,
            "first_failure": self._first_failure,
            "prompt_tokens": self._prompt_tokens,
            "output_tokens": self._output_tokens,
            "wall_s": wall,
            "work_s": work,
            "load_bytes_per_s": _share(stats["load_bytes"], stats["load_seconds"]),
            "output_tokens_per_s": _share(self._output_tokens, work),
            "total_tokens_per_s": _share(self._prompt_tokens + self._output_tokens, work),
            "ttft_s": percentiles(self._ttft),
            "tpot_s": percentiles(self._tpot),
            "itl_s": percentiles(self._itl),
            "latency_s": percentiles(self._latency),
            "bubble_share": _share(stats["idle_stage_ticks"], stats["stage_ticks"]),
            "steady_bubble_share": _share(stats["steady_idle_stage_ticks"], stats["steady_stage_ticks"]),
            "device_kind": device_kind,
            "decode_bytes_per_s": bandwidth,
            "peak_bytes_per_s": peak,
            "share_of_peak": _share(bandwidth, peak),
            "engine": dict(stats),
        }


def since(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's counts of a part of its life: what was loaded and compiled for it may have come earlier."""
    whole = ("load_seconds", "load_bytes", "compiled_programs")
    return {name: value - (0 if name in whole else before[name]) for name, value in after.items()}


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def show(summary: Mapping[str, Any], notes: Mapping[str, int]) -> None:
    """The summary as a table on standard error; `notes` are counts of the command's own, shown first."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, title="summary", title_justify="left")
    for name, text in rows(summary, notes):
        table.add_row(name, text)
    Console(stderr=True, highlight=False).print(table)


def rows(summary: Mapping[str, Any], notes: Mapping[str, int]) -> list[tuple[str, str]]:
    """Name and text of each line of the table."""
    engine = summary["engine"]
    requests = f"{summary['requests']:,} ({summary['samples']:,} samples)"
    tokens = f"{summary['prompt_tokens']:,} prompt + {summary['output_tokens']:,} output"
    limits = ", ".join(f"{count:,} by {name}" for name, count in summary["ended_by_limit"].items() if count)
    programs = f"{engine['compiled_programs']} programs, one per shape bucket"
    wall = f"{summary['wall_s']:.2f} s, {engine['compile_seconds']:.2f} s of it compiling {programs}"
    warm_up, repeats = summary.get("warm_up"), summary.get("repeats")
    if warm_up is not None:
        wall = f"{summary['wall_s']:.2f} s; before it {warm_up['seconds']:.2f} s of warming up {programs}"
    lines = [
        ("requests", requests if summary["samples"] != summary["requests"] else f"{summary['requests']:,}"),
        *((name, f"{count:,}") for name, count in notes.items() if count),
        *([("ended by a limit", limits)] if limits else []),
        *([("failed", f"{summary['failed']:,} samples: non-finite logits")] if summary["failed"] else []),
        ("tokens", tokens),
        *([("repeats", _repeats(repeats))] if repeats else []),
        ("wall time", wall),
        ("work time", f"{summary['work_s']:.2f} s, first admission to last token less compiling"),
        ("output tokens/s", _rate(summary["output_tokens_per_s"])),
        ("total tokens/s", _rate(summary["total_tokens_per_s"])),
        ("TTFT in ms", _latency(summary["ttft_s"])),
        ("TPOT in ms", _latency(summary["tpot_s"])),
        ("ITL in ms", _latency(summary["itl_s"])),
        ("bubble in ticks", _percent(summary["bubble_share"], summary["steady_bubble_share"])),
        *_of_profile(summary),
        ("decode bandwidth", _bandwidth(summary)),
        ("preemptions", f"{engine['preemptions']:,}"),
        ("load", _load(summary)),
        *([("GPUs", _gpus(summary["gpus"]))] if summary.get("gpus") else []),
        *([("energy", _energy(summary["energy"]))] if summary.get("energy") else []),
        *([("phases in s", _phases(summary["phases"]))] if "phases" in summary else []),
        *([("peak memory", _memory(summary["memory"]))] if "memory" in summary else []),
    ]
    return lines


def _repeats(repeats: Mapping[str, Any]) -> str:
    count, asked = repeats["count"], repeats["asked"]
    text = f"{count} of {asked}" if count < asked else f"{count}"
    if "work_s" in repeats["figures"] and count > 1:
        work = repeats["figures"]["work_s"]
        text += f", figures are medians; work time {work['least']:.2f} to {work['most']:.2f} s"
    return text + ("" if repeats["same_tokens"] else "; THEIR TOKENS DIFFER")


def _memory(processes: list[Mapping[str, Any]]) -> str:
    host = [each["host_peak_bytes"] for each in processes if each["host_peak_bytes"] is not None]
    devices = [device for each in processes for device in each["devices"]]
    parts = [f"host {max(host) / 2**30:.2f} GiB"] if host else []
    for name, key in (("allocated", "allocator_peak_bytes"), ("on the GPU", "nvml_peak_bytes")):
        known = [device[key] for device in devices if device[key] is not None]
        parts += [f"{name} {max(known) / 2**30:.2f} GiB"] if known else []
    return (", ".join(parts) or "-") + (" (the most of all ranks)" if len(processes) > 1 else "")


def _rate(per_second: float | None) -> str:
    return "-" if per_second is None else f"{per_second:,.1f}"


def _latency(values: Mapping[str, float] | None) -> str:
    if values is None:
        return "-"
    return ", ".join(f"{name} {values[name] * 1e3:,.1f}" for name in ("mean", "p50", "p90", "p99"))


def _of_profile(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What `profiled.conclude` adds where a run was traced."""
    time, imbalance = summary.get("bubble_time"), summary.get("imbalance")
    lines = [] if time is None else [("bubble in time", f"{time:.1%} of traced decode waiting or idle")]
    if imbalance is not None:
        lines.append(("imbalance", f"{imbalance:.1%} of stages' computing in traced decode (1 - mean / max)"))
    return lines


def _percent(share: float | None, steady: float | None) -> str:
    if share is None:
        return "-"
    return f"{share:.1%} of stage-ticks empty" + ("" if steady is None else f", {steady:.1%} in steady decode")


def _phases(processes: list[Mapping[str, Any]]) -> str:
    text = ", ".join(f"{name} {processes[0][name]:.2f}" for name in PHASES)
    return text + ("" if len(processes) == 1 else " (rank 0)")


def _load(summary: Mapping[str, Any]) -> str:
    engine, rate = summary["engine"], summary["load_bytes_per_s"]
    text = f"{engine['load_bytes'] / 1e9:.3f} GB in {engine['load_seconds']:.2f} s"
    return text if rate is None else f"{text} ({rate / 1e9:.1f} GB/s)"


def _gpus(gpus: list[Mapping[str, Any]]) -> str:
    use = [gpu["utilization_percent"]["mean"] for gpu in gpus if gpu["utilization_percent"]]
    memory = [gpu["memory_peak_bytes"] for gpu in gpus if gpu["memory_peak_bytes"] is not None]
    power = [gpu["power_w"]["mean"] for gpu in gpus if gpu["power_w"]]
    parts = [f"{sum(use) / len(use):.0f} % in use"] if use else []
    parts += [f"{max(memory) / 2**30:.1f} GiB at most"] if memory else []
    parts += [f"{sum(power) / len(power):.0f} W each"] if power else []
    return ", ".join(parts) or "-"


def _energy(energy: Mapping[str, Any]) -> str:
    joules, each = energy["gpu_j"], energy["gpu_j_per_output_token"]
    if joules is None:
        return f"- ({energy['note']})"
    return f"{joules:,.0f} J" + ("" if each is None else f", {each:.3g} J per output token") + f" ({energy['note']})"


def _bandwidth(summary: Mapping[str, Any]) -> str:
    if summary["decode_bytes_per_s"] is None:
        return "-"
    text = f"{summary['decode_bytes_per_s'] / 1e9:,.1f} GB/s per device"
    if summary["share_of_peak"] is None:
        return f"{text} (peak of {summary['device_kind']} not known)"
    return f"{text}, {summary['share_of_peak']:.1%} of {summary['peak_bytes_per_s'] / 1e9:,.0f} GB/s"
