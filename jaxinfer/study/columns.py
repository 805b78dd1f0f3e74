"""The columns of the study's tables: what each is called, what it means, how it is written, and its value in a cell."""

import json
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import attrs

from jaxinfer.study.results import Cell, Spread, mean, most, number, total

NONE = "–"
GIB = 1 << 30
THROTTLED = 0.01  # share of a GPU's samples
# figures that are measured once per repeat, with where they stand in the metrics
REPEATED = {
    "work_s": "work_s", "output_tokens_per_s": "output_tokens_per_s", "total_tokens_per_s": "total_tokens_per_s",
    "ttft_s": "ttft_s.p50", "tpot_s": "tpot_s.p50", "itl_p99_s": "itl_s.p99", "latency_s": "latency_s.p50",
}  # fmt: skip
PHASES = ("start", "load", "preprocess", "compile", "prefill", "decode", "write", "other")
PROGRAMS = ("prefill", "decode")


def digits(value: float) -> str:
    """Three digits that count; whole numbers from 1,000."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:#.3g}".rstrip(".")


def whole(value: float) -> str:
    return f"{value:,.0f}"


def percent(value: float) -> str:
    return f"{value:.1f}"


def ms(value: float) -> str:
    return digits(value * 1e3)


def gib(value: float) -> str:
    return digits(value / GIB)


@attrs.frozen
class Column:
    """`head` stands over it in Markdown; in CSV it has the name and the unit of the name."""

    head: str
    text: str
    form: Callable[[Any], str] = digits


COLUMNS = {
    "model": Column("model", "the model's name in the study file", str),
    "devices": Column("devices", "devices of the mesh", whole),
    "nodes": Column("nodes", "hosts", whole),
    "mesh": Column("mesh", "how the model is cut; axes left out are 1", str),
    "batch": Column("b", "requests at once, b", whole),
    "requests": Column("requests", "requests of one repeat", whole),
    "round": Column("round", "A and B run in turn, once each per round", whole),
    "role": Column("variant", "A or B", str),
    "prompt_tokens": Column("prompt tokens", "tokens of all prompts of one repeat", whole),
    "output_tokens": Column("output tokens", "tokens generated in one repeat", whole),
    "work_s": Column("T in s", "work time: first admission to last token of one repeat, without compiling"),
    "speedup": Column("speed-up", "T(n0) / T(n), the same requests on n devices"),
    "efficiency_percent": Column("efficiency in %", "speed-up × n0 / n", percent),
    "weak_efficiency_percent": Column(
        "efficiency in %", "T(n0) / T(n), requests in proportion to the devices", percent
    ),
    "scaled_speedup": Column("scaled speed-up", "efficiency × n / n0: work per time against that on n0 devices"),
    "output_tokens_per_s": Column("tokens/s", "output tokens / T"),
    "total_tokens_per_s": Column("all tokens/s", "prompt and output tokens / T"),
    "batch_efficiency_percent": Column(
        "batch efficiency in %", "X(b) / (b / b0 × X(b0)) with X in tokens/s and b0 the least batch: 100 where rows "
        "cost nothing", percent,
    ),
    "power_tokens_per_s2": Column("X/L", "throughput / latency, X(b) / L(b), in tokens/s²"),
    "knee": Column(
        "knee", "the batch with the greatest X(b) / L(b), L the median latency: a larger batch costs more latency than "
        "it brings throughput (Kleinrock, Power and deterministic rules of thumb, ICC 1979)", str,
    ),
    "latency_s": Column("latency in s", "arrival to last token of a request; median of the requests"),
    "ttft_s": Column(
        "TTFT in ms", "time to first token: arrival of a request to its first token, waiting included; median of the "
        "requests", ms,
    ),
    "tpot_s": Column("TPOT in ms", "time per output token after the first; median of the requests", ms),
    "itl_p99_s": Column(
        "ITL p99 in ms", "inter-token latency: between two deliveries to one request, each of up to `decode_steps` "
        "tokens; 99th percentile", ms,
    ),
    "ratio": Column("T(A) / T(B)", "of one round; above 1 B is faster"),
    "exact": Column("exact", "requests whose tokens all equal the baseline's", whole),
    "agreement_percent": Column(
        "agreement in %", "tokens of the baseline before a request's first divergence, of all of its tokens", percent
    ),
    "near_ties": Column(
        "near ties", "requests whose first divergence has a margin (how much likelier the baseline holds its own "
        "token) of at most the near tie limit: rounding can turn the choice", whole,
    ),
    "errors": Column("errors", "requests that diverge in any other way", whole),
    "missing": Column("missing", "requests without a result", whole),
    "near_tie_nats": Column("near tie limit in nats", "64 times the dtype's unit roundoff; 0.001 in float32"),
    "drift_nats": Column("drift in nats", "largest difference of a token's log probability while the tokens agree"),
    "of_best_percent": Column("of the best in %", "tokens/s against the best cell of this table", percent),
    "wall_s": Column(
        "wall in s", "start of the process until its metrics are written: start, load, warm-up, all repeats, profile"
    ),
    "start_s": Column("start in s", "start of the process until its devices are ready"),
    "io_s": Column("I/O in s", "reading the checkpoint and writing results (load + write)"),
    "load_s": Column("load in s", "reading the checkpoint"),
    "write_s": Column("write in s", "writing results"),
    "preprocess_s": Column("preprocessing in s", "reading prompts, chat template, tokenizing"),
    "compile_s": Column("compile in s", "waiting for compilers"),
    "prefill_s": Column("prefill in s", "ticks that compute prompts, of all repeats"),
    "decode_s": Column("decode in s", "steps that generate tokens, of all repeats"),
    "other_s": Column("other in s", "the rest, traced steps included"),
    "communication_s": Column(
        "communication in s", "transfers that no computing hides: their share of the traced steps × prefill and decode "
        "time"
    ),
    "waiting_s": Column("waiting in s", "for another device's data: its share of the traced steps × both phases"),
    "load_bytes": Column("loaded in GiB", "bytes of the checkpoint that all processes read", gib),
    "gpu_use_percent": Column(
        "GPU use in %", "time in which a kernel ran, by NVML, mean of the GPUs over the work time", percent
    ),
    "device_memory_bytes": Column(
        "device memory in GiB", "the most of one device, allocator's peak", gib
    ),
    "nvml_memory_bytes": Column("by NVML in GiB", "the most of one GPU, sampled at 10 Hz, with what others hold", gib),
    "host_memory_bytes": Column("host memory in GiB", "peak of the largest process", gib),
    "gpu_power_w": Column("GPU power in W", "mean over the work time, sum of the GPUs"),
    "gpu_energy_j": Column("GPU energy in J", "of the GPUs only, work time of all repeats"),
    "gpu_j_per_output_token": Column("J/token", "GPU energy / output tokens, GPUs only"),
    "rapl_energy_j": Column("CPU energy in J", "the hosts' processors and their memory, RAPL, same window"),
    "slurm_energy_j": Column("node energy in J", "Slurm's ConsumedEnergyRaw of the job"),
    "slurm_elapsed_s": Column("job in s", "Slurm's elapsed time of the job"),
    "slurm_cpu_s": Column("CPU time in s", "of the job, by Slurm"),
    "decode_step_ms": Column("decode step in ms", "mean of the traced steps and devices"),
    "communication_percent": Column("transfer in %", "of a decode step: transfers that no computing hides", percent),
    "waiting_percent": Column("waiting in %", "of a decode step: for another device", percent),
    "imbalance_percent": Column(
        "imbalance in %", "1 - mean / max of the stages' compute time in a decode step", percent
    ),
    "empty_ticks_percent": Column(
        "empty ticks in %", "bubble by count: ticks of a stage that had no work, of all ticks", percent
    ),
    "bubble_percent": Column("bubble in time in %", "(waiting + idle) / all time of a decode step, traced", percent),
    "state": Column("state", "of the cell", str),
    "note": Column("note", "why a figure is missing, and what else is to be known", str),
}  # fmt: skip
SPREAD = {*REPEATED, "speedup", "efficiency_percent", "weak_efficiency_percent", "scaled_speedup",
          "batch_efficiency_percent", "ratio"}  # fmt: skip
TIME = ["wall_s", "start_s", "io_s", "preprocess_s", "compile_s", "prefill_s", "decode_s", "other_s",
        "communication_s", "waiting_s"]  # fmt: skip
DEVICES = ["gpu_use_percent", "device_memory_bytes", "nvml_memory_bytes", "host_memory_bytes", "gpu_power_w",
           "gpu_energy_j", "gpu_j_per_output_token", "rapl_energy_j", "slurm_energy_j"]  # fmt: skip
STEP = ["decode_step_ms", "communication_percent", "waiting_percent", "imbalance_percent", "empty_ticks_percent",
        "bubble_percent"]  # fmt: skip
CSV_ALONE = ["prompt_tokens", "output_tokens", "total_tokens_per_s", "itl_p99_s", "load_s", "write_s", "load_bytes",
             "slurm_elapsed_s", "slurm_cpu_s"]  # fmt: skip


def values(cell: Cell) -> dict[str, Any]:
    """Every figure of one cell that needs no other; None: not measured."""
    found: dict[str, Any] = {"model": cell.model, "devices": cell.devices or None, "mesh": cell.mesh}
    found |= {name: number(cell.x.get(name)) for name in ("nodes", "batch", "requests", "round")}
    found |= {"role": cell.role, "state": cell.state}
    found["note"] = "; ".join(filter(None, [cell.note, _throttled(cell)]))
    if cell.metrics is None:
        return found
    found |= {name: cell.spread(path) for name, path in REPEATED.items()}
    found["latency_s"] = found["latency_s"] or _latency(cell)
    found |= {name: cell.value(name) for name in ("prompt_tokens", "output_tokens")}
    return found | _phases(cell) | _devices(cell) | _steps(cell, found)


def _latency(cell: Cell) -> Spread | None:
    """Of the result lines, where the metrics have none."""
    try:
        with open(cell.folder / "out.jsonl", encoding="utf-8") as file:
            lines = [json.loads(line) for line in file if line.endswith("\n")]
        known = [value for line in lines if (value := number(line.get("latency_s"))) is not None]
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return Spread(median(known)) if known else None


def _phases(cell: Cell) -> dict[str, float | None]:
    processes = _listed(cell.metrics, "phases")
    found = {f"{name}_s": mean(each.get(name) for each in processes) for name in PHASES}
    found["io_s"] = total([found["load_s"], found["write_s"]])
    found["wall_s"] = most(each.get("wall_s") for each in processes) or cell.value("wall_s")
    found["load_bytes"] = total(each.get("load_bytes") for each in processes)
    return found


def _devices(cell: Cell) -> dict[str, float | None]:
    gpus, memory = _listed(cell.metrics, "gpus"), _listed(cell.metrics, "memory")
    devices = [device for each in memory for device in _listed(each, "devices")]
    sacct = cell.sacct or {}
    return {
        "gpu_use_percent": mean(_in(each, "utilization_percent", "mean") for each in gpus),
        "gpu_power_w": total(_in(each, "power_w", "mean") for each in gpus),
        "device_memory_bytes": most(each.get("allocator_peak_bytes") for each in devices),
        "nvml_memory_bytes": most(each.get("nvml_peak_bytes") for each in devices),
        "host_memory_bytes": most(each.get("host_peak_bytes") for each in memory),
        "gpu_energy_j": cell.value("energy.gpu_j"),
        "gpu_j_per_output_token": cell.value("energy.gpu_j_per_output_token"),
        "rapl_energy_j": cell.value("energy.rapl_j"),
        "slurm_energy_j": number(sacct.get("energy_j")),
        "slurm_elapsed_s": number(sacct.get("elapsed_s")),
        "slurm_cpu_s": number(sacct.get("cpu_s")),
    }


def _throttled(cell: Cell) -> str:
    """Why clocks were held down, where that was so in more than 1 % of a GPU's samples."""
    shares: dict[str, float] = {}
    for each in _listed(cell.metrics, "gpus"):
        known = each.get("throttle")
        for name, share in known.items() if isinstance(known, Mapping) else ():
            shares[name] = max(shares.get(name, 0.0), number(share) or 0.0)
    said = [f"{name} in {share:.0%} of the samples" for name, share in sorted(shares.items()) if share > THROTTLED]
    return f"clocks held down: {', '.join(said)}" if said else ""


def step_times(profile: Mapping[str, Any] | None, program: str) -> dict[str, float] | None:
    """Milliseconds per step of each kind of time, mean of the devices; None where nothing was traced."""
    programs = [_in(each, "programs", program) for each in _listed(profile, "devices")]
    programs = [each for each in programs if isinstance(each, Mapping)]
    times = {name: mean(each.get(name) for each in programs) for name in STEP_TIMES}
    known = {name: time for name, time in times.items() if time is not None}
    return known if known.get("compute") else None


STEP_TIMES = ("compute", "transfer", "waiting", "launch", "idle")  # they sum to the step


def _steps(cell: Cell, found: Mapping[str, Any]) -> dict[str, float | None]:
    shares = {}
    for program in PROGRAMS:
        if times := step_times(cell.profile, program):
            shares[program] = {name: time / sum(times.values()) for name, time in times.items()}
    decode, times = shares.get("decode", {}), step_times(cell.profile, "decode")
    seconds = _phases(cell)

    def spent(name: str) -> float | None:
        return total(
            seconds[f"{program}_s"] * part[name] if seconds[f"{program}_s"] is not None and name in part else None
            for program, part in shares.items()
        )

    def part(value: Any) -> float | None:
        return None if number(value) is None else value * 100

    return {
        "decode_step_ms": sum(times.values()) if times else None,
        "communication_percent": part(decode.get("transfer")),
        "waiting_percent": part(decode.get("waiting")),
        "communication_s": spent("transfer"),
        "waiting_s": spent("waiting"),
        "imbalance_percent": part(_in(cell.profile, "imbalance", "decode")),
        "empty_ticks_percent": part(first(_in(cell.profile, "bubble", "empty_ticks"), cell.value("bubble_share"))),
        "bubble_percent": part(_in(cell.profile, "bubble", "time")),
    }


def first(*values: Any) -> Any:
    return next((each for each in values if each is not None), None)


def _listed(data: Any, name: str) -> list[Mapping[str, Any]]:
    found = data.get(name) if isinstance(data, Mapping) else None
    return [each for each in found if isinstance(each, Mapping)] if isinstance(found, list) else []


def _in(data: Any, *path: str) -> Any:
    for name in path:
        data = data.get(name) if isinstance(data, Mapping) else None
    return data
