"""After a warm-up requests wait for no program, whatever they ask for and whenever they end; and repeats are alike."""

import json
import random
import signal
import sys

import pytest

from convert.run import convert
from engine_run import finish, make_engine, tokens
from hf_models import make_hf_folder
from jaxinfer import LLM, SamplingParams, generate
from jaxinfer.engine.admission import Admission
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.request import Request
from jaxinfer.telemetry.repeats import flat, over, with_medians


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("warm")
    make_hf_folder(folder / "hf", num_hidden_layers=2)
    convert(folder / "hf", folder / "ckpt", "float32")
    return folder / "ckpt"


def requests(seed: int, count: int, **params) -> list[Request]:
    """`longest`: tokens of a prompt; `stops`: how many token ids end a request, so that most end early."""
    draw = random.Random(seed)
    longest, stops, found = params.pop("longest", 59), params.pop("stops", 0), []
    for place in range(count):
        prompt = [draw.randrange(3, 96) for _ in range(draw.randrange(1, longest + 1))]
        own = {"max_new_tokens": draw.choice([0, 1, 2, 7, 30]), "ignore_eos": True} | params
        own["stop_token_ids"] = draw.sample(range(3, 96), stops)
        found.append(Request(str(place), prompt, SamplingParams(**own)))
    return found


def serve(engine, wanted: list[Request]):
    for request in wanted:
        engine.add(request)
    return tokens(finish(engine))


CASES = {
    "ends at any time": ("tensor=2", {"max_batch": 6}, {"stops": 8, "max_new_tokens": 60}),
    "samples, scores and penalties": (
        "data=2",
        {"page_size": 4},
        {"n": 3, "prompt_logprobs": 2, "temperature": 1.0, "presence_penalty": 0.5, "max_new_tokens": 9},
    ),
    "few pages": ("stage=2", {"max_batch": 8, "pages": 17}, {"stops": 2, "max_new_tokens": 60}),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["ends at any time", *(pytest.param(each, marks=pytest.mark.long) for each in list(CASES)[1:])]
)
def test_nothing_is_compiled_after_it(checkpoint, monkeypatch, case):
    mesh, settings, params = CASES[case]
    if case == "few pages":  # lets in more than the pages carry
        monkeypatch.setattr(Admission, "_surely_carries", lambda self, place, seq: True)
    settings = {"page_size": 8} | settings
    engine = make_engine(checkpoint, mesh, **settings)
    programs = set()
    for seed in range(2):
        wanted = requests(seed, 10, **params)
        for request in wanted:
            engine.add(request)
        told = engine.warm_up()
        programs |= engine.compiled().keys()
        assert told["programs"] == len(programs) > 2 and told["seconds"] > 0
        once = tokens(finish(engine))
        engine.forget()
        assert serve(engine, wanted) == once
        engine.forget()
        assert engine.stats.compile_seconds == 0
        assert engine.compiled().keys() == programs
    if case == "few pages":
        assert engine.stats.preemptions
        assert serve(make_engine(checkpoint, mesh, **settings), wanted) == once


def test_a_python_callers(checkpoint):
    llm = LLM(checkpoint, dtype="float32", max_batch=4, prefill_chunk=32)
    prompts, params = [[5, 6, 7], [8] * 20], SamplingParams(max_new_tokens=6, ignore_eos=True)
    told = llm.warm_up(prompts, params)
    done = llm.generate(prompts, params)
    assert [len(each.token_ids) for each in done] == [6, 6]
    assert told["programs"] == llm.engine.stats.compiled_programs and llm.engine.stats.compile_seconds == 0
    assert all(each.samples[0].latency_s < 60 for each in done)


def run(monkeypatch, capsys, *arguments, status: int = 0) -> str:
    small = ("--dtype", "float32", "--max-batch", "4", "--prefill-chunk", "32")
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments), *small])
    with pytest.raises(SystemExit) as ended:
        generate.main()
    error = capsys.readouterr().err
    assert ended.value.code == status, error
    return error


def test_repeats_of_the_command(checkpoint, tmp_path, monkeypatch, capsys):
    metas = [{"variant": "long", "token_budget": 4}, None, [0, "é", False]]
    lines = [
        {"prompt_token_ids": [5 + i, 7], "max_new_tokens": 4, "temperature": 1, "meta": metas[i]} for i in range(3)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out.jsonl"
    command = ("--model", checkpoint, "--prompts", tmp_path / "in.jsonl", "--output", out, "--warm-up", "--ignore-eos")
    error = run(monkeypatch, capsys, *command, "--repeats", 2)
    assert "2, figures are medians" in error and "warming up" in error
    metrics = json.loads((tmp_path / "out.metrics.json").read_bytes())
    repeats = metrics["repeats"]
    assert (repeats["count"], repeats["asked"], repeats["same_tokens"]) == (2, 2, True)
    assert [each["output_tokens"] for each in repeats["runs"]] == [12, 12] and metrics["output_tokens"] == 12
    assert metrics["engine"]["compile_seconds"] == 0 < metrics["warm_up"]["seconds"]
    figure = repeats["figures"]["ttft_s.p50"]
    assert figure["least"] <= figure["median"] == metrics["ttft_s"]["p50"] <= figure["most"]
    rates = [each["output_tokens"] / each["work_s"] for each in repeats["runs"]]
    assert repeats["figures"]["output_tokens_per_s"]["most"] == pytest.approx(max(rates))
    results = {line["id"]: line for line in map(json.loads, out.read_text("utf-8").splitlines())}
    assert [results[str(place)].get("meta") for place in (1, 2, 3)] == metas and "meta" not in results["2"]
    before = out.read_bytes()
    error = run(monkeypatch, capsys, *command, "--repeats", 2, status=2)
    assert f"error: {out} has results, and --repeats measures whole runs" in error and "--overwrite" in error
    assert out.read_bytes() == before
    # a run that goes on finds meta where it left it, and brings that of what it does
    out.write_bytes(b"".join(line for line in before.splitlines(keepends=True) if json.loads(line)["id"] != "3"))
    run(monkeypatch, capsys, *command)
    again = {line["id"]: line for line in map(json.loads, out.read_text("utf-8").splitlines())}
    for line in (*results.values(), *again.values()):
        del line["ttft_s"], line["latency_s"]
    assert again == results
    assert "found '0', legal is a whole number" in run(monkeypatch, capsys, *command, "--repeats", 0, status=2)


def test_a_stop_signal_ends_the_repeats(checkpoint, tmp_path, monkeypatch, capsys):
    forgotten, forget = [], Engine.forget

    def stop_at_third(engine):
        forgotten.append(1)
        if len(forgotten) == 2:
            signal.raise_signal(signal.SIGTERM)
        forget(engine)

    monkeypatch.setattr(Engine, "forget", stop_at_third)
    (tmp_path / "in.jsonl").write_text('{"prompt_token_ids": [5, 7], "max_new_tokens": 4}\n')
    out = tmp_path / "out.jsonl"
    command = ("--model", checkpoint, "--prompts", tmp_path / "in.jsonl", "--output", out, "--ignore-eos")
    error = run(monkeypatch, capsys, *command, "--repeats", 9)
    assert "stopped by SIGTERM: 2 of 9 repeats were done, the results are whole; --overwrite measures anew" in error
    metrics = json.loads((tmp_path / "out.metrics.json").read_bytes())
    assert (metrics["repeats"]["count"], metrics["repeats"]["asked"], len(metrics["repeats"]["runs"])) == (2, 9, 2)
    assert (metrics["stopped_by"], metrics["unfinished"], metrics["output_tokens"]) == ("SIGTERM", 0, 4)
    assert len(out.read_text().splitlines()) == 1


def test_medians():
    runs = [flat({"a": {"b": each, "n": None}, "c": True, "d": "x", "e": 3}) for each in (3.0, 1.0, 8.0)]
    assert runs[0] == {"a.b": 3.0, "e": 3}
    figures = over([*runs, {"e": 3}])
    assert figures == {"e": {"median": 3, "least": 3, "most": 3}}
    figures = over(runs)
    assert figures["a.b"] == {"median": 3.0, "least": 1.0, "most": 8.0}
    assert with_medians({"a": {"b": 8.0, "n": None}, "e": 3}, figures) == {"a": {"b": 3.0, "n": None}, "e": 3}
    assert over([]) == {}
