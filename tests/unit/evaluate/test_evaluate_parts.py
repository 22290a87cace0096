"""The parts of an evaluation that need no model: budgets compared, questions as ids, records, figures and pictures."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprofile.budget.allocate import full_head_count
from kvprofile.budget.trim import TrimRule
from kvprofile.errors import InputError
from kvprofile.evaluate import encoding
from kvprofile.evaluate.item_store import Item, ItemStore, read_items
from kvprofile.evaluate.summary import Results, summarise
from kvprofile.evaluate.variants import Contender, build, contenders
from kvprofile.questions import user_tasks
from kvprofile.questions.judge import is_right
from kvprofile.questions.tasks import Question, exercise
from kvprofile.report import quality_plot
from tests.helpers import foreign
from tests.helpers.factories import make_geometry, make_profile

# variants


def full_places(variant):
    return {(layer, head) for layer, row in enumerate(variant.heads) for head, value in enumerate(row) if value == 1.0}


def by_key(variants):
    return {variant.key: variant for variant in variants}


def test_the_table_of_variants():
    profile = make_profile(6, 4, sliding=(1, 4))
    variants = build([Contender("kvzip", profile)], profile.model.geometry, [0.5, 0.25, 0.5], random_seeds=2)
    assert [variant.key for variant in variants] == [
        "full",
        *(f"{name}@{r}" for r in ("0.5", "0.25") for name in ("kvzip", "random-0", "random-1", "inverted", "uniform")),
        "streaming",
    ]
    assert [variant.row for variant in variants][2:4] == ["random@0.5", "random@0.5"]
    for variant in variants:
        expected = 16 if variant.kind == "full" else full_head_count(variant.retention, 16) if variant.retention else 0
        assert variant.full_heads == expected
        assert [row[0] is None for row in variant.heads] == [False, True, False, False, True, False]
    found = by_key(variants)
    assert full_places(found["kvzip@0.25"]) < full_places(found["kvzip@0.5"])
    assert full_places(found["random-1@0.25"]) < full_places(found["random-1@0.5"])
    assert full_places(found["random-0@0.5"]) != full_places(found["random-1@0.5"])
    assert not full_places(found["inverted@0.5"]) & full_places(found["kvzip@0.5"])
    bare = build([Contender("kvzip", profile)], profile.model.geometry, [0.5], controls=False)
    assert [variant.key for variant in bare] == ["full", "kvzip@0.5"]


def test_inverted_heads_are_the_other_half_even_among_equals():
    profile = make_profile(4, 4, scores=[[0.5] * 4] * 4)
    found = by_key(build([Contender("a", profile)], profile.model.geometry, [0.5]))
    assert full_places(found["a@0.5"]) | full_places(found["inverted@0.5"]) == full_places(found["full"])


@given(st.integers(0, 50), st.integers(1, 6), st.integers(1, 5), st.floats(0.05, 1.0))
def test_uniform_heads_are_even_and_the_best_of_their_layer(seed, layers, kv_heads, retention):
    profile = make_profile(layers, kv_heads, seed=seed)
    under_test = Contender("a", profile)
    variants = build([under_test], profile.model.geometry, [retention], random_seeds=0)
    uniform = next(variant for variant in variants if variant.kind == "uniform")
    counts = [sum(value == 1.0 for value in row) for row in uniform.heads]
    assert max(counts) - min(counts) <= 1
    order = under_test.order()
    for layer, count in enumerate(counts):
        best = [place for place in order if place[0] == layer][:count]
        assert set(best) == {place for place in full_places(uniform) if place[0] == layer}


def test_labels():
    kvzip, duo = make_profile(), make_profile(method="duo-attention")
    assert [c.label for c in contenders([(Path("a.json"), kvzip), (Path("b.json"), duo)])] == ["kvzip", "duo-attention"]
    assert [c.label for c in contenders([(Path("a.json"), kvzip), (Path("b.json"), kvzip)])] == ["a", "b"]
    assert [c.label for c in contenders([(Path("a.json"), kvzip), (Path("x/a.json"), kvzip)])] == ["a 1", "a 2"]
    named = make_profile(method="random")
    assert [c.label for c in contenders([(Path("full.json"), named)])] == ["full 1"]


def test_profiles_that_cannot_be_compared():
    profile = make_profile()
    with pytest.raises(InputError, match="the profile a belongs to example/model, 6 layers x 4 KV heads"):
        build([Contender("a", profile)], make_geometry(6, 2), [0.5])
    with pytest.raises(InputError, match="has no statistic mean; it has max"):
        build([Contender("a", profile, "mean")], profile.model.geometry, [0.5])
    with pytest.raises(InputError, match="outside"):
        build([Contender("a", profile)], profile.model.geometry, [float("nan")])
    graded = [[0.5, *row[1:]] for row in profile.budgets["0.5"].heads]
    kept = sum(map(sum, graded)) / 24
    budgets = profile.budgets["0.5"].model_copy(update={"heads": graded, "retention_realised": kept})
    odd = profile.model_copy(update={"budgets": {"0.5": budgets}})
    with pytest.raises(InputError, match="but only whole heads can be served"):
        build([Contender("a", odd)], profile.model.geometry, [0.5])


def test_a_runtime_file_has_one_budget_and_no_ranking(tmp_path):
    profile = make_profile()
    written = foreign.written(profile, "vllm", tmp_path, retention=0.4)
    stated = foreign.read_back(profile, "vllm", written)
    found = build([Contender("a", stated)], profile.model.geometry, [0.4], random_seeds=1)
    assert [variant.key for variant in found] == ["full", "a@0.4", "random-0@0.4", "streaming"]
    assert found[1].full_heads == found[2].full_heads == 10
    with pytest.raises(InputError, match=r"only retention 0\.4 is known"):
        build([Contender("a", stated)], profile.model.geometry, [0.5])


def test_another_statistic_ranks_other_heads():
    mean = [[0.001 * (layer + head) for head in range(4)] for layer in range(6)]
    profile = make_profile(mean=mean)
    own, other = (build([Contender("a", profile, s)], profile.model.geometry, [0.3])[1] for s in (None, "mean"))
    assert full_places(other) >= {(5, 3), (5, 2), (4, 3)}
    assert full_places(own) != full_places(other)


# questions as ids

RULE = TrimRule(16, 64)


@pytest.fixture(scope="module")
def words(tokenizer, tmp_path_factory):
    return encoding.wording(tokenizer, SimpleNamespace(eos_token_id=3), tmp_path_factory.mktemp("none"))


def asked_exercise(task, tokenizer, words, rule=RULE, length=300, seed=0, questions=6):
    made = exercise(task, "test", seed, length, questions, lambda text: len(encoding.encode(tokenizer, text)))
    return encoding.ask(f"{task}/{seed}", made, length, tokenizer, words, rule)


def test_questions_follow_the_context(tokenizer, words):
    asked = asked_exercise("needle", tokenizer, words)
    assert tokenizer.decode(asked.context_ids) == f"<|user|>\n{asked.exercise.context}"
    assert len(asked.rows) == len(asked.exercise.questions)
    for number, question in enumerate(asked.exercise.questions):
        (row,) = [row for row in asked.rows if row.references[0].question == number]
        assert tokenizer.decode(row.ids) == f"\n\n{question.text}\n<|assistant|>\n{question.answer}"
        reference = row.references[0]
        assert tokenizer.decode(reference.answer_ids) == f"{question.answer}<|end|>"
        assert row.ids[reference.start :] == reference.answer_ids[:-1]
        assert asked.prompt(number) == row.ids[: reference.start]


def test_a_conversation_is_what_the_template_renders(tokenizer, words):
    asked = asked_exercise("multi_turn", tokenizer, words, questions=3)
    (row,) = asked.rows
    first, second, third = asked.exercise.questions
    messages = [
        {"role": "user", "content": f"{asked.exercise.context}\n\n{first.text}"},
        {"role": "assistant", "content": first.answer},
        {"role": "user", "content": second.text},
        {"role": "assistant", "content": second.answer},
        {"role": "user", "content": third.text},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode((*asked.context_ids, *row.ids)) == rendered + third.answer
    assert asked.prompt(2) == row.ids[: row.references[2].start]
    for reference in row.references[:2]:  # what a read predicts at these places is the answer and its end
        assert row.ids[reference.start : reference.start + len(reference.answer_ids)] == reference.answer_ids


CHATML = (
    "{% for m in messages %}<|user|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ONE_TURN = "{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}<|user|>{{ messages[0].content }}"


@pytest.mark.parametrize(
    ("template", "eos", "end", "between"),
    [
        (CHATML, 3, "<|end|>", "<|end|>\n<|user|>user\n"),
        (CHATML, 0, "<|end|>", "<|end|>\n<|user|>user\n"),  # the tokenizer's end is another token than a turn's
        (ONE_TURN, 3, "<|end|>", "\n\n"),
        (None, 3, "<|end|>", "\n\n"),
        (None, None, "", "\n\n"),
    ],
)
def test_the_end_of_a_turn_comes_from_the_template(tokenizer, tmp_path, template, eos, end, between):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    other.eos_token = None if eos is None else other.convert_ids_to_tokens(eos)
    if eos == 0:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 3]}))
    words = encoding.wording(other, SimpleNamespace(eos_token_id=None), tmp_path)
    assert other.decode(words.end_ids) == end
    assert other.decode(words.next_ids) == between
    assert set(words.end_ids) <= words.stop_ids
    assert words.stop_ids == ({0, 3} if eos == 0 else {eos} if eos is not None else set())
    asked = asked_exercise("multi_turn", other, words, questions=2)
    (row,) = asked.rows
    first = row.references[0]
    assert (
        row.ids[first.start : first.start + len(first.answer_ids) - len(words.end_ids)]
        == (first.answer_ids[: len(first.answer_ids) - len(words.end_ids)])
    )
    last = row.references[-1]  # logits at every place but the last predict an answer token
    assert len(row.ids) == last.start + len(last.answer_ids) - 1


@given(st.integers(0, 1000), st.sampled_from(("needle", "variables", "functions", "persona", "multi_value")))
def test_outside_means_that_no_trimmed_head_sees_the_evidence(tokenizer, words, seed, task):
    rule = TrimRule(20, 50, 8)
    asked = asked_exercise(task, tokenizer, words, rule, seed=seed)
    ids, prefix = asked.context_ids, len(words.frame.prefix_ids)
    ends = [len(tokenizer.decode(ids[prefix:stop])) for stop in range(prefix, len(ids) + 1)]
    for question, outside, depth in zip(asked.exercise.questions, asked.outside, asked.depths, strict=True):
        seen = {
            rule.sees(len(ids), prefix + token)
            for start, stop in question.evidence
            for token in range(len(ids) - prefix)
            if ends[token] < stop and ends[token + 1] > start
        }
        assert outside == (seen == {False})
        assert 0 <= depth <= 1


def test_places_without_offsets_are_a_little_wider(tokenizer, words):
    class Slow:
        """The same tokenizer, which gives no offsets."""

        is_fast = False

        def __call__(self, *arguments, **options):
            return tokenizer(*arguments, **options)

    fast, slow = (asked_exercise("needle", each, words, TrimRule(16, 64, 8)) for each in (tokenizer, Slow()))
    assert fast.context_ids == slow.context_ids
    assert slow.depths == pytest.approx(fast.depths, abs=0.01)
    assert all(not ours or theirs for ours, theirs in zip(slow.outside, fast.outside, strict=True))


def test_what_is_asked_back_has_no_place(tokenizer, words):
    asked = asked_exercise("repeat", tokenizer, words)
    assert (asked.outside, asked.depths) == ((None,), (None,))
    assert asked.positions == len(asked.context_ids) + len(asked.rows[0].ids)


@pytest.mark.parametrize(
    ("expected", "answer", "right"),
    [
        (("2415",), "It is 2415.", True),
        (("2415",), "Kuvi=2415", True),
        (("2415",), "24157", False),
        (("2415",), "12415", False),
        (("2415", "17"), "17 and 2415", True),
        (("2415", "17"), "2415", False),
        (("short sentences",), "Short\n sentences, please", True),
        (("[Kuvi]",), "[kuvi]", True),
        (("北京",), "在北京市", True),
        (("a.c",), "abc", False),
    ],
)
def test_right_answers(expected, answer, right):
    assert is_right(Question("?", expected[0], expected, ()), answer) == right
    if len(expected) == 2:
        assert is_right(Question("?", expected[0], expected, (), any_of=True), answer)


# records

ITEM = Item(
    exercise="needle/300/0", task="needle", length=300, question=0, variant="full", context_tokens=310, depth=0.25,
    outside=True, retention_realised=1.0, reference_tokens=7, tokens_right=7, exact=True, right=True, accuracy=1.0,
    nll=0.123456789, agreement=1.0, kl=0.0, generated=None, generated_tokens=6,
)  # fmt: skip


def lines(exercises):
    return [replace(ITEM, exercise=name, question=number) for name, count in exercises for number in range(count)]


def test_items_survive_the_file(tmp_path):
    odd = replace(ITEM, generated='line\nbreak "ü" \u2028', right=None, depth=None, length=None)
    store = ItemStore(tmp_path / "run", "key")
    assert store.open({}, [("needle/300/0", 2)]) == 0
    store.append([ITEM, odd])
    assert store.items() == [replace(ITEM, nll=0.123457), replace(odd, nll=0.123457)]
    assert ITEM.length_inflation == 1.0
    (tmp_path / "bad.jsonl").write_text(ITEM.to_line() + "{}\n")
    with pytest.raises(InputError, match="line 2 is no item"):
        read_items(tmp_path / "bad.jsonl")


PLAN = [("a", 2), ("b", 3), ("c", 2)]


@pytest.mark.parametrize(
    ("kept", "finished"), [(0, 0), (1, 0), (2, 1), (4, 1), (4.5, 1), (5, 2), (6.5, 2), (7, 3)], ids=str
)
def test_only_whole_exercises_count(tmp_path, kept, finished):
    store = ItemStore(tmp_path / "run", "key")
    store.open({}, PLAN)
    written = [item.to_line() for item in lines(PLAN)]
    whole = int(kept)
    cut = written[whole][:40] if kept > whole else ""
    store.path.write_text("".join(written[:whole]) + cut)
    again = ItemStore(tmp_path / "run", "key")
    assert again.open({}, PLAN) == finished
    assert store.path.read_text() == "".join(written[: sum(count for _, count in PLAN[:finished])])


def test_other_settings_and_other_folders_are_left_alone(tmp_path):
    folder = tmp_path / "run"
    store = ItemStore(folder, "key")
    store.open({"note": 1}, PLAN)
    store.append(lines(PLAN[:1]))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(InputError, match="other settings; pass --force"):
        ItemStore(folder, "another").open({}, PLAN)
    store.path.write_bytes(b"")  # begun, without an item: who is refused takes nothing away
    with pytest.raises(InputError, match="other settings"), ItemStore(folder, "another").opened({}, PLAN):
        pass
    assert {file.name for file in folder.iterdir()} == before.keys()
    store.append(lines(PLAN[:1]))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert ItemStore(folder, "another").open({}, PLAN, force=True) == 0
    assert store.path.read_bytes() == b""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "items.jsonl").write_text("mine")
    for force in (False, True):
        with pytest.raises(InputError, match="is not an evaluation's folder"):
            ItemStore(precious, "key").open({}, PLAN, force)
    assert (precious / "items.jsonl").read_text() == "mine"


def test_an_empty_record_leaves_nothing_behind(tmp_path):
    store = ItemStore(tmp_path / "deep" / "run", "key")
    with suppress(KeyError), store.opened({}, PLAN):
        assert store.path.is_file()
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with suppress(KeyError), store.opened({}, PLAN):
        store.append(lines(PLAN[:1]))
        raise KeyError
    assert len(store.items()) == 2


# what people bring


def test_a_file_of_exercises(tmp_path):
    file = tmp_path / "mine.jsonl"
    entries = [
        {
            "context": "Kuvi lives in room 12.",
            "questions": [
                {"text": "Where?", "answer": "Room 12", "expected": ["12"], "evidence": [[0, 22]]},
                {"text": "Who?", "answer": "Kuvi"},
                {"text": "Left out?", "answer": "yes"},
            ],
        },
        {"context": "B", "conversation": True, "questions": [{"text": "C?", "answer": "D", "any_of": True}]},
        {"context": "E", "questions": [{"text": "F?", "answer": "G"}]},
    ]
    file.write_text("\n\n".join(json.dumps(entry) for entry in entries))
    name, found = user_tasks.load(str(file), 2, 2)
    assert name == "mine.jsonl"
    assert [(each.task, each.conversation, len(each.questions)) for each in found] == [
        ("mine.jsonl", False, 2),
        ("mine.jsonl", True, 1),
    ]
    assert found[0].questions[0] == Question("Where?", "Room 12", ("12",), ((0, 22),))
    assert found[0].questions[1].expected == ("Kuvi",)
    assert found[1].questions[0].any_of


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no exercises"),
        ("nothing", "line 1 is not JSON"),
        ("[" * 100_000, "line 1 is not JSON"),
        ("[]", 'has no "questions"'),
        ('{"context": "a", "questions": []}', 'has no "questions"'),
        ('{"context": "a", "questions": [1]}', "a question is no object"),
        ('{"questions": [{"text": "b", "answer": "c"}]}', "has no context"),
        ('{"context": "a", "questions": [{"text": "b"}]}', "has no answer"),
        ('{"context": "a", "questions": [{"answer": "b"}]}', "has no text"),
        ('{"context": "a", "questions": [{"text": "b", "answer": " "}]}', "has no answer"),
        ('{"context": "a", "questions": [{"text": "b", "answer": "\\ud800"}]}', "half a surrogate pair"),
        ('{"context": "a", "questions": [{"text": "b", "answer": "c", "expected": []}]}', '"expected" is no list'),
        ('{"context": "a", "questions": [{"text": "b", "answer": "c", "evidence": [[0, 9]]}]}', "within the context"),
        ('{"context": "a", "questions": [{"text": "b", "answer": "c", "evidence": 1}]}', "within the context"),
    ],
)
def test_files_that_are_none(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        user_tasks.load(str(tmp_path / "bad.jsonl"), 5, 5)


def test_references_that_lead_nowhere(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"context": "\xe4"}')
    for reference, message in [
        ("nothing", r"no task 'nothing'; give a \.jsonl file"),
        (str(tmp_path), "no task"),
        ("x" * 5000, "no task|cannot look for tasks"),
        (str(tmp_path / "latin.jsonl"), "is not UTF-8"),
        ("datasets:", "use datasets:ID_OR_PATH"),
        ("datasets:a:b:c:d", "use datasets:ID_OR_PATH"),
        ("datasets:no/such-data", "cannot load the data set"),
    ]:
        with pytest.raises(InputError, match=message):
            user_tasks.load(reference, 5, 5)


def saved(tmp_path, rows, split=None):
    import datasets

    table = datasets.Dataset.from_list(rows)
    folder = tmp_path / "data"
    (table if split is None else datasets.DatasetDict(dict.fromkeys(split, table))).save_to_disk(folder)
    return f"datasets:{folder}"


def test_columns_of_longbench(tmp_path):
    rows = [
        {"context": "a b c", "input": "First?", "answers": ["one", "uno"]},
        {"context": "a b c", "input": "Second?", "answers": ["two"]},
        {"context": "d e f", "input": "Third?", "answers": ["three"]},
    ]
    name, found = user_tasks.load(saved(tmp_path, rows), 5, 5)
    assert name == "datasets:data"
    assert [[q.text for q in each.questions] for each in found] == [["First?", "Second?"], ["Third?"]]
    assert found[0].questions[0] == Question("First?", "one", ("one", "uno"), (), any_of=True)


def test_columns_of_ruler(tmp_path):
    rows = [{"index": 0, "input": "Memorize.\nlong text\nWhat are the numbers?\n", "outputs": ["12", "34"]}]
    _, found = user_tasks.load(saved(tmp_path, rows, ("validation", "test")) + ":test", 5, 5)
    assert found[0].context == "Memorize.\nlong text"
    assert found[0].questions == (Question("What are the numbers?", "12, 34", ("12", "34"), ()),)
    with pytest.raises(InputError, match="choose one split of validation, test"):
        user_tasks.load(f"datasets:{tmp_path / 'data'}:train", 5, 5)


def test_columns_of_scbench(tmp_path):
    turns = [{"input": "A?", "answer": "1"}, {"input": "B?", "answer": "2"}]
    _, found = user_tasks.load(saved(tmp_path, [{"context": "c", "multi_turns": turns}] * 2, ("test",)), 5, 5)
    assert [(each.conversation, [q.answer for q in each.questions]) for each in found] == [(True, ["1", "2"])] * 2
    older = {"context": "c", "multi_turns": {"input": ["A?", "B?"], "answer": [1, 2]}}
    assert [q.answer for q in user_tasks._conversation(older, "row").questions] == ["1", "2"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "columns text are not those of LongBench"),
        ({"context": "a", "input": "", "answers": ["b"]}, "row 0 has no question"),
        ({"context": "a", "input": "b", "answers": [""]}, "row 0 has no answer"),
        ({"input": "one line only", "outputs": ["b"]}, "row 0 has no context"),
    ],
)
def test_data_sets_of_other_kinds(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        user_tasks.load(saved(tmp_path, [row]), 5, 5)


def test_a_json_file_of_a_data_set(tmp_path):
    file = tmp_path / "ruler.jsonl"
    file.write_text(json.dumps({"input": "text\nWho?", "outputs": ["me"]}) + "\n")
    name, found = user_tasks.load(f"datasets:{file}", 5, 5)
    assert (name, found[0].questions[0].answer) == ("datasets:ruler.jsonl", "me")


# figures


def made_up_items(profile, contexts=30, questions=4):
    """Items whose accuracies are known: the full cache knows all but one answer, random heads half of them."""
    variants = build([Contender("kvzip", profile)], profile.model.geometry, [0.5], random_seeds=2)
    items = []
    for number in range(contexts):
        for question in range(questions):
            for variant in variants:
                wrong = {"full": number == question == 0, "profile": question == 0 and number < 3}
                right = not wrong.get(variant.kind, question % 2 == 0)
                tokens = {"tokens_right": 7 if right else 3, "exact": right, "generated": None if right else "no"}
                items.append(
                    replace(
                        ITEM, exercise=f"needle/300/{number}", question=question, variant=variant.key, right=right,
                        accuracy=float(right), nll=0.1 if right else 2.0, kl=0.0 if variant.kind == "full" else 0.5,
                        retention_realised=variant.full_heads / 24, outside=question > 1, **tokens,
                    )
                )  # fmt: skip
    return items, variants


def test_figures_of_a_table():
    items, variants = made_up_items(make_profile())
    summary = summarise(Results.of(items, variants))
    rows = {row["name"]: row for row in summary["rows"]}
    assert list(rows) == ["full", "kvzip", "random", "inverted", "uniform", "streaming"]
    assert (summary["exercises"], summary["questions"], summary["questions_outside"]) == (30, 120, 60)
    assert rows["full"]["accuracy"]["value"] == pytest.approx(119 / 120, rel=1e-5)
    kvzip = rows["kvzip"]
    assert kvzip["accuracy"]["value"] == pytest.approx(117 / 120)
    assert kvzip["relative"]["value"] == pytest.approx(117 / 119, rel=1e-5)
    assert (kvzip["lost"], kvzip["gained"], kvzip["seeds"], kvzip["full_heads"]) == (2.0, 0.0, 1, 12)
    assert kvzip["against_random"]["value"] == pytest.approx(57 / 120)
    assert kvzip["against_random"]["low"] > 0.3
    assert kvzip["outside"]["questions"] == 60
    assert kvzip["outside"]["accuracy"]["value"] == 1.0
    assert kvzip["by_task"]["needle"]["questions"] == kvzip["by_length"]["300"]["questions"] == 120
    assert kvzip["loss_rise"]["value"] == pytest.approx(2 * 1.9 / 120, rel=1e-5)
    assert rows["random"]["seeds"] == 2
    assert (rows["random"]["lost"], rows["random"]["gained"]) == (59.0, 0.0)
    assert rows["random"]["against_random"] is None
    assert summary["verdicts"][0]["retention"] is None
    assert summary["verdicts"][0]["nearest"] == 0.5
    assert summary["verdicts"][0]["beats_random_at"] == [0.5]
    json.dumps(summary, allow_nan=False)


def test_a_single_context_claims_nothing():
    items, variants = made_up_items(make_profile(), contexts=1)
    summary = summarise(Results.of(items, variants))
    assert summary["rows"][1]["relative"]["low"] is None
    assert summary["verdicts"][0]["relative"] is None


def test_a_thousand_questions_can_keep_99_percent():
    items, variants = made_up_items(make_profile(), contexts=400, questions=4)
    verdict = summarise(Results.of(items, variants))["verdicts"][0]
    assert verdict["retention"] == 0.5
    assert verdict["relative"]["low"] >= 0.99


def test_variants_must_be_asked_the_same():
    items, variants = made_up_items(make_profile(), contexts=2)
    with pytest.raises(ValueError, match="was not asked the same questions"):
        Results.of(items[:-1], variants)


@pytest.fixture
def summary():
    items, variants = made_up_items(make_profile())
    return {
        "model": {"name": "a$model$"},
        "settings": {"sink_tokens": 16, "recent_tokens": 64},
        **summarise(Results.of(items, variants)),
    }


@pytest.mark.parametrize("picture", ["png", "svg"])
def test_the_picture_is_stable(summary, picture, recwarn):
    first = quality_plot.render(summary, picture, 40)
    assert first == quality_plot.render(summary, picture, 40)
    assert len(first) > 1000
    assert [str(each.message) for each in recwarn] == []


def test_a_picture_without_controls_and_intervals(summary):
    rows = [row for row in summary["rows"] if row["kind"] in ("full", "profile")]
    for row in rows:
        row["accuracy"] |= {"low": None, "high": None}
    quality_plot.render({**summary, "rows": rows}, "png", 40)


def test_the_tables_fit_80_columns(summary, capsys):
    from kvprofile.cli import evaluate

    for row in summary["rows"]:
        if row["kind"] == "profile":
            row["name"] = "a-rather-long-method-name"
        row["by_task"] |= dict.fromkeys(("multi_key", "my_own_exercises.jsonl", *"abcdefgh"), row["by_task"]["needle"])
    evaluate.render(summary)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "a-rather… 0.5" in out
    assert "evidence outside of sinks and window: 60 of 120 (50%)" in out
    assert "at no retention is it certain that 99% of the accuracy is kept" in out
