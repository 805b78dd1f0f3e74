"""One process of a run: found, watched where it has peers, and ended with a status."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

import attrs

from jaxinfer import __version__
from jaxinfer.cluster.launch import Launch, find_launch, missed_srun
from jaxinfer.cluster.monitor import supervise
from jaxinfer.cluster.pulse import Alone, Pulse
from jaxinfer.cluster.slurm import ClusterError
from jaxinfer.cluster.worker import UserError
from jaxinfer.options import limits
from jaxinfer.telemetry.phases import Phases, process_began


@attrs.frozen
class Run:
    """One process of a run.

    Attributes:
      program: the command's name, for what it says.
      args: its options, those of `add_place_options` and `add_limit_options` among them.
      life: its signs of life.
      launch, coordinator: how it finds the others; None and "" where it is alone.
      phases: where its time goes.
    """

    program: str
    args: argparse.Namespace
    life: Pulse | Alone
    launch: Launch | None = None
    coordinator: str = ""
    phases: Phases = attrs.field(factory=Phases)

    @property
    def rank(self) -> int:
        return 0 if self.launch is None else self.launch.process_id

    @property
    def first(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        """A line on standard error, of the first process alone."""
        if self.first:
            print(f"{self.program}: {text}", file=sys.stderr)


Work = Callable[[Run], int]


def find_process(program: str, args: argparse.Namespace) -> Launch | None:
    """Which process of which run this is, from Slurm or the options of `add_process_options`; None: it is alone.
    Options or variables that cannot be end the program."""
    try:
        return find_launch(os.environ, args.coordinator, args.num_processes, args.process_id, args.port)
    except ClusterError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(2)


def start(
    program: str,
    args: argparse.Namespace,
    launch: Launch | None,
    work: Work,
    take_back: Callable[[], object] = lambda: None,
) -> NoReturn:
    """Runs `work` and ends the program: with the status that it returns, 2 after a UserError, 1 after anything else.
    After status 2 the first process calls `take_back`, when nothing of the run works any more.

    A process with peers does it under a monitor (`supervise`), and its status is that of the whole run. Alone, it takes
    an interrupt from the keyboard (status 130); what `work` raises KeyboardInterrupt with is said as well.
    """
    if warning := missed_srun(os.environ, launch):
        print(f"{program}: WARNING: {warning}", file=sys.stderr)
    phases = Phases(process_began())  # of a monitor, from which the worker is forked
    if launch is None:
        status = _alone(Run(program, args, Alone(args.grace_s), phases=phases), work)
        if status == 2:
            take_back()
        sys.exit(status)
    facts = {"jaxinfer": __version__}
    supervise(
        launch,
        limits(args),
        program,
        facts,
        lambda pulse, where: _one_of_several(Run(program, args, pulse, launch, where, phases), work),
        take_back,
    )


def _one_of_several(run: Run, work: Work) -> int:
    try:
        return work(run)
    except BrokenPipeError:
        return 1


def _alone(run: Run, work: Work) -> int:
    try:
        return work(run)
    except UserError as error:
        if error.table:
            print(error.table, file=sys.stderr)
        print(f"{run.program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"{run.program}: {'; '.join(['interrupted', *map(str, error.args)])}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the screen, head say, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
