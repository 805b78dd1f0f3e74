"""What a decoder looks like: read once from a Hugging Face ``config.json``, carried by the checkpoint's manifest."""

from dataclasses import asdict, dataclass, field
from typing import Any

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
LLAMA_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")


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
    """A LLaMA-family decoder. Letters of the shapes: V vocabulary, H width, L layers, N query heads, K KV heads,
    D head width, F MLP width. ``windows[i]`` is layer i's attention window in tokens, None for all."""

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
    rope: RopeConfig
    windows: tuple[int | None, ...]
    activation: str = "silu"
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "ModelConfig":
        data = dict(data)
        data["rope"] = RopeConfig(**data["rope"])
        data["windows"] = tuple(data["windows"])
        data["eos_token_ids"] = tuple(data["eos_token_ids"])
        return cls(**data)


def from_hf(hf: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
    """Reads a Hugging Face ``config.json`` (the transformers 4 and 5 spellings of rope) as transformers would.

    generation: ``generation_config.json``, whose end and start tokens, where given, are the ones that count.

    Raises:
      ConfigError: an architecture, activation or rope kind that is not supported, a missing field or an illegal value.
    """
    architecture = (hf.get("architectures") or ["(none)"])[0]
    if architecture not in LLAMA_ARCHITECTURES:
        supported = ", ".join(LLAMA_ARCHITECTURES)
        raise ConfigError(f"architectures: {architecture!r} is not supported; supported: {supported}")
    layers, heads, width = (_count(hf, name) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    kv_heads = _kv_heads(hf, architecture, heads)
    activation = hf.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise ConfigError(f"hidden_act: {activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    if not hf.get("head_dim") and width % heads:
        raise ConfigError(f"hidden_size: {width} is not a multiple of num_attention_heads {heads}; head_dim is missing")
    head_dim = hf.get("head_dim") or width // heads
    if head_dim % 2:
        raise ConfigError(f"head_dim: {head_dim} is odd; rotary embedding needs an even one")
    llama_bias = bool(hf.get("attention_bias", False)) and architecture == "LlamaForCausalLM"
    context = _count(hf, "max_position_embeddings")
    rope = _rope(hf, head_dim, context)
    if rope.kind in ("linear", "dynamic", "yarn"):
        # their factor stretches the trained context, which is what config.json may give as its maximum
        context = max(context, int(rope.parameters["original_max_position_embeddings"] * rope.parameters["factor"]))
    special = hf | {name: value for name, value in (generation or {}).items() if value is not None}
    eos = special.get("eos_token_id")
    return ModelConfig(
        architecture=architecture,
        vocab_size=_count(hf, "vocab_size"),
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=_count(hf, "intermediate_size"),
        norm_eps=_number(hf, "rms_norm_eps"),
        max_context=context,
        rope=rope,
        windows=_windows(hf, architecture, layers),
        activation=activation,
        tied=bool(hf.get("tie_word_embeddings", False)),
        qkv_bias=llama_bias or architecture == "Qwen2ForCausalLM",
        o_bias=llama_bias,
        mlp_bias=bool(hf.get("mlp_bias", False)) and architecture == "LlamaForCausalLM",
        bos_token_id=special.get("bos_token_id"),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
    )


def _number(values: dict[str, Any], name: str) -> float:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ConfigError(f"{name}: expected a number above 0, found {'nothing' if value is None else repr(value)}")
    return value


def _count(hf: dict[str, Any], name: str) -> int:
    if int(_number(hf, name)) != hf[name]:
        raise ConfigError(f"{name}: expected a whole number, found {hf[name]!r}")
    return int(hf[name])


def _kv_heads(hf: dict[str, Any], architecture: str, heads: int) -> int:
    # null means one per query head; only LLaMA may leave it out (the others' defaults are a 7B model's numbers)
    if architecture == "LlamaForCausalLM" or "num_key_value_heads" in hf:
        hf = hf | {"num_key_value_heads": hf.get("num_key_value_heads") or heads}
    kv_heads = _count(hf, "num_key_value_heads")
    if heads % kv_heads:
        raise ConfigError(f"num_key_value_heads: {kv_heads} does not divide num_attention_heads {heads}")
    return kv_heads


def _windows(hf: dict[str, Any], architecture: str, layers: int) -> tuple[int | None, ...]:
    window = hf.get("sliding_window", 4096)  # what transformers takes when the field is left out; null is none
    if architecture == "LlamaForCausalLM" or not window:
        return (None,) * layers
    if architecture == "Qwen2ForCausalLM":
        if not hf.get("use_sliding_window", False):
            return (None,) * layers
        kinds = hf.get("layer_types") or [
            "sliding_attention" if i >= hf.get("max_window_layers", 28) else "full_attention" for i in range(layers)
        ]
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return (window,) * layers


def _rope(hf: dict[str, Any], head_dim: int, context: int) -> RopeConfig:
    # transformers 5 holds everything in rope_parameters; 4 spread it over rope_theta and rope_scaling ("type" before
    # 4.43). Which wins where a file has both is transformers' choice
    raw = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    if "full_attention" in raw or "sliding_attention" in raw:
        raise ConfigError("rope_parameters: one set per layer type is not supported; give one for all layers")
    theta = raw.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0
    kind = raw.pop("rope_type", None) or raw.get("type") or "default"
    raw.pop("type", None)
    if kind not in ROPE_KINDS:
        raise ConfigError(f"rope_type: {kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}")
    if raw.get("partial_rotary_factor", hf.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ConfigError("partial_rotary_factor: only 1.0 is supported (all of a head's width is rotated)")
    # the dynamic kind counts from the context itself; for the others a field outside the dict is the one that counts
    trained = hf.get("original_max_position_embeddings") or raw.get("original_max_position_embeddings")
    raw["original_max_position_embeddings"] = trained if trained and kind in ("llama3", "yarn", "longrope") else context
    stretch = context / _number(raw, "original_max_position_embeddings")
    if kind == "longrope" or (kind == "yarn" and "factor" in raw):
        raw["factor"] = raw.get("factor") or stretch  # not given: by how much the context grew
    needed = {"default": (), "longrope": (), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    for name in needed.get(kind, ("factor",)):
        _number({f"{kind} rope's {name}": raw.get(name)}, f"{kind} rope's {name}")
    for name in ("short_factor", "long_factor") if kind == "longrope" else ():
        factors = raw.get(name)
        if not isinstance(factors, list) or len(factors) != head_dim // 2:
            found = f"{len(factors)} of them" if isinstance(factors, list) else repr(factors)
            raise ConfigError(f"longrope rope's {name}: expected a list of {head_dim // 2} numbers, found {found}")
    return RopeConfig(kind, float(theta), raw)
