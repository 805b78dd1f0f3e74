"""What must be the same in every process, or they would run different programs and wait for each other."""

from jaxinfer.cluster import distributed
from jaxinfer.cluster.worker import UserError


def same_everywhere(hosts: list[str], what: str, digest: bytes) -> None:
    """Compares 16 bytes with those of the other processes, which are on `hosts`; call it in all of them.

    Raises:
      UserError: a process has others; `what` they stand for.
    """
    others = distributed.differing(digest)
    if others:
        place = others[0]
        more = f" (and {len(others) - 1} more ranks)" if len(others) > 1 else ""
        raise UserError(
            f"rank {place} on {hosts[place]}{more} has another {what} than rank 0 on {hosts[0]}; legal: all the same"
        )
