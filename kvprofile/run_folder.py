"""The folder in which a resumable run keeps finished work: whose it is, who may write it, when it goes.

``score``, ``evaluate`` and ``bench`` have one each; what the work is, their stores know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kvprofile.errors import InputError
from kvprofile.files import LOCK, MAX_FILE_BYTES, alone, document, is_temporary, read_json, write_atomically


class RunFolder:
    """A folder, and the file in it that says whose it is.

    - ``marker``: path of that JSON file, relative to the folder; it is written first and removed last, so a folder
      that holds anything but no marker is not one of ours.
    - ``run_key``: names everything the finished work depends on. Work under another key is never continued.
    - ``kind``: "an evaluation", for messages.
    - ``files``: patterns, relative to the folder, of all that a run writes. Nothing else is ever removed.
    - ``lock``: a file that one process at a time holds, next to the marker unless given; ``output``: what messages call
      the place, the folder unless given.
    """

    def __init__(
        self,
        path: Path,
        marker: str,
        run_key: str,
        *,
        kind: str,
        files: Sequence[str],
        lock: Path | None = None,
        output: Path | None = None,
    ) -> None:
        self.path, self.marker, self.run_key = path, path / marker, run_key
        self._kind, self._files = kind, files
        self._lock = lock or self.marker.with_name(LOCK)
        self._output = output or path
        self._opened = False

    def check(self, force: bool = False) -> bool | None:
        """Whether the folder holds this run; None where it holds nothing. Changes nothing.

        Raises InputError where it holds a link or anything that is not such a run, cannot be read, and, unless
        ``force``, where it holds a run with other settings.
        """
        with self._usable():
            folders = {self.path, self.marker.parent}
            held = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
            linked = sorted(path for path in held if path.is_symlink())
            begun = self.marker.is_file()
            file = self.path.exists() and not self.path.is_dir()
        if linked:  # what is written or removed there would be elsewhere
            raise InputError(f"{linked[0]} is a link out of a folder of results; remove it or choose another --output")
        # a process that was killed at its very beginning leaves a lock and half a marker
        foreign = {path for path in held if path.name != LOCK and not is_temporary(path.name)} - folders
        if file or (foreign and not begun):
            raise InputError(f"{self.path} exists and is not {self._kind}'s folder; move it or choose another --output")
        if not begun:
            return None
        same = self._is_this_run()
        if not same and not force:
            raise InputError(
                f"{self.path} holds {self._kind} with other settings; pass --force to replace it or another --output"
            )
        return same

    def open(self, about: Mapping[str, Any] | None = None, force: bool = False) -> bool:
        """Prepare the folder; returns whether work of this run is in it already.

        A run with other settings is removed with ``force``. ``about`` is what the marker of a new run tells besides
        the key. Raises InputError as ``check``, and where the disk is full or the folder cannot be written.
        """
        same = self.check(force)
        self._opened = True
        if same is False:
            with self._usable():  # what cannot be removed would pass for work of this run
                self._remove()
        if not same:
            write_atomically(self.marker, document({"run_key": self.run_key, **(about or {})}))
        return bool(same)

    @contextmanager
    def alone(self, force: bool, worth_keeping: Callable[[], object]) -> Iterator[None]:
        """Keep other processes away while the block lasts, which opens the folder.

        Where the block fails, the folder goes with it unless there is something ``worth_keeping``. Raises InputError as
        ``check``, and where another process is at work.
        """
        self.check(force)
        with alone(self._lock, self._output):
            try:
                yield
            except BaseException:
                if self._opened and not worth_keeping():
                    self.discard()
                raise

    def discard(self) -> None:
        """Remove what a run writes, and the folder if nothing else is in it."""
        with suppress(OSError):
            self._remove()

    def _remove(self) -> None:
        for pattern in (*self._files, str(self.marker.relative_to(self.path))):
            folder, _, name = pattern.rpartition("/")
            for each in (name, f".{name}.*"):  # the second: what killed processes left half-written
                for path in (self.path / folder).glob(each):
                    if path != self.marker and path.name != LOCK and (each == name or is_temporary(path.name)):
                        path.unlink(missing_ok=True)
        self.marker.unlink(missing_ok=True)  # last: a folder without it passes for someone else's
        with suppress(OSError):  # it holds something else, or a lock
            self.marker.parent.rmdir()
            self.path.rmdir()

    @contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"cannot use {self.path}: {error.strerror or error}; choose another --output") from error

    def _is_this_run(self) -> bool:
        try:
            found = read_json(self.marker, MAX_FILE_BYTES, "run")
        except ValueError:
            return False
        return isinstance(found, dict) and found.get("run_key") == self.run_key
