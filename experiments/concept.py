"""Tasks in which clients mean different things by the same words: nothing that is common to all answers them.

    python experiments/concept.py

It reads clinc150-train.jsonl and clinc150-test.jsonl beside it (clinc150.py).

``concept-intents-train.jsonl``, ``-test.jsonl``: the 15 intents of one domain of CLINC150, shared out evenly among ten
clients, each of which gives the 15 labels to the intents in an order of its own (the first keeps them as they are).

``concept-ratings.jsonl``: the sentiment snippets with the score that a lexicon gives them (−4 to 4), of four kinds of
text and two clients each, every one with a scale of its own: a level, a gain, and with every other one the other sign.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexp.assets import resolve

HERE = Path(__file__).parent
DOMAIN, CLIENTS = "travel", 10


def main() -> None:
    """Write the files."""
    for split in ("train", "test"):
        rows = [row for row in read(HERE / f"clinc150-{split}.jsonl") if row["domain"] == DOMAIN]
        names = sorted({row["intent"] for row in rows})
        rows = random.Random(0).sample(rows, len(rows))
        for number, row in enumerate(rows):
            client = number % CLIENTS
            order = names if client == 0 else random.Random(client).sample(names, len(names))
            row |= {"intent": order[names.index(row["intent"])], "client": f"client-{client}"}
        write(HERE / f"concept-intents-{split}.jsonl", rows)
    rows = read(Path(resolve("asset:sentiment")))
    kinds = sorted({row["client"] for row in rows})
    draw, found = random.Random(0), []
    of = {document: draw.random() < 0.5 for document in dict.fromkeys(row["document"] for row in rows)}
    for row in rows:
        second = of[row["document"]]
        place = 2 * kinds.index(row["client"]) + second
        sign, gain, level = (-1 if second else 1), (0.5, 1.0, 1.5, 2.0)[place // 2], place - 3.5
        rating = round(level + sign * gain * row["score"], 3)
        client = f"{row['client']}-{'b' if second else 'a'}"
        found.append({"text": row["text"], "rating": rating, "client": client, "document": row["document"]})
    write(HERE / "concept-ratings.jsonl", found)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows, one a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path.name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
