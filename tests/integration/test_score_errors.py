"""Bad input of every kind: exit code 2, one clear line, and no file left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from kvprofile import checkpoint as checkpoints
from kvprofile.cli import run
from kvprofile.scoring import prompts
from tests.helpers.attack import Attack
from tests.helpers.models import _SHAPE, random_model, save_checkpoint

FAST = ["--corpus", "generate:prose:1:3000", "--context-tokens", "64", "--chunk-tokens", "32"]


def refused(capsys, workplace, arguments, lines_before=0):
    """Run `kvprofile score`; returns the one line it ends with, after the lines that describe the run."""
    code = run(["score", *map(str, arguments)])
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 + lines_before, captured.err
    assert lines[-1].startswith("kvprofile: ")
    assert "Traceback" not in captured.err
    assert list(workplace.rglob("*")) == []
    return lines[-1]


def change_config(checkpoint, **changes):
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    config.update(changes)
    file.write_text(json.dumps(config))


def test_missing_folder(capsys, workplace):
    assert "no checkpoint folder ./nowhere" in refused(capsys, workplace, ["./nowhere", *FAST])


def test_hub_id_without_network(capsys, workplace):
    assert "not in the local hub cache" in refused(capsys, workplace, ["some-org/some-model", *FAST])


def test_folder_without_config(capsys, workplace, checkpoint):
    (checkpoint / "config.json").unlink()
    assert "has no config.json" in refused(capsys, workplace, [checkpoint, *FAST])


def test_config_that_is_not_json(capsys, workplace, checkpoint):
    (checkpoint / "config.json").write_text("{")
    assert "is not JSON" in refused(capsys, workplace, [checkpoint, *FAST])


def test_unknown_model_type(capsys, workplace, checkpoint):
    change_config(checkpoint, model_type="from-the-future")
    assert "model type 'from-the-future' is not known to transformers" in refused(
        capsys, workplace, [checkpoint, *FAST]
    )


@pytest.mark.parametrize("left", [4, 200, 5000])
def test_truncated_weights(capsys, workplace, checkpoint, left):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:left])
    assert "truncated" in refused(capsys, workplace, [checkpoint, *FAST])


def test_weights_that_are_not_safetensors(capsys, workplace, checkpoint):
    (checkpoint / "model.safetensors").write_bytes((20).to_bytes(8, "little") + b"not json at all, no...")
    assert "not a safetensors file" in refused(capsys, workplace, [checkpoint, *FAST])


def test_pickled_weights_only(capsys, workplace, checkpoint):
    (checkpoint / "model.safetensors").unlink()
    torch.save({}, checkpoint / "pytorch_model.bin")
    assert "reads safetensors only" in refused(capsys, workplace, [checkpoint, *FAST])


def test_no_weights(capsys, workplace, checkpoint):
    (checkpoint / "model.safetensors").unlink()
    assert "has no *.safetensors" in refused(capsys, workplace, [checkpoint, *FAST])


@pytest.mark.parametrize("name", ["absent.safetensors", "../outside.safetensors"])
def test_index_that_names_other_files(capsys, workplace, checkpoint, name):
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    line = refused(capsys, workplace, [checkpoint, *FAST])
    assert "lacks absent.safetensors" in line or "is not a plain file name" in line


def test_weights_without_a_tensor(capsys, workplace, checkpoint):
    """transformers would make up what is missing."""
    weights = load_file(checkpoint / "model.safetensors")
    del weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    line = refused(capsys, workplace, [checkpoint, *FAST])
    assert "the weights lack model.layers.1.self_attn.k_proj.weight" in line


def test_weights_of_another_shape(capsys, workplace, checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    line = refused(capsys, workplace, [checkpoint, *FAST])
    assert "model.norm.weight has shape [7], the model that config.json describes has [64]" in line


def test_weights_that_are_not_numbers(capsys, workplace, checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.layers.1.self_attn.k_proj.weight"][0, 0] = torch.nan
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    line = refused(capsys, workplace, [checkpoint, *FAST], lines_before=6)
    assert "layer 1 gives scores that are not numbers" in line


CONFIGS = [
    {"num_attention_heads": 0},
    {"num_hidden_layers": 0},
    {"vocab_size": 0},
    {"hidden_size": 0},
    {"hidden_size": -64},
    {"num_hidden_layers": 10**18},
    {"num_hidden_layers": 1e18},
    {"vocab_size": 10**30},
    {"hidden_size": 10**400},
    {"rope_parameters": {"rope_type": "dynamic", "factor": 10**400}},
    {"max_position_embeddings": "9" * 5000},
    {"quantization_config": [1]},
    {"dtype": "evil"},
]


@pytest.mark.parametrize("changes", CONFIGS, ids=lambda changes: str(changes)[:40])
def test_configs_that_make_no_sense(capsys, workplace, checkpoint, changes):
    change_config(checkpoint, **changes)
    refused(capsys, workplace, [checkpoint, *FAST])


@pytest.mark.parametrize("named", [["x\x1b[31m" * 60], [["x"]], {"x": 1}, 7, True, [], ""], ids=str)
def test_an_architecture_that_is_not_a_name_does_no_harm(checkpoint, workplace, named):
    change_config(checkpoint, architectures=named)
    assert run(["score", str(checkpoint), *FAST, "--output", str(workplace / "out.json")]) == 0
    assert "\\u001b" not in (workplace / "out.json").read_text()


def test_tokenizer_of_another_model(capsys, workplace, tmp_path, tokenizer):
    folder = save_checkpoint(random_model("llama", vocab_size=300), tmp_path / "small", tokenizer)
    assert "the model has 300 embeddings; it belongs to another model" in refused(capsys, workplace, [folder, *FAST])


def test_missing_tokenizer(capsys, workplace, checkpoint):
    for file in checkpoint.glob("tokenizer*"):
        file.unlink()
    assert "tokenizer" in refused(capsys, workplace, [checkpoint, *FAST])


def test_broken_tokenizer(capsys, workplace, checkpoint):
    (checkpoint / "tokenizer.json").write_text('{"model": 1}')
    assert "cannot load the tokenizer" in refused(capsys, workplace, [checkpoint, *FAST])


@pytest.mark.parametrize("value", ["", "many", [], {}])
def test_a_tokenizer_whose_longest_text_is_not_a_number(capsys, workplace, checkpoint, value):
    config = checkpoint / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_max_length": value}))
    assert "model_max_length in tokenizer_config.json is not a number" in refused(
        capsys, workplace, [checkpoint, *FAST]
    )


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"])
def test_nesting_without_end(capsys, workplace, checkpoint, name):
    (checkpoint / name).write_text("[" * 100_000)
    code = run(["score", str(checkpoint), *FAST, "--output", str(workplace / "out.json")])
    assert code in (0, 2), capsys.readouterr().err


def test_chat_template_that_fails(capsys, workplace, checkpoint):
    (checkpoint / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    assert "the chat template fails" in refused(capsys, workplace, [checkpoint, *FAST])


def test_chat_template_without_the_text(capsys, workplace, checkpoint):
    (checkpoint / "chat_template.jinja").write_text("hello")
    assert "does not hold the user's text exactly once" in refused(capsys, workplace, [checkpoint, *FAST])


ESCAPES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch attacked') }}",
    "builtins": "{{ messages.append.__self__.__class__.__base__ }}",
    "other files": "{% include '/etc/hostname' %}",
    "endless": "{% for i in range(10 ** 9) %}{{ i }}{% endfor %}",
}


@pytest.mark.parametrize("template", ESCAPES.values(), ids=ESCAPES)
def test_chat_template_that_reaches_out_of_its_sandbox(capsys, workplace, checkpoint, template):
    (checkpoint / "chat_template.jinja").write_text(template + "{{ messages[0]['content'] }}")
    line = refused(capsys, workplace, [checkpoint, *FAST])
    assert "the chat template" in line
    assert not (workplace / "attacked").exists()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "no end after 1 s"),
        ("{{ 'x' * 2000000 }}", "writes 2,000,027 characters around one text"),
    ],
)
def test_chat_template_without_end(capsys, workplace, checkpoint, monkeypatch, template, message):
    monkeypatch.setattr(prompts, "TEMPLATE_TIMEOUT_S", 1.0)
    (checkpoint / "chat_template.jinja").write_text(template + "{{ messages[0]['content'] }}")
    assert message in refused(capsys, workplace, [checkpoint, *FAST])


def test_code_in_the_tokenizer_is_not_run(workplace, checkpoint):
    config = checkpoint / "tokenizer_config.json"
    named = {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}}
    config.write_text(json.dumps({**json.loads(config.read_text()), **named}))
    (checkpoint / "evil.py").write_text(f"open({str(workplace / 'attacked')!r}, 'w')")
    assert run(["score", str(checkpoint), *FAST, "--output", str(workplace / "out.json")]) in (0, 2)
    assert not (workplace / "attacked").exists()


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"weight_map": {"x": ["y"]}}', '{"weight_map": {"x": 1, "y": "z"}}']
)
def test_indices_that_are_not_indices(capsys, workplace, checkpoint, content):
    (checkpoint / "model.safetensors.index.json").write_text(content)
    assert "not a safetensors index" in refused(capsys, workplace, [checkpoint, *FAST])


def test_a_model_type_that_is_not_text(capsys, workplace, checkpoint):
    change_config(checkpoint, model_type=["llama"], auto_map={"AutoConfig": "evil.Config"})
    assert "model_type is not text" in refused(capsys, workplace, [checkpoint, *FAST])


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_config_cannot_choose_a_kernel_of_the_hub(checkpoint, workplace, key):
    """transformers would fetch it and run it."""
    change_config(checkpoint, **{key: "kernels-community/evil"})
    description = checkpoints.describe(checkpoints.locate(str(checkpoint)))
    assert description.config._attn_implementation is None
    assert run(["score", str(checkpoint), *FAST, "--output", str(workplace / "out.json")]) == 0


LIES = {
    "overlap": [-8, 0],
    "gap": [8, 0],
    "backwards": [0, -(10**6)],
    "before the file": [-(10**9), 0],
    "beyond the file": [0, 2**60],
    "without end": [0, 1e400],
    "one offset": [0],
    "no offsets": [],
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_weights_whose_header_lies(capsys, workplace, checkpoint, lie):
    file = checkpoint / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    tensor = header["model.layers.1.self_attn.k_proj.weight"]
    tensor["data_offsets"] = [at + by for at, by in zip(tensor["data_offsets"], lie, strict=False)]
    made = json.dumps(header).encode()
    file.write_bytes(len(made).to_bytes(8, "little") + made + content[8 + length :])
    assert "is not a safetensors file" in refused(capsys, workplace, [checkpoint, *FAST])


@pytest.mark.parametrize("length", [0, 1, 2**63, 2**64 - 1])
def test_weights_whose_header_has_an_impossible_length(capsys, workplace, checkpoint, length):
    file = checkpoint / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    assert "safetensors" in refused(capsys, workplace, [checkpoint, *FAST])


def test_pickles_next_to_the_weights_are_never_opened(checkpoint, workplace):
    target = workplace / "attacked"
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "adapter_model.bin"):
        torch.save(Attack(target), checkpoint / name)
    (checkpoint / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/base", "peft_type": "LORA"}')
    assert run(["score", str(checkpoint), *FAST, "--output", str(workplace / "out.json")]) == 0
    assert not target.exists()


def test_vision_model(capsys, workplace, checkpoint):
    transformers.Gemma3Config().save_pretrained(checkpoint)
    line = refused(capsys, workplace, [checkpoint, *FAST])
    assert "cannot be profiled: it reads images or sound" in line
    assert "gemma3" in line


def test_encoder_decoder(capsys, workplace, checkpoint):
    transformers.T5Config().save_pretrained(checkpoint)
    assert "it is an encoder-decoder" in refused(capsys, workplace, [checkpoint, *FAST])


def test_encoder(capsys, workplace, checkpoint):
    transformers.BertConfig().save_pretrained(checkpoint)
    assert "it is an encoder" in refused(capsys, workplace, [checkpoint, *FAST])


def test_latent_attention(capsys, workplace, checkpoint):
    transformers.DeepseekV3Config().save_pretrained(checkpoint)
    assert "multi-head latent attention" in refused(capsys, workplace, [checkpoint, *FAST])


@pytest.mark.parametrize("config", ["MambaConfig", "RecurrentGemmaConfig", "FalconConfig"])
def test_attention_of_another_kind(capsys, workplace, checkpoint, config):
    getattr(transformers, config)().save_pretrained(checkpoint)
    assert "cannot be profiled" in refused(capsys, workplace, [checkpoint, *FAST])


def test_every_layer_slides(capsys, workplace, checkpoint):
    transformers.MistralConfig(**_SHAPE, sliding_window=64).save_pretrained(checkpoint)
    assert "every layer slides over a window of 64 tokens" in refused(capsys, workplace, [checkpoint, *FAST])


def test_code_in_the_checkpoint(capsys, workplace, checkpoint):
    change_config(checkpoint, model_type="brings-its-own", auto_map={"AutoConfig": "evil.Config"})
    (checkpoint / "evil.py").write_text("raise SystemExit('ran')")
    assert "pass --trust-remote-code" in refused(capsys, workplace, [checkpoint, *FAST])


def test_code_next_to_a_model_that_transformers_knows_is_left_alone(checkpoint, workplace):
    change_config(checkpoint, auto_map={"AutoModelForCausalLM": "evil.Model"})
    (checkpoint / "evil.py").write_text("raise SystemExit('ran')")
    assert run(["score", str(checkpoint), *FAST, "--output", str(workplace / "out.json")]) == 0


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--device", "meta", "unknown device 'meta'"),
        ("--revision", "main", "is a folder and has no revisions"),
        ("--sink-tokens", "1000001", "must not exceed 1,000,000"),
        ("--corpus", "x" * 400, "cannot look for corpus"),
        ("--save-token-scores", "scores.bin", "ends in .safetensors"),
        ("--dtype", "int3", "unknown dtype 'int3'"),
        ("--device", "abacus", "unknown device 'abacus'"),
        ("--device", "cuda", "no CUDA device"),
        ("--method", "guess", "unknown method 'guess'"),
        ("--engine", "steam", "unknown engine 'steam'"),
        ("--corpus", "nothing-like-it", "no corpus 'nothing-like-it'"),
        ("--corpus", "generate:poems", "use generate:KIND"),
        ("--corpus", "datasets:./none", "cannot load the data set"),
        ("--chunk-tokens", "0", "--chunk-tokens must be at least 1"),
        ("--context-tokens", "-5", "--context-tokens must be at least 1"),
        ("--recent-tokens", "0", "--recent-tokens must be at least 1"),
        ("--sink-tokens", "-1", "--sink-tokens must not be negative"),
        ("--chunk-tokens", "many", "Invalid value for '--chunk-tokens'"),
        ("--wrong-flag", "1", "No such option"),
    ],
)
def test_flag_values(capsys, workplace, checkpoint, flag, value, message):
    if flag == "--device" and value == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert message in refused(capsys, workplace, [checkpoint, *FAST, flag, value])


def test_corpus_too_short(capsys, workplace, checkpoint):
    line = refused(capsys, workplace, [checkpoint, "--corpus", "generate:prose:1:500", "--context-tokens", "2000"])
    assert "is too short: its longest document has" in line


def test_context_longer_than_positions(capsys, workplace, checkpoint):
    asked = ["--corpus", "generate:prose:1:20000", "--context-tokens", "3000"]
    line = refused(capsys, workplace, [checkpoint, *asked])
    assert "max_position_embeddings is 4096" in line
    assert "--context-tokens" in line


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_context_longer_than_the_original_rope(capsys, workplace, tmp_path, tokenizer, kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 100}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    folder = save_checkpoint(random_model("llama"), tmp_path / kind, tokenizer)
    change_config(folder, rope_parameters=rope)
    assert f"{kind} RoPE changes its factors beyond 100 positions" in refused(capsys, workplace, [folder, *FAST])


def test_output_of_another_model(capsys, workplace, checkpoint, tmp_path, tokenizer):
    output = tmp_path / "out.json"
    assert run(["score", str(checkpoint), *FAST, "--output", str(output)]) == 0
    before = output.read_bytes()
    other = save_checkpoint(random_model("qwen2", num_hidden_layers=2), tmp_path / "other", tokenizer)
    capsys.readouterr()
    line = refused(capsys, workplace, [other, *FAST, "--output", output])
    assert "belongs to tiny" in line
    assert "--force" in line
    assert output.read_bytes() == before
    assert run(["score", str(other), *FAST, "--output", str(output), "--force"]) == 0
    assert output.read_bytes() != before
    assert run(["score", str(other), *FAST, "--output", str(output)]) == 0, "its own file needs no --force"


def test_output_is_a_foreign_file(capsys, workplace, checkpoint, tmp_path):
    output = tmp_path / "notes.json"
    output.write_text("my notes")
    assert "is not a readable budget file" in refused(capsys, workplace, [checkpoint, *FAST, "--output", output])
    assert output.read_text() == "my notes"


@pytest.mark.parametrize("flag", ["--output", "--save-token-scores"])
def test_read_only_output(capsys, workplace, checkpoint, tmp_path, flag):
    others = ["--output", tmp_path / "fine.json"] if flag != "--output" else []
    line = refused(capsys, workplace, [checkpoint, *FAST, *others, flag, "/proc/kvprofile/out.safetensors"])
    assert "cannot write /proc/kvprofile/out.safetensors" in line
    assert not (tmp_path / "fine.json").exists()


def test_token_scores_replace_nothing_of_anyone_else(capsys, workplace, checkpoint, tmp_path):
    weights = checkpoint / "model.safetensors"
    before = weights.read_bytes()
    line = refused(capsys, workplace, [checkpoint, *FAST, "--save-token-scores", weights])
    assert "holds no token scores; pass --force" in line
    assert weights.read_bytes() == before
    same = tmp_path / "same.safetensors"
    line = refused(capsys, workplace, [checkpoint, *FAST, "--output", same, "--save-token-scores", same])
    assert "is the budget file too" in line
    own = tmp_path / "own.safetensors"
    for _ in range(2):
        arguments = ["--output", str(tmp_path / "o.json"), "--save-token-scores", str(own)]
        assert run(["score", str(checkpoint), *FAST, *arguments]) == 0


def test_a_folder_that_only_looks_like_a_run(capsys, workplace, checkpoint, tmp_path):
    folder = tmp_path / "o.json.partial"
    folder.mkdir()
    (folder / "notes").write_text("precious")
    line = refused(capsys, workplace, [checkpoint, *FAST, "--output", tmp_path / "o.json"], lines_before=6)
    assert "is not a run's folder" in line
    assert (folder / "notes").read_text() == "precious"


def test_output_is_not_a_regular_file(capsys, workplace, checkpoint, tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    assert "it is not a regular file" in refused(
        capsys, workplace, [checkpoint, *FAST, "--output", tmp_path / "pipe.json", "--force"]
    )


def test_output_through_a_link_stays_a_link(checkpoint, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "real" / "file.json")
    assert run(["score", str(checkpoint), *FAST, "--output", str(tmp_path / "link.json")]) == 0
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real" / "file.json").is_file()


def test_output_is_a_folder(capsys, workplace, checkpoint, tmp_path):
    assert "it is a folder" in refused(capsys, workplace, [checkpoint, *FAST, "--output", tmp_path])


@pytest.mark.parametrize("room", [2000, 20_000], ids=["found at once", "found while scoring"])
def test_no_space_left(checkpoint, tmp_path, room):
    """A limit on file sizes stands in for a full disk: an OSError from the same write."""
    output = tmp_path / "full" / "out.json"
    script = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room})); "
    script += "from kvprofile.cli import main; main(sys.argv[1:])"
    arguments = ["score", str(checkpoint), *FAST, "--output", str(output)]
    found = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert found.returncode == 2, found.stderr
    assert found.stderr.strip().splitlines()[-1].startswith(f"kvprofile: cannot write {output.parent}")
    assert "Traceback" not in found.stderr
    assert not output.parent.exists()


def test_hub_snapshot_in_the_local_cache(capsys, workplace, tiny_checkpoint, tmp_path, monkeypatch):
    """A cached hub id is scored offline, under its own name and commit."""
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--some-org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(tiny_checkpoint, repository / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run(["score", "some-org/tiny", *FAST]) == 0, capsys.readouterr().err
    written = json.loads((workplace / "models/kv_budget/some-org--tiny.json").read_text())
    assert written["model"]["name"] == "some-org/tiny"
    assert written["model"]["revision"] == commit
