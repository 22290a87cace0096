"""Files made to break or to attack: refused in one line, and no code from a file ever runs."""

from __future__ import annotations

import io
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kvprofile.budget import formats, store
from tests.helpers.attack import Attack
from tests.helpers.factories import make_profile
from tests.helpers.foreign import read_back, refusal, result_or_line, written

hostile = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("name", formats.FORMATS)
def test_a_pickle_is_refused_and_never_run(name, tmp_path):
    target = tmp_path / "attacked"
    profile = make_profile()
    raw = tmp_path / "raw.bin"
    raw.write_bytes(pickle.dumps(Attack(target)))
    wrapped = tmp_path / "wrapped.pt"
    torch.save(Attack(target), wrapped)
    listed = tmp_path / "objects.npy"
    with open(listed, "wb") as stream:
        np.save(stream, np.array([Attack(target)] * 4, dtype=object), allow_pickle=True)
    for path in (raw, wrapped, listed):
        refusal(name, profile, path)
    assert not target.exists()


def test_an_object_array_of_the_right_shape_is_refused_and_never_run(tmp_path):
    target = tmp_path / "attacked"
    table = np.empty((99, 2, 2), dtype=object)
    table[:] = Attack(target)
    np.save(tmp_path / "x.npy", table, allow_pickle=True)
    assert "not floating-point" in refusal("lu-kv", make_profile(2, 2), tmp_path / "x.npy")
    assert not target.exists()


@pytest.mark.parametrize("name", formats.FORMATS)
@given(
    cut=st.floats(0, 1, exclude_max=True),
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=3),
)
@hostile
def test_truncated_and_corrupted_files_are_read_or_refused_in_one_line(name, cut, flips, tmp_path):
    profile = make_profile(3, 2)
    path = written(profile, name, tmp_path, retention=0.5)
    target = path / "full_attention_heads.tsv" if path.is_dir() else path
    good = target.read_bytes()
    damaged = bytearray(good[: int(len(good) * cut)] if not flips else good)
    for place, mask in flips:
        damaged[int(place * (len(damaged) - 1))] ^= mask
    target.write_bytes(damaged)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing may be said beside the one line
        found = result_or_line(lambda: read_back(profile, name, path))
    assert isinstance(found, str) or store.to_bytes(found)


@pytest.mark.parametrize("name", formats.FORMATS)
@given(junk=st.binary(max_size=300))
@example(junk=b"")
@example(junk=b"\x93NUMPY\x01\x00\xff\xff{'descr'")
@example(junk=b"PK\x05\x06" + b"\0" * 18)
@example(junk=b"[" * 300)
@example(junk="layer,kv_head,score,budget\n0,0,½,\n".encode())
@hostile
def test_bytes_of_any_kind_are_refused_in_one_line(name, junk, tmp_path):
    path = tmp_path / "junk"
    path.write_bytes(junk)
    refusal(name, make_profile(3, 2), path)


@pytest.mark.parametrize("name", formats.FORMATS)
def test_missing_files_folders_and_pipes_are_refused(name, tmp_path):
    profile = make_profile()
    assert "No such file" in refusal(name, profile, tmp_path / "missing")
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(name, profile, tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    refusal(name, profile, tmp_path / "folder")


@pytest.mark.parametrize("name", formats.FORMATS)
@pytest.mark.parametrize("called", ["schön 模型.bin", "line\nbreak", "escape\x1b[31m", os.fsdecode(b"bad\xff.bin")])
def test_file_names_of_any_kind_are_printable_in_messages_and_in_budget_files(name, called, tmp_path):
    profile = make_profile()
    good = written(profile, name, tmp_path, retention=0.5)
    renamed = good.rename(tmp_path / called)
    assert store.to_bytes(read_back(profile, name, renamed))
    broken = renamed / "full_attention_heads.tsv" if renamed.is_dir() else renamed
    broken.write_bytes(b"\xff\xfe")
    message = refusal(name, profile, renamed)
    assert all(character.isprintable() for character in message)


@pytest.mark.parametrize("name", formats.FORMATS)
def test_files_larger_than_any_of_their_kind_are_refused_unread(name, tmp_path):
    path = tmp_path / "huge"
    with open(path, "wb") as stream:
        stream.truncate(10 * 2**30)  # sparse: takes no space
    assert "larger than" in refusal(name, make_profile(), path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5, 1.5])
def test_numbers_that_are_not_scores_are_refused(value, tmp_path):
    profile = make_profile(2, 2)
    torch.save(torch.tensor([[0.5, value], [0.1, 0.2]]), tmp_path / "x.pt")
    assert "outside [0, 1]" in refusal("kvzip", profile, tmp_path / "x.pt")
    np.save(tmp_path / "x.npy", np.full((99, 2, 2), value))
    assert "outside [0, 1]" in refusal("lu-kv", profile, tmp_path / "x.npy")
    (tmp_path / "x.csv").write_text(f"layer,kv_head,score,budget\n0,0,{value},\n0,1,0,\n1,0,0,\n1,1,0,\n")
    assert "outside [0, 1]" in refusal("csv", profile, tmp_path / "x.csv")
    if value not in (-0.5, 1.5):  # those are clipped, as DuoAttention does
        (tmp_path / "x.tsv").write_text(f"0.5\t{value}\n0.1\t0.2\n")
        assert "not finite" in refusal("duo-attention", profile, tmp_path / "x.tsv")


@pytest.mark.parametrize("name", ["kvzip", "duo-attention", "lu-kv", "csv"])
@pytest.mark.parametrize("shape", [(4, 2), (3, 3), (2, 3)])
def test_files_of_another_shape_are_refused(name, shape, tmp_path):
    path = written(make_profile(*shape), name, tmp_path, retention=0.5)
    message = refusal(name, make_profile(3, 2), path)
    assert any(word in message for word in ("3 layers x 2 KV heads", "3 x 2", "has a null"))


@pytest.mark.parametrize(
    "content",
    [
        {"a": torch.zeros(3, 2)},
        [torch.zeros(3, 2)],
        torch.zeros(3, 2, dtype=torch.int64),
        torch.zeros(3, 2).to_sparse(),
        torch.zeros(3, 2, device="meta"),
        torch.zeros(1).expand(10**9, 10**6),
        torch.zeros(0),
        "text",
        None,
    ],
    ids=str,
)
def test_kvzip_files_hold_one_plain_tensor(content, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    refusal("kvzip", make_profile(3, 2), tmp_path / "x.pt")


def archive(path: Path, entries: dict[str, bytes], compression: int) -> Path:
    with zipfile.ZipFile(path, "w", compression) as stream:
        for name, value in entries.items():
            stream.writestr(name, value)
    return path


def torch_entries(tensor: torch.Tensor) -> dict[str, bytes]:
    stream = io.BytesIO()
    torch.save(tensor, stream)
    with zipfile.ZipFile(stream) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def test_zip_bombs_are_refused_from_their_directory(tmp_path):
    profile, entries = make_profile(3, 2), torch_entries(torch.zeros(3, 2))
    bomb = archive(tmp_path / "a.pt", {**entries, "archive/data/1": b"\0" * 2**24}, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 2**18
    assert "compressed entries" in refusal("kvzip", profile, bomb)
    crowd = {**entries, **{f"archive/data/{i}": b"" for i in range(5000)}}
    assert "unpacks to more" in refusal("kvzip", profile, archive(tmp_path / "b.pt", crowd, zipfile.ZIP_STORED))
    huge = bytearray(archive(tmp_path / "c.pt", entries, zipfile.ZIP_STORED).read_bytes())
    at = huge.index(b"PK\x01\x02")
    huge[at + 24 : at + 28] = (2**31).to_bytes(4, "little")
    (tmp_path / "c.pt").write_bytes(huge)
    assert "unpacks to more" in refusal("kvzip", profile, tmp_path / "c.pt")


def test_a_tensor_that_claims_more_than_its_bytes_is_refused(tmp_path):
    entries = torch_entries(torch.zeros(3, 2))
    name = next(name for name in entries if name.endswith("data/0"))
    short = archive(tmp_path / "x.pt", {**entries, name: b"\0" * 4}, zipfile.ZIP_STORED)
    assert "not a file with one tensor" in refusal("kvzip", make_profile(3, 2), short)


def test_a_numpy_header_that_promises_terabytes_is_refused_before_memory_is_taken(tmp_path):
    stream = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": (99, 2**20, 2**20)}
    np.lib.format.write_array_header_1_0(stream, header)
    (tmp_path / "x.npy").write_bytes(stream.getvalue())
    assert "shape 99 x 1048576 x 1048576" in refusal("lu-kv", make_profile(3, 2), tmp_path / "x.npy")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the first line must be"),
        ("layer,head,score\n", "the first line must be layer,kv_head,score,budget"),
        ("layer,kv_head,score,budget\n", "has a null"),
        ("layer,kv_head,score,budget\n0,0,0.5\n", "line 2 is not"),
        ("layer,kv_head,score,budget\n0,0,0.5,,\n", "line 2"),
        ("layer,kv_head,score,budget\n0,9,0.5,\n", "line 2 has layer 0, KV head 9"),
        ("layer,kv_head,score,budget\n-1,0,0.5,\n", "line 2 has layer -1"),
        ("layer,kv_head,score,budget\n0,0,0.5,\n0,0,0.5,\n", "line 3 repeats layer 0, KV head 0"),
        ("layer,kv_head,score,budget\n0,0,0.5,1\n0,1,0.5,\n", "has a null"),
        ("layer,kv_head,score,budget\n" + "9" * 5000 + ",0,1,\n", "line 2 is not"),
    ],
)
def test_broken_tables_are_refused_with_their_line(text, words, tmp_path):
    (tmp_path / "x.csv").write_text(text)
    assert words in refusal("csv", make_profile(1, 2), tmp_path / "x.csv")


@pytest.mark.parametrize(
    "config",
    ["", "[]", "{}", '{"sink_size": -1, "recent_size": 1}', '{"sink_size": 1, "recent_size": true}', "[" * 10**5],
)
def test_broken_duo_attention_configs_are_refused(config, tmp_path):
    folder = written(make_profile(), "duo-attention", tmp_path)
    (folder / "config.json").write_text(config)
    assert "config.json" in refusal("duo-attention", make_profile(), folder)
