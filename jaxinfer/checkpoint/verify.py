"""The files that libraries read, not we: whether the tokenizer is as the manifest says, and which one it is."""

import json
from pathlib import Path
from typing import Any

from jaxinfer.checkpoint.files import MEND, DamagedError, describe
from jaxinfer.checkpoint.manifest import TOKENIZER, Manifest


def check_tokenizer(folder: str | Path, manifest: Manifest) -> None:
    """Nothing is known of the files of an older checkpoint (`Manifest.sealed`).

    Raises:
      DamagedError: a file is missing, not as it was written, or not the checkpoint's: libraries look for many names,
        and one more file can change what comes of the others.
    """
    if not manifest.sealed:
        return
    place = Path(folder) / TOKENIZER
    there = set(_listed(place))
    for name in manifest.tokenizer:
        if name not in there:
            raise DamagedError(f"{place / name}: missing; {MEND}")
        size, expected = (place / name).stat().st_size, manifest.files[f"{TOKENIZER}/{name}"]
        if size != expected["bytes"]:
            raise DamagedError(f"{place / name}: {size} bytes, expected {expected['bytes']}; {MEND}")
        if describe((place / name).read_bytes())["xxh3_128"] != expected["xxh3_128"]:
            raise DamagedError(f"{place / name}: its bytes changed since it was written (xxh3_128 differs); {MEND}")
    if more := sorted(there - set(manifest.tokenizer)):
        raise DamagedError(f"{place / more[0]}: not one of the checkpoint's files; remove it, or {MEND}")


def identity(manifest: Manifest, folder: str | Path | None) -> bytes:
    """All that the answers of a checkpoint follow from (`folder` is None for a manifest alone): the same before and
    after converting again added checksums, another where the tokenizer is another."""
    own = {name: getattr(manifest, name) for name in ("model", "dtype", "quantization", "leaves", "chunks")}
    return json.dumps(own | {"tokenizer": _tokenizer(manifest, folder)}, sort_keys=True).encode()


def _tokenizer(manifest: Manifest, folder: str | Path | None) -> dict[str, Any]:
    if manifest.sealed or folder is None:
        return {name: manifest.files[f"{TOKENIZER}/{name}"] for name in manifest.tokenizer}
    place = Path(folder) / TOKENIZER
    return {name: describe((place / name).read_bytes()) for name in _listed(place) if (place / name).is_file()}


def _listed(place: Path) -> list[str]:
    return [path.name for path in place.iterdir() if not path.name.startswith(".")] if place.is_dir() else []
