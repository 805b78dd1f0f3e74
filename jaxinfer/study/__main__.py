"""``python -m jaxinfer.study``: a study file to measured cells, tables and figures."""

import argparse
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxinfer import __version__
from jaxinfer.options import Parser, seconds_option
from jaxinfer.screen import escape_unencodable
from jaxinfer.study.errors import StudyError, unknown

PROGRAM = "jaxinfer.study"

EXAMPLES = """
examples:
  What would run, whether it can, and how long it takes; nothing runs:
    python -m jaxinfer.study check configs/studies/laptop.yaml

  Measures every cell that is not measured yet; run again after a kill, it does the rest:
    python -m jaxinfer.study run configs/studies/laptop.yaml --output studies/laptop

  On a cluster, from its login node: a job per cell. In an allocation (salloc, sbatch) cells are steps of it:
    python -m jaxinfer.study run configs/studies/leonardo.yaml --output studies/leonardo --cluster leonardo-booster

  The command lines of one experiment, to paste:
    python -m jaxinfer.study run FILE --output DIR --only strong --dry-run

  How far it is; tables and figures of what is measured, at any time:
    python -m jaxinfer.study status DIR
    python -m jaxinfer.study tables DIR
    python -m jaxinfer.study figures DIR

docs/study.md has the study file, the folder and what every figure means.

exit status: 0 done (cells that cannot be here are skipped, with the reason); 1 a cell failed or can be nowhere, or the
  disk is full; 2 the study file, an option or the place is wrong, and the line says what would be right; 130
  interrupted, and the same command goes on.
"""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog=PROGRAM,
        description="Declared experiments, measured cell by cell: correctness, scaling, batch size, optimizations.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"jaxinfer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, what in (("check", "what would run, and how long; runs nothing"), ("run", "measure what is missing")):
        command = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
        command.add_argument("file", metavar="FILE", help="a study file, or the name of one of configs/studies")
        what = "preset of configs/clusters or a file, over the study's own"
        command.add_argument("--cluster", metavar="NAME", help=what)
        command.add_argument("--only", metavar="EXPERIMENT", help="its cells alone")
        what = "FILE.jsonl or FILE.txt, in place of the study's own file of prompts"
        command.add_argument("--prompts", metavar="FILE", help=what)
        if name == "run":
            command.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the study")
            command.add_argument(
                "--dry-run", action="store_true", help="print the command lines, write DIR/prompts, run nothing"
            )
            what = "seconds between looks at the queue (default: 10)"
            command.add_argument("--poll-s", type=seconds_option, default=10.0, metavar="S", help=what)
    for name, what in (
        ("status", "how far a study is"),
        ("tables", "write DIR/tables from DIR/cells"),
        ("figures", "write DIR/figures from DIR/cells"),
    ):
        command = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
        command.add_argument("dir", type=Path, metavar="DIR", help="folder of a study")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    escape_unencodable()
    args = parse_arguments(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _interrupt)
    try:
        status = COMMANDS[args.command](args)
        sys.stdout.flush()
        sys.exit(status)
    except StudyError as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever read the screen, head say, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        what = "; what is measured stays, and the same command goes on" if args.command == "run" else ""
        print(f"{PROGRAM}: error: {name}{error.strerror or error}{what}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: interrupted; {_how_to_go_on(args)}", file=sys.stderr)
        sys.exit(130)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _how_to_go_on(args: argparse.Namespace) -> str:
    if args.command != "run":
        return "nothing was changed"
    again = shlex.join(["python", "-m", PROGRAM, *sys.argv[1:]])
    return f"what is measured stays; go on with: {again}"


def _open(args: argparse.Namespace, needed: bool) -> Any:
    """The study, where it runs, and its cells. `needed`: checkpoints have to be there."""
    from jaxinfer.study.expand import expand
    from jaxinfer.study.file import find_study, read_study, with_prompts
    from jaxinfer.study.models import know
    from jaxinfer.study.place import find_place

    args.file = find_study(args.file)
    study = read_study(args.file)
    if args.prompts is not None:
        study = with_prompts(study, args.prompts)
    if args.only is not None and args.only not in study.experiments:
        raise StudyError(f"--only: {unknown('experiment', args.only, study.experiments)}")
    try:
        place = find_place(study, args.cluster)
        models = {name: know(name, declared, needed) for name, declared in study.models.items()}
        return study, place, expand(study, place, models)
    except StudyError as error:
        raise StudyError(f"{args.file}: {error}") from None


def _check(args: argparse.Namespace) -> int:
    from jaxinfer.study.check import find, show

    _, place, cells = _open(args, needed=False)
    return show(find([cell for cell in cells if args.only in (None, cell.experiment)], place), place)


def _run(args: argparse.Namespace) -> int:
    import shutil

    from jaxinfer.study.check import reasons
    from jaxinfer.study.runner import run_study

    study, place, cells = _open(args, needed=not args.dry_run)
    if args.dry_run:
        return _dry_run(args, place, cells)
    if place.cluster is not None and shutil.which("sbatch") is None:
        raise StudyError(
            f"cluster {place.cluster}: no Slurm here (sbatch is not on the PATH); run this on a login node, or leave "
            "the cluster out to run the cells on this host"
        )
    return run_study(
        study, args.file, cells, lambda left: reasons(left, place), place, args.output, args.only, args.poll_s, _say
    )


def _dry_run(args: argparse.Namespace, place: Any, cells: list[Any]) -> int:
    from jaxinfer.study.check import reasons
    from jaxinfer.study.command import command, environment, line
    from jaxinfer.study.folder import is_done, write_prompts

    wanted = [cell for cell in cells if args.only in (None, cell.experiment)]
    why = reasons(wanted, place)
    if able := [cell for cell in wanted if cell.folder not in why]:
        write_prompts(able, args.output)
        _say(f"wrote the prompts of these commands to {args.output / 'prompts'}, and nothing else")
    for cell in wanted:
        if cell.folder in why:
            print(f"# {cell.label}: skipped: {why[cell.folder]}")
            continue
        print(f"# {cell.label}{': measured already' if is_done(cell, args.output) else ''}")
        print(line(command(cell, args.output, place), environment(cell, place)))
    return 0


def _status(args: argparse.Namespace) -> int:
    from jaxinfer.study.show import status

    return status(args.dir)


def _tables(args: argparse.Namespace) -> int:
    from jaxinfer.study.tables import write_tables

    _refuse_other(args.dir)
    write_tables(args.dir)
    return _name_files(args.dir / "tables")


def _figures(args: argparse.Namespace) -> int:
    from jaxinfer.study.figures import write_figures

    _refuse_other(args.dir)
    write_figures(args.dir)
    return _name_files(args.dir / "figures")


def _refuse_other(folder: Path) -> None:
    if not (folder / "cells").is_dir():
        how = f"python -m {PROGRAM} run FILE --output {folder} makes one"
        raise StudyError(f"{folder}: no study (cells/ is missing); {how}")


def _name_files(folder: Path) -> int:
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        print(path)
    return 0


def _say(text: str) -> None:
    tqdm.write(f"{PROGRAM}: {text}", file=sys.stderr)
    sys.stderr.flush()


COMMANDS = {"check": _check, "run": _run, "status": _status, "tables": _tables, "figures": _figures}

if __name__ == "__main__":
    main()
