"""A study file, the cells that it becomes, and their hashes: nothing here runs a model."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jaxinfer.study import identity
from jaxinfer.study.command import command, environment
from jaxinfer.study.errors import StudyError
from jaxinfer.study.expand import expand
from jaxinfer.study.file import KINDS, read_study
from jaxinfer.study.models import know
from jaxinfer.study.place import Place, find_place
from jaxinfer.study.prompts import encoded
from processes import own_environment

ROOT = Path(__file__).parents[1]
STUDIES = sorted((ROOT / "configs" / "studies").glob("*.yaml"))
CPU = Place(device_kind="cpu", here=8)
GPUS = Place(device_kind="NVIDIA H200", gpu="H200", here=2, gpus=("0", "1"))
NODES = Place(device_kind="A100-64", gpu="A100-64", cluster="leonardo-booster", per_node=4)
CPU_NODES = Place(device_kind="cpu", cluster="testbed", nodes=2)


def fields(**changes):
    """The least that a study is, of a model that needs no file."""
    return {
        "study": "mini",
        "title": "A test",
        "models": {"tiny": {"preset": "tiny", "random_weights": True}},
        "prompts": {"random": {"count": 3, "tokens": 5}},
        "cpu_devices": 8,
        "settings": {"max_new_tokens": 4},
        "experiments": {"strong": {"meshes": ["stage=1", "stage=2"]}},
    } | changes


def write(folder, content=None, **changes):
    path = folder / "study.yaml"
    path.write_text(content if content is not None else yaml.safe_dump(fields(**changes), sort_keys=False))
    return path


def cells_of(folder, place=CPU, **changes):
    study = read_study(write(folder, **changes))
    return expand(study, place, {name: know(name, model, needed=True) for name, model in study.models.items()})


def points(cells):
    return {cell.name: cell for cell in cells}


WRONG = [
    ({"mehses": 1}, "unknown field 'mehses'; legal: study, title"),
    ({"titel": "x"}, "unknown field 'titel'; did you mean 'title'?"),
    ({"title": ""}, "title: found '', legal is a text"),
    ({"study": "a_b"}, "study: found 'a_b', legal is letters, digits and '-'"),
    ({"repeats": 0}, "repeats: found 0, legal is a whole number from 1"),
    ({"repeats": True}, "repeats: found True, legal is a whole number from 1"),
    ({"profile": "yes"}, "profile: found 'yes', legal is true or false"),
    ({"models": {}}, "models: found {}, legal are lines of NAME"),
    ({"models": {"a/b": {"preset": "tiny"}}}, "models: found the name 'a/b', legal are letters"),
    ({"models": {"tiny": {"preset": "tiny"}}}, "models.tiny.legal is checkpoint: FOLDER, or preset: NAME with random"),
    ({"models": {"tiny": {"checkpiont": "x"}}}, "models.tiny.unknown field 'checkpiont'; did you mean 'checkpoint'?"),
    ({"prompts": {}}, "prompts: legal is file: FILE.jsonl, or random"),
    ({"prompts": {"random": {"count": 3}}}, "prompts: random: tokens is missing: token ids of each"),
    ({"settings": {"max_bacth": 4}}, "settings: unknown setting 'max_bacth'; did you mean 'max_batch'?"),
    ({"settings": {"max_batch": "many"}}, "settings: max-batch: invalid int value: 'many'"),
    ({"settings": {"max_batch": 0}}, "settings: max_batch: 0 is below 1"),
    ({"settings": {"dtype": "flaot16"}}, "settings: dtype: invalid choice: 'flaot16'"),
    ({"settings": {"temperature": -1}}, "settings: temperature: -1.0 is not legal"),
    ({"settings": {"ignore_eos": 1}}, "settings: ignore_eos: found 1, legal is true or false"),
    ({"settings": {"mesh": "stage=2"}}, "settings: mesh: the study says this itself of each cell"),
    ({"settings": {"stage_layers": "measured"}}, "stage_layers: found 'measured', legal in b of an optimization"),
    ({"experiments": {"fast": {}}}, "experiments.fast.kind: unknown kind of experiment"),
    ({"experiments": {"stron": {"meshes": []}}}, "did you mean 'strong'?"),
    ({"experiments": {"strong": {}}}, "experiments.strong.meshes is missing, which strong needs"),
    ({"experiments": {"strong": {"meshes": ["stages=2"]}}}, "experiments.strong.meshes: mesh: unknown axis 'stages'"),
    ({"experiments": {"strong": {"meshes": "stage=2"}}}, "experiments.strong.meshes: found 'stage=2', legal is a list"),
    ({"experiments": {"strong": {"meshes": ["stage=2", "stage=2,data=1"]}}}, "meshes: stage=2 is there twice"),
    ({"experiments": {"strong": {"meshes": ["stage=1"], "batches": [1]}}}, "unknown field of strong 'batches'"),
    ({"experiments": {"batch": {"mesh": "stage=1", "batches": [1, 1]}}}, "experiments.batch.batches: found [1, 1]"),
    ({"experiments": {"grid": {"mesh": "stage=1", "over": {"page_size": 16}}}}, "over: page_size: found 16, legal is"),
    ({"experiments": {"strong": {"meshes": ["stage=1"], "models": ["tony"]}}}, "unknown model 'tony'; did you"),
    (
        {"experiments": {"correctness": {"meshes": ["stage=2"], "against": "transformers"}}},
        "models.tiny.source is missing: its Hugging Face folder",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message[:60] for _, message in WRONG])
def test_a_study_that_cannot_be_is_refused_with_file_and_field(tmp_path, changes, message):
    with pytest.raises(StudyError) as error:
        read_study(write(tmp_path, **changes))
    assert str(error.value).startswith(f"{tmp_path}/study.yaml: ") and message in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1200


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("study: [", "no YAML"),
        ("- 1", "found [1], legal are lines of FIELD: VALUE"),
        ("study: a\nstudy: b\n", "'study' is there twice"),
        ("a: &a [x, x]\nb: &b [*a, *a, *a, *a]\nstudy: &c [*b, *b, *b, *b]\ntitle: t\n", "unknown field 'a'"),
        ("title: !!python/object/apply:os.system [true]", "no YAML"),
        ("x: " + "[" * 600, "no YAML"),
    ],
)
def test_what_is_no_study_is_refused_in_one_line(tmp_path, text, message):
    with pytest.raises(StudyError) as error:
        read_study(write(tmp_path, text))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_that_come_along_are_legal(path):
    assert read_study(path).study == path.stem


def test_every_kind_of_experiment_becomes_its_cells(tmp_path):
    experiments = {
        "correctness": {"meshes": ["stage=1", "stage=2"], "against": "first"},
        "strong": {"meshes": ["stage=1", "tensor=2,stage=2"]},
        "weak": {"meshes": ["stage=1", "data=2"], "requests_per_device": 2},
        "batch": {"mesh": "data=2", "batches": [1, 4]},
        "optimization": {"mesh": "stage=2", "a": {"stage_layers": [1, 1]}, "b": {"stage_layers": "measured"}},
        "pages": {"kind": "grid", "mesh": "stage=1", "over": {"decode_steps": [4, 8], "page_size": [16, 32]}},
    }
    assert {experiment.get("kind", name) for name, experiment in experiments.items()} == set(KINDS)
    cells = cells_of(tmp_path, experiments=experiments)
    assert [(cell.experiment, cell.name, cell.role) for cell in cells] == [
        ("correctness", "tiny-baseline-stage1", "baseline"),
        ("correctness", "tiny-stage2", "point"),
        ("strong", "tiny-stage1", "point"),
        ("strong", "tiny-stage2-tensor2", "point"),
        ("weak", "tiny-stage1", "point"),
        ("weak", "tiny-data2", "point"),
        ("batch", "tiny-b1", "point"),
        ("batch", "tiny-b4", "point"),
        *(("optimization", f"tiny-{name}", name[0]) for name in ("a-1", "b-1", "a-2", "b-2")),
        *(("pages", f"tiny-decode_steps{k}-page_size{p}", "point") for k in (4, 8) for p in (16, 32)),
    ]
    of = {cell.label: cell for cell in cells}
    assert [of[f"weak/tiny-{mesh}"].x["requests"] for mesh in ("stage1", "data2")] == [2, 4]
    batch = of["batch/tiny-b4"]
    assert batch.x["batch"] == batch.x["requests"] == 4 and batch.settings["max_batch"] == 2  # of each data shard
    assert of["pages/tiny-decode_steps4-page_size32"].x["page_size"] == 32
    assert of["optimization/tiny-b-2"].x["round"] == 2
    assert of["optimization/tiny-b-2"].after is of["optimization/tiny-a-1"]
    correct, strong = of["correctness/tiny-stage2"], of["strong/tiny-stage1"]
    assert (correct.repeats, correct.warm_up, correct.profile) == (1, False, False)
    assert correct.settings == {"max_new_tokens": 4, "logprobs": 5}
    assert (strong.repeats, strong.warm_up, strong.profile) == (3, True, True)
    assert strong.settings == {"max_new_tokens": 4, "ignore_eos": True}
    assert not of["pages/tiny-decode_steps4-page_size16"].profile


def test_a_model_is_switched_by_a_list_and_an_axis_is_followed_up_to_the_devices_there_are(tmp_path):
    models = {name: {"preset": "tiny", "random_weights": True} for name in ("one", "two")}
    cells = cells_of(tmp_path, models=models, experiments={"strong": {"meshes": {"axis": "stage"}}})
    meshes = ["stage=1", "stage=2", "stage=4", "stage=8"]
    assert [(cell.model.name, cell.mesh) for cell in cells] == [(name, mesh) for name in models for mesh in meshes]
    chosen = {"strong": {"meshes": ["stage=1"], "models": ["two"]}}
    assert [cell.name for cell in cells_of(tmp_path, models=models, experiments=chosen)] == ["two-stage1"]
    with pytest.raises(StudyError, match=r"experiments.strong: .* on a cluster say the meshes"):
        cells_of(tmp_path, NODES, experiments={"strong": {"meshes": {"axis": "stage"}}})


def test_a_cell_that_cannot_be_says_why_and_leaves_the_others(tmp_path):
    meshes = ["stage=1", "stage=16", "tensor=3", "stage=8"]
    cells = cells_of(tmp_path, experiments={"strong": {"meshes": meshes}})
    assert [cell.why for cell in cells][:2] == ["", "the mesh needs 16 devices, cpu_devices gives 8"]
    assert "heads=" in cells[2].why and "cannot be cut 3 ways" in cells[2].why
    assert "the model has" in cells[3].why or not cells[3].why
    # where it runs has too few devices; no device could give what the model cannot have
    assert [cell.refused for cell in cells] == [False, False, True, bool(cells[3].why)]
    models = {"twelve": {"preset": "opt-125m", "random_weights": True}}
    followed = cells_of(tmp_path, models=models, experiments={"strong": {"meshes": {"axis": "tensor"}}})
    assert any("cannot be cut" in cell.why for cell in followed) and not any(cell.refused for cell in followed)
    [beyond] = cells_of(tmp_path, settings={"max_new_tokens": 4096}, experiments={"strong": {"meshes": ["stage=1"]}})
    assert beyond.refused and re.match(
        r"prompt '1': 5 tokens \+ 4096 new ones are 4101, the model's context", beyond.why
    )


@pytest.mark.parametrize(
    ("place", "devices", "expected"),
    [
        (CPU, 4, (1, 4)),
        (NODES, 2, (1, 2)),
        (NODES, 8, (2, 4)),
        (NODES, 6, (2, 3)),
        (NODES, 5, "do not spread evenly over nodes of 4 GPUs"),
        (CPU_NODES, 1, (1, 1)),
        (CPU_NODES, 4, (2, 2)),
        (CPU_NODES, 3, "do not spread evenly over 2 nodes"),
        (GPUS, 4, "this host has 2"),
    ],
)
def test_devices_are_spread_over_nodes_in_equal_parts(place, devices, expected):
    if isinstance(expected, tuple):
        seats = place.seats(devices)
        assert (seats.nodes, seats.per_node) == expected
    else:
        with pytest.raises(StudyError, match=expected):
            place.seats(devices)


def test_a_cell_is_a_command_line(tmp_path):
    def line(place, cell=1, **changes):
        return " ".join(command(cells_of(tmp_path, place, **changes)[cell], Path("out"), place)[1:])

    here = line(CPU)
    assert re.fullmatch(
        r"-m jaxinfer.generate --preset tiny --random-weights --prompts out/prompts/\w{16}.jsonl --output "
        r"out/cells/strong/tiny-stage2-\w{16}/out.jsonl --mesh stage=2 --cpu-devices 2 --ignore-eos --max-new-tokens 4 "
        r"--warm-up --repeats 3 --profile out/cells/strong/tiny-stage2-\w{16}/traces",
        re.sub(r"--max-new-tokens 4 --ignore-eos", "--ignore-eos --max-new-tokens 4", here),
    )
    assert "--cpu-devices" not in line(GPUS)
    there = line(NODES, experiments={"strong": {"meshes": ["stage=1", "stage=2,tensor=4"]}})
    assert there.startswith("-m slurm.submit --cluster leonardo-booster --preset tiny --random-weights --prompts /")
    before, _, after = there.partition(" -- ")
    assert before.endswith("--mesh stage=2,tensor=4 --nodes 2 --gpus-per-node 4 --no-follow")
    assert after.startswith("--max-new-tokens 4 --ignore-eos --warm-up") and "--profile /" in after
    two = {"experiments": {"strong": {"meshes": ["stage=1", "stage=2,tensor=2"]}}}
    assert "--nodes 2 --no-follow -- --cpu-devices 2 " in line(CPU_NODES, **two)
    measured = {"optimization": {"mesh": "stage=2", "a": {}, "b": {"stage_layers": "measured"}}}
    a = cells_of(tmp_path, experiments=measured)[0]
    assert f"--stage-layers measured:out/{a.folder}/out.profile.json" in line(CPU, experiments=measured)


def test_a_mesh_of_fewer_gpus_leaves_the_others_alone(tmp_path):
    one, two = cells_of(tmp_path, GPUS)
    assert environment(one, GPUS) == {"CUDA_VISIBLE_DEVICES": "0"} and environment(two, GPUS) == {}


def test_a_hash_is_of_all_that_the_figures_follow_from_and_of_nothing_else(tmp_path):
    def first(place=CPU, **changes):
        return cells_of(tmp_path, place, **changes)[0].hash

    same = first()
    assert len(same) == 16 and same == first(title="Another", question="Why?", authors=["A"])
    assert same == first(experiments={"strong": {"meshes": ["stage=1"]}})
    others = [
        first(GPUS),
        first(settings={"max_new_tokens": 5}),
        first(repeats=2),
        first(profile=False),
        first(prompts={"random": {"count": 3, "tokens": 5, "seed": 1}}),
        first(experiments={"strong": {"meshes": ["stage=2"]}}),
        first(models={"tiny": {"preset": "opt-125m", "random_weights": True}}),
    ]
    assert len({same, *others}) == 8

    def last(a):
        measured = {"optimization": {"mesh": "stage=2", "a": a, "b": {"stage_layers": "measured"}}}
        return cells_of(tmp_path, experiments=measured)[-1].hash

    assert last({"stage_layers": [1, 1]}) != last({})  # what is measured by another profile is another cell


def test_the_code_is_hashed_by_its_sources_and_not_by_the_commit(tmp_path, monkeypatch):
    package = tmp_path / "jaxinfer"
    for name in ("__init__.py", "study/tables.py", "ops/x.cu", "ops/x.txt"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(name)
    (tmp_path / "convert").mkdir()

    def code():
        identity.code.cache_clear()
        return identity.code()

    monkeypatch.setattr(identity.jaxinfer, "__file__", str(package / "__init__.py"))
    try:
        before = code()
        (package / "study" / "tables.py").write_text("a table that reads better")
        (package / "ops" / "x.txt").write_text("no source")
        assert code() == before
        seen = {before}
        for name in ("jaxinfer/ops/x.cu", "jaxinfer/__init__.py", "convert/new.py"):
            (tmp_path / name).write_text("changed")
            seen.add(code())
        assert len(seen) == 4
    finally:
        identity.code.cache_clear()


def write_prompts(folder, *lines):
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_fields_of_a_prompt_file_are_renamed_and_prompts_repeat_under_ids_of_their_own(tmp_path):
    ids = {"prompt_token_ids": [1, 2]}
    file = write_prompts(tmp_path, {"id": "x", "variant": "2k", "token_budget": 7, **ids}, {"id": "x.2", **ids})
    prompts = {"file": file, "fields": {"token_budget": "max_new_tokens", "variant": "meta.variant"}}
    experiments = {"batch": {"mesh": "stage=1", "batches": [1, 4]}}
    one, four = cells_of(tmp_path, prompts=prompts, experiments=experiments)
    assert json.loads(encoded(one.lines)) == {"id": "x", "meta": {"variant": "2k"}, "max_new_tokens": 7, **ids}
    assert [line["id"] for line in four.lines] == ["x", "x.2", "x.2'", "x.2.2"]
    for name, more, message in (
        ("fields", {}, "line 1: unknown field 'variant'; .*prompts.fields of the study renames fields"),
        ("target", {"variant": "max_new_tokes"}, "prompts.fields.variant: unknown field 'max_new_tokes'; did you mean"),
        ("twice", {"token_budget": "meta.a", "variant": "meta.a"}, "line 1: .*: becomes meta.a, which the line has"),
    ):
        with pytest.raises(StudyError, match=message):
            cells_of(tmp_path, prompts={"file": file, "fields": more})
            pytest.fail(name)
    with pytest.raises(StudyError, match=r"prompts.file: none.jsonl: No such file"):
        cells_of(tmp_path, prompts={"file": "none.jsonl"})


def test_text_needs_a_tokenizer_and_a_checkpoint_has_to_be_there(tmp_path):
    file = write_prompts(tmp_path, {"prompt": "Once"})
    with pytest.raises(StudyError, match=r"prompt '1': prompt: the checkpoint has no tokenizer"):
        cells_of(tmp_path, prompts={"file": file})
    missing = {"tiny": {"checkpoint": str(tmp_path / "none"), "source": "hf", "preset": "tiny"}}
    with pytest.raises(StudyError, match=r"models.tiny: .*none: no such checkpoint folder; python -m convert"):
        cells_of(tmp_path, models=missing)
    study = read_study(write(tmp_path, models=missing))
    assert know("tiny", study.models["tiny"], needed=False).missing  # check works before the weights are there


def test_where_there_is_no_gpu_and_no_cluster_the_line_says_what_would_do(tmp_path):
    changed = {name: value for name, value in fields().items() if name != "cpu_devices"}
    study = read_study(write(tmp_path, yaml.safe_dump(changed)))
    with pytest.raises(StudyError, match=r"no GPU here .*cpu_devices: N .*--cluster NAME"):
        find_place(study, None)
    with pytest.raises(StudyError, match=r"cluster nowhere: .*unknown 'nowhere'.*legal: .*testbed"):
        find_place(study, "nowhere")
    place = find_place(study, "leonardo-booster")
    assert (place.gpu, place.per_node, place.device_kind) == ("A100-64", 4, "A100-64")


def study_command(*arguments, cwd=ROOT, **options):
    words = [sys.executable, "-m", "jaxinfer.study", *map(str, arguments)]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, env=own_environment(), **options)


@pytest.mark.slow
def test_check_says_what_does_not_fit_and_how_long_the_rest_takes(tmp_path):
    settings = {"max_new_tokens": 64, "max_context": 2048}
    models = {"big": {"preset": "falcon-40b", "random_weights": True}}
    experiments = {"strong": {"meshes": ["stage=1", "stage=4", "stage=8"]}}
    path = write(tmp_path, models=models, settings=settings, experiments=experiments, cluster="leonardo-booster")
    done = study_command("check", path)
    lines = {
        line.split("│")[2].strip(): " ".join(line.split()) for line in done.stdout.splitlines() if "│ big-" in line
    }
    assert done.returncode == 0, done.stderr
    assert "\nskipped: strong/big-stage1: memory: needs" in done.stdout
    assert lines["big-stage4"].endswith("fits │") and lines["big-stage8"].split(" │ ")[3] == "2"
    assert "3 cells on leonardo-booster" in done.stdout and "2 to run, 1 that cannot; about" in done.stdout
    refused = study_command("check", write(tmp_path, settings={"max_new_tokens": 10**6}))
    assert refused.returncode == 1 and "\nrefused: strong/tiny-stage1: prompt '1': 5 tokens" in refused.stdout


@pytest.mark.slow
def test_the_study_starts_no_jax_and_knows_nothing_of_slurm(tmp_path):
    program = """
import sys
from jaxinfer.study.__main__ import main
try:
    main(sys.argv[1:])
finally:
    bad = [name for name in sys.modules if name.split(".")[0] in ("jax", "jaxlib", "flax", "torch", "slurm")]
    assert not bad, bad
    print("clean")
"""
    path = write(tmp_path)
    for arguments in (("check", path), ("run", path, "--output", tmp_path / "out", "--dry-run")):
        words = [sys.executable, "-c", program, *map(str, arguments)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=own_environment())
        assert done.stdout.endswith("clean\n"), done.stderr
    [prompts] = (path for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert prompts.parent == tmp_path / "out" / "prompts" and str(prompts) in done.stdout  # to paste the lines


@pytest.mark.slow
def test_whoever_reads_a_dry_run_may_go(tmp_path):
    words = [sys.executable, "-m", "jaxinfer.study", "run", str(write(tmp_path)), "--output", str(tmp_path / "out")]
    study = subprocess.Popen(
        [*words, "--dry-run"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=own_environment()
    )
    study.stdout.close()
    said = study.stderr.read().decode()
    assert study.wait() == 1 and said.count("\n") == 1 and "wrote the prompts" in said, said
