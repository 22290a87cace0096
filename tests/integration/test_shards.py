"""`score --shard` and `merge`: the bytes of one process from any number of shards, or one line that says why not."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kvprofile.budget import probe
from kvprofile.cli import run
from kvprofile.scoring.shard import Shard
from tests.helpers.commands import refused
from tests.helpers.models import ROOT
from tests.helpers.score_runs import finish, start, wait_for_chunks

DOCUMENTS = 5
CORPORA = [f"--corpus=generate:{kind}:{seed}:6000" for seed, kind in enumerate(("prose", "tables", "code", "voice"))]
SMALL = ["--context-tokens", "200", "--chunk-tokens", "64", "--dtype", "float32", "--device", "cpu"]
TRIM = ["--sink-tokens", "16", "--recent-tokens", "64"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Five documents: four that are generated, and a file."""
    path = tmp_path_factory.mktemp("texts") / "own.txt"
    path.write_text("A lamp in the harbour burns until the last boat is home. " * 200)
    return [*CORPORA, f"--corpus={path}"]


@pytest.fixture(scope="module")
def score(tiny_checkpoint, texts):
    """Score in this process."""

    def run_it(output, *options):
        return run(["score", str(tiny_checkpoint), *texts, *SMALL, *TRIM, "--output", str(output), *options])

    return run_it


@pytest.fixture(scope="module")
def whole(score, tmp_path_factory):
    """The budget file of one process."""
    output = tmp_path_factory.mktemp("whole") / "tiny.json"
    assert score(output) == 0
    return output


@pytest.fixture(scope="module")
def three(score, tmp_path_factory):
    """The files of three shards."""
    output = tmp_path_factory.mktemp("three") / "tiny.json"
    for number in (1, 2, 3):
        assert score(output, "--shard", f"{number}/3") == 0
    return [Shard(number, 3).path(output) for number in (1, 2, 3)]


@pytest.fixture
def shards(three, tmp_path):
    """Copies of them to break."""
    return [shutil.copy(path, tmp_path) for path in three]


def merged(paths, output):
    assert run(["merge", *map(str, paths), "--output", str(output)]) == 0
    return output


def same(output, whole):
    return output.read_bytes() == whole.read_bytes() and (
        probe.path_of(output).read_bytes() == probe.path_of(whole).read_bytes()
    )


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_any_number_of_shards_gives_the_bytes_of_one_process(score, whole, tmp_path, count):
    output = tmp_path / "tiny.json"
    paths = [Shard(number, count).path(output) for number in range(1, count + 1)]
    for number in reversed(range(1, count + 1)):  # in whatever order
        assert score(output, "--shard", f"{number}/{count}") == 0
    assert sorted(tmp_path.iterdir()) == sorted(paths)  # nothing unfinished is left
    assert same(merged(reversed(paths), output), whole)


def test_copies_under_other_names_do(three, whole, tmp_path):
    copies = [shutil.copy(path, tmp_path / name) for path, name in zip(three, ("b", "a", "c"), strict=True)]
    assert same(merged(copies, tmp_path / "tiny.json"), whole)


@pytest.mark.parametrize("options", [("--method", "ablation"), ("--recent-tokens", "300")])
def test_losses_and_budgets_without_a_probe_are_the_same_too(score, tmp_path, options):
    one, output = tmp_path / "one.json", tmp_path / "tiny.json"
    assert score(one, *options) == 0
    for number in (1, 2):
        assert score(output, *options, "--shard", f"{number}/2") == 0
    merged([Shard(1, 2).path(output), Shard(2, 2).path(output)], output)
    assert output.read_bytes() == one.read_bytes()
    assert probe.path_of(output).exists() == probe.path_of(one).exists() == ("ablation" in options)


def test_a_killed_shard_continues_and_a_finished_one_is_left(tiny_checkpoint, tmp_path, capsys):
    one, output = tmp_path / "one.json", tmp_path / "tiny.json"
    finish(tiny_checkpoint, one)
    path = Shard(1, 2).path(output)
    process = start(tiny_checkpoint, output, "--shard", "1/2")
    wait_for_chunks(path, 6, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not path.exists()
    other = finish(tiny_checkpoint, output, "--shard", "2/2")
    assert "finished already" not in other.stderr  # each has a folder of its own
    told = refused(capsys, "merge", str(Shard(2, 2).path(output)))
    assert "missing of 2 shards: 1 (1/2 was begun and is not finished); run 'kvprofile score ... --shard 1/2'" in told
    told = refused(capsys, "merge", *map(str, sorted(tmp_path.glob("tiny.json.shard-*"))))
    assert "partial is the work of a shard that is not finished; run its score command again" in told
    assert "chunks are finished already" in finish(tiny_checkpoint, output, "--shard", "1/2").stderr
    before = path.stat().st_mtime_ns
    again = finish(tiny_checkpoint, output, "--shard", "1/2", "--json")
    assert "is there already, of this run" in again.stderr
    assert json.loads(again.stdout) == {"file": str(path), "shard": 1, "of": 2, "documents": 1}
    assert path.stat().st_mtime_ns == before
    assert same(merged([path, Shard(2, 2).path(output)], output), one)


def test_a_shard_of_another_run_is_scored_anew_and_another_file_is_not_replaced(score, tmp_path, capsys):
    output = tmp_path / "tiny.json"
    path = Shard(1, 2).path(output)
    assert score(output, "--shard", "1/2", "--seed", "1") == 0
    before = path.read_bytes()
    assert score(output, "--shard", "1/2") == 0
    assert path.read_bytes() != before
    path.write_bytes(b"notes")
    capsys.readouterr()
    assert score(output, "--shard", "1/2") == 2
    assert "is cut off or is not a shard" in (told := capsys.readouterr().err)
    assert "or pass --force to replace tiny.json.shard-1-of-2.safetensors" in told
    assert score(output, "--shard", "1/2", "--force") == 0


def rewritten(path, change):
    """The file with another header."""
    with safe_open(path, "pt") as tensors:
        told = json.loads(tensors.metadata()["kvprofile.shard"])
    change(told)
    save_file(load_file(path), path, {"kvprofile.shard": json.dumps(told)})


def test_what_is_missing_or_doubled_is_one_line(capsys, shards):
    first, second, third = map(str, shards)
    assert "missing of 3 shards: 2, 3; run 'kvprofile score ... --shard 2/3'" in refused(capsys, "merge", first)
    assert f"{first} and {first} are both shard 1/3; give each once" in refused(capsys, "merge", first, second, first)
    assert f"{third}x: no such file" in refused(capsys, "merge", first, second, f"{third}x")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--chunk-tokens", "100"], "scoring.chunk_tokens is 100, not 64"),
        (["--recent-tokens", "65"], "runtime.recent_tokens is 65, not 64"),
        (["--corpus", "generate:prose:9:6000"], "scoring.corpora is"),
        (["--seed", "3"], "scoring.seed is 3, not 0"),
    ],
)
def test_a_shard_of_another_run_is_one_line(capsys, score, shards, tmp_path, options, why):
    assert score(tmp_path / "other.json", "--shard", "2/3", *options) == 0
    capsys.readouterr()
    other = Shard(2, 3).path(tmp_path / "other.json")
    told = refused(capsys, "merge", shards[0], str(other), shards[2])
    assert f"{other} belongs to another run than {shards[0]}: {why}" in told


def test_another_division_or_version_is_one_line(capsys, score, shards, tmp_path):
    assert score(tmp_path / "other.json", "--shard", "2/4") == 0
    capsys.readouterr()
    told = refused(capsys, "merge", shards[0], str(Shard(2, 4).path(tmp_path / "other.json")))
    assert "is shard 2/4; give the shards of one division" in told
    rewritten(shards[1], lambda told: told.update(run_key="0"))
    assert "texts, templates or settings of the engine differ" in refused(capsys, "merge", *map(str, shards))
    rewritten(shards[1], lambda told: told.update(version="0.0.1"))
    told = refused(capsys, "merge", *map(str, shards))
    assert f"{shards[1]} was written by kvprofile 0.0.1, this is " in told


def test_what_is_not_a_whole_shard_is_one_line(capsys, shards, whole, tmp_path):
    third = tmp_path / Shard(3, 3).path(tmp_path / "tiny.json").name
    content = third.read_bytes()
    for broken in (content[:-1], content[:50], b"", b"{}"):
        third.write_bytes(broken)
        told = refused(capsys, "merge", *map(str, shards))
        assert "is cut off or is not a shard; copy it again, or score the shard again" in told
    for other in (probe.path_of(whole), tmp_path):
        assert "is not a shard; give files" in refused(capsys, "merge", *map(str, shards[:2]), str(other))
    third.write_bytes(content)
    rewritten(third, lambda told: told["facts"].pop("model"))
    assert "its header is not that of a shard" in refused(capsys, "merge", *map(str, shards))
    third.write_bytes(content)
    save_file({"tokens": load_file(third)["tokens"]}, third, safe_open(third, "pt").metadata())
    assert "does not hold what a shard holds; score shard 3/3 again" in refused(capsys, "merge", *map(str, shards))


def test_merge_replaces_no_budget_of_another_model(capsys, shards, tmp_path):
    target = tmp_path / "out.json"
    shutil.copy(ROOT / "models" / "kv_budget" / "pocket.json", target)
    told = refused(capsys, "merge", *map(str, shards), "--output", str(target))
    assert "belongs to pocket" in told
    assert run(["merge", *map(str, shards), "--output", str(target), "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shards"] == 3


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--shard", "0/3"], "give I/N with I from 1 to N"),
        (["--shard", "4/3"], "give I/N with I from 1 to N"),
        (["--shard", "2"], "give I/N with I from 1 to N"),
        (["--shard", "1/2", "--method", "kvzip-mean", "--fast"], "--fast looks at all documents together"),
        (["--shard", "1/2", "--save-token-scores", "a.safetensors"], "--save-token-scores looks at all documents"),
    ],
)
def test_what_shards_do_not_go_with_is_one_line(capsys, score, tmp_path, options, told):
    capsys.readouterr()
    assert score(tmp_path / "out.json", *options) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_a_dry_run_counts_the_shard(capsys, score, tmp_path):
    found = []
    for options in ((), ("--shard", "1/2"), ("--shard", "2/2")):
        capsys.readouterr()
        assert score(tmp_path / "out.json", "--dry-run", "--json", *options) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert [one["documents"] for one in found] == [DOCUMENTS, 3, 2]
    assert found[0]["tokens_read"] == found[1]["tokens_read"] + found[2]["tokens_read"]
    assert list(tmp_path.iterdir()) == []


def test_merge_leaves_a_file_that_is_not_a_probe_alone(three, tmp_path, capsys):
    output = tmp_path / "tiny.json"
    probe.path_of(output).write_bytes(b"mine")
    told = refused(capsys, "merge", *map(str, three), "--output", str(output))
    assert "exists and is not a probe; pass --force" in told
    assert probe.path_of(output).read_bytes() == b"mine"
    assert not output.exists()
