"""The conversion: hash, stream each tensor into its leaf, journal it, and write the manifest when all is there."""

import fcntl
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from math import ceil, prod
from pathlib import Path

import numpy as np
from tqdm import tqdm

from convert import VERSION
from convert.again import take_up
from convert.hashing import hashed_ahead, intact, sha256
from convert.journal import NAME as JOURNAL
from convert.journal import Record
from convert.leaf import Told, read_tensor, same_bits
from convert.plan import DTYPES as NAMES
from convert.plan import Plan, chunks_of, make_plan, source_dtype, targets_of
from convert.small import small_files, write_small
from convert.source import Source, open_source
from convert.target import Target
from convert.tensor import ConvertError, SourceTensor
from jaxinfer.checkpoint.entries import DTYPES
from jaxinfer.checkpoint.files import describe
from jaxinfer.checkpoint.manifest import NAME as MANIFEST
from jaxinfer.checkpoint.manifest import PARAMS, Manifest, encode, read_manifest, write_manifest
from jaxinfer.checkpoint.reader import Reader
from jaxinfer.checkpoint.writer import write_leaf


def convert(
    source_dir: str | Path, output: str | Path, dtype: str | None = None, verify: bool = False, quiet: bool = False
) -> tuple[Manifest, list[str]]:
    """Converts a Hugging Face folder, finishes what an interrupted run began, or mends what is damaged.

    What is as it would be written is kept. So the same call mends a checkpoint with missing or damaged files, be it the
    manifest, renews one of an older version, and brings a tokenizer up to date with the source's.

    dtype: bfloat16, float16 or float32; the source's where None. verify: read the checkpoint back and compare every
    tensor with the source. quiet: no progress bar and no remarks. Host memory stays under three times the largest
    tensor plus 500 MB. Returns the manifest, and the leaves and files that were written (or removed): none where all
    was there.

    Raises:
      ConvertError, ConfigError, CheckpointError: says which file, tensor or setting is wrong; what was already written
        is kept, and the same call goes on from there.
    """
    source = open_source(source_dir)
    plan = make_plan(source)
    if dtype not in (None, *NAMES):
        raise ConvertError(f"dtype: {dtype!r} is not supported; supported: {', '.join(NAMES)}")
    dtype, output = dtype or source_dtype(plan), Path(output)
    if output.exists() and not output.is_dir():
        raise ConvertError(f"{output}: exists and is not a folder")
    output.mkdir(parents=True, exist_ok=True)
    with _alone(output):
        record = take_up(source, plan, output, dtype, lambda text: quiet or print(f"convert: {text}", file=sys.stderr))
        written = _write_leaves(source, plan, output, dtype, record, quiet)
        small = small_files(source, plan, dtype)
        written += write_small(output, small)
        manifest = _manifest(source, plan, dtype, record, small)
        if verify:
            _verify(plan, output, manifest, quiet)
        path = output / MANIFEST
        if not path.exists() or path.read_bytes() != encode(manifest):
            write_manifest(output, manifest)
            written.append(MANIFEST)
        (output / JOURNAL).unlink(missing_ok=True)
        return read_manifest(output), written


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


def _write_leaves(source: Source, plan: Plan, output: Path, dtype: str, record: Record, quiet: bool) -> list[str]:
    for path in source.notes:
        record.source(path.name, sha256(path))
    (output / PARAMS).mkdir(exist_ok=True)
    _check_space(plan, output, dtype, record)
    by_file = {path: list(group) for path, group in groupby(plan, key=lambda each: each[0].path)}
    # every weight file is read twice: once for its hash, once for its tensors (or what became of them)
    total = sum(path.stat().st_size for path in source.weights) + sum(tensor.nbytes for tensor, _ in plan)
    written = []
    with _bar(total, "hash and convert", quiet) as bar:
        for path, found in hashed_ahead(source.weights, bar.update):
            record.source(path.name, found)
            for tensor, targets in by_file.get(path, ()):
                written += _write_tensor(tensor, targets, output, dtype, record, bar.update)
    return written


def _write_tensor(
    tensor: SourceTensor, targets: tuple[Target, ...], output: Path, dtype: str, record: Record, told: Told
) -> list[str]:
    """The leaves that were not there as they should be, and now are."""
    missing = [each for each in targets if not intact(output, record.leaves.get(each.leaf))]
    if not missing:
        told(tensor.nbytes)
        return []
    whole = read_tensor(tensor, dtype, told)
    for target in missing:
        # no name for the leaf: it must be gone before the next one is made
        files = write_leaf(output / PARAMS, target.leaf, np.ascontiguousarray(target.take(whole)), chunks_of(target))
        record.leaf(target.leaf, files)
    return [f"{PARAMS}/{target.leaf}" for target in missing]


def _check_space(plan: Plan, output: Path, dtype: str, record: Record) -> None:
    item = DTYPES[dtype].itemsize
    need = 0
    for target in targets_of(plan):
        if target.leaf not in record.leaves:
            chunks = chunks_of(target)
            need += prod(ceil(size / chunk) * chunk for size, chunk in zip(target.spec.shape, chunks)) * item
    free = shutil.disk_usage(output).free
    if need > free:
        raise ConvertError(f"{output}: needs {need / 1e9:.2f} GB more, the disk has {free / 1e9:.2f} GB free")


def _manifest(source: Source, plan: Plan, dtype: str, record: Record, small: Mapping[str, bytes]) -> Manifest:
    targets = {target.leaf: target for target in targets_of(plan)}
    chunks = {name: entry for leaf in targets for name, entry in record.leaves[leaf].items()}
    return Manifest(
        model=source.config.to_json(),
        dtype=dtype,
        quantization=None,
        leaves={
            name: {"shape": list(target.spec.shape), "dtype": dtype, "chunks": list(chunks_of(target))}
            for name, target in targets.items()
        },
        files=chunks | {name: describe(data) for name, data in small.items()},
        tokenizer=[path.name for path in source.tokenizer],
        sources=record.sources,
        converter=VERSION,
        parameters=sum(prod(target.spec.shape) for target in targets.values()),
    )


def _verify(plan: Plan, output: Path, manifest: Manifest, quiet: bool) -> None:
    checkpoint = Reader(output, manifest)
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
