"""Names for legs that their files do not name: what tells their paths and settings apart, nothing else of a path."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvprofile.records.foreign import TOOL, Place, name_of
from kvprofile.records.record import RunRecord

_LONGEST = 80
"""Characters of a name made of settings; longer ones are those of folders."""


def leg_names(places: Iterable[Place]) -> dict[Path, str]:
    """A name for each path, different for different paths.

    A file is called by its name without ending where no other has it, else by the folders that differ. Folders of a
    sweep are called by the settings that differ between them, where those tell all of them apart.
    """
    by_path = {place.path: place for place in places}
    parts = {path: _parts(path) for path in by_path}
    for folder in {path.parent for path in by_path}:
        parts |= _with_settings([place for path, place in by_path.items() if path.parent == folder], parts)
    names: dict[Path, str] = {}
    for path, own in parts.items():
        # alone by its last part, or together with the others that end in the same one
        same = [each for each in parts.values() if each[-1] == own[-1]]
        names[path] = own[-1] if len(same) == 1 else _difference(own, same)
    # folders that hold several legs each: their difference and the last part
    short = list(names.values())
    for path, name in list(names.items()):
        if short.count(name) > 1 and name != parts[path][-1]:
            names[path] = f"{name}/{parts[path][-1]}"
    return _distinct(names)


def _distinct(names: Mapping[Path, str]) -> dict[Path, str]:
    """Printable names with a number after what is still there twice: 'a' of a/result.json and of a.json, say."""
    found: dict[Path, str] = {}
    for path, name in names.items():
        short, taken = name_of(name), set(found.values())
        numbered = (f"{short[:190]} ({number})" for number in range(2, len(names) + 2))
        found[path] = short if short not in taken else next(each for each in numbered if each not in taken)
    return found


def notes_about(records: Sequence[tuple[Path, RunRecord]]) -> Iterator[str]:
    """What a reader should know of how legs of other tools were told apart; each record with its place."""
    standing: dict[tuple[str, str], dict[Path, RunRecord]] = {}
    for place, record in records:
        for leg in record.legs:
            standing.setdefault((record.experiment.name, leg.name), {})[place] = record
    for (_, name), found in standing.items():
        if len(found) < 2:
            continue
        yield f"leg {name} is in {len(found)} files, which call it so themselves: they count as its repetitions"
        settings = [record.experiment.settings for record in found.values()]
        for key in dict.fromkeys(key for each in settings for key in each if key != TOOL):
            values = list(dict.fromkeys(_shown(each.get(key)) for each in settings))
            if len(values) > 1:
                yield f"leg {name} mixes settings, {key}: {'; '.join(values)[:200]}"
    # numbers to the last digit are equal only in copies
    seen: dict[str, str] = {}
    for _, record in records:
        for leg in record.legs:
            numbers = leg.metrics.model_dump_json() if leg.metrics.duration is not None else ""
            other = seen.setdefault(numbers, leg.name) if numbers else leg.name
            if other != leg.name:
                yield f"legs {other} and {leg.name} have the same numbers: perhaps copies of one result"


def _parts(path: Path) -> tuple[str, ...]:
    """A path's parts, the last without the ending of a file."""
    full = path.resolve()
    stem = full.stem if full.suffix in (".json", ".jsonl") else full.name
    return (*full.parts[:-1], stem)


def _with_settings(places: Sequence[Place], parts: dict[Path, tuple[str, ...]]) -> dict[Path, tuple[str, ...]]:
    """The parts of a folder's places, the last one as 'max_num_seqs=4' where such words tell all of them apart."""
    if len(places) < 2 or not all(place.settings for place in places):
        return {}
    keys = list(dict.fromkeys(key for place in places for key in place.settings))
    varied = [key for key in keys if len({repr(place.settings.get(key)) for place in places}) > 1]
    words = {place.path: ", ".join(f"{key}={_shown(place.settings.get(key))}" for key in varied) for place in places}
    if len(set(words.values())) < len(words) or any(len(each) > _LONGEST for each in words.values()):
        return {}
    return {path: (*parts[path][:-1], text) for path, text in words.items()}


def _difference(own: tuple[str, ...], all_parts: Sequence[tuple[str, ...]]) -> str:
    """The parts of a path between those that all of the paths begin with and those that all end with."""
    start = _shared(all_parts)
    end = _shared([tuple(reversed(each[start:])) for each in all_parts])
    return "/".join(own[start : len(own) - end]) or own[-1]


def _shared(sequences: Sequence[tuple[str, ...]]) -> int:
    """How many items all sequences begin with."""
    return next(
        (n for n, each in enumerate(zip(*sequences, strict=False)) if len(set(each)) > 1), min(map(len, sequences))
    )


def _shown(value: Any) -> str:
    return "unset" if value is None else str(value)
