"""A transformers model of a shape with random weights, and how the peers report."""

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import report
from benchmarks.report import Row
from benchmarks.shapes import NAMES, dtype_of, hf_config


def parser(name: str, text: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.peers.{name}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = f"{', '.join(NAMES)}, or the path of a config.json (default: llama-3.1-8b)"
    made.add_argument("--model", default="llama-3.1-8b", metavar="NAME", help=what)
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return made


def random_model(name: str, seed: int = 0) -> Any:
    """On the GPU where there is one, in the dtype of its config."""
    fields = hf_config(name)
    config = AutoConfig.for_model(fields["model_type"], **{k: v for k, v in fields.items() if k != "model_type"})
    torch.manual_seed(seed)
    torch.set_default_dtype(getattr(torch, dtype_of(name)))
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return AutoModelForCausalLM.from_config(config).eval()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def finish(args: argparse.Namespace, how: str, rows: list[Row]) -> None:
    what = f"transformers {transformers.__version__}, torch {torch.__version__}, {how}"
    report.show(f"{args.model}: {what}", rows, {})
    if args.json is not None:
        report.write(args.json, {"model": args.model, "what": what}, rows)
