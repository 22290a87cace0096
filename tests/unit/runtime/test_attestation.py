"""The file that ``kvprofile verify`` leaves: what is refused, in one line that says which field."""

from __future__ import annotations

import ast
import copy
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from kvprofile.errors import InputError
from kvprofile.runtime import attestation
from kvprofile.runtime.find import Served, find
from kvprofile.runtime.settings import from_environment
from tests.helpers.attestations import make_attestation
from tests.helpers.models import ROOT

SOURCES = attestation._SOURCES
ON_THE_WAY = {
    "environment.py",
    "errors.py",
    "files.py",
    "budget/__init__.py",
    "budget/profile.py",
    "capture/__init__.py",
}
"""What modules that run in vLLM import besides their own: names, errors and types."""


@pytest.fixture
def path(tmp_path):
    return attestation.path_of(tmp_path / "pocket.json")


def test_it_lies_next_to_the_budget_file_and_is_not_taken_for_one(tmp_path):
    budget = tmp_path / "pocket.json"
    shutil.copy(ROOT / "models" / "kv_budget" / "pocket.json", budget)
    assert attestation.path_of(budget) == tmp_path / "pocket.verified.json"
    attestation.save(tmp_path / "pocket.verified.json", [make_attestation(model="pocket")])
    names = {"BUDGET_DIR": str(tmp_path), "RETENTION": "0.5", "KIND": "whole"}
    asked = from_environment({f"LLM_KVZIP_{name}": value for name, value in names.items()})
    _, origin = find(asked, Served(("pocket",), 6, 8, 4, 32, 1))
    assert origin.startswith(f"{budget} ")


def test_several_are_sorted_and_equal_bytes_are_written(path):
    made = [make_attestation(block_size=size) for size in (64, 16, 32)]
    attestation.save(path, made)
    first = path.read_bytes()
    assert [each.key["block_size"] for each in attestation.load(path)] == [16, 32, 64]
    attestation.save(path, reversed(made))
    assert path.read_bytes() == first
    later = replace(made[0], measured={"date": "2027-01-01", "seconds_per_token": {}})
    assert later.sha256 == made[0].sha256
    attestation.save(path, [])
    assert not path.exists()


def test_an_attestation_is_replaced_or_withdrawn_by_its_key(path):
    one, two = make_attestation(block_size=16), make_attestation(block_size=32)
    attestation.save(path, [one, two])
    assert attestation.with_one_more(path, one.key, None) == [two]
    newer = replace(one, measured={"date": "2027-01-01"})
    assert attestation.with_one_more(path, one.key, newer) == [two, newer]
    path.write_text("{")
    assert attestation.with_one_more(path, one.key, one) == [one]


def test_what_agrees_holds_as_far_as_is_known(path):
    made = [make_attestation(attention_backend=name) for name in ("FLASH_ATTN", "FLASHINFER")]
    attestation.save(path, made)
    known = {name: value for name, value in made[0].key.items() if name not in attestation.CHECKED_IN_WORKERS}
    found = attestation.holding(path, known)
    assert {each.key["attention_backend"] for each in found} == {"FLASH_ATTN", "FLASHINFER"}


@pytest.mark.parametrize("name", attestation.KEY)
def test_every_field_that_differs_is_refused_by_name(path, name):
    made = make_attestation()
    attestation.save(path, [make_attestation(model="another", device="another"), made])
    other = 32 if name in attestation.NUMBERS else "another"
    with pytest.raises(InputError) as caught:
        attestation.holding(path, {**made.key, name: other})
    assert str(caught.value) == f"{path} does not hold here: {name} is {other}, attested is {made.key[name]}"


def test_without_a_file_nothing_holds(path):
    with pytest.raises(InputError, match=r"attestation .* does not exist"):
        attestation.holding(path, {})


def changed(raw, *place, to):
    found = copy.deepcopy(raw)
    inner = found
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = to
    return found


@pytest.mark.parametrize(
    ("place", "to", "said"),
    [
        (("format",), "other", "not a file of attestations"),
        (("version",), 2, "version is 2, this kvprofile reads 1"),
        (("version",), True, "version is True"),
        (("attestations",), [], "not a list of attestations"),
        (("attestations", 0), {}, "attestation 1 is not made of key, checks, measured and sha256"),
        (("attestations", 0, "sha256"), "0", "attestation 1 was changed after it was written"),
        (("attestations", 0, "key", "device"), "H100", "was changed after it was written"),
        (("attestations", 0, "key", "device"), 7, "device is 7"),
        (("attestations", 0, "key", "block_size"), True, "block_size is True"),
        (("attestations", 0, "key", "colour"), "red", "the key has not the fields of this kvprofile (colour)"),
        (("attestations", 0, "checks", "load"), {}, "the check load does not say longest_request"),
        (("attestations", 0, "checks", "stock", "tokens"), 0, "nothing was compared in stock"),
        (("attestations", 0, "checks", "blocks", "given_back"), 0, "nothing was compared in blocks"),
        (("attestations", 0, "checks", "stock", "far"), 3, "far of stock is 3, more than the 2 allowed"),
        (("attestations", 0, "checks", "reference", "mean"), 0.1, "mean of reference is 0.1, more than the 0.001"),
        (("attestations", 0, "checks", "reference", "mean"), -1, "mean of reference is -1"),
        (("attestations", 0, "measured"), None, "the key has not the fields"),
    ],
)
def test_what_does_not_hold_together_is_refused_in_one_line(path, place, to, said):
    attestation.save(path, [make_attestation()])
    path.write_text(json.dumps(changed(json.loads(path.read_bytes()), *place, to=to)))
    with pytest.raises(InputError) as caught:
        attestation.load(path)
    assert said in str(caught.value)
    assert str(caught.value).endswith("; run 'kvprofile verify' to make it anew")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"format": NaN}', b"[" * 100_000])
def test_other_files_are_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(InputError, match=str(path)):
        attestation.load(path)


def test_two_of_one_key_are_refused(path):
    attestation.save(path, [make_attestation()])
    raw = json.loads(path.read_bytes())
    raw["attestations"] *= 2
    path.write_text(json.dumps(raw))
    with pytest.raises(InputError, match="two attestations have one key"):
        attestation.load(path)


def digest_of(place):
    code = "from kvprofile.runtime import attestation; print(attestation.runtime_sha256())"
    env = {**os.environ, "PYTHONPATH": str(place)}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=place, capture_output=True, text=True, check=True
    ).stdout


def test_one_byte_of_what_runs_in_vllm_changes_the_digest(tmp_path):
    shutil.copytree(ROOT / "kvprofile", tmp_path / "kvprofile", ignore=shutil.ignore_patterns("__pycache__"))
    before = digest_of(tmp_path)
    assert before.strip() == attestation.runtime_sha256()
    for name in ("runtime/layer.py", "budget/trim.py", "capture/layout.py"):
        file = tmp_path / "kvprofile" / name
        whole = file.read_bytes()
        file.write_bytes(whole + b"#")
        assert digest_of(tmp_path) != before
        file.write_bytes(whole)
    (tmp_path / "kvprofile" / "cli" / "output.py").write_bytes(b"")
    assert digest_of(tmp_path) == before


def test_the_digest_covers_what_workers_and_scheduler_run():
    """Everything of kvprofile that the parts import which are installed into vLLM, but names, errors and types."""
    package = ROOT / "kvprofile"
    due = [
        package / "runtime" / f"{name}.py" for name in ("backend", "grouping", "layer", "moves", "permute", "poison")
    ]
    seen = set()
    while due:
        file = due.pop()
        if file in seen:
            continue
        seen.add(file)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("kvprofile"):
                base = ROOT.joinpath(*str(node.module).split("."))
                names = [base / f"{alias.name}.py" for alias in node.names]
                due += [each for each in [base.with_suffix(".py"), *names] if each.is_file()]
    names = {file.relative_to(package).as_posix() for file in seen}
    covered = {name for name in names if any(name == source or name.startswith(f"{source}/") for source in SOURCES)}
    assert "runtime/stream_cache.py" in covered
    assert names - covered <= ON_THE_WAY
