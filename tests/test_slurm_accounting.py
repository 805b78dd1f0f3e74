"""What sacct says, as numbers: on its real answers, recorded from Slurm 22.05, and on forms that other sites print."""

import pytest

from slurm.accounting import FIELDS, SEPARATOR, _number, _seconds, last_state, parse, summary

COLUMNS = "JobID,JobName,State,ExitCode,Partition,Account,AllocTRES,Submit,Start,End,NodeList,ElapsedRaw,TotalCPU"
COLUMNS = [*COLUMNS.split(","), "CPUTimeRAW", "MaxRSS", "ConsumedEnergyRaw"]
AT = "2026-11-30T18:43:02|2026-11-30T18:43:02|2026-11-30T18:43:10"
TWO_NODES = f"""\
1|my run|COMPLETED|0:0|main|root|billing=2,cpu=2,mem=1000M,node=2|{AT}|node[1-2]|8|00:07.018|16||0
1.batch|batch|COMPLETED|0:0||root|cpu=1,mem=500M,node=1|{AT}|node1|8|00:00.018|8||0
1.0|bash|COMPLETED|0:0||root|cpu=2,mem=1000M,node=2|{AT}|node[1-2]|8|00:07|16|47095808|0
"""
NEVER_BEGAN = "2|x|CANCELLED by 0|0:0|main|root||2026-11-30T18:43:02|None|Unknown|None assigned|0|00:00:00|0||\n"


def recorded(text: str) -> list[dict]:
    return parse("\n".join([SEPARATOR.join(COLUMNS), *text.replace("|", SEPARATOR).splitlines()]))


def rows(*texts: str) -> list[dict]:
    """Records of the fields id, state, elapsed_s, cpu_s, max_rss_bytes and energy_j; "-" is None."""
    names = ("id", "state", "elapsed_s", "cpu_s", "max_rss_bytes", "energy_j")
    empty = {"allocated_cpu_s": None, **dict.fromkeys(names)}
    found = []
    for text in texts:
        words = text.split("|")
        found.append(empty | dict(zip(names, words[:2])) | dict(zip(names[2:], map(int_or_none, words[2:]))))
    return found


def int_or_none(text: str) -> int | None:
    return None if text == "-" else int(text)


def test_all_columns_are_asked_for():
    assert COLUMNS == FIELDS


def test_a_job_on_two_nodes():
    job, batch, step = recorded(TWO_NODES)
    assert (job["id"], job["name"], job["state"], job["nodes"]) == ("1", "my run", "COMPLETED", ["node1", "node2"])
    assert (job["elapsed_s"], job["cpu_s"], job["allocated_cpu_s"]) == (8, 7.018, 16)
    assert job["tres"] == "billing=2,cpu=2,mem=1000M,node=2" and job["end"] == "2026-11-30T18:43:10"
    # without an energy plugin, and where a step ended before it was looked at, Slurm says 0 or nothing
    assert job["energy_j"] is None and batch["max_rss_bytes"] is None and step["max_rss_bytes"] == 47095808
    whole = summary("1", [job, batch, step])
    assert whole.pop("records") == [job, batch, step]
    assert whole == {
        "job": "1", "state": "COMPLETED", "elapsed_s": 8, "cpu_s": 7.018, "allocated_cpu_s": 16,
        "max_rss_bytes": 47095808, "energy_j": None,
    }  # fmt: skip


def test_a_job_that_never_began():
    (job,) = recorded(NEVER_BEGAN)
    assert job["nodes"] == [] and job["cpu_s"] is None and job["start"] is None and job["end"] is None
    assert summary("2", [job])["state"] == "CANCELLED" and summary("2", [job])["elapsed_s"] == 0
    assert parse("") == []


def test_the_last_attempt_counts():
    records = rows(
        "5|REQUEUED|9|90|-|-", "5.0|CANCELLED|9|90|1000|-", "5|COMPLETED|4|40|-|-", "5.0|COMPLETED|4|40|700|-"
    )
    found = summary("5", records)
    assert (found["elapsed_s"], found["cpu_s"], found["max_rss_bytes"]) == (4, 40, 700)


def test_an_array_is_the_sum_of_its_tasks():
    records = rows(
        "7_1|COMPLETED|9|90|-|-", "7_1.0|COMPLETED|9|90|1000|-", "7_0|FAILED|4|-|-|-", "7_0.0|FAILED|4|40|9|-"
    )
    found = summary("7", records)
    assert (found["state"], found["elapsed_s"], found["cpu_s"], found["max_rss_bytes"]) == ("FAILED", 9, 130, 1000)


def test_energy_of_steps_beside_each_other_is_not_added():
    steps = ("8.batch|COMPLETED|9|1|-|500", "8.0|COMPLETED|8|40|-|460")
    assert summary("8", rows("8|COMPLETED|9|41|-|-", *steps))["energy_j"] == 500
    assert summary("8", rows("8|COMPLETED|9|41|-|510", *steps))["energy_j"] == 510


def test_a_step_without_its_job():
    found = summary("3", rows("3.4|FAILED|5|50|800|-"))
    assert found["state"] == "FAILED" and found["job"] == "3"
    assert (found["elapsed_s"], found["cpu_s"], found["max_rss_bytes"]) == (5, 50, 800)
    again = summary("3", rows("3.4|FAILED|5|50|800|-", "3.4|COMPLETED|6|60|700|-"))
    assert (again["state"], again["elapsed_s"]) == ("COMPLETED", 6)


def test_last_state_is_that_of_the_last_attempt():
    requeued = rows("20|REQUEUED", "20.0|COMPLETED", "20|REQUEUED", "20|COMPLETED", "20.batch|COMPLETED")
    assert last_state(requeued).name == "COMPLETED"
    assert last_state([*requeued, *rows("20|CANCELLED by 0", "20.0|COMPLETED")]).name == "CANCELLED"
    array = last_state(
        rows("7_0|COMPLETED", "7_[3-4,8%2]|CANCELLED by 0", "7_1|FAILED", "7_1.batch|FAILED", "7_2|COMPLETED")
    )
    assert str(array) == "FAILED (2 COMPLETED, 1 FAILED, 3 CANCELLED)"
    assert {task: state.name for task, state in array.failed.items()} == {
        1: "FAILED", 3: "CANCELLED", 4: "CANCELLED", 8: "CANCELLED"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "number"),
    [("", None), ("0", 0), ("37", 37), ("1200K", 1228800), ("1.50M", 1572864), ("2G", 1 << 31), ("a lot", None)],
)
def test_numbers(text, number):
    assert _number(text) == number


def test_what_is_no_number_of_joules():
    assert _number("18446744073709551614") is None  # Slurm's "no value", as it stands in some answers


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("00:00.018", 0.018), ("12:34", 754), ("01:02:03", 3723), ("2-01:00:00", 176400), ("", None), ("INVALID", None)],
)
def test_times(text, seconds):
    assert _seconds(text) == seconds
