"""Command line options that commands share: where to run, the engine, sampling."""

import argparse
import os
from pathlib import Path
from typing import Any, NoReturn

import attrs

from jaxinfer.cluster.pulse import Limits
from jaxinfer.engine.config import DTYPES, KERNELS, EngineConfig
from jaxinfer.engine.params import SamplingParams


class Parser(argparse.ArgumentParser):
    """Errors take one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help explains)\n")


def writable(path: Path) -> bool:
    """Whether a file can be written there, by `write_whole`, which makes the folders that are missing."""
    whole = path.absolute()
    there = next(each for each in (whole, *whole.parents) if os.path.exists(each))
    return not path.is_dir() and (there == whole or there.is_dir()) and os.access(there, os.W_OK)


def file_to_write(text: str) -> Path:
    """An option's type: known before the run, whose figures would be lost."""
    if not writable(Path(text)):
        raise argparse.ArgumentTypeError(f"{text}: cannot be written")
    return Path(text)


def add_place_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where to run it")
    group.add_argument(
        "--mesh",
        default="auto",
        metavar="AXES",
        help="stage=2,data=1,tensor=2, where an axis left out is 1 (default: all devices, tensor inside a node and "
        "stage across nodes)",
    )
    group.add_argument("--cpu-devices", type=int, metavar="N", help="run on N virtual CPU devices")
    add_process_options(parser)


def add_process_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "several processes",
        "Inside an srun step nothing of this is needed: Slurm says who is who. Processes prove themselves to each\n"
        "other by munge, ~/.config/jaxinfer/secret or the file in JAXINFER_SECRET_FILE (slurm/FAILURES.md).",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="without Slurm: address of process 0")
    group.add_argument("--num-processes", type=int, metavar="N", help="without Slurm: how many")
    group.add_argument("--process-id", type=int, metavar="I", help="without Slurm: which one this is, from 0")
    group.add_argument(
        "--port", type=int, metavar="N", help="under srun: where rank 0 listens (default: of job and step)"
    )


def add_profile_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("profiling and monitoring")
    what = "trace some steps, on GPUs as many again without CUDA graphs; tensorboard --logdir DIR (docs/profiling.md)"
    group.add_argument("--profile", metavar="DIR", help=what)
    what = "which steps, from 0: a dispatch each; earlier and fewer where the run has less (default: 20:30)"
    group.add_argument("--profile-steps", type=_steps, default=(20, 30), metavar="FIRST:LAST", help=what)
    what = "sample the GPUs ten times a second into OUT.gpu.csv: use, memory, power, energy, temperature, clocks, "
    what += "traffic (default: auto, where there is an output and NVML)"
    group.add_argument("--monitor", choices=("auto", "off"), default="auto", help=what)
    what = "compile all programs, and run each once, before the first request begins: no time is then of compiling"
    group.add_argument("--warm-up", action="store_true", help=what)
    what = "run the requests N times after a --warm-up, to know how figures vary; results are of the first time. Steps "
    what += "of --profile are then of one more time, in no figure"
    group.add_argument("--repeats", type=_repeats, metavar="N", help=what)


def _repeats(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, legal is a whole number of at least 1")
    return int(text)


def _steps(text: str) -> tuple[int, int]:
    try:
        first, last = (int(each) for each in text.split(":"))
    except ValueError:
        first, last = 0, -1
    if not 0 <= first <= last:
        raise argparse.ArgumentTypeError(f"found {text!r}, legal is FIRST:LAST, 20:30 say")
    return first, last


def add_limit_options(parser: argparse.ArgumentParser) -> None:
    """The fields of `Limits`, in seconds."""
    group = parser.add_argument_group("bounds in seconds, after which the run ends and says which rank it was")
    for name, what in (
        ("dead", "without a sign of life from a rank"),
        ("stuck", "without progress of a rank that is alive"),
        ("load", "the same while it loads weights"),
        ("compile", "the same while it compiles a program"),
        ("start", "until all ranks are there"),
        ("grace", "to finish what runs after SIGTERM or SIGUSR1"),
    ):
        default = getattr(Limits(), name)
        option = f"--{name}-stuck-s" if name in ("load", "compile") else f"--{name}-s"
        group.add_argument(
            option,
            dest=f"{name}_s",
            type=seconds_option,
            default=default,
            metavar="S",
            help=f"{what} (default: {default:g})",
        )


def limits(args: argparse.Namespace) -> Limits:
    return Limits(**{name: getattr(args, f"{name}_s") for name in attrs.fields_dict(Limits)})


def seconds_option(text: str) -> float:
    """An option's type."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text!r}, legal is a number of seconds above 0")
    return seconds


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    config = EngineConfig()
    group.add_argument("--dtype", choices=DTYPES, help="of weights, activations and cache (default: the checkpoint's)")
    what = "hand-written GPU kernels (default: auto, where the GPU can run them and the dtype is not float32)"
    group.add_argument("--kernels", choices=KERNELS, default=config.kernels, help=what)
    what = "make the weights on the devices, at random: to measure speed without reading any"
    load = {"dest": "load_format", "action": "store_const", "const": "dummy", "default": config.load_format}
    group.add_argument("--random-weights", help=what, **load)
    what = "layers per stage, or measured:OUT.profile.json for the best cut by the layers' times there (default: even)"
    group.add_argument("--stage-layers", metavar="N,N,...", help=what)
    for name, what in (
        ("max_batch", "most sequences in work at once, per data shard (default: 64; with kernels up to 1024)"),
        ("page_size", "tokens per cache page"),
        ("pages", "cache pages per data shard (default: what memory is left)"),
        ("decode_steps", "decode steps per dispatch"),
        ("prefill_chunk", "prompt tokens per prefill tick (default: 512; with kernels what fits, up to 8192)"),
        ("max_context", "most tokens of prompt and output together (default, and at most, the model's)"),
        ("load_threads", "threads of each process that read the checkpoint (default: its cores, at most 8)"),
    ):
        default = getattr(config, name)
        what += "" if default is None else f" (default: {default})"
        group.add_argument(_flag(name), type=int, default=default, metavar="N", help=what)
    what = "folder that keeps compiled programs for later runs, or none (default: ~/.cache/jaxinfer/xla on GPUs)"
    group.add_argument("--compile-cache", metavar="DIR", help=what)
    share = config.memory_fraction
    what = f"share of each GPU for weights, workspace and cache (default: {share}); JAX takes 0.93 of it, unless "
    what += "XLA_CLIENT_MEM_FRACTION says how much"
    group.add_argument("--memory-fraction", type=float, default=share, metavar="X", help=what)


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `LLM` takes, beside the path."""
    # the command's --seed is a sampling parameter, not the engine's
    names = [name for name in EngineConfig.__dataclass_fields__ if name in args and name != "seed"]
    return {name: getattr(args, name) for name in names}


def add_sampling_options(parser: argparse.ArgumentParser, title: str) -> None:
    """One option per field of `SamplingParams`."""
    group = parser.add_argument_group(title)
    forms: dict[str, dict[str, Any]] = {
        "ignore_eos": {"action": "store_true", "default": None},
        "stop": {"action": "append", "type": unicode, "metavar": "TEXT"},
        "stop_token_ids": {"type": _integers, "metavar": "ID,ID,..."},
        "logit_bias": {"type": _biases, "metavar": "ID=BIAS,..."},
    }
    for field in attrs.fields(SamplingParams):
        number = float if isinstance(field.default, float) else int
        form = forms.get(field.name, {"type": number, "metavar": "X" if number is float else "N"})
        shown = isinstance(field.default, int | float) and not isinstance(field.default, bool)
        default = f" (default: {field.default:g})" if shown else ""
        group.add_argument(_flag(field.name), help=field.metadata["help"].replace("%", "%%") + default, **form)


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """Raises ValueError for a value that is not legal."""
    given = {name: getattr(args, name) for name in attrs.fields_dict(SamplingParams)}
    return SamplingParams.from_dict({name: value for name, value in given.items() if value is not None})


def unicode(text: str) -> str:
    """An argument that is read as UTF-8 in any locale; Python has half surrogate pairs for bytes of another encoding.

    Raises:
      argparse.ArgumentTypeError: it is not UTF-8.
    """
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        found = os.fsencode(text)
    try:
        return found.decode()
    except UnicodeDecodeError as error:
        byte = f"byte 0x{found[error.start]:02x} at byte {error.start + 1}"
        raise argparse.ArgumentTypeError(f"not UTF-8: {byte} of {text!r}") from None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text!r}, legal is whole numbers with commas between them") from None


def _biases(text: str) -> dict[int, float]:
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {int(token): float(bias) for token, bias in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text!r}, legal is ID=BIAS,ID=BIAS: 17=5,29=-100, say") from None
