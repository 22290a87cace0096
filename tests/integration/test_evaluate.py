"""`kvprofile evaluate` on real code: against the naive masked model, interrupted and continued, refused in one line."""

from __future__ import annotations

import json
import shutil
from dataclasses import astuple, replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvprofile.budget import store
from kvprofile.checkpoint import choose_placement, describe, load_model, load_tokenizer, locate
from kvprofile.cli import run as command
from kvprofile.errors import InputError
from kvprofile.evaluate import evaluation
from kvprofile.evaluate.item_store import ItemStore, read_items
from kvprofile.evaluate.measurer import Measurer
from kvprofile.evaluate.options import EvaluationOptions
from kvprofile.evaluate.simulate import Simulation, simulating
from kvprofile.evaluate.summary import Results
from kvprofile.evaluate.variants import Contender
from kvprofile.progress import Silent
from tests.helpers import foreign, masked
from tests.helpers.factories import make_profile, random_scores
from tests.helpers.models import POCKET, random_model, save_checkpoint

SIZES = ["--context-tokens", "70", "--contexts", "1", "--questions", "2", "--retention", "0.5", "--block-tokens", "4"]
FAST = ["--tasks", "needle", "--tasks", "repeat", *SIZES, "--random-seeds", "1", "--device", "cpu", "--generate"]
BARE = ["--tasks", "needle", *SIZES, "--no-controls", "--device", "cpu", "--output", "out"]
OPTIONS = EvaluationOptions(
    retentions=(0.5,), tasks=("needle", "multi_turn", "repeat", "continuation"), context_tokens=(70,), contexts=1,
    questions=2, block_tokens=4, random_seeds=1, generate=True,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _short_answers():
    """A random model never ends an answer; three tokens beyond the reference are enough here."""
    with mock.patch("kvprofile.evaluate.measurer.SPARE_TOKENS", SPARE):
        yield


SPARE = 3


def tiny_profile(**changes):
    """A profile of the tiny checkpoint's geometry with made-up scores."""
    return make_profile(3, 2, head_size=16, **{"name": "tiny", "sink_tokens": 4, "recent_tokens": 16, **changes})


@pytest.fixture
def profile_file(workplace):
    """The budget file that the command finds by itself."""
    store.save(tiny_profile(), workplace / "models/kv_budget/tiny.json")
    return workplace / "models/kv_budget/tiny.json"


def plan(folder, profile, options=OPTIONS):
    description = describe(locate(str(folder)))
    return evaluation.plan(description, load_tokenizer(description.source), [Contender("kvzip", profile)], options)


@pytest.mark.usefixtures("profile_file")
def test_caches_of_8_bit_floats_stand_beside_the_others(capsys, tiny_checkpoint):
    """The other rows do not change, and rows of such caches are compared with the full cache as it is."""
    caches = [word for name in ("auto", "fp8", "fp8_e5m2") for word in ("--kv-cache-dtype", name)]
    with mock.patch("kvprofile.evaluate.measurer.SLICE_LOGITS", 1):  # one position at a time, however many rows
        plain = evaluated(capsys, tiny_checkpoint, *FAST, "--output", "plain")
        both = evaluated(capsys, tiny_checkpoint, *FAST, "--output", "both", *caches)
    with mock.patch("kvprofile.evaluate.measurer.SLICE_LOGITS", 100_000):  # several, fewer where more is read
        other = evaluated(capsys, tiny_checkpoint, *FAST, "--output", "other", *caches)
    assert len(other["rows"]) == len(both["rows"])
    rows = {(row["name"], row["retention"]): row for row in both["rows"]}
    for row in plain["rows"]:
        assert rows.pop((row["name"], row["retention"])) == row
    names = [f"{name} {cache}" for cache in ("fp8", "fp8_e5m2") for name in ("full", "kvzip")]
    assert sorted({name for name, _ in rows}) == sorted(names)
    assert rows["full fp8", None]["retention_realised"] == 0.5
    assert 0 < rows["full fp8", None]["kl"]["value"] < rows["full fp8_e5m2", None]["kl"]["value"]
    whole = next(row for row in plain["rows"] if row["name"] == "kvzip")
    half = rows["kvzip fp8", 0.5]
    assert half["retention_realised"] == pytest.approx(whole["retention_realised"] / 2, abs=1e-6)
    assert half["kl"]["value"] != whole["kl"]["value"]


def placement():
    return choose_placement(
        dtype="float32", device="cpu", own_dtype="float32", parameters=1, cache_values=1, free_cuda_bytes=[],
        free_host_bytes=1,
    )  # fmt: skip


def evaluated(capsys, *arguments):
    """Summary of a run of the command that must succeed."""
    assert command(["evaluate", *map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


# what is measured


@pytest.fixture(scope="module", params=[1, 3, 64])
def measured(request, tiny_checkpoint):
    """Every exercise of a plan, its budgets, and what each of them made of it, with few rows side by side or many."""
    batch = request.param
    planned = plan(tiny_checkpoint, tiny_profile())
    model = load_model(planned.description, placement())
    heads = [variant.heads for variant in planned.variants]
    budgets = [(each, None, "auto") for each in heads]
    read = []
    with (
        mock.patch("kvprofile.evaluate.measurer.SPARE_TOKENS", SPARE),
        mock.patch("kvprofile.evaluate.measurer.score", return_value=0.5),  # so that every budget's answers are written
        simulating(model, planned.description.geometry, heads[0], planned.rule) as simulation,
    ):
        measurer = Measurer(simulation, planned.tokenizer, planned.words, batch, read.append)
        found = [measurer.measure(asked, budgets) for asked in planned.asked]
    assert sum(read) == sum(len(asked.context_ids) + len(heads) * asked.read_tokens for asked in planned.asked)
    return planned, found


@pytest.fixture(scope="module")
def oracle(measured, tiny_checkpoint):
    """Log-probabilities of the naive masked model behind a context, under a budget: [len(ids), V]."""
    rule = measured[0].rule
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32, attn_implementation="eager")

    def log_probs(asked, ids, heads):
        context = list(asked.context_ids)
        logits = masked.logits(model.eval(), [*context, *ids], len(context), heads, *astuple(rule))
        return torch.log_softmax(logits[len(context) :].float(), -1)

    return log_probs


def test_reading_equals_the_naive_masked_model(measured, oracle):
    planned, found = measured
    worst = 0.0
    for asked, outcomes in zip(planned.asked, found, strict=True):
        for row in asked.rows:
            full = oracle(asked, row.ids, planned.variants[0].heads)
            for variant, by_question in zip(planned.variants, outcomes, strict=True):
                theirs = oracle(asked, row.ids, variant.heads)
                for reference in row.references:
                    places = slice(reference.start - 1, reference.start - 1 + len(reference.answer_ids))
                    target = torch.tensor(reference.answer_ids)
                    nll = -theirs[places].gather(-1, target[:, None]).mean().item()
                    choices, first = theirs[places].argmax(-1), full[places].argmax(-1)
                    kl = (full[places].exp() * (full[places] - theirs[places])).sum(-1).mean().item()
                    ours = by_question[reference.question]
                    worst = max(worst, abs(ours.nll - nll), abs(ours.kl - kl))
                    assert ours.tokens_right == (choices == target).sum().item()
                    assert ours.agreement == pytest.approx((choices == first).float().mean().item())
                    assert ours.reference_tokens == len(target)
                    assert ours.exact == bool((choices == target).all())
    print(f"worst difference: {worst:.2e}")
    assert worst < 1e-4


def test_answers_are_what_greedy_decoding_writes(measured, oracle):
    planned, found = measured
    for asked, outcomes in zip(planned.asked[:2], found[:2], strict=True):  # one with rows, one conversation
        for variant, by_question in list(zip(planned.variants, outcomes, strict=True))[1:3]:
            last = len(by_question) - 1
            prompt, outcome = asked.prompt(last), by_question[last]
            ids: list[int] = []
            for _ in range(outcome.reference_tokens + SPARE):
                token = int(oracle(asked, (*prompt, *ids), variant.heads)[-1].argmax())
                if token in planned.words.stop_ids:
                    break
                ids.append(token)
            assert outcome.generated == planned.tokenizer.decode(ids, skip_special_tokens=True)
            assert outcome.generated_tokens == len(ids)


def test_the_full_cache_is_the_measure(measured):
    planned, found = measured
    for asked, outcomes in zip(planned.asked, found, strict=True):
        for outcome in outcomes[0]:
            assert (outcome.kl, outcome.agreement, outcome.retention_realised) == (0.0, 1.0, 1.0)
        count = len(asked.context_ids)
        held = planned.rule.held_tokens(count, count) / count
        for variant, by_question in zip(planned.variants, outcomes, strict=True):
            kept = variant.full_heads / 6
            assert by_question[0].retention_realised == pytest.approx(kept + (1 - kept) * held)


def test_equal_budgets_are_computed_once(tiny_checkpoint, tmp_path):
    planned = plan(tiny_checkpoint, tiny_profile(), EvaluationOptions(**{**vars(OPTIONS), "retentions": (1.0, 0.5)}))
    assert len(planned.variants) == 10  # full, streaming, and four at each retention
    trims = []
    trim = Simulation.trim_each

    def counted(self, budgets, **others):
        trims.extend(budgets)
        trim(self, budgets, **others)

    with mock.patch.object(Simulation, "trim_each", counted):
        evaluation.evaluate(planned, placement(), tmp_path / "run", Silent())
    distinct = len({variant.budget for variant in planned.variants})
    assert len(trims) == distinct * len(planned.asked)
    assert distinct <= 6
    found = Results.load(tmp_path / "run")
    for field in ("nll", "kl", "accuracy"):
        assert (found.column("kvzip@1", field) == found.column("full", field)).all()


@pytest.mark.usefixtures("profile_file")
def test_values_that_are_not_numbers_are_refused(capsys, workplace, checkpoint):
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"][:] = torch.nan
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert command(["evaluate", str(checkpoint), *FAST]) == 2
    assert "probabilities that are not numbers" in capsys.readouterr().err.splitlines()[-1]
    assert not (workplace / "runs").exists()


# records and what is printed


def test_a_run_writes_records_and_prints_one_document(capsys, tiny_checkpoint, profile_file):
    summary = evaluated(capsys, tiny_checkpoint, *FAST, "--plot", "quality.svg", "--output", "out")
    assert profile_file.is_file()
    assert json.loads(Path("out/summary.json").read_text()) == summary
    assert sorted(file.name for file in Path("out").iterdir()) == ["items.jsonl", "run.json", "summary.json"]
    assert [row["name"] for row in summary["rows"]] == [
        "full", "kvzip", "random", "inverted", "uniform", "streaming",
    ]  # fmt: skip
    assert {row["full_heads"] for row in summary["rows"][1:-1]} == {3}
    assert summary["questions"] == 2
    assert summary["settings"]["sink_tokens"] == 4
    assert summary["profiles"][0]["label"] == "kvzip"
    assert any("other weights" in warning for warning in summary["warnings"])
    assert b"<svg" in Path("quality.svg").read_bytes()
    items = read_items(Path("out/items.jsonl"))
    assert len(items) == summary["questions"] * 6
    for item in items:
        assert 0 <= item.accuracy <= 1
        assert item.nll > 0
        assert (item.right is None) == (item.task == "repeat")
        assert item.exact <= (item.right is not False)
        if item.right is not None:
            known = item.variant == "full" or any(
                (each.exercise, each.question, each.variant) == (item.exercise, item.question, "full")
                and each.accuracy > 0
                for each in items
            )
            assert (item.generated is None) == (item.exact or not known)
            assert item.generated is None or item.generated_tokens <= item.reference_tokens + SPARE
            assert known or item.right == item.exact, "nothing is written where the full cache knows nothing"
    told = "".join(Path("out", name).read_text() for name in ("run.json", "items.jsonl", "summary.json"))
    assert str(tiny_checkpoint.parent) not in told
    same_again(capsys, tiny_checkpoint)


def same_again(capsys, checkpoint):
    """The same settings give the same bytes, in a folder of their own, and a finished run needs no weights."""
    assert command(["evaluate", str(checkpoint), *FAST]) == 0
    first = capsys.readouterr()
    (folder,) = Path("runs/evaluate/tiny").iterdir()
    for name in ("items.jsonl", "summary.json", "run.json"):
        assert (folder / name).read_bytes() == Path("out", name).read_bytes()
    assert max(map(len, first.out.splitlines())) <= 80
    assert "agreement %     needle repeat\n" in first.out
    assert "kvzip keeps 99% of the full cache's first choices at no retention" in " ".join(first.out.split())
    with mock.patch.object(evaluation, "load_model", side_effect=AssertionError("nothing is left to measure")):
        assert command(["evaluate", str(checkpoint), *FAST]) == 0
    again = capsys.readouterr()
    assert again.out == first.out
    assert "2 of 2 exercises are finished already" in again.err


@pytest.fixture(scope="module")
def undisturbed(tiny_checkpoint, tmp_path_factory):
    """A plan and the folder of its run."""
    planned = plan(tiny_checkpoint, tiny_profile())
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    with mock.patch("kvprofile.evaluate.measurer.SPARE_TOKENS", SPARE):
        evaluation.evaluate(planned, placement(), folder, Silent())
    return planned, folder


class Stopped(BaseException):
    """A crash in the middle of a run."""


class StopsAfter(Silent):
    """Progress that stops the run after some reads."""

    def __init__(self, reads):
        self.left = reads

    def advance(self, _tokens):
        self.left -= 1
        if self.left == 0:
            raise Stopped


@pytest.mark.parametrize(("reads", "cut"), [(2, 0), (5, 0), (7, 25)])
def test_an_interrupted_run_continues_to_the_same_bytes(undisturbed, tmp_path, reads, cut):
    planned, expected = undisturbed
    folder = tmp_path / "run"
    with pytest.raises(Stopped):
        evaluation.evaluate(planned, placement(), folder, StopsAfter(reads))
    items = folder / "items.jsonl"
    if reads < 4:
        assert not folder.exists(), "nothing was finished, so nothing stays"
    else:
        assert items.stat().st_size
        items.write_bytes(items.read_bytes()[: -cut or None])
    evaluation.evaluate(planned, placement(), folder, Silent())
    for name in ("items.jsonl", "summary.json", "run.json"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes()


def test_without_generation_only_the_reference_counts(undisturbed, tmp_path):
    planned, expected = undisturbed
    exact = replace(planned, options=replace(planned.options, generate=False))
    with mock.patch("kvprofile.evaluate.simulate.Branch.generate", side_effect=AssertionError("nothing is written")):
        evaluation.evaluate(exact, placement(), tmp_path / "run", Silent())
    items, others = (read_items(folder / "items.jsonl") for folder in (tmp_path / "run", expected))
    for item, other in zip(items, others, strict=True):
        assert (item.nll, item.exact) == (other.nll, other.exact)
        assert item.generated is None
        assert item.right == (None if item.task in ("repeat", "continuation") else item.exact)
    with pytest.raises(InputError, match="other settings"):
        evaluation.evaluate(exact, placement(), expected, Silent())


def test_results_can_be_read_by_scripts(tiny_checkpoint, tmp_path):
    profile = tiny_profile()
    other = tiny_profile(scores=random_scores(profile.model.geometry, 5))
    under_test = [Contender("a", profile), Contender("b", other)]
    summary = evaluation.evaluate_checkpoint(str(tiny_checkpoint), under_test, OPTIONS, tmp_path / "run", device="cpu")
    found = Results.load(tmp_path / "run")
    rows = {(row["name"], row["retention"]): row for row in summary["rows"]}
    assert rows["b", 0.5]["against_first"] is not None
    assert rows["a", 0.5]["against_first"] is None
    assert found.accuracy("b@0.5").value == pytest.approx(rows["b", 0.5]["accuracy"]["value"], rel=1e-5)
    assert found.difference("b@0.5", "a@0.5").value == pytest.approx(rows["b", 0.5]["against_first"]["value"], abs=1e-5)
    repeats = found.only(lambda item: item.task == "repeat")
    assert {item.task for item in repeats.questions} == {"repeat"}
    with pytest.raises(InputError, match="not the folder of a finished evaluation"):
        Results.load(tmp_path)


@pytest.mark.usefixtures("profile_file")
def test_other_settings_are_refused_unless_forced(capsys, tiny_checkpoint):
    evaluated(capsys, tiny_checkpoint, *BARE)
    before = Path("out/items.jsonl").read_bytes()
    assert command(["evaluate", str(tiny_checkpoint), *BARE, "--seed", "1"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line == (
        "kvprofile: out holds an evaluation with other settings; pass --force to replace it or another --output"
    )
    assert Path("out/items.jsonl").read_bytes() == before
    evaluated(capsys, tiny_checkpoint, *BARE, "--batch", "1")  # only a matter of memory
    evaluated(capsys, tiny_checkpoint, *BARE, "--seed", "1", "--force")
    assert Path("out/items.jsonl").read_bytes() != before


@pytest.mark.parametrize("changed", ["weights", "profile", "file"])
def test_other_inputs_are_other_settings(capsys, checkpoint, workplace, profile_file, changed):
    own = workplace / "own.jsonl"
    entry = {"context": "Kuvi lives in room 12. " * 9, "questions": [{"text": "Where?", "answer": "room 12"}]}
    own.write_text(json.dumps(entry))
    arguments = [checkpoint, *BARE[2:], "--tasks", own]
    evaluated(capsys, *arguments)
    if changed == "weights":
        save_checkpoint(random_model("llama", seed=1), checkpoint, load_tokenizer(locate(str(checkpoint))))
    elif changed == "profile":
        store.save(tiny_profile(scores=[[0.1, 0.9]] * 3), profile_file)
    else:
        own.write_text(json.dumps({**entry, "questions": [{"text": "Where?", "answer": "room 13"}]}))
    assert command(["evaluate", *map(str, arguments)]) == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.usefixtures("profile_file")
def test_only_outside(capsys, tiny_checkpoint):
    sizes = ["--context-tokens", "240", "--sink-tokens", "72"]  # beside 70 tokens
    tasks = ["--tasks", "multi_key", "--tasks", "repeat", "--tasks", "persona"]
    summary = evaluated(capsys, tiny_checkpoint, *BARE[2:], *sizes, *tasks, "--only-outside")
    assert summary["questions_outside"] == summary["questions_with_known_evidence"] > 0
    assert "persona" not in summary["rows"][0]["by_task"], "its guide lies within the sinks"
    assert any("persona: 2 of 2 contexts are left out" in warning for warning in summary["warnings"])
    assert summary["rows"][0]["by_task"]["repeat"]["questions"] == 2, "what has no place is asked"


def test_exercises_and_profiles_of_ones_own(capsys, tiny_checkpoint, workplace, profile_file):
    written = foreign.written(tiny_profile(), "duo-attention", workplace)
    store.save(foreign.read_back(tiny_profile(), "duo-attention", written), workplace / "duo.json")
    long = {"context": "word " * 6000, "questions": [{"text": "?", "answer": "word"}]}
    short = {"context": "Kuvi lives in room 12. " * 9, "questions": [{"text": "Where?", "answer": "room 12"}]}
    (workplace / "own.jsonl").write_text(f"{json.dumps(short)}\n{json.dumps(long)}\n{json.dumps(short)}")
    summary = evaluated(
        capsys, tiny_checkpoint, "--tasks", "own.jsonl", "--contexts", 3, "--retention", "0.5", "--no-controls",
        "--profile", profile_file, "--profile", "duo.json", "--output", "out",
    )  # fmt: skip
    assert [row["name"] for row in summary["rows"]] == ["full", "kvzip", "duo-attention"]
    assert summary["questions"] == 2
    assert any(w.startswith("own.jsonl: 1 of 3 documents are left out, max_position") for w in summary["warnings"])
    assert any("duo-attention was imported" in warning for warning in summary["warnings"])
    assert summary["rows"][0]["by_length"]["files"]["questions"] == 2
    assert read_items(Path("out/items.jsonl"))[0].length is None


# what is refused


def refused(capsys, workplace, arguments):
    """Run `kvprofile evaluate`; returns the one line it ends with, having written nothing."""
    before = sorted(workplace.rglob("*"))
    code = command(["evaluate", *map(str, arguments)])
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("kvprofile: ")
    assert sorted(workplace.rglob("*")) == before
    return lines[0]


@pytest.mark.usefixtures("profile_file")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "nothing"], "no task 'nothing'; give a .jsonl file, datasets:ID_OR_PATH or one of needle"),
        (["--tasks", "datasets:./none"], "cannot load the data set"),
        (["--retention", "0"], "retention 0 is outside (0, 1]"),
        (["--retention", "nan"], "Invalid value for '--retention'"),
        (["--retention", "1.5"], "Invalid value for '--retention'"),
        (["--context-tokens", "0"], "--context-tokens must lie between 1 and 1,000,000, not 0"),
        (["--context-tokens", "5000"], "needle/5000/0 needs 5,"),
        (["--contexts", "0"], "--contexts must lie between 1"),
        (["--questions", "0"], "--questions must lie between 1"),
        (["--block-tokens", "0"], "--block-tokens must lie between 1"),
        (["--sink-tokens", "-1"], "--sink-tokens must lie between 0"),
        (["--recent-tokens", "0"], "--recent-tokens must lie between 1"),
        (["--random-seeds", "-1"], "--random-seeds must lie between 0"),
        (["--batch", "0"], "--batch must lie between 1"),
        (["--seed", "-1"], "--seed must lie between 0"),
        (["--statistic", "mean"], "has no statistic mean; it has max"),
        (["--profile", "none.json"], "no budget file none.json"),
        (["--plot", "picture.pdf"], "its name must end in .png or .svg"),
        (["--plot", "/proc/none/picture.png"], "cannot write /proc/none/picture.png"),
        (["--output", "/proc/none/out"], "cannot write /proc/none/out"),
        (["--dtype", "int3"], "unknown dtype 'int3'"),
        (["--device", "abacus"], "unknown device 'abacus'"),
        (["--revision", "main"], "is a folder and has no revisions"),
        (["--only-outside", "--recent-tokens", "900", "--tasks", "persona"], "no exercise is left"),
        (["--wrong-flag", "1"], "No such option"),
    ],
)
def test_flag_values(capsys, workplace, tiny_checkpoint, flags, message):
    arguments = [*FAST[4:], *flags] if "persona" in flags else [*FAST, *flags]
    code = command(["evaluate", str(tiny_checkpoint), *arguments])
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.out == ""
    line = captured.err.strip().splitlines()[-1]
    assert line.startswith("kvprofile: ")
    assert message in line
    assert not (workplace / "runs").exists()


def test_models_and_profiles_that_do_not_fit(capsys, workplace, tiny_checkpoint, tmp_path, tokenizer):
    assert "no checkpoint folder ./nowhere" in refused(capsys, workplace, ["./nowhere", *FAST])
    line = refused(capsys, workplace, [tiny_checkpoint, *FAST])
    assert "no budget file models/kv_budget/tiny.json; run 'kvprofile score" in line
    store.save(make_profile(4, 2, head_size=16), tmp_path / "other.json")
    line = refused(capsys, workplace, [tiny_checkpoint, *FAST, "--profile", tmp_path / "other.json"])
    assert "the profile kvzip belongs to example/model, 4 layers x 2 KV heads" in line
    assert "the model has 3 layers x 2 KV heads" in line
    store.save(tiny_profile(), tmp_path / "tiny.json")
    foreign_tokenizer = save_checkpoint(random_model("llama", vocab_size=300), tmp_path / "small", tokenizer)
    line = refused(capsys, workplace, [foreign_tokenizer, *FAST, "--profile", tmp_path / "tiny.json"])
    assert "the model has 300 embeddings; it belongs to another model" in line


@pytest.mark.usefixtures("profile_file")
def test_two_files_of_one_name(capsys, workplace, tiny_checkpoint):
    line = json.dumps({"context": "a b c", "questions": [{"text": "?", "answer": "a"}]})
    for folder in ("one", "two"):
        (workplace / folder).mkdir()
        (workplace / folder / "own.jsonl").write_text(line)
    arguments = [tiny_checkpoint, "--tasks", "one/own.jsonl", "--tasks", "two/own.jsonl"]
    assert "two sources of tasks are called own.jsonl" in refused(capsys, workplace, arguments)


def test_a_full_disk_keeps_what_is_finished(undisturbed, tmp_path):
    planned, expected = undisturbed
    append, calls = ItemStore.append, []

    def full(self, items):
        calls.append(items)
        if len(calls) == 3:
            with open(self.path, "ab") as stream:  # half of an exercise, as a full disk leaves it
                stream.write("".join(item.to_line() for item in items).encode()[:700])
            raise InputError("cannot write")
        append(self, items)

    with mock.patch.object(ItemStore, "append", full), pytest.raises(InputError, match="cannot write"):
        evaluation.evaluate(planned, placement(), tmp_path / "run", Silent())
    evaluation.evaluate(planned, placement(), tmp_path / "run", Silent())
    assert (tmp_path / "run/items.jsonl").read_bytes() == (expected / "items.jsonl").read_bytes()


# the bundled checkpoint


def test_the_bundled_checkpoint_finds_needles(tmp_path):
    """Whatever its weights are by now: the full cache answers best, and no head at all answers worst."""
    checkpoint = shutil.copytree(POCKET, tmp_path / "pocket")
    geometry = describe(locate(str(checkpoint))).geometry
    profile = make_profile(
        geometry.layers, geometry.kv_heads, query_groups=geometry.attention_heads // geometry.kv_heads,
        head_size=geometry.head_size, sink_tokens=16, recent_tokens=64,
    )  # fmt: skip
    options = EvaluationOptions(
        retentions=(0.5,), tasks=("needle",), context_tokens=(300,), contexts=3, questions=4, random_seeds=1,
        only_outside=True,
    )  # fmt: skip
    summary = evaluation.evaluate_checkpoint(
        str(checkpoint), [Contender("made up", profile)], options, tmp_path / "run"
    )
    rows = {row["name"]: row for row in summary["rows"]}
    best = rows["full"]["accuracy"]["value"]
    assert best >= 0.8
    assert all(row["accuracy"]["value"] <= best for row in rows.values())
    assert rows["streaming"]["accuracy"]["value"] <= best - 0.5
    assert rows["streaming"]["loss_rise"]["low"] > 0
    assert rows["streaming"]["kl"]["low"] > 0
    assert rows["streaming"]["retention_realised"] < rows["uniform"]["retention_realised"] < 1
