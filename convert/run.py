"""The conversion: hash, stream each tensor into its leaf, journal it, and write the manifest when all is there."""

import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from convert import VERSION
from convert.hashing import hashed_ahead, intact, sha256
from convert.journal import NAME as JOURNAL
from convert.journal import Journal
from convert.leaf import Told, read_tensor, same_bits
from convert.plan import DTYPES, Plan, make_plan, source_dtype
from convert.source import Source, open_source
from convert.target import Target
from convert.tensor import ConvertError, SourceTensor
from jaxinfer.checkpoint import reader
from jaxinfer.checkpoint.files import sync_folder, write_whole
from jaxinfer.checkpoint.manifest import NAME as MANIFEST
from jaxinfer.checkpoint.manifest import PARAMS, TOKENIZER, Manifest, read_manifest, write_manifest
from jaxinfer.checkpoint.writer import chunk_shape, write_leaf, write_orbax_metadata
from jaxinfer.models.config import ModelConfig


def convert(
    source_dir: str | Path, output: str | Path, dtype: str | None = None, verify: bool = False, quiet: bool = False
) -> tuple[Manifest, bool]:
    """Converts a Hugging Face folder, or finishes what an interrupted run began.

    dtype: bfloat16, float16 or float32; the source's where None. verify: read the checkpoint back and compare every
    tensor with the source. quiet: no progress bar. Host memory stays under three times the largest tensor plus 500 MB.
    Returns the manifest, and False where the output was already complete.

    Raises:
      ConvertError, ConfigError, CheckpointError: says which file, tensor or setting is wrong; what was already written
        is kept, and the same call goes on from there.
    """
    source = open_source(source_dir)
    plan = make_plan(source)
    if dtype not in (None, *DTYPES):
        raise ConvertError(f"dtype: {dtype!r} is not supported; supported: {', '.join(DTYPES)}")
    dtype, output = dtype or source_dtype(plan), Path(output)
    if output.exists() and not output.is_dir():
        raise ConvertError(f"{output}: exists and is not a folder")
    output.mkdir(parents=True, exist_ok=True)
    with _alone(output):
        if (output / MANIFEST).exists():
            manifest = _complete(source, plan, output, dtype, quiet)
            (output / JOURNAL).unlink(missing_ok=True)
            if verify:
                _verify(plan, output, manifest, quiet)
            return manifest, False
        header = {"converter": VERSION, "dtype": dtype, "model": source.config.to_json()}
        journal = Journal(output, header)
        _write_leaves(source, plan, output, dtype, journal, quiet)
        write_orbax_metadata(output / PARAMS, sorted(journal.leaves))
        manifest = _manifest(source, plan, dtype, journal)
        if verify:
            _verify(plan, output, manifest, quiet)
        _copy_tokenizer(source, output)
        write_manifest(output, manifest)
        journal.path.unlink()
        return read_manifest(output), True


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    handle = os.open(output, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ConvertError(f"{output}: another conversion is writing here") from None
    except OSError:
        pass  # a file system without locks: nothing to hold on to
    try:
        yield
    finally:
        os.close(handle)


def _bar(total: int, what: str, quiet: bool) -> tqdm:
    # a log file gets a line now and then, a terminal a moving bar
    every = 0.1 if sys.stderr.isatty() else 10
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, unit_divisor=1024, disable=quiet, mininterval=every)


def _complete(source: Source, plan: Plan, output: Path, dtype: str, quiet: bool) -> Manifest:
    """The manifest of a complete output, if it is what this source and dtype give; otherwise refuses."""
    manifest = read_manifest(output)
    differ = []
    if manifest.dtype != dtype:
        differ.append(f"its dtype is {manifest.dtype}, asked for {dtype}")
    if manifest.converter != VERSION:
        differ.append(f"it was written by converter version {manifest.converter}, this is {VERSION}")
    if ModelConfig.from_json(manifest.model) != source.config:
        differ.append("its model config is another")
    if not differ:
        paths = [*source.weights, *source.notes]
        with _bar(sum(path.stat().st_size for path in paths), "compare sources", quiet) as bar:
            found = {path.name: sha256(path, bar.update) for path in paths}
        differ = [f"it was made from another {name}" for name in found if manifest.sources.get(name) != found[name]]
    if differ:
        what = f"a complete checkpoint of something else: {'; '.join(differ)}"
        raise ConvertError(f"{output}: {what}; choose another --output, or remove the folder")
    return manifest


def _write_leaves(source: Source, plan: Plan, output: Path, dtype: str, journal: Journal, quiet: bool) -> None:
    for path in source.notes:
        journal.source(path.name, sha256(path))
    params = output / PARAMS
    params.mkdir(exist_ok=True)
    _check_space(plan, output, dtype, journal)
    by_file = {path: list(group) for path, group in groupby(plan, key=lambda each: each[0].path)}
    # every weight file is read twice: once for its hash, once for its tensors
    total = sum(path.stat().st_size for path in source.weights) + sum(tensor.nbytes for tensor, _ in plan)
    with _bar(total, "hash and convert", quiet) as bar:
        for path, found in hashed_ahead(source.weights, bar.update):
            journal.source(path.name, found)
            for tensor, targets in by_file.get(path, ()):
                _write_tensor(tensor, targets, output, dtype, journal, bar.update)


def _write_tensor(
    tensor: SourceTensor, targets: tuple[Target, ...], output: Path, dtype: str, journal: Journal, told: Told
) -> None:
    missing = [
        each for each in targets if each.leaf not in journal.leaves or not intact(output, journal.leaves[each.leaf])
    ]
    if not missing:
        told(tensor.nbytes)
        return
    whole = read_tensor(tensor, dtype, told)
    for target in missing:
        # no name for the leaf: it must be gone before the next one is made
        files = write_leaf(output / PARAMS, target.leaf, np.ascontiguousarray(target.take(whole)), _chunks(target.spec))
        journal.leaf(target.leaf, files)


def _targets(plan: Plan) -> Iterator[Target]:
    return (target for _, targets in plan for target in targets)


def _chunks(spec: Any) -> tuple[int, ...]:
    return chunk_shape(spec.shape, spec.axes)


def _check_space(plan: Plan, output: Path, dtype: str, journal: Journal) -> None:
    item = reader.DTYPES[dtype].itemsize
    need = 0
    for target in _targets(plan):
        if target.leaf not in journal.leaves:
            chunks = _chunks(target.spec)
            need += prod(ceil(size / chunk) * chunk for size, chunk in zip(target.spec.shape, chunks)) * item
    free = shutil.disk_usage(output).free
    if need > free:
        raise ConvertError(f"{output}: needs {need / 1e9:.2f} GB more, the disk has {free / 1e9:.2f} GB free")


def _manifest(source: Source, plan: Plan, dtype: str, journal: Journal) -> Manifest:
    specs = {target.leaf: target.spec for target in _targets(plan)}
    return Manifest(
        model=source.config.to_json(),
        dtype=dtype,
        quantization=None,
        leaves={
            name: {"shape": list(spec.shape), "dtype": dtype, "chunks": list(_chunks(spec))}
            for name, spec in specs.items()
        },
        files={name: entry for leaf in specs for name, entry in journal.leaves[leaf].items()},
        tokenizer=[path.name for path in source.tokenizer],
        sources=journal.sources,
        converter=VERSION,
        parameters=sum(prod(spec.shape) for spec in specs.values()),
    )


def _verify(plan: Plan, output: Path, manifest: Manifest, quiet: bool) -> None:
    checkpoint = reader.Reader(output, manifest)
    different = []
    with _bar(sum(tensor.nbytes for tensor, _ in plan), "verify", quiet) as bar:
        for tensor, targets in plan:
            whole = read_tensor(tensor, manifest.dtype, bar.update)
            for target in targets:
                found = checkpoint.read(target.leaf, (slice(None),) * len(target.spec.shape))
                if not same_bits(found, target.take(whole)):
                    different.append(f"{tensor.name} ({target.leaf})")
    if different:
        raise ConvertError(
            f"{output}: {len(different)} tensors differ from the source: {', '.join(different)}; "
            f"remove the folder and convert again"
        )


def _copy_tokenizer(source: Source, output: Path) -> None:
    if source.tokenizer:
        folder = output / TOKENIZER
        folder.mkdir(exist_ok=True)
        for path in source.tokenizer:
            write_whole(folder / path.name, path.read_bytes())
        sync_folder(output)
