"""Which errors are the user's to mend: they become UserError, whose text is all that is shown."""

from collections.abc import Iterator
from contextlib import contextmanager

from jaxinfer.cluster.cpu import ThreadPoolError
from jaxinfer.cluster.slurm import ClusterError
from jaxinfer.cluster.worker import UserError


@contextmanager
def usage() -> Iterator[None]:
    """Errors in here are the user's to mend."""
    try:
        yield
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        raise UserError(f"{name}{error.strerror or error}") from error
    except (ValueError, ThreadPoolError, ClusterError) as error:
        raise UserError(str(error), table=str(getattr(error, "plan", ""))) from error


@contextmanager
def memory() -> Iterator[None]:
    """A device that ran out of memory is the user's to mend too, by smaller numbers."""
    from jaxinfer.engine.memory import OutOfMemory

    try:
        yield
    except OutOfMemory as error:
        raise UserError(str(error), table=str(error.plan)) from error
