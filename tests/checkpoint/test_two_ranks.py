"""Saves that fail on one of two ranks, and checkpoints that both refuse alike, in one pair of processes."""

from __future__ import annotations

from pathlib import Path

import tiny


def test_both_ranks_say_what_failed_on_one(config, tmp_path):
    (tmp_path / "config.json").write_text(tiny.to_json(config()))
    for code, output in tiny.launch(Path(__file__).with_name("two_ranks.py"), 2, tmp_path):
        assert code == 0, output[-6000:]
