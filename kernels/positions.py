"""What a token's position does to attention: rotary embeddings of every variant, and ALiBi's slopes.

The tables are made here; rotary.py applies the former and attention.py the latter.
"""

import functools
import math

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

TABLE = 8192  # positions whose angles are computed but once: 8 MB in float32 with heads of 128


class Rotary:
    """cos and sin for one model, from transformers' own rules. Some of its variants depend on how long a row
    is (dynamic NTK, LongRoPE): each row gets its own frequencies, as it would have alone. The first half of
    sin has its sign turned, as `rotary.rotate` wants it."""

    def __init__(self, config, head_dim: int, device):
        """`config`: a transformers config with `rope_parameters`; None for a model without rotary
        embeddings."""
        self.config, self.head_dim, self.device = config, head_dim, device
        rope = getattr(config, "rope_parameters", None) or {}
        self.kind, self.theta = rope.get("rope_type", "default"), rope.get("rope_theta", 1e4)
        self.varies = self.kind in ("dynamic", "longrope")  # with a row's length, beyond the limit
        limit = rope.get("original_max_position_embeddings") if self.kind == "longrope" else None
        self.limit = limit or getattr(config, "max_position_embeddings", 0)
        self._frequencies = functools.lru_cache(maxsize=64)(self._compute)
        self._table = functools.lru_cache(maxsize=1)(self._tabulate)

    def _compute(self, length: int | None) -> tuple[torch.Tensor, float]:
        """Radians per token [D / 2], and what cos and sin are multiplied by."""
        if self.kind == "default":
            places = torch.arange(0, self.head_dim, 2, device=self.device).float()
            return self.theta ** -(places / self.head_dim), 1.0
        frequencies, scale = ROPE_INIT_FUNCTIONS[self.kind](self.config, self.device, seq_len=length)
        return frequencies.float(), scale

    def _of(self, length: int) -> tuple[torch.Tensor, float]:
        """The frequencies for a row of this length: the plain ones up to the variant's limit."""
        if not self.varies or length <= self.limit:
            return self._frequencies(None)
        return self._frequencies(length if self.kind == "dynamic" else self.limit + 1)

    def __call__(self, at: torch.Tensor, rows: list[tuple[int, int]], dtype: torch.dtype) -> tuple:
        """cos and sin [T, 1, D] for tokens at positions `at` [T]; `rows`: (tokens, final length) of each row,
        in order. (None, None) for a model without rotary embeddings."""
        if self.config is None:
            return None, None
        longest = max(length for _, length in rows)
        plain = not self.varies or longest <= self.limit
        if plain and longest <= TABLE:
            cos, sin = self._table(dtype)
            return cos.index_select(0, at), sin.index_select(0, at)
        if plain:
            frequencies, scale = self._frequencies(None)
        else:
            found = [self._of(length) for _, length in rows]
            counts = torch.tensor([tokens for tokens, _ in rows], device=self.device)
            frequencies = torch.stack([each for each, _ in found]).repeat_interleave(counts, dim=0)
            scale = torch.tensor([each for _, each in found], device=self.device)
            scale = scale.repeat_interleave(counts)[:, None, None]
        return _turns(at, frequencies, scale, dtype)

    def _tabulate(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The plain cos and sin of the first TABLE positions."""
        return _turns(torch.arange(TABLE, device=self.device), *self._frequencies(None), dtype)


def _turns(at, frequencies, scale, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, 1, D], alike for all heads, at positions `at` [T]; frequencies [D / 2] or [T, D / 2],
    scale a number or [T, 1, 1]."""
    angles = (at[:, None] * frequencies).unsqueeze(1)
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((-angles, angles), -1).sin()
    return (cos * scale).to(dtype), (sin * scale).to(dtype)


def alibi_slopes(heads: int, kind: str) -> torch.Tensor:
    """ALiBi's slope of each head [N] (Press et al., 2021, and its authors' rule where the heads are no power
    of two).

    `kind` "bloom": float32. "falcon": bfloat16, which tells attention.py to round and scale the biases as
    transformers' Falcon does.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    return torch.tensor(slopes, dtype=torch.bfloat16 if kind == "falcon" else torch.float32)
