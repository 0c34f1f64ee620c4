"""The loss plot: what is drawn, from which rows, and that the picture shows it."""

from __future__ import annotations

import itertools
import json
import math

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from engine.errors import UserError
from engine.evaluation import plot
from engine.evaluation.plot import plot_loss, smooth


def write_run(path, steps=200, *, tokens=True):
    rng = np.random.default_rng(0)
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "train/loss": 2.5 + 6 * math.exp(-step / 20) + 0.05 * rng.standard_normal()}
        rows.append(row | ({"train/consumed_tokens": step * 8192} if tokens else {}))
        if step % 50 == 0:
            rows.append({"step": step, "val/loss": 2.7 + 6 * math.exp(-step / 20)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.fixture
def drawn(monkeypatch):
    """The figures that plot_loss drew, besides the files it wrote."""
    figures = []
    draw = plot._draw

    def keep(*args, **kwargs):
        figures.append(draw(*args, **kwargs))
        return figures[-1]

    monkeypatch.setattr(plot, "_draw", keep)
    return figures


def line(figure, colour, index=-1):
    return [drawn for drawn in figure.axes[0].lines if drawn.get_color() == colour][index]


def test_the_picture_shows_the_rows(tmp_path, drawn):
    rows = write_run(tmp_path / "metrics.jsonl")
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "new" / "loss.png", baselines={"unigram": 6.25, "bigram": 4.17},
              title="A run")
    axes = drawn[0].axes[0]
    training = [row for row in rows if "train/loss" in row]
    raw = line(drawn[0], plot.TRAIN, 0)
    np.testing.assert_array_equal(raw.get_xdata(), [row["train/consumed_tokens"] for row in training])
    np.testing.assert_array_equal(raw.get_ydata(), [row["train/loss"] for row in training])
    validation = line(drawn[0], plot.VALIDATION)
    np.testing.assert_array_equal(validation.get_xdata(), [step * 8192 for step in (50, 100, 150, 200)])
    np.testing.assert_array_equal(validation.get_ydata(), [row["val/loss"] for row in rows if "val/loss" in row])
    assert line(drawn[0], plot.MUTED, 0).get_ydata() == [6.25, 6.25]
    assert line(drawn[0], plot.MUTED, 1).get_ydata() == [4.17, 4.17]
    assert (axes.get_xlabel(), axes.get_title(loc="left")) == ("tokens", "A run")
    texts = [text.get_text() for text in axes.texts]
    smoothed = smooth(np.array([row["train/loss"] for row in training]))[-1]
    assert sorted(texts) == sorted(["unigram 6.25", "bigram 4.17", f"training {smoothed:.2f}", "validation 2.70"])

    picture = matplotlib.image.imread(tmp_path / "new" / "loss.png")[..., :3]
    assert picture.shape == (768, 1344, 3)
    for colour in (plot.TRAIN, plot.VALIDATION, plot.MUTED):
        assert (np.abs(picture - to_rgb(colour)).max(-1) < 0.01).sum() > 100
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["loss.png"]


def test_steps_where_a_row_has_no_tokens(tmp_path, drawn):
    write_run(tmp_path / "metrics.jsonl", 30, tokens=False)
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert drawn[0].axes[0].get_xlabel() == "steps"
    assert line(drawn[0], plot.TRAIN).get_xdata()[-1] == 30


def test_non_finite_losses_and_a_torn_line_are_left_out(tmp_path, drawn):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": 5.0}\n{"step": 2, "train/loss": "NaN"}\n{"step": 3, "train/loss": 4.0,'
                    ' "val/loss": "Infinity"}\n{"step": 4, "train/lo')
    plot_loss(path, tmp_path / "loss.png")
    assert line(drawn[0], plot.TRAIN).get_xydata().tolist() == [[1, 5], [3, 4]]
    assert not [drawn for drawn in drawn[0].axes[0].lines if drawn.get_color() == plot.VALIDATION]


def test_a_lone_spike_does_not_flatten_the_curve(tmp_path, drawn):
    rows = write_run(tmp_path / "metrics.jsonl", 400)
    rows[300]["train/loss"] = 500.0
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    low, high = drawn[0].axes[0].get_ylim()
    assert 1.9 < low < 2.5
    assert 8 < high < 10


@pytest.mark.parametrize("ends", [[2.60, 2.61, 2.62, 2.63], [2.5, 2.5, 2.5, 9.0], [8.9, 8.95, 9.0, 2.0], [2, 4, 6, 8]])
def test_labels_stay_apart_and_near_their_lines(tmp_path, drawn, ends):
    rows = [{"step": step, "train/loss": 9.0 if step == 1 else ends[0], "val/loss": ends[1]} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png", baselines={"one": ends[2], "two": ends[3]})
    axes = drawn[0].axes[0]
    low, high = axes.get_ylim()
    heights = sorted((text.get_position()[1], float(text.get_text().split()[-1])) for text in axes.texts)
    assert [value for _, value in heights] == sorted(value for _, value in heights)
    assert all(b - a >= plot.LABEL_HEIGHT - 1e-9 for (a, _), (b, _) in itertools.pairwise(heights))
    for height, value in heights:
        assert abs(height - (value - low) / (high - low)) <= 2 * plot.LABEL_HEIGHT
        assert 0 <= height < 1.05


def test_smooth_against_a_loop():
    values = np.random.default_rng(1).standard_normal(237)
    half = max(1, round(237 * plot.SMOOTHING / 2))
    expected = []
    for index in range(237):
        reach = min(half, index // 4)
        expected.append(values[index - reach:index + reach + 1].mean())
    np.testing.assert_allclose(smooth(values), expected, rtol=1e-9, atol=1e-12)
    assert smooth(values)[0] == values[0]


@pytest.mark.parametrize(("text", "message"), [
    (None, "metrics.jsonl: no such file"),
    ("", "no row has a finite train/loss"),
    ('{"step": 1, "val/loss": 3.0}\n', "no row has a finite train/loss"),
    ('{"step": 1, "train/loss": "NaN"}\n', "no row has a finite train/loss"),
])
def test_nothing_to_draw(tmp_path, text, message):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()
