"""Where a run's time goes: a clock that is always in one phase, and runs of the command in which known sleeps stand."""

import json
import subprocess
import sys
import threading
import time

import pytest

from convert.run import convert
from hf_models import make_hf_folder
from jaxinfer import batch, generate, llm
from jaxinfer.engine import engine, loading
from jaxinfer.engine.programs import Programs
from jaxinfer.engine.runner import Runner
from jaxinfer.outputs import Writer
from jaxinfer.telemetry.phases import PHASES, Phases


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phases")
    make_hf_folder(folder / "hf", num_hidden_layers=2)
    convert(folder / "hf", folder / "ckpt", "float32")
    return folder / "ckpt"


def test_one_clock_runs_at_a_time():
    phases = Phases(time.perf_counter() - 100)
    phases.started()
    with phases.within("decode"):
        time.sleep(0.02)
        with phases.within("write"):
            time.sleep(0.03)
        phases.was("prefill")
    with pytest.raises(ZeroDivisionError), phases.within("load"):
        time.sleep(0.02)
        raise ZeroDivisionError
    thread = threading.Thread(target=phases.beside, args=("compile", 7.0))
    thread.start()
    thread.join()
    phases.beside("compile", 1.0)
    told = phases.to_json()
    assert 100 <= told["start"] < 101 and told["write"] >= 0.03 and told["load"] >= 0.02 and told["decode"] >= 0.02
    assert told["compile"] == told["preprocess"] == 0 and told["overlapped"] == {"compile": 8.0}
    assert sum(told[name] for name in PHASES) == pytest.approx(told["wall_s"])
    time.sleep(0.02)
    assert phases.seconds()["other"] >= told["other"] + 0.02 and phases.seconds()["load"] == told["load"]


def test_what_a_phase_turns_out_to_be():
    phases = Phases()
    with phases.within("decode"):
        time.sleep(0.02)
        phases.was("prefill")
    seconds = phases.seconds()
    assert seconds["decode"] == 0 and seconds["prefill"] >= 0.02


def test_when_a_process_began():
    code = "from jaxinfer.telemetry.phases import process_began; print(process_began())"
    before = time.perf_counter()
    done = subprocess.run(["sh", "-c", f"sleep 0.3; exec {sys.executable} -c '{code}'"], capture_output=True, text=True)
    # the kernel counts hundredths; and the time until Python ran is the process's too
    assert before - 0.02 <= float(done.stdout) < before + 0.3


def slower(monkeypatch, owner, name: str, seconds: float) -> list[int]:
    """Makes a function sleep each time; the list has one entry per call."""
    real, calls = getattr(owner, name), []

    def late(*arguments, **options):
        calls.append(1)
        time.sleep(seconds)
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, late)
    return calls


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments), "--dtype", "float32", "--prefill-chunk", "32"])
    with pytest.raises(SystemExit) as ended:
        generate.main()
    assert ended.value.code == 0


def test_sleeps_are_found_in_their_phases(checkpoint, tmp_path, monkeypatch):
    lines = [{"prompt_token_ids": [5 + i, 7, 9], "max_new_tokens": 20, "ignore_eos": True} for i in range(3)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    slept = {
        "preprocess": [(llm, "token_ids", 0.05), (generate, "read_file", 0.1)],
        "load": [(engine, "fit_or_advise", 0.2)],
        "prefill": [(Runner, "prefill", 0.1)],
        "decode": [(Runner, "decode", 0.05)],
        "write": [(Writer, "write", 0.05), (Writer, "sync", 0.1)],
        "other": [(batch, "RunMetrics", 0.2)],
    }
    slower(monkeypatch, Programs, "lower", 0.2)
    slower(monkeypatch, loading, "load", 0.3)
    calls = {name: [(slower(monkeypatch, *each), each[2]) for each in functions] for name, functions in slept.items()}
    out = tmp_path / "out.jsonl"
    run(monkeypatch, "--model", checkpoint, "--prompts", tmp_path / "in.jsonl", "--output", out)
    metrics = json.loads((tmp_path / "out.metrics.json").read_bytes())
    [own] = metrics["phases"]
    assert (own["rank"], own["load_bytes"]) == (0, metrics["engine"]["load_bytes"])
    assert sum(own[name] for name in PHASES) == pytest.approx(own["wall_s"], rel=0.01)
    for name, functions in calls.items():
        assert all(count for count, _ in functions), name
        slept = sum(len(count) * seconds for count, seconds in functions)
        assert own[name] >= slept - 0.1 * (name == "write"), name  # the last sync comes after the figures
    compiled = metrics["engine"]["compile_seconds"]
    assert own["compile"] >= compiled > 0
    assert own["overlapped"]["compile"] >= 0.4 and own["overlapped"]["load"] >= 0.3
    assert metrics["work_s"] <= metrics["wall_s"] - compiled
    assert metrics["output_tokens_per_s"] == pytest.approx(60 / metrics["work_s"])
