"""Two processes that know a key prove it to each other, and sign all that they say (HMAC-SHA256).

The one that connects sends an opening; process 0 answers with a signature over it, so that nobody else on its port is
taken for it; the first message that follows is signed too. What is signed has a number and one of the two directions,
under keys of this connection alone: it can be neither repeated nor sent back, nor put in by a relay in between.
"""

import hmac
import re
import secrets
from collections.abc import Callable

from jaxinfer.cluster.secret import Secret

OPENING = 64  # characters
LONGEST_ANSWER = 4096
SIGNATURE = 32  # bytes


class Channel:
    """One end of a connection; `leads`: process 0's."""

    def __init__(self, key: bytes, nonces: str, leads: bool):
        ways = [hmac.digest(key, f"{way} process 0 {nonces}".encode(), "sha256") for way in ("from", "to")]
        self._out, self._in = ways if leads else ways[::-1]
        self._sent = self._received = 0

    def sign(self, data: bytes) -> bytes:
        """The signature of the next message to the other end."""
        self._sent += 1
        return hmac.digest(self._out, self._sent.to_bytes(8) + data, "sha256")

    def check(self, data: bytes, signature: bytes) -> None:
        """Raises ValueError unless `data` is the next message of the other end."""
        self._received += 1
        expected = hmac.digest(self._in, self._received.to_bytes(8) + data, "sha256")
        if not hmac.compare_digest(expected, signature):
            raise ValueError("it does not know the secret of this run")


def opening() -> str:
    """What the process that connects says first."""
    return secrets.token_hex(OPENING // 2)


def answer(secret: Secret, opened: str) -> tuple[str, Channel]:
    """Process 0's answer to an opening, and its end of the channel. Raises ValueError for what is none."""
    if not re.fullmatch(rf"[0-9a-f]{{{OPENING}}}", opened):
        raise ValueError("no opening")
    own = opening()
    channel = Channel(secret.key, opened + own, leads=True)
    return f"{own} {channel.sign(b'').hex()} {secret.credential}", channel


def accept(opened: str, answered: str, key_of: Callable[[str], bytes]) -> Channel:
    """The other end, when process 0 has answered; `key_of` has the key that belongs to a credential ("": to none).

    Raises:
      ValueError: the answer is not that of a process which knows the key.
      SecretError: there is no key.
    """
    found = re.fullmatch(rf"([0-9a-f]{{{OPENING}}}) ([0-9a-f]{{{2 * SIGNATURE}}}) ([!-~]*)", answered)
    if not found:
        raise ValueError("it does not answer as one of ours")
    channel = Channel(key_of(found[3]), opened + found[1], leads=False)
    channel.check(b"", bytes.fromhex(found[2]))
    return channel
