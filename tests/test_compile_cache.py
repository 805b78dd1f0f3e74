"""Compiled programs on disk: found again, written whole, shared by processes that start together."""

import subprocess
import sys
from pathlib import Path

import pytest

from jaxinfer.compile_cache import OF_JAX, VARIABLE
from processes import own_environment

PROGRAM = """
import sys, jax, jax.numpy as jnp
from jaxinfer.compile_cache import use_compile_cache
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
print(use_compile_cache(*sys.argv[1:]))
first = jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((32, 32)))
from concurrent.futures import ThreadPoolExecutor
jobs = [jax.jit(lambda x, i=i: jnp.cos(x * i) @ x).lower(jnp.ones((32, 32))) for i in range(6)]
list(ThreadPoolExecutor(4).map(lambda job: job.compile(), jobs))
first.block_until_ready()
print(hits.count("/jax/compilation_cache/cache_hits"))
"""


def start(folder: Path | str | None, **environment: str) -> subprocess.Popen:
    arguments = [] if folder is None else [str(folder)]
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.Popen(
        command, env=own_environment(OF_JAX, VARIABLE, **environment), stdout=subprocess.PIPE, text=True
    )


def result(process: subprocess.Popen) -> tuple[str, int]:
    """What `use_compile_cache` returned, and how many programs came from the disk."""
    text, _ = process.communicate()
    assert process.returncode == 0
    *warning, last = text.splitlines()
    return "\n".join(warning), int(last.split()[0])


@pytest.mark.slow
def test_processes_that_start_together_leave_whole_entries_for_the_next(tmp_path):
    folder, scratch = tmp_path / "deep" / "cache", tmp_path / "scratch"
    scratch.mkdir()
    together = [start(folder, TMPDIR=str(scratch)) for _ in range(3)]
    assert [result(each)[0] for each in together] == ["None"] * 3
    names = [each.name for each in folder.iterdir()]
    assert len(names) >= 7 and all(name.endswith("-cache") for name in names), "nothing half written is left"
    assert not any(scratch.iterdir())
    _, hits = result(start(folder))
    assert hits == len(names)
    # an entry that is cut short, by a full disk say, costs a compile
    for each in folder.iterdir():
        each.write_bytes(each.read_bytes()[:100])
    assert result(start(folder)) == ("None", 0)


def test_the_environment_may_name_the_folder(tmp_path):
    place = {VARIABLE: str(tmp_path / "here")}
    assert result(start(None, **place)) == ("None", 0)
    assert result(start(None, **place))[1] == len(list((tmp_path / "here").iterdir())) >= 7


@pytest.mark.slow
def test_where_there_is_none(tmp_path):
    off = [start("none", XDG_CACHE_HOME=str(tmp_path)), start(None, XDG_CACHE_HOME=str(tmp_path))]  # on a CPU
    (tmp_path / "file").write_text("")
    warned, _ = result(start(tmp_path / "file" / "cache"))
    assert "no compile cache in" in warned and "compiled anew" in warned
    users = start(tmp_path / "unused", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
    assert [result(each)[0] for each in (*off, users)] == ["None"] * 3
    assert sorted(each.name for each in tmp_path.iterdir()) in (["file"], ["file", "own"])
