"""What every training stage does, in order; a driver says what it reads and what its loss is."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from engine.checkpoint.adapters import Base
from engine.checkpoint.manager import Checkpointer, agree
from engine.config import Config, vocabulary
from engine.data import ledger
from engine.data.order import BEFORE_NAMES
from engine.data.tokenizer import load_tokenizer
from engine.errors import UserError
from engine.evaluation.perplexity import evaluate
from engine.model import build, lora_report
from engine.model.objective import NEXT_TOKEN, Objective
from engine.parallel import topology, wrap
from engine.parallel.topology import Groups
from engine.stages.origin import Origin
from engine.train import loop, optimizer
from engine.train.metrics import MetricLogger
from engine.train.run import logger_for, report_first_step, report_start
from engine.train.state import TrainState


@dataclass
class Data:
    """What a stage reads: loaders with the interface of ``engine.data.loader.Loader``, closed with it.

    ``rows``: of one pass over the training data, where ``examples.epochs`` may ask for passes. ``report``: lines for
    people, said before the first step.
    """

    train: Any
    held_out: Any
    rows: int | None = None
    report: tuple[str, ...] = ()

    def __enter__(self) -> Data:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.closing(self.train), contextlib.closing(self.held_out):
            pass


@dataclass(frozen=True)
class Start:
    """A built model before its first step, for ``before`` of ``run``. ``load`` gives it its initial weights."""

    cfg: Config
    groups: Groups
    chunks: list[Any]
    data: Data
    load: Callable[[], None]


def _base(cfg: Config, origin: Origin | None, groups: Groups) -> Base | None:
    """What adapters are trained beside, hashed by one rank. Raises ``UserError`` on all."""
    if cfg.lora is None:
        return None
    if origin is None:
        raise UserError("adapters are trained beside a trained model, and init_from is none", where="init_from",
                        fix="Name a checkpoint, a run's folder or a Hugging Face directory with --init_from")
    found = agree(groups, lambda: origin.fingerprint() if groups.is_main else None, f"reading {origin.path}")
    return Base(origin.path.absolute(), next(sha256 for sha256 in found if sha256 is not None))


def with_epochs(cfg: Config, rows: int | None) -> Config:
    """``train.max_steps`` from ``examples.epochs`` and the rows of a pass, where the former is set."""
    epochs = cfg.examples.epochs
    if epochs is None or rows is None:
        return cfg
    wanted, steps, last = math.ceil(epochs * rows), 0, 0
    while wanted > 0:
        size = cfg.train.batch_size_at(steps)
        if size == last == cfg.train.global_batch_size:  # the schedule, if there is one, is over
            steps += math.ceil(wanted / size)
            break
        wanted, steps, last = wanted - size, steps + 1, size
    return cfg.with_values({"train.max_steps": steps})


def run(
    cfg: Config,
    *,
    tokenizer: Path,
    data: Callable[[Config, Groups], Data],
    origin: Origin | None = None,
    objective: Objective = NEXT_TOKEN,
    before: Callable[[Start], None] | None = None,
) -> TrainState:
    """Trains, or resumes, on every rank. Returns how far it came. Raises ``UserError``.

    ``cfg``: settled (``origin.settle``). ``data`` is called once the groups are there. ``before``: what must be known
    of the initial weights (a reference's log-probabilities); called on every start, resumed ones too.
    """
    known = load_tokenizer(tokenizer)
    vocab_size = vocabulary(cfg.model, known.vocab_size)
    with topology.groups(cfg) as groups, data(cfg, groups) as found:
        cfg = with_epochs(cfg, found.rows)
        checkpoints = Checkpointer(cfg, groups, tokenizer=tokenizer, tokenizer_sha256=known.sha256,
                                   vocab_size=vocab_size, base=_base(cfg, origin, groups))
        resumed = checkpoints.find_resume()
        if resumed is None:  # what the data lacks is known before a model is built
            found.train.begin(steps=cfg.train.max_steps)
        bare = build.model(cfg, groups, vocab_size)
        added = [] if cfg.lora is None else lora_report.check(bare, cfg, groups).lines()

        def load() -> None:
            if origin is not None:
                origin.load(bare, cfg, groups)

        if before is not None:
            before(Start(cfg, groups, bare, found, load))
        if resumed is None or cfg.lora is not None:  # a checkpoint of adapters does not hold their base
            load()
        chunks = wrap.apply(bare, cfg, groups)
        update = optimizer.build(chunks, cfg, groups)
        state = TrainState()
        if resumed is not None:
            state = TrainState.from_dict(checkpoints.load(resumed, chunks, update))
        _check_order(found.train, state, resumed)
        if found.rows is not None:
            _check_rows(cfg, found.train, state, resumed)
        notes = found.train.begin(steps=cfg.train.max_steps, step=state.step, position=state.consumed_tokens,
                                  record=state.blend)
        with logger_for(cfg, groups, state) as logger:
            report_start(logger, cfg, groups, chunks, resumed_from=resumed, held_out_tokens=found.held_out.num_tokens,
                         origin=None if origin is None else origin.path)
            for line in (*added, *found.report, *notes):
                logger.message(line)
            limit = cfg.evaluation.eval_batches
            validate = partial(
                evaluate, chunks, found.held_out, groups, micro_batch_size=cfg.train.micro_batch_size,
                seq_length=cfg.model.seq_length, objective=objective,
                max_sequences=None if limit is None else limit * cfg.train.global_batch_size)
            loop.run(
                cfg, chunks, update, found.train, groups, state=state, logger=logger, vocab_size=vocab_size,
                save=partial(_save, cfg, checkpoints, chunks, update, found.train, groups, logger),
                evaluate=validate if found.held_out.num_tokens >= 2 else None,
                on_first_step=lambda: report_first_step(logger), objective=objective,
                ledger=lambda s: ledger.metrics(found.train.given(s.consumed_tokens)))
            if cfg.checkpoint.load_best_at_end and (best := checkpoints.end_with_best(chunks, state.to_dict())):
                logger.message(f"ends with the best weights, of step {state.best_step}: {best}")
    return state


def _save(cfg: Config, checkpoints: Checkpointer, chunks: list[Any], update: Any, train: Any, groups: Groups,
          logger: MetricLogger, state: TrainState) -> None:
    """A checkpoint with what the sources gave up to it, and the ledger that says so in the run's folder."""
    state.blend = train.record(state.consumed_tokens)
    checkpoints.save(chunks, update, state.to_dict())
    given, path = train.given(state.consumed_tokens), cfg.output_dir / ledger.FILE
    agree(groups, lambda: groups.is_main and ledger.write(path, given, step=state.step, tokens=state.consumed_tokens),
          f"writing {path}")
    logger.message(ledger.line(given))


def _check_order(train: Any, state: TrainState, resumed: Path | None) -> None:
    """Notes the order of samples; refuses to go on in another, which would replay some samples and lose others."""
    if state.consumed_tokens and (state.order or BEFORE_NAMES) != train.order:
        raise UserError(f"was trained in another order of samples ({state.order or 'of an earlier version'}; this "
                        f"version's is {train.order})", where=str(resumed),
                        fix="Resume with the version that wrote it, or start a new stage from its weights with "
                        "--init_from and another --output_dir (from a pretraining run: engine/midtrain.py)")
    state.order = train.order


def _check_rows(cfg: Config, train: Any, state: TrainState, resumed: Path | None) -> None:
    """Notes what the rows are; refuses to go on with others, of which nobody knows which were read."""
    seed = cfg.seed if cfg.data.shuffle_seed is None else cfg.data.shuffle_seed
    what = [train.fingerprint, cfg.model.seq_length, seed, cfg.examples.packing, cfg.examples.prefix_sharing,
            [source.weight for source in cfg.examples.train]]
    rows_sha256 = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    if state.consumed_tokens != state.consumed_samples * cfg.model.seq_length:
        before = state.consumed_tokens // max(1, state.consumed_samples)
        raise UserError(f"was trained on rows of {before} positions (here model.seq_length {cfg.model.seq_length})",
                        where=str(resumed), fix="Set model.seq_length as it was, or choose another --output_dir")
    if state.rows_sha256 not in (None, rows_sha256):
        raise UserError("was trained on other rows: examples.train, its weights, packing, template or seed have "
                        "changed since", where=str(resumed), fix="Set them as they were, or start a new run from it "
                        "with --init_from and another --output_dir")
    state.rows_sha256 = rows_sha256
