"""Web furniture, licence headers, mojibake and the language hint: what goes, and the neighbours that stay."""

from __future__ import annotations

# ruff: noqa: RUF001 - letters of other scripts are what the language hint is about
import ast
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config.cleaning import CleaningConfig, PersonalDataConfig
from engine.data.cleaning import Cleaner
from engine.data.cleaning_language import LANGUAGES, guess
from engine.data.cleaning_lines import remove_furniture, remove_licence_header
from engine.data.personal_data import EMAIL
from engine.errors import UserError

FURNITURE = {
    "Skip to content": "navigation",
    "READ MORE »": "navigation",
    "« Previous Post": "navigation",
    "Home | About Us | News | Contact": "navigation",
    "home › products › sign in": "navigation",
    "Home | Our Mill | Contact | Visit": "navigation",
    "Home    Blog    Privacy Policy": "navigation",
    "Share this:": "share",
    "Share on Facebook": "share",
    "Forgot Password?": "account",
    "Your email address will not be published. Required fields are marked *": "account",
    "All rights reserved.": "notice",
    "© 2024 Some Company, Inc.": "notice",
    "Copyright (c) 2001 The Authors. All Rights Reserved.": "notice",
    "Please enable JavaScript to view the comments powered by Disqus.": "notice",
    "This website uses cookies to improve your experience.": "cookies",
    "By continuing to browse you agree to our use of cookies.": "cookies",
    "We use cookies to give you the best experience.": "cookies",
    "Our site uses cookies": "cookies",
    "JavaScript is disabled in your browser.": "notice",
    "This page requires JavaScript.": "notice",
    "Copyright Some Company. All rights reserved.": "notice",
    "Accept all cookies": "notice",
    "I accept cookies!": "cookies",
}
TEXT = [
    "A baker who uses cookies to lure children is the villain of this tale.",
    "log in", "register.", "Search", "print.", "like this:", "share this", "next page",
    "You can log in with your password, or sign up.",
    "We use cookies in the oven: bake 12 of them.", "By clicking here Tom stole the cookies.",
    "This page uses cookies that the server below sets.", "JavaScript is disabled by 3% of readers.",
    "This feature of JavaScript is old.", "Your browser runs JavaScript in a sandbox.",
    "Copyright law says that all rights reserved is no longer needed.",
    "JavaScript is a language; JavaScript engines compile it.",
    "| Home | Contact | Login |", "Name | Home | Age", "Home | Mill | Contact | Rain | Sun",
    "home, contact, login", "at home  I contact  him",
    "The symbol © stands for copyright.", "He reserved all rights.", "All rights reserved for the poor, he said",
    "This website uses cookies" + " and more" * 30,
    "", "   ", ">>> x", "- Read", "...",
]  # fmt: skip


@pytest.mark.parametrize("line", FURNITURE)
def test_furniture_goes(line):
    for around in ("{}", "Before.\n  {} \nAfter.", "{}\n\nAfter\n{}"):
        text = around.format(line, line)
        kept, removed, first = remove_furniture(text)
        assert removed == {FURNITURE[line]: text.count(line)}
        assert first == line
        assert kept == "\n".join(other for other in text.split("\n") if line not in other)


@pytest.mark.parametrize("line", TEXT)
def test_text_stays(line):
    text = f"Before.\n{line}\nAfter: home, cookies, javascript, all rights reserved, © 2024.\n"
    assert remove_furniture(text) == (text, {}, "")


@given(st.lists(st.sampled_from([*FURNITURE, *TEXT]), max_size=12))
def test_lines_are_judged_one_by_one(lines):
    kept, removed, _ = remove_furniture("\n".join(lines))
    assert kept == "\n".join(line for line in lines if line not in FURNITURE)
    assert removed.total() == sum(line in FURNITURE for line in lines)


HEADERS = [
    ("#!/usr/bin/env python\n# -*- coding: utf-8 -*-\n# Copyright 2020 X\n#\n# Licensed under Y\n\nimport os\n", 3),
    ("// SPDX-License-Identifier: MIT\n\nint x; // Copyright\n", 1),
    ("\n/* (c) 2020 X\n * All rights reserved\n */\n#include <x>\n", 3),
    ("/*\n * License\n */ \nint x;\n", 3),
    ("<!-- Copyright X\n-->\n<p>\n", 2),
    ("-- Licence: BSD\nSELECT 1;\n", 1),
    ("! Copyright X\nprogram p\n", 1),
    ("; Copyright\n# another sign\n", 1),
    ("# Copyright\n", 1),
    ("# This file is distributed under the MIT License.\nimport os\n", 1),
    ("// Copyright: the authors\n// See LICENSE for details.\nint x;\n", 2),
]
NO_HEADERS = [
    "# A comment about files\nimport os\n",
    "# This module checks licenses: it parses license files.\nimport os\n",
    "// Package license finds the license of a project and returns\n// its text.\npackage license\n",
    "# Returns the copyright notice\ndef f(): pass\n",
    "#include <licence.h>\n#define COPYRIGHT 1\n",
    "/* Copyright */ int x;\n",
    "/* Copyright, never closed\nint x;\n",
    '"""Copyright in a docstring."""\nimport os\n',
    "import os\n# Copyright far below\n",
    "#!/bin/sh\n",
    "",
    "\n\n",
    "x = 1  # Copyright\n",
]


@pytest.mark.parametrize(("code", "removed"), HEADERS)
def test_licence_header_goes(code, removed):
    left, lines, first = remove_licence_header(code)
    gone = [line for line in code.split("\n") if line not in left.split("\n")]
    assert lines == removed
    assert len(code.split("\n")) - len(left.split("\n")) == removed
    assert first == gone[0].strip()
    assert code.split("\n")[-2] in left or removed == 1
    assert remove_licence_header(left)[1] in (0, 1)


@pytest.mark.parametrize("code", NO_HEADERS)
def test_other_code_stays(code):
    assert remove_licence_header(code) == (code, 0, "")


def test_modules_mean_the_same_without_their_headers():
    removed = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        code = path.read_text(encoding="utf-8")
        left, lines, _ = remove_licence_header(code)
        removed += lines > 0
        assert lines == 0 or ast.dump(ast.parse(left)) == ast.dump(ast.parse(code))
    assert removed > 5


PAGE = """Skip to content
Home | Blog | Contact

The mill at the river stands since 1640, and it grinds to this day.
Ask jane@firma.de for a tour.

Share this:
"""
SCRIPT = "# Copyright 2020 X\n\nprint('a script that says something')\n"


def test_cleaner_counts_what_it_changed_in_documents_that_stay():
    config = CleaningConfig(boilerplate=True, licence_headers=True)
    cleaner = Cleaner(config, personal_data=PersonalDataConfig(mask=["email", "ip"]))
    cleaned = cleaner.clean(PAGE, "prose", "page")
    assert (
        cleaned == f"\nThe mill at the river stands since 1640, and it grinds to this day.\nAsk {EMAIL} for a tour.\n\n"
    )
    assert cleaner.clean(SCRIPT, "code", "script") == "\nprint('a script that says something')\n"
    assert cleaner.clean("Share this:\nRead more\n", "prose", "empty") is None
    assert cleaner.clean("1234567890 " * 30 + "a@b.de", "prose", "figures") is None
    assert (
        cleaner.clean("Share this:\n# Copyright X, in code\n", "code", "other")
        == "Share this:\n# Copyright X, in code\n"
    )
    manifest = cleaner.as_manifest()
    assert manifest["lines"] == {
        "licence": {"documents": 1, "found": 1, "samples": [{"source": "script", "excerpt": "# Copyright 2020 X"}]},
        "navigation": {"documents": 1, "found": 2, "samples": [{"source": "page", "excerpt": "Skip to content"}]},
        "share": {"documents": 1, "found": 1, "samples": [{"source": "page", "excerpt": "Skip to content"}]},
    }
    assert manifest["personal_data"] == {
        "email": {"documents": 1, "found": 1, "samples": [{"source": "page"}]},
        "ip": {"documents": 0, "found": 0, "samples": []},
    }
    assert {name: rule["documents"] for name, rule in manifest["rules"].items() if rule["documents"]} == {
        "empty": 1, "few_letters": 1,
    }  # fmt: skip
    plain = Cleaner()
    assert plain.clean(PAGE, "prose", "page") == PAGE
    assert plain.clean(SCRIPT, "code", "script") == SCRIPT
    assert set(plain.as_manifest()) == {"repairs", "rules"}


def test_mojibake():
    cleaner = Cleaner(CleaningConfig(mojibake=True))
    wrong = "It\u00e2\u20ac\u2122s the caf\u00c3\u00a9 of the village, and it isn\u00e2\u20ac\u2122t far.\n"
    assert cleaner.clean(wrong, "prose", "f") == "It\u2019s the caf\u00e9 of the village, and it isn\u2019t far.\n"
    assert cleaner.report.repairs == {"mojibake": 1}
    for text in (
        "Caf\u00e9 \u00c5ngstr\u00f6m, \u00ab\u00c2me\u00bb, \u00c3o fim do dia.\n",
        "plain text of some length\n",
    ):
        assert cleaner.clean(text, "prose", "f") == text
    assert cleaner.clean(wrong, "code", "f") == wrong
    assert Cleaner().clean(wrong, "prose", "f") == wrong
    assert cleaner.report.repairs == {"mojibake": 1}


def test_mojibake_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(UserError, match=r'cleaning.mojibake: needs the ftfy package\. Install it \(pip install "main'):
        Cleaner(CleaningConfig(mojibake=True))
    Cleaner()


# A few own sentences in each.
SENTENCES = {
    "en": "The house stands on the hill, and from the window you can see all of the valley with its river.",
    "de": "Das Haus steht auf dem Hügel, und aus dem Fenster sieht man das ganze Tal mit dem Fluss, der klein ist.",
    "fr": "La maison est sur la colline, et de la fenêtre on voit toute la vallée avec la rivière qui n'est pas large.",
    "es": "La casa está en la colina, y desde la ventana se ve todo el valle con el río, que no es muy profundo.",
    "it": "La casa è sulla collina, e dalla finestra si vede tutta la valle con il fiume, che non è molto profondo.",
    "pt": "A casa fica na colina, e da janela se vê todo o vale com o rio, que não é muito fundo mas é largo.",
    "nl": "Het huis staat op de heuvel, en uit het raam ziet men het hele dal met de rivier, die niet diep is.",
    "sv": "Huset står på kullen, och från fönstret kan man se hela dalen med floden, som inte är så djup.",
    "pl": "Dom stoi na wzgórzu, a z okna widać całą dolinę z rzeką, która nie jest tak głęboka jak się to mówi.",
    "cs": "Dům stojí na kopci a z okna je vidět celé údolí s řekou, která není tak hluboká, jak se o ní říká.",
    "tr": "Ev tepede duruyor ve pencereden bütün vadi ile nehir görünüyor, ama bu nehir o kadar da derin değil.",
    "ru": "Дом стоит на холме, и из окна видна вся долина с рекой, которая не так глубока, как о ней говорят.",
    "uk": "Будинок стоїть на пагорбі, і з вікна видно всю долину з річкою, яка не така глибока, як про неї кажуть.",
    "el": "Το σπίτι είναι στον λόφο, και από το παράθυρο φαίνεται όλη η κοιλάδα με το ποτάμι, που δεν είναι βαθύ.",
    "zh": "房子在山上,从窗户可以看到整个山谷和河流,河水并不深,但是很宽,孩子们常常在那里玩。",
    "ja": "家は丘の上にあり、窓からは谷全体と川が見えます。川は深くありませんが、とても広いです。",
    "ko": "집은 언덕 위에 있고 창문에서는 골짜기와 강이 모두 보입니다. 강은 깊지 않지만 아주 넓습니다.",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_language(language):
    found = guess(SENTENCES[language] * 2)
    assert not found.plainly_none_of([language])
    assert not found.plainly_none_of([language, "fi"])
    for other in ("en", "ru", "zh", "hu"):
        if other != language:
            assert found.plainly_none_of([other]) or (other, language) in {("ru", "uk"), ("ru", "bg")}
    cleaner = Cleaner(CleaningConfig(language=[language]))
    assert cleaner.clean(SENTENCES[language], "prose", "f") is not None
    assert cleaner.clean(SENTENCES["el" if language != "el" else "ko"], "prose", "f") is None
    assert cleaner.clean(SENTENCES["ko"], "code", "f") is not None
    assert cleaner.report.dropped == {"language": 1}


@pytest.mark.parametrize(
    "text",
    ["", "Bonjour le monde", "Müller, Schmidt, Meyer und Söhne", "int main(void) { return 0; } " * 20, "12345 " * 50,
     "Привет", "Der Regen fiel auf das Dach, und die Bewohner sahen nach den undichten Stellen.",
     "Jean-Luc de la Tour, Maria da Silva, Jan van den Berg\n" * 2],
)  # fmt: skip
def test_unsure_is_not_plain(text):
    assert not guess(text).plainly_none_of(["en"])


def test_similar_languages_are_not_told_apart():
    danish = "Huset ligger på bakken, og fra vinduet kan man se hele dalen med elven, som ikke er så dyb som den var."
    assert not guess(danish * 3).plainly_none_of(["no"])
    assert not guess(danish * 3).plainly_none_of(["da"])
    assert guess(danish * 3).plainly_none_of(["en"])


def test_languages_that_can_be_asked_for():
    from typing import get_args

    from engine.config.cleaning import Language

    assert sorted(get_args(Language)) == sorted(LANGUAGES)
    with pytest.raises(UserError, match=r"language.*expected one of"):
        CleaningConfig(language=["xx"])  # type: ignore[list-item]
