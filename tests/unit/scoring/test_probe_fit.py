"""The probe's fit against an ordinary ridge regression over all tokens at once."""

from __future__ import annotations

import pytest
import torch

from kvprofile.budget import probe
from kvprofile.scoring.probe_fit import RIDGE, ProbeFit
from tests.helpers.factories import make_geometry

GEOMETRY = make_geometry(3, 2, head_size=8, sliding=[1])
LAYERS = len(GEOMETRY.profiled_layers)


def chunk(seed, tokens=60):
    """Keys, values and scores of a chunk in each layer; scores depend on the value."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(LAYERS, 2, tokens, 8, generator=generator)
    values = torch.randn(LAYERS, 2, tokens, 8, generator=generator)
    noise = torch.randn(LAYERS, 2, tokens, generator=generator)
    return keys, values, torch.sigmoid(values[..., 0] - 3 + 0.3 * noise)


def add(fit, place, seed, first=20):
    keys, values, scores = chunk(seed)
    layers = [probe.sums(*layer, first, 200) for layer in zip(keys, values, scores, strict=True)]
    fit.add(place, layers, scores.shape[-1])


def filled():
    fit = ProbeFit(GEOMETRY)
    for document in range(4):
        for number in range(2):
            add(fit, (document, number), 10 * document + number)
    return fit


def test_weights_are_those_of_a_ridge_regression():
    weights, _ = filled().solve()
    data = [chunk(10 * document + number) for document in range(4) for number in range(2)]
    for layer in range(LAYERS):
        for head in range(2):
            x = torch.cat([probe.features(keys[layer], values[layer], 20, 200)[head] for keys, values, _ in data])
            y = torch.cat([(scores[layer, head] + probe.FLOOR).log() for *_, scores in data])
            x, y = x.double(), y.double()
            hold = x.square().sum(0) * RIDGE
            hold[-1] = 0
            expected = torch.linalg.solve(x.T @ x + torch.diag(hold + 1e-6 * len(x)), x.T @ y)
            torch.testing.assert_close(x @ weights[layer, head].double(), x @ expected, atol=1e-3, rtol=0)


def test_what_is_explained_is_told_for_documents_left_out():
    _, explained = filled().solve()
    assert explained[1] is None
    assert all(0.7 < value < 1.0 for value in (explained[0], explained[2]))
    fit = ProbeFit(GEOMETRY)
    add(fit, (0, 0), 1)
    assert fit.solve()[1] == [None, None, None]  # one half has no document


def test_noise_is_not_explained():
    fit = ProbeFit(GEOMETRY)
    for document in range(4):
        keys, values, _ = chunk(document)
        scores = torch.rand(LAYERS, 2, 60, generator=torch.Generator().manual_seed(100 + document))
        fit.add((document, 0), [probe.sums(*one, 20, 200) for one in zip(keys, values, scores, strict=True)], 60)
    assert all(value < 0.1 for value in fit.solve()[1] if value is not None)


def test_a_chunk_counts_once_and_an_empty_one_counts():
    fit = filled()
    before = {name: tensor.clone() for name, tensor in fit.tensors().items()}
    add(fit, (0, 0), 99)
    fit.add((7, 0), (), 0)
    assert (7, 0) in fit.places
    assert fit.tokens == 8 * 60
    assert all(torch.equal(before[name], tensor) for name, tensor in fit.tensors().items() if name != "places")


def test_sums_are_read_back_and_an_interruption_breaks_them():
    fit = filled()
    again = ProbeFit.of(fit.tensors(), GEOMETRY)
    assert again.places == fit.places
    assert torch.equal(again.solve()[0], fit.solve()[0])

    def interrupted():
        keys, values, scores = chunk(5)
        yield probe.sums(keys[0], values[0], scores[0], 20, 200)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit.add((9, 0), interrupted(), 60)
    assert fit.broken


def test_nothing_cannot_be_solved():
    with pytest.raises(ValueError, match="no token was added"):
        ProbeFit(GEOMETRY).solve()


def test_a_word_that_comes_twice_has_one_score_wherever_it_stands():
    """Products of other shapes round otherwise, and the runtime and the simulation must keep the same of two tokens."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 700, 64, generator=generator) for _ in range(2))
    keys[:, 350:], values[:, 350:] = keys[:, :350].clone(), values[:, :350].clone()
    weights = torch.randn(1, 2, 32 + 64 + 7, generator=generator)
    found = probe.Probe((0,), weights)
    whole = found.scores(0, keys, values)
    parts = torch.cat([found.scores(0, keys[:, at : at + 23], values[:, at : at + 23]) for at in range(0, 700, 23)], 1)
    assert (whole == parts).float().mean() > 0.999
    assert (whole[:, :350] == whole[:, 350:]).float().mean() > 0.999
    assert len(whole.unique()) > 650
