"""The process that does a rank's work: how it starts below its monitor, and how it ends."""

import ctypes
import faulthandler
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

PR_SET_PDEATHSIG = 1
STACKS_SIGNAL = signal.SIGQUIT
FOLLOWS = "[follows] "  # before the text of a failure that another rank's end may have brought
FOLLOW_SECONDS = 3.0


class UserError(Exception):
    """What the user can mend: its text is all they need; `table` are lines to show before it."""

    def __init__(self, text: str, table: str = ""):
        super().__init__(text)
        self.table = table


def become_worker(monitor: int) -> None:
    """To be called first in the forked child: it dies with its monitor and leaves signals to it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != monitor:  # it died before that
        os._exit(1)
    os.setpgid(0, 0)
    # Slurm signals every process of a step; the monitor answers for both
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(each, signal.SIG_IGN)
    faulthandler.register(STACKS_SIGNAL, all_threads=True)
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))  # an abort of JAX would leave gigabytes


def run_worker(work: Callable[[], int], fail: Callable[[str], None], rank: str) -> None:
    """Runs `work` and ends this process with its status, at once: an exit of the interpreter would wait in JAX for
    other processes that may be gone.

    A UserError is told to `fail`, its table in the lines after its text (process 0 shows both, once); any other
    exception, of any thread, is printed, each line with the rank.
    """

    def show(lines: list[str]) -> None:
        sys.stderr.write("".join(f"[{rank}] {line}\n" for line in lines))

    def report(error: BaseException) -> None:
        text = " ".join("".join(traceback.format_exception_only(error)).split())
        fail(f"{FOLLOWS if _follows(error) else ''}{text}")
        if _follows(error):
            time.sleep(
                FOLLOW_SECONDS
            )  # when another rank is to blame, the run ends here and nobody reads this traceback
        show("".join(traceback.format_exception(error)).rstrip().split("\n"))

    def thread_died(args: threading.ExceptHookArgs) -> None:
        report(args.exc_value or args.exc_type())
        end(1)

    threading.excepthook = thread_died
    try:
        end(work())
    except UserError as error:
        fail("\n".join([" ".join(str(error).split()), *error.table.splitlines()]))
        end(2)
    except SystemExit as error:
        end(error.code if isinstance(error.code, int) else 1)
    except BaseException as error:
        report(error)
        end(1)


def end(status: int) -> None:
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        status = status or 1  # what was to be printed is lost: a full disk below the log, a closed pipe
    os._exit(status)


def _follows(error: BaseException) -> bool:
    """Whether the end of another process may be why: collectives then fail with errors of many kinds."""
    return type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" not in str(error)


def oom_kills() -> int | None:
    """How many processes of this control group the kernel killed for memory; None where it does not say."""
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            text = _read(f"/sys/fs/cgroup/memory{path}/memory.oom_control")
        elif not controllers:
            text = _read(f"/sys/fs/cgroup{path}/memory.events")
        else:
            continue
        for entry in text.splitlines():
            name, _, value = entry.partition(" ")
            if name == "oom_kill":
                return int(value)
    return None


def process_state(pid: int) -> str:
    """R running, S sleeping, D waits for a disk, T stopped, Z dead; empty when there is no such process."""
    return _read(f"/proc/{pid}/stat").rpartition(")")[2].strip()[:1]


def memory_text(pid: int) -> str:
    """Present and peak resident memory of a process, for people."""
    values = dict(line.split(":", 1) for line in _read(f"/proc/{pid}/status").splitlines() if ":" in line)
    if "VmRSS" not in values:
        return ""
    now, peak = (int(values[name].split()[0]) / 2**20 for name in ("VmRSS", "VmHWM"))
    return f"{now:.2f} GiB resident, {peak:.2f} GiB at most"


def _read(path: str) -> str:
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except OSError:
        return ""
