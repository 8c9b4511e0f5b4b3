"""Which regions may be low: used by ``pin-precision``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property

import torch

from fxpass.errors import UsageError, VerificationError
from fxpass.ir.program import Program
from fxpass.passes import Refusal

from .constants import constant_value, constants
from .precision_regions import Region, find_regions, static_operand
from .sensitivity import Reference, Sensitivity, ranges

MARGIN = 0.25  # share of a budget that may be used up on the samples: other geometries are worse, small cells above all
HEADROOM = 8.0  # samples must stay this factor below the largest number of the low type
FEW, MANY = 4, 16  # samples on which each region is ranked, and on which a choice of regions is measured

Lower = Callable[[Program, Mapping[str, int]], Program]


class Choice:
    """The regions of a program in the pinned type, and how each is computed.

    Args:
        program: in the pinned type between inputs and outputs, with samples.
        lower: the program with regions in the low type: name -> words for each constant matrix there.
        compute: the low type.
        equivariant: whether features keep the pinned type.

    Attributes:
        low: name -> words, of the regions that are low; two words are sums of two low numbers, twice the work.
        kept: name of a region that is not low, or has two words -> why, with numbers.
    """

    def __init__(self, program: Program, lower: Lower, compute: torch.dtype, *, equivariant: bool) -> None:
        self.program, self.lower, self.compute, self.equivariant = program, lower, compute, equivariant
        self.found = find_regions(program, compute, equivariant=equivariant)
        self.kept: dict[str, str] = self._beyond_range()
        self.low = {region.name: 1 for region in self.found.regions if region.name not in self.kept}

    @property
    def share(self) -> float:
        """The FLOPs that are low over those that are not always pinned."""
        low = sum(region.flops for region in self.found.regions if region.name in self.low)
        rest = self.found.flops - self.found.always_flops
        return low / rest if rest else 0.0

    @cached_property
    def ranking(self) -> tuple[Sensitivity, ...]:
        """Every region alone in the low type, by force error over FLOPs that it makes low, worst first.

        Raises:
            UsageError: there are no samples.
        """
        reference, rows = Reference(self.program, FEW), []
        for region in self.found.regions:
            errors = reference.errors(self.lower(self.program, {region.name: 1}))
            rows.append(Sensitivity(region.name, errors, region.flops, region.bytes))
        return tuple(sorted(rows, key=lambda row: row.per_gflop, reverse=True))

    def within(self, budget: float) -> None:
        """Give the worst regions two words, then pin them, until errors on samples are within the margin of ``budget``.

        Raises:
            UsageError: there are no samples.
            VerificationError: the pinned type alone misses the budget.
        """
        reference = Reference(self.program, MANY)
        least = reference.errors(self.program).budget
        if not least <= budget:
            what = f"with everything pinned the result is off by {least:.2e} eV/A, over the budget of {budget:.2e} eV/A"
            raise VerificationError(what, hint="a larger budget, or a wider pinned type")
        limit = max(MARGIN * budget, least)
        if reference.errors(self.lower(self.program, self.low)).budget <= limit:
            return
        worst = [row for row in self.ranking if row.region in self.low]
        moves = [(row, words) for words in ((2, 0) if self.equivariant else (0,)) for row in worst]
        failed, enough, off = 0, len(moves), math.inf
        while enough - failed > 1:  # errors fall as moves are made, so that halves can be left out
            middle = (failed + enough) // 2
            found = reference.errors(self.lower(self.program, self._after(moves[:middle]))).budget
            if found <= limit:
                enough = middle
            else:
                failed, off = middle, found
        for row, words in moves[:enough]:
            self.kept[row.region] = (
                f"{'two words' if words else 'pinned'}: alone it moves forces by {row.errors.largest:.2e} eV/A (rms "
                f"{row.errors.rms:.2e}), energies by {row.errors.energy:.2e} eV/atom, for {row.flops:.2e} FLOPs; with "
                f"one region less the result is off by {off:.2e} eV/A, allowed {limit:.2e}"
            )
        self.low = self._after(moves[:enough])

    def _after(self, moves: Iterable[tuple[Sensitivity, int]]) -> dict[str, int]:
        words = {**self.low, **{row.region: words for row, words in moves}}
        return {name: count for name, count in words.items() if count}

    def refusals(self) -> tuple[Refusal, ...]:
        """Pinned regions with the numbers that pinned them, and always pinned nodes by reason."""
        nodes = {region.name: region.nodes for region in self.found.regions}
        regions = [Refusal("low-region", why, nodes[name], name) for name, why in self.kept.items()]
        reasons: dict[str, list[str]] = {}
        for name, why in self.found.pinned.items():
            reasons.setdefault(why, []).append(name)
        return (*regions, *(Refusal("pinned", why, tuple(names)) for why, names in reasons.items()))

    def _beyond_range(self) -> dict[str, str]:
        """Regions with numbers beyond the range of the low type."""
        limit = torch.finfo(self.compute).max
        if self.equivariant:
            return dict(filter(None, (self._large_matrix(region, limit) for region in self.found.regions)))
        if self.compute is not torch.float16:
            return {}  # bfloat16 and float32 reach as far as float32 does
        if not self.program.samples:
            raise UsageError(
                "whether values fit float16 is found on samples, and the calibration set is empty",
                hint="structures like those the model will meet",
            )
        step = max(1, len(self.program.samples) // MANY)
        seen, kept = ranges(self.program, self.program.samples[::step]), {}
        nodes = {node.name: node for node in self.program.graph.nodes}
        for region in self.found.regions:
            operands = {n.name for name in region.nodes for n in nodes[name].all_input_nodes}
            for what, sizes in (("values", seen.values), ("gradients", seen.gradients)):
                name = max((*region.nodes, *operands), key=lambda n: sizes.get(n, 0.0))
                if sizes.get(name, 0.0) > limit / HEADROOM:
                    kept[region.name] = f"{what} of {name} reach {sizes[name]:.3g} on the samples, limit {limit:g} / 8"
        return kept

    def _large_matrix(self, region: Region, limit: float) -> tuple[str, str] | None:
        known, nodes = constants(self.program.graph), {node.name: node for node in self.program.graph.nodes}
        for name in region.nodes:
            matrix = static_operand(nodes[name], known)
            assert matrix is not None
            largest = constant_value(self.program, matrix).abs().max().item()
            if not largest <= limit:
                return region.name, f"weights of {name} reach {largest:.3g}, beyond {limit:g}"
        return None

