"""Messages over a socket: JSON behind four bytes of length, each to be done by a deadline (of ``time.monotonic``)."""

import json
import socket
import struct
import time
from typing import Any


def send(peer: socket.socket, value: Any, deadline: float) -> None:
    """Raises OSError for a connection that ends, TimeoutError."""
    data = json.dumps(value).encode()
    peer.settimeout(_left(deadline))
    peer.sendall(struct.pack("!I", len(data)) + data)


def receive(peer: socket.socket, deadline: float, longest: int) -> Any:
    """Raises ValueError for what is no message or has more than `longest` bytes; else as `send`."""
    (size,) = struct.unpack("!I", _read(peer, 4, deadline))
    if size > longest:
        raise ValueError(f"{size} bytes announced, legal is at most {longest}")
    return json.loads(_read(peer, size, deadline))


def _read(peer: socket.socket, size: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < size:
        peer.settimeout(_left(deadline))
        part = peer.recv(size - len(data))
        if not part:
            raise ConnectionError("connection closed")
        data += part
    return bytes(data)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left
