"""What users may build on, as text: commands and options, environment variables, names that README and docs import.

``python -m tests.helpers.public_surface`` writes it to tests/data/public-surface.txt, which a test compares: a change
is then deliberate, and belongs in CHANGELOG.md.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import types
from collections.abc import Iterator
from typing import Any

import typer

from kvprofile.cli import COMMANDS, app, load
from kvprofile.environment import PREFIX
from kvprofile.runtime import settings
from tests.helpers.docs_pages import ROOT, blocks, inline_code

FILE = ROOT / "tests" / "data" / "public-surface.txt"


def surface() -> str:
    """The whole text."""
    names = sorted({name for name in documented() if not isinstance(found(name), types.ModuleType)})
    variables = sorted(PREFIX + name for name in ("ENABLED", *settings.FLAGS, *settings.VALUES))
    return "\n".join([*commands(), *variables, *(line for name in names for line in signatures(name, found(name))), ""])


def commands() -> Iterator[str]:
    """Two kinds of lines: 'kvprofile score MODEL' and, for an option, 'kvprofile score --seed = 0'."""
    yield from (f"kvprofile {_option(each)}" for each in typer.main.get_command(app).params if each.name != "help")
    for name in COMMANDS:
        parameters = [each for each in load(name).params if each.name != "help"]
        arguments = [each for each in parameters if each.param_type_name == "argument"]
        yield " ".join(["kvprofile", name, *(_argument(each) for each in arguments)])
        for each in parameters:
            if each not in arguments:
                yield f"kvprofile {name} {_option(each)}"


def documented() -> Iterator[str]:
    """Dotted names: what Python samples import, what they call of an imported module, and names in running text."""
    for block in blocks("python"):
        tree = ast.parse(block.body)
        known = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "kvprofile":
                known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        yield from known.values()
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
                yield f"{known[node.value.id]}.{node.attr}"
    for _, code in inline_code():
        if re.fullmatch(r"kvprofile(\.\w+)+", code):
            yield code


def found(name: str) -> Any:
    """What a dotted name stands for. Raises ImportError or AttributeError where that is nothing."""
    inner = name.rpartition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return getattr(found(inner), name.rpartition(".")[2])


def signatures(name: str, thing: Any) -> Iterator[str]:
    """A function with its parameters; a class with them and its public methods; of anything else its type."""
    if not callable(thing):
        yield f"{name}: {type(thing).__name__}"
        return
    yield f"{name}{_parameters(thing)}"
    if inspect.isclass(thing):
        for method, inner in sorted(vars(thing).items()):
            if not method.startswith("_"):
                is_function = isinstance(inner, (types.FunctionType, classmethod, staticmethod))
                yield f"{name}.{method}{_parameters(getattr(thing, method)) if is_function else ''}"


def _parameters(thing: Any) -> str:
    """Names and defaults: annotations are mypy's business."""
    signature = inspect.signature(thing)
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def _argument(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    return name if argument.required else f"[{name}]"


def _option(option: Any) -> str:
    names = "/".join((*option.opts, *option.secondary_opts))
    repeated = " ..." if option.multiple else ""
    default = " (required)" if option.required else "" if option.default is None else f" = {option.default}"
    return f"{names}{repeated}{default}"


if __name__ == "__main__":
    FILE.write_text(surface(), encoding="utf-8")
