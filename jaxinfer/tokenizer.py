"""The tokenizer that a checkpoint carries: loaded from its folder alone, never from a hub."""

import codecs
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jaxinfer import spm
from jaxinfer.json_text import parse

# classes of transformers 4 that make tokenizer.json's own begin token give way to add_bos_token, and the model types
# whose class they are where none is named
_OBEYING = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer")
_OBEYING_MODELS = ("llama", "mistral", "phi3", "gemma", "gemma2")


def load_tokenizer(ckpt_dir: str | Path) -> Any | None:
    """Loads ``CKPT/tokenizer``; None where the checkpoint has none and runs on token ids.

    A ``tokenizer.json`` is taken as it is, whatever class the folder names for it (`notes` says of its begin token). A
    SentencePiece model alone is converted by `spm.from_sentencepiece`: what transformers makes of one depends on its
    version and on the class that the folder names. ``spiece.model`` is GPT-SW3's, which runs SentencePiece itself
    behind steps of its own.

    Returns:
      a `transformers.PreTrainedTokenizerBase`.

    Raises:
      ValueError: a file that cannot be read, or kinds of files that nothing can be made of; names the folder.
    """
    folder = Path(ckpt_dir) / "tokenizer"
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    load = next((load for name, load in _LOADERS.items() if name in found), None)
    if load is None:
        return None
    try:
        tokenizer = load(folder)
    except Exception as error:
        raise ValueError(f"{folder}: the tokenizer cannot be loaded: {_fault(folder, error)}") from error
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = tokenizer.chat_template.removeprefix("\ufeff")  # an editor's byte order mark
    return tokenizer


def notes(folder: str | Path) -> list[str]:
    """What was chosen for the tokenizer of a Hugging Face folder, where versions of transformers differ.

    Raises:
      ValueError: files that `load_tokenizer` would refuse.
    """
    folder = Path(folder)
    try:
        return _notes(folder)
    except Exception as error:  # the library that reads the files has no class of its own for theirs
        raise ValueError(_fault(folder, error)) from error


def _notes(folder: Path) -> list[str]:
    backend = _check_json(folder)
    if backend is None:
        return spm.notes(folder) if (folder / "tokenizer.model").is_file() else []
    config = spm.read_config(folder)
    begin, wanted = spm.plain(config.get("bos_token")), _begin_wanted(folder, config)
    if wanted is None or not begin:
        return []
    if wanted == (backend.encode("a").ids[:1] == [backend.token_to_id(begin)]):
        return []
    said, puts = ("true", "does not put") if wanted else ("false", "puts")
    return [
        f"tokenizer_config.json has add_bos_token {said}, tokenizer.json {puts} {begin} before a prompt: the former "
        "counts, as in transformers 4 (5 does not look at it)"
    ]


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


def _check_json(folder: Path) -> Any:
    """The `tokenizers.Tokenizer` of the folder's ``tokenizer.json``; None without one. A ``vocab.json`` alone is read.

    Raises:
      ValueError: what is wrong with the file, by its name.
    """
    from tokenizers import Tokenizer

    if not (path := folder / "tokenizer.json").is_file():
        if not (folder / "tokenizer.model").is_file():
            spm.read(folder / "vocab.json")
        return None
    text = path.read_bytes()
    try:
        found = parse(text)
    except ValueError as error:
        raise ValueError(f"{path.name}: damaged, not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name}: found {type(found).__name__}, legal is an object")
    for name, kind in (("added_tokens", list), ("model", dict)):
        if name not in found:
            raise ValueError(f"{path.name}: lacks {name!r}")
        if not isinstance(found[name], kind):
            raise ValueError(f"{path.name}: {name!r} is not {'a list' if kind is list else 'an object'}")
    try:
        return Tokenizer.from_str(text.decode("utf-8-sig"))
    except Exception as error:  # the library raises no other class
        raise ValueError(f"{path.name}: {error}") from error


def _fault(folder: Path, error: Exception) -> str:
    """What is wrong with the folder's files, after a library stumbled over it with `error`."""
    try:
        _check_json(folder)
    except (ValueError, OSError) as found:
        return str(found)
    return f"lacks {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__


def _transformers() -> Any:
    # without PyTorch, which nobody needs here, its import tells each rank's user that there are no models
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers


def _from_folder(folder: Path) -> Any:
    with _readable(folder) as readable:
        tokenizer = _transformers().PreTrainedTokenizerFast.from_pretrained(readable, local_files_only=True)
    wanted, begin = _begin_wanted(folder, spm.read_config(folder)), tokenizer.bos_token
    if wanted is not None and begin and wanted != (tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]):
        spm.begin_with(tokenizer.backend_tokenizer, begin if wanted else None)
    return tokenizer


def _begin_wanted(folder: Path, config: dict[str, Any]) -> bool | None:
    """What add_bos_token says where it counts beside a ``tokenizer.json``.

    Such a field is transformers 4's, which wrote files whose tokenizer.json was wrong without it (DeepSeek's
    distillations have such); what 5 writes has no such field.
    """
    wanted, named = config.get("add_bos_token"), config.get("tokenizer_class")
    if named is None:
        obeyed = spm.read(folder / "config.json").get("model_type") in _OBEYING_MODELS
    else:
        obeyed = str(named).removesuffix("Fast") in _OBEYING
    return wanted if obeyed and isinstance(wanted, bool) else None


@contextmanager
def _readable(folder: Path) -> Iterator[Path]:
    """The folder as transformers 5 can read it: what makes it fail are byte order marks, and tokens with flags under
    the old name of their list."""
    files = [path for path in folder.glob("*.json") if _marked(path)]
    changed = {path.name: path.read_text("utf-8-sig") for path in files}
    named = spm.read(folder / "special_tokens_map.json")
    tokens = named.pop("additional_special_tokens", None) or []
    if any(isinstance(token, dict) for token in tokens):
        named["extra_special_tokens"] = tokens + (named.get("extra_special_tokens") or [])
        changed["special_tokens_map.json"] = json.dumps(named)
    if not changed:
        yield folder
        return
    with TemporaryDirectory() as scratch:
        shutil.copytree(folder, scratch, dirs_exist_ok=True)
        for name, text in changed.items():
            (Path(scratch) / name).write_text(text, "utf-8")
        yield Path(scratch)


def _marked(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(3) == codecs.BOM_UTF8


def _from_vocabulary(folder: Path) -> Any:
    with _readable(folder) as readable:
        return _transformers().AutoTokenizer.from_pretrained(readable, local_files_only=True)


def _from_gpt_sw3(folder: Path) -> Any:
    named = spm.read(folder / "tokenizer_config.json").get("tokenizer_class")
    if named not in (None, "GPTSw3Tokenizer"):
        raise ValueError(
            f"spiece.model: tokenizer_class {named!r} is not supported; legal: GPTSw3Tokenizer, or a tokenizer.json "
            "beside it"
        )
    # not from the folder itself: the class takes other special tokens where a path has gpt-sw3-7b in it
    with TemporaryDirectory() as scratch:
        shutil.copytree(folder, scratch, dirs_exist_ok=True)
        return _transformers().GPTSw3Tokenizer.from_pretrained(scratch, local_files_only=True)


def _from_sentencepiece(folder: Path) -> Any:
    backend, config = spm.from_sentencepiece(folder)
    with TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        for path in folder.glob("chat_template*"):
            shutil.copy(path, scratch)
        backend.save(str(scratch / "tokenizer.json"))
        (scratch / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
        return _from_folder(scratch)


_LOADERS = {
    "tokenizer.json": _from_folder,
    "tokenizer.model": _from_sentencepiece,
    "vocab.json": _from_vocabulary,
    "spiece.model": _from_gpt_sw3,
}
