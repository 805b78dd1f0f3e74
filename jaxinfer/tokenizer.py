"""The tokenizer that a checkpoint carries: loaded from its folder alone, never from a hub."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

SPACE = "▁"  # how SentencePiece writes a space


def load_tokenizer(ckpt_dir: str | Path) -> Any | None:
    """Loads ``CKPT/tokenizer``; None where the checkpoint has none and runs on token ids.

    A ``tokenizer.json`` is taken as it is, whatever class the folder names for it. A SentencePiece model alone is
    converted here: what transformers makes of one depends on its version and on the class that the folder names, and
    differs from SentencePiece on text that begins with a space. ``spiece.model`` is GPT-SW3's, which runs SentencePiece
    itself behind steps of its own.

    Returns:
      a `transformers.PreTrainedTokenizerBase`.

    Raises:
      ValueError: a file that cannot be read, or kinds of files that nothing can be made of; names the folder.
    """
    folder = Path(ckpt_dir) / "tokenizer"
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    try:
        if "tokenizer.json" in found:
            return _from_folder(folder)
        if "tokenizer.model" in found:
            return _from_sentencepiece(folder)
        if "vocab.json" in found:
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if "spiece.model" in found:
            return _from_gpt_sw3(folder)
    except Exception as error:
        raise ValueError(f"{folder}: the tokenizer cannot be loaded: {type(error).__name__}: {error}") from error
    return None


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a prompt, with the begin token where the model was trained with one, and without an end token."""
    ids, end = list(tokenizer.encode(text)), tokenizer.eos_token_id
    # an end token that the text itself says, or a begin token that is the same one, is not at the end of every text
    if ids[-1:] == [end] and tokenizer.encode("a")[-1:] == [end]:
        ids.pop()
    return ids


def apply_chat(tokenizer: Any, messages: Any) -> list[int]:
    """Token ids of a conversation through the model's chat template, up to where the model's answer begins.

    Raises:
      ValueError: messages is not a list of {"role": string, "content": string}, there is no chat template, or the
        template refuses the conversation.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"messages: {messages!r} is not legal; legal: a list of at least one message")
    for place, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"messages[{place}]: {message!r} is not legal; legal: an object with role and content")
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                raise ValueError(f"messages[{place}].{name}: {message.get(name)!r} is not legal; legal: a string")
    if not tokenizer.chat_template:
        raise ValueError("messages: the checkpoint's tokenizer has no chat template; give prompt or prompt_token_ids")
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template may raise anything
        raise ValueError(f"messages: the chat template refuses them: {error}") from error
    return list(tokenizer.encode(text, add_special_tokens=False))  # the template has written the special tokens


def _from_folder(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def _from_gpt_sw3(folder: Path) -> Any:
    from transformers import GPTSw3Tokenizer

    path = folder / "tokenizer_config.json"
    named = json.loads(path.read_text("utf-8")).get("tokenizer_class") if path.is_file() else None
    if named not in (None, "GPTSw3Tokenizer"):
        raise ValueError(
            f"spiece.model: tokenizer_class {named!r} is not supported; legal: GPTSw3Tokenizer, or a tokenizer.json "
            "beside it"
        )
    # not from the folder itself: the class takes other special tokens where a path has gpt-sw3-7b in it
    with TemporaryDirectory() as scratch:
        shutil.copytree(folder, scratch, dirs_exist_ok=True)
        return GPTSw3Tokenizer.from_pretrained(scratch, local_files_only=True)


def _from_sentencepiece(folder: Path) -> Any:
    from tokenizers import processors

    with TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        for path in folder.iterdir():
            if path.is_file() and path.name != "tokenizer.model":
                shutil.copy(path, scratch)
        path = scratch / "tokenizer_config.json"
        backend, named = _convert((folder / "tokenizer.model").read_bytes())
        config = named | (json.loads(path.read_text("utf-8")) if path.is_file() else {})
        begin = config.get("bos_token")
        begin = begin["content"] if isinstance(begin, dict) else begin
        # a SentencePiece model does not say whether its begin token is wanted; in the LLaMA family it is unless denied
        if begin and config.get("add_bos_token", True):
            template = {"single": f"{begin} $A", "pair": f"{begin} $A {begin}:1 $B:1"}
            tokens = [(begin, backend.token_to_id(begin))]
            backend.post_processor = processors.TemplateProcessing(**template, special_tokens=tokens)
        backend.save(str(scratch / "tokenizer.json"))
        path.write_text(json.dumps(config), "utf-8")
        return _from_folder(scratch)


def _convert(model: bytes) -> tuple[Any, dict[str, str]]:
    """A SentencePiece model as a `tokenizers.Tokenizer`, and its special tokens under transformers' names."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    pieces = [piece.piece for piece in proto.pieces]
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
    elif trainer.model_type == trainer.UNIGRAM:
        core = models.Unigram(list(zip(pieces, scores)), trainer.unk_id, trainer.byte_fallback)
    else:
        raise ValueError("tokenizer.model: the model type is neither BPE nor unigram")
    symbols = [piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED]
    if symbols:
        raise ValueError(
            f"tokenizer.model: user-defined symbols, the first is {symbols[0]!r}, are not supported; "
            "legal: none, or a tokenizer.json beside it"
        )
    backend = Tokenizer(core)
    steps = []
    if normalizer.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normalizer.precompiled_charsmap))
    if normalizer.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if normalizer.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    spaces = [decoders.Strip(" ", 1, 0)] if normalizer.add_dummy_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *spaces]
    )
    for piece in proto.pieces:
        if piece.type in (piece.CONTROL, piece.UNKNOWN):
            backend.add_special_tokens([AddedToken(piece.piece, normalized=False)])
    ids = {"bos_token": trainer.bos_id, "eos_token": trainer.eos_id, "unk_token": trainer.unk_id}
    return backend, {name: pieces[place] for name, place in ids.items() if place >= 0}


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
