"""Made-up attestations."""

from __future__ import annotations

from kvprofile.runtime.attestation import KEY, NUMBERS, Attestation

COMPARED = {
    "tokens": 900, "near_ties": 1, "largest": 0.001, "most": 0.01, "mean": 0.0001, "most_mean": 0.001, "far": 0,
    "most_far": 2,
}  # fmt: skip


def make_attestation(key=None, checks=None, **changes):
    """An attestation that holds together, with ``changes`` of its key."""
    plain = {name: 16 if name in NUMBERS else f"a {name}" for name in KEY}
    made = {
        "stock": COMPARED,
        "reference": {"against": "simulation", **COMPARED},
        "blocks": {"requests": 20, "given_back": 90},
        "load": {"longest_request": 900, "preemptions": 3, "prefix_hits": 4, "chunks": 10, "poisoned": True},
    }
    measured = {"date": "2026-11-28", "seconds_per_token": {"stock": 0.01, "plugin": 0.012}}
    return Attestation((key or plain) | changes, checks or made, measured)
