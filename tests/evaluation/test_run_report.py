"""Charts that show what was measured, and a page that names what happened."""

from __future__ import annotations

import math
import re

import pytest

from engine.evaluation import run_report, svg
from engine.evaluation.svg import Line


@pytest.mark.parametrize(("low", "high", "expected"), [
    (0, 10, [0, 2.5, 5, 7.5, 10]), (0.9, 4.1, [1, 2, 3, 4]), (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    (1e-4, 3e-4, [1e-4, 1.5e-4, 2e-4, 2.5e-4, 3e-4]), (1234, 1266, [1240, 1250, 1260])])
def test_ticks_are_round_and_inside(low, high, expected):
    assert svg.ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(("value", "text"), [
    (0, "0"), (12345, "12.35k"), (2.5e6, "2.5M"), (0.25, "0.25"), (2.5e-4, "0.00025"), (5e-7, "5e-07"),
    (-1500, "-1.5k")])
def test_short_numbers(value, text):
    assert svg.short(value) == text


def circles(text: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'<circle[^>]* cx="([\d.]+)" cy="([\d.]+)"', text)]


def test_points_lie_where_their_values_are():
    text = svg.chart([Line("validation", "val", [(0, 1.0), (50, 3.0), (100, 2.0)])], title="loss")
    (x0, y0), (x1, y1), (x2, y2) = circles(text)
    assert (x0, x2) == (svg.LEFT, svg.WIDTH - svg.RIGHT)
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 < y2 < y0  # up is more
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.1)


def test_what_is_not_finite_is_left_out_and_nothing_is_no_chart():
    text = svg.chart([Line("a", "val", [(0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0)])], title="loss")
    assert len(circles(text)) == 2
    assert svg.chart([Line("a", "val", [(0, math.nan)])], title="loss") == ""


def test_a_constant_and_a_single_point_have_a_chart():
    assert len(circles(svg.chart([Line("a", "val", [(1, 0.0), (2, 0.0)])], title="x"))) == 2
    assert len(circles(svg.chart([Line("a", "val", [(0, 5.0)])], title="x"))) == 1


def test_a_spike_does_not_flatten_the_curve_and_a_start_is_none():
    falling = [(i, 10.0 / (1 + i)) for i in range(200)]
    _, high = svg.y_range([Line("a", "train", falling)], None)
    assert high >= 10
    _, high = svg.y_range([Line("a", "train", [*falling[:150], (150, 1e6), *falling[151:]])], None)
    assert high < 12


def test_a_distant_bound_is_not_drawn_and_a_near_one_is():
    line = Line("a", "val", [(0, 1.0), (1, 2.0)])
    assert 'class="level"' not in svg.chart([line], title="x", level=("gate", 1e6))
    assert 'class="level"' in svg.chart([line], title="x", level=("gate", 2.5))


def test_smoothing_keeps_a_line_straight_and_its_ends():
    straight = [(i, 3.0 * i) for i in range(100)]
    assert svg.smooth(straight)[0] == (0, 0.0)
    assert svg.smooth(straight)[50] == (50, pytest.approx(150.0))
    thinned = svg.thin([(i, 0.0) for i in range(10_000)])
    assert (len(thinned), thinned[0][0], thinned[-1][0]) == (svg.MOST_POINTS, 0, 9999)


def test_train_and_val_share_a_chart_and_rewards_have_theirs():
    rows = [{"step": step, "train/loss": 1 / step, "val/loss": 2 / step, "rewards/margins": step / 10,
             "val/rewards/margins": step / 20, "rewards/accuracies": 0.5, "train/accuracy": 0.5,
             "train/consumed_tokens": 9, "data/epochs": step}
            for step in (1, 2, 3)]
    gate = {"metric": "val/rewards/margins", "bounds": {"above": 0.1}, "file": "metrics.jsonl"}
    text = run_report.charts(rows, [gate])
    assert re.findall(r'aria-label="([^"]+)"', text) == ["loss", "rewards/margins", "rewards/accuracies"]
    assert "training 0.3</span>" in text
    assert "validation 0.15</span>" in text
    assert text.count('class="level"') == 1


@pytest.mark.parametrize(("status", "words", "tone"), [
    ("promoted", "All 1 stages promoted", "good"), ("refused", "a refused by a gate: too low", "bad"),
    ("failed", "a failed: too low", "bad"), ("interrupted", "a interrupted: too low", "verdict"),
    ("waiting", "0 of 1 stages promoted", "verdict")])
def test_the_verdict(tmp_path, status, words, tone):
    entry = {"status": status, "steps": {}, "gates": []} | ({} if status == "promoted" else {"reason": "too low"})
    text = run_report.render(tmp_path, {"title": "t", "stages": {"a": entry}}, ["a"])
    verdict = re.search(r'<p class="verdict[^"]*">.*?</p>', text)
    assert verdict is not None
    assert words in verdict[0]
    assert tone in verdict[0]


def test_durations():
    assert [run_report.duration(s) for s in (0.4, 59.6, 125, 7620)] == ["0 s", "1 min 00 s", "2 min 05 s", "2 h 07 min"]
