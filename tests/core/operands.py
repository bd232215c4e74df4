"""What the tests of the kernels share: operands on the device at hand, and how results are compared.

On a machine without a GPU Triton's interpreter runs the kernels. Import this before their modules: where they cannot
run, it skips the file that imports it.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tome_core.kernels import Groups
from tome_core.kernels.groups import plan_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter of Triton 3.6 does not go with NumPy 2.4 and newer; the kernels do.
pytest.importorskip("triton", "3.7" if DEVICE == "cpu" else None, reason="the kernels need the package triton")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Of the largest value: half a step of the dtype, and some for sums."""


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def random_sizes(B: int, N: int) -> Tensor:
    return torch.randint(1, 40, (B, N)).to(DEVICE).float()


def joint(B: int, N: int, num_heads: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (B, N, num_heads D), as a joint projection leaves them."""
    q, k, v = random(B, N, 3 * num_heads * D, dtype=dtype).split(num_heads * D, dim=-1)
    return q, k, v


def exact_metric(B: int, N: int, D: int) -> Tensor:
    """A metric whose similarities any arithmetic gets exactly: 16 channels of 1/4. It has many ties."""
    signs = torch.randint(0, 2, (B, N, D)) * 2.0 - 1
    return (signs * (torch.rand(B, N, D).argsort(dim=-1) < 16) / 4).to(DEVICE)


def agree(got: Tensor, wanted: Tensor) -> None:
    """Equal to what the result's dtype can tell."""
    assert got.shape == wanted.shape
    error = (got.double() - wanted.double()).abs().max()
    assert error <= TOLERANCE[got.dtype] * wanted.abs().max(), error


def same(got: Groups, wanted: Groups) -> None:
    for name, a, b in zip(Groups._fields, got, wanted, strict=True):
        assert torch.equal(a.cpu(), b.cpu()), name


def valid(groups: Groups, N: int, num_prefix_tokens: int) -> None:
    """Every token is in just one row, prefix tokens head the first rows alone, and members follow each other."""
    tokens = torch.cat([groups.keep, groups.src], dim=1).sort(dim=1).values
    assert (tokens == torch.arange(N, device=tokens.device)).all()
    prefix = torch.arange(num_prefix_tokens, device=tokens.device)
    assert (groups.keep[:, :num_prefix_tokens] == prefix).all()
    assert (groups.first[:, : num_prefix_tokens + 1] == 0).all()
    assert (groups.first[:, -1] == groups.src.shape[1]).all()
    assert (groups.first.diff(dim=1) >= 0).all()


def gained(metric: Tensor, groups: Groups) -> Tensor:
    """Similarity of all pairs together, which no choice among ties changes: (B,)."""
    plan = plan_of(groups)
    pairs = plan.src, plan.keep.gather(1, plan.dst)
    src, dst = (metric.gather(1, index[..., None].expand(-1, -1, metric.shape[2])) for index in pairs)
    return (src * dst).sum(dim=(1, 2))
