"""Multi-scale deformable attention exported to TorchScript: the wrong way, how it is found out, and the right way.

Detectors as Deformable DETR (Zhu et al., ICLR 2021, Eq. 3) and Mask2Former compute this layer by plain PyTorch on one
device and by a kernel of their own on another.  A tracer does not see into a kernel that it is not told of: what the
kernel returned once becomes a constant of the file.  A kernel that is registered as an op is kept, and replaced by its
reference in PyTorch, so that the file takes one numeric path on every device::

    python examples/deformable_attention.py
    python examples/deformable_attention.py --output attention.pt --queries 300
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fxpass
from fxpass import jit
from fxpass_passes.legalize_custom_ops import LegalizeCustomOps

LEVELS = ((16, 12), (8, 6), (4, 3))  # height and width of each feature map
NAMES = {
    "queries": {0: "batch", 1: "count"},
    "places": {0: "batch", 1: "count"},
    "features": {0: "batch"},
}


# --- three ways to compute one thing


def plain(value: Tensor, heights: Sequence[int], widths: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of features at fractional places of several maps, by ``grid_sample``: the reference.

    Args:
        value: [batch, sum of height * width over the levels, heads, channels].
        heights, widths: of each level.
        locations: [batch, queries, heads, levels, points, 2], x and y in 0 to 1; outside of it features are 0.
        weights: [batch, queries, heads, levels, points].

    Returns:
        [batch, queries, heads * channels].
    """
    batch, _, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    sums, start = [], 0
    for level, (height, width) in enumerate(zip(heights, widths, strict=True)):
        rows = value[:, start : start + height * width]
        start += height * width
        grid = rows.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        places = (2 * locations[:, :, :, level] - 1).transpose(1, 2).reshape(batch * heads, queries, points, 2)
        sampled = nn.functional.grid_sample(grid, places, align_corners=False)
        share = weights[:, :, :, level].transpose(1, 2).reshape(batch * heads, 1, queries, points)
        sums.append((sampled * share).sum(-1))
    total = torch.stack(sums).sum(0)
    return total.reshape(batch, heads * channels, queries).transpose(1, 2)


def corners(value: Tensor, heights: Sequence[int], widths: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    """The same as a kernel does it: four reads for each place, each with its share of the pixel."""
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    total = value.new_zeros(batch, queries, heads, channels)
    item = torch.arange(batch, device=value.device).view(-1, 1, 1, 1)
    head = torch.arange(heads, device=value.device).view(1, 1, -1, 1)
    start = 0
    for level, (height, width) in enumerate(zip(heights, widths, strict=True)):
        at = locations[:, :, :, level] * locations.new_tensor([width, height]) - 0.5
        low = at.floor()
        for right in (0, 1):
            for down in (0, 1):
                pixel = low + locations.new_tensor([right, down])
                share = (1 - (at - pixel).abs()).prod(-1) * weights[:, :, :, level]
                x, y = pixel.long().unbind(-1)
                inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
                row = start + y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
                total += ((share * inside).unsqueeze(-1) * value[item, row, head]).sum(3)
        start += height * width
    return total.reshape(batch, queries, heads * channels)


def extension(
    value: Tensor, heights: Sequence[int], widths: Sequence[int], locations: Tensor, weights: Tensor
) -> Tensor:
    """The kernel called as extensions are that nobody registered: it takes memory and gives memory."""
    seen = [torch.from_numpy(np.array(x.detach().cpu().numpy())) for x in (value, locations, weights)]
    result = corners(seen[0], heights, widths, seen[1], seen[2]).numpy()
    return torch.tensor(result.tolist(), dtype=value.dtype, device=value.device)


# --- the kernel as an op that is known by its shape and its derivative

OP = "deformable::sample"


@torch.library.custom_op(OP, mutates_args=(), device_types=("cpu", "cuda"))
def registered(value: Tensor, heights: list[int], widths: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    return corners(value, heights, widths, locations, weights)


@registered.register_fake
def _(value: Tensor, heights: list[int], widths: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    return value.new_empty((value.shape[0], locations.shape[1], value.shape[2] * value.shape[3]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.heights, ctx.widths, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    with torch.enable_grad():
        value, locations, weights = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        result = corners(value, ctx.heights, ctx.widths, locations, weights)
        by_value, by_location, by_weight = torch.autograd.grad(result, (value, locations, weights), grad)
    return by_value, None, None, by_location, by_weight


registered.register_autograd(_gradients, setup_context=_keep)

WAYS = {"plain": plain, "extension": extension, "registered": registered}


class DeformableAttention(nn.Module):
    """Each query looks at a few places near its own one, on every level, and weighs what it finds there.

    Args:
        channels: of queries and features.
        levels: height and width of each feature map, Python integers.
        heads: that share the channels.
        points: places that a head looks at on a level.
        way: which of ``WAYS`` computes the sums.
    """

    def __init__(
        self,
        channels: int = 32,
        levels: Sequence[tuple[int, int]] = LEVELS,
        heads: int = 4,
        points: int = 4,
        way: str = "plain",
    ) -> None:
        super().__init__()
        self.heights, self.widths = [h for h, _ in levels], [w for _, w in levels]
        self.heads, self.points, self.way = heads, points, way
        self.value = nn.Linear(channels, channels)
        self.offsets = nn.Linear(channels, heads * len(levels) * points * 2)
        self.scores = nn.Linear(channels, heads * len(levels) * points)
        self.output = nn.Linear(channels, channels)
        self.register_buffer("sizes", torch.tensor([(w, h) for h, w in levels]).to(self.value.weight).unsqueeze(1))

    def forward(self, queries: Tensor, places: Tensor, features: Tensor) -> Tensor:
        """``queries`` [batch, count, channels], their ``places`` [batch, count, 2] in 0 to 1, and ``features``
        [batch, sum of height * width, channels] -> [batch, count, channels]."""
        batch, count, _ = queries.shape
        shape = (batch, count, self.heads, len(self.heights), self.points)
        value = self.value(features).unflatten(-1, (self.heads, features.shape[-1] // self.heads))
        locations = places.view(batch, count, 1, 1, 1, 2) + self.offsets(queries).view(*shape, 2) / self.sizes
        weights = (
            self.scores(queries).unflatten(-1, (self.heads, len(self.heights) * self.points)).softmax(-1).view(shape)
        )
        return self.output(WAYS[self.way](value, self.heights, self.widths, locations, weights))


def attention(way: str) -> DeformableAttention:
    """The same layer, float64, with one way to compute it."""
    torch.manual_seed(0)
    return DeformableAttention(way=way).double().eval()


def inputs(batch: int, count: int, seed: int) -> tuple[Tensor, ...]:
    """Random arguments of :class:`DeformableAttention`, float64."""
    generator = torch.Generator().manual_seed(seed)
    places = sum(h * w for h, w in LEVELS)
    queries, features = (torch.randn(batch, n, 32, generator=generator).double() for n in (count, places))
    return queries, torch.rand(batch, count, 2, generator=generator).double(), features


def optimized(model: nn.Module) -> fxpass.Optimized:
    """A layer for TorchScript whose registered kernel gave way to the reference."""
    passes = [LegalizeCustomOps(references={OP: plain}), "fold-constants,common-subexpressions,dead-code"]
    return fxpass.optimize(model, passes, example_inputs=inputs(2, 5, seed=0), dynamic=NAMES, target="torchscript")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("attention.pt"), help="the TorchScript file to write")
    parser.add_argument("--queries", type=int, default=300, help="of the inputs that the files are tried on")
    options = parser.parse_args()
    new = inputs(3, options.queries, seed=1)
    same_sizes = inputs(2, 5, seed=2)
    expected = attention("plain")

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns, of other things
        wrong = torch.jit.trace(attention("extension"), inputs(2, 5, seed=0), check_trace=False)
        print(
            f"torch.jit.trace: off by {float((wrong(*same_sizes) - expected(*same_sizes)).abs().max()):.2g}, silently"
        )
    for attempt in (lambda m: jit.trace(m, inputs(2, 5, seed=0)), optimized):
        try:
            attempt(attention("extension"))
        except fxpass.FxpassError as error:
            print(f"refused, {type(error).__name__}: {error}")

    right = optimized(attention("registered"))
    for row in right.report.receipt.rows:
        if " on " in row.check:
            print(f"{row.check}, {row.structure}: off by {row.value:.1e} ({row.limit:.0e} allowed)")
    right.save(options.output)
    with torch.no_grad():
        loaded = torch.jit.load(options.output)
        error = float((loaded(*new) - expected(*new)).abs().max())
    print(f"{options.output}: off by {error:.1e} on {options.queries} queries")


if __name__ == "__main__":
    main()
