"""What tests need that start processes of their own."""

import os
import socket


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def own_environment(*without: str, **more: str) -> dict[str, str]:
    """This process's, but for the virtual devices that conftest.py gave it and the variables that are named."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    own = {**os.environ, "XLA_FLAGS": " ".join(flags)}
    return {name: value for name, value in own.items() if name not in without} | more
