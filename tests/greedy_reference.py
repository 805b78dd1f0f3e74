"""Greedy tokens of the embedded model by transformers, in float32 on the CPU: what any mesh must give too."""

from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

STORIES = Path(__file__).parents[1] / "examples" / "tinystories" / "model"
MARGIN = 1e-3  # below it, two correct programs may choose differently


@cache
def model():
    return AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()


@cache
def story(length: int) -> list[int]:
    """A long text by the model itself, so that prompts are sensible at any length."""
    torch.set_num_threads(2)  # a model this small only waits for more
    with torch.no_grad():
        torch.manual_seed(1)
        sampled = {"do_sample": True, "top_k": 50, "max_new_tokens": length, "min_new_tokens": length}
        return model().generate(torch.tensor([[0]]), **sampled)[0].tolist()


def story_prompts(lengths: list[int]) -> dict[str, list[int]]:
    return {str(length): story(max(lengths))[:length] for length in lengths}


def agree_up_to_ties(found: list[int], expected: list[int], margins: list[float]):
    """Equal up to the first place where the reference itself could have gone either way; says whether to the end."""
    for one, other, margin in zip(found, expected, margins, strict=True):
        if margin < MARGIN:
            return False
        assert one == other
    return True


def equal_to_transformers(found, prompts: dict[str, list[int]], reference: torch.nn.Module | None = None) -> None:
    """`reference`: another model than the embedded one."""
    reference, whole = reference or model(), 0
    for name, prompt in prompts.items():
        new = found[name, 0].token_ids
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
        top = logits.topk(2).values
        whole += agree_up_to_ties(new, logits.argmax(-1).tolist(), (top[:, 0] - top[:, 1]).tolist())
    assert whole >= len(prompts) - 2, "too many ties: the comparison would be empty"
