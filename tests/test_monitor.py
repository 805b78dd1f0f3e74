"""The monitor of GPUs: one look, the file, the summary, on a card in the place of NVML's (`nvml_card`)."""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pynvml
import pytest

from convert.run import convert
from jaxinfer import generate
from jaxinfer.cluster.pulse import Alone
from jaxinfer.process import monitor as process_monitor
from jaxinfer.process.monitor import Watch, end_watch, watching
from jaxinfer.process.run import Run
from jaxinfer.telemetry.clock import Passage, apart
from jaxinfer.telemetry.gpu_summary import run_energy, summaries
from jaxinfer.telemetry.gpus import own_gpus
from jaxinfer.telemetry.monitor import Monitor
from jaxinfer.telemetry.nvml import Gpu
from jaxinfer.telemetry.rapl import Rapl
from jaxinfer.telemetry.samples import (
    COLUMNS,
    Part,
    Sample,
    from_row,
    merge,
    merged_path,
    part_files,
    part_path,
    read_samples,
    to_row,
)
from nvml_card import UNSIGNED_INT, Card
from processes import free_port, own_environment


@pytest.fixture
def card(monkeypatch):
    return Card().install(monkeypatch)


def own():
    return own_gpus([0], None)[0]


def sample(time_s, rank=0, gpu=0, **fields):
    return Sample(time_s, rank, f"node{rank}", gpu, f"GPU-{rank}-{gpu}", **fields)


def test_one_look_tells_all_that_the_card_has(card):
    gpu = own()
    assert (gpu.device, gpu.index, gpu.uuid, gpu.name) == (0, 3, "GPU-aa", "Card")
    card.reasons = pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonGpuIdle
    first = gpu.look(10.0)
    assert first.pop("energy_j") == 0
    assert first == {
        "utilization_percent": 90,
        "memory_utilization_percent": 40,
        "memory_used_bytes": 5 << 30,
        "power_w": pytest.approx(200),
        "temperature_c": 55,
        "sm_clock_mhz": 1980,
        "memory_clock_mhz": 2619,
        "throttle": "power cap",
        "ecc_corrected": 2,
        "ecc_uncorrected": 0,
    }
    card.fields[138, 0xFFFFFFFF] = (3, 1500)
    card.fields[197, 0] = (UNSIGNED_INT, 1 << 10)  # it went round
    second = gpu.look(10.5)
    assert second["nvlink_tx_bytes_per_s"] == 500 * 1024 / 0.5 and second["nvlink_rx_bytes_per_s"] == 0
    assert second["pcie_tx_bytes_per_s"] == ((1 << 32) - (1 << 20) + (1 << 10)) / 0.5
    assert "ecc_uncorrected" not in second, "it is asked every tenth time"
    assert second["energy_j"] > 0


def test_an_older_driver_is_asked_in_its_own_way(card):
    card.fields.clear()
    card.lacks.add("nvmlDeviceGetMemoryInfo_v2")
    gpu = own()
    first, second = gpu.look(1.0), gpu.look(2.0)
    assert first["power_w"] == pytest.approx(200) and first["energy_j"] == 0 and 0 < second["energy_j"] < 1e6
    assert first["memory_used_bytes"] == (5 << 30) + (1 << 29)
    assert first["pcie_tx_bytes_per_s"] == 7 * 1024 and "nvlink_tx_bytes_per_s" not in first
    assert "pcie_tx_bytes_per_s" not in second, "each question takes 20 ms"


def test_a_card_that_tells_nothing_is_measured_in_nothing(card):
    card.fields.clear()
    card.lacks |= {name for name in dir(card) if name.startswith("nvmlDeviceGet")} - {"nvmlDeviceGetHandleByIndex_v2"}
    gpu = own()
    assert gpu.look(1.0) == gpu.look(2.0) == {}
    assert (gpu.index, gpu.uuid) == (None, "device 0")


def test_a_question_that_fails_later_leaves_its_cell_empty(card):
    gpu = own()
    card.lacks |= {"nvmlDeviceGetUtilizationRates", "nvmlDeviceGetFieldValues"}
    found = gpu.look(1.0)
    assert found["utilization_percent"] is None and found["power_w"] is None and found["temperature_c"] == 55


def test_gpus_that_nvml_does_not_know_are_left_out(card, monkeypatch):
    assert [gpu.device for gpu in own_gpus([0, 1], None)] == [0]
    assert [gpu.device for gpu in own_gpus([0, 1], ["4", "0"])] == [1], "device 1 is what the variable names second"
    assert own_gpus([2], ["0"]) == []
    card.lacks.add("nvmlInitWithFlags")
    assert own_gpus([0], None) == []


def test_cells_come_back_as_they_were():
    full = Sample(
        1.5, 2, "n", 3, "GPU-x", 90, 40, 5 << 30, 199.125, 12.5, 55, 1980, 2619, "power cap|power brake", 0, 1
    )
    full = full._replace(pcie_tx_bytes_per_s=10.0, pcie_rx_bytes_per_s=1e9, nvlink_tx_bytes_per_s=2e10)
    for each in (full, sample(0.1), sample(0.1, throttle=""), sample(0.1, gpu=None)):
        assert from_row(to_row(each)) == each
    assert to_row(sample(0.1))[5:] == ["", "", "", "", "", "", "", "", "-", "", "", "", "", "", ""]


def test_parts_become_one_file_in_order_of_time(tmp_path):
    output = tmp_path / "out.jsonl"
    rows = [[sample(0.1 * step + rank / 30, rank, gpu) for step in range(3) for gpu in (0, 1)] for rank in (0, 1)]
    for rank, samples in enumerate(rows):
        part = Part(part_path(output, rank))
        part.add(samples)
        part.close()
    with open(part_path(output, 1), "a") as file:
        file.write("0.9,1\n0.9,1,node1,0,GPU-1-0,4")  # a disk that was full, a process that was killed
    for name in ("out.gpu.csv", "out.gpu.csv.partial", "another.gpu.rank-0.csv"):
        (tmp_path / name).write_text("of another run")
    found = [path.name for path in part_files(output)]
    assert found == ["out.gpu.csv.partial", "out.gpu.rank-0.csv", "out.gpu.rank-1.csv"]
    merge([part_path(output, rank) for rank in (0, 1)], merged_path(output))
    assert {path.name for path in tmp_path.iterdir()} == {"out.gpu.csv", "another.gpu.rank-0.csv"}
    with open(tmp_path / "out.gpu.csv", newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0] == list(COLUMNS) and len(lines) == 1 + 12
    assert [(line[0], line[1], line[3]) for line in lines[1:5]] == [
        ("0.0000", "0", "0"),
        ("0.0000", "0", "1"),
        ("0.0333", "1", "0"),
        ("0.0333", "1", "1"),
    ]
    times = [float(line[0]) for line in lines[1:]]
    assert times == sorted(times)


def test_parts_stay_where_the_whole_cannot_be_written(tmp_path):
    output = tmp_path / "out.jsonl"
    Part(part_path(output, 0)).close()
    (tmp_path / "out.gpu.csv" / "in the way").mkdir(parents=True)
    with pytest.raises(OSError):
        merge([part_path(output, 0)], merged_path(output))
    assert part_path(output, 0).exists() and not (tmp_path / "out.gpu.csv.partial").exists()


def test_summary_is_of_the_window_alone():
    samples = [
        sample(
            0.1 * step,
            utilization_percent=step if step <= 50 else 0,
            memory_used_bytes=step << 20 if step <= 80 else 1 << 40,
            power_w=100.0 if step <= 60 else 500.0,
            energy_j=10.0 * step,
            temperature_c=40 + step // 10,
            sm_clock_mhz=2000 - step,
            throttle="power cap|sync boost" if step == 25 else "power cap" if step < 40 else "",
            ecc_uncorrected=1 if step % 10 == 0 else None,
            pcie_tx_bytes_per_s=1e6 * step,
            pcie_rx_bytes_per_s=5.0,
        )
        for step in range(101)
    ]
    (found,) = summaries(samples, {"GPU-0-0": "Card"}, 1.95, 6.05)
    assert found.pop("throttle") == {"power cap": pytest.approx(20 / 41), "sync boost": pytest.approx(1 / 41)}
    assert found == {
        "rank": 0,
        "host": "node0",
        "gpu": 0,
        "uuid": "GPU-0-0",
        "name": "Card",
        "samples": 41,
        "window_s": pytest.approx(4.1),
        "utilization_percent": {"mean": pytest.approx(sum(range(20, 51)) / 41), "max": 50},
        "memory_peak_bytes": 60 << 20,
        "power_w": {"mean": 100, "max": 100},
        "temperature_c": {"max": 46},
        "sm_clock_mhz": {"mean": 1960, "min": 1940},
        "ecc_uncorrected": 1,
        "pcie_bytes_per_s": {"tx": pytest.approx(4e7), "rx": 5.0},
        "nvlink_bytes_per_s": None,
        "energy_j": pytest.approx(410),
        "energy_method": "counter",
    }


def test_summary_of_what_was_not_measured_is_none_and_never_zero():
    (found,) = summaries([sample(0.1 * step) for step in range(60)], {}, 1.0, 5.0)
    place = {name: found.pop(name) for name in ("rank", "host", "gpu", "uuid", "name", "samples", "window_s")}
    assert place["samples"] == 41 and set(found.values()) == {None}
    (outside,) = summaries([sample(0.1 * step, utilization_percent=5) for step in range(60)], {}, 8.0, 9.0)
    assert outside["samples"] == 0 and outside["utilization_percent"] is None


def test_energy_of_a_run_needs_that_of_every_gpu():
    first, second = {"energy_j": 100.0, "energy_method": "counter"}, {"energy_j": 50.0, "energy_method": "counter"}
    assert run_energy([first, second], 2, [3.0, 4.0], 30, 4.0) == {
        "gpu_j": 150.0,
        "output_tokens": 30,
        "gpu_j_per_output_token": 5.0,
        "method": "counter",
        "window_s": 4.0,
        "rapl_j": 7.0,
        "note": "GPUs only",
    }
    untold = {"energy_j": None, "energy_method": None}
    lacking = run_energy([first, untold], 3, [3.0, None], 30, 4.0)
    assert [lacking[name] for name in ("gpu_j", "gpu_j_per_output_token", "method", "rapl_j")] == [None] * 4
    assert lacking["note"] == "GPUs only; not measured: 2 of 3 GPUs did not tell it all the time"
    short = run_energy([untold], 1, [], 30, 1.234)
    assert short["note"] == "GPUs only; not measured: the work took 1.2 s, and the counters need 2"
    assert run_energy([first], 1, [], 0, 4.0)["gpu_j_per_output_token"] is None


def test_clocks_are_apart_by_what_the_barriers_allow():
    # the other's clock shows 5 s more; barriers open at 1 s, 2 s, 3 s of the first's clock
    first = [Passage(0.9, 1.02), Passage(1.95, 2.01), Passage(3.0, 3.05)]
    other = [Passage(6.0, 6.03), Passage(7.0, 7.05), Passage(7.99, 8.01)]
    more, error = apart(first, other)
    assert abs(more - 5) <= error <= 0.01
    assert apart(first, first)[0] == pytest.approx(0)


def wait_for_rows(path, count):
    until = time.monotonic() + 60
    while time.monotonic() < until and (not path.exists() or len(path.read_text().splitlines()) <= count):
        time.sleep(0.02)


def test_the_monitor_samples_to_its_stop(card, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxinfer.telemetry.samples.FLUSH_S", 0.0)
    part, began = tmp_path / "deep" / "part.csv", time.perf_counter()
    monitor = Monitor([own()], part, 2, "node2", began - 100.0, Rapl(tmp_path))
    wait_for_rows(part, 3)
    card.used = 7 << 30
    wait_for_rows(part, 6)
    card.used = 6 << 30
    monitor.window(began, time.perf_counter())
    monitor.stop()
    monitor.stop()
    assert monitor.failed is None and monitor.peaks() == {0: 7 << 30}
    samples = list(read_samples(part))
    assert [each.time_s for each in samples] == sorted(each.time_s for each in samples) and samples[0].time_s > 99.9
    assert {(each.rank, each.host, each.gpu, each.uuid) for each in samples} == {(2, "node2", 3, "GPU-aa")}
    assert samples[0].energy_j == 0 < samples[-1].energy_j
    found = monitor.result()
    assert found["rapl_j"] is None and found["failed"] is None
    assert found["gpus"][0]["memory_peak_bytes"] == 7 << 30 and found["gpus"][0]["name"] == "Card"


def test_a_monitor_that_fails_says_so_and_ends_nothing(card, tmp_path):
    (tmp_path / "file").write_text("")
    monitor = Monitor([own()], tmp_path / "file" / "part.csv", 0, "node0", 0.0)
    monitor.window(0.0, 1.0)
    monitor.stop()
    assert monitor.result() == {"gpus": [], "rapl_j": None, "failed": monitor.failed}
    assert "part.csv" in monitor.failed or "file" in monitor.failed

    class Broken(Gpu):
        def look(self, now):
            raise RuntimeError("a bug")

    monitor = Monitor([Broken(0, own()._handle)], tmp_path / "part.csv", 0, "node0", 0.0)
    monitor.window(0.0, 1.0)
    monitor.stop()
    assert monitor.result()["failed"] == "RuntimeError: a bug"


def test_the_monitors_of_a_run_leave_one_file_and_its_figures(card, tmp_path, capsys):
    output, began = tmp_path / "out.jsonl", time.perf_counter() - 10.0
    run = Run("jaxinfer.generate", argparse.Namespace(), Alone(20.0))
    watch = Watch(Monitor([own()], part_path(output, 0), 0, "node0", began), output, 1, 0.0)
    wait_for_rows(part_path(output, 0), 0)
    time.sleep(0.3)
    found = end_watch(run, watch, (began + 9.0, time.perf_counter()), 30)
    assert [path.name for path in tmp_path.iterdir()] == ["out.gpu.csv"]
    assert [gpu["clock_error_s"] for gpu in found["gpus"]] == [0.0] and found["gpus"][0]["samples"] > 1
    assert found["energy"]["gpu_j"] is None, "the window began before the first sample"
    assert capsys.readouterr().err == "" and watch.peaks() == {0: 5 << 30}
    for nobody in (None, Watch(None, output, 1, 0.0)):
        assert end_watch(run, nobody, (1.0, 2.0), 30) == {"gpus": None, "energy": None}


def test_a_part_that_is_not_to_be_found_is_told(card, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    watch = Watch(Monitor([own()], tmp_path / "elsewhere.csv", 0, "node0", 0.0), output, 1, 0.0)
    end_watch(Run("jaxinfer.generate", argparse.Namespace(), Alone(20.0)), watch, (0.0, 9.0), 30)
    assert f"lacks what is not to be found from here: {part_path(output, 0)}" in capsys.readouterr().err
    assert merged_path(output).exists()


def test_samples_that_cannot_become_one_file_stay_in_parts(card, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out.jsonl"
    (tmp_path / "out.gpu.csv" / "in the way").mkdir(parents=True)
    monkeypatch.setattr(process_monitor, "on_cpu", lambda: False)
    monkeypatch.setattr(process_monitor, "gpus_on", lambda mesh: [own()])
    args = argparse.Namespace(output=str(output), monitor="auto", mesh="tensor=1")
    run = Run("jaxinfer.generate", args, Alone(20.0))
    with watching(run) as watch:
        assert end_watch(run, watch, (0.0, 9.0), 30)["gpus"]
    assert "Is a directory; the samples are in" in capsys.readouterr().err
    assert part_files(output) == [part_path(output, 0)]
    with pytest.raises(OSError), watching(run):
        raise OSError("a run that fails")
    assert not part_files(output)


@pytest.mark.slow
def test_generate_watches_its_gpus(card, tiny, tmp_path, monkeypatch, capsys):
    """On the CPU, with the card for its GPU."""
    convert(tiny, tmp_path / "ckpt", quiet=True)
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(f'{{"prompt_token_ids": [{3 + place}]}}\n' for place in range(3)))
    monkeypatch.setattr(process_monitor, "on_cpu", lambda: False)
    monkeypatch.setattr(process_monitor, "gpus_on", lambda mesh: [own()])
    arguments = ["--model", tmp_path / "ckpt", "--prompts", prompts, "--output", out, "--mesh", "tensor=1"]
    monkeypatch.setattr(
        sys,
        "argv",
        ["generate", *map(str, arguments), "--max-new-tokens", "9", "--ignore-eos", "--warm-up", "--repeats", "2"],
    )
    with pytest.raises(SystemExit) as ended:
        generate.main()
    shown = capsys.readouterr().err
    assert ended.value.code == 0, shown
    metrics = json.loads((tmp_path / "out.metrics.json").read_text())
    (gpu,) = metrics["gpus"]
    assert gpu["uuid"] == "GPU-aa" and metrics["energy"]["output_tokens"] == 2 * 27
    assert 5 << 30 in [each["nvml_peak_bytes"] for each in metrics["memory"][0]["devices"]]
    work = [each["work_s"] for each in metrics["repeats"]["runs"]]
    assert sum(work) <= gpu["window_s"] < metrics["phases"][0]["wall_s"] and "energy" in shown and "GPUs" in shown
    samples = list(read_samples(merged_path(out)))
    assert len(samples) > 1 and samples[-1].time_s < metrics["phases"][0]["wall_s"], "it begins with the process"
    assert not part_files(out)


def run_processes(output, *lacks):
    """What each of as many processes prints; the cards of each lack a function."""
    port, tests = free_port(), Path(__file__).parent
    environment = own_environment(PYTHONPATH=os.pathsep.join([str(tests.parent), str(tests)]))
    command = [sys.executable, str(tests / "monitor_worker.py"), str(output), f"127.0.0.1:{port}", str(len(lacks))]
    started = [
        subprocess.Popen([*command, str(rank), name], env=environment, stdout=subprocess.PIPE, text=True)
        for rank, name in enumerate(lacks)
    ]
    try:
        return [json.loads(process.communicate(timeout=300)[0].splitlines()[-1]) for process in started]
    finally:
        for process in started:
            process.kill()


@pytest.mark.slow
def test_the_monitors_of_several_processes_leave_one_file_on_one_clock(tmp_path):
    output = tmp_path / "out.jsonl"
    part_path(output, 1).write_text("of a run that was killed")
    first, other = run_processes(output, "", "")
    # on one host both read one clock, so that they can be held to the error that they tell
    assert (first["zero"], first["error"]) == (first["began"], 0.0)
    assert 0 < other["error"] < 60 and abs(other["zero"] - first["began"]) <= other["error"]
    assert other["zero"] != other["began"]
    assert other["gpus"] is None and [gpu["rank"] for gpu in first["gpus"]] == [0, 1]
    assert first["gpus"][0]["clock_error_s"] == 0 < first["gpus"][1]["clock_error_s"] < 60
    assert [path.name for path in tmp_path.iterdir()] == ["out.gpu.csv"]
    samples = list(read_samples(tmp_path / "out.gpu.csv"))
    assert {each.rank for each in samples} == {0, 1} and all(each.time_s > 0 for each in samples)
    assert [each.time_s for each in samples] == sorted(each.time_s for each in samples)


@pytest.mark.slow
def test_a_process_without_nvml_leaves_the_others_theirs(tmp_path):
    first, other = run_processes(tmp_path / "out.jsonl", "nvmlInitWithFlags", "")
    assert [gpu["rank"] for gpu in first["gpus"]] == [1] and other["gpus"] is None
    assert first["energy"]["gpu_j"] is None and "of 2 GPUs did not tell it" in first["energy"]["note"]
    assert {each.rank for each in read_samples(tmp_path / "out.gpu.csv")} == {1}
