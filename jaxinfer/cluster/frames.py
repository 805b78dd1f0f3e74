"""Messages over a socket: signed JSON behind four bytes of length, each by a deadline of ``time.monotonic``."""

import json
import os
import socket
import struct
import time
from typing import Any

from jaxinfer.cluster.channel import LONGEST_ANSWER, OPENING, SIGNATURE, Channel, accept, answer, opening
from jaxinfer.cluster.secret import Secret, key_of


class Link:
    """A socket whose other end has shown, or shows with its first message, that it is a process of this user."""

    def __init__(self, peer: socket.socket, channel: Channel):
        self._peer, self._channel = peer, channel

    def send(self, value: Any, deadline: float) -> None:
        """Raises OSError for a connection that ends, TimeoutError."""
        data = json.dumps(value).encode()
        _send(self._peer, self._channel.sign(data) + data, deadline)

    def receive(self, deadline: float, longest: int) -> Any:
        """Raises ValueError for what is no message of the other end or longer than `longest` bytes; else as `send`."""
        data = _receive(self._peer, deadline, longest + SIGNATURE)
        self._channel.check(data[SIGNATURE:], data[:SIGNATURE])
        return json.loads(data[SIGNATURE:])

    def close(self) -> None:
        self._peer.close()


def admit(peer: socket.socket, secret: Secret, deadline: float) -> Link:
    """A connection that came in. Who it is is not known before its first message: a stranger's cannot be received.

    Raises:
      ValueError, OSError: it does not begin as one of ours.
    """
    answered, channel = answer(secret, _receive(peer, deadline, OPENING).decode())
    _send(peer, answered.encode(), deadline)
    return Link(peer, channel)


def introduce(peer: socket.socket, deadline: float) -> Link:
    """A connection to process 0, which has shown that it is one of this user.

    Raises:
      ValueError, SecretError: it has not.
      OSError: as `Link.send`.
    """
    opened = opening()
    _send(peer, opened.encode(), deadline)
    answered = _receive(peer, deadline, LONGEST_ANSWER).decode()
    return Link(peer, accept(opened, answered, lambda credential: key_of(credential, os.environ)))


def _send(peer: socket.socket, data: bytes, deadline: float) -> None:
    peer.settimeout(_left(deadline))
    peer.sendall(struct.pack("!I", len(data)) + data)


def _receive(peer: socket.socket, deadline: float, longest: int) -> bytes:
    (size,) = struct.unpack("!I", _read(peer, 4, deadline))
    if size > longest:
        raise ValueError(f"{size} bytes announced, legal is at most {longest}")
    return _read(peer, size, deadline)


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
