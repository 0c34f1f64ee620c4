"""An API as a source of documents, a page of JSON at a time: {"articles": [{"title", "body"}, …], "next": 2 or null}.

    ARTICLES_URL=https://example.org/articles \\
        mainspring prepare --input python:examples/collector.py:Articles --output data/articles

`Articles` is one piece of work: a run that is killed while it collects begins again with page 1. `ArticlesOfYears` has
a part for each year, which several workers read at once, and which a run that goes on does not read again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from urllib.request import urlopen

from engine.data.collectors import Collector


class Articles(Collector):
    name = "articles"
    query = ""

    def documents(self) -> Iterator[dict | str]:
        page = 1
        while page:
            with urlopen(f"{os.environ['ARTICLES_URL']}?page={page}{self.query}", timeout=30) as answer:
                found = json.load(answer)
            for article in found["articles"]:
                yield {"text": f"# {article['title']}\n\n{article['body']}\n"}
            page = found["next"]


class ArticlesOfYears(Articles):
    def parts(self) -> list[str]:
        return ["2022", "2023", "2024"]

    def documents_of(self, part: str) -> Iterator[dict | str]:
        self.query = f"&year={part}"
        return self.documents()
