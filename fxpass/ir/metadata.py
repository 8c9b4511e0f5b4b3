"""Typed node metadata: provenance and irreps.

Everything lives under ``node.meta["custom"]["fxpass"]``: ``meta["custom"]`` is the one entry that
torch copies to the nodes a re-trace makes, so provenance survives differentiation and legalisation.
``node.meta["val"]`` holds the fake tensor with symbolic sizes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import fx


@dataclass(frozen=True)
class Provenance:
    """Where a node comes from.

    Attributes:
        module: dotted path of the module that was running, ``""`` for the model itself.
        source: ``file:line`` of the call inside that module's ``forward``.
        backward: true where the node belongs to the derivative of that call.
        made_by: name of the pass that made the node, empty for captured nodes.
    """

    module: str = ""
    source: str = ""
    backward: bool = False
    made_by: str = ""

    def __str__(self) -> str:
        text = self.module or "(model)"
        if self.backward:
            text += " (backward)"
        return text


def provenance(node: fx.Node) -> Provenance:
    """Provenance of a node; the empty one where none was recorded."""
    return Provenance(**(node.meta.get("custom") or {}).get("fxpass", {}))


def set_provenance(node: fx.Node, value: Provenance) -> None:
    """Store ``value`` as the provenance of ``node``."""
    node.meta["custom"] = {**(node.meta.get("custom") or {}), "fxpass": asdict(value)}


def irreps(node: fx.Node) -> str | None:
    """Irreps of the node's last dimension as last derived, ``None`` where it has none or it is unknown."""
    return node.meta.get("irreps")
