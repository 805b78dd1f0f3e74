"""The memory-aware start: how much of a GPU JAX is asked for, refusals before loading, and running out all the same."""

import json
import os
import re
import resource
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.device import FRAGMENTS, POOL_SHARE, VARIABLES, device_memory
from jaxinfer.engine.fit import advice, fit
from jaxinfer.engine.memory import DoesNotFit
from jaxinfer.parallel.axes import parse_mesh
from jaxinfer.plan.hardware import GPUS
from jaxinfer.presets import load_preset

ROOT = Path(__file__).parents[1]
GIB = 1 << 30
PAGES, ADDRESSES = 128_000, 4 * GIB  # pages of `tiny` are of 32 KiB: all that the process may have
CLAIM = (
    "import os, jax; from jaxinfer.engine.device import claim_memory; {}; claim_memory(); print(os.environ.get('{}'))"
)


def claimed(before: str, variable: str, **environment: str) -> str:
    """What `variable` holds after `claim_memory`, in a process of its own."""
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES} | environment
    command = [sys.executable, "-c", CLAIM.format(before, variable)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout.strip()


def test_jax_is_asked_for_most_of_the_gpu_unless_somebody_has_decided():
    new, old = VARIABLES
    assert claimed("0", new) == str(POOL_SHARE)
    assert claimed("0", new, **{old: "0.5"}) == "None", "JAX refuses to start with both"
    assert claimed("jax.devices()", new) == "None", "it runs already"


@dataclass
class Device:
    """What JAX says of a GPU's memory, for GPUs that are not here."""

    bytes_limit: int

    def memory_stats(self):
        return {"bytes_limit": self.bytes_limit}


@pytest.mark.parametrize(("variable", "share"), [(None, 0.75), (VARIABLES[0], 0.93), (VARIABLES[1], 0.5)])
def test_the_whole_gpu_and_the_share_that_can_be_filled(monkeypatch, variable, share):
    for each in VARIABLES:
        monkeypatch.delenv(each, raising=False)
    if variable:
        monkeypatch.setenv(variable, str(share))
    whole, usable = device_memory(Device(round(share * 80 * GIB)))
    assert whole == pytest.approx(80 * GIB) and usable == pytest.approx(share * (1 - FRAGMENTS))


def test_the_default_share_lies_within_what_jax_is_asked_for():
    assert EngineConfig().memory_fraction < POOL_SHARE * (1 - FRAGMENTS)


def test_what_the_refusal_says_would_fit_does_fit_and_a_little_more_does_not():
    """A T4 has no kernels: the plain form of attention gathers the pages of every row."""
    model, card, one = load_preset("openllama-7b").model, GPUS["T4"], parse_mesh("")
    config = EngineConfig()
    where = model, config, one, "float16", card, 2048, card.memory
    with pytest.raises(DoesNotFit, match="weights 12853"):
        fit(*where)
    small, more = advice(*where)
    context, batch, chunk = map(int, re.findall(r"\d+", small))
    assert small == f"--max-context {context} --max-batch {batch} --prefill-chunk {chunk}"
    config = replace(config, max_batch=batch, prefill_chunk=chunk)
    assert fit(model, config, one, "float16", card, context, card.memory).memory.headroom >= 0
    with pytest.raises(DoesNotFit):
        fit(model, config, one, "float16", card, context + 16, card.memory)
    assert more == "2 devices (--mesh tensor=2)"


def test_a_smaller_dtype_is_named_where_float32_is_too_much():
    model, card, one = load_preset("openllama-13b").model, GPUS["A100-40"], parse_mesh("")
    assert "--dtype bfloat16" in advice(model, EngineConfig(), one, "float32", card, 2048, card.memory)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def generate(*options: str, prompt: Path, limit: int | None = None) -> subprocess.CompletedProcess:
    """`limit`: bytes of address space of the process."""
    command = [sys.executable, "-m", "jaxinfer.generate", "--preset", "tiny", "--random-weights", "--prompts", prompt]
    command += ["--cpu-devices", "1", "--mesh", "tensor=1", "--max-batch", "4", "--max-context", "512", *options]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    bound = None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, preexec_fn=bound
    )


@pytest.fixture
def prompt(tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_text(json.dumps({"prompt_token_ids": [5, 6, 7], "max_new_tokens": 4}) + "\n")
    return file


def test_a_refusal_comes_with_the_table_and_what_fits(prompt):
    done = generate("--pages", "100000000", prompt=prompt)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    *_, weights, workspace, cache, headroom, limit, error = done.stderr.splitlines()
    names = [line.split()[0] for line in (weights, workspace, cache, headroom, limit)]
    assert names == ["weights", "workspace", "cache", "headroom", "limit"]
    assert "does not fit" in headroom and "100,000,000 pages of 16 tokens" in cache
    found = re.fullmatch(r"jaxinfer.generate: error: memory: needs .* Fits: --pages (\d+)", error)
    assert found and 32 < int(found[1]) < 100_000_000


@pytest.mark.parametrize("monitored", [False, True], ids=["alone", "monitored"])
def test_running_out_ends_with_the_table_and_the_numbers_to_change(prompt, monitored):
    """For real: the plan counts the machine's memory, and the process may not have that much."""
    options = ["--pages", str(PAGES)]
    if monitored:
        options += ["--coordinator", f"localhost:{free_port()}", "--num-processes", "1", "--process-id", "0"]
    done = generate(*options, prompt=prompt, limit=ADDRESSES)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and "RESOURCE_EXHAUSTED" not in done.stderr
    *_, weights, _, cache, _, limit, error = done.stderr.splitlines()
    start = r"\[rank 0 \S+\] +" if monitored else " +"
    assert re.match(f"{start}weights", weights) and re.match(rf"{start}cache .* {PAGES:,} pages of 16 tokens", cache)
    assert re.match(f"{start}limit .* 90% of ", limit)
    assert "jaxinfer.generate: error: memory: a device's memory ran out in load (" in error
    assert f"change --pages below {PAGES}" in error and "--max-batch 2 (it was 4)" in error
    assert error.endswith("in load)") == monitored


def test_with_room_the_same_command_runs(prompt):
    done = generate("--pages", "100", prompt=prompt, limit=ADDRESSES)
    assert done.returncode == 0, done.stderr
