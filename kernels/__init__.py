"""The arithmetic that a server runs hot: attention over pages, quantized matrices, adapters, small fusions.
One lesson a file."""

try:
    import triton
    import triton.language as tl
except ImportError:  # triton is Linux only: everything here but the launchers works without it
    triton = tl = None

__all__ = ["tl", "triton"]
