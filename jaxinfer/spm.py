"""A tokenizer made of a SentencePiece model and the files beside it.

transformers 4, with which such folders were written, and 5 split them differently, and neither as SentencePiece itself
does where the model normalizes. Here text is split as SentencePiece does, the model's own normalizer included, and
added tokens, prefixes and the begin token are as transformers 4 has them; `notes` says where 5 has them otherwise.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxinfer.json_text import read_object

SPACE = "▁"  # how SentencePiece writes a space
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LISTS = ("additional_special_tokens", "extra_special_tokens")

Flags = dict[str, Any]  # of an added token, as the files have them: content, special, single_word, lstrip, rstrip


def from_sentencepiece(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Of ``tokenizer.model``: a `tokenizers.Tokenizer`, and the ``tokenizer_config.json`` that goes with it, whose
    special tokens are plain strings.

    Raises:
      ValueError: a model or an added token that cannot be had.
    """
    proto, config = _model(folder), read_config(folder)
    added = _added_tokens(folder, config)
    backend, named = _convert(proto, config, {place: flags["content"] for place, flags in added if place is not None})
    _add_tokens(backend, proto, added)
    config = named | {name: plain(value) for name, value in config.items() if name != "added_tokens_decoder"}
    # the model does not say whether its begin token is wanted; in the LLaMA family it is unless denied
    wanted = config.get("add_bos_token")
    begin_with(backend, config.get("bos_token") if wanted is None or wanted else None)
    return backend, config


def begin_with(backend: Any, begin: str | None) -> None:
    """From now on every text begins with this token; with none where it is None."""
    from tokenizers import processors

    tokens = [(begin, backend.token_to_id(begin))] if begin else []
    one, two = (f"{begin} $A", f"{begin} $A {begin}:1 $B:1") if begin else ("$A", "$A $B:1")
    backend.post_processor = processors.TemplateProcessing(single=one, pair=two, special_tokens=tokens)


def notes(folder: Path) -> list[str]:
    """What was chosen where the files do not say it, or where versions of transformers differ.

    Raises:
      ValueError: as `from_sentencepiece`.
    """
    _, config = from_sentencepiece(folder)
    proto = _model(folder)
    model, scores = proto.normalizer_spec, [piece.score for piece in proto.pieces if piece.type == piece.NORMAL]
    legacy, prefixed = config.get("legacy"), config.get("add_prefix_space")
    found = []
    if legacy is None:
        found.append("no legacy in tokenizer_config.json: taken as true, as transformers 4 does (5: false)")
    if legacy in (None, True):
        found.append("a text that begins with a space keeps it, as in SentencePiece and transformers 4 (5 drops one)")
    if config.get("add_bos_token") is None:
        found.append("no add_bos_token: prompts begin with the begin token, as in transformers 4 (5: without)")
    if not model.add_dummy_prefix and prefixed is None and legacy is not False:
        found.append("the model puts no space before a text; none is put, as in SentencePiece (transformers puts one)")
    if model.precompiled_charsmap or model.remove_extra_whitespaces:
        found.append(
            "the model normalizes text; so it is done, as in SentencePiece (transformers' fast classes do not)"
        )
    if proto.trainer_spec.model_type == proto.trainer_spec.BPE and scores != sorted(scores, reverse=True):
        found.append("pieces are joined by their scores, as in SentencePiece and transformers 4 (5: by their ids)")
    return [f"tokenizer.model: {each}" for each in found]


def _model(folder: Path) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString((folder / "tokenizer.model").read_bytes())


def read_config(folder: Path) -> dict[str, Any]:
    """``tokenizer_config.json``; older files have the special tokens in a file of their own, which counts then."""
    config = read(folder / "tokenizer_config.json")
    return config if "added_tokens_decoder" in config else config | read(folder / "special_tokens_map.json")


def read(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty where there is no file."""
    return read_object(path) if path.is_file() else {}


def plain(value: Any) -> Any:
    """A token, or a list of them, without flags."""
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value["content"] if isinstance(value, dict) and "content" in value else value


def _added_tokens(folder: Path, config: dict[str, Any]) -> list[tuple[int | None, Flags]]:
    """Id and flags of each; the id is None where no file says it, and those come last."""
    if "added_tokens_decoder" in config:
        added = {flags["content"]: (int(place), flags) for place, flags in config["added_tokens_decoder"].items()}
    else:
        numbered = read(folder / "added_tokens.json")
        added = {content: (place, {"content": content}) for content, place in numbered.items()}
    extra = [each for name in LISTS for each in _several(config.get(name))]
    for value in [config[name] for name in NAMED if config.get(name)] + extra:
        flags = value if isinstance(value, dict) else {"content": value}
        place, numbered = added.get(flags["content"], (None, flags))
        flags = numbered if "added_tokens_decoder" in config else flags
        added[flags["content"]] = place, flags | {"special": True}
    return sorted(added.values(), key=lambda each: (each[0] is None, each[0] or 0))


def _several(value: Any) -> list[Any]:
    return list(value.values() if isinstance(value, dict) else value or [])


def _convert(proto: Any, config: dict[str, Any], added: dict[int, str]) -> tuple[Any, dict[str, str]]:
    """The model as a `tokenizers.Tokenizer`, and its special tokens under transformers' names.

    added: tokens by their ids; one whose id is a piece's stands in that piece's place.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    _refuse(proto)
    pieces = [added.get(place, piece.piece) for place, piece in enumerate(proto.pieces)]
    scores = [piece.score for piece in proto.pieces]
    if trainer.model_type == trainer.BPE:
        vocabulary = {piece: place for place, piece in enumerate(pieces)}
        core = models.BPE(
            vocabulary,
            list(_merges(vocabulary, scores)),
            unk_token=pieces[trainer.unk_id],
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    else:
        core = models.Unigram(list(zip(pieces, scores)), trainer.unk_id, trainer.byte_fallback)
    backend = Tokenizer(core)
    legacy, prefixed = _legacy(config), config.get("add_prefix_space")
    if prefixed is None:
        prefixed = normalizer.add_dummy_prefix or not legacy
    steps = []
    if normalizer.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normalizer.precompiled_charsmap))
    if normalizer.remove_extra_whitespaces:
        # after a special token the space belongs to the text where the text gets no prefix there
        steps += [normalizers.Strip(left=legacy, right=True), normalizers.Replace(Regex(" {2,}"), " ")]
    if legacy:  # every text between two special tokens begins as a text of its own
        steps += [normalizers.Prepend(SPACE)] if prefixed else []
        steps.append(normalizers.Replace(" ", SPACE))
    else:
        scheme = "first" if prefixed else "never"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    spaces = [decoders.Strip(" ", 1, 0)] if prefixed else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *spaces]
    )
    ids = {"bos_token": trainer.bos_id, "eos_token": trainer.eos_id, "unk_token": trainer.unk_id}
    return backend, {name: pieces[place] for name, place in ids.items() if place >= 0}


def _legacy(config: dict[str, Any]) -> bool:
    """Whether what follows a special token is split as a text of its own; Gemma's class has no such field."""
    return config.get("legacy") is not False or str(config.get("tokenizer_class")).startswith("Gemma")


def _refuse(proto: Any) -> None:
    trainer = proto.trainer_spec
    if trainer.treat_whitespace_as_suffix or not proto.normalizer_spec.escape_whitespaces:
        raise ValueError(
            "tokenizer.model: pieces that end with their space, or spaces kept as they are, are not supported"
        )
    if trainer.model_type not in (trainer.BPE, trainer.UNIGRAM):
        raise ValueError("tokenizer.model: the model type is neither BPE nor unigram")
    symbols = [piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED]
    if symbols:
        raise ValueError(
            f"tokenizer.model: user-defined symbols, the first is {symbols[0]!r}, are not supported; "
            "legal: none, or a tokenizer.json beside it"
        )


def _add_tokens(backend: Any, proto: Any, added: list[tuple[int | None, Flags]]) -> None:
    from tokenizers import AddedToken

    said = {place for place, _ in added} | {flags["content"] for _, flags in added}
    special = [
        (place, {"content": piece.piece, "special": True})
        for place, piece in enumerate(proto.pieces)
        if piece.type in (piece.CONTROL, piece.UNKNOWN) and not {place, piece.piece} & said
    ]
    for place, flags in [*special, *added]:
        content = flags["content"]
        kinds = {name: bool(flags.get(name)) for name in ("special", "single_word", "lstrip", "rstrip")}
        # looked for in the text as it is, as transformers 4 does: prefix and normalizer come after
        backend.add_tokens([AddedToken(content, normalized=False, **kinds)])
        if place is not None and backend.token_to_id(content) != place:
            found = backend.token_to_id(content)
            raise ValueError(f"added token {content!r}: its id is {place}, legal is {found}, the next that is free")


def _merges(vocabulary: dict[str, int], scores: list[float]) -> Iterator[tuple[str, str]]:
    """Pairs of pieces that join into a piece, in the order in which SentencePiece joins: best score first."""
    pairs = (
        (-scores[place], place, piece[:cut], piece[cut:])
        for piece, place in vocabulary.items()
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    )
    for _, _, left, right in sorted(pairs, key=lambda pair: pair[:2]):
        yield left, right
