"""Settings of a study: the options of generate, with underscores, which its own parser checks."""

import argparse
import contextlib
import io
from collections.abc import Mapping
from functools import cache
from typing import Any

from jaxinfer.engine.config import EngineConfig
from jaxinfer.generate import make_parser
from jaxinfer.options import engine_options, sampling_params
from jaxinfer.study.errors import StudyError, shown, unknown

# what the study itself says of a cell, and what has no meaning in one
OURS = frozenset(
    "help version model preset prompts prompt output print strict overwrite resume_anyway mesh cpu_devices coordinator "
    "num_processes process_id port random_weights profile warm_up repeats".split()
)
MEASURED = "measured"  # of stage_layers: from the profile of the cell that this one is compared with
RANDOM = ("temperature", "top_k", "top_p", "min_p")  # what makes an output one of many


@cache
def legal() -> dict[str, argparse.Action]:
    """Name of each setting to the option that it stands for."""
    found = {}
    for action in make_parser()._actions:  # argparse has no other list of them
        for option in action.option_strings:
            name = option.removeprefix("--").replace("-", "_")
            if option.startswith("--") and name not in OURS and action.dest not in OURS and not name.startswith("no_"):
                found[name] = action
    return found


def flags(settings: Mapping[str, Any]) -> list[str]:
    """As words of a command line. A setting that is null or false is left out."""
    words: list[str] = []
    for name, value in settings.items():
        action, flag = legal()[name], "--" + name.replace("_", "-")
        if value is None or value is False:
            continue
        if action.nargs == 0:
            words.append(flag)
        elif isinstance(action, argparse._AppendAction):
            words += [word for each in _listed(value) for word in (flag, str(each))]
        elif isinstance(value, Mapping):
            words += [flag, ",".join(f"{key}={each}" for key, each in value.items())]
        else:
            words += [flag, ",".join(map(str, _listed(value)))]
    return words


def check_settings(settings: Any, measured: bool = False) -> None:
    """Refuses what generate would refuse. `measured`: stage_layers may be that.

    Raises:
      StudyError: an unknown setting or an illegal value.
    """
    if not isinstance(settings, dict):
        raise StudyError(f"found {shown(settings)}, legal are lines of SETTING: VALUE")
    for name, value in settings.items():
        if name in OURS:
            raise StudyError(f"{name}: the study says this itself of each cell; leave it out")
        if name not in legal():
            raise StudyError(unknown("setting", name, legal()))
        if isinstance(value, bool) != (legal()[name].nargs == 0) and value is not None:
            raise StudyError(f"{name}: found {shown(value)}, legal is {_form(legal()[name])}")
    if settings.get("stage_layers") == MEASURED:
        if not measured:
            raise StudyError("stage_layers: found 'measured', legal in b of an optimization, whose a is measured first")
        settings = {name: value for name, value in settings.items() if name != "stage_layers"}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = make_parser().parse_args(["--model", "M", "--prompts", "P", *flags(settings)])
    except SystemExit:
        text = said.getvalue().strip().partition("error: ")[2].removesuffix(" (--help explains)")
        raise StudyError(text.removeprefix("argument --").replace("\n", " ")) from None
    try:
        sampling_params(args)
        EngineConfig(
            **{name: value for name, value in engine_options(args).items() if name not in ("mesh", "stage_layers")}
        )
    except ValueError as error:
        raise StudyError(str(error)) from None


def _form(action: argparse.Action) -> str:
    return "true or false" if action.nargs == 0 else f"a value such as --{action.dest.replace('_', '-')} takes"


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
