"""A study's jobs on a real Slurm: one that fails. Whole studies there: test_study_cluster.py."""

import json
import sys

import pytest

from test_study import write
from test_study_run import QUICK


@pytest.mark.slurm
@pytest.mark.long
def test_a_job_that_fails_says_why_and_the_others_run(slurm_bed, tmp_path):
    good = {"kind": "correctness", "meshes": ["stage=1"], "against": "first"}
    experiments = {"bad": good | {"settings": {"pages": 2}}, "good": good}
    path, out = write(tmp_path, settings=QUICK, experiments=experiments), tmp_path / "out"
    words = [sys.executable, "-m", "jaxinfer.study", "run", path, "--output", out]
    done = slurm_bed.run([*words, "--cluster", "testbed", "--poll-s", "0.5"], timeout=400)
    assert done.returncode == 1, done.stderr
    found = {each.parent.parent.name: json.loads(each.read_text()) for each in out.glob("cells/*/*/state.json")}
    assert found["good"]["state"] == "done" and found["bad"]["state"] == "failed"
    assert "FAILED" in found["bad"]["why"] and "pages" in found["bad"]["why"], found["bad"]["why"]
