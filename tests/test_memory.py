"""Memory of devices: what JAX is told to take, what the cache gets of it, and what a user reads when it is too little.

Where memory really runs out, a limit on the process's address space takes the device's place: the plan counts with the
host's memory, which virtual CPU devices have, and the allocator gets less.
"""

import json
import re
import resource
import subprocess
import sys
from math import ceil
from pathlib import Path

import psutil
import pytest

from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.device import FRAGMENTS, JAX_SHARE, POOL_SHARE, VARIABLES, device_memory
from jaxinfer.engine.fit import advice, fit, fit_or_advise
from jaxinfer.engine.memory import DoesNotFit
from jaxinfer.parallel.axes import parse_mesh
from jaxinfer.plan.hardware import GPUS
from jaxinfer.presets import load_preset
from processes import free_port, own_environment

ROOT = Path(__file__).parents[1]
MIB, GIB = 1 << 20, 1 << 30
TOTAL = psutil.virtual_memory().total
ROOM = 5 * GIB  # of address space: the tiny preset runs in 2.9
PAGE = 16 * 2 * 4 * 4 * 16 * 4  # bytes, of the tiny preset: tokens, keys and values, layers, heads, width, float32
TOO_MANY = ROOM // PAGE  # pages, which the plan lets pass
large_enough = pytest.mark.skipif(psutil.virtual_memory().available < 2 * ROOM, reason="needs 10 GiB of free memory")
REFUSED = "--memory-fraction", 100 * MIB / TOTAL  # of one device
CLAIM = f"""
import os, sys
from jaxinfer.engine.device import claim_memory
if "started" in sys.argv:
    import jax
    jax.devices()
claim_memory()
print([os.environ.get(name) for name in {VARIABLES}])
"""


def environment(**more: str) -> dict[str, str]:
    return own_environment(*VARIABLES, **more)


@pytest.mark.parametrize(
    ("words", "variables", "after"),
    [
        ([], {}, [str(POOL_SHARE), None]),
        ([], {VARIABLES[0]: "0.4"}, ["0.4", None]),
        ([], {VARIABLES[1]: "0.5"}, [None, "0.5"]),
        ([], {VARIABLES[1]: ""}, [str(POOL_SHARE), ""]),
        (["started"], {}, [None, None]),
    ],
    ids=["nobody-says", "user", "user-older-name", "empty", "jax-runs"],
)
def test_the_share_of_the_card_is_claimed_unless_the_user_says_or_jax_runs(words, variables, after):
    command = [sys.executable, "-c", CLAIM, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment(**variables), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(after)


class Gpu:
    """A card that is not here, with the pool that JAX made of it."""

    def __init__(self, pool: int):
        self.pool = pool

    def memory_stats(self):
        return {"bytes_limit": self.pool}


def test_memory_fraction_is_a_share_of_the_card_whatever_the_pool(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, share in ((None, JAX_SHARE), (VARIABLES[0], POOL_SHARE), (VARIABLES[1], 0.5)):
        if name is not None:
            monkeypatch.setenv(name, str(share))
        whole, can = device_memory(Gpu(int(80 * GIB * share)))
        assert whole == pytest.approx(80 * GIB, abs=2) and can == pytest.approx(share * (1 - FRAGMENTS))
        if name is not None:
            monkeypatch.delenv(name)


@pytest.mark.parametrize(("preset", "mesh"), [("llama-3.1-8b", ""), ("llama-2-70b", "stage=2,tensor=2")])
@pytest.mark.parametrize("share", [0.9, 0.7])
def test_pages_take_what_weights_and_workspace_leave(preset, mesh, share):
    model, card, sizes = load_preset(preset).model, GPUS["A100-80"], parse_mesh(mesh)

    def memory(**settings):
        config = EngineConfig(mesh=sizes, memory_fraction=share, **settings)
        return fit(model, config, sizes, "bfloat16", card, 4096, card.memory).memory

    full = memory(max_batch=2048, prefill_chunk=2048)
    budget = int(card.memory * share)
    assert full.needed <= budget < full.needed + full.page, "not a page more"
    few = memory(max_batch=3, prefill_chunk=2048)
    assert few.pages == 3 * ceil(4096 / 16) + 1, "no more than requests can use"
    assert few.needed < full.needed
    assert memory(max_batch=3, prefill_chunk=2048, pages=300).pages == 300


def test_a_page_of_the_tiny_preset():
    model, config, sizes = load_preset("tiny").model, EngineConfig(max_batch=1), parse_mesh("")
    assert fit(model, config, sizes, "float32", GPUS["T4"], 64, GIB).memory.page == PAGE


def test_what_is_refused_says_what_fits_and_that_fits():
    model, sizes, card = load_preset("alia-40b").model, parse_mesh(""), GPUS["A100-80"]
    rest = sizes, "bfloat16", card, 4096, card.memory
    with pytest.raises(DoesNotFit) as error:
        fit_or_advise(model, EngineConfig(), *rest)
    found = re.search(r"\. Fits: (\d+) devices \(--mesh (\S+)\)$", str(error.value))
    assert error.value.plan.headroom < 0 and found
    more = parse_mesh(found[2])
    assert more["stage"] * more["tensor"] == int(found[1]) == 2
    assert fit(model, EngineConfig(), more, *rest[1:]).memory.headroom >= 0
    model, rest = load_preset("llama-3.1-8b").model, (sizes, "bfloat16", card, 131072, 20 * GIB)
    with pytest.raises(DoesNotFit) as error:
        fit_or_advise(model, EngineConfig(), *rest)
    found = re.search(r"\. Fits: --max-context (\d+) --max-batch 1 --prefill-chunk (\d+); ", str(error.value))
    less = EngineConfig(max_batch=1, prefill_chunk=int(found[2]))
    context = int(found[1])
    assert fit(model, less, *rest[:3], context, rest[4]).memory.headroom >= 0
    with pytest.raises(DoesNotFit):
        fit(model, less, *rest[:3], context + 16, rest[4])


def test_the_default_share_lies_within_what_jax_is_asked_for():
    assert EngineConfig().memory_fraction < POOL_SHARE * (1 - FRAGMENTS)


def test_what_fits_on_a_card_without_kernels_and_a_little_more_does_not():
    """The plain form of attention gathers the pages of every row."""
    model, card, one = load_preset("openllama-7b").model, GPUS["T4"], parse_mesh("")
    where = model, EngineConfig(), one, "float16", card, 2048, card.memory
    with pytest.raises(DoesNotFit, match="weights 12853"):
        fit(*where)
    small, more = advice(*where)
    context, batch, chunk = map(int, re.findall(r"\d+", small))
    assert small == f"--max-context {context} --max-batch {batch} --prefill-chunk {chunk}"
    assert more == "2 devices (--mesh tensor=2)"
    less = EngineConfig(max_batch=batch, prefill_chunk=chunk)
    assert fit(model, less, one, "float16", card, context, card.memory).memory.headroom >= 0
    with pytest.raises(DoesNotFit):
        fit(model, less, one, "float16", card, context + 16, card.memory)


def test_a_smaller_dtype_is_named_where_float32_is_too_much():
    model, card, one = load_preset("openllama-13b").model, GPUS["A100-40"], parse_mesh("")
    assert "--dtype bfloat16" in advice(model, EngineConfig(), one, "float32", card, 2048, card.memory)


def words(folder: Path, *more) -> list[str]:
    prompts = folder / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt_token_ids": [5, 60, 33]}))
    command = [sys.executable, "-m", "jaxinfer.generate", "--preset", "tiny", "--random-weights", "--prompts", prompts]
    return [*map(str, [*command, "--cpu-devices", 1, "--max-new-tokens", 2, *more])]


def generate(folder: Path, *more, room: int | None = None) -> subprocess.Popen:
    """Started, with so many bytes of address space."""
    limit = None if room is None else lambda: resource.setrlimit(resource.RLIMIT_AS, (room, room))
    return subprocess.Popen(
        words(folder, *more),
        cwd=ROOT,
        env=environment(),
        preexec_fn=limit,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def error_of(process: subprocess.Popen) -> tuple[str, list[str]]:
    """The one line of error, and all lines that were printed; after status 2."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "summary" not in out, err
    lines = err.splitlines()
    errors = [line for line in lines if line.startswith("jaxinfer.generate: error: ")]
    assert len(errors) == 1 and lines[-1] == errors[0]
    assert "Traceback" not in err and "RESOURCE_EXHAUSTED" not in err
    return errors[0], lines


def rows(lines: list[str]) -> list[str]:
    """First words of the plan's table."""
    head = lines.index("  per device")
    return [line.split()[0] for line in lines[head + 1 : head + 6]]


ADVICE = r"\. Fits: (--max-batch \d+ --prefill-chunk \d+); \d+ devices \(--mesh \S+\)"
TABLE = ["weights", "workspace", "cache", "headroom", "limit"]


def test_generate_refuses_before_weights_load(tmp_path):
    error, lines = error_of(generate(tmp_path, *REFUSED))
    assert re.search(r"error: memory: needs \d+ MiB per device \(weights 4, workspace \d+, cache 8: 257 pages", error)
    assert re.search(ADVICE, error)
    assert rows(lines) == TABLE and len(lines) == 7, "no bar of weights that load"


def test_too_many_pages_are_refused_with_the_number_that_fits(tmp_path):
    error, lines = error_of(generate(tmp_path, "--pages", 100_000_000))
    assert rows(lines) == TABLE
    assert "does not fit" in lines[-3] and "100,000,000 pages of 16 tokens" in lines[-4]
    found = re.search(r"Fits: --pages (\d+)$", error)
    assert found and 257 < int(found[1]) < 100_000_000


@pytest.mark.slow
def test_what_the_refusal_advises_runs(tmp_path):
    output = tmp_path / "out.jsonl"
    error, _ = error_of(generate(tmp_path, *REFUSED, "--output", output))
    process = generate(tmp_path, *REFUSED, *re.search(ADVICE, error)[1].split(), "--output", output)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert len(output.read_text().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("monitored", [False, True], ids=["alone", "monitored"])
def test_running_out_ends_with_the_plan_and_the_numbers_to_change(tmp_path, monitored):
    if 0.8 * TOTAL < 1.2 * ROOM:
        pytest.skip("needs a host with 8 GiB")
    more = ("--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 1, "--process-id", 0) if monitored else ()
    error, lines = error_of(generate(tmp_path, "--pages", TOO_MANY, "--max-batch", 4, *more, room=ROOM))
    assert re.search(r"memory: a device's memory ran out in load \([\d,]+ MiB more were asked for\), beside the", error)
    assert f"change --pages below {TOO_MANY}, or none: they take what is left" in error
    assert "--max-batch 2 (it was 4)" in error and error.endswith("in load)") == monitored
    assert rows(lines) == TABLE


@pytest.mark.slow
def test_with_room_the_same_command_runs(tmp_path):
    process = generate(tmp_path, "--pages", 300, "--max-batch", 4, room=ROOM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


def two(folder: Path, rooms: tuple[int | None, int | None], *more) -> list[subprocess.Popen]:
    where = "--mesh", "stage=2", "--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 2, "--process-id"
    return [generate(folder, *more, *where, rank, room=room) for rank, room in enumerate(rooms)]


@pytest.mark.slow
def test_of_two_processes_the_first_says_the_refusal_and_both_end(tmp_path):
    first, second = two(tmp_path, (None, None), *REFUSED)
    try:
        error, lines = error_of(first)
        _, err = second.communicate(timeout=60)
    finally:
        first.kill()
        second.kill()
    assert "memory: needs " in error and re.search(rf"{ADVICE} \(rank [01]/2 on ", error)
    assert rows(lines) == TABLE
    assert second.returncode == 2 and "jaxinfer.generate: error" not in err and "per device" not in err


@large_enough
@pytest.mark.slow
@pytest.mark.parametrize("rooms", [(None, ROOM), (ROOM, ROOM)], ids=["one", "both"])
def test_of_two_processes_one_that_runs_out_is_named_and_both_end(tmp_path, rooms):
    first, second = two(tmp_path, rooms, "--pages", 2 * TOO_MANY)  # a stage has half of the layers
    try:
        error, lines = error_of(first)
        _, err = second.communicate(timeout=60)
    finally:
        first.kill()
        second.kill()
    assert "a device's memory ran out in load" in error and "change --pages below" in error
    assert re.search(r"\(rank [01]/2 on \S+ \(CPU 0: cpu\), in load\)$", error)
    assert rows(lines) == TABLE
    assert second.returncode == 2 and "jaxinfer.generate: error" not in err and "per device" not in err
    if rooms[0] is None:
        assert "(rank 1/2 " in error
