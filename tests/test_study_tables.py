"""A study's tables: figures against ones computed by hand, refusals, cells that failed, the same bytes again."""

import csv
import json
import shutil
import subprocess
import sys

import pytest

import study_cells
from jaxinfer.study import compare
from jaxinfer.study.results import ResultsError, Spread, read_cells
from jaxinfer.study.tables import write_tables
from study_cells import cell, gpus, metrics, profile


def rows(folder, name):
    write_tables(folder)
    with open(folder / "tables" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def column(found, name):
    return [float(row[name]) if row[name] else None for row in found]


def test_strong_scaling_by_hand(tmp_path):
    found = rows(study_cells.study(tmp_path), "strong")
    assert [row["mesh"] for row in found] == ["stage=1", "stage=2", "stage=4", "stage=8"]
    assert column(found, "work_s") == [8, 4.4, 2.5, None]
    assert column(found, "work_s_least") == [7.6, 4.2, None, None]
    assert column(found, "speedup") == pytest.approx([1, 8 / 4.4, 3.2, None])
    assert column(found, "speedup_least")[1] == pytest.approx(7.6 / 4.6)
    assert column(found, "speedup_most")[1] == pytest.approx(8.4 / 4.2)
    assert column(found, "efficiency_percent") == pytest.approx([100, 100 * 8 / 8.8, 80, None])
    assert column(found, "output_tokens_per_s")[0] == 64
    assert column(found, "io_s")[0] == pytest.approx(0.51)
    # of a step of 2.6 ms 0.2 are transfers: that share of 24 s of prefill and decode
    assert column(found, "communication_percent")[0] == pytest.approx(100 * 0.2 / 2.6)
    assert column(found, "communication_s")[0] == pytest.approx(24 * 0.2 / 2.6)
    assert found[3]["note"] == "skipped: tiny has 5 layers, stage=8 needs 8" and found[3]["gpu_use_percent"] == ""
    text = (tmp_path / "tables" / "strong.md").read_text()
    assert "| 1.82 (1.65 to 2.00) | 90.9 (82.6 to 100.0) |" in text and "- n0 = 1 (stage=1)\n" in text
    assert "- virtual CPU devices of one host share its cores" in text
    assert "- **speed-up**: T(n0) / T(n)" in text and "| – | – |" in text


def test_an_orphan_is_in_no_table_and_displaces_nothing(tmp_path):
    cell(tmp_path, "strong", "stage=1", metrics((8.0,)), tag="current")
    stale = cell(tmp_path, "strong", "stage=1", metrics((2.0,)), tag="stale", ended="2026-12-01T12:00:00+0000")
    gone = cell(tmp_path, "strong", "stage=2", metrics((4.0,)), devices=2, tag="gone")
    for folder in (stale, gone):
        state = json.loads((folder / "state.json").read_text())
        study_cells.write(folder / "state.json", state | {"orphan": True})
    cells, left_out = read_cells(tmp_path)
    assert [each.hash for each in cells] == ["current"]
    assert left_out == [
        f"{each.relative_to(tmp_path)}: an orphan: no longer in the study file" for each in (stale, gone)
    ]
    assert column(rows(tmp_path, "strong"), "work_s") == [8]


def test_weak_scaling_by_hand(tmp_path):
    found = rows(study_cells.study(tmp_path), "weak")
    assert column(found, "weak_efficiency_percent") == pytest.approx([100, 100 * 8.1 / 8.2, 100 * 8.1 / 2.5])
    assert column(found, "scaled_speedup") == pytest.approx([1, 2 * 8.1 / 8.2, 4 * 8.1 / 2.5])


def test_n0_is_the_least_that_fits_and_named(tmp_path):
    cell(tmp_path, "strong", "stage=1", None, state="skipped", why="needs 80 GB, has 64 GB")
    cell(tmp_path, "strong", "stage=2", metrics((4.0,)), devices=2)
    cell(tmp_path, "strong", "tensor=2", metrics((3.0,)), devices=2)
    cell(tmp_path, "strong", "stage=4", metrics((2.0,), device_kind="NVIDIA H200"), devices=4)
    found = rows(tmp_path, "strong")
    assert column(found, "speedup") == [None, 0.75, 1, 1.5]
    assert column(found, "efficiency_percent") == [None, 75, 100, 75]
    said = (tmp_path / "tables" / "strong.md").read_text()
    assert "n0 = 2 (tensor=2), the faster of those with as many devices, the least that was measured: " in said
    assert "stage=1 skipped: needs 80 GB, has 64 GB" in said


def test_unequal_work_is_no_comparison(tmp_path):
    cell(tmp_path, "strong", "stage=1", metrics((8.0,)))
    cell(tmp_path, "strong", "stage=2", metrics((4.0,), tokens=511), devices=2)
    cell(tmp_path, "weak", "stage=1", metrics((8.0,)))
    cell(tmp_path, "weak", "stage=2", metrics((8.0,), tokens=1000, prompt=161), devices=2)
    for batch, tokens in ((1, 64), (2, 128), (4, 250)):
        cell(tmp_path, "batch", f"b{batch}", metrics((1.0,), tokens, batch), batch=batch, requests=batch)
    for role, tokens in (("a", 512), ("b", 510)):
        cell(tmp_path, "ab", role, metrics((1.0,), tokens), kind="optimization", role=role, round=1)
    for steps, tokens in ((1, 512), (2, 512), (4, 500)):
        cell(tmp_path, "grid", str(steps), metrics((1.0 / steps,), tokens), steps=steps)
    strong, weak, batch, ab, grid = (rows(tmp_path, name) for name in ("strong", "weak", "batch", "ab", "grid"))
    assert column(strong, "speedup") == [1, None] and column(strong, "efficiency_percent") == [100, None]
    assert strong[1]["note"] == "refused as a comparison: 511 output tokens, n0 has 512"
    assert weak[1]["scaled_speedup"] == "" and "500 output tokens per device, n0 has 512" in weak[1]["note"]
    assert column(batch, "batch_efficiency_percent") == [100, 100, None]
    assert "62.5 output tokens per request, b = 1 has 64" in batch[2]["note"]
    assert [row["ratio"] for row in ab] == ["", ""] and "510 output tokens, A has 512" in ab[1]["note"]
    assert column(grid, "of_best_percent") == [50, 100, None] and "the others have 512" in grid[2]["note"]
    assert "prompt tokens per device are not equal: 80 to 80.5" in (tmp_path / "tables" / "weak.md").read_text()
    assert "| 4.00 | refused | refused | 128 |" in (tmp_path / "tables" / "strong.md").read_text()


def test_batch_efficiency_and_knee_by_hand(tmp_path):
    # T = 1 + b/8: throughput 64 b / T, and b / T^2 is greatest at b = 8
    for batch in (2, 4, 8, 16, 32):
        work = 1 + batch / 8
        cell(tmp_path, "batch", f"b{batch}", metrics((work,), 64 * batch, batch), batch=batch, requests=batch)
    found = rows(tmp_path, "batch")
    assert column(found, "batch") == [2, 4, 8, 16, 32]
    assert column(found, "batch_efficiency_percent") == pytest.approx(
        [100 * 1.25 / (1 + b / 8) for b in (2, 4, 8, 16, 32)]
    )
    assert [row["knee"] for row in found] == ["", "", "knee", "", ""]
    text = (tmp_path / "tables" / "batch.md").read_text()
    assert "the knee is at b = 8" in text and "- b0 = 2\n" in text and "Kleinrock" in text
    shutil.rmtree(tmp_path / "cells" / "batch")
    for batch in (1, 2, 4):  # rows cost nothing
        cell(tmp_path, "batch", f"b{batch}", metrics((1.0,), 64 * batch, batch), batch=batch, requests=batch)
    assert [row["knee"] for row in rows(tmp_path, "batch")] == [""] * 3
    assert "the knee is not reached: X/L still rises at b = 4" in (tmp_path / "tables" / "batch.md").read_text()


def test_ratio_of_variants_by_hand(tmp_path):
    found = rows(study_cells.study(tmp_path), "cut")
    assert [row["role"] for row in found] == ["A", "B"] * 3
    assert column(found, "ratio") == pytest.approx([None, 1.25, None, 1.2, None, 4.1 / 3.3])
    (summary,) = rows(tmp_path, "cut-ratio")
    # Student's 97.5 % quantile of two degrees of freedom is 4.3027; logarithms 0.22314, 0.18232, 0.21706
    assert float(summary["ratio"]) == pytest.approx(1.2306, abs=1e-4)
    assert (float(summary["low"]), float(summary["high"])) == pytest.approx((1.1651, 1.2998), abs=1e-4)
    assert summary["verdict"] == "B is faster"
    text = (tmp_path / "tables" / "cut.md").read_text()
    assert "- A: stage_layers = 5,1\n- B: stage_layers = measured\n" in text
    assert compare.ratio([0.9, 1.1]).verdict.startswith("no difference shown")
    assert compare.ratio([0.5, 0.51, 0.52]).verdict == "A is faster"
    assert compare.ratio([2.0]).low is None


def test_correctness_tells_near_ties_from_errors(tmp_path):
    base, other, failed = rows(study_cells.study(tmp_path), "correctness")
    assert (other["requests"], other["exact"], other["near_ties"], other["errors"]) == ("2", "1", "1", "0")
    assert float(other["agreement_percent"]) == 60  # one of three tokens and two of two
    assert base["note"] == "baseline" and base["exact"] == ""
    assert failed["note"] == "failed: exit status 1: out of memory"
    (divergence,) = rows(tmp_path, "correctness-divergences")
    assert (divergence["id"], divergence["position"], divergence["kind"]) == ("a", "1", "near tie")
    (tmp_path / "cells" / "correctness" / "tiny-stage=2-point-None-0123456789abcdef" / "out.jsonl").write_text("[]\n")
    assert "not compared" in rows(tmp_path, "correctness")[1]["note"]


def test_a_reference_of_another_library_is_named_and_computes_in_float32(tmp_path):
    line = [{"id": "a", "index": 0, "token_ids": [1, 2], "logprobs": []}]
    identity = {"against": "transformers 5.23.0"}
    settings = {"dtype": "bfloat16"}
    cell(tmp_path, "correctness", "stage=1", None, role="baseline", lines=line, identity=identity, settings=settings)
    cell(tmp_path, "correctness", "stage=2", metrics((8.0,)), devices=2, lines=line)
    assert [row["exact"] for row in rows(tmp_path, "correctness")] == ["", "1"]
    assert "- baseline: transformers 5.23.0, float32\n" in (tmp_path / "tables" / "correctness.md").read_text()


def test_gpus_energy_and_memory_are_summed_or_the_most(tmp_path):
    memory = [
        {"rank": rank, "host_peak_bytes": (3 + rank) << 30,
         "devices": [{"device": 0, "allocator_peak_bytes": (10 - rank) << 30, "nvml_peak_bytes": 20 << 30}]}
        for rank in (0, 1)
    ]  # fmt: skip
    energy = {"gpu_j": 1800.0, "gpu_j_per_output_token": 1.5, "method": "counter", "rapl_j": 400.0}
    samples = gpus(2)
    samples[1]["throttle"] = {"sw_power_cap": 0.25, "sw_thermal": 0.001}
    found = metrics((4.0,), gpus=samples, energy=energy, memory=memory)
    found["repeats"] = {"count": 2, "asked": 3, "same_tokens": True, "figures": {}}
    path = cell(tmp_path, "strong", "stage=2", found, devices=2, traced=profile(2))
    (path / "sacct.json").write_text(json.dumps({"job": "7", "energy_j": 5000, "elapsed_s": 61}))
    (row,) = rows(tmp_path, "strong")
    assert float(row["gpu_use_percent"]) == 89.5 and float(row["gpu_power_w"]) == 600
    assert (int(row["device_memory_bytes"]), int(row["host_memory_bytes"])) == (10 << 30, 4 << 30)
    assert (float(row["gpu_j_per_output_token"]), row["slurm_energy_j"], row["slurm_elapsed_s"]) == (1.5, "5000", "61")
    assert row["rapl_energy_j"] == "400"
    assert row["note"] == "2 of 3 repeats; clocks held down: sw_power_cap in 25% of the samples"
    assert float(row["imbalance_percent"]) == pytest.approx(100 * (1 - 2.1 / 2.2))


def test_models_stand_beside_each_other_with_an_n0_each(tmp_path):
    for model, least in (("large", 2), ("small", 1)):
        for count in (1, 2, 4):
            fits = count >= least
            done = metrics((8.0 / count,)) if fits else None
            state = {} if fits else {"state": "skipped", "why": "does not fit"}
            cell(tmp_path, "strong", f"stage={count}", done, model=model, devices=count, **state)
    found = rows(tmp_path, "strong")
    assert column(found, "speedup") == [None, 1, 2, 1, 2, 4]
    text = (tmp_path / "tables" / "strong.md").read_text()
    assert "- large: n0 = 2" in text and "- small: n0 = 1" in text and "| model | devices |" in text


def test_cells_that_lack_files_or_have_others_do_not_end_it(tmp_path):
    for name, damage in (
        ("no-metrics", lambda path: (path / "out.metrics.json").unlink()),
        ("torn", lambda path: (path / "out.metrics.json").write_text('{"work_s": 1')),
        ("list", lambda path: (path / "out.metrics.json").write_text("[]")),
        ("odd", lambda path: study_cells.write(path / "out.metrics.json", {"work_s": "4", "phases": [3], "gpus": 7})),
        ("no-state", lambda path: (path / "state.json").unlink()),
        ("profile", lambda path: (path / "out.profile.json").write_text("{")),
        ("unfinished", lambda path: study_cells.write(path / "out.metrics.json", metrics((2.0,), unfinished=3))),
    ):
        damage(cell(tmp_path, "strong", name, metrics((4.0,)), traced=profile(1), devices=2))
    cell(tmp_path, "strong", "good", metrics((8.0,)))
    cell(tmp_path, "strong", "untraced", metrics((8.0,)), command=["python", "--profile", "traces"])
    bad = cell(tmp_path, "strong", "bad", metrics((8.0,)))
    (bad / "cell.json").write_text('{"kind": "strang"}')
    notes = {row["mesh"]: row["note"] for row in rows(tmp_path, "strong")}
    assert notes["no-metrics"] == "out.metrics.json is missing"
    assert notes["torn"].startswith("out.metrics.json: damaged, not JSON") and "legal is an object" in notes["list"]
    assert notes["odd"] == "out.metrics.json has no work_s" and notes["no-state"] == "waiting"
    assert notes["untraced"] == "nothing was traced (no out.profile.json)"
    assert "out.profile.json: damaged" in notes["profile"] and notes["unfinished"] == "3 requests unfinished"
    assert "cell.json: kind: found 'strang', legal: correctness" in (tmp_path / "tables" / "README.md").read_text()
    with pytest.raises(ResultsError, match=r"none/cells: no cell of a study in it"):
        write_tables(tmp_path / "none")


def test_a_cell_that_was_measured_again_replaces_the_older_one(tmp_path):
    cell(tmp_path, "strong", "stage=1", metrics((8.0,)), tag="b" * 16, ended="2026-11-30T10:00:00+0000")
    cell(tmp_path, "strong", "stage=1", metrics((6.0,)), tag="a" * 16, ended="2026-11-30T11:00:00+0000")
    cell(tmp_path, "strong", "stage=1", None, tag="c" * 16, state="failed", ended="2026-11-30T12:00:00+0000")
    found, left_out = read_cells(tmp_path)
    assert [each.hash[0] for each in found] == ["a"] and len(left_out) == 2
    assert column(rows(tmp_path, "strong"), "work_s") == [6]


def test_tables_are_functions_of_the_cells_alone(tmp_path):
    folder = study_cells.study(tmp_path / "one")
    kept = {path.name: path.read_bytes() for path in write_tables(folder)}
    shutil.rmtree(folder / "tables")
    folder.rename(tmp_path / "two")
    assert {path.name: path.read_bytes() for path in write_tables(tmp_path / "two")} == kept
    assert len(kept) == 6 * 2 + 2 + 1


def test_every_number_of_the_csv_is_one_and_markdown_rows_are_whole(tmp_path):
    study_cells.study(tmp_path)
    cell(tmp_path, "strong", "stage=3", None, devices=3, state="failed", why="a|b\nc " + "long " * 99)
    write_tables(tmp_path)
    for path in (tmp_path / "tables").glob("*.md"):
        widths = {}
        for number, line in enumerate(path.read_text().splitlines()):
            if line.startswith("|"):
                widths.setdefault(number - len(widths), []).append(line.replace("\\|", "").count("|"))
        assert all(len(set(each)) == 1 for each in widths.values()), path
    text = (tmp_path / "tables" / "strong.md").read_text()
    assert "failed: a\\|b c long" in text and "…" in text


def test_a_ratio_without_ranges_has_none():
    assert Spread(4.0, 3.0, 5.0).over(Spread(2.0)) == Spread(2.0)
    assert Spread(4.0, 3.0, 5.0).over(Spread(2.0, 1.0, 4.0)) == Spread(2.0, 0.75, 5.0)


def test_no_jax_and_no_slurm(tmp_path):
    study_cells.study(tmp_path)
    program = "import sys; from jaxinfer.study.tables import write_tables; write_tables(sys.argv[1]); "
    program += "sys.exit(any(each in sys.modules for each in ('jax', 'matplotlib', 'slurm')))"
    assert subprocess.run([sys.executable, "-c", program, tmp_path]).returncode == 0
