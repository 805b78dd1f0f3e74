"""``python -m convert``: the command line of the converter."""

import argparse
import sys
import time
from pathlib import Path
from textwrap import fill

from tqdm import tqdm

from convert.plan import DTYPES
from convert.run import convert
from convert.source import open_source
from convert.tensor import ConvertError
from jaxinfer.checkpoint.files import CheckpointError
from jaxinfer.checkpoint.manifest import NAME as MANIFEST
from jaxinfer.engine.costs import count_parameters
from jaxinfer.models.config import ConfigError
from jaxinfer.models.families import FAMILIES
from jaxinfer.presets import PresetError, load_preset
from jaxinfer.screen import escape_unencodable
from jaxinfer.tokenizer import notes

LONGEST_MESSAGE = 20_000
DESCRIPTION = """\
Converts a Hugging Face folder to a jaxinfer checkpoint, which loads onto any mesh. Reads .safetensors, or PyTorch .bin
files without running code from their pickle. Works tensor by tensor: any model fits in a few GB of memory.

architectures:
""" + fill(
    ", ".join(name for family in FAMILIES for name in family.ARCHITECTURES),
    width=110,
    initial_indent="  ",
    subsequent_indent="  ",
)

EXAMPLES = """\
examples:
  convert, in the dtype that the weights have:
    python -m convert --source open_llama_3b_v2 --output ckpt/openllama-3b
  float32 weights to bfloat16, then read everything back and compare it with the source:
    python -m convert --source my-llama --output ckpt/my-llama --dtype bfloat16 --verify
  interrupted? the same command again finishes the rest; a folder is complete once it holds manifest.json.
  damaged, of an older version, or a new tokenizer at the source? the same command again writes what differs.
  then:
    python -m jaxinfer.generate --model ckpt/openllama-3b --prompt "Once upon a time"
"""

SHOWN = 5


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m convert",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--source", required=True, metavar="HF_DIR", help="folder with config.json, weights and perhaps a tokenizer"
    )
    parser.add_argument("--output", required=True, metavar="CKPT_DIR", help="folder to write; made if absent")
    parser.add_argument("--preset", metavar="NAME", help="refuse a source that is not this model of configs/models")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the checkpoint (default: the source's)")
    parser.add_argument(
        "--verify", action="store_true", help="read the checkpoint back and compare every tensor with the source"
    )
    return parser.parse_args(arguments)


def printable(text: str) -> str:
    """A message as a terminal may have it: files name tensors as they like, at any length and in escape sequences."""
    if len(text) > LONGEST_MESSAGE:
        text = f"{text[:LONGEST_MESSAGE]}... and {len(text) - LONGEST_MESSAGE} characters more"
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 when the checkpoint is complete, 1 when it is refused (reason on stderr), 130 when interrupted."""
    escape_unencodable()
    args = parse(arguments)
    started = time.perf_counter()
    try:
        if args.preset is not None:
            preset, config = load_preset(args.preset), open_source(args.source).config
            preset.check(args.source, config, count_parameters(config))
        whole = Path(args.output, MANIFEST).exists()
        manifest, written = convert(args.source, args.output, args.dtype, args.verify)
    except (ConvertError, ConfigError, CheckpointError, PresetError, OSError) as error:
        print(f"convert: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("convert: interrupted; run the same command again to finish", file=sys.stderr)
        return 130
    seconds = time.perf_counter() - started
    size = sum(file["bytes"] for file in manifest.files.values())
    verified = ", verified against the source" if args.verify else ""
    if not written:
        done = "already converted"
    elif whole:
        names = ", ".join(written[:SHOWN]) + (f" and {len(written) - SHOWN} more" if len(written) > SHOWN else "")
        done = f"brought up to date ({names})"
    else:
        total, rate = (tqdm.format_sizeof(number, "B", 1024) for number in (size, size / seconds))
        done = f"{len(manifest.leaves)} leaves, {total} in {seconds:.1f} s ({rate}/s)"
    tokenizer = "with its tokenizer" if manifest.tokenizer else "without a tokenizer (runs on token ids)"
    print(f"{args.output}: {done}{verified}: {manifest.parameters:,} parameters in {manifest.dtype}, {tokenizer}")
    for note in _tokenizer_notes(args.source):
        print(f"convert: note: {note}", file=sys.stderr)
    return 0


def _tokenizer_notes(source: str) -> list[str]:
    try:
        return notes(source)
    except (ValueError, OSError) as error:  # the weights are converted, and run on token ids
        return [f"{source}: the tokenizer cannot be used: {error}"]


if __name__ == "__main__":
    sys.exit(main())
