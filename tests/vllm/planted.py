"""A vLLM plugin for tests, which makes this platform an untested one, or plants a fault into kvprofile's runtime.

``PLANTED`` names what, separated by commas. ``plugin_path`` makes a folder that lets vLLM find it.
"""

from __future__ import annotations

import os


def plugin_path(folder):
    """A folder for PYTHONPATH, with what an installed plugin has there."""
    place = folder / "planted-1.0.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n")
    (place / "entry_points.txt").write_text("[vllm.general_plugins]\nplanted = tests.vllm.planted:register\n")
    return folder


def register():
    """What vLLM calls in each of its processes."""
    wanted = [name for name in os.environ.get("PLANTED", "").split(",") if name]
    if not wanted or os.environ.get("LLM_KVZIP_ENABLED") != "1":
        return
    from kvprofile.runtime import configure

    for name in wanted:
        if name == "untested":
            configure.TESTED_PLATFORMS = ()
        else:
            plant(name)


def plant(fault):
    """Plant one fault into this process, whose runtime was not used yet."""
    from kvprofile.runtime import permute
    from kvprofile.runtime.backend import TrimmedView
    from kvprofile.runtime.stream_cache import StreamManager

    if fault == "early":  # the scheduler gives the first block of the window back too
        give_back = StreamManager._give_back
        StreamManager._give_back = lambda self, request, first, last: give_back(
            self, request, first, last + (last > first)
        )
    elif fault == "heads":  # weights lie as in the checkpoint, and are taken for being in order
        permute._load_in_order = lambda *_: None
    elif fault == "output":  # only the output projection does
        reordering = permute._reordering
        permute._reordering = lambda stock, orders, dim: stock if dim else reordering(stock, orders, dim)
    elif fault == "stale":  # a batch of as many rows as the one before gets its view
        view, latest = TrimmedView.of, {}

        def of(self, metadata):
            found = view(self, metadata)
            key = id(self), metadata.num_reqs
            before, latest[key] = latest.get(key), found.seq_lens.clone()
            return found if before is None else found.replace(seq_lens=before)

        TrimmedView.of = of
    elif fault == "whole-view":  # workers see what the scheduler has given back
        skipped = TrimmedView.skipped_blocks
        TrimmedView.skipped_blocks = lambda self, metadata: skipped(self, metadata) * 0
    elif fault == "whole-table":  # rows are as long as they should be, and read the first blocks that they have
        view = TrimmedView.of
        TrimmedView.of = lambda self, metadata: view(self, metadata).replace(
            block_table_tensor=metadata.block_table_tensor
        )
    elif fault == "copies":  # right in every step, in tensors that no graph was captured with
        view = TrimmedView.of

        def of(self, metadata):
            found = view(self, metadata)
            copies = {name: getattr(found, name).clone() for name in ("block_table_tensor", "seq_lens")}
            return found.replace(**copies)

        TrimmedView.of = of
    elif fault == "frozen":  # what was made for the capture of a graph is not made anew when that is replayed
        view, made = TrimmedView.of, {}

        def of(self, metadata):
            key = id(self), metadata.num_reqs
            if metadata.max_query_len > 1 or key not in made:
                made[key] = view(self, metadata)
            return made[key]

        TrimmedView.of = of
    elif fault == "moves":  # tokens that stay are not moved to where they are read
        from kvprofile.runtime import moves

        moves.Moved._move = lambda *_: None
    elif fault == "crash":  # in the middle of decoding
        view, calls = TrimmedView.of, []

        def of(self, metadata):
            calls.append(1)
            if len(calls) > 200:
                raise RuntimeError("planted")
            return view(self, metadata)

        TrimmedView.of = of
    else:
        raise ValueError(fault)
