"""Write docs/reference from the code: `python scripts/write_reference.py [--check]`.

The command line, the files' fields, the environment and the metrics are introspected, so the pages cannot say what the
code does not do. With --check nothing is written and a stale page ends with exit 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from kvprofile.bench import providers
from kvprofile.budget import runtime_file
from kvprofile.budget.profile import Profile
from kvprofile.cli import COMMANDS, load
from kvprofile.environment import ENABLED, PREFIX
from kvprofile.files import write_atomically
from kvprofile.records.record import RunRecord
from kvprofile.runtime import attestation, metrics, settings
from kvprofile.runtime.engine_budget import EngineBudget
from kvprofile.runtime.settings import SHARED

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "reference"
MADE = "<!-- Made by scripts/write_reference.py; edit the code instead. -->\n\n"


def commands() -> str:
    """Every command with its arguments and options."""
    parts = [
        "# Command line\n",
        "What each command is for, with samples: [How to](../commands.md). Exit codes: 0 fine, 1 the work failed, "
        "2 wrong usage or input, 130 interrupted.\n",
        "`kvprofile --version` prints the version, `kvprofile --debug COMMAND ...` shows a traceback if something "
        "fails.\n",
    ]
    for name in COMMANDS:
        command = load(name)
        parameters = [p for p in command.params if p.name != "help"]
        arguments = [p for p in parameters if p.param_type_name == "argument"]
        options = [p for p in parameters if p.param_type_name == "option"]
        usage = " ".join(["kvprofile", name, "[OPTIONS]", *(_usage(p) for p in arguments)])
        parts += [f"## {name}\n", f"{_flat(command.help)}\n", f"```text\n{usage}\n```\n"]
        rows = [(f"`{p.name.upper()}`", "required" if p.required else "", _flat(p.help)) for p in arguments]
        rows += [(_names(p), _default(p), _flat(p.help)) for p in options]
        parts.append(_table(("", "default", "meaning"), rows))
    return _page(parts)


def environment() -> str:
    """Every variable that kvprofile reads."""
    runtime = {ENABLED: settings.SWITCH} | {
        PREFIX + name: variable for name, variable in (settings.VALUES | settings.FLAGS).items()
    }
    rows = [(f"`{name}`", variable.default, variable.meaning) for name, variable in runtime.items()]
    bundled = providers.load(Path(providers.__file__).with_name("providers.toml"))
    keys = [(f"`{found.key_env}`", f"`{name}`") for name, found in bundled.items() if found.key_env]
    return _page(
        [
            "# Environment\n",
            "## Of a vLLM server\n",
            "Read once, when vLLM starts. Unknown `LLM_KVZIP_` names cause a warning.\n",
            _table(("variable", "default", "meaning"), rows),
            "## Of the commands\n",
            "`KVPROFILE_DEBUG=1` is `--debug`. `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE` are huggingface_hub's own. "
            "The keys of providers are read where `bench` needs them, and are never written down:\n",
            _table(("variable", "provider"), keys),
        ]
    )


def server_metrics() -> str:
    """What the plugin adds to a server's /metrics, as its collector gives it."""
    collector = metrics.BudgetCollector()
    collector.budget = EngineBudget(((1.0, 0.0), (0.0, 0.0)), 128, 256)
    with tempfile.NamedTemporaryFile() as shared:
        os.environ[SHARED] = shared.name
        families = list(collector.collect())
        del os.environ[SHARED]
    rows = [(f"`{f.samples[0].name}`", f.type, f.documentation) for f in families]
    return _page(
        [
            "# Metrics\n",
            "On a vLLM server's own `/metrics` where budgets are in force; a server without budgets does not have "
            "them. vLLM takes its whole pool at start, so the memory that the driver reports does not change: look at "
            "blocks, bytes and requests in flight.\n",
            _table(("metric", "type", "meaning"), rows),
        ]
    )


def files() -> str:
    """Fields of every file that kvprofile writes for others to read."""
    parts = [
        "# Files\n",
        "All files are JSON in UTF-8, written atomically, with equal bytes for equal content. L layers, G KV heads; a "
        "matrix is a list of L lists of G numbers, and null where a layer slides.\n",
    ]
    for title, model, schema in (
        ("Budget file", Profile, "budget-file.schema.json"),
        ("Run record", RunRecord, "run-record.schema.json"),
    ):
        parts += [f"## {title}\n", f"JSON Schema: [{schema}](../{schema}).\n"]
        parts += list(_fields(model))
    parts += [
        "## Runtime file\n",
        f"`kvprofile export --format vllm` writes it: `format` is `{runtime_file.FORMAT}`, `version` is "
        f"{runtime_file.VERSION}.\n",
        *_fields(runtime_file.RuntimeFile),
        "## Attestations\n",
        f"`kvprofile verify` writes `<budget file>{attestation.SUFFIX}`: `format` is `{attestation.FORMAT}`, `version` "
        f"is {attestation.VERSION}, and `attestations` is a list. Each has a `key`, its `checks`, what was `measured` "
        "(the date, and seconds for a token of stock vLLM and with the plugin), and the `sha256` of key and checks.\n",
        "### Key\n",
        _table(("field", "meaning"), [(f"`{name}`", words) for name, words in attestation.KEY.items()]),
        "### Checks\n",
        "`stock` and `reference` compare log-probabilities, in nats: `most` is how far those of a token may lie apart, "
        "`far` counts tokens that lay further apart, of at most `most_far`.\n",
        _table(
            ("check", "fields"),
            [(f"`{name}`", ", ".join(f"`{each}`" for each in fields)) for name, fields in attestation.CHECKS.items()],
        ),
    ]
    return _page(parts)


PAGES: dict[str, Callable[[], str]] = {
    "cli.md": commands,
    "environment.md": environment,
    "files.md": files,
    "metrics.md": server_metrics,
}


def _fields(model: type[BaseModel]) -> Iterator[str]:
    schema = model.model_json_schema()
    for name, part in ((model.__name__, schema), *sorted(schema.get("$defs", {}).items())):
        if "properties" not in part:
            continue
        rows = [
            (
                f"`{field}`",
                _type(inner),
                "yes" if field in part.get("required", ()) else "",
                _flat(_about(inner, schema)),
            )
            for field, inner in part["properties"].items()
        ]
        yield f"### {name}\n"
        yield f"{_flat(part.get('description', ''))}\n"
        yield _table(("field", "type", "required", "meaning"), rows)


def _about(part: dict[str, Any], schema: dict[str, Any]) -> str:
    """A field's description, or that of what it refers to."""
    if "description" in part:
        return str(part["description"])
    name = part.get("$ref", "").rpartition("/")[2]
    return str(schema["$defs"][name].get("description", "")) if name else ""


def _type(part: dict[str, Any]) -> str:
    """A JSON Schema type in words: 'list of number', 'string or null', 'Geometry'."""
    if "$ref" in part:
        return str(part["$ref"].rpartition("/")[2])
    if "anyOf" in part:
        return " or ".join(dict.fromkeys(_type(each) for each in part["anyOf"]))
    if "const" in part or "enum" in part:
        return ", ".join(f"`{value}`" for value in part.get("enum", [part.get("const")]))
    if part.get("type") == "array":
        return f"list of {_type(part.get('items', {}))}"
    if part.get("type") == "object" and isinstance(part.get("additionalProperties"), dict):
        return f"map to {_type(part['additionalProperties'])}"
    limits = [f"{word} {part[key]}" for key, word in _LIMITS.items() if key in part]
    return " ".join([str(part.get("type", "any")), *([f"({', '.join(limits)})"] if limits else [])])


_LIMITS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}


def _usage(parameter: Any) -> str:
    name = parameter.name.upper() + ("..." if parameter.nargs == -1 else "")
    return name if parameter.required else f"[{name}]"


def _names(parameter: Any) -> str:
    return ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if parameter.is_flag:
        return "on" if parameter.default and parameter.secondary_opts else ""
    return "" if parameter.default is None else f"`{parameter.default}`"


def _flat(text: str | None) -> str:
    """One line of Markdown: angle brackets of prose are no tags."""
    parts = " ".join((text or "").replace("``", "`").split()).split("`")
    return "`".join(part if index % 2 else part.replace("<", "&lt;") for index, part in enumerate(parts))


def _page(parts: Iterable[str]) -> str:
    """Headings, tables, code and paragraphs below each other; paragraphs are wrapped."""
    return "\n".join(
        part if part.startswith(("#", "|", "```")) else textwrap.fill(part, 120, break_on_hyphens=False) + "\n"
        for part in parts
    )


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [tuple(heads)]
    lines += [tuple("-" * 3 for _ in lines[0]), *(tuple(row) for row in rows)]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/reference from the code.")
    parser.add_argument("--check", action="store_true", help="only say which pages are stale")
    arguments = parser.parse_args()
    stale = []
    for name, page in PAGES.items():
        content, file = (MADE + page()).encode(), FOLDER / name
        if not file.is_file() or file.read_bytes() != content:
            stale.append(name)
            if not arguments.check:
                write_atomically(file, content)
    print(f"stale: {', '.join(stale) or 'none'}")
    sys.exit(1 if stale and arguments.check else 0)


if __name__ == "__main__":
    main()
