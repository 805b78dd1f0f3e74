"""Compiled programs kept on disk for the next run: JAX's own cache, made safe for several processes and runs at once.

JAX writes an entry in place, so that a process which is killed meanwhile leaves half of one there for good; and each
process looks for itself, so that one which finds an entry and one which does not would tune a kernel without the
other. Here every process gives JAX a folder of its own, with links to the entries that all of them see at the start.
What JAX writes there (in process 0 alone) is renamed into the common folder when it is whole.
"""

import os
import shutil
import tempfile
import threading
import uuid
from pathlib import Path
from typing import Any

from jaxinfer.cluster import distributed

OFF = "none"
VARIABLE, OF_JAX = "JAXINFER_COMPILE_CACHE", "JAX_COMPILATION_CACHE_DIR"
BEFORE_WRITING = "/jax/compilation_cache/cache_misses"
COMPILED = "/jax/core/compile/backend_compile_duration"


def default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxinfer" / "xla"


def use_compile_cache(folder: str | None = None) -> str | None:
    """Keeps this process's programs in `folder`; every process of a run calls it, after JAX has its devices.

    Without a folder it is what JAXINFER_COMPILE_CACHE says, else ``$XDG_CACHE_HOME/jaxinfer/xla``
    (``~/.cache/jaxinfer/xla``) on a GPU, and there is none on a CPU; ``none`` turns it off. A cache that JAX was told
    of already, JAX_COMPILATION_CACHE_DIR say, stays as it is.

    Returns:
      None, or why there is none although it was wanted.
    """
    import jax

    folder = folder or os.environ.get(VARIABLE)
    if jax.config.jax_compilation_cache_dir or folder == OFF or (folder is None and jax.default_backend() == "cpu"):
        return None
    common = Path(folder or default_folder()).expanduser().absolute()
    try:
        common.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=common).close()
        seen, error = sorted(each.name for each in common.iterdir() if each.name.endswith("-cache")), None
    except OSError as failed:
        seen, error = [], f"{failed.strerror or failed}"
    names = distributed.share(seen)
    views = distributed.everyone([error, [name for name in names if not (common / name).is_file()]])
    error = next((each for each, _ in views if each), None)
    if error:
        return f"no compile cache in {common}: {error}; programs are compiled anew in each run"
    missing = {name for _, lacking in views for name in lacking}
    own = tempfile.TemporaryDirectory(prefix="jaxinfer-xla-", ignore_cleanup_errors=True)
    for name in names:
        if name not in missing:
            os.symlink(common / name, os.path.join(own.name, name))
    jax.config.update("jax_compilation_cache_dir", own.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # XLA's own are written in place as well
    _Publisher(own, common).listen()
    return None


class _Publisher:
    """Copies new entries to the common folder, each time that a compile has ended and no thread writes one."""

    def __init__(self, own: tempfile.TemporaryDirectory, common: Path):
        self._own, self._common = own, common  # the folder goes when the process ends
        self._done = set(os.listdir(own.name))
        self._writing: set[int] = set()  # threads
        self._lock = threading.Lock()

    def listen(self) -> None:
        import jax

        jax.monitoring.register_event_listener(self._on_event)
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)

    def _on_event(self, event: str, **_: Any) -> None:
        if event == BEFORE_WRITING:
            with self._lock:
                self._writing.add(threading.get_ident())

    def _on_duration(self, event: str, seconds: float, **_: Any) -> None:
        if event == COMPILED:
            with self._lock:
                self._writing.discard(threading.get_ident())
                if not self._writing:
                    self._publish()

    def _publish(self) -> None:
        try:
            for name in sorted(set(os.listdir(self._own.name)) - self._done):
                self._done.add(name)
                _copy(Path(self._own.name, name), self._common / name)
        except OSError:  # a full disk, say: the next run compiles again
            pass


def _copy(source: Path, target: Path) -> None:
    if target.exists():
        return
    aside = target.with_name(f".{uuid.uuid4().hex}")
    try:
        with open(aside, "xb") as out, open(source, "rb") as whole:
            shutil.copyfileobj(whole, out)
            out.flush()
            os.fsync(out.fileno())
        os.replace(aside, target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
