"""The pass ``preserve-sparsity``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from fxpass.edges import MASKED, SORTED, WITHIN
from fxpass.ir.geometry import KEPT
from fxpass.ir.program import Program
from fxpass.ir.sparsity import SPARSE, check, has_edges
from fxpass.passes import Application, Exactness, Outcome, Pass, Refusal

BEYOND = {"drop": (WITHIN,), "mask": (MASKED,), "keep": ()}


@dataclass(frozen=True)
class PreserveSparsity(Pass):
    """Proves that the neighbour list stays a list, and has edges come in one order and within the cutoff.

    Before / After::

        edge_vectors[edges, 3], in any order,      the same graph, with the assumptions
        with padding, longer than the cutoff         "the neighbour list stays sparse"
                                                     "edges sorted by receiver"
                                                     "edges within the cutoff"

    The interface makes the assumptions true at every call, and undoes the order where the host sees it. From here on
    the verifier proves after every pass, and of what a target runs, that no tensor is atoms x atoms or atoms x edges
    and that no atom has slots for a fixed number of neighbours.

    Holds when: an input has a row for each edge, and the proof succeeds; a program that makes the list dense is
    refused with the node, its shape and its module. Dropping and masking hold where the model has no use for edges
    beyond its cutoff, as its own neighbour list has none.

    Keeps: the graph. Sums over edges are taken in another order, which moves them by rounding; in return any
    permutation of a list gives the same bits, and so does a list with a skin, if its edges are dropped.

    Attributes:
        sort: edges come sorted by receiver, then sender, then vector.
        beyond_cutoff: edges as long as the cutoff or longer, and padding (an index of -1, or a vector of length zero
            from an atom to itself): ``drop`` them; ``mask`` them, which keeps the number of edges for hosts that pad
            and lets them act on one more atom in a graph of its own; or ``keep`` them.
        cache: spherical harmonics and radial values are kept from one call to the next, and computed again when any
            edge vector differs.
    """

    name: ClassVar[str] = "preserve-sparsity"
    exactness: ClassVar[Exactness] = Exactness.REASSOCIATES

    sort: bool = True
    beyond_cutoff: Literal["drop", "mask", "keep"] = "drop"
    cache: bool = True

    def apply(self, program: Program) -> Outcome:
        if not has_edges(program):
            refusal = Refusal("stays-sparse", "no input has a row for each edge", ())
            return Outcome(program, modified=False, refusals=(refusal,))
        check(program)
        wanted = {SPARSE: True, SORTED: self.sort, KEPT: self.cache}
        facts = [*(fact for fact, on in wanted.items() if on), *BEYOND[self.beyond_cutoff]]
        new = tuple(fact for fact in facts if fact not in program.assumptions)
        edges = [spec.name for spec in program.inputs if "edges" in spec.dims]
        fired = (Application("stays-sparse", edges[0]),)
        return Outcome(replace(program, assumptions=(*program.assumptions, *new)), bool(new), fired)
