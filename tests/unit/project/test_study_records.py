"""What the studies on the pretrained model measured: records that survive the file, and pages made from them alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace

import pytest

from kvprofile.errors import InputError
from kvprofile.evaluate.item_store import ITEMS, RUN, SUMMARY, AnswerSpan
from kvprofile.evaluate.summary import Results
from kvprofile.evaluate.variants import Contender, build
from scripts import graded_study, real_study, study_records
from scripts.study_records import Records, collect, is_known, path_of
from tests.helpers.evaluations import ITEM
from tests.helpers.factories import make_profile

SPANS = (AnswerSpan(1, 64, 60, 0.5, 0.75, 0.123456), AnswerSpan(65, 70, 3, 0.25, 0.5, 1e-7))


def finished(folder, name, questions=2, spans=None, **changes):
    """The folder of a finished evaluation of one context, and its name in the study."""
    profile = make_profile()
    variants = build([Contender("kvzip", profile)], profile.model.geometry, [0.5], random_seeds=1)
    task, length, _ = name.split("/")
    tokens = {"reference_tokens": 70, "tokens_right": 63, "right": None, "accuracy": 0.9, "exact": False}
    items = []
    for question in range(questions):
        for variant in variants:
            mine = {"agreement": 1.0} if variant.name == "full" else {"agreement": 6 / 7, "kl": 0.0123456}
            item = replace(ITEM, task=task, length=int(length), question=question, variant=variant.key, **mine)
            item = replace(item, **tokens, agreement=1.0, spans=spans) if spans else item
            items.append(replace(item, depth=0.1 + 0.5 * question, generated_tokens=None, **changes))
    folder.mkdir(parents=True)
    (folder / RUN).write_text(json.dumps({"variants": [asdict(variant) for variant in variants]}))
    (folder / ITEMS).write_text("".join(item.to_line() for item in items))
    (folder / SUMMARY).write_text("{}")
    return name, folder


def test_records_give_back_what_was_measured(tmp_path):
    path = path_of(tmp_path, "model", "part")
    runs = [finished(tmp_path / f"runs/needle-300-{each}-abc", f"needle/300/{each}") for each in (1, 0)]
    results = collect(path, runs)
    written = path.read_bytes()
    assert [json.loads(line).get("context") for line in written.splitlines()] == [None, "needle/300/1", "needle/300/0"]
    assert [item.exercise for item in results.questions] == ["needle/300/1"] * 2 + ["needle/300/0"] * 2
    kvzip = results.items["kvzip@0.5"][0][1]
    assert replace(kvzip, nll=ITEM.nll) == replace(
        ITEM, exercise="needle/300/1", question=1, variant="kvzip@0.5", depth=0.6, agreement=6 / 7, kl=0.012346,
        generated_tokens=None,
    )  # fmt: skip
    assert kvzip.nll == 0.12346
    assert next(each for each in results.variants if each.name == "kvzip").full_heads == 12
    # without the folders nothing changes, and the order of the part's contexts decides
    shutil.rmtree(tmp_path / "runs")
    assert collect(path, runs).items == results.items
    assert path.read_bytes() == written == Records.load(path).to_bytes()
    collect(path, runs[::-1])
    assert path.read_bytes() != written
    collect(path, runs)
    assert path.read_bytes() == written


def test_spans_of_continued_texts_are_kept(tmp_path):
    runs = [finished(tmp_path / "continuation-300-0-abc", "continuation/300/0", questions=1, spans=SPANS)]
    results = collect(tmp_path / "part.jsonl", runs)
    item = results.items["kvzip@0.5"][0][0]
    assert item.spans == (replace(SPANS[0], kl=0.12346), SPANS[1])
    assert (item.right, item.exact, item.accuracy) == (None, False, 0.9)


def test_what_other_settings_measured_does_not_count(tmp_path):
    path = tmp_path / "part.jsonl"
    runs = [finished(tmp_path / f"needle-300-{each}-abc", f"needle/300/{each}") for each in (0, 1)]
    collect(path, runs)
    written = path.read_bytes()
    stale = [(name, tmp_path / f"{folder.name[:-3]}fff") for name, folder in runs]
    records = Records.load(path)
    assert [is_known(records, *each) for each in (*runs, *stale)] == [True, True, False, False]
    assert collect(path, stale) is None
    assert path.read_bytes() == written  # nothing to put in its place
    assert len(collect(path, [runs[0], stale[1]]).questions) == 2
    assert len(Records.load(path).contexts) == 1
    assert collect(tmp_path / "none.jsonl", stale) is None
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize(
    "broken",
    ["", "{}", "3", '{"context": "needle/300/0"', "kl", "reference_tokens"],
)
def test_a_broken_line_is_told_in_one_line(tmp_path, broken):
    path = tmp_path / "part.jsonl"
    collect(path, [finished(tmp_path / f"needle-300-{each}-abc", f"needle/300/{each}") for each in (0, 1)])
    first, second, third = path.read_text().splitlines()
    line = json.loads(third)
    if broken in line:
        line[broken] = line[broken][:-1] if broken == "kl" else [7]
        broken = json.dumps(line)
    path.write_text("\n".join([first, second, broken, ""]))
    with pytest.raises(InputError, match=r"part\.jsonl: line 3 is not a record of a study's answers") as found:
        Records.load(path)
    assert "\n" not in str(found.value)
    path.write_text("\n".join([broken, second]))
    with pytest.raises(InputError, match="line 1 is not a record"):
        Records.load(path)


def test_what_a_record_cannot_say_is_refused(tmp_path):
    written = [finished(tmp_path / "needle-300-0-abc", "needle/300/0", generated="no", right=False)]
    with pytest.raises(InputError, match="holds more than a record can say of full, question 0"):
        collect(tmp_path / "part.jsonl", written)
    assert not (tmp_path / "part.jsonl").exists()


def test_budgets_that_are_not_the_recorded_ones_are_told(tmp_path):
    path = tmp_path / "part.jsonl"
    runs = [finished(tmp_path / f"needle-300-{each}-abc", f"needle/300/{each}") for each in (0, 1)]
    collect(path, runs[:1])
    run = json.loads((runs[1][1] / RUN).read_text())
    run["variants"][1]["tokens"] = "probe"
    (runs[1][1] / RUN).write_text(json.dumps(run))
    with pytest.raises(InputError, match=r"needle-300-1-abc has other budgets than .*part\.jsonl"):
        collect(path, runs)
    assert len(Records.load(path).contexts) == 1


@pytest.mark.parametrize("study", [real_study, graded_study], ids=("whole", "graded"))
def test_what_was_asked_is_not_asked_again_without_its_folder(tmp_path, monkeypatch, study):
    part = real_study.MAIN if study is real_study else graded_study.QUESTIONS
    asked = []

    def evaluated(_model, _contenders, options, folder, **_settings):
        asked.append(folder.name)
        finished(folder, f"{options.tasks[0]}/{options.context_tokens[0]}/0")

    def ask(first, **share):
        study.ask([part], tmp_path / "runs", tmp_path, minutes=1e9, first=first, **share)
        asked_now, asked[:] = list(asked), []
        return asked_now

    monkeypatch.setattr(study, "evaluate_checkpoint", evaluated)
    whole = {} if study is real_study else {"share": (1, 1)}
    assert len(ask(2, **whole)) == 2
    assert ask(2, **whole) == []
    assert len(study.finished(part, tmp_path / "runs", tmp_path).questions) == 4
    shutil.rmtree(tmp_path / "runs")
    assert ask(2, **whole) == []
    if study is graded_study:
        second, first = ask(4, share=(2, 2)), ask(4, share=(1, 2))
        assert len({*second, *first}) == 2
    else:
        assert len(ask(4)) == 2
    assert len(study.finished(part, tmp_path / "runs", tmp_path).questions) == 8


def test_a_study_without_records_or_folders_writes_nothing(tmp_path):
    for study in (real_study, graded_study):
        study.write_page(tmp_path / "runs", tmp_path / "studies", tmp_path / "README.md")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("study", "part", "pages"),
    [
        (real_study, real_study.MAIN, ("real-model.md", "data/real-model.json")),
        (graded_study, graded_study.QUESTIONS, ("graded-budgets.md", "data/graded-budgets.json")),
    ],
    ids=("whole", "graded"),
)
def test_committed_pages_are_what_committed_records_give(tmp_path, study, part, pages):
    if not study.records_of(part, real_study.PAGES).is_file():
        pytest.skip("no records were committed yet")
    records = path_of(real_study.PAGES, real_study.real_model.NAME, "").parent
    shutil.copytree(records, path_of(tmp_path, real_study.real_model.NAME, "").parent)
    readme = real_study.ROOT / "README.md"
    (tmp_path / "README.md").write_bytes(readme.read_bytes())
    study.write_page(tmp_path / "runs", tmp_path, tmp_path / "README.md")
    for name in pages:
        assert (tmp_path / name).read_text() == (real_study.PAGES / name).read_text(), name
    assert (tmp_path / "README.md").read_text() == readme.read_text()
    for file in records.iterdir():
        again = study_records.path_of(tmp_path, real_study.real_model.NAME, file.stem)
        assert again.read_bytes() == file.read_bytes(), file.name


def test_a_ranking_for_each_retention_is_chosen_on_the_other_half():
    """Contexts 0 and 2 choose for 1 and 3, and the other way round; who is best where it is measured does not count."""
    profile = make_profile()
    contenders = [Contender("kvzip", profile), Contender("mean", make_profile(seed=1))]
    variants = build(contenders, profile.model.geometry, [0.5], controls=False)
    kl = {"full": (0.0,) * 4, "kvzip": (0.2, 0.5, 0.2, 0.5), "mean": (0.1, 0.9, 0.1, 0.9)}  # by context
    items = [
        replace(ITEM, exercise=f"needle/300/{number}", question=0, variant=variant.key, kl=kl[variant.name][number])
        for variant in variants
        for number in range(4)
    ]
    (found,) = real_study.for_each_retention(Results.of(items, variants), ["kvzip", "mean"], [0.5])
    assert found["chosen"] == ["kvzip", "mean"]  # even contexts are judged by odd ones, where kvzip is nearer
    assert found["kl"][0] == pytest.approx((0.2 + 0.9) / 2)
    assert found["kl_less_kvzip"][0] == pytest.approx(0.2)
