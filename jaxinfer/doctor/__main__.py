"""The command: all ranks meet, look at what is theirs, reduce together; rank 0 tells."""

import argparse
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from jaxinfer import __version__
from jaxinfer.cluster.fabric import infiniband_ports
from jaxinfer.cluster.gather import Meeting, meet
from jaxinfer.cluster.launch import Launch, find_launch
from jaxinfer.cluster.ports import keep_coordinator
from jaxinfer.cluster.secret import VARIABLE, SecretError
from jaxinfer.cluster.slurm import ClusterError
from jaxinfer.doctor.collective import merge_nccl, run_probe
from jaxinfer.doctor.compare import compare, missing_ranks, refused_peers
from jaxinfer.doctor.cuda import check_cuda
from jaxinfer.doctor.files import check_cache, check_checkpoint, check_folder
from jaxinfer.doctor.finding import ERROR, Check, Finding, Report, bounded, error, warning
from jaxinfer.doctor.gpus import gpu_findings, visible_gpus
from jaxinfer.doctor.host import check_host, check_step, container
from jaxinfer.doctor.judge import collective_findings, transport_findings
from jaxinfer.doctor.show import merge, print_answer, write_answer
from jaxinfer.doctor.versions import check_versions
from jaxinfer.options import Parser, add_process_options
from jaxinfer.screen import escape_unencodable

LOCAL_SECONDS = 90.0  # for all that a rank looks at by itself
MARGIN_SECONDS = 20.0

EXAMPLES = """
examples:
  This machine:
    python -m jaxinfer.doctor

  A job as it will run, with its model and where it will write (one task per GPU here; any srun line works):
    srun -N2 --ntasks-per-node=4 --gpus-per-node=4 python -m jaxinfer.doctor --model CKPT --output-dir results

  In a container:
    srun -N2 --gpus-per-node=4 apptainer exec --nv jaxinfer.sif python -m jaxinfer.doctor --model CKPT

  Without Slurm, two processes (start both):
    python -m jaxinfer.doctor --coordinator node1:9876 --num-processes 2 --process-id 0
    python -m jaxinfer.doctor --coordinator node1:9876 --num-processes 2 --process-id 1

Rank 0 prints a table of the ranks and then one line per check: ok, warning or error, with what to do behind an arrow.
The worst lines come last. Other ranks print only why they could not take part.

exit status: 0 no error, 1 an error, 2 wrong use.
"""


def main() -> None:
    escape_unencodable()
    args = parse_arguments()
    try:
        launch = find_launch(os.environ, args.coordinator, args.num_processes, args.process_id, args.port)
    except ClusterError as problem:
        sys.stderr.write(f"jaxinfer.doctor: error: {problem}\n")
        sys.exit(2)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        status = examine(args, launch)
    except KeyboardInterrupt:
        status = 130
    sys.stdout.flush()
    sys.stderr.flush()
    # a check that hangs in a thread must not hold up the end
    os._exit(status)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="jaxinfer.doctor",
        description="Says whether this machine, or all ranks of this job together, can run jaxinfer; and if not, why, "
        "and what to do.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"jaxinfer {__version__}")
    parser.add_argument("--model", type=Path, metavar="CKPT_DIR", help="checkpoint: is it whole, how fast is it read")
    what = "where results will be written (default: the current folder)"
    parser.add_argument("--output-dir", type=Path, default=Path(), metavar="DIR", help=what)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, for machines")
    what = "most to read of the checkpoint per rank (default: 2)"
    parser.add_argument("--read-gib", type=float, default=2.0, metavar="X", help=what)
    what = "bound for JAX's start and the all-reduce (default: 60)"
    parser.add_argument("--timeout-s", type=float, default=60.0, metavar="S", help=what)
    what = "bound until all ranks are there (default: 120)"
    parser.add_argument("--start-s", type=float, default=120.0, metavar="S", help=what)
    add_process_options(parser)
    args = parser.parse_args(argv)
    if len({args.coordinator is None, args.num_processes is None, args.process_id is None}) > 1:
        parser.error("--coordinator, --num-processes and --process-id belong together")
    for name in ("read_gib", "timeout_s", "start_s"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')}: found {getattr(args, name)}, legal is above 0")
    return args


def examine(args: argparse.Namespace, launch: Launch | None) -> int:
    """The whole examination; the exit status of this process."""
    alone = Launch("127.0.0.1", (), 1, 0, None, (socket.gethostname(),), "alone")
    where, common = launch or alone, []
    try:
        meeting = meet(where, args.start_s)
    except ClusterError as problem:
        if where.process_id:
            return _cannot(problem)
        fix = "end the other program, or another --port (without Slurm: another port in --coordinator)"
        if isinstance(problem, SecretError):
            fix = f"a secret that all ranks have: {VARIABLE}"
        common.append(error("ranks", str(problem), fix))
        meeting = Meeting(where)
        meeting.missing = dict.fromkeys(range(1, where.num_processes), "cannot come: rank 0 does not listen")
    report = Report(where.process_id, socket.gethostname(), {"clock_s": meeting.clock_s})
    local_checks(args, launch, where, report)
    try:
        return _together(args, where, meeting, report, common)
    except ClusterError as problem:
        return _cannot(problem)
    finally:
        meeting.close()


def _cannot(problem: ClusterError) -> int:
    sys.stderr.write(f"jaxinfer.doctor: error: {problem}\n")
    return 1


def local_checks(args: argparse.Namespace, launch: Launch | None, where: Launch, report: Report) -> None:
    """What a rank can say by itself; in bounded time."""
    env, ports = os.environ, [port.name for port in infiniband_ports() if port.active]
    report.facts["infiniband"] = ports
    visible: list[dict[str, Any]] = []
    deadline = time.monotonic() + LOCAL_SECONDS

    def gpus() -> tuple[list[Finding], dict[str, Any]]:
        visible.extend(visible_gpus(env))
        own = range(len(visible)) if where.gpus is None or not visible else where.gpus
        return gpu_findings(visible, own), {"gpus": [visible[index] for index in own if index < len(visible)]}

    def folders() -> tuple[list[Finding], dict[str, Any]]:
        cache = check_cache(env)
        # only process 0 writes results
        return [*([] if where.process_id else check_folder("output", args.output_dir)), *cache], {}

    def checkpoint() -> tuple[list[Finding], dict[str, Any]]:
        most = int(args.read_gib * 2**30)
        return check_checkpoint(args.model, where.process_id, where.num_processes, most)

    def look(name: str, check: Check) -> None:
        bounded(report, name, check, deadline - time.monotonic())

    look("launch", lambda: check_step(env, launch))
    look("GPUs", gpus)
    look("host", lambda: check_host(env, bool(visible), bool(ports)))
    look("CUDA", lambda: check_cuda(env, len(visible), container(env)))
    look("versions", lambda: check_versions(env))
    look("folders", folders)
    if args.model is not None:
        look("checkpoint", checkpoint)


def _together(args: argparse.Namespace, where: Launch, meeting: Meeting, report: Report, common: list[Finding]) -> int:
    patience = LOCAL_SECONDS + MARGIN_SECONDS
    found = meeting.gather(report.to_json(), patience)
    reports = [Report.from_json(each) for each in found or [] if each is not None]
    gpus = any(each.facts.get("gpus") or each.facts.get("no_nvml") for each in reports)
    plan = None
    if not meeting.missing and found is not None:
        # its probe takes the port, of the same user
        coordinator, _kept = keep_coordinator(where)
        plan = {"coordinator": coordinator, "gpus": gpus}
    # who was quick waits for rank 0, and rank 0 for who is slow
    plan = meeting.share(plan, LOCAL_SECONDS + patience + MARGIN_SECONDS)
    result = plan and run_probe(os.environ, where, plan["coordinator"], plan["gpus"], args.timeout_s)
    patience = args.timeout_s + MARGIN_SECONDS
    results = meeting.gather(result, patience)
    status = 0
    if results is not None:
        lost = missing_ranks(meeting.missing, where.hosts, where.place)
        common += [*compare(reports), *_probe_findings(reports, results, gpus, plan is not None)]
        lines = merge(reports, [*common, *refused_peers(meeting.refused), *lost])
        print_answer(reports, lines, where.num_processes)
        status = int(any(line.finding.level == ERROR for line in lines))
        try:
            if args.json:
                write_answer(args.json, reports, lines, results)
        except OSError as problem:
            sys.stderr.write(f"jaxinfer.doctor: error: --json {args.json}: {problem.strerror}\n")
            status = 1
    return meeting.share(status, patience + MARGIN_SECONDS)


def _probe_findings(reports: list[Report], results: list[Any], gpus: bool, ran: bool) -> list[Finding]:
    if not ran:
        return [warning("all-reduce", "not tried, since ranks are missing", "first see why they are missing")]
    names = [report.name for report in reports]
    findings = collective_findings(results, names, gpus)
    logs = [result["nccl"] for result in results if result and result["nccl"]]
    if logs:
        ports = sorted({port for report in reports for port in report.facts["infiniband"]})
        nvlink = any(gpu["nvlinks"] for report in reports for gpu in report.facts.get("gpus", []))
        findings += transport_findings(merge_nccl(logs), ports, nvlink, reports[0].facts.get("container", ""))
    return findings


if __name__ == "__main__":
    main()
