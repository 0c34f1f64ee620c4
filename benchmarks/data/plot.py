"""Cost against size, as a picture: ``python -m benchmarks.data.plot results/cpu_data_curve.json OUT.svg``."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

NAME = re.compile(r"(?P<job>\w+) (?P<size>[\d,]+) (?P<unit>[\w ]+): (?P<side>.+)")


def curves(result: dict) -> dict[str, dict[str, list[tuple[int, float, float]]]]:
    """job -> side -> (size, seconds, memory MB) in the order of size, of the rows that were measured."""
    found: dict[str, dict[str, list]] = {}
    for row in result["suites"]["data"]:
        parts = NAME.fullmatch(row["name"])
        if parts and row["values"].get("seconds"):
            point = (int(parts["size"].replace(",", "")), row["values"]["seconds"], row["values"]["memory MB"])
            found.setdefault(f"{parts['job'].replace('_', ' ')} ({parts['unit']})", {}).setdefault(
                parts["side"], []).append(point)
    return {job: {side: sorted(points) for side, points in sides.items()} for job, sides in found.items()}


def draw(result: dict, output: Path) -> None:
    """One panel a job, both axes logarithmic."""
    found = curves(result)
    # The same file for the same figures, and text in it as text.
    matplotlib.rcParams.update({"svg.hashsalt": "mainspring", "svg.fonttype": "none"})
    figure, axes = pyplot.subplots(2, len(found), figsize=(3.4 * len(found), 5.6), squeeze=False, sharex="col")
    for column, (job, sides) in enumerate(found.items()):
        for number, (side, points) in enumerate(sides.items()):
            sizes, seconds, memory = zip(*points, strict=True)
            style = {"marker": "o", "markersize": 4, "linewidth": 2 if number == 0 else 1, "color": f"C{number}"}
            axes[0][column].loglog(sizes, seconds, label=side, **style)
            axes[1][column].loglog(sizes, [max(each, 0.1) for each in memory], **style)
        axes[0][column].set_title(job, fontsize=10)
        axes[0][column].legend(fontsize=8, frameon=False)
        for axis in (axes[0][column], axes[1][column]):
            axis.grid(True, which="major", linewidth=0.4, alpha=0.6)
    axes[0][0].set_ylabel("seconds")
    axes[1][0].set_ylabel("memory, MB")
    figure.tight_layout()
    figure.savefig(output, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
