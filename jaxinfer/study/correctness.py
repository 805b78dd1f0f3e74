"""Whether two runs of the same prompts, greedy, gave the same tokens, and if not, whether a rounding can be why.

All functions take result lines of `jaxinfer.generate` (or `jaxinfer.study.reference`) as JSON's objects.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Line = dict[str, Any]

# Two correct programs add the same numbers in other orders, so their logits differ, and where the two likeliest tokens
# are nearer to each other than that, they may choose differently. Weights and activations are rounded to the dtype in
# each layer (logits and softmax are float32 always), so the differences grow with the dtype's unit roundoff u: 2^-11 in
# float16, 2^-8 in bfloat16. Measured against float32 in two trained models of 5 and 6 layers, 1,600 tokens each: the
# gap between the two likeliest tokens moved by up to 0.10 nats in float16 (99 % by at most 0.036) and 0.44 in bfloat16
# (0.25), and the greatest margin at which the choice turned was 0.011 and 0.12. 64 u is above that in both dtypes and
# far below what a wrong program does. In float32 orders of sums move the gap by 1e-5, and forms of exp and rsqrt differ
# between devices too: 1e-3 is what the tests of the meshes use.
NEAR_TIE_NATS = {"float32": 1e-3, "float16": 64 * 2.0**-11, "bfloat16": 64 * 2.0**-8}


def near_tie_nats(*dtypes: str) -> float:
    """The margin in nats up to which a divergence can come of rounding: that of the coarsest of these dtypes.

    Raises:
      ValueError: a dtype of another name.
    """
    for dtype in dtypes:
        if dtype not in NEAR_TIE_NATS:
            raise ValueError(f"dtype: found {dtype!r}, legal: {', '.join(NEAR_TIE_NATS)}")
    return max(NEAR_TIE_NATS[dtype] for dtype in dtypes)


def read_lines(path: Path) -> list[Line]:
    """The whole lines of an output, errors among them.

    Raises:
      ValueError: a line that is no result, by its number; OSError: a file that cannot be read.
    """
    lines = []
    with open(path, "rb") as file:
        for number, text in enumerate(file, 1):
            if not text.endswith(b"\n"):
                break  # torn
            try:
                line = json.loads(text)
                if not isinstance(line["id"], str) or ("error" not in line and not isinstance(line["token_ids"], list)):
                    raise TypeError
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(f"{path}, line {number}: not a result of jaxinfer.generate") from None
            lines.append(line)
    return lines


def compare(baseline: Iterable[Line], lines: Iterable[Line], near_tie_nats: float) -> dict[str, Any]:
    """Compares each sample of the baseline with the one of the same id and index in `lines`, token by token.

    Only the first divergence of a sample says something about the program: what comes after continues another text.

    Returns:
      requests: samples of the baseline; exact: those whose tokens are all equal; missing: ids of those that `lines` has
        no result of (neither exact nor divergent, and in no count of tokens).
      tokens: the baseline's, of samples that both have; agreeing: those before the sample's first divergence.
      later_tokens, later_agreeing: positions behind it that both samples have, and how many hold the same token.
      divergences: of each sample that differs, in the baseline's order: id, index, position (from 0), expected and
        found (token ids; None where that sample has ended there), margin_nats and at_least (`_margin`), kind.
      near_ties, errors: how many divergences are of which kind. A "near tie" has a margin of at most `near_tie_nats`,
        which comes back too; all others are an "error": a greater margin, one that is not known, another length.
      drift_nats: the largest difference between the two runs in the logprob of a token of the baseline's, up to the
        divergence and there too, if the other run has it among its likeliest; None without logprobs.
    """
    found = {_key(line): line for line in lines if "error" not in line}
    expected = [line for line in baseline if "error" not in line]
    counts = dict.fromkeys(("exact", "tokens", "agreeing", "later_tokens", "later_agreeing"), 0)
    divergences, missing, drifts = [], [], []
    for line in expected:
        other = found.get(_key(line))
        if other is None:
            missing.append(line["id"])
            continue
        one, two = line["token_ids"], other["token_ids"]
        place = _first_difference(one, two)
        counts["tokens"] += len(one)
        counts["agreeing"] += len(one) if place is None else place
        drifts += _drifts(line, other, len(one) if place is None else place)
        if place is None:
            counts["exact"] += 1
            continue
        counts["later_tokens"] += len(later := list(zip(one[place + 1 :], two[place + 1 :])))
        counts["later_agreeing"] += sum(a == b for a, b in later)
        divergences.append(_divergence(line, other, place, near_tie_nats))
    kinds = [each["kind"] for each in divergences]
    return {
        "requests": len(expected),
        **counts,
        "missing": missing,
        "near_ties": kinds.count("near tie"),
        "errors": kinds.count("error"),
        "drift_nats": max(drifts, default=None),
        "near_tie_nats": near_tie_nats,
        "divergences": divergences,
    }


def _key(line: Line) -> tuple[str, int]:
    return line["id"], line.get("index", 0)


def _first_difference(one: list[int], two: list[int]) -> int | None:
    for place, (a, b) in enumerate(zip(one, two)):
        if a != b:
            return place
    return None if len(one) == len(two) else min(len(one), len(two))


def _drifts(line: Line, other: Line, until: int) -> list[float]:
    pairs = list(zip(line.get("logprobs") or [], other.get("logprobs") or []))
    found = [(one["logprob"], two["logprob"]) for one, two in pairs[:until]]
    for one, two in pairs[until : until + 1]:
        likeliest = {each["token_id"]: each["logprob"] for each in two["top"]}
        found.append((one["logprob"], likeliest.get(one["token_id"])))
    return [abs(one - two) for one, two in found if one is not None and two is not None]  # NaN is null in the file


def _divergence(line: Line, other: Line, place: int, near_tie_nats: float) -> dict[str, Any]:
    expected, found = (each["token_ids"][place : place + 1] or [None] for each in (line, other))
    margin, at_least = _margin(line, place, found[0])
    near = margin is not None and not at_least and margin <= near_tie_nats
    return {
        "id": line["id"],
        "index": line.get("index", 0),
        "position": place,
        "expected": expected[0],
        "found": found[0],
        "margin_nats": margin,
        "at_least": at_least,
        "kind": "near tie" if near else "error",
    }


def _margin(line: Line, place: int, found: int | None) -> tuple[float | None, bool]:
    """How much likelier the baseline holds its own token than the other's, in nats; whether it is more than that: the
    other's token is not among the likeliest that are written down, and the last of these stands for it."""
    logprobs = line.get("logprobs") or []
    if place >= len(logprobs) or found is None:
        return None, False
    own, top = logprobs[place]["logprob"], {each["token_id"]: each["logprob"] for each in logprobs[place]["top"]}
    listed = [value for value in top.values() if value is not None]
    if own is None or not listed:
        return None, False
    if top.get(found) is not None:
        return own - top[found], False
    return own - min(listed), True
