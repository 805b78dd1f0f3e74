"""What a decoder looks like: read once from a Hugging Face ``config.json``, carried by the checkpoint's manifest.

Here is what the families share; each family's file reads its own fields (`families.from_hf`)."""

import sys
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from jaxinfer.checkpoint.files import CheckpointError

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
LARGEST = 2**31 - 1  # of sizes and token ids: arrays are counted in 32 bits
MOST_LAYERS = 1000  # what is made per layer is made before a tensor is looked at
LAYER_COUNTS = ("num_hidden_layers", "n_layer")
# what Hugging Face calls the same functions elsewhere
SAME_ACTIVATION = {"gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh", "swish": "silu"}


class ConfigError(ValueError):
    """A ``config.json`` that this package cannot run: the message names the field, its value and what is legal."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: the kind, its base and the kind's own numbers under Hugging Face's names."""

    kind: str = "default"
    theta: float = 10000.0
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder. Letters of the shapes: V vocabulary, H width, L layers, N query heads, K KV heads, D head width, F MLP
    width. What is not given is as in LLaMA.

    Attributes:
      rope: None where positions are told another way, `alibi` or `learned_positions`.
      windows: layer i's attention window in tokens, None for all.
      norm: ``rms``, ``rms+1`` (its weights are what is above 1) or ``layer`` (with biases).
      norm_first: the norms stand before attention and MLP; else after the sum with their outputs.
      final_norm: there is a norm between the last layer and the head.
      output_norms: attention's and the MLP's outputs are normed too.
      qk_norm: queries and keys are RMS-normed, head by head, before they are rotated.
      parallel: attention and MLP work on the same input, and their outputs are added together.
      parallel_norms: of that input, a norm for both (1), or one each (2).
      query_scale: factor of the attention scores; None is D ** -0.5.
      attention_softcap, logit_softcap: c tanh(x / c) of the scores, of the logits.
      alibi: attention scores grow with the key's position, each head by its own slope.
      learned_positions: rows of a table of positions; the first `position_offset` of them are not used.
      embed_scale: factor of the embedded tokens.
      embed_width: of embedding and head, where matrices lead from there to H and back.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    norm_eps: float
    max_context: int
    rope: RopeConfig | None
    windows: tuple[int | None, ...]
    activation: str = "silu"
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    norm: str = "rms"
    norm_first: bool = True
    final_norm: bool = True
    output_norms: bool = False
    qk_norm: bool = False
    parallel: bool = False
    parallel_norms: int = 1
    query_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    alibi: bool = False
    learned_positions: int = 0
    position_offset: int = 0
    embed_scale: float = 1.0
    embed_width: int | None = None

    @property
    def reduces_per_layer(self) -> int:
        """Sums over ``tensor`` that a layer needs."""
        return 1 if self.parallel else 2

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "ModelConfig":
        """Raises CheckpointError where the fields are not those that this version writes."""
        _check_fields(cls, data, "model")
        rope = data["rope"]
        if rope:
            _check_fields(RopeConfig, rope, "model: rope")
        sequences = {name: tuple(data[name]) for name in ("windows", "eos_token_ids") if name in data}
        return cls(**data | sequences | {"rope": rope and RopeConfig(**rope)})


def _check_fields(kind: type, data: dict[str, Any], what: str) -> None:
    if not isinstance(data, dict):
        raise CheckpointError(f"manifest.json: damaged, {what}: expected a mapping, found {data!r}")
    known = {each.name: each.default is MISSING and each.default_factory is MISSING for each in fields(kind)}
    if unknown := data.keys() - known.keys():
        names = ", ".join(map(repr, sorted(unknown)))
        newer = "the checkpoint was probably made by a newer version; update"
        raise CheckpointError(f"manifest.json: {what}: unknown field {names}: {newer}")
    if missing := [name for name, needed in known.items() if needed and name not in data]:
        raise CheckpointError(f"manifest.json: damaged, {what}: missing {', '.join(missing)}")


_LEGAL = {bool: "true or false", dict: "a mapping", list: "a list"}


def given(hf: dict[str, Any], name: str, default: bool | dict | list) -> Any:
    """The field, which has to be of the default's type; null is false or empty, `default` is for what is left out."""
    kind = type(default)
    value = kind() if (found := hf.get(name, default)) is None else found
    if not isinstance(value, kind):
        raise ConfigError(f"{name}: expected {_LEGAL[kind]}, found {value!r}")
    return value


def number(values: dict[str, Any], name: str) -> float:
    """Raises ConfigError where the field is absent or not a number above 0 that a float can hold."""
    value, most = values.get(name), sys.float_info.max
    if isinstance(value, int) and value > most:
        raise ConfigError(f"{name}: expected a number up to {most:g}, found one of {value.bit_length()} bits")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
        raise ConfigError(f"{name}: expected a number above 0, found {'nothing' if value is None else repr(value)}")
    return value


def count(hf: dict[str, Any], name: str) -> int:
    most = MOST_LAYERS if name in LAYER_COUNTS else LARGEST
    if int(number(hf, name)) != hf[name] or hf[name] > most:
        raise ConfigError(f"{name}: expected a whole number up to {most}, found {hf[name]!r}")
    return int(hf[name])


def optional(hf: dict[str, Any], name: str, read: Callable[[dict[str, Any], str], Any] = count) -> Any:
    """What `read` finds; None for a field that is absent, null or 0, where all of these mean that it is not given."""
    return None if hf.get(name) in (None, 0) else read(hf, name)


def legal(hf: dict[str, Any], name: str, value: Any, *values: Any) -> None:
    """Refuses a field (`value` is what its default comes to) whose value is not one of `values`."""
    if value not in values:
        raise ConfigError(f"{name}: {value!r} is not supported; supported: {', '.join(map(str, values))}")


def activation(name: str, value: Any) -> str:
    value = SAME_ACTIVATION.get(value, value) if isinstance(value, str) else value
    if value not in ACTIVATIONS:
        known = ", ".join((*ACTIVATIONS, *SAME_ACTIVATION))
        raise ConfigError(f"{name}: {value!r} is not supported; supported: {known}")
    return value


def head_width(hf: dict[str, Any], width_field: str, heads_field: str) -> int:
    """D, given or the width's share of a head; even, since rotation and kernels work on halves."""
    width, heads = count(hf, width_field), count(hf, heads_field)
    head_dim = optional(hf, "head_dim")
    if not head_dim and width % heads:
        raise ConfigError(f"{width_field}: {width} is not a multiple of {heads_field} {heads}; head_dim is missing")
    head_dim = head_dim or width // heads
    if head_dim % 2:
        raise ConfigError(f"head_dim: {head_dim} is odd; rotary embedding needs an even one")
    return head_dim


def check_kv_heads(name: str, kv_heads: int, heads_field: str, heads: int) -> int:
    if heads % kv_heads:
        raise ConfigError(f"{name}: {kv_heads} does not divide {heads_field} {heads}")
    return kv_heads


def special_tokens(hf: dict[str, Any], generation: dict[str, Any]) -> dict[str, Any]:
    """The fields of `ModelConfig`; `generation` is ``generation_config.json``, whose tokens are the ones that count."""
    special = hf | {name: value for name, value in generation.items() if value is not None}
    eos = special.get("eos_token_id")
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(each) is int and abs(each) <= LARGEST for each in ends):
        raise ConfigError(f"eos_token_id: expected a token's number, or a list of them, found {eos!r}")
    start = special.get("bos_token_id")
    if start is not None and (type(start) is not int or abs(start) > LARGEST):
        raise ConfigError(f"bos_token_id: expected a token's number, found {start!r}")
    return {"bos_token_id": start, "eos_token_ids": tuple(ends)}


def stretched(rope: RopeConfig, context: int) -> int:
    """The context with the rope's factor, which stretches the trained one: config.json may give that as its maximum."""
    if rope.kind in ("linear", "dynamic", "yarn"):
        trained, factor = rope.parameters["original_max_position_embeddings"], rope.parameters["factor"]
        if factor > LARGEST / trained:
            raise ConfigError(f"{rope.kind} rope's factor: {factor!r} times {trained} positions is above {LARGEST}")
        return max(context, int(trained * factor))
    return context


def read_rope(hf: dict[str, Any], head_dim: int, context: int) -> RopeConfig:
    # transformers 5 holds everything in rope_parameters; 4 spread it over rope_theta and rope_scaling ("type" before
    # 4.43). Which wins where a file has both is transformers' choice
    raw = dict(given(hf, "rope_scaling", {}) or given(hf, "rope_parameters", {}))
    if "full_attention" in raw or "sliding_attention" in raw:
        raise ConfigError("rope_parameters: one set per layer type is not supported; give one for all layers")
    theta = optional(raw, "rope_theta", number) or optional(hf, "rope_theta", number) or 10000.0
    raw.pop("rope_theta", None)
    kind = raw.pop("rope_type", None) or raw.get("type") or "default"
    raw.pop("type", None)
    if kind not in ROPE_KINDS:
        raise ConfigError(f"rope_type: {kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}")
    rotated = raw.get("partial_rotary_factor", hf.get("partial_rotary_factor") or 1.0)
    if rotated != 1.0 or isinstance(rotated, bool):
        raise ConfigError("partial_rotary_factor: only 1.0 is supported (all of a head's width is rotated)")
    # the dynamic kind counts from the context itself; for the others a field outside the dict is the one that counts
    trained = hf.get("original_max_position_embeddings") or raw.get("original_max_position_embeddings")
    raw["original_max_position_embeddings"] = trained if trained and kind in ("llama3", "yarn", "longrope") else context
    stretch = context / count(raw, "original_max_position_embeddings")
    if kind == "longrope" or (kind == "yarn" and "factor" in raw):
        raw["factor"] = raw.get("factor") or stretch  # not given: by how much the context grew
    named = {f"{kind} rope's {name}": value for name, value in raw.items()}
    needed = {"default": (), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    for name in needed.get(kind, ("factor",)):
        number(named, f"{kind} rope's {name}")
    if kind in ("yarn", "longrope"):
        for name in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            optional(named, f"{kind} rope's {name}", number)
        given(named, f"{kind} rope's truncate", True)
    for name in ("short_factor", "long_factor") if kind == "longrope" else ():
        factors = raw.get(name)
        if not isinstance(factors, list) or len(factors) != head_dim // 2:
            found = f"{len(factors)} of them" if isinstance(factors, list) else repr(factors)
            raise ConfigError(f"longrope rope's {name}: expected a list of {head_dim // 2} numbers, found {found}")
        for factor in factors:
            number({f"longrope rope's {name}": factor}, f"longrope rope's {name}")
    return RopeConfig(kind, float(theta), raw)
