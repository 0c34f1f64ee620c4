"""The report of a chain as one HTML file: every stage's metrics, gates, samples, hashes and durations.

Self-contained and without script: it can be mailed, and opens from a disk that is nowhere else.
"""

from __future__ import annotations

import html
import json
import os
from pathlib import Path
from typing import Any

from engine.evaluation import gates
from engine.evaluation.report_style import STYLE
from engine.evaluation.svg import Band, Line, chart, short

NAME = "report.html"
# Charts in this order, then the rest by name. What follows from another or never changes has none.
_FIRST = ("loss", "accuracy", "sequence_accuracy", "rewards/margins", "rewards/accuracies", "rewards/chosen",
          "rewards/rejected", "logps/chosen", "logps/rejected", "grad_norm", "lr", "tokens_per_sec")
_LEFT_OUT = {"consumed_tokens", "seq_length", "global_batch_size", "micro_batch_size", "perplexity", "memory_gb", "mfu"}
_WORDS = {"promoted": "promoted", "refused": "refused by a gate", "failed": "failed", "running": "running",
          "interrupted": "interrupted", "waiting": "not reached"}
_MARKS = {"promoted": "✓", "refused": "✕", "failed": "✕", "running": "…", "interrupted": "‖", "waiting": "·"}
_SAMPLE_FILES = ("answers.jsonl", "generated.txt", "sample.txt")
_SAMPLES, _SAMPLE_CHARACTERS = 3, 1600


def write(folder: Path, promotions: dict[str, Any], stages: list[str]) -> Path:
    """Writes ``folder``/report.html from promotions.json's content and the steps' folders. -> its path.

    ``stages``: all of the configuration's, in order, those never reached included.
    """
    path = folder / NAME
    temporary = path.with_name(NAME + ".tmp")
    temporary.write_text(render(folder, promotions, stages), encoding="utf-8")
    os.replace(temporary, path)
    return path


def render(folder: Path, promotions: dict[str, Any], stages: list[str]) -> str:
    """The page's text."""
    known = promotions["stages"]
    entries = {name: known.get(name, {"status": "waiting", "steps": {}, "gates": []}) for name in stages}
    metrics = {step: _rows(folder / step) for entry in entries.values() for step in entry["steps"]}
    title = esc(promotions.get("title", "Training chain"))
    sections = "".join(_stage(folder, name, entry, metrics) for name, entry in entries.items() if entry["steps"])
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
            f"<main><header><h1>{title}</h1>{_verdict(entries)}</header>{_cards(entries)}"
            f"{_whole_run(entries, metrics)}{sections}{_lineage(entries)}"
            f"<footer>promotions.json beside this file has the same in full.</footer></main></body></html>\n")


def esc(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return gates.rows(path) if path.is_file() else []


def duration(seconds: float) -> str:
    """12 s, 3 min 05 s, 2 h 07 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _seconds(entry: dict[str, Any]) -> float:
    return sum(step.get("seconds", 0.0) for step in entry["steps"].values())


def _hash(value: str | None) -> str:
    return f'<code title="{esc(value)}">{esc(value[:12])}</code>' if value else "-"


# --- the chain at a glance -------------------------------------------------------------------------------------------

def _verdict(entries: dict[str, dict[str, Any]]) -> str:
    """One sentence: how far it came, and why no farther."""
    total = duration(sum(map(_seconds, entries.values())))
    done = [name for name, entry in entries.items() if entry["status"] == "promoted"]
    stopped = next(((n, e) for n, e in entries.items() if e["status"] not in ("promoted", "waiting")), None)
    if len(done) == len(entries):
        return f'<p class="verdict good">All {len(done)} stages promoted, {total} in all.</p>'
    if stopped is None:
        return f'<p class="verdict">{len(done)} of {len(entries)} stages promoted, {total} so far.</p>'
    name, entry = stopped
    why = f": {esc(entry['reason'])}" if entry.get("reason") else ""
    tone = " bad" if entry["status"] in ("refused", "failed") else ""
    return (f'<p class="verdict{tone}">{esc(name)} {_WORDS[entry["status"]]}{why} '
            f"<span>({len(done)} of {len(entries)} stages promoted, {total})</span></p>")


def _cards(entries: dict[str, dict[str, Any]]) -> str:
    """A card for each stage, in order."""
    cards = []
    for name, entry in entries.items():
        status, passed = entry["status"], sum(gate["passed"] for gate in entry["gates"])
        facts = [duration(_seconds(entry))] if entry["steps"] else []
        facts += [f"{passed} of {len(entry['gates'])} gates"] if entry["gates"] else []
        link = f'<a href="#{esc(name)}">{esc(name)}</a>' if entry["steps"] else esc(name)
        cards.append(f'<li class="{status}"><b><i aria-label="{_WORDS[status]}">{_MARKS[status]}</i>{link}</b>'
                     f"<small>{' · '.join(facts) or _WORDS[status]}</small></li>")
    return f'<ol class="cards">{"".join(cards)}</ol>'


def _whole_run(entries: dict[str, dict[str, Any]], metrics: dict[str, list[dict[str, Any]]]) -> str:
    """The language-model losses of all stages one after the other; a preference loss is of another kind."""
    train, held_out, bands, offset = [], [], [], 0
    for entry in entries.values():
        for step in entry["steps"]:
            rows = metrics[step]
            points = gates.series(rows, "train/loss")
            if not points or any("rewards" in name for row in rows for name in row):
                continue
            train.append(Line("training", "train", [(offset + x, y) for x, y in points]))
            held_out.append(Line("validation", "val", [(offset + x, y) for x, y in gates.series(rows, "val/loss")]))
            bands.append(Band(step, offset, offset + points[-1][0]))
            offset += points[-1][0]
    if len(bands) < 2:
        return ""
    picture = chart([*train, *held_out], title="loss of the whole chain", width=920, height=260, bands=bands)
    return f'<section><h2>The whole run</h2><figure class="wide">{_caption("loss, nats per token")}{picture}</figure>' \
           "</section>"


def _lineage(entries: dict[str, dict[str, Any]]) -> str:
    rows = [f"<tr><td>{esc(name)}</td><td>{_hash(entry.get('sha256'))}</td><td>{_hash(entry.get('previous'))}</td>"
            f"<td>{esc(entry.get('promoted_at', '-'))}</td></tr>" for name, entry in entries.items()]
    return ("<section><h2>Promotions</h2><p>Each stage's hash covers its results, configurations, data, gate values "
            "and the stage before it: the last stands for the whole chain.</p><div class=scroll><table><thead><tr>"
            "<th>stage</th><th>hash</th><th>stage before</th><th>promoted (UTC)</th></tr></thead><tbody>"
            f"{''.join(rows)}</tbody></table></div></section>")


# --- one stage -------------------------------------------------------------------------------------------------------

def _stage(folder: Path, name: str, entry: dict[str, Any], metrics: dict[str, list[dict[str, Any]]]) -> str:
    status = entry["status"]
    reason = f'<p class="reason">{esc(entry["reason"])}</p>' if entry.get("reason") else ""
    inner = "".join(_step(folder, step, record, metrics[step], entry["gates"])
                    for step, record in entry["steps"].items())
    return (f'<section id="{esc(name)}"><h2>{esc(name)} <em class="{status}">{_WORDS[status]}</em></h2>{reason}'
            f"{_gates(entry['gates'])}{inner}</section>")


def _gates(found: list[dict[str, Any]]) -> str:
    if not found:
        return ""
    signs = {"at_least": "≥", "at_most": "≤", "above": "&gt;", "below": "&lt;"}
    rows = []
    for gate in found:
        bounds = ", ".join(f"{signs[name]} {short(value)}" for name, value in gate["bounds"].items())
        value = gates.number(gate["value"])
        shown = "missing" if value is None else f"{value:.6g}"
        at = f" at step {gate['at']}" if gate["at"] is not None else ""
        word, css = ("passed", "promoted") if gate["passed"] else ("failed", "failed")
        rows.append(f'<tr><td><em class="{css}">{word}</em></td><td>{esc(gate["metric"])}'
                    f"{'' if gate['required'] else ' (not required)'}</td><td class=n>{shown}{at}</td>"
                    f"<td class=n>{bounds}</td><td>{esc(gate['step'])}</td><td>{esc(gate['reason'])}</td></tr>")
    return ("<div class=scroll><table><thead><tr><th>gate</th><th>metric</th><th class=n>value</th>"
            "<th class=n>bound</th><th>of</th><th>in words</th></tr></thead><tbody>"
            f"{''.join(rows)}</tbody></table></div>")


def _step(folder: Path, name: str, record: dict[str, Any], rows: list[dict[str, Any]],
          found: list[dict[str, Any]]) -> str:
    result = record.get("result", {})
    what = {"checkpoint": f"checkpoint of step {result.get('step')}", "prepared": "prepared data",
            "files": f"{result.get('of_files')} files"}.get(result.get("kind", ""), "nothing yet")
    ranks = record["processes"]
    facts = [what, duration(record.get("seconds", 0.0)), f"{ranks} process" + "es" * (ranks > 1)]
    facts += [f"{record['attempts']} attempts"] if record.get("attempts", 1) > 1 else []
    return (f"<h3>{esc(name)} <small>{esc(' · '.join(facts))}</small></h3>{charts(rows, found)}"
            f"{_result_file(folder / name)}{_samples(folder / name)}{_details(record)}")


def bare(column: str) -> str:
    """A metric's name without the split that it was measured on."""
    return column.removeprefix("train/").removeprefix("val/")


def charts(rows: list[dict[str, Any]], found: list[dict[str, Any]]) -> str:
    """A chart for each metric, training and validation in one; with the bound of the gate that reads it."""
    columns = {column for row in rows for column in row if "/" in column and not column.startswith("data/")}
    names = {bare(column) for column in columns}
    names -= {"accuracy"} if "rewards/accuracies" in names else set()  # of pairs they are the same
    levels = {bare(gate["metric"]): next(iter(gate["bounds"].values())) for gate in found
              if gate["file"] == "metrics.jsonl"}
    order = [name for name in _FIRST if name in names] + sorted(names - {*_FIRST, *_LEFT_OUT})
    figures = []
    for name in order:
        own = f"train/{name}" if f"train/{name}" in columns else name  # rewards/* and logps/* are the batch's
        lines = [Line("training", "train", gates.series(rows, own)),
                 Line("validation", "val", gates.series(rows, f"val/{name}"))]
        level = ("gate", levels[name]) if name in levels else None
        picture = chart(lines, title=name, level=level)
        if picture:
            figures.append(f"<figure>{_caption(name, lines)}{picture}</figure>")
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def _caption(name: str, lines: list[Line] | None = None) -> str:
    """The chart's name, and a key with the last value of each line."""
    shown = [line for line in lines or [] if line.points]
    keys = "".join(f'<span class="key {line.kind}">{line.name} {short(line.points[-1][1])}</span>' for line in shown)
    if lines is None:
        keys = '<span class="key train">training</span><span class="key val">validation</span>'
    return f"<figcaption><b>{esc(name)}</b>{keys}</figcaption>"


def _result_file(folder: Path) -> str:
    """The numbers of a result.json, as of evaluate and answer."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    numbers = {name: value for name, value in result.items() if gates.number(value) is not None
               and not isinstance(value, str)} if isinstance(result, dict) else {}
    items = "".join(f"<div><dt>{esc(name)}</dt><dd>{value:.6g}</dd></div>" for name, value in numbers.items())
    return f"<dl>{items}</dl>" if items else ""


def _samples(folder: Path) -> str:
    """What the model wrote: the first few answers, or the text as it is."""
    path = next((folder / name for name in _SAMPLE_FILES if (folder / name).is_file()), None)
    if path is None:
        return ""
    if path.suffix == ".txt":
        text = path.read_text(encoding="utf-8", errors="replace")
        return f"<pre>{esc(text[:_SAMPLE_CHARACTERS])}</pre>"
    found = []
    for row in gates.rows(path)[:_SAMPLES]:
        prompt = "\n".join(str(message.get("content", "")) for message in row.get("prompt", []))
        answer = str(row.get("answer", ""))[:_SAMPLE_CHARACTERS]
        found.append(f'<pre class="prompt">{esc(prompt[:_SAMPLE_CHARACTERS])}</pre>'
                     f"<pre>{esc(answer) if answer.strip() else '(empty)'}</pre>")
    return "".join(found)


def _details(record: dict[str, Any]) -> str:
    """Command and hashes, folded away."""
    result = record.get("result", {})
    rows = [("command", f"<code>{esc(record['command'])}</code>"), ("result", f"{esc(result.get('path', '-'))} "
            f"{_hash(result.get('sha256'))}"), ("configuration", f"{esc(record.get('config') or '-')} "
                                                f"{_hash(record['config_sha256'])}")]
    rows += [(f"input {name}", _hash(value)) for name, value in record.get("inputs", {}).items()]
    rows += [(f"data {name}", _hash(value)) for name, value in record.get("data", {}).items()]
    rows += [("log", esc(record["log"])),
             ("time (UTC)", f"{esc(record['started'])} to {esc(record.get('finished', '-'))}")]
    body = "".join(f"<tr><th>{esc(name)}</th><td>{value}</td></tr>" for name, value in rows)
    return f"<details><summary>command and hashes</summary><div class=scroll><table>{body}</table></div></details>"
