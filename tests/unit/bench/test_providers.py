"""Providers: the bundled ones, files of your own, and keys that go nowhere else."""

from __future__ import annotations

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from kvprofile.bench import prepare, providers
from kvprofile.bench.bench_options import BenchOptions
from kvprofile.bench.engines import openai_compatible
from kvprofile.errors import InputError
from tests.helpers.models import POCKET


def test_bundled_providers_have_moonshot_ready():
    found = providers.choose("moonshot")
    assert found.base_url == "https://api.moonshot.ai/v1"
    assert found.key_env == "MOONSHOT_API_KEY"
    with pytest.raises(InputError, match=r"^provider moonshot needs a key: set MOONSHOT_API_KEY$"):
        found.key({})
    assert found.key({"MOONSHOT_API_KEY": " sk-1 "}) == "sk-1"
    with pytest.raises(InputError, match="no header can carry"):
        found.key({"MOONSHOT_API_KEY": "sk-ключ"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[mine]\nbase_url = 'https://x/v1'\napi_key = 'sk-1'", "keep it in the environment"),
        ("[mine]\nbase_url = 'ftp://x'", "base_url"),
        ("[mine]\nbase_url = 'https://user:secret@x/v1'", "base_url"),
        ("[mine]", "needs a base_url"),
        ("mine = 1", "is not a table"),
        ("[mine", "is not TOML"),
        ("[mine]\nbase_url = 'https://x'\nmax_attempts = 0", "max_attempts"),
        ("[mine]\nbase_url = 'https://x'\nspeed = 1", "speed"),
    ],
)
def test_broken_provider_files_say_what_is_wrong(tmp_path, text, said):
    file = tmp_path / "providers.toml"
    file.write_text(text)
    with pytest.raises(InputError, match=said) as error:
        providers.load(file)
    assert "sk-1" not in str(error.value)
    assert "secret" not in str(error.value)


def test_own_providers_add_to_the_bundled_ones(workplace):
    (workplace / "providers.toml").write_text(
        "[moonshot]\nbase_url = 'https://proxy/v1'\n[mine]\nbase_url = 'http://127.0.0.1:1/v1'\nbody = {top_k = 1}\n"
        "prices = {currency = 'EUR', input_per_million_tokens = 2, output_per_million_tokens = 8}"
    )
    found = providers.load()
    assert found["moonshot"].key_env is None
    assert found["mine"].prices.amount(1_000_000, 0, 500_000) == 6
    assert found["mine"].body == {"top_k": 1}
    with pytest.raises(InputError, match="no provider 'nobody'; known are loopback, mine, moonshot"):
        providers.choose("nobody")


def test_a_file_that_happens_to_lie_here_sends_no_key_elsewhere(workplace):
    file = workplace / "providers.toml"
    file.write_text("[moonshot]\nbase_url = 'https://evil.example/v1'\nkey_env = 'MOONSHOT_API_KEY'")
    with pytest.raises(InputError, match=r"sends MOONSHOT_API_KEY to https://evil\.example/v1 under the name moonshot"):
        providers.load()
    assert providers.choose("moonshot", file).base_url == "https://evil.example/v1"  # asked for
    asked = BenchOptions(model=str(POCKET), local=False, providers=("moonshot",), providers_file=file)
    said = "provider moonshot: https://evil.example/v1, with MOONSHOT_API_KEY"
    assert said in prepare.prepare(asked).reasons


@contextlib.contextmanager
def behind(metrics):
    """A server with one model and these metrics. Gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            answer = metrics if self.path == "/metrics" else json.dumps({"object": "list", "data": [MODEL]})
            self.send_response(200)
            self.send_header("Content-Type", "text/plain" if self.path == "/metrics" else "application/json")
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


MODEL = {"id": "m", "object": "model", "created": 0, "owned_by": "x"}
STOCK = "".join(f'vllm:cache_config_info{{engine="{engine}",num_gpu_blocks="9"}} 1.0\n' for engine in (0, 1))
TRIMMED = STOCK + 'kvprofile_enabled 1.0\nkvprofile_budget_info{budget="aa11"} 1.0\n'


@pytest.mark.loopback
@pytest.mark.parametrize(
    ("pages", "replicas", "warned"),
    [
        ([STOCK], 2, []),
        ([STOCK, STOCK], 4, []),
        ([TRIMMED, TRIMMED], 4, []),
        ([TRIMMED, TRIMMED.replace("aa11", "bb22")], 4, ["the servers apply different budgets: aa11"]),
        ([TRIMMED, STOCK], 4, ["some apply budgets, others do not"]),
        ([STOCK, "<html>"], None, ["not all servers of mine show their /metrics"]),
        ([STOCK, "up 1\n"], None, ["not all servers of mine show their /metrics"]),
        ([], None, []),
    ],
)
def test_servers_behind_a_provider_are_counted_and_compared(pages, replicas, warned):
    with contextlib.ExitStack() as stack:
        router = stack.enter_context(behind(STOCK))
        addresses = tuple(stack.enter_context(behind(page)) for page in pages)
        provider = providers.Provider(name="mine", base_url=f"{router}/v1", servers=addresses)
        with openai_compatible.connected(provider, None, {}) as running:
            assert running.facts["replicas"] == replicas
            assert len(running.warnings) == len(warned)
            assert all(words in told for words, told in zip(warned, running.warnings, strict=True)), running.warnings
