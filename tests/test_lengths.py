"""Kaplan and Meier's estimate of output lengths."""

import numpy as np

from jaxinfer.engine.lengths import OutputLengths


def lengths(*ended: tuple[int, bool]) -> OutputLengths:
    found = OutputLengths()
    for tokens, stopped in ended:
        found.ended(tokens, stopped)
    return found


def test_nothing_known_means_the_limit():
    none = lengths().survival([3, 4])
    assert none.expect([0, 5], [100, 7], [0, 1]).tolist() == [100, 7]
    at_limits = lengths((50, False), (80, False)).survival([])
    assert at_limits.expect([0], [100], [0]).tolist() == [100]


def test_the_textbook_example():
    """Remission times of 21 patients, + still in remission: Freireich et al. 1963, as in every textbook of survival
    analysis: S(6) = 0.857, S(7) = 0.807, S(10) = 0.753, S(13) = 0.690, S(16) = 0.627, S(22) = 0.538, S(23) = 0.448."""
    events = [6, 6, 6, 7, 10, 13, 16, 22, 23]
    censored = [6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35]
    survival = lengths(*[(t, True) for t in events], *[(t, False) for t in censored[:5]]).survival(censored[5:])
    assert survival.at.tolist() == [6, 7, 10, 13, 16, 22, 23]
    assert np.round(survival.longer, 3).tolist() == [0.857, 0.807, 0.753, 0.690, 0.627, 0.538, 0.448]


def test_many_expectations_have_the_distribution_of_what_ended():
    rng = np.random.default_rng(1)
    ended = rng.geometric(1 / 50, 1000)
    survival = lengths(*[(int(each), True) for each in ended]).survival([])
    expected = survival.expect(np.zeros(500, int), np.full(500, 10_000), np.arange(500))
    assert abs(expected.mean() / ended.mean() - 1) < 0.03
    assert abs(expected.std() / ended.std() - 1) < 0.1
    later = survival.expect(np.full(500, 100), np.full(500, 10_000), np.arange(500))
    assert later.min() > 100 and abs((later - 100).mean() / 50 - 1) < 0.2, "geometric lengths have no memory"


def test_expectations_stay_between_what_is_there_and_the_limit():
    survival = lengths((5, True), (9, True)).survival([])
    assert survival.expect([20, 4, 0], [21, 6, 3], [0, 1, 2]).tolist() == [21, 6, 3]
