"""Cluster presets: what a job asks for and sets up, as data (configs/clusters/*.yaml)."""

import difflib
import re
from pathlib import Path
from typing import Any

import attrs
import yaml

from jaxinfer.checks import check

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "clusters"
GPU_OPTIONS = ("gres", "gpus-per-node", "gpus-per-task", "none")
TASKS_PER = ("gpu", "node")


class PresetError(ValueError):
    """A preset that cannot be used: file, field, what was found, what is legal."""


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and "\n" not in value


def _is_count(least: int):
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least


def _text(default: Any = attrs.NOTHING, help: str = ""):
    return attrs.field(default=default, validator=check("a text of one line", _is_text), metadata={"help": help})


def _optional(help: str):
    validator = check("null or a text of one line", lambda value: value is None or _is_text(value))
    return attrs.field(default=None, validator=validator, metadata={"help": help})


def _count(default: int, least: int, help: str):
    validator = check(f"a whole number from {least}", _is_count(least))
    return attrs.field(default=default, validator=validator, metadata={"help": help})


def _choice(default: str, choices: tuple[str, ...], help: str):
    validator = check(" or ".join(choices), lambda value: value in choices)
    return attrs.field(default=default, validator=validator, metadata={"help": help, "choices": choices})


def _check_gpu(instance: Any, field: attrs.Attribute, value: Any) -> None:
    from jaxinfer.plan.hardware import GPUS  # only where it is asked for

    if value is not None and (not isinstance(value, str) or value not in GPUS):
        raise ValueError(f"gpu: found {value!r}, legal is null or one of {', '.join(GPUS)}")


def _is_env(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and re.fullmatch(r"[A-Za-z_]\w*", name) and isinstance(text, str)
        for name, text in value.items()
    )


LINES = check(
    "a list of texts of one line", lambda value: isinstance(value, list) and all(_is_text(each) for each in value)
)
TIME = r"(\d+-)?\d{1,3}(:\d{2}){0,2}"


@attrs.frozen(kw_only=True)
class Cluster:
    """One cluster. Memory and CPUs are those of a whole node that a job gets."""

    about: str = _text(help="what the cluster is")
    partition: str | None = _optional("partition (default: the cluster's own)")
    account: str | None = _optional("account or project that pays")
    qos: str | None = _optional("quality of service")
    nodes: int = _count(1, 1, "nodes")
    gpus_per_node: int = _count(1, 0, "GPUs of a node; 0 runs on CPUs")
    gpu: str | None = attrs.field(
        default=None,
        validator=_check_gpu,
        metadata={"help": "the GPU in the words of python -m jaxinfer.plan, A100-64"},
    )
    gpu_type: str | None = _optional("GPU type, where the cluster wants it named in a job's options")
    gpu_option: str = _choice("gpus-per-node", GPU_OPTIONS, "how to ask for GPUs; none where nodes come whole")
    tasks_per: str = _choice("gpu", TASKS_PER, "one task per GPU or one per node")
    cpus_per_node: int = _count(1, 1, "CPU cores of a node, shared by its tasks")
    memory: str = attrs.field(
        validator=check('a text such as "200G"; "0" is all', lambda value: re.fullmatch(r"\d+[KMGT]?", str(value))
                         and isinstance(value, str)),
        metadata={"help": "memory of a node, 200G say"},
    )  # fmt: skip
    time: str = attrs.field(
        validator=check(
            'a text such as "24:00:00" or "2-12:00:00", in quotes',
            lambda value: isinstance(value, str) and re.fullmatch(TIME, value),
        ),
        metadata={"help": "time limit, 4:00:00 say"},
    )
    signal_s: int = _count(120, 1, "seconds ahead of the time limit at which a run stops in order")
    sbatch: list[str] = attrs.field(factory=list, validator=LINES)
    modules: list[str] = attrs.field(factory=list, validator=LINES)
    setup: list[str] = attrs.field(factory=list, validator=LINES)
    env: dict[str, str] = attrs.field(factory=dict, validator=check('NAME: "text" pairs, numbers in quotes', _is_env))
    python: str = _text(".venv/bin/python", "Python on the nodes, or 'apptainer exec --nv IMAGE.sif python3'")
    options: list[str] = attrs.field(factory=list, validator=LINES)

    def __attrs_post_init__(self) -> None:
        if self.gpus_per_node == 0 and self.tasks_per == "gpu":
            raise ValueError("tasks_per: found gpu with gpus_per_node 0, legal is node")
        if self.tasks_per_node > self.cpus_per_node:
            raise ValueError(
                f"cpus_per_node: found {self.cpus_per_node} for {self.tasks_per_node} tasks, legal is one or more each"
            )

    @property
    def tasks_per_node(self) -> int:
        return self.gpus_per_node if self.tasks_per == "gpu" else 1

    def sbatch_options(self) -> list[str]:
        """What a job asks for, one option of sbatch each."""
        options = [f"--{name}={getattr(self, name)}" for name in ("partition", "account", "qos") if getattr(self, name)]
        options += [f"--nodes={self.nodes}", f"--ntasks-per-node={self.tasks_per_node}"]
        options.append(f"--cpus-per-task={self.cpus_per_node // self.tasks_per_node}")
        options += self.gpu_options()
        options += [f"--mem={self.memory}", f"--time={self.time}", f"--signal=B:USR1@{self.signal_s}"]
        return options + self.sbatch

    def gpu_options(self) -> list[str]:
        """How sbatch and srun are asked for the GPUs."""
        kind = f"{self.gpu_type}:" if self.gpu_type else ""
        per_task = max(1, self.gpus_per_node // max(1, self.tasks_per_node))
        return {
            "gres": [f"--gres=gpu:{kind}{self.gpus_per_node}"],
            "gpus-per-node": [f"--gpus-per-node={kind}{self.gpus_per_node}"],
            "gpus-per-task": [f"--gpus-per-task={kind}{per_task}"],
            "none": [],
        }[self.gpu_option if self.gpus_per_node else "none"]


def find_cluster(text: str) -> Path:
    """The file of a preset, given by its name or as a file.

    Raises:
      PresetError: neither; lists the names.
    """
    known = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
    path = Path(text)
    if text in known:
        return known[text]
    if path.suffix or len(path.parts) > 1 or path.exists():
        return path
    near = difflib.get_close_matches(text, known, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise PresetError(f"cluster: unknown {text!r}; {hint}legal: {', '.join(known)}, or a file NAME.yaml")


def describe(name: str, cluster: Cluster) -> dict[str, Any]:
    """What one needs to know to ask for jobs there: fields of the preset, and the tasks that a node gets."""
    shown = ("about", "gpu", "gpus_per_node", "nodes", "tasks_per_node", "cpus_per_node", "memory", "time")
    told = {"cluster": name} | {field: getattr(cluster, field) for field in shown}
    return told if cluster.gpus_per_node else told | {"gpu": None}


def read_cluster(path: Path, changes: dict[str, Any]) -> Cluster:
    """A preset with `changes` over it.

    Raises:
      PresetError: a file that is no YAML mapping, an unknown or absent field, an illegal value.
    """
    try:
        fields = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise PresetError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PresetError(f"{path}: no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise PresetError(f"{path}: found {type(fields).__name__}, legal are lines of FIELD: VALUE")
    known = attrs.fields_dict(Cluster)
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise PresetError(f"{path}: unknown field {name!r}; {hint}legal: {', '.join(known)}")
    for name, field in known.items():
        if field.default is attrs.NOTHING and name not in fields and name not in changes:
            raise PresetError(f"{path}: {name} is missing: {field.metadata['help']}")
    try:
        return Cluster(**fields | changes)
    except ValueError as error:
        raise PresetError(f"{path}: {error}") from None
