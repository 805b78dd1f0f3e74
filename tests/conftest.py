"""Sets what JAX reads once, when it starts: eight virtual CPU devices, or the GPUs with ``JAXINFER_TEST_GPU=1``."""

import os
import resource
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from slurm_bed import _no_jobs_left, slurm_bed  # noqa: F401

ON_GPU = os.environ.get("JAXINFER_TEST_GPU") == "1"

if not ON_GPU:
    os.environ["JAX_PLATFORMS"] = "cpu"
    # XLA's thread pool: with fewer than four threads per device, collectives that do not depend on each other deadlock
    os.environ["NPROC"] = "32"
    # not optimized, programs that run for milliseconds compile in a quarter of the time
    quick = "--xla_backend_optimization_level=0"
    if version("jax").startswith("0.10."):  # 0.11 does not know the flag
        quick += " --xla_cpu_use_fusion_emitters=false"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {quick} --xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = flags.strip()
# compiling takes most of the tests' time, and many compile the same programs
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / "build" / "compiled"))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a GPU: run with JAXINFER_TEST_GPU=1 on a machine that has one")
    no_slurm = pytest.mark.skip(reason="needs Slurm: srun is not on the PATH")
    for item in items:
        if item.get_closest_marker("gpu") and not ON_GPU:
            item.add_marker(no_gpu)
        if item.get_closest_marker("slurm") and shutil.which("srun") is None:
            item.add_marker(no_slurm)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A Hugging Face folder of a LLaMA of one layer."""
    from hf_models import make_hf_folder  # with transformers, which few tests need

    make_hf_folder(tmp_path / "hf", num_hidden_layers=1)
    return tmp_path / "hf"


@pytest.fixture
def little_memory() -> Iterator[None]:
    """The test may take 512 MB more than its process has; more is a MemoryError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + (512 << 20), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
