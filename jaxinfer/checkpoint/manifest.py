"""The manifest: what a checkpoint holds, written last, so that a folder without one is known to be incomplete."""

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import xxhash

from jaxinfer import json_text
from jaxinfer.checkpoint.entries import check_entries
from jaxinfer.checkpoint.files import MEND, CheckpointError, DamagedError, write_whole

FORMAT = 2  # 1 held matmul weights as [in, out]
NAME = "manifest.json"
PARAMS = "params"
TOKENIZER = "tokenizer"
SUM = "xxh3_128"


class WithoutChecksums(UserWarning):
    """A checkpoint of a version that wrote checksums of the weights alone."""


@dataclass(frozen=True)
class Manifest:
    """``manifest.json``. Paths are relative to the checkpoint folder, sizes in bytes.

    model: the model config as JSON; leaves: name to {shape, dtype, chunks}, where chunks is the shape of one chunk
    file; files: each file but the manifest to {bytes, xxh3_128}; sources: file that was converted to {bytes, sha256};
    tokenizer: names in ``tokenizer/``; parameters: how many numbers the leaves hold. sealed: it has its own checksum,
    and so all files have theirs; the file's last field is that checksum, not this.
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
    sealed: bool = True

    @property
    def chunks(self) -> dict[str, dict[str, Any]]:
        """The entries of `files` that hold numbers."""
        return {name: entry for name, entry in self.files.items() if _CHUNK.fullmatch(name)}

    def warning(self, folder: str | Path) -> str | None:
        """What to say where it is loaded."""
        if self.sealed:
            return None
        what = "made by an older version, so damage to its manifest or tokenizer would go unseen"
        return f"{folder}: {what}; the same conversion again adds their checksums and keeps the weights"


_CHUNK = re.compile(rf"{PARAMS}/[^/]+/[0-9.]+")
_FIELDS = tuple(field.name for field in fields(Manifest) if field.name != "sealed")


def encode(manifest: Manifest) -> bytes:
    data = {name: value for name, value in asdict(manifest).items() if name in _FIELDS}
    return (json.dumps(data | {SUM: _sum(data)}, indent=1, sort_keys=True) + "\n").encode()


def _sum(data: dict[str, Any]) -> str:
    # of what the fields say and not of the bytes: a file that a tool has laid out anew says the same
    return xxhash.xxh3_128_hexdigest(json.dumps(data, sort_keys=True).encode())


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    write_whole(Path(folder) / NAME, encode(manifest))


def read_manifest(folder: str | Path) -> Manifest:
    """Reads and checks ``folder/manifest.json``, but not the model in it (`ModelConfig.from_json`).

    Raises:
      DamagedError: it is not JSON, not as its checksum says, lacks a field or has an illegal value.
      CheckpointError: no such folder, no manifest in it, or another format.
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
        data = json_text.parse(path.read_bytes())
    except ValueError as error:
        raise DamagedError(f"{path}: damaged, not JSON: {error}; {MEND}") from error
    found = data.pop(SUM, None) if isinstance(data, dict) else None
    if found is not None and found != _sum(data):
        raise DamagedError(f"{path}: damaged, its content changed since it was written ({SUM} differs); {MEND}")
    if not isinstance(data, dict) or type(data.get("format")) is not int:
        raise DamagedError(f"{path}: damaged, no format number; {MEND}")
    if data["format"] > FORMAT:
        raise CheckpointError(f"{path}: format {data['format']} is newer than this version reads ({FORMAT}); update")
    if data["format"] < FORMAT:
        old = f"format {data['format']} is of an older version, this one reads {FORMAT}"
        raise CheckpointError(f"{path}: {old}; remove {folder} and convert the model again")
    sealed = found is not None
    try:
        check_entries(data, _FIELDS, sealed)
    except ValueError as error:
        raise DamagedError(f"{path}: damaged, {error}; {MEND}") from error
    return Manifest(**{name: data[name] for name in _FIELDS}, sealed=sealed)
