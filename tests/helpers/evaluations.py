"""Results of an evaluation made up for tests: items whose accuracies are known."""

from __future__ import annotations

from dataclasses import replace

from kvprofile.evaluate.item_store import Item
from kvprofile.evaluate.summary import Results, summarise
from kvprofile.evaluate.variants import Contender, build
from tests.helpers.factories import make_profile

ITEM = Item(
    exercise="needle/300/0", task="needle", length=300, question=0, variant="full", context_tokens=310, depth=0.25,
    outside=True, retention_realised=1.0, reference_tokens=7, tokens_right=7, exact=True, right=True, accuracy=1.0,
    nll=0.123456789, agreement=1.0, kl=0.0, generated=None, generated_tokens=6,
)  # fmt: skip


def made_up_items(profile, contexts=30, questions=4):
    """Items whose accuracies are known: the full cache knows all but one answer, random heads half of them."""
    variants = build([Contender("kvzip", profile)], profile.model.geometry, [0.5], random_seeds=2)
    items = []
    for number in range(contexts):
        for question in range(questions):
            for variant in variants:
                wrong = {"full": number == question == 0, "profile": question == 0 and number < 3}
                right = not wrong.get(variant.kind, question % 2 == 0)
                tokens = {"tokens_right": 7 if right else 3, "exact": right, "generated": None if right else "no"}
                items.append(
                    replace(
                        ITEM, exercise=f"needle/300/{number}", question=question, variant=variant.key, right=right,
                        accuracy=float(right), agreement=1.0 if variant.kind == "full" else tokens["tokens_right"] / 7,
                        nll=0.1 if right else 2.0, kl=0.0 if variant.kind == "full" else 0.5,
                        retention_realised=variant.full_heads / 24, outside=question > 1, **tokens,
                    )
                )  # fmt: skip
    return items, variants


def made_up_summary():
    """What `evaluate` draws and prints of made-up items."""
    items, variants = made_up_items(make_profile())
    return {
        "model": {"name": "a$model$"},
        "settings": {"sink_tokens": 16, "recent_tokens": 64, "generate": True},
        **summarise(Results.of(items, variants)),
    }
