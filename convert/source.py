"""A Hugging Face folder: which files count, what its config says, where every tensor is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.safetensors_reader import open_safetensors
from convert.tensor import ConvertError, SourceTensor, refuse_lfs_pointer
from convert.torch_reader import open_torch
from jaxinfer.json_text import read_object
from jaxinfer.models.config import ConfigError, ModelConfig
from jaxinfer.models.families import from_hf

_LONGEST_TOKENIZER = 256 << 20  # of each of its files, which are held whole
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
_BESIDE = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*")


@dataclass(frozen=True)
class Source:
    """`weights`: the files that hold tensors; `notes`: the other files that the checkpoint follows from; `tokenizer`:
    what is copied beside it, empty where the folder has no vocabulary."""

    folder: Path
    config: ModelConfig
    weights: tuple[Path, ...]
    notes: tuple[Path, ...]
    tokenizer: tuple[Path, ...]
    tensors: dict[str, SourceTensor]


def open_source(folder: str | Path) -> Source:
    """Raises ConvertError or ConfigError with the file's name where the folder cannot be converted."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ConvertError(f"{folder}: no such folder")
    if not (folder / "config.json").is_file():
        raise ConvertError(f"{folder}: not a Hugging Face model folder: no config.json")
    hf = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    if quantization := hf.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ConvertError(f"{folder / 'config.json'}: quantization_config: {method!r} weights are not supported")
    try:
        config = from_hf(hf, read_json(generation) if generation.is_file() else {})
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'}: {error}") from error
    weights, index, opened = _weight_files(folder)
    tensors = _gather({path: opened(path) for path in weights})
    if index:
        _check_index(index, tensors)
    notes = [folder / "config.json"] + [path for path in (generation, index) if path and path.is_file()]
    tokenizer = _tokenizer_files(folder)
    return Source(folder, config, weights, tuple(notes), tokenizer, tensors)


def read_json(path: Path) -> dict[str, Any]:
    refuse_lfs_pointer(path)
    try:
        return read_object(path)
    except ValueError as error:
        raise ConvertError(str(error)) from error


Opener = Callable[[Path], dict[str, SourceTensor]]


def _weight_files(folder: Path) -> tuple[tuple[Path, ...], Path | None, Opener]:
    # the order in which transformers looks; safetensors before pickles, which are slower to read and to trust
    for single, suffix, opened in (
        ("model.safetensors", ".safetensors", open_safetensors),
        ("pytorch_model.bin", ".bin", open_torch),
    ):
        if (folder / single).is_file():
            return (folder / single,), None, opened
        index = folder / f"{single}.index.json"
        if index.is_file():
            names = sorted(set(_weight_map(index).values()))
            for name in names:
                if Path(name).name != name or not name.endswith(suffix):
                    raise ConvertError(f"{index}: {name!r} is not the name of a {suffix} file in this folder")
            if missing := [name for name in names if not (folder / name).is_file()]:
                raise ConvertError(f"{index}: shards missing from the folder: {', '.join(missing)}")
            return tuple(folder / name for name in names), index, opened
    looked = "model.safetensors, pytorch_model.bin, nor an index (.index.json) of either"
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pth", ".gguf"))
    found = f"; found {', '.join(others)}" if others else ""
    raise ConvertError(f"{folder}: no weights: neither {looked}{found}")


def _weight_map(index: Path) -> dict[str, str]:
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(file, str) for file in mapping.values()):
        raise ConvertError(f"{index}: weight_map must map tensor names to file names")
    return mapping


def _gather(files: dict[Path, dict[str, SourceTensor]]) -> dict[str, SourceTensor]:
    tensors: dict[str, SourceTensor] = {}
    twice = []
    for found in files.values():
        for name, tensor in found.items():
            if name in tensors:
                twice.append(f"{name} (in {tensors[name].path.name} and {tensor.path.name})")
            tensors[name] = tensor
    if twice:
        raise ConvertError(f"tensors found in two shards: {'; '.join(twice)}")
    return tensors


def _check_index(index: Path, tensors: dict[str, SourceTensor]) -> None:
    for name, file in _weight_map(index).items():
        where = tensors[name].path.name if name in tensors else "no shard"
        if where != file:
            raise ConvertError(f"{index}: tensor {name} should be in {file}, but it is in {where}")


def _tokenizer_files(folder: Path) -> tuple[Path, ...]:
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        return ()
    # the config too: it is what chooses the tokenizer class where tokenizer_config.json does not name one
    patterns = (*_VOCABULARIES, *_BESIDE, "config.json", "generation_config.json")
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    for path in found:
        refuse_lfs_pointer(path)
        if path.stat().st_size > _LONGEST_TOKENIZER:
            raise ConvertError(f"{path}: longer than {_LONGEST_TOKENIZER >> 20} MiB, which no file of a tokenizer is")
    return tuple(sorted(found))
