"""The pass ``legalize-custom-ops``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from fxpass.ir.decompositions import HINT, References, decompose
from fxpass.ir.metadata import provenance
from fxpass.ir.program import Program
from fxpass.passes import Application, Exactness, Outcome, Pass, Refusal


@dataclass(frozen=True)
class LegalizeCustomOps(Pass):
    """Replaces ops that differ between devices by their reference decompositions: one numeric path everywhere.

    Before / After::

        y = mylib.attention(x, w)            a = aten.mm(x, w)
                                             y = aten._softmax(a, -1, False)

    Custom are the ops of other libraries than ATen and fxpass, ATen's own for one backend (flash attention for CPU,
    cuDNN), and those that ``ops`` names.  A traced model that calls one computes whatever each device's kernel
    computes, and a file of it needs the library.

    Holds when: the op has a reference: in ``references``, in the entry point group ``fxpass.decompositions``, in its
    own ``CompositeImplicitAutograd`` implementation, or among torch's default decompositions.  An op without one is
    left and refused by name.  Run it before ``differentiate``: a reference brings its own derivative, which need not
    be that of the kernel.

    Keeps: values up to rounding, as far as the kernel is right; gradients, interface, provenance.

    Attributes:
        ops: names of further ATen ops to replace, e.g. ``aten::silu``, for a target that cannot carry them.
        references: op name to function, asked first; only in Python, as a pipeline text has no functions.
    """

    name: ClassVar[str] = "legalize-custom-ops"
    exactness: ClassVar[Exactness] = Exactness.REASSOCIATES

    ops: tuple[str, ...] = ()
    references: References | None = field(default=None, hash=False)

    def apply(self, program: Program) -> Outcome:
        done = decompose(program, self.references, also=self.ops, made_by=self.name)
        applications = tuple(
            Application(str(node.target), node.name, provenance(node).module, removed=1) for node in done.replaced
        )
        refusals = tuple(
            Refusal(str(node.target), f"it has no reference: {HINT}", (node.name,), provenance(node).module)
            for node in done.opaque
        )
        return Outcome(done.program, bool(applications), applications, refusals)
