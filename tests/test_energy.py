"""Joules of a window of time, from counters that wrap and looks that come now and then."""

import pytest

from jaxinfer.telemetry.counter import Counter
from jaxinfer.telemetry.energy import Energy, difference
from jaxinfer.telemetry.rapl import Rapl


def energy(window, samples):
    """`samples`: time, joules on the counter, watts."""
    found = Energy(*window)
    for each in samples:
        found.add(*each)
    return found.joules()


def every(seconds, count, counter=None, power=None):
    times = [place * seconds for place in range(count)]
    return [(time, counter and counter(time), power and power(time)) for time in times]


def test_a_counter_that_goes_round_goes_on():
    counter = Counter(top=100)
    assert [counter(value) for value in (90, 95, 5, 5, 4)] == [0, 5, 15, 15, 114]


def test_a_counter_that_starts_anew_counts_from_there():
    counter = Counter()
    assert [counter(value) for value in (90, 95, 5, 7)] == [0, 5, 10, 12]


def test_energy_is_what_the_counter_says_between_the_ends_of_the_window():
    samples = every(0.1, 101, counter=lambda time: 300 * time, power=lambda time: 1.0)
    assert energy((1.23, 6.78), samples) == (pytest.approx(300 * 5.55), "counter")


def test_energy_without_a_counter_is_the_integral_of_power():
    samples = every(0.25, 60, power=lambda time: 100 + 20 * time)
    joules, method = energy((1.1, 9.3), samples)
    assert method == "integral of power" and joules == pytest.approx(100 * 8.2 + 10 * (9.3**2 - 1.1**2))


def test_energy_of_a_counter_that_fails_at_an_end_is_the_integral_of_power():
    samples = every(0.1, 101, counter=lambda time: 300 * time, power=lambda time: 290.0)
    samples[60] = (6.0, None, 290.0)
    assert energy((2.0, 5.5), samples)[1] == "counter", "what is missing is not at an end"
    assert energy((2.0, 5.95), samples) == (pytest.approx(290 * 3.95), "integral of power")


@pytest.mark.parametrize(
    ("window", "samples"),
    [
        ((1.0, 2.9), every(0.1, 101, counter=lambda time: time)),  # too short
        ((1.0, 11.0), every(0.1, 101, counter=lambda time: time, power=lambda time: 1.0)),  # goes on after the last
        ((-1.0, 5.0), every(0.1, 101, counter=lambda time: time, power=lambda time: 1.0)),  # began before the first
        ((1.0, 9.0), every(0.1, 101)),  # nothing is told
        ((1.0, 9.0), every(1.5, 8, counter=lambda time: time, power=lambda time: 1.0)),  # too seldom
        ((1.0, 9.0), []),
    ],
)
def test_energy_that_was_not_measured_is_none(window, samples):
    assert energy(window, samples) is None


def test_difference_of_a_total_lies_between_the_looks():
    assert difference([0.0, 1.0, 2.0, 4.0], [0.0, 10.0, 20.0, 60.0], 0.5, 3.0) == pytest.approx(35.0)
    assert difference([0.0, 4.0], [0.0, 40.0], 0.0, 4.0) == pytest.approx(40.0)
    assert difference([1.0, 4.0], [0.0, 40.0], 0.5, 4.0) is None
    assert difference([0.0, 4.0], [0.0, 40.0], 0.5, 4.1) is None
    assert difference([], [], 0.5, 4.0) is None


def powercap(root, **zones):
    for zone, (name, energy_uj) in zones.items():
        folder = root / zone.replace("_", ":")
        folder.mkdir(parents=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text("999999\n")
        (folder / "energy_uj").write_text(f"{energy_uj}\n")
    return root


def test_rapl_adds_packages_and_their_memory_over_a_wrap(tmp_path):
    root = powercap(
        tmp_path,
        **{"intel-rapl_0": ("package-0", 900_000), "intel-rapl_0_0": ("core", 1), "intel-rapl_0_1": ("dram", 100)},
        **{"intel-rapl_1": ("package-1", 5), "intel-rapl_2": ("psys", 7), "intel-rapl-mmio_0": ("package-0", 900_000)},
    )
    (root / "intel-rapl").mkdir()  # the type itself has neither name nor counter
    rapl = Rapl(root)
    assert rapl.joules() == 0
    for zone in ("intel-rapl:0", "intel-rapl:0:0", "intel-rapl:2", "intel-rapl-mmio:0"):
        (root / zone / "energy_uj").write_text("100000\n")
    (root / "intel-rapl:0:1" / "energy_uj").write_text("50100\n")
    (root / "intel-rapl:1" / "energy_uj").write_text("1000005\n")
    assert rapl.joules() == pytest.approx(0.2 + 0.05 + 1.0)


def test_rapl_that_is_not_there_or_not_for_us_is_none(tmp_path):
    assert Rapl(tmp_path / "none").joules() is None
    assert Rapl(tmp_path).joules() is None
    root = powercap(tmp_path, **{"intel-rapl_0": ("package-0", 1)})
    (root / "intel-rapl:0" / "energy_uj").unlink()
    (root / "intel-rapl:0" / "energy_uj").mkdir()  # root may read any file
    assert Rapl(root).joules() is None
