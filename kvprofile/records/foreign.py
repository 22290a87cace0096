"""What the readers of other benchmark tools' results share; ``registry`` lists them, each is one module.

A format is recognised by several of its keys, never by one. What a tool did not measure is null: tools write 0 where
they have no sample, and no latency is 0. Numbers are the client's; what a tool collects from the server is left out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any, ClassVar

from kvprofile import __version__
from kvprofile.errors import plain
from kvprofile.records.record import Experiment, Leg, Metrics, Provenance, RunRecord

TOOL = "measured by"
"""The setting of a record that names the tool it is from; kvprofile's own records have none."""

ENDPOINT, DATASET, IGNORE_EOS = "endpoint", "dataset", "ignore_eos"
INPUT_ASKED, OUTPUT_ASKED = "input tokens asked for", "output tokens asked for"
"""Settings of records of other tools that must be equal for a fair comparison; unknown ones are left out."""

UNKNOWN_MODEL = "unknown"
"""The model of a leg whose file does not name it."""

COMPLETIONS, CHAT = "completions", "chat"
"""Endpoints as records name them: /v1/completions and /v1/chat/completions."""

COUNTED = ("duration", "completed", "failed")
"""Metrics that are known even where no request was answered; the others are then null."""


@dataclass(frozen=True)
class Place:
    """What stands for a leg on disk, and the settings that the tool varied between the legs of one folder.

    ``part`` says that a file found in a folder is only a part or a copy of another's leg: a warm-up, a summary.
    """

    path: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    part: bool = False


class ResultFormat(ABC):
    """The files of one tool."""

    tool: ClassVar[str]
    """The command, as pages name it."""

    @abstractmethod
    def recognises(self, raw: Any) -> bool:
        """Whether parsed JSON is such a file."""

    def place(self, path: Path, raw: Any) -> Place:  # noqa: ARG002 -- others look into the file
        """What names the legs of a file: the file itself, or the folder that holds its repetitions."""
        return Place(path)

    @abstractmethod
    def to_record(self, raw: Any, name: str) -> RunRecord:
        """A record whose legs are called ``name`` unless the file names them.

        Raises ValueError (pydantic's ValidationError too) where a value is not what its key says.
        """


def tool_of(record: RunRecord) -> str | None:
    """The tool that a record's numbers are from; None for kvprofile's own."""
    found = record.experiment.settings.get(TOOL)
    return found if isinstance(found, str) else None


def make_record(
    tool: str, legs: Sequence[Leg], settings: Mapping[str, Any], provenance: Provenance | None = None
) -> RunRecord:
    """A record of a tool's legs. Settings that are null are left out."""
    known = {key: _setting(value) for key, value in settings.items() if value is not None}
    return RunRecord(
        kvprofile_version=__version__,
        experiment=Experiment(name=tool, preset=tool, settings={TOOL: tool, **known}),
        provenance=provenance or Provenance(),
        legs=list(legs),
    )


def at(raw: Any, *keys: str | int) -> Any:
    """A value inside nested JSON; None where the way to it is not there."""
    for key in keys:
        if isinstance(raw, Mapping):
            raw = raw.get(key)
        elif isinstance(raw, list) and isinstance(key, int) and -len(raw) <= key < len(raw):
            raw = raw[key]
        else:
            return None
    return raw


def measured(value: Any) -> Any:
    """A latency or rate; None for 0, which tools write where they have no sample."""
    return None if is_number(value) and value == 0 else value


def scaled(value: Any, factor: float) -> Any:
    """A number in another unit; what is not a number is passed on, for the record to refuse."""
    return value * factor if is_number(value) else value


def metrics(found: Mapping[str, Any]) -> Metrics:
    """Metrics without what nobody measured: no zeros, and of a leg without an answer only what was counted.

    Raises ValueError for what is not a number.
    """
    for key, value in found.items():
        if key in Metrics.model_fields and value is not None and not is_number(value):
            raise ValueError(f"{key} is not a number: {value!r:.40}")
    unanswered = found.get("completed") == 0
    return Metrics.model_validate(
        {
            key: value if key in COUNTED else None if unanswered else measured(value)
            for key, value in found.items()
            if key in Metrics.model_fields
        }
    )


def name_of(text: object) -> str:
    """A name from foreign text: printable, at most 200 characters of its end, never empty."""
    shown = plain(text)
    return (shown if len(shown) <= 200 else f"…{shown[-199:]}") or "unnamed"


def without_folders(value: Any) -> Any:
    """A setting without the folders of a path: a record names no place on a machine."""
    if isinstance(value, str) and (PurePath(value).is_absolute() or PureWindowsPath(value).is_absolute()):
        return PureWindowsPath(value).name  # knows both kinds of slashes
    return value


def _setting(value: Any) -> Any:
    """A setting that a record can hold: no folders, no characters that a terminal cannot print."""
    return plain(without_folders(value))[:2000] if isinstance(value, str) else value


def numbers(value: Any) -> list[Any]:
    """A list as it is, anything else as an empty one."""
    return value if isinstance(value, list) else []


def is_number(value: Any) -> bool:
    """Whether JSON holds a number there, and not true or false."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
