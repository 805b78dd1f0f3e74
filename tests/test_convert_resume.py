"""Conversions that are killed go on, and a folder belongs to one conversion of one source."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import time

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from convert.__main__ import main
from convert.journal import Journal
from convert.plan import make_plan
from convert.run import convert
from convert.source import open_source
from convert.tensor import ConvertError
from converting import (
    DOWN,
    EMBED,
    ROOT,
    command,
    edit_json,
    header_entry,
    refused,
    rewrite,
    state_of,
    write_safetensors,
)
from hf_models import make_hf_folder
from jaxinfer.checkpoint.files import CheckpointError
from jaxinfer.checkpoint.manifest import read_manifest, write_manifest
from jaxinfer.checkpoint.reader import Reader


def journal_leaves(ckpt):
    journal = ckpt / "convert.journal.jsonl"
    return journal.read_bytes().count(b'{"leaf"') if journal.exists() else 0


def kill_after(source, ckpt, leaves):
    """Starts a conversion and kills it, as a lost node would, once some leaves are journaled."""
    process = subprocess.Popen(command(source, ckpt), cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and journal_leaves(ckpt) < leaves:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"


def write_journal(source, ckpt, manifest):
    """The journal of a conversion that was interrupted before its manifest."""
    header = {"converter": manifest.converter, "dtype": manifest.dtype, "model": open_source(source).config.to_json()}
    journal = Journal(ckpt, header, {})
    for name, found in manifest.sources.items():
        journal.source(name, found)
    for leaf in manifest.leaves:
        files = {name: found for name, found in manifest.files.items() if name.startswith(f"params/{leaf}/")}
        journal.leaf(leaf, files)


def inodes(ckpt):
    return {str(path.relative_to(ckpt)): path.stat().st_ino for path in ckpt.glob("params/*/*")}


def same_checkpoint(one, other):
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (one, other)]
    assert names[0] == names[1]
    for name in names[0]:
        if (one / name).is_file():
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_killed_again_and_again_it_finishes_as_if_undisturbed(tmp_path):
    hf, ckpt = tmp_path / "hf", tmp_path / "ckpt"
    make_hf_folder(hf, num_hidden_layers=12, max_shard_size=60_000)
    (hf / "tokenizer.json").write_text("{}")
    convert(hf, tmp_path / "undisturbed", quiet=True)
    kept = {}
    for leaves in (1, 30, 60):
        kill_after(hf, ckpt, leaves)
        with pytest.raises(CheckpointError, match="incomplete checkpoint"):
            Reader(ckpt)
        assert journal_leaves(ckpt) >= leaves
        now = inodes(ckpt)
        assert all(now.get(name) == inode for name, inode in kept.items())  # what was done was not done again
        lines = (ckpt / "convert.journal.jsonl").read_text().splitlines()
        done = [name for line in lines if '{"leaf"' in line for name in next(iter(json.loads(line)["leaf"].values()))]
        kept = {name: now[name] for name in done}
    _, written = convert(hf, ckpt, verify=True, quiet=True)
    assert written
    now = inodes(ckpt)
    assert all(now[name] == inode for name, inode in kept.items())
    same_checkpoint(ckpt, tmp_path / "undisturbed")


def test_after_a_crash_what_is_damaged_is_written_again(tmp_path):
    hf, ckpt = tmp_path / "hf", tmp_path / "ckpt"
    make_hf_folder(hf, num_hidden_layers=6)
    convert(hf, tmp_path / "undisturbed", quiet=True)
    kill_after(hf, ckpt, 20)
    journal = ckpt / "convert.journal.jsonl"
    leaves = [next(iter(json.loads(line)["leaf"])) for line in journal.read_text().splitlines() if '{"leaf"' in line]
    with open(journal, "ab") as file:
        file.write(b'{"leaf": {"layers.0.q": {"params/lay')  # torn
    flipped, missing, short = (next((ckpt / "params" / leaf).glob("[0-9]*")) for leaf in leaves[:3])
    flipped.write_bytes(bytes([flipped.read_bytes()[0] ^ 1]) + flipped.read_bytes()[1:])
    missing.unlink()
    os.truncate(short, 3)
    (ckpt / "params" / "norm.partial").mkdir(exist_ok=True)
    kill_after(hf, ckpt, 40)  # once more, so that what followed the torn line is read again
    convert(hf, ckpt, quiet=True)
    shutil.rmtree(ckpt / "params" / "norm.partial", ignore_errors=True)
    same_checkpoint(ckpt, tmp_path / "undisturbed")


@pytest.fixture
def unfinished(tmp_path):
    """A folder of several shards and its conversion to float16, which stops at the last tensor: it does not fit."""
    hf, ckpt = tmp_path / "hf", tmp_path / "ckpt"
    make_hf_folder(hf, max_shard_size=30_000)
    tensor = make_plan(open_source(hf))[-1][0]
    state = load_file(tensor.path)
    state[tensor.name] += 1e6
    save_file(state, tensor.path)
    with pytest.raises(ConvertError, match=f"tensor {tensor.name} does not fit float16"):
        convert(hf, ckpt, "float16", quiet=True)
    assert journal_leaves(ckpt) == 20
    return hf, ckpt, tensor


@pytest.mark.parametrize(
    ("line", "before", "after"),
    [
        (0, b"header", b"hea\xf2er"),
        (5, b"{", b"\xfb"),
        (5, b'"leaf"', b'"lfaf"'),
        (1, b'"sha256"', b'"sha356"'),
        (-1, b'"xxh3_128"', b'"xxh3_228"'),
    ],
)
def test_a_damaged_journal_is_as_good_as_none(tmp_path, line, before, after, capsys):
    hf, ckpt = tmp_path / "hf", tmp_path / "ckpt"
    make_hf_folder(hf)
    convert(hf, ckpt, quiet=True)
    journal, manifest = ckpt / "convert.journal.jsonl", read_manifest(ckpt)
    write_journal(hf, ckpt, manifest)
    whole, kept = (ckpt / "manifest.json").read_bytes(), inodes(ckpt)
    (ckpt / "manifest.json").unlink()
    lost = next((ckpt / "params" / "norm").glob("[0-9]*"))
    lost.unlink()
    lines = journal.read_bytes().splitlines(True)
    lines[line] = lines[line].replace(before, after, 1)
    journal.write_bytes(b"".join(lines))
    arguments = ["--source", str(hf), "--output", str(ckpt)]
    assert main(arguments) == 0
    assert f"convert: {journal}: damaged, line " in capsys.readouterr().err
    assert (ckpt / "manifest.json").read_bytes() == whole and not journal.exists()
    now = inodes(ckpt)
    assert all(now[name] == inode for name, inode in kept.items() if not name.startswith("params/norm/"))
    assert main(arguments) == 0 and "already converted" in capsys.readouterr().out


def test_a_damaged_journal_without_leaves_begins_anew_and_one_of_other_weights_is_kept(tmp_path, unfinished):
    hf, ckpt, _ = unfinished
    journal = ckpt / "convert.journal.jsonl"
    journal.write_bytes(b"\xff" + journal.read_bytes())
    refused_whole = journal.read_bytes()
    with pytest.raises(ConvertError, match="20 of its 20 leaves hold other numbers than this source in bfloat16"):
        convert(hf, ckpt, "bfloat16", quiet=True)
    assert journal.read_bytes() == refused_whole
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / journal.name).write_bytes(b'{"header": \xff}\n')
    convert(hf, tmp_path / "new", quiet=True)
    assert convert(hf, tmp_path / "new", quiet=True)[1] == []


def test_unfinished_folder_does_not_go_on_with_another_dtype_or_config(unfinished):
    hf, ckpt, _ = unfinished
    before = inodes(ckpt)
    with pytest.raises(
        ConvertError, match=r"unfinished conversion with other settings .dtype was 'float16', now 'bfloa"
    ):
        convert(hf, ckpt, "bfloat16", quiet=True)
    edit_json(hf / "config.json", rms_norm_eps=0.5)
    with pytest.raises(ConvertError, match=r"unfinished conversion with other settings .model was"):
        convert(hf, ckpt, "float16", quiet=True)
    assert inodes(ckpt) == before and not (ckpt / "manifest.json").exists()


def test_unfinished_folder_does_not_go_on_with_another_source(unfinished):
    hf, ckpt, tensor = unfinished
    first = sorted(hf.glob("*.safetensors"))[0]
    whole = first.read_bytes()
    first.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ConvertError, match=f"an earlier run converted from another {first.name}"):
        convert(hf, ckpt, "float16", quiet=True)
    first.write_bytes(whole)
    with pytest.raises(ConvertError, match=f"tensor {tensor.name} does not fit"):
        convert(hf, ckpt, "float16", quiet=True)
    assert not (ckpt / "manifest.json").exists()


def test_complete_folder_is_left_alone_and_belongs_to_its_source(tiny, tmp_path):
    ckpt = tmp_path / "ckpt"
    convert(tiny, ckpt, quiet=True)
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in ckpt.rglob("*")}
    manifest, written = convert(tiny, ckpt, verify=True, quiet=True)
    assert not written and manifest == read_manifest(ckpt)
    with pytest.raises(ConvertError, match="its dtype is float32, asked for bfloat16; choose another --output"):
        convert(tiny, ckpt, "bfloat16", quiet=True)
    state = state_of(tiny)
    state[DOWN][0, 0] += 1
    rewrite(tiny, state)
    with pytest.raises(ConvertError, match=r"it was made from another model\.safetensors"):
        convert(tiny, ckpt, quiet=True)
    edit_json(tiny / "config.json", rms_norm_eps=0.5)
    with pytest.raises(ConvertError, match="its model config is another"):
        convert(tiny, ckpt, quiet=True)
    assert before == {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in ckpt.rglob("*")}


def test_verify_finds_a_tensor_that_differs(tiny, tmp_path):
    ckpt = tmp_path / "ckpt"
    manifest, _ = convert(tiny, ckpt, quiet=True)
    chunk = ckpt / "params" / "layers.0.down" / "0.1"
    changed = bytearray(chunk.read_bytes())
    changed[0] ^= 1
    chunk.write_bytes(changed)
    manifest.files["params/layers.0.down/0.1"]["xxh3_128"] = xxhash.xxh3_128_hexdigest(bytes(changed))
    write_manifest(ckpt, manifest)
    with pytest.raises(ConvertError, match=f"1 tensors differ from the source: {DOWN} .layers.0.down."):
        convert(tiny, ckpt, verify=True, quiet=True)


def test_folder_of_something_else_is_not_written_to(tiny, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    with pytest.raises(ConvertError, match="not empty, and no conversion"):
        convert(tiny, other, quiet=True)
    with pytest.raises(ConvertError, match="is not a folder"):
        convert(tiny, other / "thesis.tex", quiet=True)
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]


def test_two_conversions_do_not_write_the_same_folder(tiny, tmp_path):
    ckpt = tmp_path / "ckpt"
    ckpt.mkdir()
    handle = os.open(ckpt, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(ConvertError, match="another conversion is writing here"):
        convert(tiny, ckpt, quiet=True)
    os.close(handle)
    assert convert(tiny, ckpt, quiet=True)[1]


def test_full_disk_is_seen_before_the_start(tmp_path):
    # a vocabulary of a trillion bytes in a sparse file: nothing of it is read before the space is checked
    shape = {"num_hidden_layers": 1, "hidden_size": 1024, "tie_word_embeddings": True}
    make_hf_folder(tmp_path / "hf", dtype="bfloat16", **shape)
    hf, path = tmp_path / "hf", tmp_path / "hf" / "model.safetensors"
    rows = max(10**12, 2 * shutil.disk_usage(tmp_path).free) // 2048
    state = {name: tensor for name, tensor in state_of(hf).items() if name != EMBED}
    header, end, data = {}, 0, b""
    for name, tensor in state.items():
        header[name] = header_entry(end, end + tensor.nbytes, list(tensor.shape), "BF16")
        data, end = data + tensor.view(torch.int16).numpy().tobytes(), end + tensor.nbytes
    header[EMBED] = header_entry(end, end + rows * 2048, [rows, 1024], "BF16")
    write_safetensors(path, header, data)
    try:
        os.truncate(path, path.stat().st_size + rows * 2048)
    except OSError as error:
        pytest.skip(f"the file system holds no sparse file of this size: {error}")
    edit_json(hf / "config.json", vocab_size=rows)
    refused(hf, tmp_path, r"refused: needs [\d.]+ GB more, the disk has [\d.]+ GB free")


def test_interrupt_says_how_to_go_on(tmp_path):
    hf, ckpt = tmp_path / "hf", tmp_path / "ckpt"
    make_hf_folder(hf, num_hidden_layers=10)
    process = subprocess.Popen(command(hf, ckpt), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and journal_leaves(ckpt) < 3:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130 and "run the same command again to finish" in err
    assert convert(hf, ckpt, verify=True, quiet=True)[1]
