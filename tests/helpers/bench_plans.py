"""A benchmark's plan for tests: pocket, half and nearly all of its heads, documents made up from a seed."""

from __future__ import annotations

from kvprofile.bench import documents
from kvprofile.bench.scenario import BenchPlan, local_legs
from tests.helpers.models import POCKET


def make_plan(**changes) -> BenchPlan:
    """``changes`` override fields of the plan."""
    options = {
        "model": str(POCKET),
        "model_name": "pocket",
        "legs": local_legs((0.9, 0.5)),
        "documents": tuple(documents.pocket(0)),
        "profile": "models/kv_budget/pocket.json",
        **changes,
    }
    return BenchPlan(**options)
