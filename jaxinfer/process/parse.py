"""Options of all tasks of a Slurm step: what is wrong with those of one is said once, whichever it is."""

import argparse
import contextlib
import io
import os
from collections.abc import Callable

from jaxinfer import __version__
from jaxinfer.cluster.launch import Launch, find_launch
from jaxinfer.cluster.monitor import supervise
from jaxinfer.cluster.pulse import Limits
from jaxinfer.cluster.slurm import ClusterError
from jaxinfer.cluster.worker import UserError
from jaxinfer.options import Parser, add_process_options


def parse_together(program: str, parse: Callable[[], argparse.Namespace]) -> argparse.Namespace:
    """What `parse` returns. Where it exits with an error, the task meets the others as a rank that fails: the run ends
    at once, and rank 0 says whose options are wrong. Of several tasks the first alone shows --help."""
    launch = _step()
    if launch is None or launch.num_processes == 1:
        return parse()
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            return parse()
    except SystemExit as ended:
        if not ended.code:
            print(out.getvalue() if launch.process_id == 0 else "", end="")
            raise
    text = err.getvalue().removeprefix(f"{program}: error: ")

    def fail(*_: object) -> int:
        raise UserError(text)

    supervise(launch, Limits(), program, {"jaxinfer": __version__}, fail)
    raise AssertionError("supervise returned")


def _step() -> Launch | None:
    """From Slurm, and from --port where that can be read."""
    parser = Parser(add_help=False, allow_abbrev=False)
    add_process_options(parser)
    port = None
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        known = parser.parse_known_args()[0]
        if known.coordinator is not None:
            return None  # started by hand, each with a screen of its own
        port = known.port
    try:
        return find_launch(os.environ, port=port)
    except ClusterError:
        return None  # `find_process` will say it
