"""The runtime's parts that know nothing of vLLM: gate, settings, finding the budget, sharing it, packing, patching."""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprofile.budget import store
from kvprofile.budget.choice import choose, choose_whole
from kvprofile.budget.probe import from_bytes, path_of
from kvprofile.budget.trim import GRADED, KINDS, WHOLE
from kvprofile.errors import InputError
from kvprofile.runtime import gate, stats
from kvprofile.runtime.engine_budget import CONFIG_KEY, EngineBudget, RankHeads
from kvprofile.runtime.find import Served, find
from kvprofile.runtime.packing import Piece, pack
from kvprofile.runtime.patching import Patch
from kvprofile.runtime.settings import SHARED, from_environment, require_tested
from tests.helpers.factories import make_geometry, save_runtime_file
from tests.helpers.models import ROOT

PROFILE = ROOT / "models" / "kv_budget" / "pocket.json"
POCKET = store.load(PROFILE)
SHAPE = {name: getattr(POCKET.model.geometry, name) for name in ("layers", "attention_heads", "kv_heads", "head_size")}


def served(*names, **changes):
    """The pocket model as vLLM sees it."""
    return Served(names or ("pocket",), **{**SHAPE, "tensor_parallel_size": 1, **changes})


def settings(**names):
    return from_environment({f"LLM_KVZIP_{name}": str(value) for name, value in names.items()})


def test_the_gate_costs_nothing_when_off(monkeypatch):
    """Every process of vLLM calls it, and has these modules of the standard library anyway."""
    monkeypatch.delenv("LLM_KVZIP_ENABLED", raising=False)
    code = (
        "import collections.abc, importlib.metadata, logging, sys; before = set(sys.modules);"
        "from kvprofile.runtime import gate; gate.register(); print(*sorted(set(sys.modules) - before))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    own = ["kvprofile", "kvprofile.environment", "kvprofile.runtime", "kvprofile.runtime.gate"]
    assert run.stdout.split() == ["__future__", *own]


def test_the_entry_point_is_declared():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"kvprofile": "kvprofile.runtime.gate:register"}
    assert gate.register.__name__ == "register"


def test_settings_are_read_and_unknown_names_warned_about(caplog):
    with caplog.at_level(logging.WARNING, logger="vllm.kvprofile"):
        logging.getLogger("vllm").propagate = True
        found = from_environment({"LLM_KVZIP_RETENTION": "0.5", "LLM_KVZIP_SINKS": "3", "LLM_KVZIP_SINK": "3"})
    assert found.retention == 0.5
    assert found.sink_tokens == 3
    assert found.recent_tokens is None
    assert found.budget_dir == Path("models/kv_budget")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RETENTION", "0"),
        ("RETENTION", "half"),
        ("RETENTION", "nan"),
        ("SINK", "-1"),
        ("RECENT", "0"),
        ("ENABLED", "yes"),
        ("WINDOW", "rolling"),
        ("ALLOW_UNTESTED", "gpu"),
        ("ALLOW_UNTESTED", "lora,"),
    ],
)
def test_bad_settings_are_one_line(name, value):
    with pytest.raises(ValueError, match=f"LLM_KVZIP_{name} is '{value}'") as caught:
        settings(**{name: value})
    assert "\n" not in str(caught.value)


def test_releases_that_were_not_tested_are_refused_by_name():
    require_tested("0.32.0+cpu", settings())
    for allowed in ("1", "release", "lora, release"):
        require_tested("0.28.0", settings(ALLOW_UNTESTED=allowed))
    words = (
        r"tested with vLLM 0\.30\.0, 0\.31\.0, 0\.32\.0, 0\.33\.0, this is 0\.28\.0; LLM_KVZIP_ALLOW_UNTESTED=release"
    )
    for others in ("", "0", "platform,lora"):
        with pytest.raises(ValueError, match=words):
            require_tested("0.28.0", settings(ALLOW_UNTESTED=others))


def test_a_profile_gives_the_budget_at_a_retention():
    budget, origin = find(settings(BUDGET=PROFILE, RETENTION=0.5, KIND=WHOLE), served())
    chosen = choose_whole(POCKET, 0.5)
    assert budget.shares == tuple(tuple(row) for row in chosen.heads)
    assert (budget.full, budget.kind, budget.probe) == (12, WHOLE, None)
    assert (budget.sink_tokens, budget.recent_tokens) == (POCKET.runtime.sink_tokens, POCKET.runtime.recent_tokens)
    assert f"{chosen.retention_realised:.4f} realised" in origin
    whole, _ = find(settings(BUDGET=PROFILE, RETENTION=1.0), served())
    assert whole.full == whole.heads == SHAPE["layers"] * SHAPE["kv_heads"]
    shorter, _ = find(settings(BUDGET=PROFILE, RETENTION=0.5, SINK=0, RECENT=32), served())
    assert (shorter.sink_tokens, shorter.recent_tokens) == (0, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_profile_is_dealt_to_ranks(kind):
    budget, _ = find(settings(BUDGET=PROFILE, RETENTION=0.5, KIND=kind), served(tensor_parallel_size=2))
    assert (budget.uneven_layer(2), budget.kind) == (None, kind)


def test_graded_budgets_bring_their_probe(tmp_path):
    budget, origin = find(settings(BUDGET=PROFILE, RETENTION=0.3, KIND=GRADED), served())
    assert find(settings(BUDGET=PROFILE, RETENTION=0.3), served()) == (budget, origin)  # the file has a probe
    assert budget.shares == tuple(tuple(row) for row in choose(POCKET, 0.3, kind=GRADED).heads)
    assert len({share for row in budget.shares for share in row}) == 4
    assert "(retention 0.3 asked" in origin
    assert from_bytes(base64.b64decode(budget.probe)).weights.shape == (6, 4, 16 + 32 + 7)
    lone = tmp_path / "pocket.json"
    lone.write_bytes(PROFILE.read_bytes())
    with pytest.raises(InputError, match=r"no probe .* which graded budgets need"):
        find(settings(BUDGET=lone, RETENTION=0.3, KIND=GRADED), served())
    lone.with_name("pocket.probe.safetensors").write_bytes(b"other")
    with pytest.raises(InputError, match="is not the probe that the budget file of pocket was written with"):
        find(settings(BUDGET=lone, RETENTION=0.3, KIND=GRADED), served())
    with pytest.raises(
        ValueError, match="graded heads, whose window stays where the prompt ends; unset LLM_KVZIP_WINDOW"
    ):
        find(settings(BUDGET=PROFILE, RETENTION=0.3, KIND=GRADED, WINDOW="sliding"), served())
    path = write_runtime_file(tmp_path / "r.json", ((0, 1), (2, 3)))
    with pytest.raises(ValueError, match="a runtime file, which holds whole heads"):
        find(settings(BUDGET=path, KIND=GRADED), Served(("m",), 2, 8, 4, 32, 1))


def test_heads_that_keep_everything_are_whole_and_need_no_probe(tmp_path):
    lone = tmp_path / "pocket.json"
    lone.write_bytes(PROFILE.read_bytes())
    everything, _ = find(settings(BUDGET=lone, RETENTION=1.0, WINDOW="sliding"), served())
    assert (everything.kind, everything.probe, everything.full) == (WHOLE, None, everything.heads)


def test_graded_heads_are_refused_where_they_cannot_be_had(tmp_path):
    told = f"{PROFILE} has a probe, so it is served with graded heads, whose window stays where the prompt ends; unset"
    with pytest.raises(ValueError, match=re.escape(told)):
        find(settings(BUDGET=PROFILE, RETENTION=0.5, WINDOW="sliding"), served())
    path = save_runtime_file(
        tmp_path / "r.json", make_geometry(2, 4, sliding=[1]), "a/b", [[0, 1], None], sink_tokens=4, recent_tokens=8
    )
    with pytest.raises(ValueError, match=r"r\.json is a runtime file, which holds whole heads; give a budget file"):
        find(settings(BUDGET=path, KIND=GRADED), served("a/b"))


def test_files_are_found_by_the_model_inside(tmp_path):
    (tmp_path / "some-name.json").write_bytes(PROFILE.read_bytes())
    (tmp_path / "some-name.probe.safetensors").write_bytes(path_of(PROFILE).read_bytes())
    (tmp_path / "noise.json").write_text("{")
    budget, origin = find(settings(BUDGET_DIR=tmp_path, RETENTION=0.5), served())
    assert "some-name.json" in origin
    folder = tmp_path / "pocket"
    folder.mkdir()
    assert find(settings(BUDGET_DIR=tmp_path, RETENTION=0.5), served(str(folder)))[0] == budget
    (tmp_path / "twin.json").write_bytes(PROFILE.read_bytes())
    with pytest.raises(ValueError, match="2 budgets for pocket"):
        find(settings(BUDGET_DIR=tmp_path, RETENTION=0.5), served())


@pytest.mark.parametrize(
    ("model", "names", "message"),
    [
        (served(), {"BUDGET_DIR": "/nowhere"}, "is not a folder"),
        (served(), {"BUDGET": "/nowhere/at/all.json", "RETENTION": 0.5}, "cannot read"),
        (served(), {"BUDGET": PROFILE}, "set LLM_KVZIP_RETENTION, for example 0.9, 0.7"),
        (served("other/pocket"), {"BUDGET": PROFILE, "RETENTION": 0.5}, "is for pocket, vLLM serves other/pocket"),
        (served(layers=99), {"BUDGET": PROFILE, "RETENTION": 0.5}, "layers, vLLM serves one with 99"),
        (
            served("a", "pocket", head_size=8),
            {"BUDGET": PROFILE, "RETENTION": 0.5},
            "head size, vLLM serves one with 8",
        ),
    ],
)
def test_other_models_and_missing_files_are_one_line(model, names, message):
    with pytest.raises((ValueError, InputError), match=message) as caught:
        find(settings(**names), model)
    assert "\n" not in str(caught.value)


def write_runtime_file(path, full_heads):
    geometry = make_geometry(2, 4, query_groups=2, head_size=32)
    return save_runtime_file(path, geometry, "m", full_heads, sink_tokens=4, recent_tokens=8)


def test_runtime_files_are_taken_as_they_are(tmp_path):
    path = write_runtime_file(tmp_path / "r.json", ((0, 1), (2, 3)))
    one, two = (Served(("m",), 2, 8, 4, 32, size) for size in (1, 2))
    assert find(settings(BUDGET=path), one)[0].shares == ((1.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 1.0))
    assert find(settings(BUDGET=path, RETENTION=0.5), one)[0].full == 4
    with pytest.raises(ValueError, match=r"is for retention 0\.5, LLM_KVZIP_RETENTION asks for 0\.7"):
        find(settings(BUDGET=path, RETENTION=0.7), one)
    with pytest.raises(ValueError, match="layer 0 are not dealt evenly to 2 ranks; export it with"):
        find(settings(BUDGET=path), two)


def test_a_budget_travels_as_json():
    budget = EngineBudget(((1.0, 0.25, 1.0, 0.0), None, (0.0,) * 4), 16, 64, probe="AAAA")
    config = json.loads(json.dumps({CONFIG_KEY: budget.as_config(), "other": 1}))
    assert EngineBudget.of(config) == budget
    assert (budget.heads, budget.full, budget.kind) == (8, 2, GRADED)
    assert budget.retention == 2.25 / 8
    with pytest.raises(ValueError, match="carries no budget"):
        EngineBudget.of({})


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_ranks_together_hold_every_head(size):
    budget = EngineBudget(((1.0, 0.0, 0.5, 1.0), (0.0, 0.5, 0.5, 0.0)), 0, 1)
    for layer, row in enumerate(budget.shares):
        found = {}
        for rank in range(size):
            heads = budget.on_rank(layer, rank, size)
            assert heads.first == rank * 4 // size
            assert list(heads.by_share) == sorted(heads.by_share, reverse=True)
            assert sum(map(len, heads.by_share.values())) == max(1, 4 // size)
            found |= {heads.first + head: share for share, own in heads.by_share.items() for head in own}
        assert found == dict(enumerate(row))
    assert EngineBudget((None,), 0, 1).on_rank(0, 0, 1) is None
    assert EngineBudget(((0.0, 0.0, 0.0, 1.0),), 0, 1).on_rank(0, 1, 2) == RankHeads(2, {1.0: (1,), 0.0: (0,)})
    assert (budget.uneven_layer(1), budget.uneven_layer(2)) == (None, 0)
    assert EngineBudget(budget.shares[1:], 0, 1).uneven_layer(2) is None


def halves(layer, full):
    """Pieces of a layer with 8 heads, for a request of 2048 tokens in blocks of 32, sinks 128 and window 256."""
    found = [Piece(f"{layer}.full", "full", full * 100, 64, 64)] if full else []
    return found + ([Piece(f"{layer}.stream", "stream", (8 - full) * 100, 12, 64)] if full < 8 else [])


@given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=1, max_size=40))
def test_packing_holds_every_piece_once_and_keeps_kinds_apart(layers):
    pieces = []
    for layer, (full, slides) in enumerate(layers):
        pieces += [Piece(f"{layer}", "sliding", 800, 4, 4)] if slides else halves(layer, full)
    found = pack(pieces)
    assert sorted(p.name for group in found.groups for p in group) == sorted(p.name for p in pieces)
    assert all(len({p.kind for p in group}) == 1 for group in found.groups)
    assert found.width >= max(p.block_bytes for p in pieces)
    assert found.decode_waste > 0.999
    assert found.prefill_waste > 0.999


@pytest.mark.parametrize("retention", [0.7, 0.5, 0.3])
def test_packing_reaches_the_bound(retention):
    """A model of 32 layers with 8 heads, its full heads spread unevenly: little is lost to width."""
    full = [min(8, max(0, round(retention * 8 + (layer % 5 - 2) * 1.5))) for layer in range(32)]
    found = pack([piece for layer, count in enumerate(full) for piece in halves(layer, count)])
    print(retention, found.reason())
    assert found.decode_waste < 1.05
    assert found.prefill_waste < 1.1


def test_patches_are_applied_once_and_removed():
    owner = types.SimpleNamespace
    toy = type("Toy", (), {"answer": lambda _: 41})
    module = types.ModuleType("toys")
    module.double = lambda x: 2 * x
    original, double = toy.answer, module.double
    patch = Patch(toy, "answer", lambda stock: lambda self: stock(self) + 1)
    patch.apply()
    assert toy().answer() == 42
    assert toy.answer is not original
    with pytest.raises(RuntimeError, match=r"Toy\.answer is patched already"):
        Patch(toy, "answer", lambda stock: stock).apply()
    patch.remove()
    assert toy.answer is original
    with pytest.raises(RuntimeError, match="is not patched"):
        patch.remove()
    other = Patch(module, "double", lambda stock: lambda x: stock(x) + 1)
    other.apply()
    assert module.double(2) == 5
    other.remove()
    assert module.double is double
    with pytest.raises(RuntimeError, match=r"toys\.missing does not exist"):
        Patch(module, "missing", owner).apply()


COUNT = (
    "import sys; from pathlib import Path; from kvprofile.runtime.stats import Counters;"
    "from kvprofile.runtime.stats import engine_of_process;"
    "counters = Counters(Path(sys.argv[1]), Path(sys.argv[2]), engine_of_process());"
    "counters.reclaimed(3, 100); counters.in_use(5, 100); counters.reclaimed(2, 100); counters.in_use(4, 100);"
    "counters.kept(2); counters.moved(0.25); counters.moved(0.5)"
)
REPLICA = "import multiprocessing; multiprocessing.current_process().name = 'EngineCore_DP1';"
SHARE = "from kvprofile.runtime import stats; stats.share(); print(stats.read()['kv_bytes_reclaimed_total'])"


def test_counters_cross_processes(tmp_path, monkeypatch):
    lines = tmp_path / "lines.jsonl"
    monkeypatch.setenv(SHARED, str(tmp_path / "of an engine that is gone"))  # so that it is taken back at the end
    stats.share()
    shared = os.environ[SHARED]
    assert stats.read() == dict.fromkeys(stats.FIELDS, 0)
    subprocess.run([sys.executable, "-c", COUNT, shared, str(lines)], check=True)
    expected = {"kv_blocks_reclaimed_total": 5, "kv_bytes_reclaimed_total": 500, "kv_bytes_in_use": 400}
    expected |= {"kv_block_bytes": 100, "kv_blocks_kept_total": 2, "kv_move_microseconds_total": 750_000}
    assert stats.read() == expected
    (line,) = [json.loads(text) for text in lines.read_text().splitlines()]  # the second is within a second
    assert line["kv_bytes_in_use"] == 500

    subprocess.run([sys.executable, "-c", REPLICA + COUNT, shared, str(lines)], check=True)
    assert set(stats.by_engine()) == {0, 1}
    assert stats.by_engine()[0] == stats.by_engine()[1] == {**expected, "kv_block_bytes": 100}
    assert stats.read() == {name: 2 * value for name, value in expected.items()} | {"kv_block_bytes": 100}
    engines = [json.loads(text)["engine"] for text in lines.read_text().splitlines()]
    assert engines == [0, 1]

    _held = stats.Counters(Path(shared), None), stats.Counters(Path(shared), None)  # one waits for no other
    api_server = subprocess.run([sys.executable, "-c", SHARE], capture_output=True, text=True, check=True)
    assert api_server.stdout.strip() == "1000", "one of several API servers took back what the scheduler had counted"
    assert Path(shared).is_file()
    stats.share()
    assert stats.read() == dict.fromkeys(stats.FIELDS, 0), "a second engine of this process counts anew"
