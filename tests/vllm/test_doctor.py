"""The doctor on an installation that has vLLM."""

from __future__ import annotations

import json

import pytest

from kvprofile.cli import run
from kvprofile.runtime import doctor

pytest.importorskip("vllm")

from vllm import plugins as plugins_of_vllm

ON = {"LLM_KVZIP_ENABLED": "1"}


def test_the_doctor_looks_at_the_installation(capsys, monkeypatch):
    monkeypatch.delenv("LLM_KVZIP_ENABLED", raising=False)
    assert run(["doctor", "--json"]) == 0
    found = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert all(found[name]["good"] for name in ("plugin", "vLLM", "patches"))
    assert "Attention.__init__" in found["patches"]["detail"]


@pytest.mark.parametrize(
    ("plugins", "loads"),
    [
        (None, True),
        ("kvprofile", True),
        ("other,kvprofile", True),
        ("", False),
        ("lora_filesystem_resolver", False),
        ("other, kvprofile", False),
        ("KVPROFILE", False),
        ("kvprofiler", False),
    ],
)
def test_the_doctor_knows_which_plugins_vllm_loads(plugins, loads, monkeypatch):
    """Against vLLM's own loader, which compares names as they stand."""
    environ = {} if plugins is None else {"VLLM_PLUGINS": plugins}
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert (doctor.PLUGIN in plugins_of_vllm.load_plugins_by_group(doctor.GROUP)) is loads
    found = doctor.plugin(environ | ON)
    assert found.good is loads
    assert loads or f"VLLM_PLUGINS={plugins!r} leaves it out" in found.detail
    assert doctor.plugin(environ).good is (True if loads else None)


@pytest.mark.parametrize("distributions", [("no-such-vllm",), ("pytest",), doctor.DISTRIBUTIONS])
@pytest.mark.parametrize("environ", [{}, ON, {"LLM_KVZIP_RETENTION": "2"}, ON | {"LLM_KVZIP_ALLOW_UNTESTED": "maybe"}])
def test_every_check_reports(distributions, environ, monkeypatch):
    """Where vLLM is missing, is a release that was not tested (pytest's number), or is the one here."""
    monkeypatch.setattr(doctor, "DISTRIBUTIONS", distributions)
    found = list(doctor.checks(environ))
    assert [check.name for check in found] == ["plugin", "vLLM", "patches", "environment", "attestation"]
    assert all(check.detail for check in found)
    assert found[3].good is (None if not environ else environ == ON)
