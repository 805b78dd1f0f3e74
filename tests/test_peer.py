"""The all-reduce over peer memory: when it is chosen, and that nothing in an inbox is overwritten unread."""

import random
from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.shapes import hf_config
from convert.dummy import write_dummy
from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.emit import Features
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.forward import Decoder
from jaxinfer.engine.programs import Program, Programs
from jaxinfer.models.families import from_hf
from jaxinfer.parallel import all_reduce, peer
from jaxinfer.parallel.axes import parse_mesh
from jaxinfer.parallel.mesh import make_mesh
from jaxinfer.parallel.placement import Rules
from jaxinfer.parallel.stages import balance
from jaxinfer.telemetry.phases import Phases


def gpus(capability="9.0", groups=1, ranks=4, per_process=8):
    made = [
        SimpleNamespace(id=n, process_index=n // per_process, compute_capability=capability)
        for n in range(groups * ranks)
    ]
    return np.array(made, object).reshape(groups, ranks)


def test_devices_that_cannot_are_named():
    assert peer.refusal(gpus()) == ""
    assert peer.refusal(gpus(ranks=3)) == "tensor=3; the kernel is for 2, 4, 8"
    assert "tensor=1" in peer.refusal(gpus(ranks=1))
    assert peer.refusal(gpus("7.5")) == "device 0 has compute capability 7.5; the kernel needs 8.0"
    assert peer.refusal(gpus("gfx942")) == "device 0 is not an NVIDIA GPU"


def test_a_group_stays_on_a_host():
    two = gpus(groups=2, per_process=1)
    assert peer.spread(two, ["a"] * 4 + ["b"] * 4) == ""
    assert peer.spread(two, ["a"] * 6 + ["b"] * 2) == "a tensor group spans the hosts a, b"


def test_without_gpus_there_is_no_table():
    if len(jax.devices()) < 2:
        pytest.skip("needs 2 devices")
    table, reason = peer.connect(make_mesh(parse_mesh("tensor=2")), lambda value: [value])
    assert table is None and reason == "device 0 is not an NVIDIA GPU"


@pytest.mark.parametrize(
    ("size", "ranks", "hops"),
    [
        (8192, 8, 1),
        (2**16, 8, 1),
        (2**17, 8, 2),
        (2**21, 8, 2),
        (2**22, 8, None),
        (2**18, 2, 1),
        (2**19, 2, 2),
        (2**17 + 8, 8, None),
        (12, 2, None),
        (0, 2, None),
    ],
)
def test_hops_by_size(size, ranks, hops):
    assert all_reduce.shots(size, np.dtype("float32"), ranks) == hops
    if hops:  # and the inbox has room for them
        units = size // all_reduce.UNIT // (1 if hops == 1 else ranks)
        assert units <= all_reduce.BLOCKS * all_reduce.THREADS


def test_integers_are_left_to_psum():
    assert all_reduce.shots(8192, np.dtype("int32"), 8) is None


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("seed", range(60))
def test_nothing_is_overwritten_unread(ranks, seed):
    assert simulate(ranks, places=2, seed=seed) == "sums"


def test_with_one_place_lines_would_be_lost():
    assert any(simulate(2, places=1, seed=seed) != "sums" for seed in range(60))


BLOCKS, THREADS = 2, 2


def simulate(ranks, places, seed, sums=12):
    """Runs the protocol of all_reduce.cu with steps of ranks, and arrival of what they store, in random order.

    Returns ``sums`` if all ranks got what belongs to each sum, or else how it went wrong.
    """
    chance = random.Random(seed)
    hops = [chance.choice((1, 2)) for _ in range(sums)]
    units = [chance.randint(1, BLOCKS * THREADS) for _ in range(sums)]
    inboxes = [defaultdict(lambda: (0, None)) for _ in range(ranks)]  # address to (epoch, data)
    flying = []  # (inbox, address, line), of an address in order
    counters = [[0] * BLOCKS for _ in range(ranks)]
    wrong = []

    def thread(rank, number, epoch, block, index):
        for hop in range(hops[number]):
            address = (hop, block, epoch % places)
            for other in range(ranks):
                if other != rank:
                    flying.append((other, (*address, rank, index), (epoch, (number, hop, rank))))
                    yield True
            for other in range(ranks):
                while other != rank:
                    found, data = inboxes[rank][*address, other, index]
                    if found == epoch:
                        if data != (number, hop, other):
                            wrong.append(data)
                        break
                    yield False

    def kernels(rank):
        for number in range(sums):
            running = []
            for block in range(-(-units[number] // THREADS)):
                counters[rank][block] += 1
                for index in range(min(THREADS, units[number] - block * THREADS)):
                    running.append(thread(rank, number, counters[rank][block], block, index))
            while running:
                one = chance.choice(running)
                moved = next(one, None)
                if moved is None:
                    running.remove(one)
                yield moved is not False

    working = {rank: kernels(rank) for rank in range(ranks)}
    idle = 0
    while working:
        idle += 1
        if idle > 2000:
            return "stuck"
        if flying and chance.random() < 0.3:
            inbox, address = chance.choice(flying)[:2]
            first = next(each for each in flying if each[:2] == (inbox, address))
            flying.remove(first)
            inboxes[inbox][address] = first[2]
            idle = 0
            continue
        rank = chance.choice(list(working))
        moved = next(working[rank], None)
        if moved is None:
            del working[rank]
        if moved is not False:
            idle = 0
    return f"wrong: {wrong[0]}" if wrong else "sums"


def lowered(mesh: str, rows: int = 1, width: int = 1024) -> tuple[str, str]:
    """The decode program of a model of two layers, then its prefill program, with a table of peers."""
    sizes = parse_mesh(mesh)
    config = {"vocab_size": 64, "hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 8}
    config |= {"architectures": ["LlamaForCausalLM"], "intermediate_size": 64, "rms_norm_eps": 1e-5}
    model = from_hf(config | {"max_position_embeddings": 64})
    made = make_mesh(sizes)
    table = jnp.zeros((*made.devices.shape, sizes["tensor"] + 1, 2), jnp.uint32)
    programs = Programs(
        Decoder(model, balance(2, sizes["stage"])),
        EngineConfig(mesh=sizes, max_batch=rows, prefill_chunk=8),
        made,
        Rules(),
        jnp.dtype("bfloat16"),
        4,
        table,
        lambda: None,
        Phases(),
    )
    kinds = ("decode", rows // sizes["stage"], 0), ("prefill", 1, 8)
    return tuple(programs.lower(Program(*kind, 1, Features(), False)).as_text() for kind in kinds)


KERNEL, PSUM = "__gpu$xla.gpu.ptx", '"stablehlo.all_reduce"'


@pytest.mark.parametrize(
    ("mesh", "rows", "by_peers", "by_psum"),
    [
        ("tensor=2", 1, 5, 0),  # after attention and MLP of two layers, and the embedding's
        ("tensor=4", 4, 5, 0),
        ("stage=2,tensor=2", 2, 2, 2),  # the embedding is cut over stages too, and the last one's x goes to all
        ("tensor=2", 512, 0, 5),  # a megabyte
    ],
)
def test_decode_steps_sum_over_peers_what_is_small(monkeypatch, mesh, rows, by_peers, by_psum):
    monkeypatch.setattr(all_reduce, "_ptx", lambda *macros: "")  # it takes NVRTC
    decode, prefill = lowered(mesh, rows)
    assert (decode.count(KERNEL), decode.count(PSUM)) == (by_peers, by_psum)
    assert KERNEL not in prefill and PSUM in prefill


@pytest.mark.parametrize("kernels", ["off", "on"])
def test_engine_without_gpus_does_not_connect(tmp_path, monkeypatch, kernels):
    monkeypatch.setattr("jaxinfer.engine.engine.connect", lambda *arguments: pytest.fail("connects"))
    write_dummy(hf_config("tiny"), tmp_path)
    config = EngineConfig(mesh=parse_mesh("tensor=2"), load_format="dummy", kernels=kernels)
    engine = Engine(tmp_path, config)
    engine.wait_loaded()
    assert engine.decode_sum == "psum"
