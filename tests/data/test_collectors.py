"""A user's own class as a source: the example against a server of its own, what is resumed, and what is refused."""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from readings import config, read

from engine.data import collectors
from engine.data.indexed import IndexedDataset
from engine.data.prepare import prepare
from engine.data.sources import list_files
from engine.data.tokenizer import load_tokenizer
from engine.data.units import plan_units
from engine.errors import UserError

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "collector.py"
PER_PAGE, PAGES = 4, 3


def article(year: str, number: int) -> dict:
    words = "a story of the sea and of those who sail on it, told in the year and in its winter"
    return {"title": f"Number {number} of {year or 'all'}", "body": f"{words}: {number} {year}. " * (1 + number % 3)}


def text_of(year: str, number: int) -> str:
    return f"# {article(year, number)['title']}\n\n{article(year, number)['body']}\n"


@pytest.fixture
def server(monkeypatch):
    """Pages of articles, and the list of what was asked for. ``failing``: requests that get no answer."""

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self):
            asked = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
            self.server.asked.append(asked)  # type: ignore[attr-defined]
            if asked in self.server.failing:  # type: ignore[attr-defined]
                self.send_error(503)
                return
            page, year = int(asked["page"]), asked.get("year", "")
            numbers = range(PER_PAGE * (page - 1), PER_PAGE * page)
            articles = [article(year, number) for number in numbers]
            body = json.dumps({"articles": articles, "next": page + 1 if page < PAGES else None}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as one:
        one.asked, one.failing = [], []  # type: ignore[attr-defined]
        thread = threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        monkeypatch.setenv("ARTICLES_URL", f"http://127.0.0.1:{one.server_port}/articles")
        yield one
        one.shutdown()
        thread.join()


def source(name, path=EXAMPLE) -> Path:
    return Path(f"python:{path}:{name}")


def of(tmp_path, given, **settings):
    """The configuration for a class of the example, or for an input as it is given."""
    given = source(given) if isinstance(given, str) else given
    return config(given, **{"output": tmp_path / "out"} | settings)


def test_the_example_collects_all_pages_and_prepares_them(tmp_path, server):
    cfg = of(tmp_path, "Articles", vocab_size=400, workers=1, validation_fraction=0)
    manifest = prepare(cfg)
    assert manifest["documents"]["read"] == PER_PAGE * PAGES == manifest["documents"]["kept"]
    assert [asked["page"] for asked in server.asked] == ["1", "2", "3"]
    tokenizer = load_tokenizer(tmp_path / "out")
    texts = [tokenizer.decode(list(ids)[:-1]) for ids in IndexedDataset(tmp_path / "out" / "train")]
    assert texts == [text_of("", number) for number in range(PER_PAGE * PAGES)]
    # Prepared is prepared: nothing is asked for again.
    assert prepare(cfg) == manifest
    assert len(server.asked) == 3


def test_places_counts_and_identity(tmp_path, server):
    documents, quarantine, reader = read(of(tmp_path, "Articles"))
    assert documents == [(f"articles:{n + 1}", text_of("", n)) for n in range(12)]
    assert (quarantine, reader.records) == ([], 12)
    assert reader.size == sum(len(text.encode()) for _, text in documents)
    before = reader.sha256
    assert read(of(tmp_path, "Articles"))[2].sha256 == before
    assert read(of(tmp_path, "ArticlesOfYears"))[2].sha256 != before


def test_parts_are_units_of_their_own(tmp_path, server):
    cfg = of(tmp_path, "ArticlesOfYears")
    units = plan_units(list_files(cfg), cfg)
    assert [[(piece.start, piece.end) for piece in unit.slices] for unit in units] == [[(0, 1)], [(1, 2)], [(2, 3)]]
    documents, _, _ = read(cfg)
    assert documents == [
        (f"articles/{year}:{n + 1}", text_of(year, n)) for year in ("2022", "2023", "2024") for n in range(12)]


def test_a_server_that_fails_costs_no_finished_part(tmp_path, server):
    cfg = of(tmp_path, "ArticlesOfYears", vocab_size=400, workers=1)
    server.failing.append({"page": "2", "year": "2024"})
    with pytest.raises(UserError) as error:
        prepare(cfg)
    assert "articles: stopped after 4 documents (Service Unavailable)" in str(error.value) or \
        "articles: stopped after 4 documents (HTTP Error 503" in str(error.value)  # fmt: skip
    assert str(error.value).endswith("Run it again; finished parts are kept.")
    server.failing.clear()
    server.asked.clear()
    assert prepare(cfg)["documents"]["read"] == 36
    assert {asked["year"] for asked in server.asked} == {"2024"}


MODULE = """
from engine.data.collectors import Collector

class Some(Collector):
    def documents(self):
        yield "a text"
        yield {"text": "of a field"}
        yield 7
        yield {"body": "not this one"}
        yield {"text": "the last"}

class Bad(Collector):
    def documents(self):
        yield {"body": "not this one"}

class Empty(Collector):
    pass

class Unsure(Some):
    def parts(self):
        raise ConnectionError("no route")

class Broken(Collector):
    def documents(self):
        yield 1 / 0

class Other:
    pass
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module in the current folder, as `python -m` would find it."""
    name = f"module_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / "faulty.py").write_text("def (")
    monkeypatch.chdir(tmp_path)
    yield name
    sys.modules.pop(name, None)


def test_items_of_every_kind(tmp_path, module):
    path = list(sys.path)
    documents, quarantine, reader = read(of(tmp_path, source("Some", module)))
    assert documents == [("Some:1", "a text"), ("Some:2", "of a field"), ("Some:5", "the last")]
    assert [(item["file"], item["line"], item["reason"]) for item in quarantine] == [
        ("Some", 3, "not_an_object"), ("Some", 4, "no_text_field")]  # fmt: skip
    assert quarantine[0]["detail"] == "neither text nor a dict with fields (int)"
    with pytest.raises(UserError, match=r"2 of 5 records are unusable.*the first is Some:3: neither text"):
        reader.check_bad_fraction()
    assert sys.path == path


def test_the_identity_follows_the_file_and_the_version(tmp_path, module):
    first = read(of(tmp_path, source("Some", tmp_path / f"{module}.py")))[2].sha256
    changed = tmp_path / "changed.py"
    changed.write_text(MODULE + "\n# another comment\n")
    assert read(of(tmp_path, source("Some", changed)))[2].sha256 != first
    versions = set()
    for version in ("1", "2", "2"):
        collector = collectors.load(source("Some", changed))
        collector.version = version
        versions.add(collector.identity())
    assert len(versions) == 2


@pytest.mark.parametrize(("given", "message"), [
    ("python:{module}:Missing", r"no Collector 'Missing' \(there are Some, Bad, Empty, Unsure, Broken\)"),
    ("python:{module}:Other", "no Collector 'Other'"),
    ("python:{module}:Empty", r"Empty has neither documents\(\) nor documents_of\(\)"),
    ("python:{module}", "names no class. Give python:MODULE:CLASS"),
    ("python:nothing_here:Some", "no module 'nothing_here'"),
    ("python:gone.py:Some", "cannot be loaded"),
    ("python:faulty.py:Some", "cannot be loaded"),
    ("python:{module}:Bad", r"Bad:1: no field 'text' \(fields: body\)\. Name it with --text_field"),
    ("python:{module}:Unsure", r"Unsure: cannot tell its parts \(no route\)"),
])  # fmt: skip
def test_what_is_no_collector(tmp_path, module, given, message):
    with pytest.raises(UserError, match=message) as error:
        read(of(tmp_path, Path(given.format(module=module))))
    assert "\n" not in str(error.value)


def test_a_fault_of_the_users_class_is_shown_as_one(tmp_path, module):
    with pytest.raises(ZeroDivisionError):
        read(of(tmp_path, source("Broken", module)))
