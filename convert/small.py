"""The small files of a checkpoint: the tokenizer, and what tells others than us how to read the parameters."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from convert.plan import Plan, chunks_of, targets_of
from convert.source import Source
from jaxinfer.checkpoint.entries import DTYPES
from jaxinfer.checkpoint.files import sync_folder, write_whole
from jaxinfer.checkpoint.manifest import PARAMS, TOKENIZER
from jaxinfer.checkpoint.writer import METADATA, ZARRAY, orbax_metadata, zarr_meta


def small_files(source: Source, plan: Plan, dtype: str) -> dict[str, bytes]:
    """Path in the checkpoint to content."""
    targets = list(targets_of(plan))
    metas = {
        f"{PARAMS}/{each.leaf}/{ZARRAY}": zarr_meta(each.spec.shape, chunks_of(each), DTYPES[dtype]) for each in targets
    }
    metas[f"{PARAMS}/{METADATA}"] = orbax_metadata(sorted(each.leaf for each in targets))
    return metas | {f"{TOKENIZER}/{path.name}": path.read_bytes() for path in source.tokenizer}


def write_small(output: Path, small: Mapping[str, bytes]) -> list[str]:
    """Writes the files that are not there as they should be, and removes what else is among the tokenizer's; returns
    the names of both."""
    folder = output / TOKENIZER
    old = [path for path in _listed(folder) if f"{TOKENIZER}/{path.name}" not in small]
    for path in old:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    changed = [name for name, data in small.items() if not _holds(output / name, data)]
    for name in changed:
        (output / name).parent.mkdir(exist_ok=True)
        write_whole(output / name, small[name])
    if old and not any(folder.iterdir()):
        folder.rmdir()
    if old or changed:
        sync_folder(output)
    return changed + [f"{TOKENIZER}/{path.name} (removed)" for path in old]


def _listed(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []


def _holds(path: Path, data: bytes) -> bool:
    try:
        return path.stat().st_size == len(data) and path.read_bytes() == data
    except OSError:
        return False
