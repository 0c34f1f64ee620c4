"""The files and services that receive metric rows; ``engine.train.metrics`` describes the format of each."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from engine.errors import UserError

Row = Mapping[str, "int | float"]


class Sink(Protocol):
    where: Path

    def write(self, step: int, row: Row) -> None: ...

    def close(self, failed: bool) -> None: ...


class JsonlSink:
    """metrics.jsonl: on opening, keeps the rows up to ``start_step`` (none at 0); then appends a line at a time."""

    def __init__(self, path: Path, start_step: int):
        self.where = path
        rows, self.unreadable = read_rows(path)
        kept = [row for row in rows if start_step and row["step"] <= start_step]
        replace_file(path, "".join(map(_json_line, kept)))
        self._file = path.open("a", encoding="utf-8", newline="\n")

    def write(self, step: int, row: Row) -> None:
        self._file.write(_json_line({"step": step, **row}))
        self._file.flush()  # into the kernel's hands: a killed process loses nothing that was logged

    def close(self, failed: bool) -> None:
        self._file.close()


class CsvSink:
    """metrics.csv: the rows of metrics.jsonl under one header. A new column rewrites the file, atomically."""

    def __init__(self, path: Path, source: JsonlSink):
        self.where = path
        self._source = source
        self._columns: list[str] = ["step"]
        self._rebuild()

    def write(self, step: int, row: Row) -> None:
        if row.keys() <= set(self._columns):
            self._file.write(_csv_lines(self._columns, [{"step": step, **row}]))
            self._file.flush()
        else:  # metrics.jsonl, written before, has this row too
            self._file.close()
            self._rebuild()

    def _rebuild(self) -> None:
        rows, _ = read_rows(self._source.where)
        self._columns = list(dict.fromkeys(["step", *(name for row in rows for name in row)]))
        header = ",".join(self._columns) + "\n"
        replace_file(self.where, header + _csv_lines(self._columns, rows))
        self._file = self.where.open("a", encoding="utf-8", newline="")

    def close(self, failed: bool) -> None:
        self._file.close()


class TensorBoardSink:
    """tensorboard/: scalars under the metrics' own names, the run's configuration as text.

    Opened at the first row, so that its import does not delay the first step. A resumed run tells TensorBoard to
    forget ("purge") what the earlier one wrote beyond ``start_step``.
    """

    def __init__(self, directory: Path, start_step: int, run_config: Mapping[str, Any]):
        self.where = directory
        self._start_step = start_step
        self._run_config = run_config
        self._writer: Any = None

    def write(self, step: int, row: Row) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            first_step = self._start_step + 1 if self._start_step else 0
            self._writer = SummaryWriter(str(self.where), purge_step=first_step)
            if self._run_config:
                text = json.dumps(self._run_config, indent=2, default=str)
                self._writer.add_text("config", f"```json\n{text}\n```", global_step=first_step)
        for name, value in row.items():
            self._writer.add_scalar(name, value, global_step=step)
        self._writer.flush()  # 0.4 ms for a row of 14 scalars

    def close(self, failed: bool) -> None:
        if self._writer is not None:
            self._writer.close()


class WandbSink:
    """Weights & Biases. The run's id is kept in ``wandb_run_id``, so a resumed run continues the same curves.

    W&B takes rows in step order only: rows repeated after a resume, which are equal to the first ones, it ignores.
    """

    def __init__(self, output_dir: Path, *, mode: Literal["online", "offline"], project: str, name: str,
                 run_config: Mapping[str, Any], start_step: int):
        self.where = output_dir / "wandb"
        try:
            import wandb
            from wandb.errors import Error as WandbError
        except ImportError as error:
            raise UserError("Weights & Biases is asked for, but the package wandb is not installed",
                            where="logging.wandb",
                            fix="`pip install wandb` (or mainspring[wandb]), or set logging.wandb to off") from error
        if mode == "online" and not wandb.api.api_key:
            raise UserError("Weights & Biases has no API key on this machine", where="logging.wandb",
                            fix="Run `wandb login`, or set logging.wandb to offline and `wandb sync` later")
        id_file = output_dir / "wandb_run_id"
        known = start_step > 0 and id_file.is_file()
        run_id = id_file.read_text().strip() if known else uuid.uuid4().hex[:12]
        try:
            # console="off": W&B would otherwise wrap stdout and stderr, under the progress bar's feet.
            settings = wandb.Settings(console="off", silent=True)
            self._run = wandb.init(project=project, name=name, id=run_id, dir=str(output_dir),
                                   mode=mode, config=dict(run_config), resume="allow", settings=settings)
        except WandbError as error:
            raise UserError(f"Weights & Biases did not start: {error}", where="logging.wandb",
                            fix="Set logging.wandb to offline and `wandb sync` later, or to off") from error
        replace_file(id_file, run_id + "\n")

    def write(self, step: int, row: Row) -> None:
        self._run.log(dict(row), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a metrics.jsonl, and how many lines were not rows (not counting a torn last one).

    "NaN", "Infinity" and "-Infinity" come back as floats. A missing file has no rows.
    """
    if not path.exists():
        return [], 0
    *lines, _torn = path.read_bytes().split(b"\n")  # what follows the last newline was cut off by a kill
    rows = [row for row in map(_parse_line, lines) if row is not None]
    return rows, len(lines) - len(rows)


def replace_file(path: Path, text: str) -> None:
    """Replaces a small file at once: after a crash there is the old one or the new one, never a half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _parse_line(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # not JSON, or not UTF-8
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    return {name: _SPECIAL.get(value, value) if isinstance(value, str) else value for name, value in row.items()}


def _json_line(row: Mapping[str, Any]) -> str:
    finite = {name: value if math.isfinite(value) else _name_of(value) for name, value in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _name_of(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _csv_lines(columns: list[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, restval="", lineterminator="\n").writerows(rows)
    return text.getvalue()
