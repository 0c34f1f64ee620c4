"""Faults of the kinds that parallel training has had, planted in every rank by test_mutations.py.

Each is a context manager that ``engine.verification.worker`` enters around a job ("this file:name").
"""

from __future__ import annotations

import contextlib
import importlib
from unittest import mock

import torch.distributed as dist

finalizing = importlib.import_module("megatron.core.distributed.finalize_model_grads")  # a function hides its module


@contextlib.contextmanager
def _after_finalize(change):
    """``change(chunks)`` between the reduction of gradients and the update."""
    from engine.train import step

    original = step.finalize_model_grads

    def finalize(chunks, *args, **kwargs):
        original(chunks, *args, **kwargs)
        change(chunks)

    with mock.patch.object(step, "finalize_model_grads", finalize):
        yield


def _named(chunks):
    from engine.model import whole

    return [(name, p) for chunk in chunks for name, p in whole.global_names(chunk).items()]


@contextlib.contextmanager
def column_backward_not_reduced():
    """Tensor ranks keep their own part of the input gradient of the last layer's gate and up projection."""
    from engine.model import layers

    original, calls = layers.ColumnParallelLinear.__init__, []

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        calls.append(self)
        if len(calls) == 8:  # qkv and fc1 of four layers
            forward = self._forward_impl
            self._forward_impl = lambda *a, **k: forward(*a, **k | {"allreduce_dgrad": False})

    with mock.patch.object(layers.ColumnParallelLinear, "__init__", init):
        yield


@contextlib.contextmanager
def row_forward_not_reduced():
    """Tensor ranks keep their own part of each row-parallel layer's output."""
    from megatron.core.tensor_parallel import layers

    with mock.patch.object(layers, "reduce_from_tensor_model_parallel_region", lambda x, group=None: x):
        yield


@contextlib.contextmanager
def data_parallel_not_reduced():
    """Each data-parallel rank trains on its own gradients."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

    with mock.patch.object(_ParamAndGradBucketGroup, "start_grad_sync"):
        yield


@contextlib.contextmanager
def tied_copies_not_reduced():
    """First and last pipeline stage keep their own gradients of the matrix that they share."""
    with mock.patch.object(finalizing, "_allreduce_word_embedding_grads"):
        yield


@contextlib.contextmanager
def sequence_parallel_not_reduced():
    """Tensor ranks keep the norms' gradients of their own tokens."""
    with mock.patch.object(finalizing, "_allreduce_non_tensor_model_parallel_grads"):
        yield


@contextlib.contextmanager
def context_offset():
    """The second context-parallel rank takes its tokens to stand one place later than they do."""
    from engine.model import rotary
    from engine.parallel import context

    original = context.positions

    def positions(seq_length, group, device=None):
        place = original(seq_length, group, device)
        return (place + (group.rank() == 1)).clamp(max=seq_length - 1)

    with mock.patch.object(context, "positions", positions):
        rotary.shared_table.cache_clear()
        yield
    rotary.shared_table.cache_clear()


@contextlib.contextmanager
def router_scaled():
    """The router's gradient is summed over the expert-parallel ranks once too often."""
    def scale(chunks):
        from engine.parallel.wrap import unwrap

        for name, p in _named(chunks):
            if ".router.weight" in name:
                p.main_grad *= unwrap(chunks[0]).pg_collection.ep.size()

    with _after_finalize(scale):
        yield


@contextlib.contextmanager
def expert_gradients_averaged():
    """Experts' gradients are divided by the number of ranks that hold other experts."""
    def scale(chunks):
        from engine.model.whole import is_expert

        for name, p in _named(chunks):
            if is_expert(name):
                p.main_grad /= 2

    with _after_finalize(scale):
        yield


@contextlib.contextmanager
def tokens_counted_per_rank():
    """Each data-parallel rank divides by its own supervised tokens, and the results are averaged."""
    from engine.train import step

    original = step.finalize_model_grads

    def finalize(chunks, num_tokens=None, **kwargs):
        assert num_tokens is not None
        group = chunks[0].dp_cp_group
        total = num_tokens.clone()
        dist.all_reduce(total, group=group)
        for chunk in chunks:
            chunk.scale_gradients((total / num_tokens / group.size()).item())
        original(chunks, num_tokens, **kwargs)

    with mock.patch.object(step, "finalize_model_grads", finalize):
        yield


@contextlib.contextmanager
def copies_drift():
    """The second rank's norms move a little in every update; nobody looks at a second rank's weights."""
    from engine.train import optimizer

    original = optimizer.step

    def step(update):
        found = original(update)
        if dist.get_rank() == 1:
            for group in update.param_groups:
                for p in group["params"]:
                    if p.dim() == 1:
                        p.data += 1e-4
        return found

    with mock.patch.object(optimizer, "step", step):
        yield


@contextlib.contextmanager
def second_rank_raises():
    """The second rank fails in its first step; the first waits for it."""
    from engine.train import step

    original = step.run

    def run(*args, **kwargs):
        if dist.get_rank() == 1:
            raise RuntimeError("planted: the second rank's own error")
        return original(*args, **kwargs)

    with mock.patch.object(step, "run", run):
        yield


@contextlib.contextmanager
def second_rank_is_killed():
    """The second rank is ended from outside, as by the kernel when memory runs out."""
    import os
    import signal

    from engine.train import step

    original = step.run

    def run(*args, **kwargs):
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    with mock.patch.object(step, "run", run):
        yield
