"""Every command goes on where the screen cannot show a character."""

import importlib
import io
import sys

import pytest

pytestmark = pytest.mark.slow

COMMANDS = (
    "convert.__main__",
    "jaxinfer.doctor.__main__",
    "jaxinfer.generate",
    "jaxinfer.plan.__main__",
    "jaxinfer.plot",
    "slurm.shards",
    "slurm.submit",
    *(f"benchmarks.{name}" for name in ("collectives", "draw", "latency", "long_context", "prefill", "startup")),
    "benchmarks.throughput",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_screen_of_every_command_escapes(monkeypatch, command):
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, "latin-1"))
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(command).main()
    print("café, 日本, \udce9", flush=True)
    assert not ended.value.code and screen.getvalue().endswith(b"caf\xe9, \\u65e5\\u672c, \\udce9\n")
