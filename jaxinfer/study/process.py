"""A cell's command as a process that ends with the study, however that ends."""

import ctypes
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

PR_SET_PDEATHSIG = 1
POLL_S = 0.2
ORDERLY_S = 15.0  # from the signal to stop until the kill
INSIDE_ORDERLY_S = 60.0  # of a Slurm step, which slurm.submit ends first
TAIL = 64 << 10  # bytes of a log that are looked at


def run(
    words: list[str],
    variables: Mapping[str, str],
    log: Path,
    keep: int,
    look: Callable[[], None] = lambda: None,
    step: bool = False,
) -> int:
    """Runs a command with its output in `log`; its exit status, negative where a signal ended it. It inherits the file
    descriptor `keep`. `look` is called now and then. `step`: it has processes on other nodes, which it must end itself.

    The kernel sends it a signal when this process dies. Raises KeyboardInterrupt when this process is told to stop,
    with the command ended.
    """
    own, dying = os.getpid(), signal.SIGTERM if step else signal.SIGKILL

    def tied() -> None:  # in the child
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, dying)
        if os.getppid() != own:  # this process died before that
            os._exit(1)

    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        child = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(variables),
            start_new_session=True,  # Ctrl-C reaches the study alone, which stops the cell in order
            preexec_fn=tied,
            pass_fds=(keep,),
        )
    try:
        while (status := child.poll()) is None:
            look()
            time.sleep(POLL_S)
        return status
    except BaseException:
        _stop(child, INSIDE_ORDERLY_S if step else ORDERLY_S, signal.SIGTERM if step else signal.SIGINT)
        raise


def _stop(child: subprocess.Popen, patience: float, how: signal.Signals) -> None:
    child.send_signal(how)
    try:
        child.wait(patience)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def ended(status: int, log: Path) -> str:
    """Why a command failed, in one line: the last line of its log that speaks of an error, and the exit status."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    told = [line for line in lines if re.search(r"\b(\w*Error|error|refused)\b", line)]
    own = [line for line in told if not re.match(r"(srun|slurmstepd|salloc): ", line)]  # those say that it failed
    last = (own or told or lines or [""])[-1]
    if status < 0:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else str(-status)
        hint = ", which the kernel sends where memory runs out" if status == -signal.SIGKILL else ""
        return f"killed by {name}{hint}{f'; {last}' if last else ''}"
    return f"exit status {status}{f': {last}' if last else f'; nothing in {log}'}"
