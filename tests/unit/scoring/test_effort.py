"""Counting products, shortcuts, when to stop: the parts behind `score --fast`, `--dry-run` and the speed benchmark."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvprofile.budget import store
from kvprofile.budget.profile import Shortcuts
from kvprofile.budget.profile_diff import comparability_warnings
from kvprofile.checkpoint.load import weight_room
from kvprofile.cli.show import provenance
from kvprofile.errors import InputError
from kvprofile.scoring.aggregate import HeadStatistics
from kvprofile.scoring.effort import EXACT, FAST, REST_RECENT_TOKENS, REST_STRIDE, Effort, sparse_rest
from kvprofile.scoring.plan import ScoringOptions
from kvprofile.scoring.prompts import Frame, FramedDocument, chunks
from kvprofile.scoring.stopping import FEWEST_PIECES, Stopping, heads_allowed
from kvprofile.scoring.work import DecoderShape, Repeat, count, matrix_rate
from tests.helpers.factories import make_geometry, make_profile

GIB = 2**30


def by_loops(shape, prefix, context, repeats):
    """Every row and every key it sees, one by one."""
    geometry = shape.geometry
    last = max(geometry.profiled_layers)
    size = geometry.head_size
    q, kv = geometry.attention_heads * size * shape.width, geometry.kv_heads * size * shape.width
    pair = geometry.attention_heads * size

    def visible(position, layer):
        slides = layer not in geometry.profiled_layers
        return min(position + 1, shape.window) if slides else position + 1

    length = prefix + context
    prefill = scoring = 0
    for position in range(length):
        prefill += kv  # the last layer's keys
        for layer in range(last):
            prefill += 2 * q + 2 * kv + shape.mlp + 2 * pair * visible(position, layer)
    for repeat in repeats:
        for row in range(repeat.rows):
            scored = prefix + repeat.chunk + row + 1
            scoring += q + kv + pair * scored
            for layer in range(last):
                scoring += 2 * q + 2 * kv + shape.mlp
                if layer in geometry.profiled_layers:
                    scoring += 2 * pair * (scored + repeat.rest) + pair * repeat.chunk
                else:
                    scoring += 2 * pair * visible(length + row, layer)
    return prefill, scoring


@pytest.mark.parametrize("sliding", [(), (1,), (0, 3)])
@pytest.mark.parametrize("context", [3, 30])
def test_products_are_counted_row_by_row(sliding, context):
    shape = DecoderShape(make_geometry(4, 2, head_size=4, sliding=sliding), width=16, mlp=100, window=8)
    repeats = [Repeat(7, 2, context - 2), Repeat(12, 5, 3)]
    found = count(shape, 4, context, repeats)
    assert (found.prefill, found.scoring) == by_loops(shape, 4, context, repeats)


@given(st.integers(0, 8), st.integers(1, 3000), st.integers(1, 700))
def test_a_sparse_repeat_sees_the_end_and_samples_of_the_rest(prefix, context, chunk_tokens):
    document = FramedDocument("some", tuple(range(prefix)), tuple(range(context)))
    for chunk in chunks(document, Frame("", "", (), (), (), ()), chunk_tokens):
        place = (prefix + chunk.start, prefix + chunk.stop)
        before, behind, recent = sparse_rest(prefix, place, prefix + context)
        seen = [*before, *behind, *recent]
        assert seen == sorted(set(seen))
        assert all(prefix <= position < prefix + context for position in seen)
        assert not set(seen) & set(range(*place))
        assert set(range(max(place[1], prefix + context - REST_RECENT_TOKENS), prefix + context)) <= set(seen)
        rest = context - (chunk.stop - chunk.start)
        stood_for = REST_STRIDE * (len(before) + len(behind)) + len(recent)
        assert abs(stood_for - rest) <= REST_STRIDE
        exact, sparse = (Repeat.of(document, chunk, sparse_rows=rows) for rows in (False, True))
        assert (exact.rest, sparse.rest) == (rest, len(seen))
        assert exact.chunk == sparse.chunk == chunk.stop - chunk.start


def test_exact_repeats_cost_twice_the_prefill_in_long_contexts_and_sparse_ones_do_not():
    shape = DecoderShape(
        make_geometry(32, 8, query_groups=4, head_size=128), width=4096, mlp=3 * 4096 * 14336, window=None
    )
    tokens, chunk = 2_000_000, 2000
    exact, sparse = (
        count(shape, 4, tokens, [Repeat(chunk + 30, chunk, rest)] * (tokens // chunk))
        for rest in (tokens - chunk, tokens // REST_STRIDE)
    )
    assert 1.9 < exact.scoring / exact.prefill < 2.1
    assert sparse.scoring / sparse.prefill < 0.2


def test_products_have_a_rate():
    assert matrix_rate("cpu", "float32", size=64, seconds=0.01) > 1e6


@given(st.integers(1, 60), st.floats(0.01, 1.0), st.integers(0, 5), st.integers(0, 5))
def test_sampled_chunks_are_spread_over_the_document(chunks, share, seed, document):
    found = sorted(Effort(chunk_share=share).chunks(chunks, seed, document))
    assert found == sorted(Effort(chunk_share=share).chunks(chunks, seed, document))
    assert len(found) == -(-share * chunks // 1)
    assert found[0] >= 0
    assert found[-1] < chunks
    count = len(found)
    assert all(i * chunks // count <= chunk < (i + 1) * chunks // count for i, chunk in enumerate(found))


def test_an_exact_run_reads_everything_in_order():
    assert EXACT.exact
    assert not FAST.exact
    assert EXACT.chunks(5, 1, 2) == {0, 1, 2, 3, 4}
    assert EXACT.order(6, 1) == [0, 1, 2, 3, 4, 5]
    assert sorted(FAST.order(6, 1)) == [0, 1, 2, 3, 4, 5]
    assert FAST.order(20, 1) != FAST.order(20, 2)


def pieces(spread, count=40, heads=100):
    """Scores of heads 0.01, 0.02, ... in every piece, with noise of so much."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        scores = torch.linspace(0.01, 0.9, heads) + spread * torch.rand(heads, generator=generator)
        yield HeadStatistics.of(scores.view(4, heads // 4, 1).clamp(0, 1))


@pytest.mark.parametrize("statistic", ["max", "mean"])
def test_a_run_stops_where_pieces_agree_and_not_where_they_do_not(statistic):
    calm, noisy = Stopping(statistic, 0), Stopping(statistic, 0)
    stops = [calm.add(piece) for piece in pieces(1e-5)]
    assert stops.index(True) == FEWEST_PIECES - 1
    assert not any(noisy.add(piece) for piece in pieces(0.9))


def test_few_heads_may_move():
    assert [heads_allowed(heads) for heads in (1, 24, 99, 100, 384)] == [1, 1, 1, 2, 7]


def test_loss_aware_methods_have_no_shortcuts():
    with pytest.raises(InputError, match="--fast has no shortcut for --method gate"):
        ScoringOptions("gate", effort=FAST)
    assert ScoringOptions("kvzip-mean", effort=FAST).effort is FAST


def test_files_of_exact_runs_do_not_mention_shortcuts(tmp_path):
    exact = make_profile(2, 2)
    assert "shortcuts" not in json.loads(store.to_bytes(exact))["scoring"]
    taken = Shortcuts(
        sparse_rows=True,
        chunk_share=0.5,
        stop_early=True,
        stopped_early=False,
        chunks_read=7,
        chunks=12,
        documents_read=3,
    )
    fast = exact.model_copy(update={"scoring": exact.scoring.model_copy(update={"shortcuts": taken})})
    store.save(fast, tmp_path / "fast.json")
    back = store.load(tmp_path / "fast.json")
    assert back.scoring.shortcuts == taken
    assert store.to_bytes(back) == (tmp_path / "fast.json").read_bytes()
    assert "other chunks scored: all, exactly and 7 of 12 chunks, sparse rows" in comparability_warnings(exact, back)
    assert provenance(back) == f"{provenance(exact)}; fast: 7 of 12 chunks, sparse rows"


def test_weights_leave_room_for_the_cache():
    assert weight_room((10 * GIB, 10 * GIB), 0) == (9 * GIB, 9 * GIB)
    uneven = weight_room((20 * GIB, 10 * GIB), 9 * GIB)
    assert sum(uneven) == pytest.approx(18 * GIB, abs=4)
    assert uneven[0] == pytest.approx(2 * uneven[1], abs=4)
    with pytest.raises(InputError, match=r"the cache needs 18\.0 GiB, the GPUs have 20\.0 GiB free"):
        weight_room((10 * GIB, 10 * GIB), 18 * GIB)


def test_shape_of_a_config():
    from transformers import LlamaConfig, Qwen3MoeConfig

    geometry = make_geometry(2, 2, head_size=8)
    dense = DecoderShape.of(LlamaConfig(hidden_size=32, intermediate_size=48), geometry)
    assert (dense.width, dense.mlp, dense.window) == (32, 3 * 32 * 48, None)
    assert dense.projections("qkvo") == 2 * 4 * 8 * 32 + 2 * 2 * 8 * 32
    sparse = Qwen3MoeConfig(hidden_size=32, intermediate_size=99, moe_intermediate_size=16, num_experts_per_tok=3)
    assert DecoderShape.of(sparse, geometry).mlp == 3 * 32 * 16 * 3
    assert replace(dense, window=4).window == 4
