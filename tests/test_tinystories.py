"""The embedded model: its size, its shape, and that it writes English without loops."""

import json
import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "tinystories"
FOLDER = EXAMPLE / "model"
VALID = ROOT.parent / "shared" / "data" / "text" / "tinystories_valid.txt"
END = "<|endoftext|>"
SLICE = 40


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def report():
    return json.loads((FOLDER / "training.json").read_text())


def distinct_share(ids: list[int], n: int) -> float:
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams)


def test_folder_is_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 10_000_000


def test_shape_is_what_meshes_need(model, report):
    config = model.config
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.num_hidden_layers >= 6
    assert config.num_attention_heads % 4 == 0
    assert config.num_key_value_heads % 4 == 0
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.intermediate_size % 4 == 0
    assert config.vocab_size % 8 == 0
    assert config.max_position_embeddings >= 1024
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert 3_000_000 <= parameters <= 5_000_000
    assert parameters == report["parameters"]


def test_tokenizer_begins_a_text_and_keeps_every_byte(tokenizer, model):
    text = 'Tom said, "Hello!"\nThe café was  closed. 🐻'
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == tokenizer.eos_token_id == model.config.bos_token_id
    assert tokenizer.bos_token_id not in ids[1:]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) == model.config.vocab_size


def test_prompts_are_input_lines(tokenizer):
    lines = [json.loads(line) for line in (EXAMPLE / "prompts.jsonl").read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines) >= 4
    assert all(set(line) == {"id", "prompt"} and tokenizer(line["prompt"])["input_ids"][1:] for line in lines)


@pytest.mark.slow
def test_held_out_loss_is_what_the_report_says(tokenizer, model, report):
    """Over a slice of the held-out file: within 5 % of the figure over all of it, which stories differ by."""
    if not VALID.exists():
        pytest.skip(f"{VALID} is not here")
    stories = [story.strip() for story in VALID.read_text(encoding="utf-8").split(END)]
    stories = [story for story in stories if story][:SLICE]
    nats, size = 0.0, 0
    for story in stories:
        ids = torch.tensor([tokenizer(story)["input_ids"]])
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits[0]
        nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        size += len(story.encode())
    reported = report["held_out_bits_per_byte"][report["dtype"]]
    assert nats / math.log(2) / size == pytest.approx(reported, rel=0.05)
    assert reported < 0.85


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["Once upon a time", "One day, a little girl named Lily"])
def test_greedy_story_does_not_loop(tokenizer, model, prompt):
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    begin = ids.shape[1]
    with torch.no_grad():
        for _ in range(150):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert distinct_share(ids[0, begin:].tolist(), 4) > 0.7
