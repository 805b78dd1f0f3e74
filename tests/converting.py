"""Conversions of tiny models: what the converter's tests share."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.run import convert
from convert.tensor import ConvertError
from jaxinfer.checkpoint.reader import Reader
from jaxinfer.models.config import ConfigError

ROOT = Path(__file__).parent.parent
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


def read_all(checkpoint):
    reader = Reader(checkpoint)
    return {
        name: reader.read(name, (slice(None),) * len(each["shape"])) for name, each in reader.manifest.leaves.items()
    }


def as_torch(array):
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def state_of(folder):
    return load_file(folder / "model.safetensors")


def rewrite(folder, state):
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")


def to_bin(folder, state):
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(state, folder / "pytorch_model.bin")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder, tmp_path, message, **settings):
    with pytest.raises((ConvertError, ConfigError), match=message) as error:
        convert(folder, tmp_path / "refused", quiet=True, **settings)
    assert not (tmp_path / "refused" / "manifest.json").exists()
    return str(error.value)


def write_safetensors(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)


def header_entry(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def command(source, output, *more):
    return [sys.executable, "-m", "convert", "--source", str(source), "--output", str(output), *more]


def without_checksums(ckpt):
    """As the versions wrote it that had checksums of the chunk files alone."""
    manifest = json.loads((ckpt / "manifest.json").read_text())
    del manifest["xxh3_128"]
    files = {name for name in manifest["files"] if name.count("/") == 2 and not name.endswith(".zarray")}
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if name in files}
    text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    (ckpt / "manifest.json").write_text(text)
    return text.encode()
