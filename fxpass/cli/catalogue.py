"""``fxpass passes`` and ``fxpass explain``: what is installed, and what it does."""

from __future__ import annotations

import argparse
import inspect
import re
from dataclasses import MISSING, Field, fields
from enum import Enum
from typing import Any

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..passes import Pass
from ..pipeline import format_passes, parse
from ..registry import FRONTENDS, PASSES, PRESETS, TARGETS, Entry, Listed, Registry, default_registry
from .answer import Answer
from .options import Commands

CATALOGUE = """
fxpass passes
fxpass passes --json
"""

EXPLAIN = """
fxpass explain dead-code
fxpass explain default
"""


def add_to(commands: Commands) -> None:
    """Add the commands of this file."""
    commands.add(
        "passes",
        passes,
        "list what is installed: passes, presets, targets, model families, and who provides them",
        examples=CATALOGUE,
    )
    parser = commands.add(
        "explain",
        explain,
        "tell what a pass does, when it applies, what it keeps, and its options",
        more="For a preset, the passes that it stands for.",
        examples=EXPLAIN,
    )
    parser.add_argument("name", metavar="PASS", help="name of a pass or preset; see fxpass passes")


def passes(arguments: argparse.Namespace) -> Answer:
    registry = default_registry()
    groups = {"passes": PASSES, "presets": PRESETS, "targets": TARGETS, "frontends": FRONTENDS}
    rows = {kind: [_row(listed) for listed in registry.listing(group)] for kind, group in groups.items()}
    return Answer(rows, tuple(_table(kind, entries) for kind, entries in rows.items()))


def _row(listed: Listed) -> dict[str, Any]:
    entry, loaded = listed.entry, listed.loaded
    row = {"name": entry.name, "provider": entry.origin, "problem": listed.problem}
    if entry.group == PASSES:
        row["exactness"] = None if loaded is None else loaded.exactness.value
    if entry.group == PRESETS:
        return {**row, "pipeline": loaded}
    return {**row, "summary": _documentation(loaded).partition("\n")[0]}


def _documentation(loaded: object) -> str:
    """The docstring, empty where there is none of its own."""
    written = getattr(loaded, "__dict__", {}).get("__doc__") or ""
    if isinstance(loaded, type) and written.startswith(f"{loaded.__name__}("):
        return ""  # what dataclasses write for a class that has none
    return inspect.cleandoc(written)


def _table(kind: str, rows: list[dict[str, Any]]) -> Table:
    """One line an entry; of the columns those that this kind has."""
    columns = [name for name in ("name", "provider", "exactness", "pipeline", "summary") if name in rows[0]]
    table = Table(box=None, title=kind, title_justify="left", title_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(
            name, header_style="bright_black", overflow="fold", no_wrap=name not in ("pipeline", "summary")
        )
    for row in rows:
        *cells, last = (Text(row[name] or "", "cyan" if name == "name" else "") for name in columns)
        broken = row["problem"] is not None
        table.add_row(*cells, Text(f"broken: {row['problem']}", "red") if broken else last)
    return table


def explain(arguments: argparse.Namespace) -> Answer:
    registry = default_registry()
    entry = registry.find(arguments.name, PASSES, PRESETS)
    loaded = entry.load()
    return _explain_pass(entry, loaded) if entry.group == PASSES else _explain_preset(entry, loaded, registry)


def _explain_pass(entry: Entry, cls: type[Pass]) -> Answer:
    file = inspect.getsourcefile(cls)
    options = [_option(option) for option in fields(cls) if option.init]
    data = {
        "name": entry.name,
        "kind": "pass",
        "provider": entry.origin,
        "exactness": cls.exactness.value,
        "stages": list(cls.stages),
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "file": file,
        "documentation": _documentation(cls),
        "options": options,
    }
    facts = Table.grid(padding=(0, 2))
    for name, value in (
        ("exactness", cls.exactness.value),
        ("stages", ", ".join(cls.stages)),
        ("provider", entry.origin),
        ("file", file or "unknown"),
    ):
        facts.add_row(Text(name, "bright_black"), Text(value))
    defaults = ("" if option["required"] else f" = {option['default']}" for option in options)
    told = [f"{option['name']}: {option['type']}{default}" for option, default in zip(options, defaults, strict=True)]
    return Answer(
        data,
        (
            Text(entry.name, "bold"),
            Padding(Text(_plain(_documentation(cls)) or "It has no documentation."), (1, 0, 1, 0)),
            Text("Options:" if told else "No options.", "bold"),
            *(Padding(Text(line), (0, 0, 0, 2)) for line in told),
            Text(""),
            facts,
        ),
    )


def _plain(text: str) -> str:
    """A docstring without the marks of reStructuredText."""
    return re.sub(r"::$", ":", text, flags=re.MULTILINE).replace("``", "`")


def _option(option: Field[Any]) -> dict[str, Any]:
    kind = option.type if isinstance(option.type, str) else getattr(option.type, "__name__", str(option.type))
    default = option.default if option.default_factory is MISSING else option.default_factory()
    required = default is MISSING
    return {
        "name": option.name,
        "type": kind,
        "default": None if required else _value(default),
        "required": required,
    }


def _value(value: object) -> str:
    """A default as it is written in a pipeline."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return str(value.value)
    return str(value).removeprefix("torch.")


def _explain_preset(entry: Entry, text: str, registry: Registry) -> Answer:
    pipeline = format_passes(parse(text, registry))
    data = {"name": entry.name, "kind": "preset", "provider": entry.origin, "pipeline": pipeline}
    lines = (Text(f"  {name}") for name in pipeline.split(","))
    return Answer(data, (Text.assemble((entry.name, "bold"), f": a preset of {entry.origin}"), *lines))
