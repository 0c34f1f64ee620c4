"""Adapters as PEFT keeps them: adapter_config.json and adapter_model.safetensors, written and read.

One map, ``entries``, says where each factor lies; it is read in both directions. Of experts PEFT has one A and one B
for all of a layer's: A [E * r, in], expert after expert, and B [out, r * E], the experts of each rank side by side; and
where both matrices are targets, the first's keys go through ``base_layer``. PEFT before 0.19.1 took an expert's
[out, in] for [in, out] and so swapped both (not of GPT-OSS, whose weights are stored the other way): the version that
wrote is in adapter_config.json, and shapes are believed before it.

E experts, r rank.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine import disk
from engine.checkpoint.manager import agree
from engine.config import Config
from engine.config.stages import LORA_TARGETS, LoraConfig
from engine.errors import UserError
from engine.export import families
from engine.model import lora, whole
from engine.parallel.topology import Groups
from engine.parallel.wrap import unwrap

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "mainspring.json"
LAYOUT_VERSION = "0.21.2"  # of PEFT, whose layout is written
_SWAPPED_BEFORE = (0, 19, 1)
_PREFIX = "base_model.model."
# What a setting of PEFT's must be for factors beside frozen weights to be all there is.
_PLAIN = {"peft_type": ("LORA",), "bias": ("none",), "use_dora": (False,), "lora_bias": (False,),
          "fan_in_fan_out": (False,), "modules_to_save": (None, []), "rank_pattern": ({}, None),
          "alpha_pattern": ({}, None), "layer_replication": (None,), "trainable_token_indices": (None,),
          "use_qalora": (False,), "alora_invocation_tokens": (None,), "exclude_modules": (None, []),
          # Others (pissa, olora, corda, loftq, lora_ga) took from the frozen weights what the factors begin with.
          "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"), "kasa_config": (None,),
          "monteclora_config": (None,), "use_bdlora": (None, False), "arrow_config": (None,)}


@dataclass(frozen=True)
class Entry:
    """One A and one B of PEFT's, under ``key``; ``layers``: the engine's linear layers that they belong to, one for
    each expert; ``part``: the adapter's name there. ``turns``: B's rows hold gate and up features in turns.
    ``inputs_first``: experts' weights are stored [in, out], as GPT-OSS's."""

    key: str
    target: str
    layers: tuple[str, ...]
    part: str
    inputs: int
    outputs: int
    turns: bool = False
    inputs_first: bool = False

    @property
    def stacked(self) -> bool:
        return self.target.startswith("experts.")

    def names(self, which: str) -> list[str]:
        return [f"{layer}.adapter.{self.part}_{which}" for layer in self.layers]


def entries(cfg: Config, targets: tuple[str, ...]) -> Iterator[Entry]:
    """Every adapter of the whole model. Raises ``UserError`` for a model that no family of Transformers has."""
    m = cfg.model
    gpt_oss = families.family_of(m).model_type == "gpt_oss"
    h, d = m.hidden_size, m.head_dim or m.hidden_size // m.num_attention_heads
    heads, groups = m.num_attention_heads * d, (m.num_query_groups or m.num_attention_heads) * d
    for i in range(m.num_layers):
        ours, theirs = f"decoder.layers.{i}.", f"{_PREFIX}model.layers.{i}."
        shapes = [("self_attention.linear_qkv", "self_attn.q_proj", h, heads),
                  ("self_attention.linear_qkv", "self_attn.k_proj", h, groups),
                  ("self_attention.linear_qkv", "self_attn.v_proj", h, groups),
                  ("self_attention.linear_proj", "self_attn.o_proj", heads, h)]
        sparse = m.moe is not None and i >= m.moe.num_dense_layers
        if not sparse:
            ffn = m.ffn_hidden_size or 0
            shapes += [("mlp.linear_fc1", "mlp.gate_proj", h, ffn), ("mlp.linear_fc1", "mlp.up_proj", h, ffn),
                       ("mlp.linear_fc2", "mlp.down_proj", ffn, h)]
        for layer, module, inputs, outputs in shapes:
            part = module.split(".")[1]
            if part in targets:
                yield Entry(theirs + module, part, (ours + layer,), part, inputs, outputs)
        if sparse:
            yield from _experts(cfg, targets, ours, theirs, gpt_oss)


def _experts(cfg: Config, targets: tuple[str, ...], ours: str, theirs: str, gpt_oss: bool) -> Iterator[Entry]:
    moe, h = cfg.model.moe, cfg.model.hidden_size
    assert moe is not None
    both = {"experts.gate_up_proj", "experts.down_proj"} <= set(targets)
    ffn = moe.ffn_hidden_size or 0
    for part, linear, inputs, outputs in (("gate_up_proj", "linear_fc1", h, 2 * ffn),
                                          ("down_proj", "linear_fc2", ffn, h)):
        if f"experts.{part}" in targets:
            inner = ".base_layer" if both and part == "gate_up_proj" else ""
            layers = tuple(f"{ours}mlp.experts.local_experts.{e}.{linear}" for e in range(moe.num_experts))
            yield Entry(f"{theirs}mlp.experts{inner}", f"experts.{part}", layers, part, inputs, outputs,
                        gpt_oss and part == "gate_up_proj", gpt_oss)


def _to_peft(entry: Entry, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``found``: the whole factors by the engine's names."""
    a, b = ([found[name] for name in entry.names(which)] for which in "ab")
    if entry.turns:
        b = [torch.stack(value.chunk(2), dim=1).flatten(0, 1) for value in b]
    if not entry.stacked:
        return {f"{entry.key}.lora_A.weight": a[0], f"{entry.key}.lora_B.weight": b[0]}
    return {f"{entry.key}.lora_A.weight": torch.cat(a),
            f"{entry.key}.lora_B.weight": torch.stack(b, dim=-1).flatten(1).contiguous()}


def _from_peft(entry: Entry, a: torch.Tensor, b: torch.Tensor, *, swapped: bool) -> dict[str, torch.Tensor]:
    count = len(entry.layers)
    a_all, b_all = list(a.chunk(count)), list(b.unflatten(1, (-1, count)).unbind(-1)) if entry.stacked else [b]
    if swapped:
        a_all, b_all = [value.t() for value in b_all], [value.t() for value in a_all]
    if entry.turns:
        b_all = [torch.cat([value[0::2], value[1::2]]) for value in b_all]
    return dict(zip(entry.names("a"), a_all, strict=True)) | dict(zip(entry.names("b"), b_all, strict=True))


def _gathered(chunks: list[Any], groups: Groups, layer: str) -> dict[str, torch.Tensor]:
    """The whole factors of one decoder layer on rank 0, in host memory; nothing elsewhere. Collective."""
    own = {}
    for chunk in chunks:
        pg = unwrap(chunk).pg_collection
        for name, p in whole.global_names(chunk).items():
            first = (pg.expt_dp if whole.is_expert(name) else pg.dp_cp).rank() == 0  # the others hold copies
            if first and lora.is_adapter(name) and name.startswith(layer):
                own[name] = (whole.split_of(name, p, pg), p.detach().cpu())
    gathered: list | None = [None] * groups.world_size if groups.is_main else None
    dist.gather_object(own, gathered)
    return whole.assemble(gathered, 0) if gathered is not None else {}


def _config(cfg: LoraConfig, targets: tuple[str, ...], base: str | None) -> dict[str, Any]:
    modules = [name for name in targets if not name.startswith("experts.")]
    parameters = [f"mlp.{name}" for name in targets if name.startswith("experts.")]
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": cfg.rank, "lora_alpha": cfg.alpha, "lora_dropout": cfg.dropout, "use_rslora": cfg.rslora,
        "target_modules": modules, "target_parameters": parameters or None, "bias": "none", "fan_in_fan_out": False,
        "init_lora_weights": True, "use_dora": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
        "peft_version": LAYOUT_VERSION,
    }


def save(chunks: list[Any], cfg: Config, groups: Groups, directory: Path, *, base: str | None = None,
         record: dict[str, Any] | None = None, check: Callable[[Path], object] = lambda folder: None) -> None:
    """Writes the adapters of the bare chunks as a PEFT directory, which appears whole or not at all. Collective.

    ``base``: the model that PEFT finds by itself (a Hugging Face directory or name). ``record``: what the base is known
    by (``engine.checkpoint.adapters.Base``), kept in mainspring.json. ``check(folder)`` is called on every rank before
    the folder gets its name. Raises ``UserError`` on all ranks.
    """
    settings, directory = cfg.lora, directory.absolute()
    assert settings is not None
    there = {lora.factor(name)[1] for chunk in chunks for name in whole.global_names(chunk) if lora.is_adapter(name)}
    all_there: list = [None] * groups.world_size
    dist.all_gather_object(all_there, there)
    targets = tuple(name for name in LORA_TARGETS if name in set().union(*all_there))
    tensors: dict[str, torch.Tensor] = {}
    homeless: list[str] = []
    temporary = directory.with_name(directory.name + ".tmp")
    wanted = list(entries(cfg, targets))
    for i in range(cfg.model.num_layers):
        layer = f"decoder.layers.{i}."
        found = _gathered(chunks, groups, layer)
        for entry in wanted if groups.is_main else []:
            if entry.layers[0].startswith(layer):
                tensors |= _to_peft(entry, found)
                for name in (*entry.names("a"), *entry.names("b")):
                    del found[name]
        homeless += found

    def write() -> None:
        if directory.exists():
            raise UserError("exists and is not replaced", where=str(directory), fix="Choose another --output")
        if homeless:
            raise UserError(f"PEFT has no place for {homeless[0]}", where="lora.target_modules",
                            fix="Merge the adapters instead: mainspring export --merge")
        if groups.is_main:
            config = _config(settings, targets, base)
            _write(temporary, tensors, config, {"peft_layout": LAYOUT_VERSION, "base": record or {}})

    def publish() -> None:
        if groups.is_main:
            temporary.rename(directory)
            disk.sync(directory.parent)

    agree(groups, write, f"exporting {directory}")
    try:
        check(temporary)
    except UserError:
        if groups.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    agree(groups, publish, f"exporting {directory}")


def _write(temporary: Path, tensors: dict[str, torch.Tensor], config: dict, record: dict) -> None:
    from safetensors.torch import save_file

    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
    for name, content in ((CONFIG, config), (RECORD, record)):
        (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for file in (*temporary.iterdir(), temporary):
        disk.sync(file)


def read_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json. Raises ``UserError`` for what is no plain LoRA adapter."""
    file = directory / CONFIG
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
        int(found["r"]), float(found["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"is no adapter's configuration ({error})", where=str(file),
                        fix="Give a directory that PEFT or mainspring wrote") from error
    for name, plain in _PLAIN.items():
        if found.get(name, plain[0]) not in plain:
            raise UserError(f"is {found[name]!r}, which this engine's adapters do not have", where=f"{file}: {name}",
                            fix="Merge the adapter with PEFT, and import the merged model")
    return found


_KEY = re.compile(r"\.(self_attn|mlp)\.(\w+?)(\.base_layer)?\.lora_[AB]\.weight$")


def section(directory: Path) -> dict[str, Any]:
    """The values of the section ``lora`` for an adapter's directory. Raises ``UserError``."""
    found = read_config(directory)
    parameters = [name.rpartition("experts.")[1] + name.rpartition(".")[2]
                  for name in found.get("target_parameters") or []]
    with _opened(directory) as file:
        modules = {match.group(2) for key in file.keys() if (match := _KEY.search(key))}  # noqa: SIM118  (no mapping)
    names = (modules - {"experts"}) | {name for name in parameters if "experts" in modules}
    if not names or not names <= set(LORA_TARGETS):
        raise UserError(f"adapts {', '.join(sorted(names - set(LORA_TARGETS))) or 'nothing'}", where=str(directory),
                        fix=f"Targets that are known: {', '.join(LORA_TARGETS)}")
    return {"rank": found["r"], "alpha": float(found["lora_alpha"]), "rslora": bool(found.get("use_rslora", False)),
            "dropout": 0.0, "target_modules": [name for name in LORA_TARGETS if name in names]}


def _opened(directory: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(directory / WEIGHTS, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot be read ({error})", where=str(directory / WEIGHTS),
                        fix="It is damaged or half a file: copy it again") from error


def _swapped(entry: Entry, a: tuple[int, ...], b: tuple[int, ...], rank: int, found: dict, directory: Path,
             before: bool | None = None) -> bool:
    """Whether an expert's factors are those of its transposed weight. Raises ``UserError`` for other shapes.

    ``before``: what the experts' last factors were. Weights that are [in, out] every PEFT has taken for that.
    """
    count = len(entry.layers)
    straight = (a, b) == ((count * rank, entry.inputs), (entry.outputs, rank * count))
    turned = entry.stacked and (a, b) == ((count * rank, entry.outputs), (entry.inputs, rank * count))
    if not straight and not turned:
        raise UserError(f"{entry.key} has A {list(a)} and B {list(b)}, this model {[count * rank, entry.inputs]} and "
                        f"{[entry.outputs, rank * count]}", where=str(directory / WEIGHTS),
                        fix="It is an adapter for another base")
    if not (straight and turned):
        return turned
    if before is not None or entry.inputs_first:  # GPT-OSS's down projection is square
        return bool(before)
    version = tuple(int(number) for number in re.findall(r"\d+", str(found.get("peft_version") or ""))[:3])
    if not version:
        raise UserError("does not say which version of PEFT wrote it, and square experts' factors mean another thing "
                        "before 0.19.1", where=str(directory / CONFIG), fix='Add "peft_version" to it')
    return version < _SWAPPED_BEFORE


@torch.no_grad()
def load(directory: Path, chunks: list[Any], cfg: Config, groups: Groups, *, base_sha256: str | None = None) -> None:
    """Fills the adapters of this rank's chunks, built with ``section(directory)``, each tensor used exactly once.

    Every rank reads the file. Raises ``UserError`` for tensors that are missing, left over or of another shape, and
    for an adapter that a record says was trained beside another base than ``base_sha256``.
    """
    assert cfg.lora is not None
    found, record = read_config(directory), directory / RECORD
    if base_sha256 is not None and record.is_file():
        try:
            made_for = json.loads(record.read_text(encoding="utf-8")).get("base", {}).get("sha256")
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"cannot be read ({error})", where=str(record),
                            fix="Copy it again, or remove it: it only says which base the adapters belong to") from None
        if made_for not in (None, base_sha256):
            raise UserError("is an adapter for another base (its content hash differs)", where=str(directory),
                            fix="Load it beside the model that it was trained with")
    wanted = list(entries(cfg, cfg.lora.targets()))
    own = {name: (p, whole.split_of(name, p, unwrap(chunk).pg_collection)) for chunk in chunks
           for name, p in whole.global_names(chunk).items() if lora.is_adapter(name)}
    with _opened(directory) as file:
        keys = {f"{entry.key}.lora_{which}.weight" for entry in wanted for which in "AB"}
        stored = set(file.keys())
        for problem, names in (("does not hold {}", keys - stored),
                               ("holds {}, which has no place here", stored - keys)):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise UserError(problem.format(min(names) + more), where=str(directory / WEIGHTS),
                                fix="It is an adapter for another base, or lora.target_modules are others")
        swapped: bool | None = None  # of experts, as far as they have come
        for entry in wanted:
            slices = [file.get_slice(f"{entry.key}.lora_{which}.weight") for which in "AB"]
            shapes = [tuple(value.get_shape()) for value in slices]
            turned = _swapped(entry, shapes[0], shapes[1], cfg.lora.rank, found, directory, swapped)
            swapped = turned if entry.stacked else swapped
            if not own.keys() & {*entry.names("a")}:
                continue  # another stage's, or other ranks' experts
            for name, value in _from_peft(entry, slices[0][:], slices[1][:], swapped=turned).items():
                if name in own:
                    p, split = own.pop(name)
                    p.copy_(split.take(value))
    assert not own, sorted(own)[:3]
