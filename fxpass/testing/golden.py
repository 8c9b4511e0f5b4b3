"""Programs as text that stays the same from run to run: for golden files and FileCheck.

::

    energy program
      x: f64[atoms, 3]
      %w = weight f64[3, 1]
      %mm = aten.mm.default(%x, %w)
      return node_energy = %mm
"""

from __future__ import annotations

import difflib
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ..errors import Location, PassError, UsageError
from ..ir.program import Program, attribute, fresh
from ..rewrite.pattern import target_name

LONGEST_STRING = 40


def graph_text(program: Program) -> str:
    """The program, one line a node, with inputs and outputs as specified.

    A node is named after its op and numbered within it in graph order, so the history of a graph does not
    show. Strings longer than 40 characters (the specs of semantic ops) are cut and carry a digest.
    """
    labels: dict[fx.Node, str] = {node: f"%{name}" for name, node in program.placeholders.items()}
    taken = set(labels.values())
    lines = [f"{program.stage} program", *(f"  {spec.name}: {_type(spec.dtype, spec.dims)}" for spec in program.inputs)]
    for node in program.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        labels[node] = fresh(f"%{_stem(node)}", taken.__contains__)
        taken.add(labels[node])
        if node.op == "get_attr":
            tensor = attribute(program, node)
            text = f"weight {_type(tensor.dtype, tuple(tensor.shape))}"
        else:
            values = [_text(value, labels) for value in node.args]
            values += [f"{key}={_text(value, labels)}" for key, value in sorted(node.kwargs.items())]
            text = f"{target_name(node.target)}({', '.join(values)})"
        lines.append(f"  {labels[node]} = {text}")
    lines += [f"  return {name} = {labels[node]}" for name, node in program.results.items()]
    return "\n".join(lines) + "\n"


def assert_golden(program: Program, path: Path | str, update: bool = False) -> None:
    """Compare ``graph_text(program)`` with the file at ``path``; write the file instead where ``update`` is true.

    Raises:
        PassError: the texts differ; the message ends in their diff.
        UsageError: there is no such file.
    """
    path, text = Path(path), graph_text(program)
    if update:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return
    if not path.is_file():
        raise UsageError(f"there is no golden file {path}", hint="write it with update=True, and read it")
    expected = path.read_text(encoding="utf-8")
    if text != expected:
        diff = difflib.unified_diff(expected.splitlines(), text.splitlines(), str(path), "this program", lineterm="")
        raise PassError("the graph differs from its golden file:\n" + "\n".join(diff), where=Location(source=str(path)))


def _stem(node: fx.Node) -> str:
    """``mul`` of ``aten.mul.Tensor``; the flat name of a weight."""
    parts = target_name(node.target).split(".")
    return parts[1] if len(parts) == 3 else parts[0]


def _type(dtype: torch.dtype, dims: tuple[int | str, ...]) -> str:
    name = str(dtype).removeprefix("torch.")
    for long, short in (("bfloat", "bf"), ("float", "f"), ("uint", "u"), ("int", "i"), ("complex", "c")):
        if name.startswith(long):
            name = short + name.removeprefix(long)
            break
    return f"{name}[{', '.join(map(str, dims))}]"


def _text(value: Any, labels: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return labels[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_text(v, labels) for v in value)}]"
    if isinstance(value, str) and len(value) > LONGEST_STRING:
        digest = hashlib.sha256(value.encode()).hexdigest()[:8]
        return f"{value[: LONGEST_STRING - 12]!r}...#{digest}"
    return repr(value)
