"""Small fusions: residual add + RMSNorm or LayerNorm, and silu(gate) * up.

Letters: T tokens, H hidden size, I inner size of the MLP. Bytes of add + norm in 16 bits: the plain version
of PyTorch runs 8 launches that read and write [T, H] about 16 times, part of them in float32; the kernel
reads two tensors and writes two, 8 * T * H bytes in one launch: 32 KB a token at H = 4,096, 10 ns of an
H100's bandwidth. At decode the time is all launch (about 3 us each, twice a block, less in a CUDA graph); at
T = 8,192 it is 268 MB, 80 us. silu_mul reads 2 numbers and writes 1: 6 * T * I bytes instead of 10 * T * I,
and one launch instead of two.

The numerics are transformers' own: statistics in float32; RMSNorm is rounded before it meets its weight
(LlamaRMSNorm), LayerNorm after (nn.LayerNorm); the sum is rounded before its statistics are taken; silu is
rounded before the product.
"""

import functools

import torch
import torch.nn.functional as F

from . import tl, triton


def add_norm(x, residual, weight, bias=None, *, eps: float, kind: str = "rms"):
    """Return (x + residual, its norm), both [T, H] in x's dtype; `residual` None stands for zeros. `kind` is
    "rms" or "layer"; weight and bias (layer only, may be None) are [H]. Differentiable through the plain
    version."""
    if kind not in ("rms", "layer"):
        raise ValueError(f"norm kind {kind!r}: want 'rms' or 'layer'")
    H = x.shape[-1]
    alike = residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    if not alike or weight.shape != (H,) or weight.device != x.device:
        other = None if residual is None else f"{list(residual.shape)} {residual.dtype}"
        raise ValueError(
            f"x {list(x.shape)} {x.dtype} on {x.device}, residual {other} and weight {list(weight.shape)} on "
            f"{weight.device} do not fit: want a residual like x, a weight for its last dimension"
        )
    grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, residual, weight, bias)
    )
    if x.is_cuda and triton is not None and not grad:
        return launch_add_norm(x, residual, weight, bias, eps, kind)
    total = x if residual is None else x + residual
    if kind == "layer":
        return total, F.layer_norm(total, weight.shape, weight, bias, eps)
    exact = total.dtype == torch.float32  # nothing is rounded
    if grad or not total.is_cpu:
        if exact:
            return total, F.rms_norm(total, weight.shape, weight, eps)
        wide = total.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    else:  # the same bits; in float32 by 7 calls of PyTorch's dispatcher, its own operator makes 24
        small, size = _constants(eps, H)
        wide = total if exact else total.float()
        wide = wide * torch.addcdiv(small, (wide * wide).sum(-1, keepdim=True), size).rsqrt_()
    return total, weight * (wide if exact else wide.to(x.dtype))


@functools.cache
def _constants(*numbers: float) -> tuple[torch.Tensor, ...]:
    """[1] each, on the CPU: PyTorch makes a tensor of a number at every call."""
    return tuple(torch.tensor([number], dtype=torch.float32, device="cpu") for number in numbers)


def silu_mul(gate, up):
    """silu(gate) * up; both [T, I] of one dtype, and may be the halves of one [T, 2I] tensor."""
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        raise ValueError(
            f"gate {list(gate.shape)} {gate.dtype} on {gate.device} and up {list(up.shape)} {up.dtype} on "
            f"{up.device} differ"
        )
    grad = torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)
    if gate.is_cuda and triton is not None and not grad:
        return launch_silu_mul(gate, up)
    return F.silu(gate) * up if grad else F.silu(gate).mul_(up)


def launch_add_norm(x, residual, weight, bias, eps: float, kind: str):
    """Run `_add_norm`, one program a token; CPU tensors only in the interpreter."""
    shape, H = x.shape, x.shape[-1]
    x = x.reshape(-1, H).contiguous()
    T = x.shape[0]
    total = x if residual is None else torch.empty_like(x)
    out = torch.empty_like(x)
    BH = triton.next_power_of_2(H)
    _add_norm[(T,)](
        *(x, x if residual is None else residual.reshape(-1, H).contiguous()),
        *(weight, weight if bias is None else bias, total, out, H, eps),
        RESIDUAL=residual is not None, LAYER=kind == "layer", BIAS=bias is not None, BH=BH,
        num_warps=8 if BH >= 4096 else 4, enable_fp_fusion=True,
    )  # fmt: skip
    return total.view(shape), out.view(shape)


def launch_silu_mul(gate, up):
    """Run `_silu_mul`, one program for 1,024 numbers of a token."""
    shape, inner = gate.shape, gate.shape[-1]
    gate, up = (x.reshape(-1, inner) for x in (gate, up))
    gate, up = (x if x.stride(1) == 1 else x.contiguous() for x in (gate, up))
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    grid = (gate.shape[0], triton.cdiv(inner, 1024))
    _silu_mul[grid](
        gate, up, out, gate.stride(0), up.stride(0), inner, BI=1024, num_warps=4, enable_fp_fusion=True
    )
    return out.view(shape)


if triton is not None:

    @triton.jit
    def _add_norm(
        x_ptr, residual_ptr, weight_ptr, bias_ptr, total_ptr, out_ptr, H, eps,
        RESIDUAL: tl.constexpr, LAYER: tl.constexpr, BIAS: tl.constexpr, BH: tl.constexpr,
    ):  # fmt: skip
        """One token: everything is read once and stays in registers between the sum, its statistics and the
        norm."""
        h = tl.arange(0, BH)
        there = h < H
        at = tl.program_id(0).to(tl.int64) * H + h
        dtype = out_ptr.dtype.element_ty
        total = tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32)
        if RESIDUAL:
            total += tl.load(residual_ptr + at, mask=there, other=0.0).to(tl.float32)
            total = total.to(dtype)
            tl.store(total_ptr + at, total, mask=there)
            total = total.to(tl.float32)
        weight = tl.load(weight_ptr + h, mask=there, other=0.0).to(tl.float32)
        if LAYER:
            total = tl.where(there, total - tl.sum(total, 0) / H, 0.0)
        normed = total * tl.rsqrt(tl.sum(total * total, 0) / H + eps)
        if not LAYER:
            normed = normed.to(dtype).to(tl.float32)
        normed = normed * weight
        if BIAS:
            normed += tl.load(bias_ptr + h, mask=there, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, normed.to(dtype), mask=there)

    @triton.jit
    def _silu_mul(gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, inner, BI: tl.constexpr):
        """BI numbers of one token."""
        token = tl.program_id(0).to(tl.int64)
        i = tl.program_id(1) * BI + tl.arange(0, BI)
        gate = tl.load(gate_ptr + token * gate_stride + i, mask=i < inner, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + token * up_stride + i, mask=i < inner, other=0.0).to(tl.float32)
        gate = (gate / (1 + tl.exp(-gate))).to(out_ptr.dtype.element_ty).to(tl.float32)
        tl.store(out_ptr + token * inner + i, (gate * up).to(out_ptr.dtype.element_ty), mask=i < inner)
