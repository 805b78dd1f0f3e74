"""What a conversion will do, checked before anything is written: every tensor has its leaves, every leaf its tensor."""

from collections.abc import Iterator

from convert.families import names
from convert.leaf import same_tensors
from convert.source import Source
from convert.target import HEAD, Names, Target
from convert.tensor import DTYPES as SOURCE_DTYPES
from convert.tensor import ConvertError, SourceTensor
from jaxinfer.checkpoint.writer import chunk_shape
from jaxinfer.models.families import leaves

_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
DTYPES = tuple(_NAMES.values())

_LISTED = 40  # of the tensors that do not fit

Plan = list[tuple[SourceTensor, tuple[Target, ...]]]


def make_plan(source: Source) -> Plan:
    """Tensors and their leaves, in the order of the files.

    Raises:
      ConvertError: lists tensors that are missing, unknown, of another shape than the config says or of a dtype that
        is not floating point; or a tied model whose head differs from its embedding.
    """
    known = names(source.config)
    table, tensors = known.targets(leaves(source.config)), _prefixed(source, known)
    tied_head = tensors.get(HEAD) if source.config.tied else None
    wrong = [f"{name}: missing" for name in table if name not in tensors]
    for name, tensor in tensors.items():
        if name in table:
            wrong += _misfit(tensor, table[name][0])
        elif tensor is not tied_head and not name.endswith(known.ignored):
            wrong.append(f"{tensor.name}: in {tensor.path.name}, but {source.config.architecture} has no such tensor")
    if wrong:
        listed = wrong[:_LISTED] + [f"and {len(wrong) - _LISTED} more"] * (len(wrong) > _LISTED)
        raise ConvertError(f"{source.folder}: {len(wrong)} tensors do not fit config.json:\n  " + "\n  ".join(listed))
    embed = next(name for name, targets in table.items() if targets[0].leaf == "embed")
    if tied_head is not None and not same_tensors(tied_head, tensors[embed]):
        raise ConvertError(
            f"{tied_head.path}: tie_word_embeddings is true in config.json, but {HEAD} differs from "
            f"{embed}: one of the two is wrong"
        )
    plan = [(tensors[name], targets) for name, targets in table.items()]
    return sorted(plan, key=lambda each: (each[0].path, each[0].offset))


def _prefixed(source: Source, known: Names) -> dict[str, SourceTensor]:
    """The tensors by their full names: files of the bare model, without its head, leave the prefix out."""
    found: dict[str, SourceTensor] = {}
    twice = []
    for name, tensor in source.tensors.items():
        full = name if name == HEAD or name.startswith(known.prefix) else known.prefix + name
        if full in found:
            twice.append(f"{found[full].name} (in {found[full].path.name}) and {name} (in {tensor.path.name})")
        found[full] = tensor
    if twice:
        raise ConvertError(f"{source.folder}: tensors that are there twice: {'; '.join(twice)}")
    return found


def _misfit(tensor: SourceTensor, target: Target) -> list[str]:
    where = f"{tensor.name}: in {tensor.path.name}"
    if tensor.dtype not in SOURCE_DTYPES:
        return [f"{where}, dtype {tensor.dtype}, expected one of {', '.join(SOURCE_DTYPES)}"]
    if tensor.shape != target.source_shape:
        return [f"{where}, found shape {list(tensor.shape)}, expected {list(target.source_shape)}"]
    return []


def targets_of(plan: Plan) -> Iterator[Target]:
    return (target for _, targets in plan for target in targets)


def chunks_of(target: Target) -> tuple[int, ...]:
    return chunk_shape(target.spec.shape, target.spec.axes)


def source_dtype(plan: Plan) -> str:
    """The dtype that all tensors have; where they differ, or a checkpoint cannot have it, the user must say."""
    found = sorted({tensor.dtype for tensor, _ in plan})
    if len(found) == 1 and found[0] in _NAMES:
        return _NAMES[found[0]]
    folder = plan[0][0].path.parent
    raise ConvertError(f"{folder}: its tensors are {' and '.join(found)}: choose with --dtype {' or '.join(DTYPES)}")
