"""``python -m slurm.submit``: from the login node, one run from the job script to the figures."""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from jaxinfer.checkpoint.files import write_json, write_whole
from jaxinfer.checkpoint.manifest import read_manifest
from jaxinfer.presets import load_preset
from jaxinfer.screen import escape_unencodable
from slurm import jobs, shards
from slurm.follow import follow
from slurm.presets import Cluster, PresetError, read_cluster
from slurm.render import FOLDER, render

PROGRAM = "slurm.submit"
SHOWN_LINES = 20
SHOWN_TASKS = 3  # of an array, with their logs
# options of generate that this command gives
OURS = ("--model", "--preset", "--random-weights", "--prompts", "--prompt", "--output", "--mesh")
EXAMPLES = """
examples:
  See the job script, submit nothing:
    python -m slurm.submit --cluster configs/clusters/leonardo-booster.yaml --account PROJECT --nodes 2 \\
      --model ckpt/llama --prompts in.jsonl --output-dir runs/first --dry-run

  The whole round; what follows -- goes to python -m jaxinfer.generate:
    ... --output-dir runs/first -- --max-new-tokens 200 --temperature 0.8

  The prompts in eight shards, a job of its own for each:
    ... --output-dir runs/first --array 8

  A published model's speed without its weights (the prompts have prompt_token_ids alone):
    ... --preset falcon-40b --random-weights --prompts in.jsonl --output-dir runs/speed

  Look again at a job that runs or has ended; collects what is there:
    python -m slurm.submit --follow runs/first

In the run folder: job.sh, submit.json (job id), job.log, logs/ (one per rank), out.jsonl, out.metrics.json,
out.run.json, sacct.json, out.png. Run the same command again to continue what a job left unfinished.
"""


class UsageError(Exception):
    """What the user can mend: one line."""


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 complete, 1 the job failed, 2 bad usage, 130 no longer followed; sbatch's own if it refused."""
    escape_unencodable()
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    try:
        if args.follow is not None:
            return _follow(args.follow, args.poll_s)
        return _submit(args)
    except (UsageError, PresetError) as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    except jobs.SlurmError as error:
        print(error, file=sys.stderr)
        return error.status


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}",
        description="Submits a run to Slurm, follows it, and collects what came of it in one folder.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--cluster", type=Path, metavar="FILE.yaml", help="preset, configs/clusters/*.yaml")
    parser.add_argument("--model", type=Path, metavar="CKPT_DIR", help="checkpoint folder of python -m convert")
    what = "a model of configs/models: --model has to be it; without --model, --random-weights are its weights"
    parser.add_argument("--preset", metavar="NAME", help=what)
    parser.add_argument("--random-weights", action="store_true", help="weights made on the devices, none read")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="FILE.jsonl or FILE.txt")
    parser.add_argument("--output-dir", type=Path, metavar="RUN", help="folder of the run, on a shared file system")
    parser.add_argument("--mesh", default="auto", help="default: tensor inside a node, stage across nodes")
    parser.add_argument("--array", type=int, metavar="N", help="cut the prompts into N shards, a job for each")
    parser.add_argument("--dry-run", action="store_true", help="print the job script, submit nothing")
    parser.add_argument("--follow", type=Path, metavar="RUN", help="follow the job of that run folder")
    parser.add_argument("--poll-s", type=float, default=10.0, metavar="S", help="seconds between looks (default: 10)")
    group = parser.add_argument_group("instead of what the preset says")
    for name, field in attrs.fields_dict(Cluster).items():
        if "help" in field.metadata and name != "about":
            kind = int if field.type is int else str
            choices = field.metadata.get("choices")
            form = {"choices": choices} if choices else {"metavar": "N" if kind is int else "TEXT"}
            what = field.metadata["help"]
            group.add_argument(f"--{name.replace('_', '-')}", type=kind, dest=f"preset_{name}", help=what, **form)
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    args.options = argv[cut + 1 :]
    if args.follow is None:
        missing = [name for name in ("cluster", "prompts", "output_dir") if getattr(args, name) is None]
        if missing:
            parser.error(f"--{missing[0].replace('_', '-')} is missing (or --follow RUN)")
        if args.model is None and (args.preset is None or not args.random_weights):
            parser.error("give --model CKPT_DIR, or --preset NAME --random-weights (or --follow RUN)")
    taken = next((word for word in args.options if word.split("=")[0] in OURS), None)
    if taken:
        parser.error(f"{taken} after --: give it before, or leave it to this command")
    if args.array is not None and args.array < 1:
        parser.error(f"--array: found {args.array}, legal is 1 or more")
    if args.poll_s <= 0:
        parser.error(f"--poll-s: found {args.poll_s:g}, legal is more than 0")
    return args


def _submit(args: argparse.Namespace) -> int:
    changes = {name.removeprefix("preset_"): value for name, value in vars(args).items()
               if name.startswith("preset_") and value is not None}  # fmt: skip
    cluster = read_cluster(args.cluster, changes)
    run = args.output_dir.absolute()
    with _usage():
        total = sum(
            samples for _, samples in shards.expected(args.prompts, _samples([*cluster.options, *args.options]))
        )
    if not total:
        raise UsageError(f"{args.prompts}: there is no prompt in it")
    _check_model(args)
    script = _script(args, cluster, run)
    if args.dry_run:
        print(script, end="")
        return 0
    _refuse_running(run)
    with _usage():
        run.mkdir(parents=True, exist_ok=True)
        write_whole(run / "job.sh", script.encode())
    job = jobs.submit(run / "job.sh")
    _write(run / "submit.json", {
        "job": job,
        "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "prompts": str(args.prompts.absolute()),
        "results": total,
        "shards": args.array,
        "command": sys.argv,
        "cluster": attrs.asdict(cluster),
    })  # fmt: skip
    print(f"job {job} submitted: {run / 'job.sh'}", file=sys.stderr)
    return _follow(run, args.poll_s)


def _check_model(args: argparse.Namespace) -> None:
    if args.model is not None and not (args.model / "manifest.json").exists():
        raise UsageError(f"{args.model}: no checkpoint (manifest.json is missing): python -m convert makes one")
    if args.preset is not None:
        with _usage():
            preset = load_preset(args.preset)
            manifest = preset.manifest if args.model is None else read_manifest(args.model)
            preset.check_manifest(args.model or args.preset, manifest)


def _script(args: argparse.Namespace, cluster: Cluster, run: Path) -> str:
    name = "generate-array.sh" if args.array else "generate-multi.sh" if cluster.nodes > 1 else "generate.sh"
    variables = {
        "RUN": str(run),
        "MODEL": "" if args.model is None else str(args.model.absolute()),
        "PROMPTS": str(args.prompts.absolute()),
        "MESH": args.mesh,
        "PYTHON": cluster.python,
    }
    sbatch = [f"--job-name={run.name}", f"--chdir={FOLDER.parent}"]
    if args.array:
        variables["SHARDS"] = str(args.array)
        sbatch += [f"--array=0-{args.array - 1}", f"--output={run}/job-%a.log"]
    else:
        sbatch.append(f"--output={run}/job.log")
    model = ([] if args.preset is None else ["--preset", args.preset]) + ["--random-weights"] * args.random_weights
    return render(name, cluster, args.cluster, sbatch, variables, model + args.options)


def _refuse_running(run: Path) -> None:
    if (run / "submit.json").exists():
        job = _read_submit(run)["job"]
        state = jobs.state(job)
        if state is not None and not state.ended:
            raise UsageError(f"{run}: job {job} is {state}; follow it: python -m {PROGRAM} --follow {run}")


def _follow(run: Path, poll_s: float) -> int:
    told = _read_submit(run)
    job, outputs = told["job"], _outputs(run, told["shards"])
    try:
        state = follow(job, outputs, told["results"], poll_s)
    except KeyboardInterrupt:
        print(f"\njob {job} goes on. Follow it: python -m {PROGRAM} --follow {run}   end it: scancel {job}",
              file=sys.stderr)  # fmt: skip
        return 130
    state = _account(run, job, told["shards"] or 1, state)
    missing = _merge(run, told, outputs) if told["shards"] else _missing(outputs[0], told["results"])
    _draw(run, outputs)
    if state.name not in ("COMPLETED", "UNKNOWN") or missing:
        _show_failure(run, job, state, missing)
        return 1
    _show_success(run, job, outputs)
    return 0


def _read_submit(run: Path) -> dict[str, Any]:
    try:
        return json.loads((run / "submit.json").read_bytes())
    except FileNotFoundError:
        raise UsageError(f"{run}: submit.json is missing: no job was submitted for this folder") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{run / 'submit.json'}: {error}") from None


def _outputs(run: Path, count: int | None) -> list[Path]:
    return [run / "out.jsonl"] if count is None else [run / "parts" / f"{shard}.jsonl" for shard in range(count)]


def _account(run: Path, job: str, tasks: int, state: jobs.State) -> jobs.State:
    """Keeps the accounting; the state from there if the queue has forgotten the job."""
    try:
        records = jobs.accounting(job, tasks)
    except jobs.SlurmError as error:
        print(f"{PROGRAM}: WARNING: no accounting: {error}", file=sys.stderr)
        return state
    _write(run / "sacct.json", records)
    return state if state.ended else jobs.last_state(records)


def _merge(run: Path, told: dict[str, Any], parts: list[Path]) -> str:
    """Merges the shards' results; what is missing, "" if nothing is."""
    prompts = Path(told["prompts"])
    try:
        missing = shards.unfinished(prompts, parts)
        if missing:
            return f"results of shard{'s'[: len(missing) > 1]} {_listed(missing)} are missing"
        shards.merge(prompts, parts, run / "out.jsonl")
    except (ValueError, OSError) as error:
        return f"the results in parts/ cannot be merged: {error}"
    return ""


def _missing(output: Path, results: int) -> str:
    try:
        with open(output, "rb") as file:
            if sum(line.endswith(b"\n") for line in file) >= results:
                return ""
    except OSError:
        pass
    return "results are missing"


def _listed(tasks: Iterable[int]) -> str:
    tasks = list(tasks)
    shown = ", ".join(map(str, tasks[:SHOWN_LINES]))
    return shown + (f" and {len(tasks) - SHOWN_LINES} more" if len(tasks) > SHOWN_LINES else "")


def _draw(run: Path, outputs: list[Path]) -> None:
    """A picture of the outputs that have results; a job that failed may have left some without."""
    from jaxinfer.plot import PlotError, draw, read_run

    shown, refused = [], []
    for path in outputs:
        try:
            read_run(path, path.name)
            shown.append(path)
        except PlotError as error:
            refused.append(error)
    try:
        if not shown:
            raise refused[0]
        draw(shown, run / "out.png")
    except PlotError as error:
        print(f"{PROGRAM}: WARNING: no figure: {error}", file=sys.stderr)
        return
    if refused:
        print(f"{PROGRAM}: out.png shows the results of {len(shown)} of {len(outputs)} shards", file=sys.stderr)


def _show_failure(run: Path, job: str, state: jobs.State, missing: str) -> None:
    if state.tasks:
        _show_tasks(run, job, state.failed)
    else:
        _show_logs(run / "logs", run / "job.log")
    what = f"{missing}; the same command continues" if missing else "all results are there"
    print(f"job {job} ended: {state}; {what}; logs: {run / 'logs'} and {run}/job*.log", file=sys.stderr)


def _show_tasks(run: Path, job: str, failed: Mapping[int, jobs.State]) -> None:
    for task in list(failed)[:SHOWN_TASKS]:
        print(f"job {job}, task {task} ended: {failed[task]}", file=sys.stderr)
        _show_logs(run / "logs" / str(task), run / f"job-{task}.log")
    if more := list(failed)[SHOWN_TASKS:]:
        print(f"job {job}, tasks {_listed(more)} ended badly too", file=sys.stderr)


def _show_logs(folder: Path, job_log: Path) -> None:
    """The last lines of rank 0's newest log, and of the job's."""
    ranks = sorted(folder.glob("rank-0-*.log"), key=lambda path: path.stat().st_mtime)
    for path in (*ranks[-1:], job_log):
        if path.exists() and path.stat().st_size:
            lines = path.read_text("utf-8", errors="replace").splitlines()[-SHOWN_LINES:]
            print(f"---- last lines of {path}", *lines, sep="\n", file=sys.stderr)


def _show_success(run: Path, job: str, outputs: list[Path]) -> None:
    tokens = seconds = 0.0
    for output in outputs:
        try:
            metrics = json.loads((output.parent / f"{output.stem}.metrics.json").read_bytes())
        except (OSError, ValueError):
            continue
        tokens, seconds = tokens + metrics.get("output_tokens", 0), max(seconds, metrics.get("wall_s", 0))
    rate = f": {tokens:,.0f} tokens, {tokens / seconds:,.0f} per second in the last attempt" if seconds else ""
    print(f"job {job} is complete{rate}\n{run}:", file=sys.stderr)
    for path in sorted(run.iterdir()):
        print(f"  {path.name}{'/' if path.is_dir() else ''}", file=sys.stderr)


def _samples(options: list[str]) -> int:
    """Results per prompt that the options of generate ask for."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--n", type=int, default=1)
    return parser.parse_known_args(options)[0].n


def _write(path: Path, data: Any) -> None:
    with _usage():
        write_json(path, data)


@contextmanager
def _usage() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"{error.filename}: {os.strerror(error.errno)}") from error
    except ValueError as error:
        raise UsageError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
