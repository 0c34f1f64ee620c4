"""What a step of test_pipeline.py runs: writes a folder as training would, and a line for every time it was run.

`pipeline_stub.py FOLDER RUNS [key=value …]`: content= (of the checkpoint), loss=, code= (to exit with), sleep=,
once= (a file: fail unless it is there, and make it).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path


def main(folder: Path, runs: Path, **options: str) -> int:
    with runs.open("a") as file:
        file.write(f"{folder.name} rank {os.environ.get('RANK', '-')} of {os.environ.get('WORLD_SIZE', '-')} "
                   f"{os.environ.get('COLOUR', '')}".rstrip() + "\n")
    if os.environ.get("RANK", "0") != "0":
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    if "sleep" in options:
        (folder / "pid").write_text(str(os.getpid()))
        time.sleep(float(options["sleep"]))
        (folder / "pid").unlink()
    if "once" in options and not Path(options["once"]).exists():
        Path(options["once"]).touch()
        print("out of luck", file=sys.stderr)
        return 1
    if "code" in options:
        print("error: the cat sat on <the> keyboard", file=sys.stderr)
        return int(options["code"])
    checkpoint = folder / "checkpoints/iter_0000010"
    checkpoint.mkdir(parents=True, exist_ok=True)
    content = options.get("content", folder.name).encode()
    (checkpoint / "weights").write_bytes(content)
    files = {"weights": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps({"version": 1, "files": files}, indent=1, sort_keys=True))
    (checkpoint.parent / "latest_checkpointed_iteration.txt").write_text("10\n")
    loss = float(options.get("loss", 2))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(
        {"step": step, "train/loss": loss + 1 / step, "val/loss": loss + 1 / step}) + "\n" for step in range(1, 11)))
    print(f"{folder.name} is done")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), **dict(word.split("=", 1) for word in sys.argv[3:])))
