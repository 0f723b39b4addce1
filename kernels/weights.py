"""Small weights: their formats, and the forms in which a CPU multiplies by them.

int8: one float32 scale a row of the weight (an output); w = code * scale. Error .009 of Gaussian weights.
int4: groups of 64 inputs, each with two bfloat16, scale and middle; w = (code - 8) * scale + middle, code
0..15, which is what PyTorch's CPU operator computes. Error .084; NF4's, with its table, is .092. In a group's
32 bytes, byte r holds weight r in its low and weight r + 32 in its high bits: one load feeds two products.
float16: CPU only, fbgemm's packed half precision with float32 activations. Error .0002.
Inputs are padded with zeros to a multiple of 64.
blocked: CPU only, float32 or bfloat16 as they are, in the order in which oneDNN reads them. A pass of 115 M
float32 weights on one core of an AMD EPYC takes 17 ms for up to 6 rows, 26 for 8, 224 for 128; PyTorch's own
product 22, 42 and 57 for 1, 2 and 3 rows, 55 for 8, 282 for 128. In bfloat16 a row takes half of what it does
there.

Letters as in matmul.py.
"""

import warnings
from dataclasses import dataclass, replace
from itertools import product as combinations

import torch
import torch.nn.functional as F

KINDS = ("float16", "int8", "int4")
BYTES = {"float16": 2, "int8": 1.01, "int4": 0.5625}  # a weight, scales included
GROUP = 64  # inputs that share a scale in int4, and what inputs are padded to
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
    N, K, groups = *shape, -(-shape[1] // GROUP)
    types = {"float16": (K, torch.float16), "int8": (groups * GROUP, torch.int8)}
    width, dtype = types.get(kind, (groups * GROUP // 2, torch.uint8))
    data, scale = torch.empty(N, width, dtype=dtype, device=weight.device), None
    if kind == "int8":
        scale = torch.empty(N, device=weight.device)
    if kind == "int4":
        scale = torch.empty(groups, N, 2, dtype=torch.bfloat16, device=weight.device)
    # rows at a time: they take little memory beside the weight, and stay in a CPU's L2
    step = (2**17 if weight.device.type == "cpu" else 2**22) // K + 1
    for rows in (slice(at, at + step) for at in range(0, N, step)):
        if kind == "float16":
            data[rows] = weight[rows].clamp(-65504, 65504)
            continue
        wide = F.pad(weight[rows].float(), (0, groups * GROUP - K))
        if kind == "int8":
            scale[rows] = wide.abs().amax(1).div_(127).clamp_min_(1e-30)
            data[rows] = wide.div_(scale[rows, None]).round_()
        else:
            codes, *ranges = _nearest(wide.view(-1, groups, GROUP))
            data[rows] = (codes[..., :32] | codes[..., 32:] << 4).flatten(1)
            scale[:, rows] = torch.stack(ranges, -1).transpose(0, 1)
    return Weight(kind, shape, data, scale)


def _nearest(groups):
    """int4 codes of weights [n, groups, 64], scale and middle [n, groups], from the ranges of least squared
    error: where a group's outermost weights are cut off, the others are rounded more finely."""
    low, high = groups.amin(2), groups.amax(2)
    ranges = [(low * below, high * above) for below, above in combinations(CLIPS, CLIPS)]
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


def codes_of(w: Weight):
    """int4 codes as uint8 [N, groups, 64], in the order of the inputs."""
    data = w.data.view(w.shape[0], -1, GROUP // 2)
    return torch.cat((data & 15, data >> 4), -1)


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
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_of(w).flatten(1).int(), 2)
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


def has_onednn():
    """Whether its products are the faster ones here."""
    return "AVX" in torch.backends.cpu.get_cpu_capability() and torch.backends.mkldnn.is_available()


def _blocked(w):
    """A plain matrix, or a stack, as oneDNN wants it, if there is something to be gained."""
    exact = w.dtype == torch.float32 or (
        w.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    if not (exact and has_onednn()) or w.shape[-1] * w.shape[-2] < BLOCKED_WEIGHTS:
        return w
    if w.dim() == 3:
        return Weight("blocked", tuple(w.shape), None, None, tuple(map(_blocked, w)))
    return Weight("blocked", tuple(w.shape), None, None, torch.ops.mkldnn._reorder_linear_weight(w))


def unpack(w: Weight):
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


def product(x, w: Weight):
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
