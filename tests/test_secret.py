"""The secret of a run: the file in the home folder, munge's credentials, and what two that know it make of it."""

import os
import shutil
import stat
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jaxinfer.cluster.channel import Channel, accept, answer, opening
from jaxinfer.cluster.secret import VARIABLE, Secret, SecretError, file_key, key_of, make_secret
from test_hub import ends, start, step

NOBODY = 65534
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a file of another user")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_first_makes_the_file_for_all(home):
    with ThreadPoolExecutor(16) as pool:
        keys = set(pool.map(lambda _: file_key({}), range(64)))
    assert len(keys) == 1 and len(keys.pop()) == 32
    (file,) = (home / ".config" / "jaxinfer").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert make_secret({}, under_slurm=False) == Secret(file.read_bytes())
    assert file.read_bytes().hex() not in repr(make_secret({}, under_slurm=False))


@pytest.mark.parametrize(
    "what, text",
    [
        ("0640", "found mode 640 of user .*, legal is a file that user .* alone can read"),
        ("short", "found 15 bytes, legal is 16 to 4096"),
        ("long", "found more than 4096 bytes"),
        ("folder", "Is a directory"),
        ("pipe", "legal is a regular file"),
        ("missing", "No such file or directory; or set JAXINFER_SECRET_FILE to a file of mode 600"),
        pytest.param("other", f"found mode 600 of user {NOBODY}", marks=AS_ROOT),
    ],
)
def test_files_that_are_no_secret(tmp_path, what, text):
    file = tmp_path / "secret"
    if what == "folder":
        file.mkdir()
    elif what == "pipe":
        os.mkfifo(file, 0o600)
    elif what != "missing":
        file.write_bytes(b"x" * {"short": 15, "long": 5000}.get(what, 32))
        file.chmod(0o640 if what == "0640" else 0o600)
    if what == "other":
        os.chown(file, NOBODY, NOBODY)
    with pytest.raises(SecretError, match=text) as found:
        file_key({VARIABLE: str(file)})
    assert str(file) in str(found.value)


def test_no_home_and_no_munge_say_what_would_do(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setenv("PATH", "")
    text = r"file/\.config.*Not a directory; or set JAXINFER_SECRET_FILE.*; munge: No such file"
    with pytest.raises(SecretError, match=text):
        make_secret({}, under_slurm=True)


def two_ends(key: bytes = b"k" * 32, other: bytes | None = None) -> tuple[Channel, Channel]:
    opened = opening()
    answered, ours = answer(Secret(key), opened)
    return ours, accept(opened, answered, lambda credential: other or key)


def test_what_is_signed_can_be_neither_changed_repeated_nor_sent_back():
    ours, theirs = two_ends()
    first, second = (theirs.sign(text) for text in (b"a", b"b"))
    ours.check(b"a", first)
    for text, signature in [(b"a", first), (b"c", second)]:
        with pytest.raises(ValueError, match="does not know the secret"):
            ours.check(text, signature)
    # of another connection, or its own words
    for signature in (two_ends()[1].sign(b"a"), two_ends()[0].sign(b"a"), b""):
        with pytest.raises(ValueError, match="does not know the secret"):
            two_ends()[0].check(b"a", signature)
    ours, theirs = two_ends()
    with pytest.raises(ValueError, match="does not know the secret"):
        ours.check(b"a", ours.sign(b"a"))


def test_nobody_plays_the_hub():
    with pytest.raises(ValueError, match="does not know the secret"):
        two_ends(other=b"o" * 32)
    opened, sent = opening(), answer(Secret(b"k" * 32), opening())[0]
    for text in ("", opened, "HTTP/1.1 400 Bad Request", sent, f"{sent}\n"):
        with pytest.raises(ValueError, match="does not"):
            accept(opened, text, lambda credential: b"k" * 32)
    for text in ("", opened[1:], opened.upper() + "G", opened + "\n", hex(7)):
        with pytest.raises(ValueError, match="no opening"):
            answer(Secret(b"k" * 32), text)


@pytest.fixture(scope="module")
def munged():
    """A real munged of our own, with commands in a folder for PATH that ask it."""
    if not shutil.which("munged") or os.geteuid():
        pytest.skip("needs munge, and root to start a daemon of it")
    # pytest's own folders are closed to other users, who are to reach the socket
    folder = Path(tempfile.mkdtemp(prefix="munge-"))
    folder.chmod(0o755)
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o400)
    names = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    files = [f"--{option}={folder / name}" for option, name in names.items()]
    with open(folder / "out", "wb") as out:
        daemon = subprocess.Popen(["munged", "--foreground", "--force", *files], stdout=out, stderr=out)
    (folder / "bin").mkdir()
    for name in ("munge", "unmunge"):
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec {shutil.which(name)} --socket={folder}/socket "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    until = time.monotonic() + 20
    while not (folder / "socket").exists():
        assert time.monotonic() < until, (folder / "out").read_text()
        time.sleep(0.05)
    yield folder / "bin"
    daemon.terminate()
    daemon.wait()
    shutil.rmtree(folder)


@pytest.fixture
def munge(munged, monkeypatch):
    monkeypatch.setenv("PATH", f"{munged}:{os.environ['PATH']}")


def test_a_credential_is_opened_by_all_ranks_of_a_node(munge):
    secret = make_secret({}, under_slurm=True)
    assert secret.credential.startswith("MUNGE:") and len(secret.key) == 32
    # munge calls the second a replay
    assert [key_of(secret.credential, {}) for _ in range(3)] == [secret.key] * 3
    assert make_secret({}, under_slurm=True).key != secret.key
    opened = opening()
    answered, ours = answer(secret, opened)
    theirs = accept(opened, answered, lambda credential: key_of(credential, {}))
    ours.check(b"hello", theirs.sign(b"hello"))


def test_a_credential_tells_other_users_nothing(munge, munged):
    secret = make_secret({}, under_slurm=True)
    done = subprocess.run(["unmunge"], input=secret.credential, text=True, capture_output=True, user=NOBODY)
    assert done.returncode and "Unauthorized" in done.stderr and secret.key.hex() not in done.stdout + done.stderr


def test_another_users_credential_is_not_taken(munge):
    text = "jaxinfer " + "0" * 64
    for user in (NOBODY, 0):
        command = ["munge", f"--restrict-uid={os.geteuid()}"]
        credential = subprocess.run(command, input=text, text=True, capture_output=True, user=user).stdout.strip()
        if user:
            with pytest.raises(SecretError, match="its munge credential is not of this user"):
                key_of(credential, {})
        else:
            assert key_of(credential, {}) == bytes(32)
    with pytest.raises(SecretError, match="unmunge: Error"):
        key_of("MUNGE:AwQFAAC5oC4C:", {})


def test_ranks_meet_by_munge_where_they_share_no_folder(munge, tmp_path):
    (tmp_path / "none").touch()
    ranks = [start((), **step(40_007, rank, 2), HOME=str(tmp_path / "none")) for rank in (0, 1)]
    assert ends(ranks) == [(0, ""), (0, "")]
