"""Write the published JSON Schemas from the models: `python scripts/write_schema.py`."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel

from kvprofile.budget.profile import Profile
from kvprofile.files import write_atomically
from kvprofile.records.record import RunRecord

DOCS = Path(__file__).resolve().parents[1] / "docs"
SCHEMAS: dict[str, type[BaseModel]] = {"budget-file.schema.json": Profile, "run-record.schema.json": RunRecord}


def content(model: type[BaseModel]) -> bytes:
    """The schema's bytes."""
    return (json.dumps(model.model_json_schema(), indent=2, sort_keys=True) + "\n").encode()


if __name__ == "__main__":
    for name, model in SCHEMAS.items():
        write_atomically(DOCS / name, content(model))
