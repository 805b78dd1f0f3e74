"""Rotary position embedding (Su et al., "RoFormer", 2021, section 3.2) and the ways to stretch it to longer contexts.

Which frequencies a token gets may depend on how long its sequence is.

- dynamic: on max(prompt length, p + 1) for a token at position p. That is what a prompt in one pass and then
  token-by-token decoding see, and the same again when a preempted sequence is recomputed.
- longrope: on whether the sequence has outgrown the trained length, for all of its tokens. One that grows beyond it is
  computed anew there (`engine/admission.py`): the prefill goes by all its tokens, and decoding by max(prompt, p + 1).
"""

import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np


class Rope(Protocol):
    kind: str
    theta: float
    parameters: dict[str, Any]


def _yarn(rope: Rope, width: int, plain: np.ndarray) -> np.ndarray:
    # Peng et al., "YaRN", 2023, section 3.2: interpolate slow dimensions, keep fast ones, ramp between
    trained, given = rope.parameters["original_max_position_embeddings"], rope.parameters

    def dimension(rotations: float) -> float:
        return width * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(given.get("beta_fast") or 32), dimension(given.get("beta_slow") or 1)
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high += 0.001 if low == high else 0
    keep = 1 - np.clip((np.arange(width // 2) - low) / (high - low), 0, 1)
    return plain * keep + plain / given["factor"] * (1 - keep)


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    # Llama 3.1: wavelengths beyond the trained context are stretched, short ones kept, a smooth step between
    given = rope.parameters
    turns = given["original_max_position_embeddings"] * plain / (2 * math.pi)
    low, high = given["low_freq_factor"], given["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - smooth) * plain / given["factor"] + smooth * plain


def _attention_scale(rope: Rope) -> float:
    given = rope.parameters
    if rope.kind not in ("yarn", "longrope"):
        return 1.0
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    factor = given["factor"]
    if rope.kind == "longrope":  # Ding et al., "LongRoPE", 2024
        return (
            math.sqrt(1 + math.log(factor) / math.log(given["original_max_position_embeddings"])) if factor > 1 else 1.0
        )

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if given.get("mscale") and given.get("mscale_all_dim"):
        return mscale(given["mscale"]) / mscale(given["mscale_all_dim"])
    return mscale(1.0)


def angles(rope: Rope, width: int, positions: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, float32 [B, T, D/2], of tokens at positions [B, T] in sequences of lengths [B] or more."""
    exponent = np.arange(0, width, 2) / width
    plain = rope.theta**-exponent
    lengths = jnp.maximum(lengths[:, None], positions + 1)
    given = rope.parameters
    if rope.kind == "dynamic":
        # NTK-aware scaling: the base grows with the length beyond the trained context
        trained, factor = given["original_max_position_embeddings"], given["factor"]
        grown = factor * jnp.maximum(lengths, trained).astype(jnp.float32) / trained - (factor - 1)
        base = rope.theta * grown ** (width / (width - 2))
        frequency = base[..., None] ** -jnp.asarray(exponent, jnp.float32)
    elif rope.kind == "longrope":
        short, long = (plain / np.asarray(given[name], np.float64) for name in ("short_factor", "long_factor"))
        beyond = lengths[..., None] > given["original_max_position_embeddings"]
        frequency = jnp.where(beyond, jnp.asarray(long, jnp.float32), jnp.asarray(short, jnp.float32))
    else:
        fixed = {
            "default": lambda: plain,
            "linear": lambda: plain / given["factor"],
            "yarn": lambda: _yarn(rope, width, plain),
            "llama3": lambda: _llama3(rope, plain),
        }[rope.kind]()
        frequency = jnp.asarray(fixed, jnp.float32)
    turned = positions[..., None].astype(jnp.float32) * frequency
    scale = _attention_scale(rope)
    return jnp.cos(turned) * scale, jnp.sin(turned) * scale


def no_angles(width: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines that leave everything as it is, for models that tell positions another way."""
    shape = (*positions.shape, width // 2)
    return jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x [B, T, N, D]: dimension i pairs with i + D/2. The arithmetic is float32, the result x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
