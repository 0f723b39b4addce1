"""Rotary positions, and the way of a fused projection into the cache: qkv -> rotated q; k and v in pages.

Letters as in attention.py. The plain version rotates (3 launches that read 4 times as many numbers as q and k
have and write 3 times as many), then copies k and v into the pages: 5 launches that move (7N + 11K) * D
numbers a token. The kernel reads qkv once and writes each number once, (2N + 4K) * D numbers in one launch.
For Llama-3-8B that is 25 KB a token: at decode it is the launches that are saved, about 3 us each.
"""

import torch

from . import tl, triton
from .pages import Plan, append, in_order


def rope_append(qkv, cos, sin, k_pages, v_pages, plan: Plan):
    """Rotate the queries and keys of qkv [T, N + 2K, D] by cos and sin as `rotate` does (None: no rotation),
    write keys and values into their pages, in place, and return the queries [T, N, D]. qkv is not needed
    afterwards and may be overwritten."""
    (T, heads, size), (_, _, K, D) = qkv.shape, k_pages.shape
    N, alike = heads - 2 * K, k_pages.shape == v_pages.shape and qkv.dtype == k_pages.dtype
    near = qkv.device == plan.slots.device == k_pages.device
    if N < 1 or plan.tokens != T or size != D or not (alike and near):
        raise ValueError(
            f"qkv {list(qkv.shape)} {qkv.dtype} on {qkv.device} does not fit keys {list(k_pages.shape)} "
            f"{k_pages.dtype} on {k_pages.device}, values {list(v_pages.shape)} and a plan of {plan.tokens} "
            f"tokens on {plan.slots.device}"
        )
    if cos is not None:
        rows, each, R = cos.shape
        fits = cos.shape == sin.shape and rows == T and each == 1 and R <= D
        if not (fits and cos.dtype == sin.dtype == qkv.dtype):
            came = f"cos {list(cos.shape)} {cos.dtype}, sin {list(sin.shape)} {sin.dtype}"
            raise ValueError(f"{came}: want two of [{T}, 1, {D} or less] {qkv.dtype}")
    if qkv.is_cuda and triton is not None:
        return launch_rope_append(qkv, cos, sin, k_pages, v_pages, plan)
    qk, v = qkv.split_with_sizes((N + K, K), 1)
    q, k = (qk if cos is None else rotate(qk, cos, sin)).split_with_sizes((N, K), 1)
    append(k, v, k_pages, v_pages, plan)
    return q


def rotate(x, cos, sin):
    """Rotary positions, differentiable: the first R numbers of each head of x [T, H, D] turned by cos and sin
    [T, 1, R] of x's dtype, R <= D even: (a, b) -> (a * cos - b * sin, b * cos + a * sin), where a is the
    first and b the second half of the R numbers. The first half of `sin` comes with its sign turned
    (`positions.Rotary`)."""
    R, D = cos.shape[-1], x.shape[-1]
    turned = x if R == D else x[..., :R]
    out = torch.addcmul(turned * cos, turned.roll(R // 2, -1), sin)
    return out if R == D else torch.cat((out, x[..., R:]), -1)


def launch_rope_append(qkv, cos, sin, k_pages, v_pages, plan: Plan):
    """Run `_rope_append`: one launch reads qkv once and writes q, k and v once."""
    in_order(k_pages, v_pages)
    T, H, D = qkv.shape
    K = k_pages.shape[2]
    if not qkv.is_contiguous():
        qkv = qkv.contiguous()
    out = torch.empty(T, H - 2 * K, D, dtype=qkv.dtype, device=qkv.device)
    R = 0 if cos is None else cos.shape[-1]
    cos, sin = (qkv, qkv) if cos is None else (cos.contiguous(), sin.contiguous())
    BH = 8
    _rope_append[(T, triton.cdiv(H, BH))](
        qkv, cos, sin, out, k_pages, v_pages, plan.slots,
        N=H - 2 * K, K=K, D=D, R=R, BD=triton.next_power_of_2(D), BH=BH, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out


if triton is not None:

    @triton.jit
    def _rope_append(
        qkv_ptr, cos_ptr, sin_ptr, out_ptr, k_ptr, v_ptr, slots_ptr,
        N: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
        R: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr,
    ):  # fmt: skip
        """BH heads of one token: the first N are queries, the next K keys, the last K values."""
        token = tl.program_id(0).to(tl.int64)
        h = tl.program_id(1) * BH + tl.arange(0, BH)
        d = tl.arange(0, BD)
        there = (h < N + 2 * K)[:, None] & (d < D)[None, :]
        x_at = qkv_ptr + (token * (N + 2 * K) + h[:, None]) * D
        x = tl.load(x_at + d[None, :], mask=there, other=0.0)
        if R > 0:
            partner = tl.where(d < R // 2, d + R // 2, d - R // 2)
            turned = (h < N + K)[:, None] & (d < R)[None, :]
            y = tl.load(x_at + partner[None, :], mask=turned, other=0.0).to(tl.float32)
            cos = tl.load(cos_ptr + token * R + d, mask=d < R, other=1.0).to(tl.float32)
            sin = tl.load(sin_ptr + token * R + d, mask=d < R, other=0.0).to(tl.float32)
            x = tl.where(turned, x.to(tl.float32) * cos[None, :] + y * sin[None, :], x.to(tl.float32))
            x = x.to(out_ptr.dtype.element_ty)
        slot = tl.load(slots_ptr + token) * K * D
        tl.store(out_ptr + (token * N + h[:, None]) * D + d[None, :], x, mask=there & (h < N)[:, None])
        key = slot + (h[:, None] - N) * D + d[None, :]
        tl.store(k_ptr + key, x, mask=there & ((h >= N) & (h < N + K))[:, None])
        tl.store(v_ptr + key - K * D, x, mask=there & (h >= N + K)[:, None])
