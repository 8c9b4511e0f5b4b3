"""Look into a pipeline: the graph before and after every pass, what it costs, and why a rule did not fire.

    python examples/inspect_pipeline.py
    python examples/inspect_pipeline.py --passes fold-constants,dead-code --limit 3
"""

from __future__ import annotations

import argparse
from itertools import pairwise

import fxpass
from fxpass.models import small_potential
from fxpass.render.terminal import console, graph_diff, graph_summary, pipeline_table


class Stages:
    """Watches the passes and keeps a snapshot of the program before the first and after each of them."""

    def __init__(self) -> None:
        self.snapshots: list[fxpass.Snapshot] = []

    def on_pass_start(self, pass_: fxpass.Pass, program: fxpass.Program) -> None:
        if not self.snapshots:
            self.snapshots.append(fxpass.snapshot(program, "capture"))

    def on_pass_end(self, record: fxpass.PassRecord, before: fxpass.Program, after: fxpass.Program) -> None:
        self.snapshots.append(fxpass.snapshot(after, record.name, seconds=record.seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", default="exact", help="a preset or a pipeline")
    parser.add_argument("--limit", type=int, default=5, help="nodes to show of each kind in each module")
    parser.add_argument("--atoms", type=int, default=108, help="number of atoms at which the cost is given")
    options = parser.parse_args()
    screen = console()

    program = fxpass.capture(small_potential())
    stages = Stages()
    result = fxpass.run_passes(program, options.passes, observers=[stages])

    screen.rule("the captured graph")
    screen.print(graph_summary(stages.snapshots[0]))

    screen.rule("what each pass did")
    changes = [fxpass.diff(old, new) for old, new in pairwise(stages.snapshots)]
    for change in changes:
        screen.print(graph_diff(change, limit=options.limit))

    screen.rule("what it cost, and why a rule did not fire")
    screen.print(pipeline_table(result.records, changes))

    sizes = {"atoms": options.atoms, "edges": 42 * options.atoms, "graphs": 1}
    for snapshot in (stages.snapshots[0], stages.snapshots[-1]):
        at = snapshot.cost.at(**sizes)
        print(f"{snapshot.label}: {at.flops / 1e6:.1f} MFLOP, {at.bytes / 1e6:.1f} MB at {sizes['edges']} edges")

    screen.rule("the last graph, where messages are summed")
    lines = stages.snapshots[-1].code().splitlines()
    print("\n".join(line[:160] for line in lines if "scatter_sum" in line))


if __name__ == "__main__":
    main()
