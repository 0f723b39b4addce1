"""Decode steps as CUDA graphs: what a step launches is recorded once and then launched as one thing.

One new token per row through the 32 blocks of Llama-3-8B is some 300 kernels. Launched one by one from Python
they take about 3 us each, a millisecond in all, while an int4 block's bytes take 35 us on an H100: without
graphs the GPU waits for Python. A graph repeats the very same launches, with the same addresses and grids, so
whatever differs between steps is read from tensors that stay where they are: the inputs, cos and sin, and the
plan's lengths, page tables and slots, into which the next step's are copied first. A graph belongs to some
blocks, a number of rows and a width of page tables; the latter two are rounded up to powers of two (the rows
that are too many have one token each on a page that nobody owns). The ones used last are kept.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

from .pages import Plan

MAX_ROWS = 64  # beyond it a step is long enough to hide its launches
MIN_WIDTH = 64  # pages
MAX_GRAPHS = 48  # of an executor: clients choose which blocks they ask for, in many ways
_capturing = threading.Lock()  # CUDA allows one capture at a time in a process


def size(rows: int, pages: int) -> tuple[int, int]:
    """The rows and the width of the graph for so many rows, the widest of so many pages."""
    return 1 << (rows - 1).bit_length(), max(MIN_WIDTH, 1 << (pages - 1).bit_length())


def capture(compute: Callable[[], torch.Tensor], shared) -> tuple[torch.Tensor, Callable[[], None], tuple]:
    """Record what `compute` launches on the current device: its output, whose numbers each call of the second
    result renews; and the memory pool with its stream, which graphs that never run at once may share (None: a
    new one; a block of a pool serves only the stream that it came from). All kernels must have run before:
    loading one cannot be recorded. Other threads may go on using the device."""
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    pool, stream = shared or (None, torch.cuda.Stream())
    its = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
    try:
        with _capturing, torch.cuda.graph(graph, **its):
            output = compute()
    finally:
        torch.cuda.set_stream(before)  # which PyTorch does not do where a capture fails
    return output, graph.replay, (graph.pool(), stream)


@dataclass(frozen=True)
class _Captured:
    plan: Plan
    inputs: tuple
    output: torch.Tensor
    replay: Callable[[], None]


class Graphs:
    """The graphs of one executor; its thread's alone, and on the device that is current there."""

    def __init__(self):
        # the ones used last at the end; None: of shapes that were seen once
        self.captured: OrderedDict[Hashable, _Captured | None] = OrderedDict()
        self.shared, self.usable = None, True  # of these graphs: a memory pool, a stream

    def run(self, key: Hashable, compute: Callable[..., torch.Tensor], plan: Plan, *inputs):
        """compute(plan, *inputs) for tensors (or None) whose shapes and the plan's go with `key`. The second
        call of a key captures; what later ones return is overwritten by the next."""
        found, known = self.captured.get(key), key in self.captured
        if found is None:
            output = compute(plan, *inputs)
            if self.usable:
                self.captured[key] = self._capture(compute, plan, inputs) if known else None
        else:
            found.plan.copy_(plan)
            for its, new in zip(found.inputs, inputs, strict=True):
                if new is not None:
                    its.copy_(new)
            found.replay()
            output = found.output
        if key in self.captured:
            self.captured.move_to_end(key)
        if len(self.captured) > MAX_GRAPHS:
            self.captured.popitem(last=False)
        return output

    def _capture(self, compute: Callable, plan: Plan, inputs: tuple) -> _Captured | None:
        """Without graphs a step is slower, not wrong: where one cannot be captured, the server goes on."""
        shared = self.shared if any(self.captured.values()) else None  # a pool ends with its last graph
        try:
            output, replay, self.shared = capture(lambda: compute(plan, *inputs), shared)
        except Exception:
            self.usable = False
            self.captured.clear()
            logging.getLogger(__name__).warning("no CUDA graphs: a step cannot be captured", exc_info=True)
            return None
        return _Captured(plan, inputs, output, replay)
