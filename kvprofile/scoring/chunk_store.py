"""Finished chunks on disk, so that an interrupted run continues, and a run with other inputs never does."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from kvprofile.budget.profile import Geometry
from kvprofile.files import LOCK, write_atomically
from kvprofile.run_folder import RunFolder
from kvprofile.scoring.aggregate import HeadStatistics, histogram
from kvprofile.scoring.probe_fit import ProbeFit

_SUMS = "sums.safetensors"
_SMALL_SUMS, _SECONDS_BETWEEN = 32 * 2**20, 20.0
"""Bytes of sums that are written after every chunk, and how often larger ones are."""


class ChunkStore:
    """A folder ``<output>.partial`` with one small file for each finished chunk of one run.

    ``run_key`` names everything the scores depend on; chunks of another run are removed. The sums of the probe's fit
    lie there too, over the chunks that are finished: a chunk that they lack does not count as one.
    """

    def __init__(self, output: Path, run_key: str, geometry: Geometry) -> None:
        self._folder = RunFolder(
            output.with_name(f"{output.name}.partial"),
            "run.json",
            run_key,
            kind="a run",
            files=("document-*.safetensors", _SUMS),
            lock=output.with_name(f".{output.name}{LOCK}"),
            output=output,
        )
        self._kept: set[tuple[int, int]] = set()
        self._geometry = geometry
        self.fit = ProbeFit(geometry)
        self._written = 0.0
        self.replaced = 0

    @contextmanager
    def opened(self) -> Iterator[int]:
        """The folder and the output, for this process alone. Gives and raises as ``open``."""
        with self._folder.alone(force=True, worth_keeping=self._listed):
            found = self.open()
            try:
                yield found
            finally:
                self._save_sums(now=True)

    def open(self) -> int:
        """Prepare the folder; returns how many finished chunks it holds.

        ``replaced`` then tells how many chunks of another run were removed. Raises InputError where a folder of that
        name was not made by a run.
        """
        found = len(self._listed())
        if not self._folder.open(force=True):
            self.replaced = found
        try:
            self.fit = ProbeFit.of(safetensors.torch.load((self._folder.path / _SUMS).read_bytes()), self._geometry)
        except (OSError, SafetensorError, KeyError):
            self.fit = ProbeFit(self._geometry)
        self._kept = {place for place in self._listed() if place in self.fit.places and self._read(*place) is not None}
        return len(self._kept)

    def finished(self, document: int) -> Set[int]:
        """Indices of the finished chunks of a document."""
        return {chunk for kept, chunk in self._kept if kept == document}

    def save(
        self,
        document: int,
        chunk: int,
        token_scores: torch.Tensor,
        keep_token_scores: bool,
        middle: slice,
        sums: Iterable[Mapping[str, torch.Tensor]] | None,
    ) -> None:
        """Write the statistics of a chunk and, if asked, its token scores [L', G, m].

        ``middle`` are the tokens of the chunk between sinks and window, and ``sums`` those of ``probe.sums`` over them,
        for each profiled layer; None where they are not known, so that there will be no probe.
        """
        statistics = HeadStatistics.of(token_scores)
        between = token_scores[..., middle]
        tensors = {
            "maximum": statistics.maximum,
            "total": statistics.total,
            "histogram": statistics.histogram,
            "positions": torch.tensor(statistics.positions),
            "middle": histogram(between),
        }
        if keep_token_scores:
            tensors["token_scores"] = token_scores.contiguous()
        write_atomically(self._file(document, chunk), safetensors.torch.save(tensors))
        self.fit.add((document, chunk), sums or (), 0 if sums is None else between.shape[-1])
        self._kept.add((document, chunk))
        self._save_sums()

    def _save_sums(self, now: bool = False) -> None:
        """Write the sums of the probe's fit, large ones every few seconds only."""
        if not self.fit.places or self.fit.broken or not self._folder.path.is_dir():
            return
        if now or self.fit.nbytes <= _SMALL_SUMS or time.monotonic() - self._written > _SECONDS_BETWEEN:
            write_atomically(self._folder.path / _SUMS, safetensors.torch.save(self.fit.tensors()))
            self._written = time.monotonic()

    def save_loss(self, document: int, scores: torch.Tensor) -> None:
        """Write the loss-aware scores [L', G] of a document."""
        write_atomically(self._loss_file(document), safetensors.torch.save({"loss": scores.contiguous()}))

    def loss(self, document: int) -> torch.Tensor | None:
        """Loss-aware scores [L', G] of a document, if they are there."""
        try:
            return safetensors.torch.load(self._loss_file(document).read_bytes())["loss"]
        except (OSError, SafetensorError, KeyError):
            return None

    def statistics(self, document: int) -> HeadStatistics:
        """Statistics of a whole document, its chunks added in order."""
        chunks = [self._load(document, chunk) for chunk in sorted(self.finished(document))]
        total = self._statistics(chunks[0])
        for tensors in chunks[1:]:
            total = total + self._statistics(tensors)
        return total

    def chunk_statistics(self, document: int, chunk: int) -> HeadStatistics:
        """Statistics of one finished chunk."""
        return self._statistics(self._load(document, chunk))

    def middle(self, document: int) -> torch.Tensor:
        """Histogram [L', G, BINS] of a document's token scores between sinks and window."""
        found = [self._load(document, chunk)["middle"] for chunk in sorted(self.finished(document))]
        return torch.stack(found).sum(0)

    def token_scores(self, document: int) -> torch.Tensor:
        """Token scores [L', G, T] of a whole document, kept if asked for."""
        chunks = sorted(self.finished(document))
        return torch.cat([self._load(document, chunk)["token_scores"] for chunk in chunks], -1)

    def discard(self) -> None:
        """Remove the chunks of a run whose profile is written."""
        self.fit = ProbeFit(self._geometry)
        self._folder.discard()

    def _file(self, document: int, chunk: int) -> Path:
        return self._folder.path / f"document-{document:05}-chunk-{chunk:05}.safetensors"

    def _loss_file(self, document: int) -> Path:
        return self._folder.path / f"document-{document:05}-loss.safetensors"

    def _listed(self) -> list[tuple[int, int]]:
        names = (file.stem.split("-") for file in self._folder.path.glob("document-*-chunk-*.safetensors"))
        return [(int(name[1]), int(name[3])) for name in names]

    def _read(self, document: int, chunk: int) -> dict[str, torch.Tensor] | None:
        try:
            return safetensors.torch.load(self._file(document, chunk).read_bytes())
        except (OSError, SafetensorError):
            return None

    def _load(self, document: int, chunk: int) -> dict[str, torch.Tensor]:
        tensors = self._read(document, chunk)
        if tensors is None:
            raise RuntimeError(f"{self._file(document, chunk)} disappeared during the run")
        return tensors

    @staticmethod
    def _statistics(tensors: dict[str, torch.Tensor]) -> HeadStatistics:
        return HeadStatistics(
            tensors["maximum"], tensors["total"], tensors["histogram"], int(tensors["positions"].item())
        )
