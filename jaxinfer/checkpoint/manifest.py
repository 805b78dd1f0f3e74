"""The manifest: what a checkpoint holds, written last, so that a folder without one is known to be incomplete."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from jaxinfer.checkpoint.files import CheckpointError, write_whole

FORMAT = 2  # 1 held matmul weights as [in, out]
NAME = "manifest.json"
PARAMS = "params"
TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class Manifest:
    """``manifest.json``. Paths are relative to the checkpoint folder, sizes in bytes.

    model: the model config as JSON; leaves: name to {shape, dtype, chunks}, where chunks is the shape of one chunk
    file; files: chunk file to {bytes, xxh3_128}; sources: file that was converted to {bytes, sha256}; tokenizer: names
    in ``tokenizer/``; parameters: how many numbers the leaves hold.
    """

    model: dict[str, Any]
    dtype: str
    quantization: dict[str, Any] | None
    leaves: dict[str, dict[str, Any]]
    files: dict[str, dict[str, Any]]
    tokenizer: list[str]
    sources: dict[str, dict[str, Any]]
    converter: str
    parameters: int
    format: int = FORMAT


def encode(manifest: Manifest) -> bytes:
    return (json.dumps(asdict(manifest), indent=1, sort_keys=True) + "\n").encode()


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    write_whole(Path(folder) / NAME, encode(manifest))


def read_manifest(folder: str | Path) -> Manifest:
    """Reads and checks ``folder/manifest.json``.

    Raises:
      CheckpointError: no such folder, no manifest in it, one that is not JSON or lacks a field, or another format.
    """
    folder = Path(folder)
    path = folder / NAME
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    if not path.exists():
        if (folder / PARAMS).is_dir():
            raise CheckpointError(f"{folder}: incomplete checkpoint (no {NAME}); run its conversion again to finish it")
        if (folder / "config.json").exists():
            raise CheckpointError(
                f"{folder}: a Hugging Face folder, not a checkpoint (no {NAME}); "
                f"convert it: python -m convert --source {folder} --output CKPT_DIR"
            )
        raise CheckpointError(f"{folder}: not a checkpoint (no {NAME})")
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged, not JSON: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("format"), int):
        raise CheckpointError(f"{path}: damaged, no format number")
    if data["format"] > FORMAT:
        raise CheckpointError(f"{path}: format {data['format']} is newer than this version reads ({FORMAT}); update")
    if data["format"] < FORMAT:
        old = f"format {data['format']} is of an older version, this one reads {FORMAT}"
        raise CheckpointError(f"{path}: {old}; remove {folder} and convert the model again")
    names = {field.name for field in fields(Manifest)}
    if missing := names - data.keys():
        raise CheckpointError(f"{path}: damaged, missing {', '.join(sorted(missing))}")
    return Manifest(**{name: data[name] for name in names})
