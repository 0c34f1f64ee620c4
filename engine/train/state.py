"""How far a run has come: everything that is not weights, optimizer or random state."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class TrainState:
    """Saved with every checkpoint.

    ``step``: updates done. ``consumed_tokens``: the data position. ``consumed_samples``: sequences read so far.
    ``skipped_steps``: updates left out by loss scaling. ``best_val_loss`` (nats a token) and ``best_step``: the best of
    the steps that were both evaluated and saved. ``micro_batch_size``: what recovery from lack of memory came down to,
    None for the configured one. ``rows_sha256``: what a position of ``consumed_tokens`` is a row of, in the stages that
    read examples. ``order``: the name of the order in which samples come (``engine.data.order``), None in checkpoints
    from before there were names. ``blend``: what each source of tokens gave up to here and under which weights
    (``engine.data.blend_plan``).
    """

    step: int = 0
    consumed_tokens: int = 0
    consumed_samples: int = 0
    skipped_steps: int = 0
    micro_batch_size: int | None = None
    best_val_loss: float | None = None
    best_step: int | None = None
    rows_sha256: str | None = None
    order: str | None = None
    blend: dict | None = None

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: dict) -> TrainState:
        return cls(**{name: saved[name] for name in cls.__dataclass_fields__ if name in saved})
