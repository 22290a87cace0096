"""Shards: every document in exactly one, sums that are equal in any order, files that give back what was written."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprofile import __version__
from kvprofile.budget import probe, store
from kvprofile.errors import InputError
from kvprofile.scoring import shard_file
from kvprofile.scoring.aggregate import DocumentScores, HeadStatistics, histogram
from kvprofile.scoring.assemble import Facts, assemble
from kvprofile.scoring.probe_fit import ProbeFit
from kvprofile.scoring.shard import Shard
from tests.helpers.factories import make_profile

PROFILE = make_profile(3, 2, head_size=8, sliding=[1])
FACTS = Facts(PROFILE.model, PROFILE.scoring, PROFILE.runtime)
GEOMETRY = PROFILE.model.geometry
LAYERS = len(GEOMETRY.profiled_layers)


def layers(seed, tokens, scale):
    """The sums of each layer, of keys and values so large."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(LAYERS):
        keys, values = (scale * torch.randn(2, tokens, 8, generator=generator) for _ in range(2))
        yield probe.sums(keys, values, torch.rand(2, tokens, generator=generator), 3, tokens + 3)


def document(seed, tokens):
    generator = torch.Generator().manual_seed(seed)
    found = torch.rand(LAYERS, 2, tokens, generator=generator) ** 6
    middle = found[..., : tokens - 5]  # a short document lies within sinks and window
    return DocumentScores.of(HeadStatistics.of(found), histogram(middle), None, tokens)


def fit_of(documents, tokens, scales):
    fit = ProbeFit(GEOMETRY)
    for index in documents:
        between = max(0, tokens[index] - 5)
        fit.add((index, 0), layers(index, between, scales[index]) if between else (), between)
    return fit


@given(st.integers(0, 50), st.integers(1, 60))
def test_every_document_is_in_one_shard(count, of):
    found = [index for number in range(1, of + 1) for index in Shard(number, of).documents(count)]
    assert sorted(found) == list(range(count))


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "-1/2", "1/0", "1/2/3", "a/b", "1/9999999", "1.0/2"])
def test_what_is_no_shard_is_refused(text):
    with pytest.raises(InputError, match="give I/N"):
        Shard.parse(text)


def test_a_name_is_read_back(tmp_path):
    path = Shard(2, 7).path(tmp_path / "a.shard.json")
    assert path.name == "a.shard.json.shard-2-of-7.safetensors"
    assert Shard(3, 7).beside(path) == Shard(3, 7).path(tmp_path / "a.shard.json")
    assert Shard(3, 7).beside(tmp_path / "renamed") is None
    assert Shard.parse(" 2/7") == Shard(2, 7)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 40), st.sampled_from([0.1, 1.0, 7.3])), min_size=2, max_size=12), st.data())
def test_sums_are_equal_bit_for_bit_in_any_order_and_grouping(chunks, data):
    places = [(index % 4, index) for index in range(len(chunks))]
    order = data.draw(st.permutations(range(len(chunks))))
    parts = data.draw(st.lists(st.integers(0, 2), min_size=len(chunks), max_size=len(chunks)))

    def added(numbers):
        fit = ProbeFit(GEOMETRY)
        for number in numbers:
            tokens, scale = chunks[number]
            fit.add(places[number], layers(number, tokens, scale), tokens)
        return fit

    expected = added(range(len(chunks)))
    joined = ProbeFit(GEOMETRY)
    for part in (2, 0, 1):
        joined.join(added([number for number in order if parts[number] == part]))
    for found in (added(order), joined):
        assert found.places == expected.places
        assert found.sums.keys() == expected.sums.keys()
        assert all(torch.equal(found.sums[name], tensor) for name, tensor in expected.sums.items())


def test_rounded_sums_are_as_good_as_float32():
    tokens, features = 400, 8 // 2 + 8 + 7
    exact, fit = torch.zeros(LAYERS, 2, features, features, dtype=torch.float64), ProbeFit(GEOMETRY)
    for number in range(20):
        generator = torch.Generator().manual_seed(number)
        for layer in range(LAYERS):
            keys, values = (torch.randn(2, tokens, 8, generator=generator) for _ in range(2))
            x = probe.features(keys, values, 3, tokens + 3).double()
            exact[layer] += x.transpose(1, 2) @ x
        fit.add((0, number), layers_again(number, tokens), tokens)
    rows, columns = torch.triu_indices(features, features)
    size = exact.diagonal(dim1=-2, dim2=-1).sqrt()
    wrong = (fit.sums["gram"][0] - exact[..., rows, columns]).abs() / (size[..., rows] * size[..., columns])
    assert wrong.max() < 1e-6


def layers_again(number, tokens):
    generator = torch.Generator().manual_seed(number)
    for _ in range(LAYERS):
        keys, values = (torch.randn(2, tokens, 8, generator=generator) for _ in range(2))
        yield probe.sums(keys, values, torch.full((2, tokens), 0.5), 3, tokens + 3)


def test_a_chunk_in_two_parts_is_an_error():
    fit = fit_of([0], [20], [1.0])
    with pytest.raises(ValueError, match="twice"):
        fit.join(fit_of([0], [20], [1.0]))


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.sampled_from([0.1, 1.0, 7.3])), min_size=1, max_size=8),
    st.integers(1, 10),
    st.randoms(use_true_random=False),
)
def test_merging_any_division_gives_what_one_process_gives(drawn, of, rng):
    tokens, scales = zip(*drawn, strict=True)
    documents = [document(index, count) for index, count in enumerate(tokens)]
    expected = assemble(FACTS, documents, fit_of(range(len(tokens)), tokens, scales))
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number in range(1, of + 1):
            shard = Shard(number, of)
            path = shard.path(Path(folder) / "a.json")
            own = shard.documents(len(tokens))
            header = shard_file.ShardFile(path, __version__, shard, len(tokens), "key", FACTS)
            shard_file.write(header, [documents[index] for index in own], fit_of(own, tokens, scales))
            assert shard_file.read(path) == header
            paths.append(path)
        rng.shuffle(paths)
        found = shard_file.merge(paths)
        assert found.probe == expected.probe
        assert store.to_bytes(found.profile) == store.to_bytes(expected.profile)
        if of > 1:
            with pytest.raises(InputError, match=f"missing of {of} shards"):
                shard_file.merge(paths[1:])
            with pytest.raises(InputError, match="give each once"):
                shard_file.merge([*paths, rng.choice(paths)])
