"""CLINC150 (Larson et al., EMNLP 2019, CC BY 3.0) as rows that FlexP reads: a query, its intent and domain.

    python experiments/clinc150.py FOLDER

FOLDER holds ``data_full.json`` and ``domains.json`` as the data set's authors publish them (also ``clinc/clinc_oos`` on
the hub). Writes ``clinc150-train.jsonl`` (15,000 queries) and ``clinc150-test.jsonl`` (4,500) beside this file, without
queries that are out of scope, and the same with them (100 and 1,000 more, of intent and domain ``oos``):
``clinc150-oos-train.jsonl`` and ``clinc150-oos-test.jsonl``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(folder: Path, out: Path) -> None:
    """Write both files into ``out``."""
    splits = json.loads((folder / "data_full.json").read_text(encoding="utf-8"))
    domains = json.loads((folder / "domains.json").read_text(encoding="utf-8"))
    domain_of = {intent: domain for domain, intents in domains.items() for intent in intents}
    for split in ("train", "test"):
        rows = [{"text": text, "intent": intent, "domain": domain_of[intent]} for text, intent in splits[split]]
        beyond = [{"text": text, "intent": "oos", "domain": "oos"} for text, _ in splits[f"oos_{split}"]]
        for name, found in ((f"clinc150-{split}.jsonl", rows), (f"clinc150-oos-{split}.jsonl", rows + beyond)):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
            (out / name).write_text(text, encoding="utf-8")
            print(f"{name}: {len(found)} rows")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(__file__).parent)
