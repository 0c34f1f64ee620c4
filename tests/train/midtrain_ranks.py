"""Run by test_stages.py as several ranks: the mid-training driver on the configuration in a file."""

from __future__ import annotations

import sys
from pathlib import Path

import tiny

from engine import midtrain

if __name__ == "__main__":
    midtrain.run(tiny.from_json(Path(sys.argv[1]).read_text()))
