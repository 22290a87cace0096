"""The simulation against the naive masked implementation, the plain model, and its own memory formula."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import astuple

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from kvprofile.budget.float8 import Float8
from kvprofile.budget.profile import FULL_ATTENTION
from kvprofile.budget.trim import ANCHORED, SLIDING, WINDOWS, TrimRule
from kvprofile.checkpoint import Source, describe
from kvprofile.checkpoint.rehearsal import cache_argument
from kvprofile.errors import InputError
from kvprofile.evaluate.simulate import simulating
from kvprofile.evaluate.token_choice import TokenChoice
from tests.helpers import masked
from tests.helpers.models import FAMILIES, HYBRIDS, POCKET, random_model

MODELS = ["pocket", *FAMILIES, *HYBRIDS]


def near(found, expected, model):
    """Within 1e-4; twice that for the bundled model, whose sharp heads put plain transformers 8e-5 from float64."""
    sharp = model.config.hidden_size == 256
    torch.testing.assert_close(found, expected, atol=2e-4 if sharp else 1e-4, rtol=0)


@pytest.fixture(scope="module", params=MODELS)
def subject(request, tmp_path_factory):
    """A model and its geometry."""
    if request.param == "pocket":
        model = AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32).eval()
    else:
        model = random_model(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, describe(Source("test", folder, None)).geometry


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    model = random_model("llama")
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    model.set_attn_implementation("sdpa")
    return model, describe(Source("test", folder, None)).geometry


def draw_heads(rng, geometry):
    """A random budget: rows of only full heads, of none, and mixed ones."""
    share = rng.choice((0.0, 0.3, 0.7, 1.0, None))
    return [
        [None] * geometry.kv_heads
        if kind != FULL_ATTENTION
        else [float(rng.random() < (rng.random() if share is None else share)) for _ in range(geometry.kv_heads)]
        for kind in geometry.layer_types
    ]


def draw_ids(rng, count):
    return [rng.randrange(4, 1000) for _ in range(count)]


@pytest.mark.parametrize("seed", range(8))
def test_logits_equal_the_naive_masked_implementation(subject, seed):
    model, geometry = subject
    rng = random.Random(f"{model.config.model_type}:{seed}")
    sizes = rng.choice((0, 1, 5, 16)), rng.choice((1, 7, 24, 200)), rng.choice((1, 4, 16, 32))
    rule = TrimRule(*sizes, WINDOWS[seed % 2])
    heads = draw_heads(rng, geometry)
    context, rest = draw_ids(rng, rng.randrange(1, 150)), draw_ids(rng, rng.randrange(1, 60))
    expected = masked.logits(model, context + rest, len(context), heads, *astuple(rule))
    with simulating(model, geometry, heads, rule) as simulation:
        last = simulation.prefill(context)
        simulation.trim()
        simulation.forget_context()
        branch = simulation.start()
        found, start = [], 0
        while start < len(rest):  # in steps of one token and of several
            stop = start + rng.choice((1, 1, 5, 30))
            found += branch.read([rest[start:stop]])
            start = stop
    near(last, expected[len(context) - 1], model)
    near(torch.cat(found), expected[len(context) :], model)


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_a_batch_equal_rows_alone(subject, seed):
    model, geometry = subject
    rng = random.Random(f"batch:{model.config.model_type}:{seed}")
    rule = TrimRule(rng.choice((0, 5, 40)), rng.choice((3, 24)), rng.choice((1, 8)), WINDOWS[seed % 2])
    heads = draw_heads(rng, geometry)
    context = draw_ids(rng, rng.randrange(1, 120))
    rows = [[draw_ids(rng, rng.randrange(1, 25)) for _ in range(3)] for _ in range(4)]
    rows[2][1] = []  # a row may wait
    with simulating(model, geometry, heads, rule) as simulation:
        simulation.prefill(context)
        simulation.trim()
        branch = simulation.start(len(rows))
        together = [branch.read([row[turn] for row in rows]) for turn in range(3)]
    for index, row in enumerate(rows):
        ids = [token for turn in row for token in turn]
        expected = masked.logits(model, context + ids, len(context), heads, *astuple(rule))
        found = torch.cat([together[turn][index] for turn in range(3)])
        near(found, expected[len(context) :], model)


@pytest.mark.parametrize("seed", range(4))
def test_budgets_side_by_side_equal_each_alone(subject, seed):
    model, geometry = subject
    rng = random.Random(f"side by side:{model.config.model_type}:{seed}")
    rule = TrimRule(rng.choice((0, 5, 40)), rng.choice((3, 24)), rng.choice((1, 8)), WINDOWS[seed % 2])
    budgets = [draw_heads(rng, geometry) for _ in range(rng.choice((2, 4)))]
    context = draw_ids(rng, rng.randrange(1, 120))
    rows = [[draw_ids(rng, rng.randrange(1, 25)) for _ in range(2)] for _ in range(2)]
    with simulating(model, geometry, budgets[0], rule) as simulation:
        simulation.prefill(context)
        simulation.trim_each(budgets)
        sizes = [simulation.nbytes(number) for number in range(len(budgets))]
        branch = simulation.start(len(rows), whole=True)
        together = [branch.read([row[turn] for row in rows] * len(budgets)) for turn in range(2)]
        # go back: some rows, one of them twice, as they were after the first turn and after nothing
        picked = rng.sample(range(branch.count), 2)
        after = [len(rows[row % 2][0]) for row in picked]
        again = draw_ids(rng, 9)
        fork = branch.fork([*picked, picked[0]], [len(context) + count for count in after] + [len(context)])
        forked = fork.read([again[:5], again[:7], again])
        forked = [torch.cat(parts) for parts in zip(forked, fork.read([again[5:], again[7:], again[:1]]), strict=True)]
        for heads, size in zip(budgets, sizes, strict=True):
            simulation.trim(heads)
            assert simulation.nbytes() == size

    def expected(budget, ids):
        return masked.logits(model, context + ids, len(context), budgets[budget], *astuple(rule))[len(context) :]

    for index in range(len(budgets) * len(rows)):
        budget, row = divmod(index, len(rows))
        near(torch.cat([turn[index] for turn in together]), expected(budget, rows[row][0] + rows[row][1]), model)
    for row, found in zip(picked, forked[:2], strict=True):
        first = rows[row % 2][0]
        near(found, expected(row // 2, first + again)[len(first) :], model)
    near(forked[2], expected(picked[0] // 2, again + again[:1]), model)


class Weighed(TokenChoice):
    """Scores that are a random linear function of what the cache holds of a token."""

    def __init__(self, seed):
        self.seed = seed

    def weights(self, layer, size):
        return torch.randn(size, generator=torch.Generator().manual_seed(1000 * self.seed + layer))

    def scores(self, tokens):
        both = torch.cat([tokens.keys, tokens.values], -1)
        return both @ self.weights(tokens.layer, both.shape[-1])

    def naive(self, rule, context_tokens):
        """The positions that a head keeps: the last of the middle and, of every span before, the best, by blocks."""
        size = rule.block_tokens
        first = -(-rule.sink_tokens // size) * size
        stop = max(first, (context_tokens + 1 - rule.recent_tokens) // size * size)

        def choose(layer, _head, share, keys, values):
            end = max(first, min(stop, context_tokens))
            both = torch.cat([keys, values], -1)
            worth = (both @ self.weights(layer, both.shape[-1]).to(both.dtype)).tolist()
            rate = max(share / 2, (share - 1 / 8) / (7 / 8))
            found, left, span = [], 0, max(256 // size, math.ceil(round(1 / rate, 6))) * size
            blocks = (end - first) // size
            kept = int(share * blocks + 0.5 + 1e-9)
            near = next(near for near in itertools.count() if near + int(rate * (blocks - near) + 0.5 + 1e-9) >= kept)
            found += range(end - near * size, end)
            end -= near * size
            for start in range(first, end, span):
                upto = min(start + span, end)
                due = int(rate * ((upto - first) // size) + 0.5 + 1e-9) * size  # of all up to here
                ranked = sorted(range(start, upto), key=lambda position: -worth[position])
                found += ranked[: due - left]
                left = due
            return found

        return choose


def draw_shares(rng, geometry):
    """A budget of full, trimmed and graded heads."""
    shares = [rng.choice((0.0, 1.0, round(rng.random(), 3))) for _ in range(4)]
    return [
        [rng.choice(shares) if kind == FULL_ATTENTION else None for _ in range(geometry.kv_heads)]
        for kind in geometry.layer_types
    ]


@pytest.mark.parametrize("seed", range(3))
def test_graded_heads_equal_the_naive_masked_implementation(subject, seed):
    model, geometry = subject
    rng = random.Random(f"graded:{model.config.model_type}:{seed}")
    rule = TrimRule(rng.choice((0, 5, 16)), rng.choice((3, 24)), rng.choice((1, 4, 16)), ANCHORED)
    budgets = [draw_shares(rng, geometry) for _ in range(1 + seed % 2)]
    choices = [Weighed(rng.randrange(9)) for _ in budgets]
    context = draw_ids(rng, rng.randrange(20, 150) + 300 * (seed == 2))
    rows = [draw_ids(rng, rng.randrange(1, 40)) for _ in range(2 - seed % 2)]
    with simulating(model, geometry, budgets[0], rule, choices[0]) as simulation:
        simulation.prefill(context)
        simulation.trim_each(budgets, choices=choices)
        simulation.forget_context()
        branch = simulation.start(len(rows))
        cut = min(map(len, rows)) // 2
        parts = [branch.read([row[:cut] for row in rows] * len(budgets))] if cut else []
        parts.append(branch.read([row[cut:] for row in rows] * len(budgets)))
    for index in range(len(budgets) * len(rows)):
        budget, row = divmod(index, len(rows))
        naive = choices[budget].naive(rule, len(context))
        expected = masked.logits(model, context + rows[row], len(context), budgets[budget], *astuple(rule), naive)
        near(torch.cat([part[index] for part in parts]), expected[len(context) :], model)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("seed", range(4))
def test_caches_of_8_bit_floats_equal_the_naive_implementation(llama, dtype, seed):
    """Up to a few keys that are half-way between two numbers, which another order of summation rounds otherwise."""
    model, geometry = llama
    rng = random.Random(f"float8:{seed}")
    rule = TrimRule(5, 24, 4, ANCHORED)
    heads = draw_shares(rng, geometry)
    context, rest = draw_ids(rng, 133), draw_ids(rng, 30)
    known = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    known = known[known.isfinite()].unique()

    toward_zero = seed % 2 > 0

    def store(numbers):
        far = (numbers[..., None] - known).abs()
        if toward_zero:
            far = far.masked_fill(known.abs() > numbers[..., None].abs(), torch.inf)
        return known[far.argmin(-1)]

    with simulating(model, geometry, heads, rule, Weighed(seed), Float8(dtype, toward_zero)) as simulation:
        last = simulation.prefill(context)
        simulation.trim()
        branch = simulation.start()
        found = torch.stack([last, *(logits for step in (rest[:9], rest[9:]) for logits in branch.read([step])[0])])
    naive = Weighed(seed).naive(rule, len(context))
    both = [
        masked.logits(model, context + rest, len(context), heads, *astuple(rule), naive, each)[len(context) - 1 :]
        for each in (store, None)
    ]
    rounded, plain = ((found - each).abs().max() for each in both)
    assert rounded < 0.1 * plain


def test_bytes_of_graded_heads_are_what_the_rule_says(llama):
    model, geometry = llama
    rng = random.Random("bytes")
    rule = TrimRule(5, 24, 4, ANCHORED)
    heads = draw_shares(rng, geometry)
    with simulating(model, geometry, heads, rule, Weighed(0)) as simulation:
        simulation.prefill(draw_ids(rng, 133))
        simulation.trim()
        held = sum(rule.held_tokens(133, 133, share) for row in heads for share in row)
        assert simulation.nbytes() == held * 2 * geometry.head_size * 4


def test_shares_without_a_choice_of_tokens_or_an_anchored_window_are_refused(llama):
    model, geometry = llama
    half = [[0.5, 1.0]] * geometry.layers
    with (
        pytest.raises(InputError, match="nothing says which tokens those are"),
        simulating(model, geometry, half, TrimRule(4, 16)),
    ):
        pass
    with (
        pytest.raises(InputError, match="need a window that stays"),
        simulating(model, geometry, half, TrimRule(4, 16, 4, SLIDING), Weighed(0)),
    ):
        pass


def test_a_branch_that_frees_tokens_cannot_go_back(llama):
    model, geometry = llama
    with simulating(model, geometry, [[1.0, 0.0]] * 3, TrimRule(4, 16, 4)) as simulation:
        simulation.prefill(draw_ids(random.Random(0), 30))
        with pytest.raises(ValueError, match="cannot go back"):
            simulation.start().fork([0], [30])


def test_retention_one_is_the_plain_model(subject):
    model, geometry = subject
    rng = random.Random(f"whole:{model.config.model_type}")
    context, rest = draw_ids(rng, 90), draw_ids(rng, 30)
    heads = [[1.0 if kind == FULL_ATTENTION else None] * geometry.kv_heads for kind in geometry.layer_types]
    with torch.inference_mode():
        plain = model(torch.tensor([context + rest]), use_cache=False).logits[0]
    with simulating(model, geometry, heads, TrimRule(4, 16)) as simulation:
        last = simulation.prefill(context)
        branch = simulation.start()
        found = [logits for step in (rest[:7], rest[7:8], rest[8:]) for logits in branch.read([step])]
    near(last, plain[len(context) - 1], model)
    near(torch.cat(found), plain[len(context) :], model)


def test_retention_one_is_the_plain_model_bit_for_bit(llama):
    model, geometry = llama
    rng = random.Random(0)
    context, rest = draw_ids(rng, 300), draw_ids(rng, 40)
    steps = [rest[:10], *([token] for token in rest[10:])]
    cache, plain, name = DynamicCache(), [], cache_argument(model)
    with torch.inference_mode():
        for ids, kept in [(context, 1), *((step, 0) for step in steps)]:
            plain.append(model(torch.tensor([ids]), **{name: cache}, logits_to_keep=kept).logits[0])
    with simulating(model, geometry, [[1.0] * 2] * 3, TrimRule(4, 16)) as simulation:
        found = [simulation.prefill(context)]
        branch = simulation.start()
        found += [branch.read([ids])[0] for ids in steps]
    assert torch.equal(found[0], plain[0][-1])
    for ours, theirs in zip(found[1:], plain[1:], strict=True):
        assert torch.equal(ours, theirs)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("context_tokens", [1, 30, 64, 100, 257])
@pytest.mark.parametrize("rule", [TrimRule(0, 8, 1), TrimRule(16, 32, 16), TrimRule(10, 20, 8)])
def test_bytes_held_are_those_of_the_formula(llama, context_tokens, rule):
    model, geometry = llama
    heads = [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    with simulating(model, geometry, heads, rule) as simulation:
        simulation.prefill(draw_ids(random.Random(1), context_tokens))
        simulation.trim()
        simulation.forget_context()
        sinks, recent, block = rule.sink_tokens, rule.recent_tokens, rule.block_tokens
        kept = sum(
            position < -(-sinks // block) * block or position // block >= (context_tokens + 1 - recent) // block
            for position in range(context_tokens)
        )
        bytes_per_token_and_head = 2 * geometry.head_size * 4
        assert simulation.nbytes() == (3 * context_tokens + 3 * kept) * bytes_per_token_and_head
        assert rule.held_tokens(context_tokens, context_tokens) == kept
        allocated = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for layer in simulation.layers
            for group in layer
            for span in group.context
            for tensor in (span.keys, span.values)
        }
        assert sum(allocated.values()) == simulation.nbytes()  # real memory, no views of more


@pytest.mark.parametrize("window", WINDOWS)
def test_a_long_answer_is_held_as_its_window_says(llama, window):
    """Sliding, an answer holds no more than its window; anchored, all of it is held."""
    model, geometry = llama
    rng = random.Random(2)
    with simulating(model, geometry, [[0.0, 0.0]] * 3, TrimRule(4, 16, 4, window)) as simulation:
        simulation.prefill(draw_ids(rng, 50))
        branch = simulation.start()
        sizes = []
        for _ in range(200):
            branch.read([draw_ids(rng, 1)])
            sizes.append(branch.nbytes())
    whole = 200 * geometry.layers * 2 * geometry.kv_heads * geometry.head_size * 4
    assert (max(sizes[100:]) <= max(sizes[:100])) == (window == SLIDING)
    assert (sizes[-1] >= whole) == (window == ANCHORED)


def test_questions_restart_from_the_same_trimmed_context(llama):
    model, geometry = llama
    rng = random.Random(3)
    question = draw_ids(rng, 12)
    with simulating(model, geometry, [[1.0, 0.0]] * 3, TrimRule(4, 16, 4)) as simulation:
        simulation.prefill(draw_ids(rng, 90))
        simulation.trim()
        simulation.forget_context()
        held = simulation.nbytes()
        first = simulation.start().read([question])[0]
        simulation.start().read([draw_ids(rng, 70)])
        again = simulation.start()
        assert torch.equal(again.read([question])[0], first)
        assert simulation.nbytes() == held
        simulation.start()
        with pytest.raises(ValueError, match="has ended"):
            again.read([question])


def test_several_budgets_share_one_prefill(llama):
    model, geometry = llama
    rng = random.Random(4)
    context, question = draw_ids(rng, 90), draw_ids(rng, 12)
    budgets = [[[1.0, 1.0]] * 3, [[1.0, 0.0]] * 3, [[0.0, 0.0]] * 3]
    with simulating(model, geometry, budgets[0], TrimRule(4, 16, 4)) as simulation:
        simulation.prefill(context)
        together = []
        for heads in budgets:
            simulation.trim(heads)
            together.append(simulation.start().read([question])[0])
        for heads, expected in zip(budgets, together, strict=True):
            simulation.prefill(context)
            simulation.trim(heads)
            assert torch.equal(simulation.start().read([question])[0], expected)
    assert not torch.allclose(together[0], together[2], atol=1e-3)


def test_generate_stops_and_equals_the_plain_model(llama):
    model, geometry = llama
    rng = random.Random(5)
    context, question = draw_ids(rng, 60), draw_ids(rng, 9)
    ids = torch.tensor([context + question])
    plain = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = plain[0, ids.shape[1] :].tolist()
    with simulating(model, geometry, [[1.0, 1.0]] * 3, TrimRule(4, 16)) as simulation:
        simulation.prefill(context)
        assert simulation.start().generate([question], 12, frozenset()) == [expected]
        stop = expected[5]
        assert (
            simulation.start(2).generate([question, question], 12, frozenset({stop}))
            == [expected[: expected.index(stop)]] * 2
        )
        limits = [12, 0, 3, 1]  # rows that have ended are dropped while the others write
        answers = simulation.start(4).generate([question] * 4, limits, frozenset())
        assert answers == [expected[:limit] for limit in limits]


def test_misuse_is_refused_and_nothing_stays_patched(llama):
    model, geometry = llama
    with simulating(model, geometry, [[1.0, 0.0]] * 3, TrimRule(4, 16)) as simulation:
        with (
            pytest.raises(RuntimeError, match="already"),
            simulating(model, geometry, [[1.0, 1.0]] * 3, TrimRule(4, 1)),
        ):
            pass
        with pytest.raises(ValueError, match="empty context"):
            simulation.prefill([])
        with pytest.raises(ValueError, match="nothing is prefilled"):
            simulation.trim()
        with pytest.raises(InputError, match=r"budget 0\.5"):
            simulation.set_heads([[1.0, 0.5]] * 3)
        with pytest.raises(ValueError, match="not 3 x 2"):
            simulation.set_heads([[1.0]] * 3)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="sinks must be"):
        TrimRule(-1, 4)
