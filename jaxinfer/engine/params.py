"""What a request may ask of sampling and stopping: one frozen class, checked when it is made."""

import difflib
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

import attrs

from jaxinfer.engine.prompt import check_unicode

MOST_BIASES = 300
MOST_STOP_IDS = 64
MOST_TOP_LOGPROBS = 20
MOST_TOKENS = 2**30


def _integer(value: Any, low: int, high: int, name: str) -> int:
    # bool is an int to Python, but a prompt file that says true where a number belongs is wrong
    whole = type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))
    if not whole or not low <= value <= high:
        raise ValueError(f"{name}: {value!r} is not legal; legal: an integer from {low} to {high}")
    return int(value)


def _is_number(value: Any) -> bool:
    # the plain types first: abstract ones cost 20 us a look, and each request has a dozen numbers
    return type(value) in (int, float) or (isinstance(value, Real) and not isinstance(value, bool))


def _real(value: Any, low: float, high: float, name: str, also: str = "") -> float:
    if not _is_number(value) or not (low <= value <= high):
        raise ValueError(f"{name}: {value!r} is not legal; legal: {also}a number from {low:g} to {high:g}")
    return float(value)


def _field(default: Any, convert: Callable[[Any, str], Any], help: str) -> Any:
    def with_name(value: Any, field: attrs.Attribute) -> Any:
        return convert(value, field.name)

    return attrs.field(default=default, converter=attrs.Converter(with_name, takes_field=True), metadata={"help": help})


def _int_field(default: int | None, low: int, high: int, help: str) -> Any:
    def convert(value: Any, name: str) -> int | None:
        return None if default is None and value is None else _integer(value, low, high, name)

    return _field(default, convert, help)


def _float_field(default: float, low: float, high: float, help: str) -> Any:
    return _field(default, lambda value, name: _real(value, low, high, name), help)


def _temperature(value: Any, name: str) -> float:
    # below, 1 / temperature leaves float32
    if _is_number(value) and value == 0:
        return 0.0
    return _real(value, 1e-6, 1e6, name, also="0 or ")


def _logit_bias(value: Any, name: str) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or len(value) > MOST_BIASES:
        what = f"{len(value)} entries are" if isinstance(value, Mapping) else f"{value!r} is"
        raise ValueError(f"{name}: {what} not legal; legal: at most {MOST_BIASES} pairs of token id and bias")
    biases = {}
    for key, bias in value.items():
        # JSON knows string keys only
        token = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key
        token = _integer(token, 0, MOST_TOKENS, f"{name}: token id")
        if token in biases:
            raise ValueError(f"{name}: token id {token} is given twice")
        biases[token] = _real(bias, -100, 100, f"{name}: bias of token id {token}")
    return biases


def _stop(value: Any, name: str) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, list | tuple) or not all(isinstance(each, str) and each for each in strings):
        raise ValueError(f"{name}: {value!r} is not legal; legal: a string that is not empty, or a list of such")
    check_unicode(name, strings)
    return tuple(strings)


def _stop_token_ids(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or len(value) > MOST_STOP_IDS:
        what = f"{len(value)} ids are" if isinstance(value, list | tuple) else f"{value!r} is"
        raise ValueError(f"{name}: {what} not legal; legal: a list of at most {MOST_STOP_IDS} token ids")
    return tuple(_integer(each, 0, MOST_TOKENS, f"{name}[{place}]") for place, each in enumerate(value))


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: {value!r} is not legal; legal: true, false")
    return value


@attrs.frozen(kw_only=True)
class SamplingParams:
    """How one request is sampled and when it ends. Without arguments: greedy, 64 tokens, stop at the model's end token.

    Raises ValueError, of the field, its value and what is legal, as do the methods. Each field's meaning is its
    metadata's ``help``; `jaxinfer.ops.sampling` says how the limits and penalties work together.
    """

    temperature: float = _field(0.0, _temperature, "divides the logits; 0 always takes the likeliest token")
    top_k: int = _int_field(0, -1, 2**31 - 1, "draw among the k likeliest tokens; 0 or -1: off")
    top_p: float = _float_field(
        1.0, 0, 1, "draw among the likeliest tokens that have this probability together; 1: off"
    )
    min_p: float = _float_field(0.0, 0, 1, "draw among tokens with this share of the likeliest's probability; 0: off")
    repetition_penalty: float = _float_field(
        1.0, 0.01, 100, "divides positive and multiplies negative logits of tokens in the prompt or the output; 1: off"
    )
    presence_penalty: float = _float_field(0.0, -100, 100, "taken from the logits of tokens in the output; 0: off")
    frequency_penalty: float = _float_field(
        0.0, -100, 100, "taken from the logits of tokens for each time that they are in the output; 0: off"
    )
    logit_bias: dict[int, float] | None = _field(None, _logit_bias, "added to the logits, by token id")  # noqa: RUF009
    seed: int | None = _int_field(
        None, 0, 2**32 - 1, "of the draws; none: from the engine's seed and the request's place"
    )
    n: int = _int_field(1, 1, 4096, "samples for the prompt")
    stop: tuple[str, ...] = _field((), _stop, "strings that end the text; they are not part of it")
    stop_token_ids: tuple[int, ...] = _field((), _stop_token_ids, "tokens that end the output, beside the model's own")
    ignore_eos: bool = _field(False, _flag, "go on past the model's end token")
    min_new_tokens: int = _int_field(0, 0, MOST_TOKENS, "no end token or stop token before this many are out")
    max_new_tokens: int = _int_field(64, 0, MOST_TOKENS, "end after this many tokens; 0: read the prompt alone")
    logprobs: int | None = _int_field(
        None, 0, MOST_TOP_LOGPROBS, "logprobs of the chosen token and this many likeliest ones"
    )
    prompt_logprobs: int | None = _int_field(None, 0, MOST_TOP_LOGPROBS, "the same of each token of the prompt")

    def __attrs_post_init__(self):
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens: {self.min_new_tokens} is not legal; "
                f"legal: an integer from 0 to max_new_tokens, {self.max_new_tokens}"
            )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "SamplingParams":
        """From JSON's types; fields left out have their defaults. Undoes `to_dict`."""
        return cls(**_known(fields))

    def merge(self, overrides: Mapping[str, Any]) -> "SamplingParams":
        """These settings with some fields replaced."""
        return attrs.evolve(self, **_known(overrides))

    def to_dict(self) -> dict[str, Any]:
        """All fields in JSON's types, so that it equals itself read back from a file."""
        fields = attrs.asdict(self) | {"stop": list(self.stop), "stop_token_ids": list(self.stop_token_ids)}
        if self.logit_bias is not None:
            fields["logit_bias"] = {str(token): bias for token, bias in self.logit_bias.items()}
        return fields

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError when a token id is not in a vocabulary of this size."""
        for name, ids in (("logit_bias", self.logit_bias or ()), ("stop_token_ids", self.stop_token_ids)):
            for token in ids:
                if token >= vocab_size:
                    raise ValueError(f"{name}: token id {token} is not legal; legal: 0 to {vocab_size - 1}")


def _known(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    legal = [field.name for field in attrs.fields(SamplingParams)]
    for name in fields:
        if name not in legal:
            near = difflib.get_close_matches(str(name), legal)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ValueError(f"{name}: no such sampling field; {hint}legal: {', '.join(legal)}")
    return fields
