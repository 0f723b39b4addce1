"""Decode steps as CUDA graphs: what a step launches is recorded once and then launched as one thing.

One new token per row through the 32 blocks of Llama-3-8B is some 300 kernels. Launched one by one from Python
they take about 3 us each, a millisecond in all, while an int4 block's bytes take 35 us on an H100: without
graphs the GPU waits for Python. A graph repeats the very same launches, with the same addresses and grids, so
whatever differs between steps is read from tensors that stay where they are: the inputs, cos and sin, and the
plan's lengths, page tables and slots, into which the next step's are copied first. A graph belongs to some
blocks, a number of rows and a width of page tables; the latter two are rounded up to powers of two (the rows
that are too many have one token each on a page that nobody owns), so that a server needs a few dozen at most.
"""

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

from .pages import Plan

MAX_ROWS = 64  # beyond it a step is long enough to hide its launches
MIN_WIDTH = 64  # pages


def size(rows: int, pages: int) -> tuple[int, int]:
    """The rows and the width of the graph for so many rows, the widest of so many pages."""
    return 1 << (rows - 1).bit_length(), max(MIN_WIDTH, 1 << (pages - 1).bit_length())


def capture(compute: Callable[[], torch.Tensor], pool) -> tuple[torch.Tensor, Callable[[], None], object]:
    """Record what `compute` launches on the current device: its output, whose numbers each call of the second
    result renews; and the memory pool, which graphs that never run at once may share. All kernels must have
    run before: loading one cannot be recorded. Other threads may go on using the device."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        output = compute()
    return output, graph.replay, graph.pool()


@dataclass(frozen=True)
class _Captured:
    plan: Plan
    inputs: tuple
    output: torch.Tensor
    replay: Callable[[], None]


class Graphs:
    """The graphs of one executor; its thread's alone, and on the device that is current there."""

    def __init__(self):
        self.captured: dict[Hashable, _Captured] = {}
        self.pool, self.usable = None, True

    def run(self, key: Hashable, compute: Callable[..., torch.Tensor], plan: Plan, *inputs):
        """compute(plan, *inputs) for tensors (or None) whose shapes and the plan's go with `key`. The first
        call of a key computes and then captures; what later ones return is overwritten by the next one."""
        found = self.captured.get(key)
        if found is None:
            output = compute(plan, *inputs)
            if self.usable:
                self._capture(key, compute, plan, inputs)
            return output
        found.plan.copy_(plan)
        for its, new in zip(found.inputs, inputs, strict=True):
            if new is not None:
                its.copy_(new)
        found.replay()
        return found.output

    def _capture(self, key: Hashable, compute: Callable, plan: Plan, inputs: tuple) -> None:
        """Without graphs a step is slower, not wrong: where one cannot be captured, the server goes on."""
        try:
            output, replay, self.pool = capture(lambda: compute(plan, *inputs), self.pool)
        except RuntimeError:
            self.usable = False
            logging.getLogger(__name__).warning("no CUDA graphs: a step cannot be captured", exc_info=True)
        else:
            self.captured[key] = _Captured(plan, inputs, output, replay)
