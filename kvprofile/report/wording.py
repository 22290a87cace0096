"""Numbers, differences and foreign text as people read them: units, signs, digits, and no character that commands."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from kvprofile.report.figures import Unit
from kvprofile.statistics import Estimate

MISSING = "\N{EN DASH}"
_BYTES = (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("bytes", 1))
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(frozen=True)
class Scale:
    """How the numbers of one row or axis are written: divided by ``divisor``, with ``unit`` said once."""

    unit: str
    divisor: float = 1.0
    percent: bool = False

    def text(self, value: float | None) -> str:
        """A number without its unit, but for percents: '612', '61.3', '0.0613', '96.3 %'; a dash for the unknown."""
        if value is None:
            return MISSING
        if self.percent:
            return f"{_digits(value * 100, 1)} %"
        return number(value / self.divisor)

    def tick(self, value: float) -> str:
        """A round number on an axis, with no more digits than it needs: '1.5', '2', '25 %'."""
        return self.text(value) if self.percent else _digits(value / self.divisor, 6)


def scale_for(unit: Unit, values: Iterable[float | None], currency: str | None = None) -> Scale:
    """The scale that suits the largest of the values."""
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    if unit == "bytes":
        name, size = next(((name, size) for name, size in _BYTES if largest >= size), ("bytes", 1))
        return Scale(name, size)
    if unit == "share":
        return Scale("", percent=True)
    if unit == "money":
        return Scale(currency or "")
    return Scale({"count": "", "x": "\N{MULTIPLICATION SIGN}"}.get(unit, unit))


def number(value: float) -> str:
    """Three significant digits, whole numbers in full, thousands apart: '12,345', '612', '61.2', '0.0613'."""
    if value == 0:
        return "0"
    if value == int(value) and abs(value) < 1e15:
        return _signed(f"{int(value):,}")
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return _signed(f"{value:,.{min(places, 6)}f}")


def difference(estimate: Estimate, scale: Scale, *, relative: bool) -> tuple[str, str]:
    """A difference and its interval: ('+18.2 %', '+12.1 to +24.7'), ('-3.7 pts', ''), both empty if unknown."""
    if estimate.value is None:
        return "", ""
    known = estimate.low is not None and estimate.high is not None
    values = (estimate.value, estimate.low or 0.0, estimate.high or 0.0)
    hundredths = relative or scale.percent
    parts = [_hundredths(each) if hundredths else _plus(scale.text(each), each) for each in values]
    unit = " %" if relative else " pts" if scale.percent else ""
    return f"{parts[0]}{unit}", f"{parts[1]} to {parts[2]}" if known else ""


def interval(estimate: Estimate, scale: Scale) -> str:
    """The bounds of an estimate: '92.1 to 99.4', empty where unknown."""
    if estimate.low is None or estimate.high is None:
        return ""
    low, high = scale.text(estimate.low), scale.text(estimate.high)
    return f"{low.removesuffix(' %')} to {high}"


def verdict(estimate: Estimate, better: int) -> str:
    """'better' or 'worse' where the whole interval says so, else nothing."""
    if not better or estimate.low is None or estimate.high is None:
        return ""
    if estimate.low > 0:
        return "better" if better > 0 else "worse"
    if estimate.high < 0:
        return "worse" if better > 0 else "better"
    return ""


def visible(text: object) -> str:
    """Foreign text with its control characters shown, so that none acts: '␀', '⟨U+202E⟩'. Tabs and new lines stay."""
    return "".join(character if _harmless(character) else _shown(character) for character in str(text))


def _harmless(character: str) -> bool:
    if character in "\n\t":
        return True
    return (
        character not in _BIDI
        and not (ord(character) < 0x20 or 0x7F <= ord(character) < 0xA0)
        and not (0xD800 <= ord(character) < 0xE000)
    )


def _shown(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


def _digits(value: float, places: int) -> str:
    text = f"{value:,.{places}f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return _signed("0" if text == "-0" else text)


def _signed(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}", 1)


def _hundredths(value: float) -> str:
    text = f"{value * 100:+,.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else _signed(text)


def _plus(text: str, value: float) -> str:
    return f"+{text}" if value > 0 and text != "0" else text
