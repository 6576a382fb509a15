"""Charts: ticks, geometry, gaps and bounds on size."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from agentrl.viz import charts

_VALUES = st.floats(-1e9, 1e9).map(lambda x: round(x, 6))


@given(_VALUES, _VALUES)
def test_ticks_span_the_values_and_are_few(a, b):
  low, high = min(a, b), max(a, b)
  ticks = charts.nice_ticks(low, high)
  slack = 1e-6 * max(abs(low), abs(high), 1)
  assert ticks[0] <= low + slack and ticks[-1] >= high - slack
  assert 2 <= len(ticks) <= 8 and ticks == sorted(set(ticks))


def _svg(figure: str) -> ElementTree.Element:
  return ElementTree.fromstring(re.search(r'<svg.*</svg>', figure).group())


def test_a_missing_value_breaks_the_curve():
  figure = charts.line_chart('loss',
                             [charts.Series('loss', [0, 1, 2, 3, 4], [1.0, 2.0, None, 2.0, 1.0])])
  path = _svg(figure).find("path[@class='curve']").get('d')
  assert path.count('M') == 2 and path.count('L') == 2  # Two strokes of two points.


def test_points_lie_where_their_values_say():
  figure = charts.line_chart('success', [charts.Series('success', [10, 20, 30], [0.0, 0.5, 1.0])],
                             unit_range=True)
  points = [(float(c.get('cx')), float(c.get('cy'))) for c in _svg(figure).findall('circle')]
  (left, bottom), middle, (right, top) = points
  # The axis is 0 to 1 and the steps are evenly spaced, so the middle point is halfway in both
  # directions.
  assert left < right and bottom > top
  assert middle == ((left + right) / 2, (bottom + top) / 2)


def test_stacked_areas_rest_on_one_another():
  figure = charts.area_chart(
      'seconds', [charts.Series('a', [0, 1], [1.0, 1.0]),
                  charts.Series('b', [0, 1], [3.0, 3.0])])
  polygons = [[tuple(map(float, p.split(',')))
               for p in one.get('points').split()]
              for one in _svg(figure).findall('polygon')]
  lower_top, upper_bottom = polygons[0][0][1], polygons[1][-1][1]
  assert lower_top == upper_bottom
  # Heights are as 1 to 3.
  height = lambda polygon: polygon[-1][1] - polygon[0][1]
  assert abs(height(polygons[1]) - 3 * height(polygons[0])) < 0.5


def test_a_long_run_makes_a_small_page():
  steps = list(range(100_000))
  figure = charts.line_chart('loss', [charts.Series('loss', steps, [float(s % 7) for s in steps])])
  assert len(figure) < 60_000


def test_names_are_escaped():
  figure = charts.line_chart(
      '<b>', [charts.Series('"><script>', [0, 1], [1.0, 2.0]),
              charts.Series('x', [0], [1.0])])
  figure += charts.bar_table('<i>', ['<u>'], [('<a>', [0.5])])
  assert not re.search(r'<(b|u|i|a|script)>(?!</i>)', re.sub(r'<i></i>|<b>\d+%</b>', '', figure))
