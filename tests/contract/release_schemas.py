"""Note that today's schemas are released: `python tests/contract/release_schemas.py`.

Writes those that are new to `events/schemas/history/` and to `events/schemas/released.json` (for each record the ids of its
versions, oldest first). Do it with every change of a schema; tests fail until it is done. Nothing is ever taken out.
"""

import json
import sys
from pathlib import Path

SCHEMAS = Path(__file__).parents[2] / "events" / "schemas"
sys.path.insert(0, str(Path(__file__).parents[2]))

from events.catalog import ENTRIES  # noqa: E402 - the line above makes the checkout's package the one that is imported


def release(folder: Path = SCHEMAS) -> list[str]:
    """Add what is new; return the names of the files that were written."""
    manifest = folder / "released.json"
    released: dict[str, list[int]] = json.loads(manifest.read_text("utf-8"))
    written = []
    for kind, entry in ENTRIES.items():
        ids = released.setdefault(kind.__name__, [])
        if entry.id not in ids:
            path = folder / "history" / f"{kind.__name__}-{entry.id}.avsc"
            path.write_text(json.dumps(entry.schema, indent=2, ensure_ascii=False) + "\n", "utf-8")
            ids.append(entry.id)
            written.append(path.name)
    manifest.write_text(json.dumps(released, indent=2, sort_keys=True) + "\n", "utf-8")
    return written


if __name__ == "__main__":
    print("\n".join(release()) or "all of today's schemas are released")  # noqa: T201
