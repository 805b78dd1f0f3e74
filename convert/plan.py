"""What a conversion will do, checked before anything is written: every tensor has its leaf, every leaf its tensor."""

from convert.leaf import same_tensors
from convert.llama import IGNORED, Target, targets
from convert.source import Source
from convert.tensor import DTYPES as SOURCE_DTYPES
from convert.tensor import ConvertError, SourceTensor

_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
DTYPES = tuple(_NAMES.values())

Plan = list[tuple[SourceTensor, Target]]


def make_plan(source: Source) -> Plan:
    """Tensors and their leaves, in the order of the files.

    Raises:
      ConvertError: lists every tensor that is missing, unknown, of another shape than the config says or of a dtype
        that is not floating point; or a tied model whose head differs from its embedding.
    """
    table, tensors = targets(source.config), source.tensors
    tied_head = "lm_head.weight" if source.config.tied and "lm_head.weight" in tensors else None
    wrong = [f"{name}: missing" for name in table if name not in tensors]
    for name, tensor in tensors.items():
        if name in table:
            wrong += _misfit(tensor, table[name])
        elif name != tied_head and not name.endswith(IGNORED):
            wrong.append(f"{name}: in {tensor.path.name}, but {source.config.architecture} has no such tensor")
    if wrong:
        raise ConvertError(f"{source.folder}: {len(wrong)} tensors do not fit config.json:\n  " + "\n  ".join(wrong))
    if tied_head and not same_tensors(tensors[tied_head], tensors["model.embed_tokens.weight"]):
        raise ConvertError(
            f"{tensors[tied_head].path}: tie_word_embeddings is true in config.json, but lm_head.weight differs from "
            f"model.embed_tokens.weight: one of the two is wrong"
        )
    plan = [(tensors[name], target) for name, target in table.items()]
    return sorted(plan, key=lambda each: (each[0].path, each[0].offset))


def _misfit(tensor: SourceTensor, target: Target) -> list[str]:
    where = f"{tensor.name}: in {tensor.path.name}"
    if tensor.dtype not in SOURCE_DTYPES:
        return [f"{where}, dtype {tensor.dtype}, expected one of {', '.join(SOURCE_DTYPES)}"]
    if tensor.shape != target.source_shape:
        return [f"{where}, found shape {list(tensor.shape)}, expected {list(target.source_shape)}"]
    return []


def source_dtype(plan: Plan) -> str:
    """The dtype that all tensors have; where they differ, or a checkpoint cannot have it, the user must say."""
    found = sorted({tensor.dtype for tensor, _ in plan})
    if len(found) == 1 and found[0] in _NAMES:
        return _NAMES[found[0]]
    folder = plan[0][0].path.parent
    raise ConvertError(f"{folder}: its tensors are {' and '.join(found)}: choose with --dtype {' or '.join(DTYPES)}")
