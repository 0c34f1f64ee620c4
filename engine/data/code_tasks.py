"""`mainspring code-tasks`: Python source -> instruction examples and preference pairs, as JSONL.

    OUTPUT/sft/{train,validation}.jsonl    {"instruction", "response", "source"}: a documented signature -> the function
    OUTPUT/dpo/{train,validation}.jsonl    {"prompt", "chosen", "rejected", "mutation", "source"}: real or corrupted
    OUTPUT/lora/{train,validation}.jsonl   as sft, of the packages held apart with --package
    OUTPUT/manifest.json, sources.jsonl, quarantine.jsonl

Files, not functions, are held out, by the same key as in `mainspring prepare`: with one seed and the same fraction,
what is validation there is validation here, so that nothing which is evaluated was in the pretraining data.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine import __version__, disk
from engine.config.code_tasks import CodeTasksConfig
from engine.config.prepare import PrepareConfig
from engine.data import code_functions, code_mutations, staging
from engine.data import manifest as manifests
from engine.data.cleaning import repair
from engine.data.code_functions import Function, NotPython, Passed
from engine.data.dedup import ExactDedup, content_digest
from engine.data.prepare import Console, Log, as_user_error, silent
from engine.data.reading import Quarantine, Reader
from engine.data.sources import SourceFile, list_files, show
from engine.data.spool import split_key
from engine.data.units import Slice
from engine.errors import UserError

VERSION = 1
REQUEST = "Write the Python function that this signature and docstring describe."
METHOD = "Write the Python method of class {owner} that this signature and docstring describe."
PARTS, SPLITS = ("sft", "dpo", "lora"), manifests.SPLITS
# These say where to look; what was found there is compared by its hash.
_PLACES = ("input", "output", "overwrite")


def code_tasks(config: CodeTasksConfig, *, log: Log = silent) -> dict[str, Any]:
    """Make ``config.output`` and return its manifest; one that is there, unchanged and whole, is reused.

    Raises UserError with nothing half-written.
    """
    with as_user_error(config.output):
        staging.recover(config.output)
        files = _python_files(config)
        if _is_ours(config.output) and not config.overwrite:
            return _reuse(config, files, log)
        with staging.staged(config.output) as folder:
            manifest = _Job(config, folder, log).run(files)
            text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
            (folder / manifests.MANIFEST).write_text(text, encoding="utf-8")
            staging.publish(folder, config.output)
    return manifest


def _python_files(config: CodeTasksConfig) -> list[SourceFile]:
    output, fix = config.output, "Choose another --output."
    for source in config.input:
        if output.resolve() in [source.resolve(), *source.resolve().parents]:
            raise UserError(f"holds the input {show(source)}", where=show(output), fix=fix)
    if output.exists() and not (output.is_dir() and (_is_ours(output) or not any(output.iterdir()))):
        raise UserError("exists and is no output of code-tasks", where=show(output), fix=fix)
    files = [file for file in list_files(_as_prepare(config)).files if file.path.suffix == ".py"]
    if not files:
        places = ", ".join(map(show, config.input[:3])) + (", …" if len(config.input) > 3 else "")
        raise UserError("holds no .py files", where=places, fix="Check --input and --exclude.")
    for name in config.package:
        if not any(_module_of(file).startswith(f"{name}.") for file in files):
            near = sorted({_module_of(file).split(".")[0] for file in files})
            raise UserError(
                f"there is no package {name!r} below the input; there are {', '.join(near[:12])}"
                f"{', …' if len(near) > 12 else ''}", where="--package",
            )  # fmt: skip
    return files


def _as_prepare(config: CodeTasksConfig) -> PrepareConfig:
    """The part of the settings that listing and reading look at."""
    names = ("input", "output", "seed", "exclude", "include_hidden", "follow_symlinks", "max_bad_fraction")
    return PrepareConfig(**{name: getattr(config, name) for name in names})


def _module_of(file: SourceFile) -> str:
    """Dotted name below the input with a dot at the end, so that ``json.`` starts json/ and json.py, not jsonrpc."""
    return ".".join(Path(file.name).with_suffix("").parts).removesuffix(".__init__") + "."


def _is_ours(directory: Path) -> bool:
    try:
        return "code_tasks" in json.loads((directory / manifests.MANIFEST).read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def _settings(config: CodeTasksConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude=set(_PLACES))


def _reuse(config: CodeTasksConfig, files: list[SourceFile], log: Log) -> dict[str, Any]:
    manifest = json.loads((config.output / manifests.MANIFEST).read_bytes())
    old, new = manifest["code_tasks"]["settings"], _settings(config)
    found = [f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name]]
    if manifest["code_tasks"]["version"] != VERSION:
        found.append("written by another version of this program")
    if manifests.load_sources(config.output) != manifests.current_sources([Slice(file) for file in files]):
        found.append("the source files changed")
    if found:
        raise UserError(
            f"exists and was made from something else: {'; '.join(found)}", where=show(config.output),
            fix="Replace it with --overwrite, or choose another --output.",
        )  # fmt: skip
    for name, numbers in manifest["files"].items():
        if manifests.sha256_file(config.output / name) != numbers["sha256"]:
            problem, fix = "missing or damaged, its SHA-256 is not the manifest's", "Make it again with --overwrite."
            raise UserError(problem, where=show(config.output / name), fix=fix)
    log(f"{show(config.output)}: made before from the same source and settings, used as it is")
    return manifest


@dataclass
class _File:
    """A file with something to learn from: its examples, and the key that decides its split."""

    key: int
    held_apart: bool
    functions: list[Function]
    name: str
    split: str = "train"


@dataclass
class _Job:
    """One run into an empty ``folder``."""

    config: CodeTasksConfig
    folder: Path
    log: Log
    passed: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)

    def run(self, listed: list[SourceFile]) -> dict[str, Any]:
        started = time.perf_counter()
        with open(self.folder / manifests.QUARANTINE, "w", encoding="utf-8") as stream:
            quarantine = Quarantine(stream)
            found = list(self.read(listed, quarantine))
        bad = quarantine.files + quarantine.lines
        if bad > self.config.max_bad_fraction * len(listed):
            first = quarantine.samples[0]
            line = f":{first['line']}" if first["line"] else ""
            raise UserError(
                f"{bad:,} of {len(listed):,} files are no Python, allowed {self.config.max_bad_fraction:.2%}; the "
                f"first is {first['file']}{line}: {first['detail']}",
                fix="Leave them out with --exclude, or raise --max_bad_fraction.",
            )
        if not any(file.functions for file in found):
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.passed.most_common(4)) or "none seen"
            raise UserError(
                f"no documented function of the length asked for ({reasons})",
                where=show(self.config.input[0]), fix="Widen --min_characters … --max_docstring_characters.",
            )  # fmt: skip
        self.hold_out(found)
        files = self.write(found)
        names = (manifests.SOURCES, manifests.QUARANTINE)
        files |= {name: {"sha256": disk.sha256(self.folder / name)} for name in names}
        rows = {name: numbers["rows"] for name, numbers in files.items() if "rows" in numbers}
        self.log(f"read {len(listed):,} files in {time.perf_counter() - started:.1f} s: "
                 + ", ".join(f"{name} {count:,}" for name, count in rows.items()))  # fmt: skip
        return {
            "code_tasks": {"version": VERSION, "written_by": __version__, "settings": _settings(self.config)},
            "inputs": [show(path) for path in self.config.input],
            "files": files,
            "held_out": {split: sorted(file.name for file in found if file.split == split) for split in SPLITS[1:]},
            "functions": {"kept": sum(len(file.functions) for file in found)} | dict(sorted(self.passed.items())),
            "mutations": dict(sorted(self.kinds.items())),
            "quarantine": quarantine.as_manifest(),
        }  # fmt: skip

    def read(self, listed: list[SourceFile], quarantine: Quarantine) -> Iterator[_File]:
        """Files in their order, with their functions that are new and of the right length."""
        reader, shapes, prompts = Reader(_as_prepare(self.config), quarantine), ExactDedup(), ExactDedup()
        with open(self.folder / manifests.SOURCES, "w", encoding="utf-8") as sources:
            for file in listed:
                kept: list[Function] = []
                text = ""
                for document in reader.read(file):
                    text, _ = repair(document.text, "code")
                    try:
                        kept = [item for item in self.select(text) if self.is_new(item, file, shapes, prompts)]
                    except NotPython as error:
                        if file.direct:
                            raise UserError(str(error), where=f"{show(file.path)}:{error.line or 1}") from None
                        quarantine.add(show(file.path), error.line, "not_python", str(error))
                item = {"input": file.input, "path": file.name, "sha256": reader.sha256, "functions": len(kept)}
                sources.write(json.dumps(item) + "\n")
                key = split_key(content_digest(text.encode()), self.config.seed)
                held_apart = any(_module_of(file).startswith(f"{name}.") for name in self.config.package)
                yield _File(key, held_apart, kept, show(file.name))

    def select(self, text: str) -> Iterator[Function]:
        """The functions of a file within the bounds; all others are counted with the reason."""
        config = self.config
        for item in code_functions.functions(text, max_docstring=config.max_docstring_characters):
            if isinstance(item, Passed):
                self.passed[item.reason] += 1
            elif len(item.docstring) < config.min_docstring_characters:
                self.passed["short_docstring"] += 1
            elif len(item.code) < config.min_characters:
                self.passed["too_short"] += 1
            elif (prompt := prompt_of(item)) is None:
                self.passed["docstring_not_quotable"] += 1
            elif len(prompt) + len(item.code) > config.max_characters:
                self.passed["too_long"] += 1
            else:
                yield item

    def is_new(self, item: Function, file: SourceFile, shapes: ExactDedup, prompts: ExactDedup) -> bool:
        """The same body under another name, or the same question, would be in both splits sooner or later."""
        place = f"{show(file.path)}:{item.line}"
        if not shapes.add(content_digest(code_functions.shape(item.code).encode()), place):
            self.passed["duplicate_code"] += 1
            return False
        if not prompts.add(content_digest((prompt_of(item) or "").encode()), place):
            self.passed["duplicate_prompt"] += 1
            return False
        return True

    def hold_out(self, found: list[_File]) -> None:
        """By key; of two or more files with functions, one at least is held out and one is not, in lora too."""
        for apart in (False, True):
            files = [file for file in found if file.held_apart == apart and file.functions]
            if not files or not self.config.validation_fraction:
                continue
            if len(files) == 1:
                self.log(f"warning: the functions of {'lora' if apart else 'sft and dpo'} are all in {files[0].name}: "
                         "none are held out")  # fmt: skip
                continue
            for file in files:
                file.split = SPLITS[file.key < int(self.config.validation_fraction * 2**64)]
            files.sort(key=lambda file: file.key)
            files[0].split, files[-1].split = SPLITS[1], SPLITS[0]

    def write(self, found: list[_File]) -> dict[str, dict[str, Any]]:
        """The JSONL files that have rows, with counts and hashes."""
        rows: dict[str, list[str]] = {f"{part}/{split}.jsonl": [] for part in PARTS for split in SPLITS}
        for file in found:
            for item in file.functions:
                prompt, source = prompt_of(item), f"{file.name}:{item.line}"
                example = {"instruction": prompt, "response": item.code, "source": source}
                rows[f"{'lora' if file.held_apart else 'sft'}/{file.split}.jsonl"].append(_line(example))
                if not file.held_apart:
                    rows[f"dpo/{file.split}.jsonl"] += map(_line, self.pairs(item, source))
        done = {}
        for name, lines in rows.items():
            if lines:
                path = self.folder / name
                path.parent.mkdir(exist_ok=True)
                path.write_text("".join(lines), encoding="utf-8")
                done[name] = {"rows": len(lines), "sha256": disk.sha256(path)}
        return done

    def pairs(self, item: Function, source: str) -> Iterator[dict[str, Any]]:
        config = self.config
        made = code_mutations.corrupt(
            item.code, seed=config.seed, count=config.rejected_per_function, kinds=list(config.mutation) or None
        )
        self.kinds.update(broken.kind for broken in made)
        self.kinds["none_possible"] += not made
        for broken in made:
            yield {"prompt": prompt_of(item), "chosen": item.code, "rejected": broken.code, "mutation": broken.kind,
                   "source": source}  # fmt: skip


def prompt_of(item: Function) -> str | None:
    """The question to which the function's code is the answer; None where no quotes hold the docstring."""
    if (docstring := code_functions.quoted(item.docstring)) is None:
        return None
    request = METHOD.format(owner=item.owner) if item.owner else REQUEST
    return f"{request}\n\n{item.header}\n{docstring}"


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def main(argv: list[str]) -> int:
    """The command. UserError passes through; engine.cli turns it into one line and exit code 2."""
    from engine.config import parse

    config = parse(CodeTasksConfig, argv, prog="mainspring code-tasks")
    manifest = code_tasks(config, log=Console().log)
    for name, numbers in manifest["files"].items():
        if "rows" in numbers:
            print(f"{show(config.output / name)}: {numbers['rows']:,} rows")
    return 0
