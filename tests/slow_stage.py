"""``python -m forja.stages`` with the recipe ``slow`` beside the product's, and a raw table for it.

``python tests/slow_stage.py VERB ...`` runs a stage; ``python tests/slow_stage.py plant N`` writes the table, N rows short of all, and
prints its reference: with other data it is other work.
"""

from __future__ import annotations

import sys
from pathlib import Path

import forja.recipes
from forja import recipes, samples
from forja.lake import Lake, sha256
from forja.settings import Settings
from forja.stages import __main__ as stages
from forja.stages import ingest

RECIPES = Path(__file__).parent / "cluster" / "recipes"


def plant(lake: Lake, fewer: int) -> str:
    """Make the digits, ``fewer`` of them than there are, the raw table's next version; its reference."""
    import pyarrow as pa
    from deltalake import write_deltalake

    rows = [
        {
            "key": s.key, "label": s.label, "payload": s.payload, "sha256": sha256(s.payload), "error": None, "topic_id": "t",
            "partition": 0, "offset": i, "time": 0,
        } for i, s in enumerate(samples.samples(recipes.load("slow"), None))
    ]  # fmt: skip
    rows = rows[: len(rows) - fewer]
    path = ingest.table_path("vision", "slow")
    table = pa.Table.from_pylist(rows, schema=pa.schema(ingest.schema()))
    write_deltalake(lake.uri(path), table, mode="overwrite", storage_options=lake.options or None)
    return f"{path}@{lake.table(path).version()}"


forja.recipes.__path__.append(str(RECIPES))

if __name__ == "__main__":
    if sys.argv[1] == "plant":
        print(plant(Lake(Settings.from_env().lake), int(sys.argv[2])))
    else:
        sys.exit(stages.main(sys.argv[1:]))
