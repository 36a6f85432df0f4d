"""CLINC150 (Larson et al., EMNLP 2019, CC BY 3.0) as rows that FlexP reads: a query, its intent and domain.

    python experiments/clinc150.py FOLDER

FOLDER holds ``data_full.json`` and ``domains.json`` as the data set's authors publish them (also ``clinc/clinc_oos`` on
the hub). Writes ``clinc150-train.jsonl`` (15,000 queries) and ``clinc150-test.jsonl`` (4,500) beside this file; queries
out of scope are left out.
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
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"clinc150-{split}.jsonl").write_text(text, encoding="utf-8")
        print(f"clinc150-{split}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(__file__).parent)
