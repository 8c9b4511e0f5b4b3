"""Pipelines as text: ``tabulate{order=5,budget=1e-6},pin-precision{compute=bfloat16}``.

Grammar, with free white space between tokens::

    pipeline := [item {"," item}]
    item     := NAME ["{" [option {"," option}] "}"]      a pass with its options, or a preset
    option   := NAME "=" value
    value    := WORD | STRING | "[" [value {"," value}] "]"

A WORD is read by the annotation of the option: ``true``, ``none``, ``5``, ``1e-6``, ``bfloat16``, a member of
an enum, or the string itself.  A STRING is in double quotes with JSON's escapes and is always a string.
``parse(format_passes(passes), registry) == passes`` for all passes in the registry whose options are ``bool``,
``int``, ``float``, ``str``, ``None``, ``torch.dtype``, enums, literals, and unions, tuples and lists of them.
"""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, fields
from enum import Enum
from typing import Any, Literal, NoReturn, Union

import torch

from .errors import PipelineError, UsageError
from .passes import Pass
from .registry import PASSES, PRESETS, Registry, did_you_mean, pass_problem

_WORD = re.compile(r'[^\s,{}\[\]="]+')
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_PLAIN = re.compile(r"[A-Za-z0-9_.+\-:/]+")  # strings that are printed without quotes
_EXCERPT = 100  # columns of a pipeline text that an error shows


def resolve(passes: str | Pass | Iterable[str | Pass], registry: Registry) -> tuple[Pass, ...]:
    """The passes that a user asked for.

    Args:
        passes: the name of a preset, a pipeline text, a pass, or a list that mixes names, texts and passes.
            An empty list asks for no passes; an empty text is an error.
        registry: where names are looked up.

    Raises:
        PipelineError: a text that does not parse, an unknown name, or an option that does not fit.
        UsageError: something that is neither text nor pass.
    """
    if isinstance(passes, (str, Pass)):
        passes = [passes]
    if not isinstance(passes, Iterable):
        raise UsageError(f"passes is {passes!r}", hint="a preset, a pipeline text, or a list of names and passes")
    return tuple(pass_ for item in passes for pass_ in _resolve_item(item, registry))


def _resolve_item(item: object, registry: Registry) -> tuple[Pass, ...]:
    if isinstance(item, str):
        if not item.strip():
            raise PipelineError("the pipeline text is empty", hint="passes=[] to run no passes at all")
        return parse(item, registry)
    if isinstance(item, Pass):
        if problem := pass_problem(type(item)):
            raise UsageError(f"the pass class {type(item).__qualname__} {problem}")
        return (item,)
    if isinstance(item, type) and issubclass(item, Pass):
        raise UsageError(f"{item.__qualname__} is a pass class, not a pass", hint=f"{item.__qualname__}()")
    raise UsageError(f"{item!r} is neither a name, nor a pipeline text, nor a pass")


def parse(text: str, registry: Registry) -> tuple[Pass, ...]:
    """The passes that a pipeline text names, presets expanded.

    Raises:
        PipelineError: with the place in the text, what was expected there and what may have been meant.
    """
    return _expand(_Source(text), registry, ())


def format_passes(passes: Sequence[Pass]) -> str:
    """The pipeline text of passes; options that have their default value are left out."""
    return ",".join(map(format_pass, passes))


def format_pass(pass_: Pass) -> str:
    """The text of one pass, e.g. ``tabulate{order=5}``."""
    options = format_options(pass_)
    return f"{pass_.name}{{{options}}}" if options else pass_.name


def format_options(pass_: Pass) -> str:
    """The options of a pass that differ from their defaults, e.g. ``order=5,budget=1e-6``.

    A value that has no text form (a function, say) prints as ``<type>``, which does not parse.
    """
    hints = _hints(type(pass_))
    values = [(option, getattr(pass_, option.name)) for option in _options(type(pass_))]
    return ",".join(
        f"{option.name}={_format_value(value, hints[option.name])}"
        for option, value in values
        if not _same(value, _default(option))
    )


# --- syntax: text to words, lists and items, each with its place


@dataclass(frozen=True)
class _Source:
    """A pipeline text and, for the text of a preset, where it comes from."""

    text: str
    origin: str = ""

    def error(self, what: str, start: int, end: int, hint: str | None = None) -> PipelineError:
        """An error that shows the line of ``text[start:end]`` with carets under it."""
        line_start = self.text.rfind("\n", 0, start) + 1
        line = self.text[line_start:].split("\n", 1)[0].replace("\t", " ")
        column, width = start - line_start, max(end - start, 1)
        cut = max(0, column - _EXCERPT // 2)
        shown = ("…" if cut else "") + line[cut : cut + _EXCERPT] + ("…" if len(line) > cut + _EXCERPT else "")
        before = column - cut + bool(cut)
        carets = "^" * max(1, min(width, len(shown) - before))
        return PipelineError(f"{what}{self.origin}\n    {shown}\n    {' ' * before}{carets}", hint=hint)


@dataclass(frozen=True)
class _Word:
    text: str
    start: int
    end: int
    quoted: bool = False

    def __str__(self) -> str:
        return json.dumps(self.text) if self.quoted else self.text


@dataclass(frozen=True)
class _List:
    values: tuple[_Word | _List, ...]
    start: int
    end: int

    def __str__(self) -> str:
        return f"[{','.join(map(str, self.values))}]"


@dataclass(frozen=True)
class _Item:
    name: _Word
    options: tuple[tuple[_Word, _Word | _List], ...] = ()


class _Scanner:
    """Recursive descent over the grammar of the module docstring."""

    def __init__(self, source: _Source) -> None:
        self.source = source
        self.position = 0

    def pipeline(self) -> list[_Item]:
        items = [] if self.peek() == "" else [self.item()]
        while self.take(","):
            items.append(self.item())
        if self.peek():
            self.expected("',' or the end of the pipeline")
        return items

    def item(self) -> _Item:
        name = self.word("the name of a pass or preset")
        if not self.take("{"):
            return _Item(name)
        options = [] if self.peek() == "}" else [self.option()]
        while self.take(","):
            options.append(self.option())
        if not self.take("}"):
            self.expected("',' or '}'")
        return _Item(name, tuple(options))

    def option(self) -> tuple[_Word, _Word | _List]:
        name = self.word("the name of an option")
        if not self.take("="):
            self.expected("'=' and a value")
        return name, self.value()

    def value(self) -> _Word | _List:
        if self.peek() == '"':
            return self.string()
        start = self.position
        if not self.take("["):
            return self.word("a value")
        values = [] if self.peek() == "]" else [self.value()]
        while self.take(","):
            values.append(self.value())
        if not self.take("]"):
            self.expected("',' or ']'")
        return _List(tuple(values), start, self.position)

    def string(self) -> _Word:
        start = self.position
        match = _STRING.match(self.source.text, start)
        if match is None:
            raise self.source.error("this string has no closing quote", start, len(self.source.text))
        self.position = match.end()
        try:
            return _Word(json.loads(match[0], strict=False), start, match.end(), quoted=True)
        except json.JSONDecodeError as error:
            hint = r"the escapes \" \\ \n \t \uXXXX"
            raise self.source.error("this string has an unknown escape", start, match.end(), hint) from error

    def word(self, meaning: str) -> _Word:
        self.peek()
        match = _WORD.match(self.source.text, self.position)
        if match is None:
            self.expected(meaning)
        self.position = match.end()
        return _Word(match[0], match.start(), match.end())

    def peek(self) -> str:
        """The next character that is no white space, empty at the end; moves up to it."""
        text = self.source.text
        while self.position < len(text) and text[self.position].isspace():
            self.position += 1
        return text[self.position : self.position + 1]

    def take(self, character: str) -> bool:
        found = self.peek() == character
        self.position += found
        return found

    def expected(self, meaning: str) -> NoReturn:
        found = repr(self.peek()) if self.peek() else "the end"
        raise self.source.error(f"expected {meaning}, found {found}", self.position, self.position + 1)


# --- meaning: items to passes


def _expand(source: _Source, registry: Registry, inside: tuple[str, ...]) -> tuple[Pass, ...]:
    """The passes of a text; ``inside`` are the presets that are being expanded."""
    passes: list[Pass] = []
    for item in _Scanner(source).pipeline():
        name = item.name.text
        try:
            entry = registry.find(name, PASSES, PRESETS)
            loaded = entry.load()
        except PipelineError as error:
            raise source.error(error.what, item.name.start, item.name.end, error.hint) from error
        if entry.group == PASSES:
            passes.append(_build(loaded, item, source))
        elif item.options:
            option = item.options[0][0]
            raise source.error(f"{name!r} is a preset and takes no options", option.start, option.end)
        elif name in inside:
            cycle = " -> ".join([*inside[inside.index(name) :], name])
            raise source.error(f"the preset {name!r} contains itself: {cycle}", item.name.start, item.name.end)
        else:
            nested = _Source(loaded, origin=f" (in the preset {name!r} of {entry.origin})")
            passes += _expand(nested, registry, (*inside, name))
    return tuple(passes)


def _build(cls: type[Pass], item: _Item, source: _Source) -> Pass:
    hints = _hints(cls)
    options = {option.name: option for option in _options(cls)}
    values: dict[str, Any] = {}
    for word, value in item.options:
        name = word.text
        if name not in options:
            known = f"one of {', '.join(options)}" if options else f"{cls.name!r} without options"
            what = f"the pass {cls.name!r} has no option {name!r}{did_you_mean(name, options)}"
            raise source.error(what, word.start, word.end, known)
        if name in values:
            raise source.error(f"the option {name!r} of {cls.name!r} is given twice", word.start, word.end)
        try:
            values[name] = _read(value, hints[name])
        except _Mismatch as error:
            what = f"the option {name!r} of {cls.name!r} {error}"
            raise source.error(what, error.value.start, error.value.end) from None
    missing = [name for name, option in options.items() if name not in values and _default(option) is MISSING]
    if missing:
        what = f"the pass {cls.name!r} needs the option {missing[0]!r}: {_describe(hints[missing[0]])}"
        raise source.error(what, item.name.start, item.name.end)
    try:
        return cls(**values)
    except (ValueError, TypeError, UsageError) as error:  # what a __post_init__ that checks its options raises
        what = f"the pass {cls.name!r} refuses its options: {error}"
        raise source.error(what, item.name.start, item.name.end) from error


def _options(cls: type[Pass]) -> list[Field[Any]]:
    return [option for option in fields(cls) if option.init]


def _default(option: Field[Any]) -> Any:
    return option.default if option.default_factory is MISSING else option.default_factory()


def _hints(cls: type[Pass]) -> Mapping[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except NameError:  # a class made inside a function: its own names cannot be looked up, so no type is known
        return {option.name: option.type for option in fields(cls)}


# --- values: words to typed values and back


class _Mismatch(Exception):
    """A value, or an element of one, that does not have the type it should have."""

    def __init__(self, value: _Word | _List, annotation: Any) -> None:
        super().__init__(value, annotation)
        self.value = value
        self.annotation = annotation

    def __str__(self) -> str:
        text = f"takes {_describe(self.annotation)}, not {self.value}"
        if isinstance(self.value, _Word):
            text += did_you_mean(self.value.text, [_write(choice) for choice in _choices(self.annotation)])
        return text


def _read(value: _Word | _List, annotation: Any) -> Any:
    """The value as an instance of ``annotation``; raises :class:`_Mismatch`."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        for member in sorted(args, key=_rank):
            with suppress(_Mismatch):
                return _read(value, member)
    elif isinstance(value, _List):
        if origin is list or args[1:] == (...,):
            return origin(_read(element, args[0]) for element in value.values)
        if origin is tuple and len(args) == len(value.values):
            return tuple(map(_read, value.values, args))
    elif annotation is str:
        return value.text
    elif annotation in (int, float) and not value.quoted:
        with suppress(ValueError):
            return annotation(value.text)
    else:
        for choice in _choices(annotation):
            if _write(choice, value.quoted) == str(value):
                return choice
    raise _Mismatch(value, annotation)


def _rank(annotation: Any) -> int:
    """Order in which the members of a union are tried: the one that reads anything comes last."""
    return {int: 1, float: 2, str: 3}.get(annotation, 0)


def _choices(annotation: Any) -> list[Any]:
    """All values of a type that has few, none for the others."""
    if annotation is bool:
        return [True, False]
    if annotation is types.NoneType:
        return [None]
    if annotation is torch.dtype:
        return sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return list(annotation)
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return sorted(args, key=lambda choice: isinstance(choice, str))  # a bare 3 is the number before the string
    if origin in (Union, types.UnionType):
        return [choice for member in args for choice in _choices(member)]
    return []


def _describe(annotation: Any) -> str:
    """The type in words, for errors."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (int, float):
        return str(annotation.__name__)
    if annotation is str:
        return "string"
    if annotation is torch.dtype:
        return "dtype (such as bfloat16)"
    if origin in (Union, types.UnionType):
        return " or ".join(map(_describe, args))
    if origin is list or (origin is tuple and args[1:] == (...,)):
        return f"list [...] of {_describe(args[0])}"
    if origin is tuple:
        return f"list [{', '.join(map(_describe, args))}]"
    if choices := _choices(annotation):
        return " or ".join(map(_write, choices))
    return f"{getattr(annotation, '__name__', annotation)} (which has no text form: give the pass itself)"


def _format_value(value: Any, annotation: Any) -> str:
    """The shortest text that reads back as ``value``: strings get quotes only where they need them."""
    plain = _write(value)
    try:
        if _same(_read(_Scanner(_Source(plain)).value(), annotation), value):
            return plain
    except (PipelineError, _Mismatch):
        pass
    return _write(value, quote=True)


def _write(value: Any, quote: bool = False) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return _write_member(value)
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        return re.sub(r"e\+?(-?)0*", r"e\1", float.__repr__(value))  # 1e-06 -> 1e-6, 1e+16 -> 1e16
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) and not quote else json.dumps(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, (tuple, list)):
        return f"[{','.join(_write(element, quote) for element in value)}]"
    return f"<{type(value).__qualname__}>"


def _write_member(member: Enum) -> str:
    """The value of an enum's member where all its values are plain strings, else the name."""
    values = [other.value for other in type(member)]
    plain = all(isinstance(value, str) and _PLAIN.fullmatch(value) for value in values)
    return str(member.value) if plain else str(member.name)


def _same(a: Any, b: Any) -> bool:
    """Equality that tells 1 from true and from 1.0, takes nan as equal to itself, and -0.0 as other than 0.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float):
        return repr(a) == repr(b)
    if isinstance(a, (bool, int, str, Enum)):
        return a == b
    return a is b  # none, dtypes, and whatever has no text form (a tensor's == is not a truth value)
