"""Write docs/budget-file.schema.json from the profile's model: `python scripts/write_schema.py`."""

from __future__ import annotations

import json
from pathlib import Path

from kvprofile.budget.profile import Profile
from kvprofile.files import write_atomically

SCHEMA = Path(__file__).resolve().parents[1] / "docs" / "budget-file.schema.json"


def content() -> bytes:
    """The schema's bytes."""
    return (json.dumps(Profile.model_json_schema(), indent=2, sort_keys=True) + "\n").encode()


if __name__ == "__main__":
    write_atomically(SCHEMA, content())
