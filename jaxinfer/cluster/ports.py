"""Ports of process 0: where it awaits the others, and the one that it keeps for JAX's coordinator."""

import os
import socket
import time

from jaxinfer.cluster.launch import LOOPBACK, Launch
from jaxinfer.cluster.slurm import ClusterError

BIND_SECONDS = 5.0  # for the port of an earlier start that is just ending


def listen(launch: Launch) -> socket.socket:
    """The first of the launch's ports that is free; on all addresses, unless all processes are on this machine.

    Raises:
      ClusterError: none can be used, since other programs have them, say.
    """
    until = time.monotonic() + BIND_SECONDS
    while True:
        for port in launch.ports:
            try:
                return _listen(port, launch.on_one_node)
            except OSError as error:
                why = os.strerror(error.errno)
        if time.monotonic() > until:
            what = f"{launch.name}: port {launch.port_text} cannot be used: {why}"
            raise ClusterError(f"{what}; choose another (--port, or --coordinator)")
        time.sleep(0.2)


def _listen(port: int, on_one_node: bool) -> socket.socket:
    if on_one_node:
        return socket.create_server((LOOPBACK, port), backlog=4096)
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=4096)


def keep_coordinator(launch: Launch) -> tuple[str, socket.socket]:
    """``host:port`` for JAX's coordinator in this process, and the socket that keeps it while it is open: gRPC shares
    ports of its own user, and others do not get it."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    kept = socket.socket(family, socket.SOCK_STREAM)
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    kept.bind(("", 0))
    host = f"[{launch.address}]" if ":" in launch.address else launch.address
    return f"{host}:{kept.getsockname()[1]}", kept
