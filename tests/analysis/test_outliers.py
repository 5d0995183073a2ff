"""A seed far from the others is flagged, and normal seeds are not, but for the stated share of cells."""

import numpy as np
import pytest

from tiedlora.analysis.outliers import outlying


@pytest.mark.parametrize(("seeds", "stated"), [(5, 0.018), (8, 0.022), (12, 0.017)])
def test_false_alarms_are_as_rare_as_the_docstring_says(seeds, stated):
    """2,000 cells: 2 % is known to within 0.6 points (95 %), and the docstring's own figure to within 0.4."""
    cells = np.random.default_rng(seeds).normal(0.5, 1, (2000, seeds))
    assert np.mean([bool(outlying(cell)) for cell in cells]) == pytest.approx(stated, abs=0.009)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.50, 0.51, 0.49, 0.50, 0.02], [4]),
        ([0.02, 0.51, 0.49, 0.50, 0.03, 0.505, 0.495, 0.50], [0, 4]),
        ([0.50, 0.51, 0.49, 0.50, 0.47], []),
        ([0.50, 0.51, 0.49, 0.02], []),
        ([0.50, 0.50, 0.50, 0.50, 0.50], []),
        ([0.50, 0.50, 0.50, 0.50, 0.505], []),
        ([0.50, 0.50, 0.50, 0.50, 0.30], [4]),
        ([1.50, 1.51, np.nan, 1.49, 1.52, 1.50, 9.0], [2, 6]),
        ([np.inf, 1.0], [0]),
        ([], []),
    ],
)
def test_what_is_flagged(scores, expected):
    assert outlying(np.array(scores)) == expected


def test_the_least_distance_is_in_the_scores_unit():
    scores = np.array([0.5000, 0.5005, 0.4995, 0.5002, 0.4925])
    assert outlying(scores) == []
    assert outlying(scores, least_distance=0.005) == [4]
    assert outlying(100 * scores) == [4]
