"""Messages between monitors and the hub: one signed JSON object per line."""

import asyncio
import contextlib
import json
import os
import secrets
import socket
from typing import Any

from jaxinfer.cluster.channel import OPENING, SIGNATURE, Channel, accept, answer, opening
from jaxinfer.cluster.secret import Secret, key_of

LONGEST = 1 << 16


class Peer:
    """The other end of a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, channel: Channel):
        self._reader, self._writer, self._channel = reader, writer, channel

    def send(self, kind: str, **fields: Any) -> None:
        if not self._writer.is_closing():
            data = json.dumps({"kind": kind, **fields}).encode()
            self._writer.write(self._channel.sign(data).hex().encode() + data + b"\n")

    async def receive(self) -> dict[str, Any] | None:
        """The next message; None when the connection is over, or what came is not a message of the other end."""
        try:
            line = await self._reader.readline()
            data = line[2 * SIGNATURE :].removesuffix(b"\n")
            self._channel.check(data, bytes.fromhex(line[: 2 * SIGNATURE].decode()))
            message = json.loads(data)
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) and "kind" in message else None

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


async def admit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: Secret) -> Peer:
    """A connection that came in. Who it is is not known before its first message: a stranger's cannot be received.

    Raises:
      ValueError, OSError, EOFError: it does not begin as one of ours.
    """
    opened = await reader.readexactly(OPENING)
    answered, channel = answer(secret, opened.decode())
    writer.write(f"{answered}\n".encode())
    return Peer(reader, writer, channel)


async def reach(host: str, port: int, seconds: float) -> Peer:
    """A connection to the hub, which has shown that it is one of this user.

    Raises:
      OSError, TimeoutError: nothing is there that does.
      SecretError: this process has no secret.
    """
    async with asyncio.timeout(seconds):
        reader, writer = await asyncio.open_connection(host, port, limit=LONGEST)
        try:
            opened = opening()
            writer.write(opened.encode())
            line = await reader.readline()
            text, find = line.decode().removesuffix("\n"), lambda credential: key_of(credential, os.environ)
            # to read files and to run unmunge may take long
            return Peer(reader, writer, await asyncio.to_thread(accept, opened, text, find))
        except BaseException as error:
            writer.transport.abort()
            if isinstance(error, ValueError):
                raise ConnectionError(f"another program listens there ({error})") from None
            raise


async def pair() -> tuple[Peer, Peer]:
    """Both ends of a connection inside this process; the first is the hub's."""
    key = secrets.token_bytes()
    streams = [await asyncio.open_connection(sock=end, limit=LONGEST) for end in socket.socketpair()]
    return Peer(*streams[0], Channel(key, "", True)), Peer(*streams[1], Channel(key, "", False))
