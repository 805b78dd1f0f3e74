"""A job script of its own for a run: the header from a cluster preset, the rest from one of the scripts beside this."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2

from slurm.presets import Cluster

FOLDER = Path(__file__).resolve().parent
MARK = "# ---- the job"


def render(
    script: str,
    cluster: Cluster,
    preset: Path,
    sbatch: Sequence[str],
    step: Sequence[str],
    variables: Mapping[str, str],
    options: list[str],
) -> str:
    """`script` (generate.sh, say) with another header and other `variables`; `options` are its arguments. With `step`,
    options of srun, it is no job but a step of the allocation that it runs in."""
    body = (FOLDER / script).read_text("utf-8").partition(f"\n{MARK}\n")[2]
    assert body, f"{script} has no line {MARK!r}"
    loader = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    loader.filters["quote"] = shlex.quote
    return loader.get_template("job.sh.j2").render(
        name=Path(variables["RUN"]).name,
        script=f"slurm/{script}",
        preset=preset,
        sbatch=[] if step else [*sbatch, *cluster.sbatch_options(), "--requeue", "--open-mode=append"],
        step=step,
        variables=variables,
        modules=cluster.modules,
        env=cluster.env,
        setup=cluster.setup,
        options=[*cluster.options, *options],
        body=f"{MARK}\n{body.rstrip()}\n",
    )
