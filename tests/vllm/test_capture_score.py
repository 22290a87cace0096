"""`kvprofile score --engine vllm` in processes of its own: files, resumption, a quantised checkpoint, refusals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
from safetensors.torch import load_file
from scipy.stats import spearmanr

from kvprofile.budget import probe, store
from kvprofile.checkpoint import Source, describe
from kvprofile.cli import run as run_here
from kvprofile.errors import InputError
from kvprofile.scoring.vllm_engine import place_in_vllm
from tests.helpers.models import POCKET
from tests.helpers.quantised import quantise
from tests.vllm.capture import TOLERANCE
from tests.vllm.engine import environment
from tests.vllm.score_command import SMALL, finish, start

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


def test_the_command_writes_what_the_hf_engine_writes(tmp_path, capsys):
    """The same scores within the tolerance, JSON alone on stdout, and after Ctrl-C the same bytes as undisturbed."""
    output, tokens = tmp_path / "vllm.json", tmp_path / "vllm.safetensors"
    options = ("--engine", "vllm", "--vllm-arg", "block_size=64")
    out, errors = finish(start(POCKET, output, *options, "--save-token-scores", str(tokens), "--json"))
    assert json.loads(out)["file"] == str(output)
    assert "engine vllm: asked for" in errors
    assert "vLLM 0.32" in errors

    expected, expected_tokens = tmp_path / "hf.json", tmp_path / "hf.safetensors"
    arguments = [*SMALL, str(POCKET), "--engine", "hf", "--device", "cpu", "--output", str(expected)]
    assert run_here([*arguments, "--save-token-scores", str(expected_tokens)]) == 0
    found, wanted = store.load(output), store.load(expected)
    assert (found.scoring.engine, wanted.scoring.engine) == ("vllm", "hf")
    assert found.scoring.attention.startswith("CPU_ATTN of vLLM 0.32")
    assert "blocks of 64 tokens" in found.scoring.attention
    assert (found.scoring.dtype, found.scoring.device) == ("float32", "cpu")
    assert (found.model, found.scoring.corpora) == (wanted.model, wanted.scoring.corpora)
    ours, theirs = load_file(tokens), load_file(expected_tokens)
    worst = max((ours[name] - theirs[name]).abs().max().item() for name in theirs)
    for statistic in ("max", "mean", "p99", "spread"):
        pair = (torch.tensor(getattr(profile.scores, statistic)) for profile in (found, wanted))
        torch.testing.assert_close(*pair, atol=TOLERANCE, rtol=0.03 if statistic == "p99" else 0)
    assert worst < TOLERANCE
    assert found.probe.tokens == wanted.probe.tokens
    torch.testing.assert_close(torch.tensor(found.probe.r2), torch.tensor(wanted.probe.r2), atol=0.01, rtol=0)
    weights = [load_file(probe.path_of(path))["weights"] for path in (output, expected)]
    torch.testing.assert_close(*weights, atol=0.05, rtol=0.02)
    shares = [torch.tensor(profile.budgets["0.3"].heads) for profile in (found, wanted)]
    torch.testing.assert_close(*shares, atol=0.01, rtol=0)

    again = tmp_path / "again.json"
    process = start(POCKET, again, *options)
    partial = again.with_name("again.json.partial")
    deadline = time.monotonic() + 600
    while len(list(partial.glob("document-*.safetensors"))) < 5:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "run the same command again to continue" in errors
    assert "Traceback" not in errors
    _, errors = finish(start(POCKET, again, *options))
    assert "chunks are finished already" in errors
    assert again.read_bytes() == output.read_bytes()
    with capsys.disabled():
        print(f" worst difference {worst:.1e}", end="")


def test_a_quantised_checkpoint_is_profiled(tmp_path, capsys):
    """Our own int8 weights: vLLM is chosen and says why; heads rank almost as those of the bfloat16 checkpoint do."""
    folder, output, reference = (
        quantise(POCKET, tmp_path / "pocket-int8"),
        tmp_path / "int8.json",
        tmp_path / "bf16.json",
    )
    _, errors = finish(start(folder, output))
    assert "engine vllm: the weights are quantised (compressed-tensors)" in errors
    assert run_here([*SMALL, str(POCKET), "--output", str(reference)]) == 0
    quantised, whole = store.load(output), store.load(reference)
    assert quantised.scoring.engine == "vllm"
    assert quantised.model.weights_sha256 != whole.model.weights_sha256
    flat = [[value for row in profile.scores.mean for value in row] for profile in (quantised, whole)]
    correlation = spearmanr(*flat).statistic
    difference = (torch.tensor(flat[0]) - torch.tensor(flat[1])).abs().max().item()
    with capsys.disabled():
        print(f" rank correlation {correlation:.4f}, worst difference of a mean {difference:.1e}", end="")
    assert correlation > 0.95
    assert difference > 0, "the weights were not quantised"


REFUSALS = """
import json, sys
from vllm.engine.arg_utils import EngineArgs
from kvprofile.capture import ENGINE_ARGUMENTS, refuse
for arguments, extension in json.load(sys.stdin):
    more = ENGINE_ARGUMENTS if extension else {}
    config = EngineArgs(max_model_len=512, skip_tokenizer_init=True, **more, **arguments).create_engine_config()
    print("REFUSED", json.dumps(list(refuse.problems(config))))
"""

MLA = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "intermediate_size": 64,
    "vocab_size": 1024,
    "max_position_embeddings": 1024,
    "torch_dtype": "bfloat16",
}


def test_refusals_name_the_reason(tmp_path):
    """What a session cannot do is found from the configuration, each in a phrase."""
    (tmp_path / "mla").mkdir()
    (tmp_path / "mla" / "config.json").write_text(json.dumps(MLA))
    shape = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "mamba_n_heads": 2}
    transformers.GraniteMoeHybridConfig(
        **shape, architectures=["GraniteMoeHybridForCausalLM"], layer_types=["linear_attention", "full_attention"]
    ).save_pretrained(tmp_path / "states")
    speculative = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    cases = [
        ({"model": str(POCKET)}, True, None),
        ({"model": str(POCKET)}, False, "worker_extension_cls"),
        ({"model": str(POCKET), "speculative_config": speculative}, True, "speculative decoding"),
        ({"model": str(tmp_path / "mla")}, True, "multi-head latent attention (MLA)"),
        ({"model": str(tmp_path / "states")}, True, "layers that keep a state (linear attention, Mamba, convolutions)"),
        ({"model": str(POCKET), "kv_cache_dtype": "fp8_e4m3"}, True, "the quantised KV cache fp8_e4m3"),
    ]
    run = subprocess.run(
        [sys.executable, "-c", REFUSALS],
        input=json.dumps([case[:2] for case in cases]),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line.removeprefix("REFUSED") for line in run.stdout.splitlines() if line.startswith("REFUSED")]
    for (_, _, expected), line in zip(cases, lines, strict=True):
        found = json.loads(line)
        assert found == [] if expected is None else any(expected in reason for reason in found), (expected, found)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"positions": 4096}, "vLLM needs one more"),
        ({"tensor_parallel_size": 0}, "at least 1"),
        ({"pipeline_parallel_size": 0}, "--pipeline-parallel-size must be at least 1"),
        ({"pipeline_parallel_size": 7}, "the model has 6 layers"),
        ({"device": "cuda"}, "vLLM serves on cpu here"),
        ({"dtype": "int8"}, "unknown dtype"),
        ({"others": ["max_num_seqs=4"]}, "sets it itself"),
    ],
)
def test_engines_that_cannot_be_placed(changed, words):
    description = describe(Source("pocket", POCKET, None))
    options = {"dtype": "auto", "device": "auto", "positions": 500, **changed}
    with pytest.raises(InputError, match=words):
        place_in_vllm(description, **options)


def test_the_dtype_is_the_checkpoint_s_own():
    placed = place_in_vllm(describe(Source("pocket", POCKET, None)), "auto", "auto", 500)
    assert placed.dtype == placed.arguments["dtype"] == "bfloat16"
    assert "dtype bfloat16: the checkpoint's own, as it is served" in placed.reasons


def test_the_command_refuses_in_one_line(tmp_path):
    """Before any weight loads."""
    option = 'speculative_config={"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}'
    process = start(POCKET, tmp_path / "out.json", "--engine", "vllm", "--vllm-arg", option)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 2
    assert errors.splitlines()[-1] == "kvprofile: kvprofile does not score with speculative decoding"
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())
