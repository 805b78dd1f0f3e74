"""What a decoder looks like: read once from a Hugging Face ``config.json``, carried by the checkpoint's manifest."""

from dataclasses import asdict, dataclass, field
from typing import Any

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
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


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Reads a Hugging Face ``config.json`` (the transformers 4 and 5 spellings of rope).

    Raises:
      ConfigError: an architecture, activation or rope kind that is not supported, or a missing field.
    """
    architecture = (hf.get("architectures") or ["(none)"])[0]
    if architecture not in LLAMA_ARCHITECTURES:
        raise ConfigError(f"architectures: {architecture!r} is not supported; supported: {', '.join(LLAMA_ARCHITECTURES)}")

    def need(name: str) -> Any:
        if hf.get(name) is None:
            raise ConfigError(f"{name}: missing; config.json of {architecture} must give it")
        return hf[name]

    layers, heads, width = need("num_hidden_layers"), need("num_attention_heads"), need("hidden_size")
    kv_heads = hf.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ConfigError(f"num_key_value_heads: {kv_heads} does not divide num_attention_heads {heads}")
    activation = hf.get("hidden_act", "silu")
    if activation not in ("silu", "gelu", "gelu_pytorch_tanh", "relu"):
        raise ConfigError(f"hidden_act: {activation!r} is not supported; supported: silu, gelu, gelu_pytorch_tanh, relu")
    llama_bias = bool(hf.get("attention_bias", False)) and architecture == "LlamaForCausalLM"
    eos = hf.get("eos_token_id")
    rope = _rope(hf)
    context = need("max_position_embeddings")
    if rope.kind == "dynamic":  # the base grows with the length, so positions beyond the trained ones are legal
        context = int(context * rope.parameters["factor"])
    return ModelConfig(
        architecture=architecture,
        vocab_size=need("vocab_size"),
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hf.get("head_dim") or width // heads,
        mlp_width=need("intermediate_size"),
        norm_eps=need("rms_norm_eps"),
        max_context=context,
        rope=rope,
        windows=_windows(hf, architecture, layers),
        activation=activation,
        tied=bool(hf.get("tie_word_embeddings", False)),
        qkv_bias=llama_bias or architecture == "Qwen2ForCausalLM",
        o_bias=llama_bias,
        mlp_bias=bool(hf.get("mlp_bias", False)),
        bos_token_id=hf.get("bos_token_id"),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
    )


def _windows(hf: dict[str, Any], architecture: str, layers: int) -> tuple[int | None, ...]:
    window = hf.get("sliding_window")
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


def _rope(hf: dict[str, Any]) -> RopeConfig:
    # transformers 5 holds everything in rope_parameters; 4 spread it over rope_theta and rope_scaling ("type" before 4.43)
    raw = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = float(raw.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0)
    kind = raw.pop("rope_type", None) or raw.get("type") or "default"
    raw.pop("type", None)
    if kind not in ROPE_KINDS:
        raise ConfigError(f"rope_type: {kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}")
    trained = raw.get("original_max_position_embeddings") or hf.get("original_max_position_embeddings")
    raw["original_max_position_embeddings"] = trained or hf["max_position_embeddings"]
    if kind in ("linear", "dynamic", "yarn", "llama3") and "factor" not in raw:
        raise ConfigError(f"rope_scaling.factor: missing; rope_type {kind!r} needs it")
    if kind == "longrope":
        if not (raw.get("short_factor") and raw.get("long_factor")):
            raise ConfigError("rope_scaling.short_factor, long_factor: missing; rope_type 'longrope' needs both")
        # as transformers does: without a factor, the stretch is what the context grew by
        raw.setdefault("factor", hf["max_position_embeddings"] / raw["original_max_position_embeddings"])
    return RopeConfig(kind, theta, raw)
