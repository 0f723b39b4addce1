"""Attention over a paged key-value cache: many sessions, each at its own position, in one pass.

Letters: T tokens of a pass, N query heads, K key heads, G = N // K, D head dim, B rows of a group, Q new
tokens of a row, S keys of a row. A page holds `page` tokens: a pool is [pages, page, K, D]. The tokens of all
rows lie end to end ([T, ...]); row r's new tokens are its last ones, at lengths[r] - queries[r] and after.

The plain version is `reference`. Bytes: a decode step reads every key and value of a row once, 2 * S * K * D
numbers, 33.5 MB for Llama-3-8B at S = 8,192 in 16 bits, 10 us of an H100's 3.35 TB/s; repeating keys for the
G heads that share them would read G times that. So a tile of the kernel holds the G query heads of one key
head as rows of one matrix, and where there are too few rows and key heads to keep all multiprocessors
reading, the keys are split between programs and `_merge` adds the parts in a fixed order (no atomics: the
same input gives the same bits). Flops: a causal prefill of S tokens takes 2 * N * D * S^2, 0.55 TFLOP at S =
8,192, 0.56 ms of 989 TFLOPS; scores never leave the chip (softmax is kept running, as in FlashAttention) and
key blocks that the causal mask or the window hides are not visited at all.

On a CPU rows of one shape whose pages are runs are one strided view of the pool and one call of PyTorch's own
attention; but single tokens with many keys, so in runs, are two matrix products a row.
"""

import torch
import torch.nn.functional as F
from torch.nn.functional import scaled_dot_product_attention as sdpa

from . import tl, triton
from .pages import Plan, append, in_order, moved, plan, view
from .rotary import rope_append, rotate

__all__ = ["Plan", "append", "attend", "fresh", "moved", "plan", "reference", "rope_append", "rotate"]

MASK_ELEMENTS = 4 << 20  # largest additive mask of one query tile on the CPU (16 MB of float32)
MASKS_KEPT = 16 << 20  # elements of masks that one plan keeps for its further layers
MANY_KEYS = 1 << 18  # numbers of a row's keys, from which on `_of_a_token` is faster
LOG2E = 1.4426950408889634  # the kernel's softmax is in powers of two


def attend(q, k_pages, v_pages, plan: Plan, *, scale: float, slopes=None, window: int | None = None):
    """Attend the new tokens q [T, N, D] to their rows' keys in the pools [pages, page, K, D]: [T, N, D].

    Query head n uses key head n // G. A query at position i sees keys j <= i, and with `window` only j > i -
    window. `slopes` [N] float32 adds slopes[n] * j to the scaled scores: ALiBi, since softmax ignores a
    constant; slopes in bfloat16 are Falcon's: slopes[n] * j is rounded to bfloat16 and then scaled, like the
    scores. All other tensors on one device, q and the pools of one dtype (float32, float16, bfloat16);
    ValueError says what does not fit.
    """
    (T, N, D), (_, page, K, size) = q.shape, k_pages.shape
    if plan.tokens != T or k_pages.shape != v_pages.shape or page != plan.page:
        raise ValueError(
            f"q {list(q.shape)}, pools {list(k_pages.shape)} and {list(v_pages.shape)} do not fit a plan of "
            f"{plan.tokens} tokens and pages of {plan.page}"
        )
    if slopes is not None and slopes.shape != (N,):
        raise ValueError(f"slopes {list(slopes.shape)}: want one for each of {N} heads")
    if not q.device == k_pages.device == v_pages.device == plan.slots.device:
        devices = {q.device, k_pages.device, v_pages.device, plan.slots.device}
        raise ValueError(f"q, pools and plan are on {', '.join(map(str, devices))}: want one device")
    if size != D or N % K or not q.dtype == k_pages.dtype == v_pages.dtype:
        raise ValueError(
            f"q {list(q.shape)} {q.dtype} does not fit keys {list(k_pages.shape)} {k_pages.dtype} and values "
            f"{v_pages.dtype}: want one head dim, one dtype, and query heads a multiple of key heads"
        )
    if q.is_cuda and triton is not None:
        return launch_attend(q, k_pages, v_pages, plan, scale, slopes, window)
    if len(plan.groups) == 1:
        return _attend_group(q, k_pages, v_pages, plan, plan.groups[0], scale, slopes, window)
    out = torch.empty_like(q)
    for group in plan.groups:
        tokens = slice(group.token, group.token + group.rows * group.queries)
        out[tokens] = _attend_group(q[tokens], k_pages, v_pages, plan, group, scale, slopes, window)
    return out


def _attend_group(q, k_pages, v_pages, plan, group, scale, slopes, window):
    """One group, in query tiles; q [B * Q, N, D]. The G query heads of one key head become further queries of
    it, so that a key is read once and not G times."""
    (T, N, D), (_, _, K, _) = q.shape, k_pages.shape
    B, Q, S, G = group.rows, group.queries, group.length, N // K
    if Q == 1:
        low = 0 if window is None else max(0, S - window)
        keys, values = view(k_pages, group, low, S), view(v_pages, group, low, S)
        mask = None if slopes is None else _mask(plan, Q, low, S, S - 1, G, scale, slopes, window, q)
        q = q.reshape(B, K, G, D)
        few = K * (S - low) * D < MANY_KEYS
        if few or group.ids is not None or not q.is_cpu or q.dtype != torch.float32:
            return sdpa(q, keys, values, attn_mask=mask, scale=scale).reshape(T, N, D)
        rows = [_of_a_token(*row, mask, scale) for row in zip(q, keys, values, strict=True)]
        return torch.cat(rows).reshape(T, N, D)
    if Q == S and slopes is None and window is None:
        keys, values = view(k_pages, group, 0, S), view(v_pages, group, 0, S)
        rows = q.reshape(B, Q, N, D).transpose(1, 2)
        out = sdpa(rows, keys, values, is_causal=True, scale=scale, enable_gqa=G > 1)
        return out.transpose(1, 2).reshape(T, N, D)
    q = q.reshape(B, Q, K, G, D)
    out = torch.empty_like(q)
    step = max(1, MASK_ELEMENTS // (S * (G if slopes is None else N)))
    for start in range(0, Q, step):
        stop = min(Q, start + step)
        low = 0 if window is None else max(0, S - Q + start + 1 - window)
        high = S - Q + stop
        keys, values = view(k_pages, group, low, high), view(v_pages, group, low, high)
        mask = _mask(plan, stop - start, low, high, S - Q + start, G, scale, slopes, window, q)
        tile = q[:, start:stop].transpose(1, 2).reshape(B, K, (stop - start) * G, D)
        tile = sdpa(tile, keys, values, attn_mask=mask, scale=scale)
        out[:, start:stop] = tile.reshape(B, K, stop - start, G, D).transpose(1, 2)
    return out.view(T, N, D)


def _of_a_token(q, keys, values, mask, scale):
    """One row's attention as two matrix products: q [K, G, D], keys and values [K, S, D], each head's in one
    run (gathered ones take 1.0 to 1.4 of the operator's time). One thread of an AVX-512 CPU, of the time of
    PyTorch's operator: .55 to .85 with D = 128 and G up to 4, .6 to .95 with 256 or G = 8, .75 to 1.1 with
    64. MKL reads the keys in this order three times as fast as in the other."""
    scores = (keys @ (q * scale).mT).mT
    weights = (scores.contiguous() if mask is None else scores + mask).softmax(-1)
    if (G := q.shape[1]) < 4 and q.shape[2] >= 128:  # MKL needs twice the time for fewer than 4
        weights = F.pad(weights, (0, 0, 0, 4 - G))
    return (weights @ values)[:, :G]


def _bias(slopes, j, scale: float):
    """ALiBi's bias [N, keys] at key positions j [keys], float32 whatever the dtype: in bfloat16 neighbouring
    keys would get the same number. transformers' Falcon does just that (slopes in bfloat16), so it is done
    for it."""
    if slopes.dtype == torch.bfloat16:
        return (slopes[:, None] * j).float() * scale
    return slopes.float()[:, None] * (j - j[-1]).float()


def _mask(plan: Plan, queries: int, low: int, high: int, position: int, G: int, scale, slopes, window, q):
    """What to add to the scores of `queries` tokens from `position` on against keys low .. high:
    [queries * G, keys], or with slopes [K, queries * G, keys]. Kept in the plan for the next layer while it
    is small."""
    key = (queries, low, high, position, G, None if slopes is None else slopes.data_ptr(), window, q.dtype)
    if key in plan.masks:
        return plan.masks[key]
    i = torch.arange(position, position + queries, device=q.device).view(-1, 1, 1)
    j = torch.arange(low, high, device=q.device)
    hidden = (j > i) if window is None else (j > i) | (j <= i - window)  # [queries, 1, keys]
    if slopes is None:
        mask = torch.zeros(queries, G, high - low, dtype=q.dtype, device=q.device)
    else:
        mask = _bias(slopes, j, scale).view(-1, 1, G, high - low).repeat(1, queries, 1, 1)
    mask.masked_fill_(hidden, float("-inf"))
    mask = mask.view(*mask.shape[:-3], queries * G, high - low)
    held = sum(m.numel() for m in plan.masks.values())
    if held + mask.numel() <= MASKS_KEPT:
        plan.masks[key] = mask
    return mask


def fresh(q, k, v, left_pad: list[int] | None = None, *, scale: float, slopes=None, window=None):
    """Causal attention without a cache, differentiable: q [B, T, N, D], k, v [B, T, K, D]: [B, T, N, D].

    The first left_pad[b] tokens of row b are padding: no real token sees them; what comes out there is finite
    and without meaning.
    """
    B, T, N = q.shape[:3]
    if slopes is not None and slopes.dtype == torch.float32 != q.dtype and q.is_cuda:
        # there the bias must have q's dtype, in which neighbouring keys would have the same number
        wide = fresh(q.float(), k.float(), v.float(), left_pad, scale=scale, slopes=slopes, window=window)
        return wide.to(q.dtype)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    padded = left_pad is not None and any(left_pad)
    if not padded and slopes is None and (window is None or window >= T):
        mask = None
    else:
        j = torch.arange(T, device=q.device)
        mask = j <= j[:, None]  # [query, key]: is it seen?
        if window is not None:
            mask = mask & (j > j[:, None] - window)
        if padded:  # a padding token sees itself, so that its softmax has something to sum
            pad = torch.tensor(left_pad, device=q.device).view(B, 1, 1, 1)
            mask = (mask & (j >= pad)) | (j == j[:, None])
        if slopes is not None:
            bias = _bias(slopes.to(q.device), j, scale).unsqueeze(1)
            bias = bias.to(torch.float32 if q.device.type == "cpu" else q.dtype)
            mask = bias.masked_fill(~mask, float("-inf"))
    gqa = k.shape[1] != N
    return sdpa(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=gqa).transpose(1, 2)


def reference(q, k_pages, v_pages, tables, queries, lengths, *, scale: float, slopes=None, window=None):
    """The specification of `attend`: one row at a time, every key read, softmax in float32."""
    N, K = q.shape[1], k_pages.shape[2]
    out, token = [], 0
    for table, new, length in zip(tables, queries, lengths, strict=True):
        both = (pages[list(table)].flatten(0, 1)[:length].float() for pages in (k_pages, v_pages))
        keys, values = (x.repeat_interleave(N // K, dim=1) for x in both)  # [S, N, D]
        scores = torch.einsum("qnd,snd->nqs", q[token : token + new].float(), keys) * scale
        i = torch.arange(length - new, length, device=q.device)[:, None]
        j = torch.arange(length, device=q.device)
        if slopes is not None:
            scores = scores + _bias(slopes.to(q.device), j, scale).unsqueeze(1)
        hidden = (j > i) if window is None else (j > i) | (j <= i - window)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out.append(torch.einsum("nqs,snd->qnd", weights, values).to(q.dtype))
        token += new
    return torch.cat(out)


def tiles(decode: bool, G: int, D: int, itemsize: int, capability: int = 9, biased: bool = False) -> dict:
    """Tile sizes by a plain rule, not by autotuning: BM query rows (tokens times padded heads) against BK
    keys. The sizes are those that compile without spills and within the shared memory of sm_80 and sm_90, by
    Triton 3.6 and 3.9. biased: with a window or ALiBi."""
    GP, BD = triton.next_power_of_2(G), max(16, triton.next_power_of_2(D))
    if itemsize == 4:  # plain multiply-adds: exact, no tensor cores, small tiles
        BM, BK, warps, stages = max(GP, 16), 16, 8, 2
    else:
        wide = BD <= 128 and (capability >= 9 or (D == BD and not biased))
        BM = max(GP, 16 if decode else 128 if wide else 64)
        BK = 64 if BD <= 128 and (decode or capability >= 9) else 32
        warps = 8 if BM >= 128 or BM * BD >= 128 * 128 else 4
        stages = 2 if decode and D != BD else 3
    return {"GP": GP, "BD": BD, "BM": BM, "BK": BK, "num_warps": warps, "num_stages": stages}


def launch_attend(q, k_pages, v_pages, plan: Plan, scale: float, slopes=None, window: int | None = None):
    """Run `_attend` (and `_merge`, if the keys are split); CPU tensors only in the interpreter."""
    in_order(k_pages, v_pages)
    T, N, D = q.shape
    K = k_pages.shape[2]
    q = q if q.stride(2) == 1 and q.stride(1) == D else q.contiguous()
    starts, lengths, table = plan.views
    rows = len(plan.queries)
    decode = rows == T
    device = torch.cuda.get_device_properties(q.device) if q.is_cuda else None
    biased = slopes is not None or window is not None
    tile = tiles(decode, N // K, D, q.element_size(), device.major if device else 9, biased)
    BM, GP, BK = tile["BM"], tile["GP"], tile["BK"]
    programs = rows if decode else T // (BM // GP) + rows
    cores = device.multi_processor_count if device else 8  # 8: the interpreter
    splits = max(1, min(2 * cores // (programs * K), plan.width * plan.page // (4 * BK), 64))
    out = torch.empty(T, N, D, dtype=q.dtype, device=q.device)
    parts = sums = out
    if splits > 1:
        parts = torch.empty(splits, T, N, D, dtype=torch.float32, device=q.device)
        sums = torch.empty(2, splits, T, N, dtype=torch.float32, device=q.device)
    _attend[(programs, K, splits)](
        *(q, k_pages, v_pages, parts, sums, out if slopes is None else slopes, table, starts, lengths),
        *(q.stride(0), K * D, plan.width, rows, T, scale * LOG2E, window or 0),
        G=N // K, D=D, PAGE=plan.page, DECODE=decode, WINDOW=window is not None, SPLIT=splits > 1,
        SLOPES=0 if slopes is None else 1 if slopes.dtype == torch.float32 else 2,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", enable_fp_fusion=True, **tile,
    )  # fmt: skip
    if splits > 1:
        sizes = {"D": D, "BD": tile["BD"], "BS": triton.next_power_of_2(splits)}
        _merge[(T, N)](parts, sums, out, splits, **sizes, num_warps=4, enable_fp_fusion=True)
    return out


if triton is not None:

    @triton.jit
    def _owner(starts_ptr, count, tile, SIZE: tl.constexpr):
        """Whose tile is this, if owner r has tokens starts[r] .. starts[r + 1] and its tiles of SIZE tokens
        begin at starts[r] // SIZE + r? Nobody need count tiles on the host: there are at most tokens // SIZE
        + count."""
        owner = 0
        end = count
        while end - owner > 1:
            middle = (owner + end) // 2
            before = tl.load(starts_ptr + middle) // SIZE + middle <= tile
            owner = tl.where(before, middle, owner)
            end = tl.where(before, end, middle)
        return owner

    @triton.jit(do_not_specialize=["width", "rows", "tokens", "window"])  # else each new batch might compile
    def _attend(
        q_ptr, k_ptr, v_ptr, out_ptr, sums_ptr, slopes_ptr, table_ptr, starts_ptr, lengths_ptr,
        q_stride, token_stride, width, rows, tokens, scale, window,
        G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PAGE: tl.constexpr,
        BM: tl.constexpr, BK: tl.constexpr, DECODE: tl.constexpr, SLOPES: tl.constexpr, WINDOW: tl.constexpr,
        SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """One tile of BQ = BM // GP tokens of one row, with the G heads of one key head, against a share of
        its keys.

        Rows of the tile are (token, head) pairs. Nothing about a row is a launch argument: its table, start
        and length are read on the device, so that a CUDA graph can be replayed for the next step.
        """
        BQ: tl.constexpr = BM // GP
        # a row's last tiles see the most keys: start them first
        tile = tl.num_programs(0) - 1 - tl.program_id(0)
        head = tl.program_id(1)
        row = tile if DECODE else _owner(starts_ptr, rows, tile, BQ)
        token = tl.load(starts_ptr + row)
        queries = tl.load(starts_ptr + row + 1) - token
        length = tl.load(lengths_ptr + row)
        first = 0 if DECODE else (tile - token // BQ - row) * BQ
        if first >= queries:
            return
        m = tl.arange(0, BM)
        d = tl.arange(0, BD)
        n = head * G + m % GP
        t = first + m // GP
        real = (t < queries) & (m % GP < G)
        q_at = (token + t).to(tl.int64)[:, None] * q_stride + n[:, None] * D + d[None, :]
        q = tl.load(q_ptr + q_at, mask=real[:, None] & (d < D)[None, :], other=0.0)
        slope = tl.load(slopes_ptr + n, mask=real, other=0.0).to(tl.float32) if SLOPES else 0.0
        position = length - queries + t
        last = length - queries + tl.minimum(first + BQ, queries)  # keys that the tile's last token sees
        begin = tl.maximum(length - queries + first + 1 - window, 0) // BK if WINDOW else 0
        end = tl.cdiv(last, BK)
        share = tl.cdiv(end - begin, tl.num_programs(2))
        begin += tl.program_id(2) * share
        end = tl.minimum(begin + share, end)
        # not -inf: a share without keys merges to nothing, not to NaN
        best = tl.full([BM], -1e30, tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, BD], tl.float32)
        table_ptr += row.to(tl.int64) * width
        k_ptr += head * D
        v_ptr += head * D
        if not (DECODE or WINDOW):  # blocks that every token of the tile sees whole need no mask
            whole = tl.minimum((length - queries + first + 1) // BK, end)
            best, total, acc = _stream(
                q, best, total, acc, k_ptr, v_ptr, table_ptr, slope, position, begin, whole, last, length,
                token_stride, scale, window, D, BD, PAGE, BK, SLOPES, WINDOW, False, PRECISION,
            )  # fmt: skip
            begin = tl.maximum(begin, whole)
        best, total, acc = _stream(
            q, best, total, acc, k_ptr, v_ptr, table_ptr, slope, position, begin, end, last, length,
            token_stride, scale, window, D, BD, PAGE, BK, SLOPES, WINDOW, True, PRECISION,
        )  # fmt: skip
        at = (token + t).to(tl.int64) * tl.num_programs(1) * G + n  # [T, N]
        if SPLIT:
            at += tl.program_id(2).to(tl.int64) * tokens * tl.num_programs(1) * G
            parts = tl.num_programs(2).to(tl.int64) * tokens * tl.num_programs(1) * G
            tl.store(sums_ptr + at, best, mask=real)
            tl.store(sums_ptr + parts + at, total, mask=real)
        else:
            acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        out = out_ptr + at[:, None] * D + d[None, :]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=real[:, None] & (d < D)[None, :])

    @triton.jit
    def _stream(
        q, best, total, acc, k_ptr, v_ptr, table_ptr, slope, position, begin, end, last, length,
        token_stride, scale, window,
        D: tl.constexpr, BD: tl.constexpr, PAGE: tl.constexpr, BK: tl.constexpr, SLOPES: tl.constexpr,
        WINDOW: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """Add key blocks begin .. end to the running softmax (best score, sum, weighted values)."""
        d = tl.arange(0, BD)
        for block in range(begin, end):
            j = block * BK + tl.arange(0, BK)
            there = j < last
            page = tl.load(table_ptr + j // PAGE, mask=there, other=0)
            at = (page.to(tl.int64) * PAGE + j % PAGE) * token_stride  # 64 bits: a pool may pass 2^31 numbers
            k_at = k_ptr + at[None, :] + d[:, None]
            v_at = v_ptr + at[:, None] + d[None, :]
            k = tl.load(k_at, mask=there[None, :] & (d < D)[:, None], other=0.0)
            scores = tl.dot(q, k, input_precision=PRECISION) * scale
            if SLOPES == 1:
                scores += slope[:, None] * 1.4426950408889634 * (j - length + 1).to(tl.float32)[None, :]
            if SLOPES == 2:  # rounded as transformers' Falcon rounds
                rounded = slope[:, None] * j.to(tl.float32).to(tl.bfloat16).to(tl.float32)[None, :]
                scores += rounded.to(tl.bfloat16).to(tl.float32) * scale
            if MASKED:
                seen = j[None, :] <= position[:, None]
                if WINDOW:
                    seen = seen & (j[None, :] > position[:, None] - window)
                scores = tl.where(seen, scores, float("-inf"))
            better = tl.maximum(best, tl.max(scores, 1))
            weights = tl.exp2(scores - better[:, None])
            decay = tl.exp2(best - better)
            total = total * decay + tl.sum(weights, 1)
            acc = acc * decay[:, None]
            best = better
            v = tl.load(v_at, mask=there[:, None] & (d < D)[None, :], other=0.0)
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        return best, total, acc

    @triton.jit(do_not_specialize=["splits"])
    def _merge(parts_ptr, sums_ptr, out_ptr, splits, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr):
        """One token and head: add its splits, scaled to the common best score, in a fixed order."""
        at = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        size = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)  # T * N
        s = tl.arange(0, BS)
        d = tl.arange(0, BD)
        best = tl.load(sums_ptr + s * size + at, mask=s < splits, other=-1e30)
        total = tl.load(sums_ptr + (splits + s) * size + at, mask=s < splits, other=0.0)
        weight = tl.exp2(best - tl.max(best, 0))
        mask = (s < splits)[:, None] & (d < D)[None, :]
        acc = tl.load(parts_ptr + (s[:, None] * size + at) * D + d[None, :], mask=mask, other=0.0)
        out = tl.sum(acc * weight[:, None], 0) / tl.sum(total * weight, 0)
        tl.store(out_ptr + at * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)
