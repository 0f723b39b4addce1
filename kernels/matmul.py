"""Products with small weights: a block's matrices in 8 or 4 bits (or, on a CPU, 16), activations as they are.

Letters: M rows of activations, N outputs, K inputs of a matrix (weight [N, K], as in nn.Linear), E experts.
Decode multiplies few rows by every weight once, so its time is the weights' bytes: a Llama-3-8B block has 218
M weights, 436 MB in bfloat16, 130 us of an H100's 3.35 TB/s; int8 218 MB, 65 us; int4 with 32 bits a group of
64 123 MB, 37 us. The plain version, `x @ dequantize(weight).T`, moves 8 times the int4 bytes; the kernel
turns codes into numbers in registers, on their way to the tensor cores. From about 100 rows on the product is
bound by arithmetic, and dequantizing once for cuBLAS is faster.

The formats, and a CPU's ways, are in weights.py.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F

from . import tl, triton
from .weights import BYTES, CLIPS, GROUP, KINDS, Weight, codes_of, has_onednn, pack, quantize, unpack
from .weights import product as packed_product

if triton is not None:
    from .attention import _owner

__all__ = ["BYTES", "CLIPS", "KINDS", "Weight", "pack", "quantize"]  # of weights.py, for our users

FEW_ROWS = 8  # up to so many oneDNN's product of a matrix as it lies was measured
FEW_WEIGHTS = 2**19  # of such a matrix: smaller ones stay in the caches, and oneDNN's call costs 27 us more
KERNEL_ROWS = 64  # from more on CUDA dequantizes; by arithmetic int8 crosses at 148, int4 at 78 (H100)


def dequantize(w: Weight, dtype=torch.float32):
    """The matrix [N, K] (or stack) that the codes stand for."""
    if len(w.shape) == 3:
        return torch.stack([dequantize(w.expert(e), dtype) for e in range(w.shape[0])])
    K = w.shape[1]
    if w.packed is not None:
        return unpack(w).to(dtype)
    if w.kind == "float16":
        return w.data.to(dtype)
    if w.kind == "int8":
        out = torch.empty(w.data.shape, dtype=dtype, device=w.data.device)
        return torch.mul(w.data, w.scale[:, None], out=out)[:, :K]  # rounded once, in one pass
    if w.data.is_cuda and triton is not None:
        return launch_dequantize(w, dtype)[:, :K]
    scale, middle = w.scale.float().transpose(0, 1).unsqueeze(-2).unbind(-1)  # [N, groups, 1] each
    return (codes_of(w).sub(8.0) * scale + middle).flatten(1).to(dtype)[:, :K]


def linear(x, weight, bias=None):
    """F.linear for a weight of either sort: a tensor or a quantized Weight."""
    if isinstance(weight, torch.Tensor):
        return F.linear(x, weight, bias)
    out = quantized(x, weight)
    return out if bias is None else out + bias


def few(x, weight, bias=None):
    """F.linear; for a few rows and a large matrix of float32 on a CPU, where no gradient is asked for, by
    oneDNN's operator: .72 of the time for 1 row, .5 for 4 and 8 (32,000 x 1,024, one thread of an AVX-512
    CPU; no packed copy)."""
    rows = x.numel() // max(1, x.shape[-1])
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and 0 < rows <= FEW_ROWS
    plain = plain and weight.numel() >= FEW_WEIGHTS
    asked = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if not plain or asked or not has_onednn():
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


def quantized(x, w: Weight):
    """x [..., K] times the quantized matrix [N, K], transposed: [..., N] in x's dtype. Differentiable in
    x."""
    if len(w.shape) != 2 or x.shape[-1] != w.shape[1]:
        raise ValueError(
            f"x {list(x.shape)} does not fit a weight {list(w.shape)}: want one matrix, and K inputs"
        )
    if w.data is not None and w.data.device != x.device:
        raise ValueError(f"x is on {x.device}, the weight on {w.data.device}")
    if torch.is_grad_enabled() and x.requires_grad:
        return _Quantized.apply(x, w)
    return _product(x.reshape(-1, x.shape[-1]), w).view(*x.shape[:-1], w.shape[0])


def routed(x, weight, starts):
    """Rows x [R, K], sorted by expert, each times its expert's matrix: [R, N]. `weight` is a tensor [E, N, K]
    or a stack of quantized matrices; expert e has rows starts[e] .. starts[e + 1] (int32 [E + 1], on x's
    device: with Triton the host need not know them). Differentiable in x."""
    E, N, K = weight.shape
    if x.shape[1:] != (K,) or starts.shape != (E + 1,) or starts.dtype != torch.int32:
        raise ValueError(
            f"x {list(x.shape)}, starts {list(starts.shape)} {starts.dtype} do not fit experts "
            f"{list(weight.shape)}: want x [R, K], starts int32 [E + 1]"
        )
    few = x.shape[0] <= KERNEL_ROWS * E
    if x.is_cuda and triton is not None and few and not (torch.is_grad_enabled() and x.requires_grad):
        return launch_product(x, weight, starts)
    ends = starts.tolist()
    parts = [
        linear(x[a:b], weight[e] if isinstance(weight, torch.Tensor) else weight.expert(e))
        for e, (a, b) in enumerate(pairwise(ends))
        if b > a
    ]
    return torch.cat(parts) if parts else x.new_zeros(0, N)


class _Quantized(torch.autograd.Function):
    """The gradient of the inputs, through the dequantized weight; the weight itself is not trained."""

    @staticmethod
    def forward(ctx, x, w: Weight):
        """x [..., K] -> [..., N]."""
        ctx.w = w
        return _product(x.detach().reshape(-1, x.shape[-1]), w).view(*x.shape[:-1], w.shape[0])

    @staticmethod
    def backward(ctx, grad):
        """grad [..., N] -> [..., K]."""
        return grad @ dequantize(ctx.w, grad.dtype), None


def _product(x, w: Weight):
    """x [M, K] -> [M, N] by the fastest way that device, kind and M allow."""
    if w.packed is not None:
        return packed_product(x, w)
    if x.is_cuda and triton is not None and w.kind != "float16" and x.shape[0] <= KERNEL_ROWS:
        return launch_product(x, w)
    return F.linear(x, dequantize(w, x.dtype))


# ------------------------------------------------------------------------------------------ CUDA: the kernels


def product_tiles(M: int, kind: str, itemsize: int) -> dict:
    """Tile sizes by a plain rule: BN outputs, BM rows, BK inputs a step; many small tiles in flight, since
    what is waited for is memory."""
    BM = min(64, max(16, triton.next_power_of_2(M)))
    BK = {"int8": 128, "int4": GROUP}.get(kind, 64)
    BN = 128 if kind == "int4" and BM <= 32 else 64
    stages = {"int4": 5}.get(kind, 4)
    if itemsize == 4:
        BN, BK, stages = 32, min(BK, 64), 2
    warps = 8 if BM == 64 and (itemsize == 4 or kind == "none") else 4
    return {"BM": BM, "BN": BN, "BK": BK, "num_warps": warps, "num_stages": stages}


def launch_product(x, weight, starts=None):
    """Run `_multiply` (and `_add_up`, if the inputs are split); CPU tensors only in the interpreter."""
    kind = "none" if isinstance(weight, torch.Tensor) else weight.kind
    data, scale = (weight, weight) if kind == "none" else (weight.data, weight.scale)
    N = weight.shape[-2]
    if kind != "none" and x.shape[1] % GROUP:
        x = F.pad(x, (0, -x.shape[1] % GROUP))
    x, (M, K) = x.contiguous(), x.shape
    if not M:
        return x.new_empty(0, N)
    E = 1 if starts is None else weight.shape[0]
    tile = product_tiles(M if starts is None else min(M, 2 * -(-M // E)), kind, x.element_size())
    rows = triton.cdiv(M, tile["BM"]) if starts is None else M // tile["BM"] + E
    columns, steps = triton.cdiv(N, tile["BN"]), triton.cdiv(K, tile["BK"])
    cores = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    splits = max(1, min(3 * cores // (columns * rows), steps // 4, 16))
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    parts = out if splits == 1 else torch.empty(splits, M, N, dtype=torch.float32, device=x.device)
    _multiply[(columns, splits, rows)](
        x, data, scale.view(torch.int32) if kind == "int4" else scale, parts, x if starts is None else starts,
        E, M, N, K, KIND=kind, ROUTED=starts is not None, SPLIT=splits > 1,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", enable_fp_fusion=True, **tile,
    )  # fmt: skip
    if splits > 1:
        _add_up[(triton.cdiv(M * N, 1024),)](
            parts, out, M * N, splits, B=1024, num_warps=4, enable_fp_fusion=True
        )
    return out


def launch_dequantize(w: Weight, dtype):
    """Run `_dequantize` for int4: [N, padded K]."""
    N, groups = w.shape[0], w.data.shape[1] * 2 // GROUP
    out = torch.empty(N, groups * GROUP, dtype=dtype, device=w.data.device)
    _dequantize[(triton.cdiv(N, 128), groups)](w.data, w.scale.view(torch.int32), out, N, BN=128, num_warps=4)
    return out


if triton is not None:

    @triton.jit
    def _four_bits(bytes, pair, dtype: tl.constexpr):
        """Codes [BN, 32] and (scale, middle) [BN], two bfloat16 in an int32 -> the low and the high weights,
        [BN, 32]."""
        scale = (pair << 16).to(tl.float32, bitcast=True)[:, None]
        middle = (pair & -65536).to(tl.float32, bitcast=True)[:, None]
        zero = middle - 8 * scale
        low = (bytes & 15).to(tl.float32) * scale + zero
        high = (bytes >> 4).to(tl.float32) * scale + zero
        return low.to(dtype), high.to(dtype)

    @triton.jit(do_not_specialize=["experts", "M"])  # else each new number of rows might compile
    def _multiply(
        x_ptr, w_ptr, scale_ptr, out_ptr, starts_ptr, experts, M, N, K,
        KIND: tl.constexpr, ROUTED: tl.constexpr, SPLIT: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """BN outputs of BM rows, over one share of the inputs. The product is taken transposed, [BN, K] x
        [K, BM]: the weight is then the operand that tensor cores read from registers, where its numbers are
        made."""
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        first = tl.program_id(2) * BM
        stop = M
        if ROUTED:
            expert = _owner(starts_ptr, experts, tl.program_id(2), BM)
            begin = tl.load(starts_ptr + expert)
            first = begin + (tl.program_id(2) - begin // BM - expert) * BM
            stop = tl.load(starts_ptr + expert + 1)
            if first >= stop:
                return
            row = expert.to(tl.int64) * N
            w_ptr += row * (K // 2 if KIND == "int4" else K)
            scale_ptr += row * (K // 64 if KIND == "int4" else 1)
        m = first + tl.arange(0, BM)
        acc = tl.zeros([BN, BM], tl.float32)
        steps = tl.cdiv(K, BK)
        share = tl.cdiv(steps, tl.num_programs(1))
        start = tl.program_id(1) * share
        x_at = x_ptr + m.to(tl.int64)[None, :] * K
        for step in range(start, tl.minimum(start + share, steps)):
            if KIND == "int4":
                r = tl.arange(0, 32)
                bytes = tl.load(
                    w_ptr + n.to(tl.int64)[:, None] * (K // 2) + step * 32 + r[None, :],
                    mask=(n < N)[:, None],
                    other=0,
                )
                pair = tl.load(scale_ptr + step * N + n, mask=n < N, other=0)
                low, high = _four_bits(bytes, pair, x_ptr.dtype.element_ty)
                there = (m < stop)[None, :]
                x = tl.load(x_at + step * 64 + r[:, None], mask=there, other=0.0)
                acc = tl.dot(low, x, acc, input_precision=PRECISION)
                x = tl.load(x_at + step * 64 + 32 + r[:, None], mask=there, other=0.0)
                acc = tl.dot(high, x, acc, input_precision=PRECISION)
            else:
                k = step * BK + tl.arange(0, BK)
                x = tl.load(x_at + k[:, None], mask=(k < K)[:, None] & (m < stop)[None, :], other=0.0)
                w = tl.load(
                    w_ptr + n.to(tl.int64)[:, None] * K + k[None, :],
                    mask=(n < N)[:, None] & (k < K)[None, :],
                    other=0,
                )
                acc = tl.dot(w.to(x.dtype), x, acc, input_precision=PRECISION)
        if KIND == "int8":
            acc *= tl.load(scale_ptr + n, mask=n < N, other=0.0)[:, None]
        if SPLIT:
            out_ptr += tl.program_id(1).to(tl.int64) * M * N
        out = out_ptr + m.to(tl.int64)[None, :] * N + n[:, None]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & (m < stop)[None, :])

    @triton.jit(do_not_specialize=["size", "splits"])
    def _add_up(parts_ptr, out_ptr, size, splits, B: tl.constexpr):
        """Add the splits of B numbers, first to last: the same input gives the same bits."""
        i = tl.program_id(0) * B + tl.arange(0, B)
        total = tl.zeros([B], tl.float32)
        for _ in range(splits):
            total += tl.load(parts_ptr + i, mask=i < size, other=0.0)
            parts_ptr += size
        tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=i < size)

    @triton.jit
    def _dequantize(w_ptr, scale_ptr, out_ptr, N, BN: tl.constexpr):
        """One group of BN outputs."""
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        group, groups = tl.program_id(1), tl.num_programs(1)
        r = tl.arange(0, 32)
        there = (n < N)[:, None]
        at = (n.to(tl.int64)[:, None] * groups + group) * 32 + r[None, :]
        bytes = tl.load(w_ptr + at, mask=there, other=0)
        pair = tl.load(scale_ptr + group * N + n, mask=n < N, other=0)
        low, high = _four_bits(bytes, pair, out_ptr.dtype.element_ty)
        out = out_ptr + (n.to(tl.int64)[:, None] * groups + group) * 64 + r[None, :]
        tl.store(out, low, mask=there)
        tl.store(out + 32, high, mask=there)
