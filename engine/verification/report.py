"""A comparison for people and for bug reports: the verdict, a table by parameter group, everything as JSON."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from engine.config import Config
from engine.verification.jobs import Case

GROUPS = ("embedding", "norms", "attention.qkv", "attention.proj", "attention, other", "mlp.fc1", "mlp.fc2", "router",
          "experts.fc1", "experts.fc2", "shared expert", "output head", "other")
KINDS = ("gradients", "weights")


def summary(case: Case, outcome: dict[str, Any]) -> dict[str, Any]:
    """``outcome`` with what follows from it: errors by group, the worst of each kind, whether all is in tolerance."""
    found = {"case": case.name, "ranks": case.found.ranks, "tolerance": case.tolerance}
    if "failure" in outcome:
        return found | {"passed": False, "failure": outcome["failure"]}
    steps, tensors = outcome["comparison"]["steps"], outcome["comparison"]["tensors"]
    worst = {"loss": max(step["loss"]["error"] for step in steps),
             "grad_norm": max(step["grad_norm"]["error"] for step in steps),
             "tokens": max(step["tokens_error"] for step in steps),
             "router": max((each["error"] for step in steps for each in step.get("router", {}).values()), default=0.0),
             **{kind: max(_error(tensor, kind) for tensor in tensors) for kind in ("initial", *KINDS)},
             "copies": max(tensor[kind]["copies"] for tensor in tensors for kind in KINDS if tensor[kind])}
    bounds = dict.fromkeys(worst, case.tolerance) | {"initial": 0.0, "tokens": 0.0, "loss": case.loss_tolerance}
    failed = [name for name, error in worst.items() if not error <= bounds[name]]
    return found | {"passed": not failed, "failed": failed, "worst": worst, "groups": _by_group(tensors),
                    "worst_tensor": _worst_tensor(tensors), "steps": steps, "tensors": tensors}


def _error(tensor: dict[str, Any], kind: str) -> float:
    return tensor[kind]["error"] if tensor[kind] else 0.0


def _by_group(tensors: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    found = {}
    for group in GROUPS:
        members = [tensor for tensor in tensors if tensor["group"] == group]
        if members:
            found[group] = {"tensors": len(members), "worst_tensor": _worst_tensor(members),
                            **{kind: max(_error(tensor, kind) for tensor in members) for kind in KINDS}}
    return found


def _worst_tensor(tensors: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The tensor with the largest error of either kind, weights weighing no more than gradients."""
    def key(pair: tuple[dict[str, Any], str]) -> float:
        return _error(*pair)

    tensor, kind = max(((tensor, kind) for tensor in tensors for kind in KINDS), key=key)
    entry = tensor[kind] or {}
    return {"name": tensor["name"], "group": tensor["group"], "kind": kind, "error": entry.get("error", 0.0),
            "rank": entry.get("rank"), **({"problem": entry["problem"]} if "problem" in entry else {})}


def layout(cfg: Config, ranks: int) -> str:
    """The layout in a line: ``TP2 SP PP2 (2 chunks) DP1 with the distributed optimizer: 4 ranks``."""
    p = cfg.parallel
    words = [f"{short}{size}" for short, size in (("TP", p.tensor), ("PP", p.pipeline), ("CP", p.context),
                                                  ("EP", p.expert)) if size > 1]
    if p.sequence_parallel:
        words.insert(1, "SP")
    if p.virtual_pipeline > 1:
        words.append(f"{p.virtual_pipeline} chunks a stage")
    if p.expert_tensor is not None and p.expert_tensor != p.tensor:
        words.append(f"expert TP{p.expert_tensor}")
    words.append(f"DP{cfg.data_parallel_size(ranks)}")
    if p.distributed_optimizer:
        words.append("distributed optimizer")
    return f"{' '.join(words)}, {ranks} {'rank' if ranks == 1 else 'ranks'}"


def model(cfg: Config) -> str:
    """The model's shape in a line."""
    m = cfg.model
    words = [f"{m.num_layers} layers", f"hidden {m.hidden_size}",
             f"{m.num_attention_heads} heads of {m.head_dim}, {m.num_query_groups} groups", f"ffn {m.ffn_hidden_size}",
             "tied" if m.tie_embeddings else "untied", f"length {m.seq_length}",
             f"global batch {cfg.train.global_batch_size}, micro {cfg.train.micro_batch_size}", cfg.train.optimizer]
    if m.moe:
        words.insert(4, f"{m.moe.num_experts} experts, top {m.moe.top_k}, {m.moe.dispatcher}")
    return ", ".join(words)


def versions() -> dict[str, str]:
    """What a bug report must name."""
    return {"mainspring": version("mainspring") if _installed("mainspring") else "source", "torch": version("torch"),
            "megatron-core": version("megatron-core"), "python": platform.python_version(),
            "platform": platform.platform()}


def _installed(name: str) -> bool:
    from importlib.metadata import PackageNotFoundError

    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def number(value: float) -> str:
    """An error in three digits; exactly zero and infinity by their names."""
    return "0" if value == 0.0 else "-" if math.isinf(value) else f"{value:.1e}"


def lines(case: Case, found: dict[str, Any]) -> list[str]:
    """The report's body, from ``summary``."""
    if "failure" in found:
        failure = found["failure"]
        return [f"rank {failure['rank']} failed:", failure["error"].rstrip(), "",
                "verdict: FAILED, the layout did not run"]
    text = ["group              tensors   gradients     weights   worst tensor"]
    for group, entry in found["groups"].items():
        worst = entry["worst_tensor"]
        text.append(f"{group:<18} {entry['tensors']:>7} {number(entry['gradients']):>11} {number(entry['weights']):>11}"
                    f"   {worst['name']}{' (' + worst['problem'] + ')' if 'problem' in worst else ''}")
    text += ["", "step        expected           found       error"]
    for i, step in enumerate(found["steps"]):
        for name, label in (("loss", "loss"), ("grad_norm", "norm")):
            entry = step[name]
            error = number(entry["error"])
            text.append(f"{i + 1} {label}  {entry['expected']:>14.9g} {entry['found']:>15.9g} {error:>11}")
    return [*text, *_routers(found["steps"]), "", *_facts(found), verdict(case, found)]


def _routers(steps: list[dict[str, Any]]) -> list[str]:
    """A line for each router statistic: its largest error over the steps."""
    names = sorted({name for step in steps for name in step.get("router", {})})
    return [f"router {name}: error {number(max(step['router'][name]['error'] for step in steps))}" for name in names]


def _facts(found: dict[str, Any]) -> list[str]:
    worst = found["worst"]
    facts = [f"copies of one tensor on several ranks differ by {number(worst['copies'])}"]
    if worst["initial"] > 0.0:
        facts.append(f"the initial weights differ by {number(worst['initial'])}: the models are not the same")
    if worst["tokens"] > 0.0:
        pairs = ", ".join(f"{other} for {one}" for one, other in (step["tokens"] for step in found["steps"]))
        facts.append(f"supervised tokens differ: {pairs}")
    return facts


def verdict(case: Case, found: dict[str, Any]) -> str:
    """One line: passed or not, and the worst tensor by name."""
    worst = found["worst_tensor"]
    where = f"worst {worst['kind'][:-1]} {worst['name']} ({worst['group']}), off by {number(worst['error'])}"
    if found["passed"]:
        return f"verdict: EQUAL to one rank within {case.tolerance:g}; {where}"
    what = ", ".join(name.replace("_", " ") for name in found["failed"])
    return f"verdict: DIFFERENT from one rank ({what} past {case.tolerance:g}); {where}"


def strict(value: Any) -> Any:
    """``value`` as strict JSON has it: numbers that are not finite become text."""
    if isinstance(value, dict):
        return {name: strict(each) for name, each in value.items()}
    if isinstance(value, list):
        return [strict(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
