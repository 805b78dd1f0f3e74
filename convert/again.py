"""What an earlier conversion left in the output: what can be kept, and whether it is of this source at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from convert import VERSION
from convert.hashing import intact, sha256
from convert.journal import NAME as JOURNAL
from convert.journal import Journal, Record
from convert.leaf import read_tensor
from convert.plan import Plan, chunks_of, targets_of
from convert.source import Source
from convert.tensor import ConvertError
from jaxinfer.checkpoint.files import DamagedError
from jaxinfer.checkpoint.manifest import NAME as MANIFEST
from jaxinfer.checkpoint.manifest import PARAMS, Manifest, read_manifest
from jaxinfer.checkpoint.writer import chunk_files, describe_leaf
from jaxinfer.models.config import ModelConfig

Files = dict[str, dict[str, Any]]


def take_up(source: Source, plan: Plan, output: Path, dtype: str, say: Callable[[str], None]) -> Record:
    """The record to go on from: of a manifest, of the journal of an unfinished conversion, or, where neither is there
    and whole, of those leaves that hold what the source gives. `say` hears what is amiss.

    Raises:
      ConvertError: the output holds something else, or an unfinished conversion with other settings.
      CheckpointError: a manifest of another format.
    """
    lost = None
    try:
        if (output / MANIFEST).exists():
            return _complete(source, plan, output, dtype)
        if (output / PARAMS).is_dir():
            lost = f"{output}: no {MANIFEST}"
    except DamagedError as error:
        lost = str(error)
    header = {"converter": VERSION, "dtype": dtype, "model": source.config.to_json()}
    journal = output / JOURNAL
    try:
        if journal.exists() or not any(output.iterdir()):
            return Journal(output, header, {})
    except DamagedError as error:
        lost = str(error)
    if not journal.exists() and (lost is None or not _there(plan, output)):
        raise ConvertError(f"{output}: not empty, and no conversion that can be finished; choose another --output")
    say(f"{lost}; its weights are compared with the source")
    leaves = _same_leaves(plan, output, dtype)
    journal.unlink(missing_ok=True)
    return Journal(output, header, leaves)


def _complete(source: Source, plan: Plan, output: Path, dtype: str) -> Record:
    manifest = read_manifest(output)
    differ = []
    if manifest.dtype != dtype:
        differ.append(f"its dtype is {manifest.dtype}, asked for {dtype}")
    if manifest.converter != VERSION:
        differ.append(f"it was written by converter version {manifest.converter}, this is {VERSION}")
    if ModelConfig.from_json(manifest.model) != source.config and not _same_notes(source, manifest):
        differ.append("its model config is another")
    if differ:
        raise _of_something_else(output, differ)
    return _Whole(source, plan, output, manifest)


def _same_notes(source: Source, manifest: Manifest) -> bool:
    """The config was read from these very files: another one is damage, or was read by an older version."""
    weights = {path.name for path in source.weights}
    before = {name: entry for name, entry in manifest.sources.items() if name not in weights}
    return before == {path.name: sha256(path) for path in source.notes}


def _of_something_else(output: Path, differ: list[str]) -> ConvertError:
    what = f"a complete checkpoint of something else: {'; '.join(differ)}"
    return ConvertError(f"{output}: {what}; choose another --output, or remove the folder")


class _Whole(Record):
    """Of a manifest: it needs no journal, since what is in place is known by its checksums. Weights must be of the same
    files; of others, which can only differ in what does not matter here, the manifest gets the new hashes."""

    def __init__(self, source: Source, plan: Plan, output: Path, manifest: Manifest):
        known, names = manifest.files, {each.leaf: _chunk_files(each) for each in targets_of(plan)}
        leaves = {
            leaf: {name: known[name] for name in files} for leaf, files in names.items() if known.keys() >= set(files)
        }
        super().__init__({}, leaves)
        self._output, self._before = output, manifest.sources
        self._weights = {path.name for path in source.weights}

    def source(self, name: str, found: dict[str, Any]) -> None:
        if name in self._weights and self._before.get(name) != found:
            raise _of_something_else(self._output, [f"it was made from another {name}"])
        super().source(name, found)


def _there(plan: Plan, output: Path) -> set[str]:
    return {target.leaf for target in targets_of(plan) if (output / PARAMS / target.leaf).is_dir()}


def _chunk_files(target: Any) -> list[str]:
    return chunk_files(target.leaf, target.spec.shape, chunks_of(target))


def _same_leaves(plan: Plan, output: Path, dtype: str) -> dict[str, Files]:
    """The leaves whose files hold, bit for bit, what the source gives.

    Raises:
      ConvertError: they are no more than half of those that are there: damage is rarer, so these are other weights.
    """
    there = _there(plan, output)
    same = {}
    for tensor, targets in plan:
        if wanted := [target for target in targets if target.leaf in there]:
            whole = read_tensor(tensor, dtype)
            for target in wanted:
                files = describe_leaf(target.leaf, np.ascontiguousarray(target.take(whole)), chunks_of(target))
                if intact(output, files):
                    same[target.leaf] = files
    if there and 2 * len(same) <= len(there):
        what = f"{len(there) - len(same)} of its {len(there)} leaves hold other numbers than this source in {dtype}"
        raise ConvertError(f"{output}: not empty, and {what}; choose another --output, or remove the folder")
    return same
