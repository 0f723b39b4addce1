"""Products with small weights: a block's matrices in 8 or 4 bits (or, on a CPU, 16), activations as they are.

Letters: M rows of activations, N outputs, K inputs of a matrix (weight [N, K], as in nn.Linear), E experts.
Decode multiplies few rows by every weight once, so its time is the weights' bytes: a Llama-3-8B block has 218
M weights, 436 MB in bfloat16, 130 us of an H100's 3.35 TB/s; int8 218 MB, 65 us; int4 with 32 bits a group of
64 123 MB, 37 us. The plain version, `x @ dequantize(weight).T`, moves 8 times the int4 bytes; the kernel
turns codes into numbers in registers, on their way to the tensor cores. From about 100 rows on the product is
bound by arithmetic, and dequantizing once for cuBLAS is faster.

int8: one float32 scale a row of the weight (an output); w = code * scale. Error .009 of Gaussian weights.
int4: groups of 64 inputs, each with two bfloat16, scale and middle; w = (code - 8) * scale + middle, code
0..15, which is what PyTorch's CPU operator computes. Error .084; NF4's, with its table, is .092. In a group's
32 bytes, byte r holds weight r in its low and weight r + 32 in its high bits: one load feeds two products.
float16: CPU only, fbgemm's packed half precision with float32 activations. Error .0002.
Inputs are padded with zeros to a multiple of 64.
blocked: CPU only, float32 or bfloat16 as they are, in the order in which oneDNN reads them. A pass of 115 M
float32 weights on one core of an AMD EPYC takes 17 ms for up to 6 rows, 26 for 8, 224 for 128; PyTorch's own
product 22, 42 and 57 for 1, 2 and 3 rows, 55 for 8, 282 for 128 (and the same columns first: 18, 30, 42, 60,
282). In bfloat16 a row takes half of what it does there.
"""

import warnings
from dataclasses import dataclass, replace
from itertools import pairwise, product

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl

    from .attention import _owner
except ImportError:  # triton is Linux only: everything here but the launchers works without it
    triton = None

KINDS = ("float16", "int8", "int4")
BYTES = {"float16": 2, "int8": 1.01, "int4": 0.5625}  # a weight, scales included
GROUP = 64  # inputs that share a scale in int4, and what inputs are padded to
KERNEL_ROWS = 64  # from more on CUDA dequantizes; by arithmetic int8 crosses at 148, int4 at 78 (H100)
BLOCKED_WEIGHTS = 2**19  # of a matrix: smaller ones stay in the caches, and oneDNN's call costs 12 us more
BLOCKED_ROWS = 4  # of a product: fewer take it longer, so they are filled up with zeros
CLIPS = 1.0, 0.92, 0.84  # how far int4's codes reach of a group's lowest and highest weight


@dataclass(frozen=True)
class Weight:
    """A quantized matrix, or a stack of E of them. `data` and `scale` are the portable form; `pack` replaces
    them by the form of the CPU's operators."""

    kind: str  # one of KINDS, or "blocked"
    shape: tuple[int, ...]  # ([E,] N, K) of the original
    # float16: float16 [N, K]; int8: int8 [N, padded K]; int4: uint8 [N, padded K / 2]
    data: torch.Tensor | None
    scale: torch.Tensor | None  # int8: float32 [N]; int4: bfloat16 [padded K / 64, N, 2], (scale, middle)
    packed: object = None  # fbgemm's object, PyTorch's int4 or oneDNN tensor, or a tuple of E packed Weights

    @property
    def nbytes(self) -> int:
        """Bytes that the weight holds, packed or not."""
        if self.kind == "blocked":
            return sum(w.nbytes for w in self.packed) if len(self.shape) == 3 else self.packed.nbytes
        size = self.shape[-1] * self.shape[-2] * (self.shape[0] if len(self.shape) == 3 else 1)
        if self.kind == "int4":
            return size // 2 + size // GROUP * 4
        return size * 2 if self.kind == "float16" else size + size // self.shape[-1] * 4

    def to(self, device) -> "Weight":
        """The portable form on another device."""
        data, scale = (None if t is None else t.to(device) for t in (self.data, self.scale))
        return replace(self, data=data, scale=scale)

    def expert(self, e: int) -> "Weight":
        """Matrix e of a stack."""
        if self.packed is not None:
            return self.packed[e]
        scale = None if self.scale is None else self.scale[e]
        return Weight(self.kind, self.shape[1:], self.data[e], scale)


# ------------------------------------------------------------------------------ the formats, in plain PyTorch


def quantize(weight, kind: str) -> Weight:
    """Round a matrix [N, K], or a stack [E, N, K], to `kind`."""
    if kind not in KINDS or weight.dim() not in (2, 3):
        raise ValueError(
            f"cannot quantize {list(weight.shape)} to {kind!r}: want [N, K] or [E, N, K], one of {KINDS}"
        )
    shape = tuple(weight.shape)
    if weight.dim() == 3:
        each = [quantize(w, kind) for w in weight]
        scale = None if each[0].scale is None else torch.stack([w.scale for w in each])
        return Weight(kind, shape, torch.stack([w.data for w in each]), scale)
    if kind == "float16":
        return Weight(kind, shape, weight.clamp(-65504, 65504).to(torch.float16), None)
    wide = F.pad(weight.float(), (0, -weight.shape[1] % GROUP))
    if kind == "int8":
        scale = wide.abs().amax(1).div_(127).clamp_min_(1e-30)
        return Weight(kind, shape, wide.div_(scale[:, None]).round_().to(torch.int8), scale)
    groups = wide.view(shape[0], -1, GROUP).split(2**17 // wide.shape[1] + 1)  # so much stays in L2
    codes, scale, middle = (torch.cat(parts) for parts in zip(*map(_nearest, groups), strict=True))
    data = (codes[..., :32] | codes[..., 32:] << 4).reshape(shape[0], -1)
    return Weight(kind, shape, data, torch.stack((scale.T, middle.T), -1).contiguous())


def _nearest(groups):
    """int4 codes of weights [n, groups, 64], scale and middle [n, groups], from the ranges of least squared
    error: where a group's outermost weights are cut off, the others are rounded more finely."""
    low, high = groups.amin(2), groups.amax(2)
    ranges = [(low * below, high * above) for below, above in product(CLIPS, CLIPS)]
    errors = [_rounded(groups, *ends)[0].sub_(groups).square_().sum(2) for ends in ranges]
    best = torch.stack(errors).argmin(0, keepdim=True)
    return _rounded(groups, *(torch.stack(ends).gather(0, best)[0] for ends in zip(*ranges, strict=True)))[1:]


def _rounded(groups, low, high):
    """What codes stand for that reach from low to high [n, groups], the codes, scale and middle."""
    scale = ((high - low) / 15).clamp_min_(1e-30).bfloat16()
    middle = (low + 8 * scale.float()).bfloat16()
    wide, centre = scale.float()[..., None], middle.float()[..., None]
    codes = (groups - centre).div_(wide).round_().clamp_(-8, 7)
    return codes * wide + centre, (codes + 8).to(torch.uint8), scale, middle


def dequantize(w: Weight, dtype=torch.float32):
    """The matrix [N, K] (or stack) that the codes stand for."""
    if len(w.shape) == 3:
        return torch.stack([dequantize(w.expert(e), dtype) for e in range(w.shape[0])])
    K = w.shape[1]
    if w.packed is not None:
        return _unpack(w).to(dtype)
    if w.kind == "float16":
        return w.data.to(dtype)
    if w.kind == "int8":
        return (w.data * w.scale[:, None]).to(dtype)[:, :K]
    if w.data.is_cuda and triton is not None:
        return launch_dequantize(w, dtype)[:, :K]
    scale, middle = w.scale.float().transpose(0, 1).unsqueeze(-2).unbind(-1)  # [N, groups, 1] each
    return (_codes(w).sub(8.0) * scale + middle).flatten(1).to(dtype)[:, :K]


def _codes(w: Weight):
    """int4 codes as uint8 [N, groups, 64], in the order of the inputs."""
    data = w.data.view(w.shape[0], -1, GROUP // 2)
    return torch.cat((data & 15, data >> 4), -1)


# --------------------------------------------------------------------------------------- the public functions


def linear(x, weight, bias=None):
    """F.linear for a weight of either sort: a tensor or a quantized Weight."""
    if isinstance(weight, torch.Tensor):
        return F.linear(x, weight, bias)
    out = quantized(x, weight)
    return out if bias is None else out + bias


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
    if x.shape[1:] != (K,) or starts.shape != (E + 1,):
        raise ValueError(
            f"x {list(x.shape)}, starts {list(starts.shape)} do not fit experts {list(weight.shape)}"
        )
    if x.is_cuda and triton is not None and not (torch.is_grad_enabled() and x.requires_grad):
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
        return _packed_product(x, w)
    if x.is_cuda and triton is not None and w.kind != "float16" and x.shape[0] <= KERNEL_ROWS:
        return launch_product(x, w)
    if w.kind == "int8":  # codes are exact in 16 bits: scale what comes out
        return (F.linear(x, w.data[:, : w.shape[1]].to(x.dtype)).float() * w.scale).to(x.dtype)
    return F.linear(x, dequantize(w, x.dtype))


# ---------------------------------------------------------------------------- CPU: PyTorch's packed operators


def pack(w: Weight | torch.Tensor) -> Weight | torch.Tensor:
    """The weight, quantized or plain, in the form of this CPU's fastest operator; unchanged where PyTorch has
    none for it here."""
    if isinstance(w, torch.Tensor):
        return _blocked(w)
    if len(w.shape) == 3:
        each = tuple(pack(w.expert(e)) for e in range(w.shape[0]))
        return replace(w, data=None, scale=None, packed=each) if each[0].packed is not None else w
    ops, fbgemm = torch.ops.quantized, torch.backends.quantized.engine in ("x86", "fbgemm")
    if w.kind == "int4" and w.shape[0] % 16 == 0:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(_codes(w).flatten(1).int(), 2)
        return replace(w, data=None, packed=packed)
    if w.kind == "float16" and fbgemm:
        return replace(w, data=None, packed=ops.linear_prepack_fp16(w.data.float(), None))
    if w.kind == "int8" and fbgemm and hasattr(torch, "_make_per_channel_quantized_tensor"):
        zero = torch.zeros(w.shape[0], dtype=torch.int64)
        with warnings.catch_warnings():  # PyTorch means to drop this tensor type; then what is below serves
            warnings.simplefilter("ignore")
            codes = torch._make_per_channel_quantized_tensor(w.data, w.scale.double(), zero, 0)
        return replace(w, data=None, scale=None, packed=ops.linear_prepack(codes, None))
    # for _weight_int8pack_mm, in bfloat16
    return replace(w, data=None, packed=w.data) if w.kind == "int8" else w


def _blocked(w):
    """A plain matrix, or a stack, as oneDNN wants it, if there is something to be gained."""
    exact = w.dtype == torch.float32 or (
        w.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    known = "AVX" in torch.backends.cpu.get_cpu_capability() and torch.backends.mkldnn.is_available()
    if not (exact and known) or w.shape[-1] * w.shape[-2] < BLOCKED_WEIGHTS:
        return w
    if w.dim() == 3:
        return Weight("blocked", tuple(w.shape), None, None, tuple(map(_blocked, w)))
    return Weight("blocked", tuple(w.shape), None, None, torch.ops.mkldnn._reorder_linear_weight(w))


def _unpack(w: Weight):
    """[N, K] of a packed weight: float32, or what a blocked one holds."""
    K = w.shape[1]
    if w.kind == "blocked":
        return w.packed.to_dense()
    if w.kind == "float16":
        return torch.ops.quantized.linear_unpack_fp16(w.packed)[0]
    if isinstance(w.packed, torch.Tensor) and w.kind == "int8":
        return (w.packed * w.scale[:, None])[:, :K]
    if w.kind == "int8":
        return torch.ops.quantized.linear_unpack(w.packed)[0].dequantize()[:, :K]
    # the packing has no inverse: multiply by one
    one = torch.eye(w.scale.shape[0] * GROUP, dtype=torch.bfloat16)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(one, w.packed, GROUP, w.scale).T[:, :K].float()


def _packed_product(x, w: Weight):
    """x [M, K] times a packed weight.

    int8: fbgemm's product takes 8-bit activations, which alone would cost 2 % to 30 % of error (one large
    activation in a row spoils the others). So each row is scaled to -63..63 (7 bits: without VNNI
    instructions 8 would overflow) and given as two rows, its rounding and what the rounding left, 126 times
    enlarged: 14 bits of activation for little more time, since at few rows it is the weight that is read.
    """
    if w.kind == "blocked":
        filled = F.pad(x, (0, 0, 0, max(0, BLOCKED_ROWS - len(x))))
        return torch.ops.mkldnn._linear_pointwise(filled, w.packed, None, "none", [], "")[: len(x)]
    if w.kind == "int4":
        x16 = F.pad(x, (0, -x.shape[1] % GROUP)).bfloat16()
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x16, w.packed, GROUP, w.scale).to(x.dtype)
    if w.kind == "float16":
        return torch.ops.quantized.linear_dynamic_fp16(x.float(), w.packed).to(x.dtype)
    M, dtype = x.shape[0], x.dtype
    x = x.float() if x.shape[1] % GROUP == 0 else F.pad(x.float(), (0, -x.shape[1] % GROUP))
    if isinstance(w.packed, torch.Tensor):
        return torch._weight_int8pack_mm(x.bfloat16(), w.packed, w.scale.bfloat16()).to(dtype)
    unit = x.abs().amax(-1, keepdim=True).div_(63).clamp_min_(1e-30)
    x = x / unit
    whole = x.round()
    both = torch.cat((whole, x.sub_(whole).mul_(126)))
    out = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(both, 1.0, 64, w.packed)
    whole, rest = out.split(M)
    return whole.add_(rest, alpha=1 / 126).mul_(unit).to(dtype)


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
    x = F.pad(x, (0, 0 if kind == "none" else -x.shape[1] % GROUP)).contiguous()
    M, K = x.shape
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
