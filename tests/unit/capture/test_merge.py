"""What ranks and stages saw, put together."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from kvprofile.capture.merge import merge


def part(first_head, layers, kv_heads=4, covered=((0, 5),), problems=()):
    notes = {"first_head": first_head, "kv_heads": kv_heads, "covered": covered, "problems": problems}
    tensors = {f"{index}.scores": torch.tensor(values) for index, values in layers.items()}
    return safetensors.torch.save(tensors, metadata={"kvprofile": json.dumps(notes)})


def test_ranks_bring_heads_and_stages_bring_layers():
    found = merge(
        [
            part(0, {0: [[0.1], [0.2]]}),
            part(2, {0: [[0.3], [0.4]]}),
            part(0, {7: [[0.5], [0.6]]}),
            part(2, {7: [[0.7], [0.8]]}),
        ]
    )
    torch.testing.assert_close(found.layers[0]["scores"], torch.tensor([[0.1], [0.2], [0.3], [0.4]]))
    torch.testing.assert_close(found.layers[7]["scores"], torch.tensor([[0.5], [0.6], [0.7], [0.8]]))
    assert found.problems == []


def test_copies_of_a_head_have_different_queries():
    found = merge([part(0, {0: [[0.1, 0.9]]}, kv_heads=1), part(0, {0: [[0.4, 0.2]]}, kv_heads=1)])
    torch.testing.assert_close(found.layers[0]["scores"], torch.tensor([[0.4, 0.9]]))


def test_ranks_that_disagree_are_a_problem():
    found = merge([part(0, {}), part(2, {}, covered=((0, 4),), problems=("x",)), part(0, {}, problems=("x",))])
    assert found.problems == ["x", "ranks computed different rows"]


@pytest.mark.parametrize(
    ("covered", "missing"),
    [
        ([(0, 9)], False),
        ([(4, 9)], False),
        ([(5, 9)], True),
        ([(0, 6), (6, 9)], False),
        ([(6, 9), (2, 6)], False),
        ([(0, 6), (7, 9)], True),
        ([(0, 8)], True),
        ([], True),
    ],
)
def test_rows_that_were_never_computed_are_missing(covered, missing):
    found = merge([part(0, {}, covered=covered)])
    assert found.missing(4, 9) is missing
