"""The family that CONTRIBUTING.md adds as an example: its files and lines go into a copy of the packages, and work."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from convert.run import convert
from engine_run import make_engine
from engine_run import run as generate
from greedy_reference import equal_to_transformers
from hf_models import make_hf_folder
from jaxinfer.engine.params import SamplingParams

ROOT = Path(__file__).parents[1]
FILES = [
    "jaxinfer/models/configs/starcoder2.py",
    "jaxinfer/models/starcoder2.py",
    "convert/families/starcoder2.py",
    "tests/test_starcoder2.py",
]
TABLES = [  # file, table, the entry that the text adds
    ("jaxinfer/models/families.py", "FAMILIES", "starcoder2"),
    ("jaxinfer/models/layers.py", "LAYERS", '"starcoder2": starcoder2.Layer'),
    ("convert/families/__init__.py", "_NAMES", '"starcoder2": starcoder2.names'),
    ("tests/hf_models.py", "FAMILIES", '"starcoder2": (Starcoder2Config, Starcoder2ForCausalLM)'),
    ("tests/test_families.py", "FAMILIES", '"starcoder2": {}'),
]
IMPORTS = [
    ("jaxinfer/models/families.py", "jaxinfer.models.configs", "starcoder2"),
    ("jaxinfer/models/layers.py", "jaxinfer.models", "starcoder2"),
    ("convert/families/__init__.py", "convert.families", "starcoder2"),
    ("tests/hf_models.py", "transformers", "Starcoder2Config, Starcoder2ForCausalLM"),
]
pytestmark = pytest.mark.long


def insert(file: Path, opening: str, entry: str) -> None:
    """Puts the entry first behind the one place in the file that opens a list so."""
    code, found = re.subn(f"^{opening}", lambda match: f"{match[0]}{entry}, ", file.read_text(), flags=re.MULTILINE)
    assert found == 1, f"{file}: {found} places like {opening}, where CONTRIBUTING.md adds {entry}; expected 1"
    file.write_text(code)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder, text = tmp_path_factory.mktemp("copy"), (ROOT / "CONTRIBUTING.md").read_text()
    for each in ("jaxinfer", "convert", "tests"):
        shutil.copytree(ROOT / each, folder / each, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    before, *blocks = text.partition("## Adding a family")[2].split("```python\n")
    written = []
    for block in blocks:
        written += re.findall(r"`([\w/]+starcoder2\.py)`", before)[-1:]  # the text names a file, then shows it
        code, _, before = block.partition("```")
        assert not (folder / written[-1]).exists()
        (folder / written[-1]).write_text(code)
    assert written == FILES
    prose = " ".join(text.split())
    for file, table, entry in TABLES:
        assert f"`{table}` of `{file}`" in prose and entry in prose
        insert(folder / file, rf"{table}\b.* = [({{]", entry)
    for file, module, names in IMPORTS:
        insert(folder / file, rf"from {re.escape(module)} import (\(\s*)?", names)
    return folder


def python(copy: Path, *arguments: str) -> None:
    """Runs it with the copy in place of the packages and tests."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(copy), str(copy / "tests")])}
    done = subprocess.run([sys.executable, *arguments], cwd=copy, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


def test_its_tests_pass(copy):
    python(copy, "-m", "pytest", "-k", "starcoder2", "tests/test_starcoder2.py", "tests/test_families.py")


def compare_greedy(folder: str) -> None:
    """In a process of the copy."""
    hf, checkpoint = Path(folder, "hf"), Path(folder, "ckpt")
    model = make_hf_folder(hf, "starcoder2", sliding_window=9)
    convert(hf, checkpoint, quiet=True)
    rng = np.random.default_rng(2)
    # many: without ops.needed most prompts' first new tokens are the same by chance
    prompts = {str(length): rng.integers(3, 96, length).tolist() for length in range(2, 66, 2)}
    found = generate(make_engine(checkpoint), prompts, SamplingParams(max_new_tokens=5, ignore_eos=True))
    equal_to_transformers(found, prompts, model)


def test_greedy_tokens(copy, tmp_path):
    python(copy, "-c", f"import test_contributing; test_contributing.compare_greedy({str(tmp_path)!r})")
