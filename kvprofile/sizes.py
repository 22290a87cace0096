"""Sizes of memory as people write them: '64MiB', '1.5 GB'. Standard library only.

``pydantic.ByteSize`` would also accept '64' (bytes), '8Gbit' and '64MiB and more'; here these are mistakes.
"""

from __future__ import annotations

import re

MAX_BYTES = 2**60
"""1 EiB: more than any memory or cache has."""

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt])(i?)b\s*", re.IGNORECASE)


def parse_size(text: str) -> float | None:
    """Bytes of a number with its unit, KB to TB in thousands and KiB to TiB in 1024s; None for any other text.

    The caller bounds it: '0GiB' is 0, '9999999999TiB' is above ``MAX_BYTES``.
    """
    found = _SIZE.fullmatch(text)
    if found is None:
        return None
    thousands = "kmgt".index(found[2].lower()) + 1
    return float(found[1]) * float((1024 if found[3] else 1000) ** thousands)
