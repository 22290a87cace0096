"""Two profiles of one geometry compared: whether they may be, how far their rankings agree, which heads move."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvprofile.budget import graded
from kvprofile.budget.allocate import full_head_count, ranking
from kvprofile.budget.choice import choose, has_scores, ranking_scores, tie_breaks
from kvprofile.budget.profile import PRESETS, Matrix, Profile, mean_budget
from kvprofile.budget.trim import GRADED, WHOLE
from kvprofile.errors import InputError

LEAST_GRADED_MOVE = 0.05
"""Shares of graded heads that differ by less are alike: two runs over other texts move every share a little."""


@dataclass(frozen=True)
class MovedHead:
    """A KV head whose budget differs; ``before`` and ``after`` are shares, 1.0 full, 0.0 trimmed."""

    layer: int
    kv_head: int
    before: float
    after: float


@dataclass(frozen=True)
class DiffAtRetention:
    """The two profiles at one retention.

    ``top_heads`` is k = round(retention * heads); ``top_overlap`` is the share of the k best heads of one that are
    among the k best of the other (null where one has no scores), and ``chance_overlap`` (k / heads) is what two
    unrelated rankings reach. ``kind`` is what was compared: graded where both profiles are, else whole heads.
    """

    retention: float
    kind: str
    top_heads: int
    top_overlap: float | None
    chance_overlap: float
    realised_before: float
    realised_after: float
    moved: tuple[MovedHead, ...]


@dataclass(frozen=True)
class ProfileDiff:
    """What ``compare`` finds; ``rank_correlation`` is null where a profile has no scores or all of them are equal."""

    warnings: tuple[str, ...]
    heads: int
    rank_correlation: float | None
    at: tuple[DiffAtRetention, ...]


def compare(before: Profile, after: Profile, retentions: Sequence[float] = PRESETS) -> ProfileDiff:
    """Compare two profiles, each by the statistic that ranks its heads.

    Raises InputError where their geometries differ (then no head of one corresponds to a head of the other), or for a
    retention that a profile without scores does not state.
    """
    if before.model.geometry != after.model.geometry:
        raise InputError(
            f"{before.model.name} has {before.model.geometry.describe()}, {after.model.name} has "
            f"{after.model.geometry.describe()}; only profiles of one geometry can be compared"
        )
    first, second = _profiled(ranking_scores(before)), _profiled(ranking_scores(after))
    return ProfileDiff(
        warnings=tuple(comparability_warnings(before, after)),
        heads=len(first),
        rank_correlation=rank_correlation(first, second) if has_scores(before) and has_scores(after) else None,
        at=tuple(_at(before, after, retention, len(first)) for retention in retentions),
    )


def shared_retentions(before: Profile, after: Profile) -> tuple[float, ...] | None:
    """The retentions that every profile without scores states, highest first; null where both have scores.

    Raises InputError where they state none in common.
    """
    stated = [set(profile.budgets) for profile in (before, after) if not has_scores(profile)]
    if not stated:
        return None
    shared = set.intersection(*stated)
    if not shared:
        raise InputError(
            f"both were imported from runtime files, which hold no scores, and state no retention in common: "
            f"{', '.join(before.budgets)} and {', '.join(after.budgets)}"
        )
    return tuple(sorted(map(float, shared), reverse=True))


def comparability_warnings(before: Profile, after: Profile) -> Iterator[str]:
    """One line for each reason why a difference may come from something else than the models' heads."""
    yield from _identity_warnings(before, after)
    for which, profile in (("first", before), ("second", after)):
        if not has_scores(profile):
            yield f"the {which} file has no scores (a runtime file): compared at {', '.join(profile.budgets)} only"
    old, new = _scoring_facts(before), _scoring_facts(after)
    for what in old:
        if old[what] is not None and new[what] is not None and old[what] != new[what]:
            yield f"other {what}: {_shown(old[what])} and {_shown(new[what])}"
    missing = [{what for what, value in facts.items() if value is None} for facts in (old, new)]
    for whose, absent in (
        ("neither file records", missing[0] & missing[1]),
        ("the first file does not record", missing[0] - missing[1]),
        ("the second file does not record", missing[1] - missing[0]),
    ):
        if absent:
            yield f"{whose} its {', '.join(what for what in old if what in absent)}"


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation: Pearson's on ranks, equal values sharing their mean rank.

    Null where it is undefined: fewer than two values, or all values of one side equal.
    """
    left, right = _average_ranks(first), _average_ranks(second)
    middle = (len(left) + 1) / 2
    covariance = math.fsum((a - middle) * (b - middle) for a, b in zip(left, right, strict=True))
    spread = math.fsum((a - middle) ** 2 for a in left) * math.fsum((b - middle) ** 2 for b in right)
    return max(-1.0, min(1.0, covariance / math.sqrt(spread))) if spread else None


def _average_ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for place in order[start:end]:
            ranks[place] = (start + 1 + end) / 2
        start = end
    return ranks


def _at(before: Profile, after: Profile, retention: float, heads: int) -> DiffAtRetention:
    count = full_head_count(retention, heads)
    # shares as the files state them: which class a head is rounded to can change where its share hardly does
    if before.probe is not None and after.probe is not None:
        kind, heads_of = GRADED, [graded.shares(profile, retention)[0] for profile in (before, after)]
    else:
        kind, heads_of = WHOLE, [choose(profile, retention, kind=WHOLE).heads for profile in (before, after)]
    old, new = heads_of
    overlap = None
    if count and has_scores(before) and has_scores(after):
        left, right = (
            set(ranking(ranking_scores(profile), tie_breaks(profile, profile.scoring.statistic))[:count])
            for profile in (before, after)
        )
        overlap = len(left & right) / count
    least = LEAST_GRADED_MOVE if kind == GRADED else 0.0
    moved = tuple(
        MovedHead(layer, head, was, now)
        for layer, (old_row, new_row) in enumerate(zip(old, new, strict=True))
        for head, (was, now) in enumerate(zip(old_row, new_row, strict=True))
        if was is not None and now is not None and was != now and abs(was - now) >= least
    )
    return DiffAtRetention(
        retention=retention,
        top_heads=count,
        top_overlap=overlap,
        chance_overlap=count / heads,
        kind=kind,
        realised_before=mean_budget(old),
        realised_after=mean_budget(new),
        moved=moved,
    )


def _identity_warnings(before: Profile, after: Profile) -> Iterator[str]:
    old, new = before.model, after.model
    if old.name != new.name:
        yield f"models differ: {old.name} and {new.name}"
    if old.architecture != new.architecture:
        yield f"architectures differ: {old.architecture} and {new.architecture}"
    if old.weights_sha256 is None or new.weights_sha256 is None:
        unknown = [name for name, model in (("first", old), ("second", new)) if model.weights_sha256 is None]
        yield f"weights of the {' and the '.join(unknown)} unknown: imported, not verified against weights"
    elif old.weights_sha256 != new.weights_sha256:
        yield f"weights differ: {old.weights_sha256[:12]} and {new.weights_sha256[:12]}"
    if old.tokenizer_sha256 and new.tokenizer_sha256 and old.tokenizer_sha256 != new.tokenizer_sha256:
        yield f"tokenizers differ: {old.tokenizer_sha256[:12]} and {new.tokenizer_sha256[:12]}"


def _scoring_facts(profile: Profile) -> dict[str, object]:
    """What has to agree between two scorings, by its name in a message; null where a file does not record it."""
    scoring, runtime = profile.scoring, profile.runtime
    recorded = scoring.imported_from is None
    return {
        "method": scoring.method,
        "ranking statistic": scoring.statistic,
        "chunk length in tokens": scoring.chunk_tokens,
        "context length in tokens": scoring.context_tokens or ("whole documents" if recorded else None),
        "prompts version": scoring.prompts_version,
        "text before the context": (scoring.prefix or "") if recorded else scoring.prefix,
        "text before the answer": (scoring.suffix or "") if recorded else scoring.suffix,
        "scoring dtype": scoring.dtype if recorded else None,
        "corpora": _corpora(profile) or None,
        "chunks scored": "all, exactly" if scoring.shortcuts is None else scoring.shortcuts.describe(),
        "sink tokens": runtime.sink_tokens,
        "recent window in tokens": runtime.recent_tokens,
    }


def _corpora(profile: Profile) -> str:
    """Every corpus by name, hash and tokens scored, in an order that does not depend on the command line."""
    corpora = sorted(profile.scoring.corpora, key=lambda corpus: (corpus.name, corpus.sha256, corpus.tokens))
    cuts = {id(corpus): f" cut to {corpus.cut_to_tokens:,}" for corpus in corpora if corpus.cut_to_tokens}
    return ", ".join(
        f"{corpus.name} ({corpus.sha256[:12]}, {corpus.tokens:,} tokens{cuts.get(id(corpus), '')})"
        for corpus in corpora
    )


def _profiled(scores: Matrix) -> list[float]:
    return [value for row in scores for value in row if value is not None]


def _shown(value: object) -> str:
    """A fact in a message: texts with line breaks or odd characters quoted, long ones cut."""
    text = repr(value) if isinstance(value, str) and not value.isprintable() else str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
