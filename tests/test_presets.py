"""Model presets: what they say is right, and what the commands do with them."""

import json
import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from convert.__main__ import main as convert_main
from convert.dummy import write_dummy
from hf_models import make_hf_folder
from jaxinfer import generate, presets
from jaxinfer.checkpoint.manifest import read_manifest
from jaxinfer.engine.costs import count_parameters
from jaxinfer.llm import LLM
from jaxinfer.parallel.axes import parse_mesh
from jaxinfer.plan.hardware import Gpus, parse_gpus
from jaxinfer.plan.layouts import Ask, consider
from jaxinfer.presets import PresetError, load_preset, names
from processes import free_port, own_environment

ROOT = Path(__file__).parents[1]
STUDY = "openllama-3b openllama-7b openllama-13b llama-2-70b codellama-70b alia-40b falcon-40b falcon-180b gpt-sw3-40b"
LAYOUTS = [(name, gpu) for name in names() for gpu in load_preset(name).layouts]
SMALL = ("--mesh", "", "--max-context", 64, "--pages", 32, "--max-batch", 4, "--prefill-chunk", 32)
FIELDS = yaml.safe_load((presets.FOLDER / "tiny.yaml").read_text())


def test_the_models_of_the_study_and_those_that_users_expect_are_there():
    expected = "opt-125m llama-2-7b llama-2-13b llama-3.1-8b llama-3.1-70b mistral-7b qwen2.5-7b qwen3-8b gemma-7b"
    assert set(f"{STUDY} {expected} gemma-2-9b phi-3-mini falcon-7b tiny".split()) <= set(names())
    assert load_preset("alia-40b").parameters == 40_433_885_184
    assert load_preset("opt-125m").parameters == 125_239_296


@pytest.mark.parametrize("name", names())
def test_parameters_are_those_of_transformers(name):
    preset = load_preset(name)
    fields = {field: value for field, value in preset.config.items() if field != "model_type"}
    config = AutoConfig.for_model(preset.config["model_type"], **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == preset.config["architectures"][0]
    assert sum(parameter.numel() for parameter in model.parameters()) == preset.parameters  # a tied head once


@pytest.mark.parametrize("name", names())
def test_parameters_are_those_of_the_leaves(name):
    preset = load_preset(name)
    assert count_parameters(preset.model) == preset.parameters == preset.manifest.parameters


@pytest.mark.parametrize(("name", "gpu"), LAYOUTS)
def test_layouts_hold_an_ordinary_context_and_half_the_gpus_no_batch(name, gpu):
    preset = load_preset(name)
    type_, sizes = parse_gpus(gpu).type, parse_mesh(preset.layouts[gpu].mesh)
    dtype = "float16" if float(type_.compute_capability) < 8 else preset.dtype
    context = min(4096, preset.model.max_context)

    def why_not(sizes: dict[str, int], batch: int) -> str:
        count = prod(sizes.values())
        ask = Ask(preset.model, dtype, context, context // 16, batch)
        return consider(ask, Gpus(type_, -(-count // type_.per_node), min(count, type_.per_node)), sizes).reason

    assert preset.layouts[gpu].gpus == prod(sizes.values())
    assert why_not(sizes, 1) == ""
    fewer = [sizes | {axis: size // 2} for axis, size in sizes.items() if size % 2 == 0]
    assert all(why_not(each, 16) for each in fewer)


def test_unknown_names_are_refused_with_those_that_are_near():
    with pytest.raises(PresetError, match=r"unknown 'falcon-40'; did you mean falcon-40b\b.*legal: alia-40b, "):
        load_preset("falcon-40")
    with pytest.raises(PresetError, match=r"unknown '\.\./clusters/generic'; legal: "):
        load_preset("../clusters/generic")
    with pytest.raises(PresetError, match=r"evo2-40b is no transformer .StripedHyena 2: 8 attention layers, 42 conv"):
        load_preset("evo2-40b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"licenses": "MIT"}, "unknown field 'licenses'; legal: repository, licence, parameters, "),
        ({"licence": ...}, "licence is missing"),
        ({"licence": 2}, "licence: found 2, legal is a text"),
        ({"parameters": "7B"}, "parameters: found '7B', legal is a whole number from 1"),
        ({"parameters": True}, "parameters: found True"),
        ({"dtype": "int8"}, "dtype: found 'int8', legal is bfloat16 or float16 or float32"),
        ({"repository": 3}, "repository: found 3, legal is a text or null"),
        ({"config": []}, "config: found .., legal is NAME: VALUE pairs"),
        ({"layouts": None}, "layouts: found None, legal is NAME: VALUE pairs"),
        ({"layouts": {"T4": {"gpus": 2}}}, "layouts: T4: mesh is missing"),
        ({"layouts": {"T4": "tensor=2"}}, "layouts: T4: found 'tensor=2', legal are lines of FIELD: VALUE"),
        ({"layouts": {"T4": {"gpus": 2, "mesh": "tensr=2"}}}, "layouts: T4: mesh: unknown axis 'tensr'"),
        ({"layouts": {"T4": {"gpus": 4, "mesh": "tensor=2"}}}, ".*: found 'tensor=2', legal is a mesh of 4"),
        ({"layouts": {"T4": {"gpus": 0, "mesh": "x"}}}, "layouts: T4: gpus: found 0, legal is a whole number from 1"),
        ("- 1", "found .1., legal are lines of FIELD: VALUE"),
        ("a: [", "no YAML: "),
    ],
)
def test_a_wrong_file_is_refused_with_its_name_and_field(tmp_path, monkeypatch, change, message):
    if isinstance(change, str):
        text = change
    else:
        text = yaml.safe_dump({name: value for name, value in (FIELDS | change).items() if value is not ...})
    (tmp_path / "mine.yaml").write_text(text)
    monkeypatch.setattr(presets, "FOLDER", tmp_path)
    with pytest.raises(PresetError, match=rf"mine\.yaml: {message}"):
        load_preset("mine")


def test_a_model_that_differs_is_refused_with_all_that_differs():
    preset = load_preset("tiny")
    preset.check("CKPT", replace(preset.model, eos_token_ids=(5, 6)), preset.parameters)
    other = replace(preset.model, hidden_size=64, rope=replace(preset.model.rope, theta=5e5))
    with pytest.raises(PresetError) as error:
        preset.check("CKPT", other, 918_657)
    assert str(error.value).startswith(
        "CKPT: not what preset tiny expects: hidden_size: found 64, expected 128; rope: "
    )
    assert str(error.value).endswith("; parameters: found 918657, expected 918656") and "500000.0" in str(error.value)


def test_a_manifest_alone_makes_random_weights():
    manifest = load_preset("tiny").manifest
    options = {"max_batch": 2, "prefill_chunk": 32, "max_context": 64, "pages": 32}
    with pytest.raises(ValueError, match="load_format: found 'checkpoint' with a manifest alone; legal: dummy"):
        LLM(manifest, **options)
    llm = LLM(manifest, load_format="dummy", stage_layers="4", **options)
    [done] = llm.generate([[5, 6, 7]], {"max_new_tokens": 6, "ignore_eos": True})
    assert len(done.token_ids) == 6
    with pytest.raises(ValueError, match="prompt: the checkpoint has no tokenizer; legal is prompt_token_ids"):
        llm.generate("Once")


@pytest.fixture
def prompts(tmp_path):
    lines = [{"prompt_token_ids": [5, 6, 7 + i], "max_new_tokens": 6, "ignore_eos": True} for i in range(3)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "in.jsonl"


def run(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["generate", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        generate.main()
    return ended.value.code, capsys.readouterr().err


@pytest.mark.slow
def test_the_command_needs_a_folder_for_nothing(prompts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = ("--preset", "tiny", "--random-weights", "--prompts", prompts, "--output", tmp_path / "out.jsonl", *SMALL)
    status, err = run(monkeypatch, capsys, *own)
    assert status == 0, err
    assert [len(json.loads(line)["token_ids"]) for line in (tmp_path / "out.jsonl").open()] == [6, 6, 6]
    status, err = run(monkeypatch, capsys, *own)
    assert status == 0 and "nothing to run" in err
    status, err = run(monkeypatch, capsys, "--preset", "openllama-3b", *own[2:])
    assert status == 2 and "has results of other settings" in err and "model: " in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", "a"), "give --model CKPT_DIR, or --preset NAME --random-weights"),
        (("--random-weights", "--prompt", "a"), "give --model CKPT_DIR, or --preset NAME --random-weights"),
        (("--preset", "tiny", "--prompt", "a"), "--preset tiny brings no weights: give --model CKPT_DIR "),
        (("--preset", "tiny", "--random-weights", "--prompt", "a"), "a preset has no tokenizer; give --prompts FILE"),
    ],
)
def test_what_is_missing_is_said(monkeypatch, capsys, arguments, message):
    status, err = run(monkeypatch, capsys, *arguments)
    assert status == 2 and message in err


def test_what_a_preset_cannot_do_is_said(prompts, tmp_path, monkeypatch, capsys):
    (tmp_path / "in.txt").write_text("Once upon a time\n")
    for name, file, message in (
        ("tiny", "in.txt", "prompt: the checkpoint has no tokenizer; legal is prompt_token_ids"),
        ("tinny", "in.jsonl", "preset: unknown 'tinny'; did you mean tiny?"),
        ("evo2-40b", "in.jsonl", "no transformer (StripedHyena 2"),
    ):
        own = ("--preset", name, "--random-weights", "--prompts", tmp_path / file, *SMALL)
        status, err = run(monkeypatch, capsys, *own)
        assert status == 2 and message in err


@pytest.mark.slow
def test_a_checkpoint_is_checked_against_its_preset(prompts, tmp_path, monkeypatch, capsys):
    write_dummy(FIELDS["config"], tmp_path / "same", "float16")
    write_dummy(FIELDS["config"] | {"num_hidden_layers": 3}, tmp_path / "other", "float32")
    own = ("--preset", "tiny", "--random-weights", "--prompts", prompts, *SMALL)
    status, err = run(monkeypatch, capsys, "--model", tmp_path / "same", *own)
    assert status == 0, err
    status, err = run(monkeypatch, capsys, "--model", tmp_path / "other", *own)
    assert status == 2 and "other: not what preset tiny expects: num_layers: found 3, expected 4; " in err
    assert "parameters: found 721792, expected 918656" in err


def test_convert_checks_the_source_before_it_writes(tmp_path, capsys, monkeypatch):
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    shape = {name: FIELDS["config"][name] for name in names.split()}
    for name, change in (("same", {}), ("other", {"intermediate_size": 256})):
        make_hf_folder(tmp_path / name, **shape | change, max_position_embeddings=4096, rms_norm_eps=1e-6)
        arguments = ["--source", tmp_path / name, "--output", tmp_path / f"{name}-ckpt", "--preset", "tiny"]
        status = convert_main([*map(str, arguments)])
        assert status == (name != "same"), capsys.readouterr().err
    assert "other: not what preset tiny expects: mlp_width: found 256, expected 384; parameters: found 722" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "other-ckpt").exists()
    manifest = read_manifest(tmp_path / "same-ckpt")
    load_preset("tiny").check_manifest("same", manifest)
    # what counts is what the leaves hold, whatever the manifest says
    manifest.leaves["norm"]["shape"] = [127]
    with pytest.raises(PresetError, match="expects: parameters: found 918655, expected 918656"):
        load_preset("tiny").check_manifest("same", manifest)


@pytest.mark.slow
def test_two_processes_make_the_weights_of_one(prompts, tmp_path, monkeypatch, capsys):
    base = ("--preset", "tiny", "--random-weights", "--prompts", prompts, "--mesh", "stage=2", *SMALL[2:])
    command = [sys.executable, "-m", "jaxinfer.generate", *map(str, base), "--output", str(tmp_path / "two.jsonl")]
    command += [
        "--cpu-devices",
        "1",
        "--coordinator",
        f"127.0.0.1:{free_port()}",
        "--num-processes",
        "2",
        "--process-id",
    ]
    both = [
        subprocess.Popen([*command, rank], cwd=ROOT, env=own_environment(), stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    errors = [each.communicate(timeout=200)[1] for each in both]
    assert [each.returncode for each in both] == [0, 0], errors
    status, err = run(monkeypatch, capsys, *base, "--output", tmp_path / "one.jsonl")
    assert status == 0, err
    one, two = (
        {line["id"]: line["token_ids"] for line in map(json.loads, (tmp_path / f"{name}.jsonl").open())}
        for name in ("one", "two")
    )
    assert len(one) == 3 and one == two
