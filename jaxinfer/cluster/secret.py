"""What the processes of a run know and other users do not, so that they can prove themselves to each other.

It never stands in an environment, a command line or a log. Process 0 takes the first of these that is there:

1. the file that JAXINFER_SECRET_FILE names;
2. under Slurm, munge: a key of this run alone, in a credential that only processes of this user can open;
3. ``~/.config/jaxinfer/secret``, made when it is first needed. Each connection has keys of its own, made of it.

The others need not choose: a credential comes with process 0's answer, or it is the file.
"""

import os
import re
import secrets
import stat
import subprocess
from collections.abc import Mapping
from pathlib import Path

import attrs

from jaxinfer.cluster.slurm import ClusterError

VARIABLE = "JAXINFER_SECRET_FILE"
SHORTEST, LONGEST = 16, 4096  # bytes of a file
MUNGE_SECONDS = 10
LABEL = "jaxinfer "  # before a key in a credential: other programs make credentials of this user too
# the credential is good, but was opened on this node before, by another rank say, or is old: whoever sent it has to
# show by its answers that it knows the key
OPENED_BEFORE = (15, 16, 17)


class SecretError(ClusterError):
    """There is no secret: the message says why, and how there could be one."""


@attrs.frozen
class Secret:
    """Process 0's: the key, and the credential by which the others come to know it ("": from the file)."""

    key: bytes = attrs.field(repr=False)
    credential: str = ""


def make_secret(env: Mapping[str, str], under_slurm: bool) -> Secret:
    """Of process 0, once per run.

    Raises:
      SecretError: no file that is this user's alone, and no munge.
    """
    if env.get(VARIABLE) or not under_slurm:
        return Secret(file_key(env))
    try:
        key = secrets.token_hex()
        return Secret(bytes.fromhex(key), _munge(["munge", f"--restrict-uid={os.geteuid()}"], LABEL + key).strip())
    except SecretError as error:
        no_munge = error
    try:
        return Secret(file_key(env))
    except SecretError as error:
        raise SecretError(f"{error}; {no_munge}") from None


def key_of(credential: str, env: Mapping[str, str]) -> bytes:
    """The key that process 0 has, by its credential ("": in the file).

    Raises:
      SecretError: the credential is not of this user, or munge cannot tell; as `file_key`.
    """
    if not credential:
        return file_key(env)
    said = _munge(["unmunge", "--keys=UID"], credential)
    # the name of the user stands there too; the payload comes last
    user = re.search(r"^UID:.*?(\d+)\)?$", said, re.MULTILINE)
    key = re.search(rf"^{LABEL}([0-9a-f]{{64}})\Z", said, re.MULTILINE)
    if user is None or key is None or int(user[1]) != os.geteuid():
        raise SecretError("its munge credential is not of this user")
    return bytes.fromhex(key[1])


def file_key(env: Mapping[str, str]) -> bytes:
    """What the file has that JAXINFER_SECRET_FILE names, else the one in the home folder, which is made if need be.

    Raises:
      SecretError: it is not there, not of this user alone, or too short.
    """
    named = env.get(VARIABLE)
    try:
        path = Path(named) if named else Path.home() / ".config" / "jaxinfer" / "secret"
        if not named and not path.exists():
            _make(path)
        return _read(path)
    except RuntimeError as error:  # no home
        raise SecretError(f"{error}; {_otherwise()}") from None
    except OSError as error:
        raise SecretError(f"{path}: {error.strerror}; {_otherwise()}") from None


def _read(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise SecretError(f"{path}: legal is a regular file")
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise SecretError(
                f"{path}: found mode {stat.S_IMODE(found.st_mode):o} of user {found.st_uid}, legal is a file that user "
                f"{os.geteuid()} alone can read (chmod 600); {_otherwise()}"
            )
        key = file.read(LONGEST + 1)
    if not SHORTEST <= len(key) <= LONGEST:
        size = f"more than {LONGEST}" if len(key) > LONGEST else len(key)
        raise SecretError(f"{path}: found {size} bytes, legal is {SHORTEST} to {LONGEST}")
    return key


def _make(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    aside = path.with_name(f".secret.{secrets.token_hex(8)}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(secrets.token_bytes())
            file.flush()
            os.fsync(descriptor)
        # unlike a rename it leaves a file that another process has just made
        os.link(aside, path)
    except FileExistsError:
        pass
    finally:
        os.unlink(aside)


def _munge(command: list[str], text: str) -> str:
    try:
        done = subprocess.run(command, input=text.encode(), capture_output=True, timeout=MUNGE_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        why = error.strerror if isinstance(error, OSError) else f"no answer in {MUNGE_SECONDS} s"
        raise SecretError(f"{command[0]}: {why}") from None
    if done.returncode and not (command[0] == "unmunge" and done.returncode in OPENED_BEFORE):
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
        raise SecretError(said[-1][:200])
    return done.stdout.decode(errors="replace")


def _otherwise() -> str:
    return f"or set {VARIABLE} to a file of mode 600 with the same {SHORTEST} random bytes or more for all processes"
