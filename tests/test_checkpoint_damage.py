"""A checkpoint with damage: nothing of it loads as something else, and the same conversion mends it."""

import json
import random
import shutil
from dataclasses import asdict

import pytest

from convert.__main__ import main
from convert.run import convert
from convert.tensor import ConvertError
from converting import edit_json, rewrite, state_of, without_checksums
from hf_models import make_hf_folder
from jaxinfer.checkpoint.files import CheckpointError, DamagedError
from jaxinfer.checkpoint.manifest import read_manifest, write_manifest
from jaxinfer.checkpoint.reader import Reader
from jaxinfer.checkpoint.verify import check_tokenizer, identity
from jaxinfer.models.config import ModelConfig

TOKENIZER = {
    "tokenizer.json": json.dumps({"model": {"type": "BPE", "vocab": {f"piece {i}": i for i in range(40)}}}),
    "tokenizer_config.json": '{"bos_token": "<s>"}',
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A source and its checkpoint; not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    make_hf_folder(folder / "hf", num_hidden_layers=1, rope_scaling={"rope_type": "linear", "factor": 2.0})
    for name, text in TOKENIZER.items():
        (folder / "hf" / name).write_text(text)
    convert(folder / "hf", folder / "ckpt", quiet=True)
    return folder


@pytest.fixture
def hf(whole, tmp_path):
    return shutil.copytree(whole / "hf", tmp_path / "hf")


@pytest.fixture
def ckpt(whole, tmp_path):
    return shutil.copytree(whole / "ckpt", tmp_path / "ckpt")


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def inodes(ckpt):
    return {str(path.relative_to(ckpt)): path.stat().st_ino for path in ckpt.rglob("*") if path.is_file()}


def flips(data, count):
    rng = random.Random(0)
    for place in rng.sample(range(len(data)), count):
        changed = bytearray(data)
        changed[place] ^= 1 << rng.randrange(8)
        yield place, bytes(changed)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_no_bit_of_a_manifest_may_change(ckpt):
    path = ckpt / "manifest.json"
    data = path.read_bytes()
    for place, changed in flips(data, 300):
        path.write_bytes(changed)
        with pytest.raises(DamagedError, match=r"manifest\.json: damaged, .*; the same conversion again mends it"):
            read_manifest(ckpt)
            pytest.fail(f"byte {place}: {data[place]:#x} became {changed[place]:#x}")


def test_a_manifest_laid_out_anew_says_the_same(ckpt):
    before, path = read_manifest(ckpt), ckpt / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert read_manifest(ckpt) == before


def test_bits_of_a_manifest_without_checksum_end_in_an_error_or_in_legal_values(ckpt):
    data, path = without_checksums(ckpt), ckpt / "manifest.json"
    refused = 0
    for _, changed in flips(data, 300):
        path.write_bytes(changed)
        try:
            ModelConfig.from_json(read_manifest(ckpt).model)
        except CheckpointError:
            refused += 1
    assert refused > 150


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("model", None, "model: found None, legal is a mapping"),
        ("dtype", "int8", "dtype: found 'int8', legal is bfloat16 or float16 or float32"),
        ("dtype", ["float32"], r"dtype: found \['float32'\], legal"),
        ("quantization", {}, "quantization: found {}, legal is null"),
        ("converter", 1, "converter: found 1, legal is a text"),
        ("parameters", -1, "parameters: found -1, legal is a whole number"),
        ("parameters", True, "parameters: found True, legal"),
        ("leaves", [], r"leaves: found \[\], legal is a mapping"),
        ("leaves/norm", 7, "leaves: 'norm': found 7, legal is a mapping"),
        ("leaves/norm/shape", ..., "leaves: 'norm': missing shape"),
        ("leaves/norm/shape", [], "leaves: 'norm': shape: found .*, legal is a list of sizes"),
        ("leaves/norm/shape", [1.5], "leaves: 'norm': shape: found 1.5, legal is a whole number from 1"),
        ("leaves/norm/shape", [10**400], "leaves: 'norm': shape: found 1000.* ..., legal is a whole number"),
        ("leaves/norm/chunks", [0], "leaves: 'norm': chunks: found 0, legal"),
        ("leaves/norm/chunks", [33], "leaves: 'norm': chunks: found 33, legal"),
        ("leaves/norm/chunks", [32, 1], "leaves: 'norm': chunks: found .*, legal is 1 sizes"),
        ("leaves/norm/dtype", "int4", "leaves: 'norm': dtype: found 'int4', legal"),
        ("files", None, "files: found None, legal is a mapping"),
        ("files/..", {}, r"files: found '\.\.', legal is a path inside the checkpoint"),
        ("files/params\0", {}, "files: found 'params.*', legal is a path inside the checkpoint"),
        ("files/params", {"bytes": 1}, "files: 'params': missing xxh3_128"),
        ("files/params", {"bytes": 1, "xxh3_128": "0" * 31 + "g"}, "legal is 32 hexadecimal digits"),
        ("files/params", {"bytes": "1", "xxh3_128": "0" * 32}, "files: 'params': bytes: found '1', legal"),
        ("sources/config.json", {"bytes": 1, "sha256": 5}, "legal is 64 hexadecimal digits"),
        ("tokenizer", "tokenizer.json", "tokenizer: found 'tokenizer.json', legal is a list of file names"),
        ("tokenizer", ["../config.json"], "tokenizer: found .*, legal is a list of file names"),
        ("tokenizer", ["merges.txt"], "files: missing 'tokenizer/merges.txt'"),
    ],
)
def test_values_of_a_manifest_are_checked_as_they_are_read(ckpt, where, value, message):
    manifest = read_manifest(ckpt)
    *parents, last = where.split("/", 2)
    place = vars(manifest)
    for name in parents:
        place = place[name]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    write_manifest(ckpt, manifest)  # with the checksum of what is wrong
    with pytest.raises(DamagedError, match=f"manifest.json: damaged, {message}" if where in message else message):
        read_manifest(ckpt)


def test_a_manifest_of_a_hundred_thousand_lists_is_refused(ckpt):
    (ckpt / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(DamagedError, match="damaged, not JSON"):
        read_manifest(ckpt)


def test_values_of_the_model_are_checked(whole):
    model = read_manifest(whole / "ckpt").model
    longrope = {"kind": "longrope", "theta": 1e4, "parameters": model["rope"]["parameters"] | {"short_factor": [1.0]}}
    for name, value in (
        ("architecture", None),
        ("vocab_size", "96"),
        ("hidden_size", 0),
        ("num_layers", True),
        ("num_heads", 4.0),
        ("num_kv_heads", 3),
        ("head_dim", 10**400),
        ("head_dim", 7),
        ("norm_eps", -1e-6),
        ("norm_eps", float("nan")),
        ("max_context", None),
        ("windows", [None, None]),
        ("windows", [0]),
        ("windows", "4"),
        ("windows", None),
        ("activation", "swiglu"),
        ("activation", ["silu"]),
        ("norm", "rms+2"),
        ("tied", 1),
        ("parallel_norms", 3),
        ("parallel_norms", True),
        ("eos_token_ids", [None]),
        ("eos_token_ids", 2),
        ("bos_token_id", "1"),
        ("query_scale", "x"),
        ("logit_softcap", float("inf")),
        ("learned_positions", 5),
        ("position_offset", -1),
        ("embed_width", 0),
        ("rope", {"kind": "linear", "theta": "1", "parameters": {}}),
        ("rope", {"kind": "linear", "theta": 1e4, "parameters": {}}),
        ("rope", {"kind": "linear", "theta": 1e4, "parameters": {"factor": 2.0}}),
        ("rope", {"kind": "linear", "theta": 1e4, "parameters": []}),
        ("rope", {"kind": "cubic", "theta": 1e4, "parameters": {}}),
        ("rope", False),
        ("rope", {}),
        ("rope", {"kind": "linear", "theta": 1e4, "parameters": None}),
        ("rope", longrope),
        ("eos_token_ids", [10**12]),
        ("eos_token_ids", [1] * 2000),
        ("bos_token_id", 10**400),
    ):
        with pytest.raises(DamagedError, match=r"manifest\.json: damaged, model: .*mends it"):
            ModelConfig.from_json(model | {name: value})
            pytest.fail(f"{name}: {value!r}")


def test_no_bit_of_a_tokenizer_may_change(ckpt):
    manifest = read_manifest(ckpt)
    check_tokenizer(ckpt, manifest)
    for path in (ckpt / "tokenizer").iterdir():
        data = path.read_bytes()
        for _, changed in flips(data, min(100, len(data))):
            path.write_bytes(changed)
            with pytest.raises(DamagedError, match=f"{path}: its bytes changed .*; the same conversion again mends it"):
                check_tokenizer(ckpt, manifest)
        path.write_bytes(data)
    check_tokenizer(ckpt, manifest)


def test_files_of_a_tokenizer_that_are_short_missing_or_too_many(ckpt):
    manifest, folder = read_manifest(ckpt), ckpt / "tokenizer"
    (folder / ".nfs0001").write_text("no library looks at it")
    check_tokenizer(ckpt, manifest)
    (folder / "added_tokens.json").write_text('{"more": 7}')
    with pytest.raises(DamagedError, match=r"tokenizer/added_tokens\.json: not one of the checkpoint's files; remove"):
        check_tokenizer(ckpt, manifest)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DamagedError, match=r"tokenizer/tokenizer\.json: 2 bytes, expected \d+; the same conversion"):
        check_tokenizer(ckpt, manifest)
    shutil.rmtree(folder)
    with pytest.raises(DamagedError, match=r"tokenizer/\w+\.json: missing; the same conversion again mends it"):
        check_tokenizer(ckpt, manifest)


CHUNK = "params/layers.0.down/0.1"


@pytest.mark.parametrize(
    ("damage", "written"),
    [
        (lambda ckpt: flip(ckpt / CHUNK), ["params/layers.0.down"]),
        (lambda ckpt: (ckpt / CHUNK).unlink(), ["params/layers.0.down"]),
        (lambda ckpt: (ckpt / CHUNK).write_bytes(b""), ["params/layers.0.down"]),
        (lambda ckpt: shutil.rmtree(ckpt / "params" / "norm"), ["params/norm"]),
        (lambda ckpt: flip(ckpt / "params" / "norm" / ".zarray"), ["params/norm/.zarray"]),
        (lambda ckpt: (ckpt / "params" / "_METADATA").unlink(), ["params/_METADATA"]),
        (lambda ckpt: flip(ckpt / "tokenizer" / "tokenizer.json"), ["tokenizer/tokenizer.json"]),
        (lambda ckpt: (ckpt / "tokenizer" / "vocab.txt").write_text(""), ["tokenizer/vocab.txt (removed)"]),
        (lambda ckpt: (ckpt / "manifest.json").unlink(), ["manifest.json"]),
        (lambda ckpt: flip(ckpt / "manifest.json"), ["manifest.json"]),
        (lambda ckpt: (ckpt / "manifest.json").write_bytes(b""), ["manifest.json"]),
    ],
)
def test_the_same_conversion_mends_it(whole, hf, ckpt, damage, written):
    before = inodes(ckpt)
    damage(ckpt)
    manifest, found = convert(hf, ckpt, verify=True, quiet=True)
    assert found == written
    assert content(ckpt) == content(whole / "ckpt") and manifest == read_manifest(whole / "ckpt")
    kept = {name: inode for name, inode in before.items() if not any(name.startswith(each) for each in written)}
    assert kept.items() <= inodes(ckpt).items()
    assert convert(hf, ckpt, quiet=True)[1] == []


def test_it_mends_all_at_once(whole, hf, ckpt):
    flip(ckpt / CHUNK)
    flip(ckpt / "manifest.json")
    shutil.rmtree(ckpt / "tokenizer")
    shutil.rmtree(ckpt / "params" / "norm")
    _, written = convert(hf, ckpt, quiet=True)
    tokenizer = [f"tokenizer/{name}" for name in read_manifest(ckpt).tokenizer]
    assert sorted(written) == sorted(["params/layers.0.down", "params/norm", "manifest.json", *tokenizer])
    assert content(ckpt) == content(whole / "ckpt")


def test_what_a_reader_refuses_the_same_command_mends(hf, ckpt, capsys):
    flip(ckpt / CHUNK)
    with pytest.raises(DamagedError, match=f"{CHUNK}: its bytes changed since .*; the same conversion again mends it"):
        Reader(ckpt).read("layers.0.down", (slice(None), slice(None)))
    arguments = ["--source", str(hf), "--output", str(ckpt)]
    assert main(arguments) == 0
    assert "brought up to date (params/layers.0.down): " in capsys.readouterr().out
    Reader(ckpt).read("layers.0.down", (slice(None), slice(None)))
    (ckpt / "manifest.json").unlink()
    assert main(arguments) == 0
    assert "convert: " + str(ckpt) + ": no manifest.json; its weights are compared" in capsys.readouterr().err
    assert main(arguments) == 0
    assert "already converted" in capsys.readouterr().out


def test_a_tokenizer_follows_its_source(whole, hf, ckpt):
    before, known = inodes(ckpt / "params"), identity(read_manifest(ckpt), ckpt)
    (hf / "tokenizer.json").write_text('{"changed": 1}')
    (hf / "chat_template.jinja").write_text("{{ messages }}")
    (hf / "tokenizer_config.json").unlink()
    _, written = convert(hf, ckpt, quiet=True)
    new = ["tokenizer/chat_template.jinja", "tokenizer/tokenizer.json"]
    assert written == [*new, "tokenizer/tokenizer_config.json (removed)", "manifest.json"]
    assert inodes(ckpt / "params") == before
    convert(hf, hf.parent / "anew", quiet=True)
    assert content(ckpt) == content(hf.parent / "anew")
    check_tokenizer(ckpt, read_manifest(ckpt))
    assert identity(read_manifest(ckpt), ckpt) != known


def test_a_config_may_change_in_what_the_checkpoint_does_not_follow_from(hf, ckpt):
    edit_json(hf / "config.json", transformers_version="9.9.9")
    _, written = convert(hf, ckpt, quiet=True)
    assert written == ["tokenizer/config.json", "manifest.json"]
    convert(hf, hf.parent / "anew", quiet=True)
    assert content(ckpt) == content(hf.parent / "anew")


def test_a_checkpoint_without_checksums_gets_them_and_keeps_its_weights(whole, hf, ckpt):
    without_checksums(ckpt)
    manifest, before = read_manifest(ckpt), inodes(ckpt / "params")
    assert not manifest.sealed and manifest.warning(ckpt).endswith("adds their checksums and keeps the weights")
    check_tokenizer(ckpt, manifest)
    known = identity(manifest, ckpt)
    manifest, written = convert(hf, ckpt, quiet=True)
    assert written == ["manifest.json"] and inodes(ckpt / "params") == before
    assert manifest.sealed and manifest.warning(ckpt) is None
    assert identity(manifest, ckpt) == known
    assert content(ckpt) == content(whole / "ckpt")


def test_without_checksums_damage_to_the_model_is_mended_from_the_source(whole, hf, ckpt):
    data = without_checksums(ckpt)
    assert b'"norm_eps": 1e-06' in data
    for wrong in (b"1e-01", b"-1e-6"):  # legal, and not
        (ckpt / "manifest.json").write_bytes(data.replace(b"1e-06", wrong))
        assert convert(hf, ckpt, quiet=True)[1] == ["manifest.json"]
        assert content(ckpt) == content(whole / "ckpt")


def test_weights_of_another_model_are_not_mended_to_this_one(hf, ckpt):
    state = {name: tensor + 1 for name, tensor in state_of(hf).items()}
    before = content(ckpt)
    rewrite(hf, state)
    for damage in (lambda: None, lambda: flip(ckpt / "manifest.json"), lambda: (ckpt / "manifest.json").unlink()):
        damage()
        found = content(ckpt)
        with pytest.raises(ConvertError, match=r"another model\.safetensors|12 of its 12 leaves hold other numbers"):
            convert(hf, ckpt, quiet=True)
        assert content(ckpt) == found
    assert before.keys() - found.keys() == {"manifest.json"}
    (ckpt / "manifest.json").write_text(json.dumps({"format": 3}))
    with pytest.raises(CheckpointError, match="format 3 is newer"):
        convert(hf, ckpt, quiet=True)


def test_an_older_version_reads_what_this_one_writes(ckpt):
    fields = asdict(read_manifest(ckpt))
    fields.pop("sealed")
    assert fields.items() <= json.loads((ckpt / "manifest.json").read_bytes()).items()
    assert list(json.loads((ckpt / "manifest.json").read_bytes()))[-1] == "xxh3_128"
