"""The runtime file: read back equal, or refused in one line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprofile.budget import runtime_file
from kvprofile.budget.allocate import Constraints
from kvprofile.budget.formats.base import Export
from kvprofile.budget.formats.vllm import runtime
from kvprofile.errors import InputError
from tests.helpers.factories import make_profile
from tests.helpers.foreign import result_or_line


def test_no_format_imports_torch_or_numpy_before_it_is_used():
    code = (
        "import sys, kvprofile.budget.formats as f;"
        "[f.get(name) for name in f.FORMATS]; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_runtime_file_reads_back_equal_and_names_the_same_model(size):
    profile = make_profile(sliding=(2,))
    constraints = Constraints(tensor_parallel_size=size, pipeline_stages=(3, 3), floor=1)
    document = runtime(Export(profile, constraints, 0.45))
    assert runtime_file.parse(document.to_bytes(), "x") == document
    assert document.model.identity() == profile.model
    assert document.full_heads[2] is None


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("version",), 2, "version is 2, this kvprofile reads 1"),
        (("version",), True, "version is True"),
        (("format",), "other", "not a runtime file; write one with 'kvprofile export --format vllm'"),
        (("sink_tokens",), -1, "sink_tokens: Input should be greater than or equal to 0"),
        (("recent_tokens",), 1.5, "recent_tokens: Input should be a valid integer"),
        (("recent_tokens",), True, "recent_tokens: Input should be a valid integer"),
        (("extra",), 1, "extra: Extra inputs are not permitted"),
        (("full_heads",), [], "full_heads has 0 entries for 6 layers"),
        (("full_heads", 0), [4], r"full_heads layer 0 is \[4\]"),
        (("full_heads", 0), [1, 1], "full_heads layer 0 names a KV head twice"),
        (("full_heads", 0), [2, 1], "full_heads layer 0 is not in rising order"),
        (("full_heads", 0), None, "full_heads layer 0 is null, not a list of KV heads"),
        (("full_heads", 0), [True], "full_heads.0.0: Input should be a valid integer"),
        (("full_heads", 5), [], "full_heads layer 5 has no full attention and must be null"),
        (("kv_head_order",), [[0, 1, 2, 3]] * 5 + [None], "kv_head_order: KV heads dealt to ranks in another order"),
        (("model",), None, "model: Input should be a valid dictionary"),
        (("model", "kv_heads"), 8, "geometry_sha256 does not match"),
        (("model", "layers"), 7, "layer_types has 6 entries for 7 layers"),
        (("model", "layer_types"), "full_attention", "layer_types: Input should be a valid list"),
        (("model", "name"), "", "model.name: Value should have at least 1 item"),
        (("provenance",), [], "provenance: Input should be a valid dictionary"),
        (("provenance", "retention_asked"), "0.5", "retention_asked: Input should be a valid number"),
        (("provenance", "retention_asked"), 1.5, "retention_asked: Input should be less than or equal to 1"),
        (("provenance", "pipeline_stages"), [0], "pipeline_stages.0: Input should be greater than or equal to 1"),
    ],
)
def test_a_broken_runtime_file_is_refused_in_one_line(path, value, words):
    document = json.loads(runtime(Export(make_profile(sliding=(5,)), retention=0.5)).to_bytes())
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(InputError, match=words):
        runtime_file.parse(json.dumps(document).encode(), "budget.json")


def test_every_problem_of_a_runtime_file_is_listed_at_once():
    document = json.loads(runtime(Export(make_profile(), retention=0.5)).to_bytes())
    document["sink_tokens"] = None
    document["full_heads"][1] = ["99"]
    del document["provenance"]["method"]
    with pytest.raises(InputError) as caught:
        runtime_file.parse(json.dumps(document).encode(), "budget.json")
    assert all(
        word in str(caught.value) for word in ("sink_tokens", "full_heads.1", "provenance.method: Field required")
    )


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(JSON_VALUES, st.sampled_from(list(runtime_file.RuntimeFile.model_fields)))
def test_no_json_value_in_any_place_gets_past_the_runtime_file_with_a_traceback(value, key):
    document = json.loads(runtime(Export(make_profile(), retention=0.5)).to_bytes())
    document[key] = value
    assert result_or_line(lambda: runtime_file.parse(json.dumps(document).encode(), "budget.json"))
