"""Run by test_dpo.py as several ranks: the driver, once for each configuration."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tiny


def main(folder: Path) -> None:
    from engine import dpo

    for text in json.loads((folder / "cases.json").read_text()):
        dpo.run(tiny.from_json(text))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
