"""README and docs say what is: samples run or parse, options and files exist, messages are in the code."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import typer

from kvprofile.bench import providers
from kvprofile.budget import formats
from kvprofile.cli import app, load
from kvprofile.environment import ENABLED, PREFIX
from kvprofile.runtime import settings
from scripts import write_reference
from tests.helpers.docs_pages import PAGES, ROOT, Block, Command, blocks, commands, inline_code, shows

GROUP = typer.main.get_command(app)
CONSOLE = blocks("console", "bash", "sh", "shell")
ALL = [command for block in CONSOLE for command in commands(block)]
SAMPLES = [
    block for block in CONSOLE if "\n$ " in f"\n{block.body}" and not block.mark.startswith(("parsed: ", "served"))
]
FOREIGN = {
    "--save-result", "--save-detailed", "--append-result", "--served-model-name",  # vLLM's
    "--percentile-metrics", "--label",  # of its benchmark
    "--output", "--output-file", "--output-details", "--tag",  # of other benchmark tools
    "--extra-index-url",  # pip's
}  # fmt: skip


@cache
def options_of(name: str) -> set[str]:
    return {flag for parameter in load(name).params for flag in (*parameter.opts, *parameter.secondary_opts)}


def test_there_is_something_to_test():
    assert len(ALL) > 40
    assert len(SAMPLES) > 8
    assert {block.mark.partition(":")[0] for block in CONSOLE} <= {"", "slow", "served", "parsed"}


@pytest.mark.parametrize("command", ALL, ids=str)
def test_every_command_is_one(command: Command):
    known = {ENABLED, *(PREFIX + name for name in (*settings.VALUES, *settings.FLAGS))}
    assert {name for name in command.environment if name.startswith(PREFIX)} <= known
    program, *words = command.words
    if program == "kvprofile":
        context = GROUP.make_context("kvprofile", list(words))
        with context:
            name, subcommand, rest = GROUP.resolve_command(context, words)
            given = subcommand.make_context(name, list(rest), parent=context).params  # raises for wrong usage
        assert given.get("format_name", "csv") in formats.FORMATS
    elif program == "python" and words[0] != "-m":
        source = source_of(ROOT / words[0])
        names = [
            word[2:].replace("-", "_") for word in words if word.startswith("--")
        ]  # of options or of a recipe's fields
        assert [name for name in names if name not in source and name.replace("_", "-") not in source] == []
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words[0] in targets
    else:
        assert program in {"vllm", "python", "git", ".", "export", "tail", "curl"}


def source_of(script: Path) -> str:
    """A script's text, and that of the modules beside it that it imports."""
    source = script.read_text(encoding="utf-8")
    beside = [script.with_name(f"{name}.py") for name in re.findall(r"^from (\w+) import", source, re.MULTILINE)]
    return "\n".join([source, *(file.read_text(encoding="utf-8") for file in beside if file.is_file())])


def test_every_option_and_file_in_prose_exists():
    assert [(page, code) for page, code in inline_code() if not exists(code)] == []


def exists(code: str) -> bool:
    """Whether the options, files and extras that a piece of code names are there."""
    words = code.split()
    flags = {word.partition("=")[0].rstrip(",.;:") for word in words if re.fullmatch(r"--[a-z][\w-]*.*", word)}
    known = FOREIGN | {"--version", "--debug", "--help"} | set().union(*map(options_of, GROUP.commands))
    if words[0] == "kvprofile" and len(words) > 1 and words[1] in GROUP.commands:
        known = {"--help"} | options_of(words[1])
    extras = re.findall(r"kvprofile\[(\w+)\]", code)
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    is_file = re.fullmatch(r"(kvprofile|tests|scripts|benchmarks|corpora|docs)/[\w./-]+\.\w+", code)
    return (
        (flags <= known or words[0] in {"vllm", "python", "make"})
        and all(f"\n{extra} = [" in declared for extra in extras)
        and (is_file is None or (ROOT / code).exists())
    )


@pytest.fixture
def at_root(tmp_path, monkeypatch):
    """A folder that looks like the repository's root to a command, and may be written to."""
    (tmp_path / "models").mkdir()
    shutil.copytree(ROOT / "models" / "kv_budget", tmp_path / "models" / "kv_budget")
    for name in ("models/pocket", "corpora", "tests", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    budgets = tmp_path / "budgets"
    budgets.mkdir()
    qwen = json.loads((ROOT / "models/kv_budget/Qwen--Qwen2.5-7B-Instruct-1M.json").read_text())
    for name in ("qwen.json", "qwen-copy.json"):
        (budgets / name).write_text(json.dumps(qwen))
    qwen["model"]["geometry"]["kv_heads"] = 8
    (budgets / "edited.json").write_text(json.dumps(qwen))
    (budgets / "config.json").write_text('{"architectures": [], "model_type": "qwen2", "hidden_size": 1}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sample(block: Block):
    return pytest.param(block, id=str(block), marks=[pytest.mark.slow] if block.mark == "slow" else [])


@pytest.mark.parametrize("block", [sample(block) for block in SAMPLES])
@pytest.mark.usefixtures("at_root")
def test_samples_say_what_the_page_shows(block: Block):
    for command in commands(block):
        assert command.words[0] == "kvprofile", f"{command}: mark the block 'parsed: WHY'"
        env = {**os.environ, **command.environment, "PYTHONUNBUFFERED": "1"}
        run = subprocess.run(
            [sys.executable, "-m", "kvprofile", *command.words[1:]],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        assert run.returncode == (2 if "bad " in "".join(command.shown) else 0), run.stdout
        if command.shown and any(command.shown):
            assert shows(command.shown, run.stdout), f"{command} says now\n{run.stdout}"


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_compiles_and_what_it_imports_is_there(block: Block):
    for node in ast.walk(ast.parse(block.body)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("kvprofile"):
            place = ROOT / Path(*node.module.split("."))
            file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
            source = file.read_text(encoding="utf-8")
            for alias in node.names:
                defined = re.search(rf"^(def|class) {alias.name}\b|^{alias.name}\b", source, re.MULTILINE)
                assert defined or (place / f"{alias.name}.py").is_file(), alias.name


def test_the_snippet_about_records_runs(at_root):
    (block,) = (block for block in blocks("python") if block.page == "docs/report.md")
    (at_root / "runs" / "bench").mkdir(parents=True)
    shutil.copy(ROOT / "tests/data/run-record-v1.json", at_root / "runs/bench/record.json")
    exec(compile(block.body, str(block), "exec"), {})  # noqa: S102 - our own page
    assert (at_root / "report.html").is_file()


def test_the_provider_that_is_shown_loads(tmp_path):
    (block,) = blocks("toml")
    file = tmp_path / "providers.toml"
    file.write_text(block.body)
    assert providers.load(file)["mine"].key_env == "MY_KEY"


def test_the_reference_is_current():
    stale = [
        name
        for name, page in write_reference.PAGES.items()
        if (write_reference.FOLDER / name).read_text(encoding="utf-8") != write_reference.MADE + page()
    ]
    assert stale == [], "run python scripts/write_reference.py"


def test_every_command_has_a_page():
    index = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for name in GROUP.commands:
        assert (ROOT / "docs" / "howto" / f"{name}.md").is_file()
        assert f"howto/{name}.md" in index
        assert f"howto/{name}.md" in navigation


def test_links_of_pages_outside_of_the_site_lead_somewhere():
    for page in [*PAGES[:2], ROOT / "CHANGELOG.md", ROOT / "models/pocket/README.md"]:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"


def test_messages_in_troubleshooting_are_in_the_code():
    templates = [template for file in (ROOT / "kvprofile").rglob("*.py") for template in templates_of(file)]
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 20
    missing = [message for message in messages if not any(same(message, template) for template in templates)]
    assert missing == []


def templates_of(file: Path):
    """Every string of a file, what is filled in replaced by an ellipsis."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def same(message: str, template: str) -> bool:
    """Whether a message of the page is a template's, or begins one, or is what one is about."""
    pieces = [piece for piece in re.split("…+", message) if piece.strip(" :;,")]
    rest = template
    for piece in pieces:
        _, found, rest = rest.partition(piece)
        if not found:
            return False
    return bool(pieces)
