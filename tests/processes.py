"""What tests need that start processes of their own."""

import os
import socket


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def own_environment(*without: str, **more: str) -> dict[str, str]:
    """This process's, but for the virtual devices that conftest.py gave it and the variables that are named."""
    return {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", *without)} | more
