"""Whether an output is still like the baseline's: its words, its length, and no loops."""

from __future__ import annotations

import re

from kvprofile.bench.verifiers.base import Case, Verifier
from kvprofile.records.record import Verdict

MOST_COMPARED = 8000
"""Characters of two outputs that are compared: the longest common subsequence takes the product of both in memory."""


class Agreement(Verifier):
    """chrF (Popovic 2015) against the baseline's output, ROUGE-L (Lin 2004) next to it in the warnings.

    Two right answers may be worded differently, so a failure is a place to look, not a proof. Of long outputs the first
    8,000 characters are compared.
    """

    name = "agreement"
    least = 0.5

    def judge(self, case: Case) -> Verdict | None:
        """Score: chrF, 0 to 1. Pass at ``least`` or more, or by the same ROUGE-L."""
        if case.reference is None:
            return None
        if case.output.strip() == case.reference.strip():
            return self.verdict(True, 1.0)
        output, reference = case.output[:MOST_COMPARED], case.reference[:MOST_COMPARED]
        character, longest = chrf(output, reference), rouge_l(output, reference)
        passed = max(character, longest) >= self.least
        warnings = [] if passed else [f"chrF {character:.2f} and ROUGE-L {longest:.2f} against the baseline's answer"]
        return self.verdict(passed, character, warnings)


class Length(Verifier):
    """An output much longer than the baseline's rambles. Score: its words over the baseline's."""

    name = "length"
    most, spare_words = 1.5, 8

    def judge(self, case: Case) -> Verdict | None:
        """Pass up to ``most`` times the baseline's words, or a few words more."""
        if case.reference is None:
            return None
        ours, theirs = len(case.output.split()), len(case.reference.split())
        ratio = ours / theirs if theirs else None
        passed = ours <= max(self.most * theirs, theirs + self.spare_words)
        warnings = [] if passed else [f"{ours} words, the baseline's answer has {theirs}"]
        if case.finish_reason == "length":
            warnings.append("cut off at the most tokens allowed")
        return self.verdict(passed, ratio, warnings)


class Loops(Verifier):
    """An output says the same again and again, and its document does not. Score: share of words outside of loops."""

    name = "loops"
    least_times, least_words = 4, 12
    longest_unit = 40

    def judge(self, case: Case) -> Verdict | None:
        """Pass where no unit of words follows itself often enough."""
        words = re.findall(r"\w+|[^\w\s]", case.output)
        start, unit, times = longest_loop(words, self.longest_unit)
        looped = times >= self.least_times and unit * times >= self.least_words
        if looped and self._in_document(words[start : start + unit * times], case.document.text):
            looped = False
        share = 1.0 - unit * times / len(words) if looped else 1.0
        said = " ".join(words[start : start + unit])[:60]
        return self.verdict(not looped, share, [f"{times} times: {said}"] if looped else [])

    @staticmethod
    def _in_document(loop: list[str], text: str) -> bool:
        return " ".join(loop) in " ".join(re.findall(r"\w+|[^\w\s]", text))


def longest_loop(words: list[str], longest_unit: int) -> tuple[int, int, int]:
    """(where it starts, words of the unit, how often it stands in a row) of what covers most; (0, 0, 0) if none."""
    best = (0, 0, 0)
    for unit in range(1, min(longest_unit, len(words) // 2) + 1):
        run = 0
        for place in range(unit, len(words)):
            run = run + 1 if words[place] == words[place - unit] else 0
            times = run // unit + 1
            if times > 1 and unit * times > best[1] * best[2]:
                best = (place - run - unit + 1, unit, times)
    return best


def chrf(output: str, reference: str) -> float:
    """Character n-gram F-score of sacrebleu with its defaults, 0 to 1."""
    import sacrebleu

    return float(sacrebleu.sentence_chrf(output, [reference]).score) / 100


def rouge_l(output: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words, 0 to 1."""
    from rouge_score.rouge_scorer import RougeScorer

    return float(RougeScorer(["rougeL"]).score(reference, output)["rougeL"].fmeasure)
