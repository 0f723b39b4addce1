"""The paged cache's layout: which page holds which key of which row, and where this pass's keys go.

A pool is [pages, page, K, D] for keys and one more for values: K key heads of D numbers, `page` tokens to a
page. (On CUDA it lies in memory so; on a CPU, which attends to a head at a time, each head's pages may lie
together.) A row (one sequence of a batch) owns a list of pages, its table, e.g. [7, 8, 3]: its keys 0..15
stand in page 7, 16..31 in page 8, and so on. A `Plan` says this for all rows of one executor pass, once for
all layers, in the form each device wants: on CUDA three int32 tensors that the kernels read, on the CPU
`Group`s of rows that PyTorch can treat as one batch.
"""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch

from . import triton


class Group(NamedTuple):
    """Consecutive rows of one shape whose keys are one view of the pool (`ids` is None) or one gather
    (`ids`)."""

    rows: int
    queries: int
    length: int
    token: int  # where the group's tokens begin in the packed tensors
    first: int  # first page of the first row
    stride: int  # pages from one row's first page to the next row's
    ids: torch.Tensor | None  # [rows * pages of a row] int64: the pages to gather


@dataclass(eq=False)  # not frozen: that takes thrice the time to make
class Plan:
    """What one executor pass needs to know that does not depend on the layer; built once, used by all
    layers."""

    tables: list[list[int]]
    queries: list[int]
    lengths: list[int]
    page: int
    width: int  # pages of the widest row; fixed when the plan belongs to a CUDA graph
    tokens: int
    slots: torch.Tensor  # [T] int64: where each token's key and value go in the flattened pool
    groups: list[Group]  # the rows as few calls of PyTorch's attention; none where the kernels run
    masks: dict = field(default_factory=dict)  # CPU: additive masks, made by the first layer that needs them

    @cached_property
    def index(self) -> torch.Tensor:
        """CUDA: `views` in one int32 tensor on the device, so that a pass costs one copy."""
        starts = list(accumulate(self.queries, initial=0))
        pages = [p for table in self.tables for p in (*table[: self.width], *[0] * (self.width - len(table)))]
        padded = [
            part + [0] * (-len(part) % 4) for part in (starts, self.lengths)
        ]  # keeps each part 16-byte aligned
        return moved(torch.tensor(padded[0] + padded[1] + pages, dtype=torch.int32), self.slots.device)

    @cached_property
    def views(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """CUDA: (first token of each row and the end [rows + 1], keys of each row [rows], pages
        [rows, width])."""
        rows = len(self.queries)
        lengths, table = rows + 1 + -(rows + 1) % 4, rows + 1 + -(rows + 1) % 4 + rows + -rows % 4
        starts = self.index[: rows + 1]
        return starts, self.index[lengths : lengths + rows], self.index[table:].view(rows, self.width)

    def copy_(self, other: "Plan") -> None:
        """Take over another plan of equal shape in place: how a captured CUDA graph is told its next step."""
        if self.index.shape != other.index.shape or self.tokens != other.tokens:
            raise ValueError(
                f"plan of {other.tokens} tokens, width {other.width} into {self.tokens}, {self.width}"
            )
        self.slots.copy_(other.slots)
        self.index.copy_(other.index)


def plan(
    tables: list[list[int]],
    queries: list[int],
    lengths: list[int],
    page_size: int,
    device="cpu",
    width: int | None = None,
) -> Plan:
    """Lay out one pass: `tables[r]` are row r's pages in order (more than needed is fine), `queries[r]` >= 1
    its new tokens, `lengths[r]` its keys with the new tokens included. `width` fixes the pages per row on the
    device (CUDA graphs). ValueError says which row is wrong."""
    if not len(tables) == len(queries) == len(lengths) > 0:
        raise ValueError(
            f"{len(tables)} page tables, {len(queries)} queries, {len(lengths)} lengths: want one a row"
        )
    slots = []
    for row, (table, new, length) in enumerate(zip(tables, queries, lengths, strict=True)):
        if not 1 <= new <= length <= len(table) * page_size:
            raise ValueError(
                f"row {row}: want 1 <= queries <= length <= room, have queries {new}, length {length}, "
                f"room for {len(table) * page_size} in {len(table)} pages of {page_size}"
            )
        slots += [table[p // page_size] * page_size + p % page_size for p in range(length - new, length)]
    needed = -(-max(lengths) // page_size)
    if width is not None and width < needed:
        raise ValueError(f"a width of {width} pages is too little for a row of {needed}")
    tokens = moved(torch.tensor(slots, dtype=torch.int64), device)
    with_kernels = tokens.is_cuda and triton is not None
    groups = [] if with_kernels else _groups(tables, queries, lengths, page_size, device)
    sizes = page_size, width or needed, len(slots)
    made = Plan(tables, list(queries), list(lengths), *sizes, tokens, groups)
    _ = with_kernels and made.views  # now, while the caller's lists are what they are
    return made


def moved(tensor: torch.Tensor, device) -> torch.Tensor:
    """A CPU tensor on a device, without waiting for what the device does: through pinned memory."""
    if tensor.device == device or torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def in_order(*pools) -> None:
    """ValueError for pools that a kernel would misread."""
    for pool in pools:
        if not pool.is_contiguous():
            raise ValueError(f"a pool {list(pool.shape)} of strides {pool.stride()}: want a contiguous one")


def append(k, v, k_pages, v_pages, plan: Plan) -> None:
    """Write this pass's keys and values, each [T, K, D], into the pools [pages, page, K, D], in place."""
    _, _, K, D = k_pages.shape
    k_pages.view(-1, K, D).index_copy_(0, plan.slots, k)
    v_pages.view(-1, K, D).index_copy_(0, plan.slots, v)


def view(pages, group: Group, low: int, high: int):
    """Keys low .. high of a group as [B, K, high - low, D]: a view of the pool where the rows are runs."""
    _, page, K, D = pages.shape
    if group.ids is None:
        _, token, head, _ = pages.stride()
        at = pages.storage_offset() + (group.first * page + low) * token
        strides = group.stride * page * token, head, token, 1
        return pages.as_strided((group.rows, K, high - low, D), strides, at)
    rows = pages.index_select(0, group.ids).view(group.rows, -1, K, D)
    return rows[:, low:high].transpose(1, 2)


def _groups(tables, queries, lengths, page: int, device) -> list[Group]:
    """Join consecutive rows of equal shape: whole runs at an equal stride become one view, fragmented ones a
    gather."""
    found: list[list] = []  # [rows, queries, length, token, first page or None, stride or None, page ids]
    token = 0
    for table, new, length in zip(tables, queries, lengths, strict=True):
        pages = list(table[: -(-length // page)])
        first = pages[0] if pages == list(range(pages[0], pages[0] + len(pages))) else None
        last = found[-1] if found else None
        joins = (
            last is not None and last[1] == new and last[2] == length and (last[4] is None) == (first is None)
        )
        if joins and first is not None:
            step = first - last[6][-len(pages)]
            joins = step >= 0 and last[5] in (None, step)
            last[5] = step if joins else last[5]
        if joins:
            last[0] += 1
            last[6] += pages
        else:
            found.append([1, new, length, token, first, None, pages])
        token += new
    made = []
    for rows, new, length, at, first, stride, ids in found:
        gathered = None if first is not None else torch.tensor(ids).to(device)
        made.append(Group(rows, new, length, at, first or 0, stride or 0, gathered))
    return made
