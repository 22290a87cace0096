"""Published benchmarks: by which columns their rows are recognised, how they are asked and how they are judged.

A format is recognised by all of its columns together, never by one. Facts about each, with their sources, stand in
docs/texts-and-questions.md; prompts are our own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvprofile.errors import InputError
from kvprofile.questions.fields import (
    Source,
    choice_question,
    choices_in,
    context_of,
    question_of,
    text_of,
    without_template_end,
)
from kvprofile.questions.tasks import Exercise, Question

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """A benchmark's rows: columns that must all be there, a look at the first row, and a row as an exercise.

    ``read`` gives None for a row that is left out, with a note in its source.
    """

    name: str
    columns: frozenset[str]
    read: Callable[[Row, Source], Exercise | None]
    fits: Callable[[Row], bool] = lambda _: True


def recognise(columns: Sequence[str], first: Row) -> Format | None:
    """The format that these columns and the first row are of; of several the one with most columns; None without."""
    found = [each for each in FORMATS if each.columns <= set(columns) and each.fits(first)]
    return max(found, key=lambda each: len(each.columns), default=None)


def _one(context: str, question: Question) -> Exercise:
    return Exercise("", context, (question,))


# LongBench v1 and v2

_LONGBENCH = {
    **dict.fromkeys(("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"), "f1"),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), "rouge-l"),
    **dict.fromkeys(("trec", "lsht"), "class"),
    **dict.fromkeys(("passage_count", "passage_retrieval_en", "passage_retrieval_zh"), "numbers"),
    **dict.fromkeys(("lcc", "repobench-p"), "edit"),
}
_LONGBENCH_CHINESE = ("multifieldqa_zh", "dureader", "vcsum")
_LONGBENCH_ASKS = {
    "gov_report": "Summarise the report above on one page.",
    "multi_news": "Summarise all of the news above on one page.",
    "passage_count": "How many different paragraphs stand above, repeated ones counted once? Give the number alone.",
    "passage_retrieval_en": "Which paragraph above does this summarise? Answer 'Paragraph' and its number.",
    "passage_retrieval_zh": "这是上面哪一段的摘要? 请只回答段落和编号。",
    "lcc": "Write the next line of the code above.",
    "repobench-p": "Write the next line of this code.",
}


def _longbench(row: Row, source: Source) -> Exercise:
    name = text_of(row.get("dataset"), source, "dataset").removesuffix("_e")
    question = _longbench_question(name, row, row.get("input"), source, _LONGBENCH_ASKS.get(name, ""))
    return _one(context_of(row.get("context"), source), question)


def _longbench_of_kvpress(row: Row, source: Source) -> Exercise:
    name = re.sub(r"[-_]e\Z", "", text_of(row.get("task"), source, "task"))
    question = _longbench_question(name, row, row.get("question"), source, "")
    return _one(context_of(row.get("context"), source), question)


def _longbench_question(name: str, row: Row, asked: object, source: Source, ours: str) -> Question:
    if name in _LONGBENCH_CHINESE:
        raise InputError(f"{source.where}: {name} is judged on words that jieba cuts, which kvprofile does not; {_MAP}")
    if name not in _LONGBENCH:
        raise InputError(f"{source.where}: LongBench has no data set {name!r}; {_MAP}")
    measure = _LONGBENCH[name]
    classes = row.get("all_classes") if measure == "class" else ()
    if measure == "class" and not (isinstance(classes, list) and all(isinstance(each, str) for each in classes)):
        raise InputError(f"{source.where}: {name} is classification, and all_classes is not a list of names")
    text = "\n\n".join(part for part in (asked, ours) if isinstance(part, str) and part.strip())
    return question_of(text, row.get("answers"), source, any_of=True, measure=measure, choices=tuple(classes or ()))


def _longbench_v2(row: Row, source: Source) -> Exercise:
    choices = [row.get(f"choice_{each}") for each in "ABCD"]
    question = choice_question(row.get("question"), choices, row.get("answer"), source)
    return _one(context_of(row.get("context"), source), question)


# RULER, and what kvpress makes of it and of others

_RULER_ASKS = re.compile(r"\b(?:Question: |What (?:is|are all) the special magic )")
_RULER_ALL = ("special magic", "variables that are assigned", "most common words", "most frequently appeared")


def _ruler(row: Row, source: Source) -> Exercise:
    """Context and question are one text. The question is its last line, of files without line breaks its known end."""
    text = text_of(row.get("input"), source, "input").rstrip()
    last_line = without_template_end(text).rfind("\n") + 1
    openings = [found.start() for found in _RULER_ASKS.finditer(text, last_line)]
    place = openings[-1] if openings else last_line
    if not text[:place].strip():
        raise InputError(f"{source.where} has no context: 'input' is one line that ends in no known question")
    answers, prefix = row.get("outputs"), row.get("answer_prefix")
    if any(words in text[place:] for words in _RULER_ALL):
        any_of = False
    elif text.startswith("Question: ", place) or (isinstance(prefix, str) and prefix.strip() == "Answer:"):
        any_of = True  # qa
    elif isinstance(answers, list) and len(answers) > 1:
        raise InputError(f"{source.where}: which task of RULER this is does not show; {_ANY_OR_ALL}")
    else:
        any_of = False
    question = question_of(text[place:], answers, source, any_of=any_of, measure="text")
    return _one(context_of(text[:place], source), question)


def _of_kvpress(row: Row, source: Source) -> Exercise:
    task = text_of(row.get("task"), source, "task")
    context, text, answers = context_of(row.get("context"), source), row.get("question"), row.get("answer")
    if task.split("_")[0] in ("niah", "vt", "cwe", "fwe", "qa"):
        any_of = task.startswith("qa")
        return _one(context, question_of(text, answers, source, any_of=any_of, measure="text"))
    if task in _INFINITE_CHOICE:
        shown = choices_in(text_of(text, source, "question"))
        return _one(context, choice_question(text, shown, answers, source, shown=True))
    if task in _INFINITE:
        return _one(context, question_of(text, answers, source, any_of=True, measure=_INFINITE[task]))
    raise InputError(f"{source.where}: task {task!r} is not judged by kvprofile as its paper does; {_MAP}")


# InfiniteBench and SCBench

_INFINITE_CHOICE = ("longbook_choice_eng", "code_debug")
_INFINITE = {
    "passkey": "number",
    "number_string": "number",
    "kv_retrieval": "words",
    "longdialogue_qa_eng": "words",
    "longbook_qa_eng": "f1",
    "longbook_qa_chn": "f1-characters",
    "longbook_sum_eng": "rouge-l",
    "math_find": "number",
    "code_run": "last-number",
}
_INFINITE_ASKS = {
    "longdialogue_qa_eng": "Whose name is replaced by $$MASK$$ above? Answer with the name alone.",
    "longbook_sum_eng": "Summarise the book above.",
    "code_debug": "One function or method above has an error that makes it crash. Which one?",
}


def _infinite(row: Row, source: Source) -> Exercise:
    task = next((hint for hint in source.hints if hint in {*_INFINITE, *_INFINITE_CHOICE, "math_calc"}), "")
    context, text = context_of(row.get("context"), source), row.get("input")
    text = text if isinstance(text, str) and text.strip() else _INFINITE_ASKS.get(task, "")
    if row.get("options"):
        return _one(
            context, choice_question(text or _INFINITE_ASKS["code_debug"], row["options"], row["answer"], source)
        )
    if task not in _INFINITE:
        told = "math_calc is not read" if task else "which task of InfiniteBench this is, its file or split must name"
        raise InputError(f"{source.where}: {told} ({', '.join(_INFINITE)}); {_MAP}")
    return _one(context, question_of(text, row.get("answer"), source, any_of=True, measure=_INFINITE[task]))


_SCBENCH = {  # measure, and whether one reference is enough
    **dict.fromkeys(("scbench_kv", "scbench_kv_hard", "scbench_kv_compressible"), ("text", True)),
    **dict.fromkeys(("scbench_prefix_suffix", "scbench_hashhop"), ("text", True)),
    **dict.fromkeys(("scbench_qa_eng", "scbench_many_shot"), ("text", True)),
    "scbench_vt": ("text", False),
    "scbench_qa_chn": ("f1-characters", True),
    **dict.fromkeys(("scbench_mf", "scbench_passkey"), ("number", True)),
    "scbench_summary": ("rouge-l", True),
}


def _scbench(row: Row, source: Source) -> Exercise:
    turns = row.get("multi_turns")
    if isinstance(turns, dict):  # how older versions of datasets give a list of objects
        turns = [dict(zip(turns, values, strict=False)) for values in zip(*turns.values(), strict=False)]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise InputError(f"{source.where}: multi_turns is not a list of turns")
    questions = tuple(_scbench_turn(turn, source) for turn in turns)
    return Exercise("", context_of(row.get("context"), source), questions, conversation=True)


def _scbench_turn(turn: Row, source: Source) -> Question:
    if turn.get("options"):
        return choice_question(turn.get("input"), turn["options"], turn.get("answer"), source)
    named = (turn.get("task"), *source.hints)
    task = next((name for name in named if isinstance(name, str) and name.startswith("scbench_")), "")
    if task.startswith("scbench_repoqa"):
        raise InputError(
            f"{source.where}: {task} is judged by likeness to functions of a repository, which is not read"
        )
    answers = turn.get("answer")
    if task not in _SCBENCH and isinstance(answers, list) and len(answers) > 1:
        raise InputError(
            f"{source.where}: which task of SCBench this is, its file or configuration must name; {_ANY_OR_ALL}"
        )
    measure, any_of = _SCBENCH.get(task, ("text", True))
    return question_of(turn.get("input"), answers, source, any_of=any_of, measure=measure)


# L-Eval, QuALITY, SQuAD, HotpotQA


def _leval(row: Row, source: Source) -> Exercise | None:
    asked, answers, kind = row.get("instructions"), row.get("outputs"), row.get("evaluation")
    if kind not in ("exam", "f1", "rouge"):
        source.note(f"evaluation {kind!r} needs a judge that kvprofile is not: left out")
        return None
    if not isinstance(asked, list) or not isinstance(answers, list) or len(asked) != len(answers) or not asked:
        raise InputError(f"{source.where}: instructions and outputs are not lists of the same length")
    questions = tuple(_leval_question(text, answer, kind, source) for text, answer in zip(asked, answers, strict=True))
    return Exercise("", context_of(row.get("input"), source), questions)


def _leval_question(text: object, answer: object, kind: str, source: Source) -> Question:
    right, choices = text_of(answer, source, "answer").strip(), choices_in(text_of(text, source, "question"))
    if kind != "exam":
        return question_of(text, right, source, any_of=True, measure={"f1": "f1", "rouge": "rouge-l"}[kind])
    given = re.match(r"\(?([A-Z]+)\)?(?=[\s.):,]|\Z)", right)  # 'B', 'AC', '(B) and its words'
    if choices and given:
        return choice_question(text, choices, given[1], source, shown=True)
    if re.fullmatch(r"-?\d+(\.\d+)?", right):
        return question_of(text, right, source, any_of=True, measure="last-number")
    judged = re.match(r"(True|False)\s*\[fact:", right)  # what the document says; the fact itself is not judged
    return question_of(text, judged[1] if judged else right, source, any_of=True, measure="words" if judged else "text")


def _quality(row: Row, source: Source) -> Exercise:
    context = context_of(row.get("article"), source)
    if re.search(r"<(?:html|body|p|br|div)\b[^>]*>", context):
        raise InputError(f"{source.where}: the article is HTML; take QuALITY's files named htmlstripped")
    questions = []
    for entry in row["questions"]:
        label, options = entry.get("gold_label"), entry.get("options")
        if type(label) is not int or not isinstance(options, list) or not 1 <= label <= len(options):
            raise InputError(
                f"{source.where}: a question has no gold_label (the test split has none; take train or dev)"
            )
        questions.append(choice_question(entry.get("question"), options, "ABCDEFGH"[label - 1], source))
    return Exercise("", context, tuple(questions))


def _squad(row: Row, source: Source) -> Exercise | None:
    answers = row.get("answers")
    texts, starts = (answers.get("text"), answers.get("answer_start")) if isinstance(answers, dict) else (None, None)
    if isinstance(texts, list) and not texts:
        source.note("a question that its text does not answer was left out")
        return None
    context = text_of(row.get("context"), source, "context")
    spans: tuple[tuple[int, int], ...] = ()
    if isinstance(texts, list) and isinstance(starts, list) and starts and type(starts[0]) is int:
        first = str(texts[0])
        spans = ((starts[0], starts[0] + len(first)),) if context[starts[0] :].startswith(first) else ()
    question = question_of(row.get("question"), texts, source, any_of=True, measure="f1", evidence=spans)
    return _one(context, question)


def _hotpot(row: Row, source: Source) -> Exercise:
    parts = [f"{title}\n{''.join(sentences).strip()}" for title, sentences in _paragraphs(row["context"]) or []]
    question = question_of(row.get("question"), row.get("answer"), source, any_of=True, measure="f1")
    return _one(context_of("\n\n".join(parts), source), question)


def _paragraphs(value: object) -> list[tuple[str, list[str]]] | None:
    """(title, sentences) of HotpotQA's context: a list of pairs, or two lists side by side as ``datasets`` has them."""
    pairs: Any = value
    if isinstance(value, dict) and set(value) == {"title", "sentences"}:
        if not all(isinstance(part, list) for part in value.values()) or len(value["title"]) != len(value["sentences"]):
            return None
        pairs = list(zip(value["title"], value["sentences"], strict=True))
    if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        return None
    fits = all(isinstance(t, str) and isinstance(s, list) and all(isinstance(x, str) for x in s) for t, s in pairs)
    return [(title, sentences) for title, sentences in pairs] if fits else None


def _has_entries(row: Row, column: str, keys: set[str]) -> bool:
    entries = row.get(column)
    return isinstance(entries, list) and bool(entries) and all(isinstance(e, dict) and keys <= set(e) for e in entries)


_MAP = "say how to read it with --columns (docs/texts-and-questions.md)"
_ANY_OR_ALL = "say --columns answers=any or answers=all"

_KVPRESS = frozenset({"context", "question", "answer_prefix", "task", "max_new_tokens"})
FORMATS = (
    Format(
        "LongBench",
        frozenset({"input", "context", "answers", "length", "dataset", "language", "all_classes", "_id"}),
        _longbench,
    ),
    Format("LongBench, as kvpress has it", _KVPRESS | {"answers", "all_classes"}, _longbench_of_kvpress),
    Format(
        "LongBench v2",
        frozenset({"domain", "sub_domain", "difficulty", "length", "question", "answer", "context"})
        | {f"choice_{each}" for each in "ABCD"},
        _longbench_v2,
    ),
    Format("RULER", frozenset({"index", "input", "outputs"}), _ruler),
    Format("a benchmark as kvpress has it", _KVPRESS | {"answer"}, _of_kvpress),
    Format("InfiniteBench", frozenset({"id", "context", "input", "answer", "options"}), _infinite),
    Format("SCBench", frozenset({"context", "multi_turns"}), _scbench),
    Format("L-Eval", frozenset({"instructions", "input", "outputs", "evaluation"}), _leval),
    Format(
        "QuALITY",
        frozenset({"article_id", "article", "questions"}),
        _quality,
        lambda row: _has_entries(row, "questions", {"question", "options"}),
    ),
    Format(
        "SQuAD",
        frozenset({"id", "context", "question", "answers"}),
        _squad,
        lambda row: isinstance(row.get("answers"), dict) and "text" in row["answers"],
    ),
    Format(
        "HotpotQA",
        frozenset({"context", "question", "answer"}),
        _hotpot,
        lambda row: bool(_paragraphs(row.get("context"))),
    ),
)
