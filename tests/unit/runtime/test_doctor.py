"""``kvprofile doctor``: what it says of an installation, an environment and a server."""

from __future__ import annotations

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, multiprocess
from prometheus_client.platform_collector import PlatformCollector

from kvprofile.cli import run
from kvprofile.files import BUDGET_DIR
from kvprofile.instrumentation import GPUMemoryManager
from kvprofile.runtime import doctor, metrics, stats
from kvprofile.runtime.engine_budget import EngineBudget
from kvprofile.runtime.patching import Patch
from kvprofile.runtime.settings import SHARED
from tests.helpers.models import ROOT

ON = {"LLM_KVZIP_ENABLED": "1"}
ALONE = 'python_info{implementation="CPython"} 1.0\n'
"""A metric of a server in one process."""

RUNNING = 'vllm:num_requests_running{engine="0",model_name="m"} 1.0\n'
ROUTED = 'vllm:num_requests_running{server="http://10.0.0.1:8000"} 1.0\n'
"""As the router of vLLM's production stack says it."""

TWO = "".join(f'vllm:cache_config_info{{engine="{engine}",num_gpu_blocks="9"}} 1.0\n' for engine in (0, 1))
COUNTED = 'kvprofile_kv_bytes_reclaimed_total{engine="0"} 0.0\n'
BUDGETS = "kvprofile_enabled 1.0\nkvprofile_retention_ratio 0.5\nkvprofile_kv_bytes_reclaimed_total 9437184.0\n"


INFO = BUDGETS + 'kvprofile_budget_info{budget="aa11"} 1.0\n'


HEADS = ((1.0, 0.0), (1.0, 1.0), (0.0, 0.0))


def serve_metrics(text):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.handle_request, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


def server_that_says(text):
    server, address = serve_metrics(text)
    with server:
        return doctor.server(address)


@pytest.mark.loopback
@pytest.mark.parametrize(
    ("text", "good", "said"),
    [
        (BUDGETS, True, "retention 0.5, 9.0 MiB given back so far"),
        (RUNNING + BUDGETS, True, "retention 0.5, 9.0 MiB given back so far"),
        ("kvprofile_enabled 1.0\n", True, "retention unknown"),
        ("kvprofile_enabled 1.0\nkvprofile_retention_ratio nan\n", True, "retention nan"),
        (ALONE + RUNNING + "kvprofile_enabled 0.0\n", False, "serves without budgets"),
        (ALONE + RUNNING, False, "serves without budgets"),
        ("", False, "serves without budgets"),
        ("kvprofile_enabled nan\n", False, "serves without budgets"),
        ("kvprofile_enabled\nkvprofile_enabled yes\nkvprofile_retention_ratio \x1b[31m\n", False, "text format"),
        ("<html>welcome</html>", False, "text format"),
        (RUNNING, None, "cannot tell: several processes share its /metrics"),
        (ALONE + ROUTED, None, "cannot tell: these are a router's /metrics"),
        (TWO + BUDGETS + COUNTED + COUNTED.replace("0", "1"), True, "given back so far, 2 replicas"),
        (TWO + BUDGETS + COUNTED, True, "2 replicas, those of 1 on other machines not counted"),
    ],
)
def test_a_server_is_known_by_its_metrics(text, good, said):
    found = server_that_says(text)
    assert (found.good, said in found.detail) == (good, True), found
    assert "\x1b" not in found.detail


def test_metrics_joined_from_processes_lack_what_tells_one_process(tmp_path, monkeypatch):
    """The mark that the doctor goes by, from prometheus_client itself."""
    alone, joined = CollectorRegistry(), CollectorRegistry()
    PlatformCollector(alone)
    assert doctor.OWN_PROCESS in prometheus_client.generate_latest(alone).decode()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    multiprocess.MultiProcessCollector(joined)
    assert doctor.OWN_PROCESS not in prometheus_client.generate_latest(joined).decode()


@pytest.mark.loopback
def test_addresses_that_are_none():
    assert "does not answer" in doctor.server("http://127.0.0.1:9").detail
    assert doctor.server("file:///etc").good is False
    assert doctor.server("http://[bad").good is False


@pytest.mark.loopback
def test_only_proof_counts_as_success(capsys):
    """The exit code of `doctor --url` is what scripts ask; a server that cannot be judged is not one with budgets."""
    for text, code in ((BUDGETS, 0), (RUNNING, 1), (ALONE + RUNNING, 1)):
        server, address = serve_metrics(text)
        with server:
            assert run(["doctor", "--url", address, "--json"]) == code
        found = json.loads(capsys.readouterr().out)
        assert found["ok"] is (code == 0)


@pytest.mark.loopback
@pytest.mark.parametrize(
    ("pages", "good", "said"),
    [
        ([INFO, INFO], True, "all 2 servers apply budget aa11 (retention 0.5)"),
        ([INFO, INFO, INFO.replace("aa11", "bb22")], False, "different budgets: aa11 (retention 0.5) at http"),
        ([INFO, ALONE], None, "fewer than two of the servers apply budgets"),
        ([INFO, INFO, ALONE], True, "all 2 servers that apply any, of 3, apply budget aa11"),
        ([INFO, BUDGETS], None, "cannot tell: a server with kvprofile 0.1"),
        ([INFO, BUDGETS.replace("0.5", "0.3")], False, "aa11 (retention 0.5) at"),
    ],
)
def test_budgets_of_several_servers_are_compared(pages, good, said, capsys):
    with contextlib.ExitStack() as stack:
        addresses = []
        for page in pages:
            server, address = serve_metrics(page)
            stack.enter_context(server)
            addresses += ["--url", address]
        alright = good is True and ALONE not in pages
        assert run(["doctor", *addresses, "--json"]) == (0 if alright else 1)
    found = json.loads(capsys.readouterr().out)
    *each, last = found["checks"]
    assert [check["good"] for check in each] == ["kvprofile_enabled 1.0" in page for page in pages]
    assert (last["name"], last["good"], said in last["detail"]) == ("budgets", good, True), last
    assert found["ok"] is alright


def test_a_budget_is_told_from_others_by_what_it_trims():
    one = EngineBudget(HEADS, 0, 1)
    same = EngineBudget(HEADS, 0, 1, permute_weights=True)
    assert metrics.identity(one) == metrics.identity(same)
    others = [EngineBudget(HEADS[::-1], 0, 1), EngineBudget(HEADS, 0, 2), EngineBudget(HEADS, 0, 1, probe="AAAA")]
    assert len({metrics.identity(budget) for budget in (one, *others)}) == 4


@pytest.mark.loopback
def test_a_memory_manager_survives_a_server_that_says_nonsense():
    server, address = serve_metrics("<html>welcome</html>")
    with server:
        assert GPUMemoryManager(address).sample().running is None


def test_the_environment_is_judged():
    assert doctor.environment({}).good is None
    assert doctor.environment(ON).good
    assert doctor.environment(ON | {"LLM_KVZIP_SINK": "x"}).good is False
    assert "LLM_KVZIP_RETENTION is '2'" in doctor.environment({"LLM_KVZIP_RETENTION": "2"}).detail


def test_the_budget_that_the_environment_names_is_read(tmp_path):
    lone = tmp_path / "pocket.json"
    lone.write_bytes((ROOT / "models" / "kv_budget" / "pocket.json").read_bytes())
    asked = ON | {"LLM_KVZIP_BUDGET": str(lone), "LLM_KVZIP_RETENTION": "0.5"}
    found = doctor.environment(asked)
    assert found.good is False
    assert f"no probe {tmp_path / 'pocket.probe.safetensors'}" in found.detail
    assert doctor.environment(asked | {"LLM_KVZIP_KIND": "whole"}).detail.endswith("whole heads, retention 0.5")
    probe = lone.with_name("pocket.probe.safetensors")
    probe.write_bytes((ROOT / "models" / "kv_budget" / probe.name).read_bytes())
    assert doctor.environment(asked).detail.endswith(f"{lone}: graded heads, retention 0.5")
    del asked["LLM_KVZIP_RETENTION"]
    assert "set LLM_KVZIP_RETENTION" in doctor.environment(asked).detail
    assert doctor.environment(ON | {"LLM_KVZIP_BUDGET": str(tmp_path / "none.json")}).good is False


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """The plugin's metrics of an engine that gave back 3 MiB, as they are in one of its API processes."""
    shared = tmp_path / "shared"
    shared.touch()
    stats.Counters(shared, None).reclaimed(3, 2**20)
    monkeypatch.setenv(SHARED, str(shared))
    collector = metrics.BudgetCollector()
    monkeypatch.setattr(metrics, "_collector", collector)
    collector.budget = EngineBudget(HEADS, 0, 1)
    return collector


@pytest.mark.loopback
@pytest.mark.parametrize("processes", ["one", "several"])
def test_the_doctor_reads_what_the_plugin_shows(processes, shown, tmp_path, monkeypatch):
    registry = CollectorRegistry()
    if processes == "one":
        registry.register(shown)
        text = prometheus_client.generate_latest(registry).decode()
    else:
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
        multiprocess.MultiProcessCollector(registry)
        assert "kvprofile" not in prometheus_client.generate_latest(registry).decode()
        patch = Patch(multiprocess.MultiProcessCollector, "collect", metrics.joining)
        patch.apply()
        try:
            text = prometheus_client.generate_latest(registry).decode()
        finally:
            patch.remove()
    found = server_that_says(text)
    assert found.good
    assert found.detail.endswith("retention 0.5, 3.0 MiB given back so far")


def test_the_folder_of_budget_files_has_one_name():
    assert (ROOT / BUDGET_DIR / "pocket.json").is_file()
