from __future__ import annotations

import os
import struct
import subprocess
import sys
from xml.etree import ElementTree as ET

import pytest

from kvprofile.errors import InputError
from kvprofile.report import plots
from kvprofile.report.plots import Kind
from tests.helpers.factories import make_profile

LOW_DPI = 40  # keeps the tests fast


def size_of_png(content: bytes) -> tuple[int, int]:
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", content[16:24])


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("picture", ["png", "svg"])
def test_every_kind_is_drawn_and_its_bytes_are_stable(kind, picture):
    profile = make_profile(6, 4, sliding=(1, 3))
    first = plots.render([profile], picture, [kind], LOW_DPI)
    assert first == plots.render([profile], picture, [kind], LOW_DPI)
    assert len(first) > 1000


def test_bytes_are_the_same_in_another_process(tmp_path):
    code = (
        "import sys; from pathlib import Path; from tests.helpers.factories import make_profile; "
        "from kvprofile.report import plots; plots.write([make_profile()], Path(sys.argv[1]), dpi=40)"
    )
    for name, seed in (("a.svg", "1"), ("b.svg", "2")):
        arguments = [sys.executable, "-c", code, str(tmp_path / name)]
        subprocess.run(arguments, check=True, capture_output=True, env=os.environ | {"PYTHONHASHSEED": seed})
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_settings_of_the_caller_change_nothing_and_are_left_alone():
    import matplotlib

    profile = make_profile(3, 2)
    before = plots.render([profile], "png", dpi=LOW_DPI)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        assert plots.render([profile], "png", dpi=LOW_DPI) == before
        assert matplotlib.rcParams["font.size"] == 30


@pytest.mark.parametrize(
    ("layers", "kv_heads", "sliding"),
    [(1, 1, ()), (1, 32, ()), (80, 8, ()), (126, 1, ()), (32, 32, ()), (26, 4, [i for i in range(26) if i % 6 != 5])],
)
def test_weird_shapes_are_drawn(layers, kv_heads, sliding):
    content = plots.render([make_profile(layers, kv_heads, sliding=sliding)], "png", dpi=LOW_DPI)
    width, height = size_of_png(content)
    assert width == 400
    assert 150 < height < 700


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_equal_scores_are_drawn_without_a_warning(value, recwarn):
    plots.render([make_profile(4, 2, scores=[[value] * 2] * 4)], "png", dpi=LOW_DPI)
    assert [str(each.message) for each in recwarn] == []


def test_names_are_text_never_formulae_or_errors(recwarn):
    profile = make_profile(2, 2, name=r"a$\frac$/模型 <b>&" + "x" * 150)
    root = ET.fromstring(plots.render([profile], "svg"))  # noqa: S314 -- our own bytes
    assert root.tag.endswith("svg")
    plots.render([profile], "png", dpi=LOW_DPI)
    assert [str(each.message) for each in recwarn] == []


def test_svg_has_no_date_and_a_title():
    content = plots.render([make_profile(name="org/name")], "svg").decode()
    assert "kvprofile: org/name" in content
    assert "dc:date" not in content
    assert "matplotlib.org" not in content


def test_several_profiles_stand_below_each_other():
    one = size_of_png(plots.render([make_profile()], "png", dpi=LOW_DPI))
    two = size_of_png(plots.render([make_profile(), make_profile(seed=1)], "png", dpi=LOW_DPI))
    assert two == (one[0], 2 * one[1])


def test_another_ending_is_refused_and_nothing_written(tmp_path):
    for name in ("picture.pdf", "picture", ".png"):
        with pytest.raises(InputError, match=r"must end in \.png or \.svg"):
            plots.write([make_profile()], tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_pictures_too_large_for_a_png_are_refused():
    with pytest.raises(InputError, match=r"smaller --dpi, fewer files, or an \.svg"):
        plots.render([make_profile()] * 12, "png", dpi=600)


def test_importing_does_not_load_matplotlib():
    heavy = "('matplotlib', 'numpy')"
    code = f"import sys, kvprofile.report.plots; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
