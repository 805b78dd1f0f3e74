"""Cells of a study as its runs leave them, with figures that a test can check by hand."""

import csv
import json
from pathlib import Path
from typing import Any

GPU_COLUMNS = (
    "time_s,rank,host,gpu,uuid,utilization_percent,memory_utilization_percent,memory_used_bytes,power_w,energy_j,"
    "temperature_c,sm_clock_mhz,memory_clock_mhz,throttle,ecc_corrected,ecc_uncorrected,pcie_tx_bytes_per_s,"
    "pcie_rx_bytes_per_s,nvlink_tx_bytes_per_s,nvlink_rx_bytes_per_s"
).split(",")


def write(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def metrics(work: tuple[float, ...], tokens: int = 512, requests: int = 8, prompt: int = 80, **more: Any) -> dict:
    """Of a run whose repeats took `work` seconds each; `more` are latencies' medians and other fields."""
    ordered = sorted(work)
    middle = ordered[len(ordered) // 2]

    def spread(values: list[float]) -> dict[str, float]:
        return {"median": sorted(values)[len(values) // 2], "least": min(values), "most": max(values)}

    latency = more.pop("latency_s", middle)
    figures = {
        "work_s": spread(ordered),
        "output_tokens_per_s": spread([tokens / each for each in work]),
        "total_tokens_per_s": spread([(tokens + prompt) / each for each in work]),
        "ttft_s.p50": spread([0.1 * each for each in work]),
        "tpot_s.p50": spread([each / 64 for each in work]),
        "itl_s.p99": spread([each / 32 for each in work]),
        "latency_s.p50": spread([latency * each / middle for each in work]),
    }
    phase = {"start": 1.0, "load": 0.5, "preprocess": 0.02, "compile": 4.0, "prefill": 0.2 * sum(work)}
    phase |= {"decode": 0.8 * sum(work), "write": 0.01, "other": 0.3, "load_bytes": 18363392}
    phase["wall_s"] = sum(phase.values()) - 18363392
    found = {
        "unfinished": 0, "requests": requests, "samples": requests, "failed": 0, "prompt_tokens": prompt,
        "output_tokens": tokens, "wall_s": 12.0, "device_kind": "cpu", "bubble_share": 0.02,
        "phases": [{"rank": 0, "host": "n1", **phase, "overlapped": {"compile": 1.0}}],
        "memory": [{"rank": 0, "host": "n1", "host_peak_bytes": 1 << 30,
                    "devices": [{"device": 0, "allocator_peak_bytes": None, "nvml_peak_bytes": None}]}],
        "gpus": None, "energy": None, "repeats": None,
    }  # fmt: skip
    found |= {name: value["median"] for name, value in figures.items() if "." not in name}
    for name in ("ttft_s.p50", "tpot_s.p50", "itl_s.p99", "latency_s.p50"):
        found[name.partition(".")[0]] = {name.partition(".")[2]: figures[name]["median"]}
    if len(work) > 1:
        found["repeats"] = {"count": len(work), "same_tokens": True, "figures": figures, "runs": []}
    return found | more


def gpus(count: int, power: float = 300.0, use: float = 90.0) -> list[dict]:
    return [
        {"rank": 0, "host": "n1", "gpu": gpu, "uuid": f"GPU-{gpu}", "name": "NVIDIA H200",
         "utilization_percent": {"mean": use - gpu, "max": 100}, "memory_peak_bytes": 20 << 30,
         "power_w": {"mean": power, "max": power + 50}, "energy_j": 900.0, "energy_method": "counter"}
        for gpu in range(count)
    ]  # fmt: skip


def profile(stages: int, compute: float = 2.0, transfer: float = 0.2, waiting: float = 0.3) -> dict:
    """Later stages compute 10 % longer each."""
    devices = []
    for stage in range(stages):
        times = {"steps": 8, "compute": compute * (1 + 0.1 * stage), "transfer": transfer, "waiting": waiting}
        times |= {"launch": 0.1, "idle": 0.0, "hidden": 0.05, "unhidden": transfer + waiting}
        devices.append({"rank": 0, "host": "n1", "device": stage, "stage": stage,
                        "programs": {"decode": times, "prefill": times}})  # fmt: skip
    own = [each["programs"]["decode"] for each in devices]
    mean = sum(each["compute"] for each in own) / stages
    kinds = ("compute", "transfer", "waiting", "launch", "idle")
    rows = [{"stage": at, "decode": {name: each[name] for name in kinds}, "prefill": {}} for at, each in enumerate(own)]
    return {
        "model": "m", "mesh": {"stage": stages}, "stage_layers": [1] * stages, "dtype": "float32", "windows": [],
        "devices": devices, "stages": rows, "bubble": {"empty_ticks": 0.02, "time": 0.1},
        "imbalance": {"decode": 1 - mean / max(each["compute"] for each in own), "prefill": None},
    }  # fmt: skip


def gpu_csv(path: Path, count: int, seconds: float = 6.0) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, GPU_COLUMNS, restval="")
        writer.writeheader()
        for step in range(int(seconds * 10)):
            for gpu in range(count):
                busy = 2 < step / 10 < 5
                writer.writerow(
                    {"time_s": step / 10, "rank": 0, "host": "n1", "gpu": gpu, "uuid": f"GPU-{gpu}",
                     "utilization_percent": 95 - gpu if busy else 0, "power_w": 600 + 10 * gpu if busy else 90,
                     "memory_used_bytes": (20 << 30) if step > 10 else 1 << 30}
                )  # fmt: skip


def cell(
    folder: Path,
    experiment: str,
    name: str,
    found: dict | None,
    *,
    kind: str | None = None,
    model: str = "tiny",
    role: str = "point",
    state: str = "done",
    why: str | None = None,
    lines: list[dict] | None = None,
    traced: dict | None = None,
    settings: dict | None = None,
    identity: dict | None = None,
    command: list[str] | None = None,
    tag: str = "0123456789abcdef",
    ended: str = "2026-11-30T12:00:00+0000",
    **x: Any,
) -> Path:
    """Writes one cell and returns its folder; `x` is where it stands: mesh, devices, batch, ..."""
    x = {"mesh": name, "devices": 1, "nodes": 1, "batch": None, "requests": 8, "round": None} | x
    path = folder / "cells" / experiment / f"{model}-{name}-{role}-{x['round']}-{tag}"
    about = {"experiment": experiment, "kind": kind or experiment, "model": model, "cell": name, "hash": tag}
    write(path / "cell.json", about | {"role": role, "x": x, "settings": settings or {}, "identity": identity or {},
                                         "command": command})  # fmt: skip
    write(path / "state.json", {"state": state, "why": why, "ended": ended, "attempts": 1})
    if found is not None:
        write(path / "out.metrics.json", found)
        run = {"started": "2026-11-30T11:59:00+0000", "devices": {"kind": "cpu", "count": x["devices"]},
               "versions": {"jaxinfer": "0.1.0", "jax": "0.10.2"}, "commit": "0d1e2f"}  # fmt: skip
        write(path / "out.run.json", {"settings": {"dtype": "float32"}, "runs": [run]})
    if traced is not None:
        write(path / "out.profile.json", traced)
    if lines is not None:
        (path / "out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def study(folder: Path) -> Path:
    """A study with every kind of experiment, of cells that did well and cells that did not."""
    for mesh, count, work in (("stage=1", 1, (8.0, 8.4, 7.6)), ("stage=2", 2, (4.4, 4.2, 4.6)), ("stage=4", 4, (2.5,))):
        cell(folder, "strong", mesh, metrics(work), devices=count, traced=profile(count))
        weak = metrics(work[:1] if count == 4 else (8.0 + count / 10,), 512 * count, 8 * count, 80 * count)
        cell(folder, "weak", mesh, weak, devices=count, requests=8 * count, traced=profile(count))
    cell(folder, "strong", "stage=8", None, devices=8, state="skipped", why="tiny has 5 layers, stage=8 needs 8")
    for batch, work, latency in ((1, 1.0, 1.0), (4, 1.25, 1.25), (16, 2.5, 2.5), (64, 8.0, 8.0)):
        found = metrics((work, work * 1.1, work * 0.9), 64 * batch, batch, 10 * batch, latency_s=latency)
        cell(folder, "batch", f"b{batch}", found, mesh="stage=2", devices=2, batch=batch, requests=batch,
             traced=profile(2))  # fmt: skip
    for again, (one, two) in enumerate(((4.0, 3.2), (4.2, 3.5), (4.1, 3.3))):
        for role, work in (("a", one), ("b", two)):
            cell(folder, "cut", f"{role}{again}", metrics((work,)), kind="optimization", role=role, round=again,
                 mesh="stage=2", devices=2, settings={"stage_layers": "5,1" if role == "a" else "measured"},
                 traced=profile(2))  # fmt: skip
    for steps, work in ((4, 3.0), (8, 2.0)):
        cell(folder, "grid", f"decode_steps={steps}", metrics((work,)), devices=2, mesh="stage=2", decode_steps=steps)
    top = [{"token_id": 5, "logprob": -0.7}, {"token_id": 6, "logprob": -0.7002}]
    chosen = [{"token_id": 1, "logprob": -0.1, "top": []}, {"token_id": 5, "logprob": -0.7, "top": top}]
    chosen.append({"token_id": 2, "logprob": -0.2, "top": []})
    one = {"id": "a", "index": 0, "token_ids": [1, 5, 2], "logprobs": chosen}
    same = {"id": "b", "index": 0, "token_ids": [3, 4], "logprobs": []}
    base = [one, same]
    other = [one | {"token_ids": [1, 6, 9]}, same]
    cell(folder, "correctness", "stage=1", metrics((8.0,)), role="baseline", lines=base)
    cell(folder, "correctness", "stage=2", metrics((5.0,)), devices=2, lines=other)
    cell(folder, "correctness", "tensor=2", None, devices=2, state="failed", why="exit status 1: out of memory")
    return folder
