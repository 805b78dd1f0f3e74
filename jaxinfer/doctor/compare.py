"""Across ranks: what must be equal and is not, who is missing, clocks, GPUs used twice or not at all."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from jaxinfer.cluster.secret import VARIABLE
from jaxinfer.doctor.finding import Finding, Report, error, ok, warning

CLOCK_WARNING, CLOCK_ERROR = 1.0, 30.0
SHOWN = 6  # ranks named in one line
# different values of these make different programs, or collectives that do not match
MUST_AGREE = ("XLA_", "JAX_")


def compare(reports: Sequence[Report]) -> list[Finding]:
    """All comparisons over the ranks that sent a report."""
    findings = [*clocks(reports), *shared_gpus(reports), *memory_for_model(reports)]
    if len(reports) > 1:
        findings += [*versions(reports), *flags(reports), *manifests(reports), *own_names(reports), *kinds(reports)]
    return findings


def missing_ranks(missing: Mapping[int, str], hosts: Sequence[str], address: str) -> list[Finding]:
    """`hosts` of the ranks as far as known; `address` of rank 0."""
    if not missing:
        return []
    each = [f"rank {rank} on {hosts[rank] or 'an unknown host'} {why}" for rank, why in sorted(missing.items())]
    fix = f"read its own output: was it started? does it reach {address}? is its Python the same?"
    return [error("ranks", _listed(each), fix)]


def refused_peers(refused: Sequence[str]) -> list[Finding]:
    fix = "two runs on one port, or a rank that was started twice: choose another --port or coordinator; is it a rank "
    fix += f"of this run? then its secret is another: set {VARIABLE}"
    return [warning("ranks", f"refused {_listed(refused)}", fix)] if refused else []


def clocks(reports: Sequence[Report]) -> list[Finding]:
    off = [(abs(report.facts.get("clock_s", 0.0)), report) for report in reports]
    worst = max((seconds for seconds, _ in off), default=0.0)
    if worst <= CLOCK_WARNING:
        return [ok("clock", f"the clocks of all ranks agree within {max(worst, 0.001):.3f} s")] if len(off) > 1 else []
    bad = [f"{report.name} by {seconds:.1f} s" for seconds, report in off if seconds > CLOCK_WARNING]
    level = error if worst > CLOCK_ERROR else warning
    return [
        level("clock", f"differs from rank 0's: {_listed(bad)}", "start chrony or ntpd on these nodes (administrators)")
    ]


def versions(reports: Sequence[Report]) -> list[Finding]:
    found = _differing(reports, "versions")
    fix = "one environment for all nodes: the same container or the same folder on a shared file system"
    return [error("versions", text, fix) for _, text in found] or [ok("versions", "equal on all ranks")]


def flags(reports: Sequence[Report]) -> list[Finding]:
    found = _differing(reports, "flags")
    fix = "export it in the job script before srun (srun --export=ALL hands it to all tasks)"
    findings = [(error if name.startswith(MUST_AGREE) else warning)("flags", text, fix) for name, text in found]
    return findings or [ok("flags", "equal on all ranks")]


def manifests(reports: Sequence[Report]) -> list[Finding]:
    found = defaultdict(list)
    for report in reports:
        if "manifest" in report.facts:
            found[report.facts["manifest"]].append(report)
    if not found or set(found) == {None}:
        return []
    if len(found) == 1:
        return [ok("checkpoint", "the same on all ranks")]
    usual = max(found, key=lambda value: (value is not None, len(found[value])))
    others = [report.name for value, group in found.items() if value not in (usual, None) for report in group]
    fix = "one copy on a shared file system, or the same files on each node"
    return [error("checkpoint", f"another manifest than the others' at {_listed(others)}", fix)] if others else []


def own_names(reports: Sequence[Report]) -> list[Finding]:
    """A node whose own name is a loopback address tells others an address that leads to themselves."""
    if len({report.host for report in reports}) < 2:
        return []
    bad: dict[str, str] = {}
    for report in reports:
        found = report.facts.get("own_addresses", [])
        if not found:
            bad[report.host] = "is not known there"
        elif any(address.startswith("127.") or address == "::1" for address in found):
            bad[report.host] = f"is {', '.join(found)} there"
    fix = "in /etc/hosts of that node remove its name from the line of 127.0.1.1 (127.0.0.1), or ask the administrators"
    text = _listed([f"{host} {what}" for host, what in bad.items()])
    return [error("names", f"own host name: {text}", fix)] if bad else [ok("names", "every node knows its own address")]


def kinds(reports: Sequence[Report]) -> list[Finding]:
    """GPUs of different kinds or numbers."""
    found = {report.name: Counter(gpu["name"] for gpu in report.facts.get("gpus", [])) for report in reports}
    shown = {
        name: " + ".join(f"{count} {kind}" for kind, count in sorted(each.items())) or "no GPU"
        for name, each in found.items()
    }
    if len(set(shown.values())) < 2:
        return []
    usual = Counter(shown.values()).most_common(1)[0][0]
    others = [f"{name} has {what}" for name, what in shown.items() if what != usual]
    fix = "a mesh wants equal devices: ask for one kind (--constraint, --gres=gpu:KIND:N) and as many on each node"
    return [warning("GPUs", f"{_listed(others)}, the others {usual}", fix)]


def shared_gpus(reports: Sequence[Report]) -> list[Finding]:
    """GPUs that several ranks take, and GPUs of the job that none takes."""
    findings, users = [], defaultdict(list)
    for report in reports:
        for gpu in report.facts.get("gpus", []):
            users[report.host, gpu["uuid"]].append(report)
    twice = {key: group for key, group in users.items() if len(group) > 1}
    if twice:
        texts = [
            f"GPU {uuid} of {host}: {' and '.join(f'rank {each.rank}' for each in group)}"
            for (host, uuid), group in twice.items()
        ]
        fix = "as many tasks as GPUs on a node (--ntasks-per-node), or --gpus-per-task=1; else CUDA_VISIBLE_DEVICES"
        findings.append(error("GPUs", f"taken by several ranks: {_listed(texts)}", fix))
    given = {report.host: report.facts.get("gpus_on_node") or 0 for report in reports}
    for host, count in given.items():
        used = len({uuid for where, uuid in users if where == host})
        if 0 < used < count:
            what = f"{host}: Slurm gave {count} GPUs, the ranks there use {used}"
            findings.append(warning("GPUs", what, f"--ntasks-per-node={count}, or one task per node that sees all"))
    return findings


def memory_for_model(reports: Sequence[Report]) -> list[Finding]:
    """Whether the ranks of a node have room for their shards while they load."""
    findings, nodes = [], defaultdict(list)
    for report in reports:
        nodes[report.host].append(report)
    for host, group in nodes.items():
        total = group[0].facts.get("checkpoint_bytes", 0) * len(group) / len(reports)
        room = group[0].facts.get("memory_bytes", 0)
        if room and total > room and not group[0].facts.get("gpus"):
            what = f"{host}: {room / 2**30:.0f} GiB of memory for {total / 2**30:.0f} GiB of weights"
            findings.append(warning("memory", what, "more nodes, or more memory: --mem=0 is all of a node"))
    return findings


def _differing(reports: Sequence[Report], key: str) -> list[tuple[str, str]]:
    """Names whose values differ, with a text that names ranks and both values."""
    found = []
    for name in sorted({name for report in reports for name in report.facts.get(key, {})}):
        values = {report.name: report.facts.get(key, {}).get(name) for report in reports}
        counts = Counter(values.values())
        if len(counts) > 1:
            most = max(counts.values())
            # between equal numbers rank 0 is right
            usual = next(value for value in values.values() if counts[value] == most)
            others = [f"{rank} has {_shown(value)}" for rank, value in values.items() if value != usual]
            found.append((name, f"{name}: {_listed(others)}, the others {_shown(usual)}"))
    return found


def _shown(value: Any) -> str:
    return "none" if value is None else repr(value)


def _listed(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return "; ".join(texts[:SHOWN]) + more
