"""Small intervals in rows: their axis, and what goes beyond it."""

import math
import re

from tiedlora.page.tracks import axis_of_differences, better_right, track
from tiedlora.records.interval import Interval

SHORT = [Interval(0.02, 0.01, 0.03), Interval(-0.03, -0.04, -0.02), Interval(0.01, 0.0, 0.02)]


def test_an_axis_has_0_and_all_values_and_one_long_interval_does_not_hide_the_others():
    low, high = axis_of_differences(SHORT)
    assert low < -0.03 < 0 < 0.02 < high
    low, high = axis_of_differences([*SHORT, Interval(0.0, -9.0, 9.0)])
    assert -0.1 < low < 0 < high < 0.1
    low, high = axis_of_differences([*SHORT, Interval(0.5, math.nan, math.nan)])
    assert low < 0 < 0.5 < high
    assert axis_of_differences([])[0] < 0 < axis_of_differences([])[1]


def test_of_a_loss_the_lower_number_is_at_the_right():
    assert better_right(Interval(-0.2, -0.3, -0.1), -1.0) == Interval(0.2, 0.1, 0.3)
    assert better_right(Interval(0.2, 0.1, 0.3), 1.0) == Interval(0.2, 0.1, 0.3)


def test_a_drawing_has_attributes_alone_and_an_arrow_where_it_goes_on():
    inside = track(Interval(0.0, -0.5, 0.5), (-1.0, 1.0), tone="good", zone=(0.0, math.inf))
    assert "style" not in inside
    assert 'fill="var(--zone)"' in inside
    (x,) = re.findall(r'<circle cx="([\d.]+)"', inside)
    assert float(x) == 80, "the middle"
    assert "z" not in "".join(re.findall(r' d="([^"]+)"', inside)), "no arrow"
    beyond = track(Interval(3.0, 2.0, 4.0), (-1.0, 1.0), tone="bad", is_firm=False)
    assert "circle" not in beyond
    assert "dasharray" in beyond
    assert sum("z" in path for path in re.findall(r' d="([^"]+)"', beyond)) == 1
