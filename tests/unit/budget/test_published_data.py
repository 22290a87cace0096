"""Facts of the published head scores, and the ready-made files made from them.

The facts were measured from the files themselves. The published files are not part of the repository: those tests
skip where the folder is absent. What they check is checked on synthesised files always.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr

from kvprofile.budget import formats, store
from kvprofile.budget.allocate import allocate, full_head_count, ranking
from kvprofile.budget.choice import choose
from kvprofile.budget.formats.base import Origin, import_profile
from kvprofile.budget.formats.kvzip import rule_keeps
from kvprofile.budget.known_models import KNOWN_MODELS, find
from kvprofile.budget.profile import PRESETS, Matrix, Profile, retention_key
from tests.helpers.factories import make_profile
from tests.helpers.foreign import read_back

REPOSITORY = Path(__file__).parents[3]
DATA = REPOSITORY.parent / "shared" / "data"
SHIPPED = REPOSITORY / "models" / "kv_budget"
QWEN_7B, QWEN_14B = "Qwen/Qwen2.5-7B-Instruct-1M", "Qwen/Qwen2.5-14B-Instruct-1M"
LLAMA_31, GRADIENT = "meta-llama/Llama-3.1-8B-Instruct", "gradientai/Llama-3-8B-Instruct-Gradient-1048k"
published = pytest.mark.skipif(not DATA.is_dir(), reason="the published data is not here")


def imported(name: str, model: str, *places: str) -> Profile:
    return import_profile(formats.get(name), [DATA / place for place in places], find(model), Origin())


def kvzip(model: str, *names: str) -> Profile:
    return imported("kvzip", model, *(f"kvzip_head_scores/{name}.pt" for name in names))


def qwen_7b() -> Profile:
    return kvzip(QWEN_7B, "qwen2.5-7b-scbench_qa_eng-0", "qwen2.5-7b-scbench_repoqa-0")


def flat(matrix: Matrix) -> list[float]:
    return [value for row in matrix for value in row if value is not None]


# --- Facts of the published files ---


@published
def test_the_maxima_saturate():
    seven, fourteen = flat(qwen_7b().scores.max), flat(kvzip(QWEN_14B, "qwen2.5-14b-scbench_qa_eng-0").scores.max)
    assert (sum(value == 1.0 for value in seven), len(seven)) == (33, 112)
    assert (sum(value == 1.0 for value in fourteen), len(fourteen)) == (70, 384)


@published
@pytest.mark.parametrize(
    ("asked", "over_heads", "over_tokens", "ours"), [(0.4, 33, 44, 45), (0.3, 0, 33, 34), (0.2, 0, 0, 22)]
)
def test_kvzips_rule_misses_the_asked_retention_and_ours_is_exact(asked, over_heads, over_tokens, ours):
    profile = qwen_7b()
    scores = [flat([row]) for row in profile.scores.max]
    assert rule_keeps(scores, asked) == over_heads  # 0.295, 0.0 and 0.0 of 112
    assert rule_keeps(scores, asked, context_tokens=10_000) == over_tokens  # as KVzip runs it over a context
    assert sum(flat(allocate(profile.scores.max, asked).heads)) == ours == full_head_count(asked, 112)
    assert choose(profile, asked).allocation.full_heads == ours


@published
def test_two_documents_of_one_model_agree():
    question, code = (kvzip(QWEN_7B, f"qwen2.5-7b-scbench_{name}-0").scores.max for name in ("qa_eng", "repoqa"))
    assert spearmanr(flat(question), flat(code)).statistic == pytest.approx(0.903, abs=5e-4)


@published
def test_kvzip_and_duo_attention_agree_in_part():
    one = kvzip(LLAMA_31, "llama3.1-8b-scbench_qa_eng-0").scores.max
    other = imported("duo-attention", LLAMA_31, "duo_attention/Meta-Llama-3.1-8B-Instruct").scores.max
    assert spearmanr(flat(one), flat(other)).statistic == pytest.approx(0.561, abs=5e-4)
    top = 153  # 60 % of 256 rounded down, as it was measured
    shared = set(ranking(one)[:top]) & set(ranking(other)[:top])
    assert len(shared) / top == pytest.approx(0.752, abs=5e-4)


@published
def test_the_ready_made_files_are_what_the_script_makes(tmp_path):
    script = REPOSITORY / "scripts" / "import_published.py"
    subprocess.run([sys.executable, script, DATA, "--output", tmp_path], check=True, capture_output=True)
    made = {path.relative_to(tmp_path): path.read_bytes() for path in sorted(tmp_path.rglob("*.json"))}
    assert len(made) == 10
    assert {path: (SHIPPED / path).read_bytes() for path in made} == made


# --- The same checks on synthesised files ---


def test_synthesised_scores_show_the_same_defect_and_the_same_repair(tmp_path):
    scores = torch.linspace(0.99, 0.01, 112).reshape(28, 4)
    scores.view(-1)[:33] = 1.0
    for name, part in (("a", scores), ("b", scores * 0.5)):
        torch.save(part.to(torch.bfloat16), tmp_path / f"{name}.pt")
    profile = read_back(make_profile(28, 4), "kvzip", tmp_path / "a.pt", tmp_path / "b.pt")
    found = [flat([row]) for row in profile.scores.max]
    assert sum(value == 1.0 for value in flat(profile.scores.max)) == 33
    assert [rule_keeps(found, asked) for asked in (0.3, 0.2)] == [0, 0]
    assert [choose(profile, asked).allocation.full_heads for asked in (0.4, 0.3, 0.2)] == [45, 34, 22]


# --- The ready-made files ---


def test_every_known_model_has_exactly_one_file_where_the_runtime_looks():
    by_model = {store.load(path).model.name: path for path in sorted(SHIPPED.glob("*.json"))}
    assert by_model.keys() >= KNOWN_MODELS.keys()
    for name in KNOWN_MODELS:
        assert by_model[name].name == store.file_name(name)
    assert sorted(path.name for path in (SHIPPED / "alternates").iterdir()) == [
        "gradientai--Llama-3-8B-Instruct-Gradient-1048k.duo-attention.json",
        "meta-llama--Llama-3.1-8B-Instruct.duo-attention.json",
    ]


@pytest.mark.parametrize("path", sorted(SHIPPED.rglob("*.json")), ids=lambda path: path.name)
def test_ready_made_files_are_sound_and_say_where_they_come_from(path):
    profile = store.load(path)
    assert path.read_bytes() == store.to_bytes(profile)
    source = profile.scoring.imported_from
    if source is None:  # scored here, not imported
        return
    assert profile.model.geometry == KNOWN_MODELS[profile.model.name].geometry
    assert source.licence == "MIT"
    assert len(source.commit) == 40
    assert source.repository.startswith("https://github.com/")
    assert (profile.model.revision, profile.model.weights_sha256, profile.model.tokenizer_sha256) == (None,) * 3
    assert profile.budgets.keys() == {retention_key(r) for r in PRESETS}
    heads = len(flat(profile.scores.max))
    for r in PRESETS:
        assert sum(flat(profile.budgets[retention_key(r)].heads)) == full_head_count(r, heads)
    assert not re.search(r'"(/|[A-Za-z]:\\\\)', json.dumps(profile.model_dump(mode="json"))), "no absolute paths"
