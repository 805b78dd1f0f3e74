"""Equal tokens, near ties and errors: real runs against each other, and against transformers."""

import json
import sys

import pytest
import torch

from convert.run import convert
from hf_models import make_hf_folder
from jaxinfer.study import reference
from jaxinfer.study.correctness import NEAR_TIE_NATS, compare, near_tie_nats, read_lines
from test_cli import STORIES, in_process, run, write_lines

LINES = [{"id": str(place), "prompt_token_ids": [5 + place, 9, 17, 3 * place + 3]} for place in range(4)]
FLOAT32 = NEAR_TIE_NATS["float32"]


def refer(source, prompts, output, *more) -> int:
    arguments = ["reference", "--source", source, "--prompts", prompts, "--output", output, *more]
    return reference.run(reference.parse_arguments([str(each) for each in arguments[1:]]))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder, prompts, and what transformers makes of them."""
    folder = tmp_path_factory.mktemp("model")
    make_hf_folder(folder / "hf", num_hidden_layers=2)
    prompts = write_lines(folder / "in.jsonl", LINES)
    refer(folder / "hf", prompts, folder / "out.jsonl", "--max-new-tokens", 12)
    return folder / "hf", prompts, read_lines(folder / "out.jsonl")


def test_a_run_of_ours_equals_transformers(model, tmp_path, monkeypatch, capsys):
    source, prompts, baseline = model
    convert(source, tmp_path / "ckpt", quiet=True)
    out = tmp_path / "out.jsonl"
    options = ("--max-new-tokens", 12, "--logprobs", 5, "--mesh", "stage=2", "--max-batch", 4, "--prefill-chunk", 32)
    arguments = ("--model", tmp_path / "ckpt", "--prompts", prompts, "--output", out, *options)
    assert in_process(monkeypatch, capsys, *arguments)[0] == 0
    ours = read_lines(out)
    found = compare(baseline, ours, FLOAT32)
    assert (found["requests"], found["exact"], found["missing"], found["divergences"]) == (4, 4, [], [])
    assert found["agreeing"] == found["tokens"] == sum(len(each["token_ids"]) for each in baseline) > 30
    assert 0 < found["drift_nats"] < 1e-4
    timed = ("ttft_s", "latency_s", "text", "logprobs")  # ours has no text without a tokenizer either
    by_id = {each["id"]: each for each in ours}
    for line in baseline:
        other = by_id[line["id"]]
        assert list(line) == list(other)
        assert {name: line[name] for name in line if name not in timed} == {
            name: other[name] for name in other if name not in timed
        }
        for one, two in zip(line["logprobs"], other["logprobs"], strict=True):
            assert [each["token_id"] for each in one["top"]] == [each["token_id"] for each in two["top"]]


def with_twin(source, folder, line, factor):
    """The same model, but for one token's row of the head: `factor` times that of the first token of `line`."""
    twin = make_hf_folder(folder, num_hidden_layers=2)
    token = line["token_ids"][0]
    unused = next(each for each in range(3, 96) if each not in line["token_ids"])
    with torch.no_grad():
        twin.lm_head.weight[unused] = twin.lm_head.weight[token] * factor
    twin.save_pretrained(folder)
    return folder, token, unused


@pytest.mark.parametrize(
    "factors, kind", [((1 - 1e-6, 1 + 1e-6), "near tie"), ((1 - 1e-6, 1.5), "near tie"), ((0.5, 1.5), "error")]
)
def test_two_tokens_that_are_alike_are_a_near_tie_and_others_an_error(model, tmp_path, factors, kind):
    source, _, baseline = model
    line = max(baseline, key=lambda each: each["logprobs"][0]["logprob"])
    prompts = write_lines(tmp_path / "in.jsonl", [each for each in LINES if each["id"] == line["id"]])
    outputs = []
    for place, factor in enumerate(factors):
        folder, token, unused = with_twin(source, tmp_path / str(place), line, factor)
        refer(folder, prompts, tmp_path / f"{place}.jsonl", "--max-new-tokens", 8, "--logprobs", 20)
        outputs.append(read_lines(tmp_path / f"{place}.jsonl"))
    found = compare(*outputs, FLOAT32)
    [divergence] = found["divergences"]
    assert (divergence["kind"], divergence["position"], divergence["at_least"]) == (kind, 0, False)
    assert (divergence["expected"], divergence["found"]) == (token, unused)
    assert (divergence["margin_nats"] <= FLOAT32) == (kind == "near tie")
    assert (found["exact"], found["agreeing"], found["near_ties"]) == (0, 0, int(kind == "near tie"))
    assert found["errors"] == int(kind == "error") and found["later_tokens"] == 7
    # the tie of the second pair hides a wrong program, which its logprobs tell
    assert (found["drift_nats"] > 0.1) == (factors[1] == 1.5)


def test_a_broken_token_is_an_error(model):
    *_, baseline = model
    broken = json.loads(json.dumps(baseline))
    ids, listed = broken[1]["token_ids"], {each["token_id"] for each in baseline[1]["logprobs"][6]["top"]}
    ids[6] = next(each for each in range(3, 96) if each not in listed)
    found = compare(baseline, broken, FLOAT32)
    [divergence] = found["divergences"]
    top = baseline[1]["logprobs"][6]["top"]
    least = top[0]["logprob"] - top[-1]["logprob"]
    assert divergence == {
        "id": "1", "index": 0, "position": 6, "expected": baseline[1]["token_ids"][6], "found": ids[6],
        "margin_nats": pytest.approx(least), "at_least": True, "kind": "error",
    }  # fmt: skip
    later = len(ids) - 7
    assert (found["exact"], found["later_tokens"], found["later_agreeing"]) == (3, later, later)
    assert found["agreeing"] == found["tokens"] - later - 1
    # however wide the bound is: a token that is not even listed is no tie
    assert compare(baseline, broken, 1e3)["errors"] == 1


def test_another_length_a_missing_request_and_a_run_without_logprobs(model):
    *_, baseline = model
    other = json.loads(json.dumps(baseline))
    other[0]["token_ids"] = other[0]["token_ids"][:-2]
    other[2] = {"id": other[2]["id"], "index": 0, "error": "non-finite logits"}
    found = compare(baseline, other, FLOAT32)
    [divergence] = found["divergences"]
    assert (divergence["found"], divergence["margin_nats"], divergence["kind"]) == (None, None, "error")
    assert divergence["position"] == len(baseline[0]["token_ids"]) - 2
    assert (found["missing"], found["requests"], found["exact"]) == (["2"], 4, 2)
    bare = [{name: value for name, value in each.items() if name != "logprobs"} for each in baseline]
    other = json.loads(json.dumps(bare))
    other[3]["token_ids"][0] += 1
    found = compare(bare, other, FLOAT32)
    assert (found["drift_nats"], found["divergences"][0]["margin_nats"], found["errors"]) == (None, None, 1)


def test_a_line_that_is_no_result(tmp_path):
    path = write_lines(tmp_path / "out.jsonl", [{"id": "a", "token_ids": [1]}, {"id": "b"}])
    with pytest.raises(ValueError, match=r"out.jsonl, line 2: not a result"):
        read_lines(path)
    path.write_bytes(b'{"id": "a", "token_ids": [1]}\n{"id": "b", "tok')
    assert len(read_lines(path)) == 1
    assert near_tie_nats("float32", "float16") == 2**-5 < near_tie_nats("bfloat16") == 2**-2
    with pytest.raises(ValueError, match="found 'int8', legal: float32"):
        near_tie_nats("int8")


def test_the_reference_goes_on_where_it_was_stopped(model, tmp_path):
    source, prompts, baseline = model
    out = tmp_path / "out.jsonl"
    refer(source, prompts, out, "--max-new-tokens", 12)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:2]) + lines[2][:40])
    refer(source, prompts, out, "--max-new-tokens", 12)
    assert compare(baseline, read_lines(out), FLOAT32)["exact"] == 4
    assert out.read_bytes().startswith(b"".join(lines[:2]))
    with pytest.raises(Exception, match="max_new_tokens: 12 -> 13"):
        refer(source, prompts, out, "--max-new-tokens", 13)


def test_the_reference_ends_where_generate_does(model, tmp_path):
    source, _, baseline = model
    token = baseline[0]["token_ids"][3]
    first = baseline[0]["token_ids"].index(token)
    lines = [
        LINES[0] | {"stop_token_ids": [token], "meta": {"variant": "2k"}},
        {"id": "long", "prompt_token_ids": [7] * 125, "ignore_eos": True},
    ]
    refer(source, write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", "--max-new-tokens", 12)
    stopped, long = read_lines(tmp_path / "out.jsonl")
    assert stopped["token_ids"] == baseline[0]["token_ids"][: first + 1]
    assert (stopped["finish_reason"], stopped["limit"], stopped["meta"]) == ("stop", None, {"variant": "2k"})
    assert (long["completion_tokens"], long["finish_reason"], long["limit"]) == (3, "length", "context")


@pytest.mark.parametrize(
    "line, message",
    [
        ({"prompt_token_ids": [3], "temperature": 1}, r"line 1 \(id '1'\): temperature: found 1.0, legal is 0.0"),
        ({"prompt_token_ids": [3], "n": 2}, "n: found 2, legal is 1: a reference is greedy"),
        ({"prompt_token_ids": [96]}, "token id 96 is out of range; legal: 0 to 95"),
        ({"prompt_token_ids": [3] * 128}, "128 tokens; legal: 1 to 127"),
        ({"prompt": "text"}, "the checkpoint has no tokenizer"),
        ({"prompt_token_ids": [3], "max_new_token": 3}, "did you mean 'max_new_tokens'"),
    ],
)
def test_the_reference_refuses(model, tmp_path, line, message):
    with pytest.raises(reference.NoReference, match=message):
        refer(model[0], write_lines(tmp_path / "in.jsonl", [line]), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_mistakes_take_one_line(model, tmp_path, monkeypatch, capsys):
    source, prompts, _ = model

    def told(*arguments):
        monkeypatch.setattr(sys, "argv", ["reference", *map(str, arguments)])
        assert reference.main() == 2
        [line] = capsys.readouterr().err.splitlines()
        return line.removeprefix("jaxinfer.study.reference: error: ")

    output = ("--output", tmp_path / "out.jsonl")
    assert told("--source", "/no/such", "--prompts", prompts, *output) == "/no/such: no such folder"
    absent = told("--source", source, "--prompts", "/no/such.jsonl", *output)
    assert absent == "/no/such.jsonl: No such file or directory"
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "torch is not installed: the extra reference brings it" in told(
        "--source", source, "--prompts", prompts, *output
    )


@pytest.mark.long
def test_divergences_of_sixteen_bits_from_transformers_are_near_ties(tmp_path):
    """What the bounds are for, on trained weights: roundings diverge, and none of it is called an error."""
    prompts, out = STORIES / "prompts.jsonl", tmp_path / "reference.jsonl"
    refer(STORIES / "model", prompts, out, "--max-new-tokens", 60)
    convert(STORIES / "model", tmp_path / "ckpt", quiet=True)
    divergences = 0
    for dtype in ("float16", "bfloat16"):
        ours = tmp_path / f"{dtype}.jsonl"
        options = ("--dtype", dtype, "--max-new-tokens", 60, "--logprobs", 5, "--max-batch", 8)
        run("--model", tmp_path / "ckpt", "--prompts", prompts, "--output", ours, *options)
        found = compare(read_lines(out), read_lines(ours), near_tie_nats("float32", dtype))
        assert (found["requests"], found["errors"], found["missing"]) == (6, 0, []), found
        divergences += found["near_ties"]
    assert divergences, "nothing was told apart"
