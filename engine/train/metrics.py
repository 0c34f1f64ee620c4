"""Where a run's numbers go: metrics.jsonl and metrics.csv always, TensorBoard, W&B when asked, and the console.

The names, the same for every architecture and stage (FEATURES 5.2; others, such as ``rewards/chosen``, may be added):

    train/loss                nats per supervised token       train/grad_norm          L2, before clipping
    train/perplexity          exp(train/loss)                 train/memory_gb          GB (1e9 bytes), peak of this rank
    train/accuracy            share of tokens, 0 to 1         train/seq_length         tokens per sequence
    train/lr                  learning rate                   train/global_batch_size  sequences per step
    train/tokens_per_sec      tokens/s, all ranks             train/consumed_tokens    tokens since step 0
    train/mfu                 share of the peak, 0 to 1       val/loss, val/perplexity, val/accuracy   as train/*

train/loss, and so train/perplexity, contain the terms of train.label_smoothing and train.z_loss where those are set;
val/* are plain cross-entropy always. Of models with experts, over the global batch:

    train/aux_loss            balance loss, mean over layers, before its coefficient: 1 when tokens are spread evenly
    train/z_loss              mean square of the log of the summed exponentials of router logits, mean over layers
    train/expert_load_max     tokens of the busiest expert over those of an even spread, in the worst layer

And of what was read up to the step, by source (data_ledger.json has more): data/NAME/tokens and data/NAME/epochs, or
data/epochs where there is one source.

metrics.jsonl is the source of truth: one object a line, ``step`` first. JSON has no NaN or infinity, so those are
written as the strings "NaN", "Infinity" and "-Infinity", which ``float()`` in Python and ``Number()`` in JavaScript
read back (null would not say which of them it was). metrics.csv is rewritten from it at a resume, and whenever a new
column appears.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from engine.errors import UserError
from engine.losses.perplexity import perplexity
from engine.train.console import Console
from engine.train.sinks import CsvSink, JsonlSink, Sink, TensorBoardSink, WandbSink

__all__ = ["LoggingOptions", "MetricLogger", "perplexity"]


class LoggingOptions(Protocol):
    """The fields this file reads of ``engine.config.LoggingConfig``."""

    tensorboard: bool
    wandb: Literal["off", "online", "offline"]
    wandb_project: str
    progress: Literal["auto", "on", "off"]


class MetricLogger:
    """Writes every logged row to all sinks. A kill at any moment loses at most the line being written.

    ``start_step`` is the number of steps already done: 0 for a fresh run, the checkpoint's step for a resumed one.
    Rows beyond it, which a crashed run wrote after its last checkpoint, are dropped, as is a torn last line, so no
    step appears twice. At 0 nothing earlier is kept. Log a step before saving its checkpoint: a row at or before
    ``start_step`` is never written again.

    Only the rank with ``is_main`` opens, writes or prints anything. Raises UserError if the directory cannot be
    written, or if W&B is asked for and cannot be used.
    """

    def __init__(self, output_dir: Path | str, *, logging: LoggingOptions, total_steps: int, start_step: int = 0,
                 is_main: bool = True, run_config: Mapping[str, Any] | None = None, run_name: str | None = None):
        self._sinks: list[Sink] = []
        self._console: Console | None = None
        if not is_main:
            return
        output_dir = Path(output_dir)
        run_config = dict(run_config or {})
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            jsonl = JsonlSink(output_dir / "metrics.jsonl", start_step)
            self._sinks = [jsonl, CsvSink(output_dir / "metrics.csv", jsonl)]
        except OSError as error:
            raise _write_error(output_dir, error) from error
        if logging.tensorboard:
            self._sinks.append(TensorBoardSink(output_dir / "tensorboard", start_step, run_config))
        if logging.wandb != "off":
            name = run_name or output_dir.resolve().name
            self._sinks.append(WandbSink(output_dir, mode=logging.wandb, project=logging.wandb_project, name=name,
                                         run_config=run_config, start_step=start_step))
        self._console = Console(total_steps=total_steps, start_step=start_step, progress=logging.progress)
        if jsonl.unreadable:
            self._console.message(f"metrics.jsonl: dropped {jsonl.unreadable} unreadable line(s) of the earlier run")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one row for ``step`` (steps done, counted from 1). Values: numbers or one-element tensors.

        Keys may differ from call to call. Raises UserError when the row cannot be written (a full disk).
        """
        if self._console is None:
            return
        row = {name: _number(value) for name, value in metrics.items()}
        for sink in self._sinks:
            try:
                sink.write(step, row)
            except OSError as error:
                raise _write_error(sink.where, error) from error
        self._console.row(step, row)

    def advance(self, step: int) -> None:
        """Moves the progress bar to ``step`` between two logged rows; prints and writes nothing."""
        if self._console is not None:
            self._console.advance(step)

    def message(self, text: str) -> None:
        """Prints a line for people, above the progress bar where there is one."""
        if self._console is not None:
            self._console.message(text)

    def close(self, *, failed: bool = False) -> None:
        """Finishes all sinks; ``failed`` marks the W&B run as such. Closing twice does nothing."""
        sinks, self._sinks = self._sinks, []
        console, self._console = self._console, None
        if console is not None:
            console.close()
        for sink in sinks:
            sink.close(failed)

    def __enter__(self) -> MetricLogger:
        return self

    def __exit__(self, exception_type: type | None, *_: object) -> None:
        self.close(failed=exception_type is not None)


def _number(value: Any) -> int | float:
    """A plain int or float of a number, a numpy scalar or a one-element tensor."""
    if isinstance(value, numbers.Integral):
        return int(value)
    return value.item() if hasattr(value, "item") else float(value)


def _write_error(where: Path, error: OSError) -> UserError:
    return UserError(f"cannot write metrics: {error.strerror or error}", where=str(error.filename or where),
                     fix="Free some space there, mend the permissions, or choose another --output_dir")
