"""``python -m slurm.submit``: from the login node, one run from the job script to the figures."""

import argparse
import json
import os
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import attrs

from jaxinfer.checkpoint.files import write_whole
from jaxinfer.checkpoint.manifest import read_manifest
from jaxinfer.presets import load_preset
from jaxinfer.screen import escape_unencodable
from slurm import jobs, runs, shards
from slurm.collect import collect
from slurm.follow import follow
from slurm.inside import run_inside, step_options
from slurm.presets import Cluster, PresetError, describe, find_cluster, read_cluster
from slurm.render import FOLDER, render
from slurm.runs import PROGRAM, UsageError

FIELD = "preset_"  # of the options that stand for fields of the preset
# options of generate that this command gives
OURS = ("--model", "--preset", "--random-weights", "--prompts", "--prompt", "--output", "--mesh")
EXAMPLES = """
examples:
  See the job script, submit nothing:
    python -m slurm.submit --cluster leonardo-booster --account PROJECT --nodes 2 \\
      --model ckpt/llama --prompts in.jsonl --output-dir runs/first --dry-run

  The whole round; what follows -- goes to python -m jaxinfer.generate:
    ... --output-dir runs/first -- --max-new-tokens 200 --temperature 0.8

  The prompts in eight shards, a job of its own for each:
    ... --output-dir runs/first --array 8

  A published model's speed without its weights (the prompts have prompt_token_ids alone):
    ... --preset falcon-40b --random-weights --prompts in.jsonl --output-dir runs/speed

  In an allocation that is there already (salloc), as a step of it:
    ... --output-dir runs/first --inside

  Look again at a job that runs or has ended; collects what is there:
    python -m slurm.submit --follow runs/first

  The same in steps, for scripts; each prints one line of JSON:
    ... --output-dir runs/first --no-follow
    python -m slurm.submit --status runs/first
    python -m slurm.submit --collect runs/first
    python -m slurm.submit --show-cluster leonardo-booster

In the run folder: job.sh, submit.json (job id), job.log, logs/ (one per rank), out.jsonl, out.metrics.json,
out.run.json, sacct.json, out.png. Run the same command again to continue what a job left unfinished.
"""


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 complete, 1 the job failed, 2 bad usage, 130 no longer followed; sbatch's own if it refused."""
    escape_unencodable()
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    try:
        if args.show_cluster is not None:
            return _show_cluster(args.show_cluster, _changes(args))
        if args.status is not None:
            return _status(args.status)
        if args.collect is not None:
            return _collect(args.collect.absolute())
        if args.follow is not None:
            return _follow(args.follow.absolute(), args.poll_s)
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
    what = "preset: a name of configs/clusters (generic, leonardo-booster, ...) or a file"
    parser.add_argument("--cluster", metavar="NAME", help=what)
    parser.add_argument("--model", type=Path, metavar="CKPT_DIR", help="checkpoint folder of python -m convert")
    what = "a model of configs/models: --model has to be it; without --model, --random-weights are its weights"
    parser.add_argument("--preset", metavar="NAME", help=what)
    parser.add_argument("--random-weights", action="store_true", help="weights made on the devices, none read")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="FILE.jsonl or FILE.txt")
    parser.add_argument("--output-dir", type=Path, metavar="RUN", help="folder of the run, on a shared file system")
    parser.add_argument("--mesh", default="auto", help="default: tensor inside a node, stage across nodes")
    parser.add_argument("--array", type=int, metavar="N", help="cut the prompts into N shards, a job for each")
    parser.add_argument("--dry-run", action="store_true", help="print the job script, submit nothing")
    parser.add_argument("--no-follow", action="store_true", help="submit, print the job's id as a line of JSON, end")
    what = "run as a step of the allocation that this command is in, and wait; nothing is submitted"
    parser.add_argument("--inside", action="store_true", help=what)
    parser.add_argument("--poll-s", type=float, default=10.0, metavar="S", help="seconds between looks (default: 10)")
    group = parser.add_argument_group("in place of all that, about what is there")
    modes = group.add_mutually_exclusive_group()
    modes.add_argument("--follow", type=Path, metavar="RUN", help="follow the job of that run folder to its end")
    what = "a line of JSON for each run folder: job, state, ended, reason, nodes, results, expected"
    modes.add_argument("--status", type=Path, nargs="+", metavar="RUN", help=what)
    what = "of a job that has ended: sacct.json, merged results, out.png; exit status as after following it"
    modes.add_argument("--collect", type=Path, metavar="RUN", help=what)
    modes.add_argument("--show-cluster", metavar="NAME", help="a line of JSON: what a preset says of its nodes")
    group = parser.add_argument_group("instead of what the preset says")
    for name, field in attrs.fields_dict(Cluster).items():
        if "help" in field.metadata and name != "about":
            kind = int if field.type is int else str
            choices = field.metadata.get("choices")
            form = {"choices": choices} if choices else {"metavar": "N" if kind is int else "TEXT"}
            what = field.metadata["help"]
            group.add_argument(f"--{name.replace('_', '-')}", type=kind, dest=f"{FIELD}{name}", help=what, **form)
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    args.options = argv[cut + 1 :]
    if not (args.follow or args.status or args.collect or args.show_cluster is not None):
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
    if args.inside and (args.array is not None or args.no_follow):
        found = "--no-follow" if args.no_follow else "--array"
        parser.error(f"--inside runs one step and waits: found {found} beside it")
    if args.poll_s <= 0:
        parser.error(f"--poll-s: found {args.poll_s:g}, legal is more than 0")
    return args


def _submit(args: argparse.Namespace) -> int:
    path = find_cluster(args.cluster)
    cluster = read_cluster(path, _changes(args))
    run = args.output_dir.absolute()
    with runs.usage():
        total = sum(
            samples for _, samples in shards.expected(args.prompts, _samples([*cluster.options, *args.options]))
        )
    if not total:
        raise UsageError(f"{args.prompts}: there is no prompt in it")
    _check_model(args)
    name = f"{run.name}-{uuid.uuid4().hex[:8]}"  # by which the accounting knows the step
    step = step_options(cluster, name, os.environ) if args.inside else []
    script = _script(args, cluster, path, run, step)
    if args.dry_run:
        print(script, end="")
        return 0
    _refuse_running(run)
    with runs.usage():
        write_whole(run / "job.sh", script.encode())
    told = {
        "job": os.environ["SLURM_JOB_ID"] if step else None,
        "step": name if step else None,
        "previous": runs.previous(run),
        "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "prompts": str(args.prompts.absolute()),
        "results": total,
        "shards": args.array,
        "command": sys.argv,
        "cluster": attrs.asdict(cluster),
    }
    runs.write(run, told)  # killed from here on, or sbatch's answer lost: the job is looked up
    if step:
        status, state = run_inside(run, told)
        collected = collect(run, told, state)
        return status or collected
    told["job"] = jobs.submit(run / "job.sh")
    runs.write(run, told)
    if args.no_follow:
        print(json.dumps({"job": told["job"], "run": str(run)}))
        return 0
    print(f"job {told['job']} submitted: {run / 'job.sh'}", file=sys.stderr)
    return _follow(run, args.poll_s)


def _changes(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of the preset that options give."""
    given = {name.removeprefix(FIELD): value for name, value in vars(args).items() if name.startswith(FIELD)}
    return {name: value for name, value in given.items() if value is not None}


def _check_model(args: argparse.Namespace) -> None:
    if args.model is not None and not (args.model / "manifest.json").exists():
        raise UsageError(f"{args.model}: no checkpoint (manifest.json is missing): python -m convert makes one")
    if args.preset is not None:
        with runs.usage():
            preset = load_preset(args.preset)
            manifest = preset.manifest if args.model is None else read_manifest(args.model)
            preset.check_manifest(args.model or args.preset, manifest)


def _script(args: argparse.Namespace, cluster: Cluster, preset: Path, run: Path, step: list[str]) -> str:
    name = "generate-array.sh" if args.array else "generate-multi.sh" if cluster.nodes > 1 else "generate.sh"
    variables = {
        "RUN": str(run),
        "MODEL": "" if args.model is None else str(args.model.absolute()),
        "PROMPTS": str(args.prompts.absolute()),
        "MESH": args.mesh,
        "PYTHON": cluster.python,
    }
    folder = str(run).replace("%", "%%")  # Slurm would put a job's id, say, in the place of one
    sbatch = [f"--job-name={run.name}", f"--chdir={FOLDER.parent}"]
    if args.array:
        variables["SHARDS"] = str(args.array)
        sbatch += [f"--array=0-{args.array - 1}", f"--output={folder}/job-%a.log"]
    else:
        sbatch.append(f"--output={folder}/job.log")
    model = ([] if args.preset is None else ["--preset", args.preset]) + ["--random-weights"] * args.random_weights
    return render(name, cluster, preset, sbatch, step, variables, model + args.options)


def _refuse_running(run: Path) -> None:
    try:
        told = runs.read(run)
    except UsageError:  # nothing was submitted for it; a folder that was emptied may have a job all the same
        for job in jobs.of_script(run / "job.sh", jobs.ALIVE):
            raise UsageError(f"{run}: job {job} of its job.sh is in the queue; end it first: scancel {job}") from None
        return
    state = runs.state(told)
    if not state.ended:
        raise UsageError(f"{run}: {runs.name(told)} is {state}; follow it: python -m {PROGRAM} --follow {run}")


def _follow(run: Path, poll_s: float) -> int:
    told = runs.read(run)
    try:
        state = follow(runs.name(told), lambda: runs.state(told), runs.outputs(run, told), told["results"], poll_s)
    except KeyboardInterrupt:
        end = "" if told.get("step") else f"   end it: scancel {told['job']}"
        print(f"\n{runs.name(told)} goes on. Follow it: python -m {PROGRAM} --follow {run}{end}", file=sys.stderr)
        return 130
    return collect(run, told, state)


def _collect(run: Path) -> int:
    told = runs.read(run)
    state = runs.state(told)
    if not state.ended:
        raise UsageError(f"{run}: {runs.name(told)} is {state}: there is nothing to collect yet")
    return collect(run, told, state)


def _show_cluster(text: str, changes: dict[str, Any]) -> int:
    path = find_cluster(text)
    print(json.dumps(describe(path.stem, read_cluster(path, changes))))
    return 0


def _status(folders: list[Path]) -> int:
    for run in folders:
        print(json.dumps(runs.status(run.absolute())), flush=True)
    return 0


def _samples(options: list[str]) -> int:
    """Results per prompt that the options of generate ask for."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--n", type=int, default=1)
    return parser.parse_known_args(options)[0].n


if __name__ == "__main__":
    sys.exit(main())
