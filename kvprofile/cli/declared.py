"""A command's options from the fields of a dataclass, so that each option is declared once."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def options_of(kind: type[T]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command whose first parameter is a ``kind``: Typer sees its fields, then the command's own options.

    A field is an option where it is ``Annotated[type, typer.Option(...)]``. A tuple may be given repeatedly, and what
    has a ``parser`` is given as text. The options of a field that is a dataclass take its place.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        first, *own = inspect.signature(command, eval_str=True).parameters.values()

        @functools.wraps(command)
        def with_options(**given: Any) -> None:
            rest = {parameter.name: given[parameter.name] for parameter in own}
            command(**{first.name: _built(kind, given)}, **rest)

        after = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        signature = inspect.Signature([*_parameters(kind), *after])
        with_options.__signature__ = signature  # type: ignore[attr-defined] # what Typer reads
        return with_options

    return decorate


def _parameters(kind: Any) -> Iterator[inspect.Parameter]:
    """A parameter as Typer takes it for each option of a dataclass, in the order of the fields."""
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        hint = hints[field.name]
        if is_dataclass(hint):
            yield from _parameters(hint)
        elif get_origin(hint) is Annotated:
            value, option = get_args(hint)
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            if get_origin(value) is tuple:  # to Typer a tuple is one option with several values, a list a repeated one
                (item, _), default = get_args(value), None
                value = list[item] | None  # type: ignore[valid-type]
            if option.parser is not None:  # called in _built: Typer would show the function in place of TEXT
                value, option = str | None, copy.copy(option)
                option.parser = None
            annotation = Annotated[value, option]  # type: ignore[valid-type]
            yield inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _built(kind: Any, given: Mapping[str, Any]) -> Any:
    """The dataclass of what Typer gives, which is named as the fields are."""
    hints = get_type_hints(kind, include_extras=True)
    values = {}
    for field in fields(kind):
        hint = hints[field.name]
        if is_dataclass(hint):
            values[field.name] = _built(hint, given)
        elif get_origin(hint) is Annotated:
            (value, option), found = get_args(hint), given[field.name]
            if get_origin(value) is tuple:
                found = tuple(found or ())
            if option.parser is not None and found is not None:
                found = option.parser(found)
            values[field.name] = found
    return kind(**values)
