"""The studies that ship: each reads and expands to cells that can be, its prompts are alike, names resolve."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from convert.run import convert
from jaxinfer.study import __main__ as command
from jaxinfer.study.errors import StudyError
from jaxinfer.study.expand import expand
from jaxinfer.study.file import FOLDER, KINDS, beside, find_study, read_study, with_prompts
from jaxinfer.study.models import know
from jaxinfer.study.place import Place, find_place
from jaxinfer.tokenizer import encode, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
STORIES = ROOT / "examples" / "tinystories" / "model"
TOKENIZERS = ROOT.parent / "shared" / "data" / "tokenizers"
PROMPTS = FOLDER / "prompts.jsonl"


def host(gpus: int) -> Place:
    return Place(
        device_kind="NVIDIA H200", gpu="H200", per_node=gpus, here=gpus, gpus=tuple(str(each) for each in range(gpus))
    )


def cells(study, place, needed=False):
    return expand(study, place, {name: know(name, model, needed) for name, model in study.models.items()})


def test_names_resolve_beside_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_study("leonardo") == FOLDER / "leonardo.yaml"
    assert find_study("configs/studies/laptop.yaml") == FOLDER / "laptop.yaml"
    assert beside(Path("configs/studies/prompts.jsonl")) == PROMPTS
    Path("laptop.yaml").write_text("mine")
    assert find_study("laptop.yaml") == Path("laptop.yaml")
    with pytest.raises(StudyError, match="labtop: no such file, and unknown study 'labtop'; did you mean 'laptop'"):
        find_study("labtop")


def test_every_study_file_is_a_study():
    names = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    assert names == ["laptop", "leonardo", "one-host", "two-t4"]
    for name in names:
        assert read_study(find_study(name)).study == name


def test_one_host_takes_the_gpus_that_there_are():
    study = read_study(find_study("one-host"))
    two, one = cells(study, host(2)), cells(study, host(1))
    assert [each.why for each in two] == [""] * len(two)
    meshes = {(each.experiment, each.mesh) for each in two}
    assert {("strong", "stage=1"), ("strong", "stage=2"), ("batch", "stage=2"), ("weak", "stage=2")} <= meshes
    # the optimization is one of two stages: on one GPU it is skipped, with the reason
    assert {each.experiment for each in one if each.why} == {"optimization"}
    assert "this host has 1" in next(each.why for each in one if each.why)
    assert {each.mesh for each in one if each.experiment == "batch"} == {"stage=1"}
    assert {each.mesh for each in cells(study, host(7)) if each.experiment == "batch"} == {"stage=4"}


def test_clusters_studies_are_legal_without_their_checkpoints():
    for name, gpus in (("two-t4", {1, 2}), ("leonardo", {4, 8, 16, 32})):
        study = read_study(find_study(name))
        found = cells(study, find_place(study, None))
        assert [each.label for each in found if each.why] == []
        assert {each.devices for each in found} == gpus and {each.seats.per_node for each in found} == {min(gpus)}
    assert [each.x["nodes"] for each in found if each.experiment == "strong"][:4] == [1, 2, 4, 8]


@pytest.mark.parametrize(
    "tokenizer", ["tinystories", "llama2_tokenizer.model", "mistral/tokenizer.model.v1", "falcon", "gpt2"]
)
def test_prompts_are_of_like_length(tmp_path, tokenizer):
    (tmp_path / "tokenizer").mkdir()
    source = STORIES if tokenizer == "tinystories" else TOKENIZERS / tokenizer
    if not source.exists():
        pytest.skip(f"needs {source}, which does not ship")
    if source.is_dir():
        for path in [*source.glob("tokenizer*"), *source.glob("vocab.json"), *source.glob("merges.txt")]:
            shutil.copy(path, tmp_path / "tokenizer")
        if tokenizer == "gpt2":
            (tmp_path / "tokenizer" / "config.json").write_text('{"model_type": "gpt2"}')
    else:
        shutil.copy(source, tmp_path / "tokenizer" / "tokenizer.model")
    loaded = load_tokenizer(tmp_path)
    lines = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    counts = [len(encode(loaded, line["prompt"])) for line in lines]
    assert len({line["id"] for line in lines}) == len({line["prompt"] for line in lines}) == 20
    mean = sum(counts) / len(counts)
    assert 0.9 * mean <= min(counts) <= max(counts) <= 1.1 * mean, (mean, counts)


def test_other_prompts_come_by_an_option(tmp_path):
    study = read_study(find_study("two-t4"))
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"id": "2k_1", "variant": "2k", "prompt": "Why?", "token_budget": 2000}) + "\n")
    [line] = cells(with_prompts(study, str(path)), find_place(study, None))[2].lines
    assert line == {"id": "2k_1", "meta": {"variant": "2k"}, "prompt": "Why?", "max_new_tokens": 2000}
    with pytest.raises(StudyError, match="--prompts: the study's prompts are random token ids"):
        with_prompts(read_study(find_study("one-host")), str(path))
    # leonardo's correctness has a file, the rest is random and stays
    mixed = with_prompts(read_study(find_study("leonardo")), str(path))
    assert mixed.experiments["correctness"].prompts.file == str(path) and mixed.prompts.random is not None


def test_mistakes_of_an_axis(tmp_path):
    path = tmp_path / "study.yaml"
    text = FOLDER.joinpath("one-host.yaml").read_text()
    path.write_text(text.replace("mesh: {axis: stage}", "mesh: {axis: stag}"))
    with pytest.raises(StudyError, match=r"experiments.batch.mesh: found {'axis': 'stag'}, legal is a mesh, or {axis:"):
        read_study(path)
    path.write_text(text)
    study = read_study(path)
    with pytest.raises(StudyError, match="on a cluster say the meshes"):
        cells(study, Place(device_kind="H200", cluster="generic", per_node=4, nodes=2))


def test_the_documents_commands_and_study_file_are_legal(tmp_path):
    texts = {
        name: (ROOT / name).read_text("utf-8") for name in ("README.md", "docs/study.md", "docs/one-host/README.md")
    }
    lines = [line for text in texts.values() for line in re.findall(r"^python -m jaxinfer\.study (.*)$", text, re.M)]
    for line in lines:
        args = command.parse_arguments(shlex.split(line, comments=True))
        if args.command in ("check", "run"):
            assert read_study(find_study(args.file))
    assert len(lines) > 12
    [text] = re.findall(r"```yaml\n(.*?)```", texts["docs/study.md"], re.S)
    (tmp_path / "mine.yaml").write_text(text)
    study = read_study(tmp_path / "mine.yaml")
    assert {each.kind for each in study.experiments.values()} == set(KINDS)
    rows = re.findall(r"^\| (`.*?) \|", texts["docs/study.md"], re.M)
    named = {name for row in rows for name in re.findall("[a-z_]+", row)}
    assert {field for kind in KINDS.values() for fields in kind for field in fields} <= named


@pytest.mark.slow
def test_laptop_passes_check(tmp_path, monkeypatch, capsys):
    convert(STORIES, tmp_path / "build" / "tinystories", dtype="float32", quiet=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        command.main(["check", "laptop"])
    assert ended.value.code == 0 and "0 that cannot" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("name", ["two-t4", "leonardo"])
def test_clusters_studies_pass_check(name, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["check", name])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    # Falcon-180B does not fit on four A100-64: its strong and weak cells of one node
    assert ("2 that cannot" if name == "leonardo" else "0 that cannot") in out
