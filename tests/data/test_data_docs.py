"""docs/data.md: each of its command lines is one, and each file that it names is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from engine import cli
from engine.config.prepare import PrepareConfig

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/data.md").read_text(encoding="utf-8")
LINES = re.findall(r"^mainspring .*", TEXT, re.MULTILINE)


@pytest.mark.parametrize("line", LINES)
def test_a_command_line(line, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        cli.run([*shlex.split(line)[1:], "--print-config"])
    assert stop.value.code == 0
    assert capsys.readouterr().out


def test_links_and_options():
    assert len(LINES) >= 12
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (ROOT / "docs" / target).exists(), target
    named = set(re.findall(r"\b(?:cleaning|personal_data|decontaminate|cluster)\.(\w+)\b", TEXT)) - {"blocks"}
    sections = [PrepareConfig.model_fields[name].annotation for name in ("cleaning", "personal_data", "decontaminate",
                                                                         "cluster")]  # fmt: skip
    known = {name for section in sections for name in section.model_fields}
    assert named <= known
    assert known - named <= {"ngram", "action", "time", "cpus"}, "options that the text does not name"
