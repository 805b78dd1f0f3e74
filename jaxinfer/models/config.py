"""What a decoder looks like: read once from a Hugging Face ``config.json``, carried by the checkpoint's manifest.

Here is what the families share; each family's file reads its own fields (`families.from_hf`)."""

import sys
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from jaxinfer.checkpoint.files import MEND, CheckpointError, DamagedError

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
LARGEST = 2**31 - 1  # of sizes and token ids: arrays are counted in 32 bits
MOST_ENDS = 1024  # tokens that end a text
MOST_LAYERS = 1000  # what is made per layer is made before a tensor is looked at
LAYER_COUNTS = ("num_hidden_layers", "n_layer")
# what Hugging Face calls the same functions elsewhere
SAME_ACTIVATION = {"gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh", "swish": "silu"}
WHEN_TO_STOP = ("bos_token_id", "eos_token_ids")  # generation_config.json and fine-tuning change them


class ConfigError(ValueError):
    """A ``config.json`` that this package cannot run: the message names the field, its value and what is legal."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: the kind, its base and the kind's own numbers under Hugging Face's names.

    Raises:
      ConfigError: a kind that there is not, a number that it needs and that is missing or out of range.
    """

    kind: str = "default"
    theta: float = 10000.0
    parameters: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_rope(self)


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

    Raises:
      ConfigError: a field that is not of its type or range.
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

    def __post_init__(self) -> None:
        _check_model(self)

    @property
    def anew_at(self) -> int | None:
        """The first position whose token changes the rotary frequencies of all before it; None: there is none."""
        longrope = self.rope is not None and self.rope.kind == "longrope"
        return self.rope.parameters["original_max_position_embeddings"] if longrope else None

    @property
    def reduces_per_layer(self) -> int:
        """Sums over ``tensor`` that a layer needs."""
        return 1 if self.parallel else 2

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "ModelConfig":
        """Raises CheckpointError where the fields are not those that this version writes, or have illegal values."""
        _check_fields(cls, data, "model")
        rope = data["rope"]
        if rope is not None:
            _check_fields(RopeConfig, rope, "model: rope")
        sequences = {name: tuple(each) for name, each in data.items() if isinstance(each, list)}
        try:
            return cls(**data | sequences | {"rope": rope and RopeConfig(**rope)})
        except ConfigError as error:
            raise DamagedError(f"manifest.json: damaged, model: {error}; {MEND}") from error


def _check_fields(kind: type, data: dict[str, Any], what: str) -> None:
    if not isinstance(data, dict):
        raise DamagedError(f"manifest.json: damaged, {what}: expected a mapping, found {data!r}; {MEND}")
    known = {each.name: each.default is MISSING and each.default_factory is MISSING for each in fields(kind)}
    if unknown := data.keys() - known.keys():
        names = ", ".join(map(repr, sorted(unknown)))
        newer = "the checkpoint was probably made by a newer version; update"
        raise CheckpointError(f"manifest.json: {what}: unknown field {names}: {newer}")
    if missing := [name for name, needed in known.items() if needed and name not in data]:
        raise DamagedError(f"manifest.json: damaged, {what}: missing {', '.join(missing)}; {MEND}")


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
    if len(ends) > MOST_ENDS:
        raise ConfigError(f"eos_token_id: expected up to {MOST_ENDS} tokens, found {len(ends)}")
    if not all(map(_token, ends)):
        raise ConfigError(f"eos_token_id: expected a token's number, or a list of them, found {eos!r}")
    start = special.get("bos_token_id")
    if start is not None and not _token(start):
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
    rope = RopeConfig(kind, float(theta), raw)
    _check_factors(rope, head_dim)
    return rope


def _check_rope(rope: RopeConfig) -> None:
    """`RopeConfig`'s errors."""
    kind, raw = rope.kind, rope.parameters
    legal({}, "rope_type", kind, *ROPE_KINDS)
    number({"rope_theta": rope.theta}, "rope_theta")
    _in_range("rope's parameters", raw, "names and their values", isinstance(raw, dict))
    named = {f"{kind} rope's {name}": value for name, value in raw.items()}
    needed = {"default": (), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    for name in needed.get(kind, ("factor",)):
        number(named, f"{kind} rope's {name}")
    if kind != "default":
        count(named, f"{kind} rope's original_max_position_embeddings")
    if kind == "yarn":
        _in_range("yarn rope's rope_theta", rope.theta, "other than 1", rope.theta != 1)
    if kind == "llama3":
        low, high = (raw[name] for name in ("low_freq_factor", "high_freq_factor"))
        _in_range("llama3 rope's high_freq_factor", high, f"above low_freq_factor ({low})", high > low)
    if kind == "longrope" and raw.get("attention_factor") is None and raw["factor"] > 1:
        trained = raw["original_max_position_embeddings"]
        _in_range("longrope rope's original_max_position_embeddings", trained, "above 1", trained > 1)
    if kind in ("yarn", "longrope"):
        for name in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            optional(named, f"{kind} rope's {name}", number)
        given(named, f"{kind} rope's truncate", True)


def _check_factors(rope: RopeConfig, head_dim: int) -> None:
    """Raises ConfigError where longrope has not one factor for each pair of a head's width."""
    for name in ("short_factor", "long_factor") if rope.kind == "longrope" else ():
        factors = rope.parameters.get(name)
        if not isinstance(factors, list) or len(factors) != head_dim // 2:
            found = f"{len(factors)} of them" if isinstance(factors, list) else repr(factors)
            raise ConfigError(f"longrope rope's {name}: expected a list of {head_dim // 2} numbers, found {found}")
        for factor in factors:
            number({f"longrope rope's {name}": factor}, f"longrope rope's {name}")


_COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "mlp_width",
    "max_context",
)
_COUNTED_FROM_0 = ("learned_positions", "position_offset")
_NUMBERS = ("norm_eps", "embed_scale")
_NUMBERS_OR_NONE = ("query_scale", "attention_softcap", "logit_softcap")
_CHOICES = {"norm": ("rms", "rms+1", "layer"), "activation": ACTIVATIONS, "parallel_norms": (1, 2)}
_FLAGS = tuple(each.name for each in fields(ModelConfig) if each.type in ("bool", bool))


def _check_model(config: ModelConfig) -> None:
    """`ModelConfig`'s errors."""
    values = vars(config)
    _in_range("architecture", config.architecture, "a text", isinstance(config.architecture, str))
    for name in _COUNTS:
        _in_range(name, values[name], "a whole number from 1", _whole(values[name], 1))
    for name in _COUNTED_FROM_0:
        _in_range(name, values[name], "a whole number from 0", _whole(values[name], 0))
    width = config.embed_width
    _in_range("embed_width", width, "null or a whole number from 1", width is None or _whole(width, 1))
    for name in _NUMBERS + tuple(each for each in _NUMBERS_OR_NONE if values[each] is not None):
        number(values, name)
    for name in _FLAGS:
        _in_range(name, values[name], "true or false", type(values[name]) is bool)
    for name, choices in _CHOICES.items():
        found = values[name]
        _in_range(name, found, " or ".join(map(str, choices)), type(found) is type(choices[0]) and found in choices)
    windows, ends, start = config.windows, config.eos_token_ids, config.bos_token_id
    legal_windows = isinstance(windows, tuple) and all(each is None or _whole(each, 1) for each in windows)
    _in_range("windows", windows, "a list of whole numbers from 1 and nulls", legal_windows)
    _in_range("windows", len(windows), f"num_layers ({config.num_layers}) of them", len(windows) == config.num_layers)
    legal_ends = isinstance(ends, tuple) and len(ends) <= MOST_ENDS and all(map(_token, ends))
    _in_range("eos_token_ids", ends, f"a list of up to {MOST_ENDS} tokens", legal_ends)
    _in_range("bos_token_id", start, "null or a token", start is None or _token(start))
    check_kv_heads("num_kv_heads", config.num_kv_heads, "num_heads", config.num_heads)
    positions = config.max_context + config.position_offset if config.learned_positions else 0
    _in_range("learned_positions", config.learned_positions, f"from {positions}", config.learned_positions >= positions)
    if config.rope is not None:
        _in_range("rope", config.rope, "a rope's fields", isinstance(config.rope, RopeConfig))
        _in_range("head_dim", config.head_dim, "even, for rotary embedding", config.head_dim % 2 == 0)
        _check_factors(config.rope, config.head_dim)


def _in_range(name: str, value: Any, legal: str, holds: bool) -> None:
    if not holds:
        shown = repr(value)
        raise ConfigError(f"{name}: found {shown if len(shown) < 80 else shown[:76] + ' ...'}, legal is {legal}")


def _token(value: Any) -> bool:
    return type(value) is int and abs(value) <= LARGEST


def _whole(value: Any, least: int) -> bool:
    return type(value) is int and least <= value <= LARGEST
