"""The pass ``dead-code``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxpass.ir.metadata import provenance
from fxpass.ir.program import Program
from fxpass.passes import Application, Exactness, Outcome, Pass
from fxpass.rewrite import is_pure


@dataclass(frozen=True)
class DeadCode(Pass):
    """Removes nodes that reach no output, and weights that no node reads.

    Before / After::

        y = mul(x, w)                    y = mul(x, w)
        z = add(y, v)                    return y
        return y

    Holds when: the node has no users and no effect. Nodes that draw random numbers or assert something
    stay, with what they need; inputs stay, used or not.

    Keeps: bits, gradients, interface.
    """

    name: ClassVar[str] = "dead-code"
    exactness: ClassVar[Exactness] = Exactness.EXACT

    def apply(self, program: Program) -> Outcome:
        applications: list[Application] = []
        for node in reversed(list(program.graph.nodes)):
            if not node.users and is_pure(node):
                program.graph.erase_node(node)
                applications.append(Application("unused-node", node.name, provenance(node).module, removed=1))
        module = program.graph_module
        read = {node.target for node in program.graph.nodes if node.op == "get_attr"}
        weights = [name for name, _ in module.named_parameters(remove_duplicate=False)]
        weights += [name for name, _ in module.named_buffers(remove_duplicate=False)]
        for name in weights:
            if name not in read:
                delattr(module, name)
                applications.append(Application("unused-weight", name))
        return Outcome(program, bool(applications), tuple(applications))
