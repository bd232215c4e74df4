"""The attention kernel against plain PyTorch: head widths, dtypes, sizes of tokens, biases, few queries, layouts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.core.operands import DEVICE, agree, joint, random, random_sizes
from tome_core.kernels import Bias, operators, reference

pytestmark = pytest.mark.usefixtures("by_kernels")

H = 2
WIDTHS = [16, 32, 64, 72, 88, 96, 128]
CASES = [(D, torch.bfloat16, N) for D in WIDTHS for N in ((50, 150) if D <= 72 else (150,))]
CASES += [(D, dtype, 150) for D in (64, 72) for dtype in (torch.float32, torch.float16)]


def wanted(
    q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None, bias: Bias | None = None, num_heads: int = H
) -> Tensor:
    return reference.attend(q.float(), k.float(), v.float(), log_size, bias, num_heads)


def random_bias(B: int, N: int, num_heads: int = H) -> Bias:
    row, column = (torch.randint(0, 500, (B, N), dtype=torch.int32).to(DEVICE) for _ in range(2))
    return Bias(random(num_heads, 1000), row, column)


@pytest.mark.parametrize(("D", "dtype", "N"), CASES, ids=str)
def test_tokens_with_sizes(D: int, dtype: torch.dtype, N: int) -> None:
    q, k, v = joint(2, N, H, D, dtype)
    log_size = random_sizes(2, N).log2()
    got = operators.attend(q, k, v, log_size, None, H)
    assert got.dtype == dtype and got.is_contiguous()
    agree(got, wanted(q, k, v, log_size))


@pytest.mark.parametrize("N", [3, 64, 65, 128, 129, 197, 257])
def test_numbers_of_tokens_around_a_tile(N: int) -> None:
    q, k, v = joint(1, N, H, 64, torch.bfloat16)
    log_size = random_sizes(1, N).log2()
    agree(operators.attend(q, k, v, log_size, None, H), wanted(q, k, v, log_size))


@pytest.mark.gpu
def test_every_number_of_tokens() -> None:
    for N in range(3, 601):
        q, k, v = joint(2, N, H, 64, torch.bfloat16)
        log_size = random_sizes(2, N).log2()
        agree(operators.attend(q, k, v, log_size, None, H), wanted(q, k, v, log_size))


@pytest.mark.parametrize(("D", "dtype"), [(72, torch.bfloat16), (64, torch.float32)], ids=str)
@pytest.mark.parametrize("M", [1, 2])
@pytest.mark.parametrize("sized", [False, True], ids=["", "sized"])
def test_few_queries(D: int, dtype: torch.dtype, M: int, sized: bool) -> None:
    """As the last block has them: its own product for queries, another for keys and values."""
    q, (k, v) = random(2, M, H * D, dtype=dtype), random(2, 70, 2 * H * D, dtype=dtype).split(H * D, dim=-1)
    log_size = random_sizes(2, 70).log2() if sized else None
    agree(operators.attend(q, k, v, log_size, None, H), wanted(q, k, v, log_size))


def test_a_token_without_a_size_has_the_size_of_1() -> None:
    q, k, v = joint(2, 70, H, 64, torch.bfloat16)
    got = operators.attend(q, k, v, None, None, H)
    agree(got, wanted(q, k, v, None))
    agree(got, operators.attend(q, k, v, torch.zeros(2, 70, device=DEVICE), None, H))


def test_a_token_counts_as_its_copies() -> None:
    q, k, v = joint(1, 9, 1, 64, torch.float32)
    size = torch.tensor([[1, 3, 1, 2, 1, 1, 1, 5, 1]], device=DEVICE)
    many_k, many_v = (t.repeat_interleave(size[0], dim=1) for t in (k, v))
    got = operators.attend(q, k, v, size.float().log2(), None, 1)
    agree(got, wanted(q, many_k, many_v, None, num_heads=1))


BIASED = [(64, torch.bfloat16, 50), (64, torch.bfloat16, 150), (128, torch.bfloat16, 150), (64, torch.float32, 150)]


@pytest.mark.parametrize(("D", "dtype", "N"), BIASED, ids=str)
def test_biased(D: int, dtype: torch.dtype, N: int) -> None:
    q, k, v = joint(2, N, H, D, dtype)
    bias, log_size = random_bias(2, N), random_sizes(2, N).log2()
    agree(operators.attend(q, k, v, log_size, bias, H), wanted(q, k, v, log_size, bias))


def test_biased_without_sizes() -> None:
    q, k, v = joint(2, 50, H, 64, torch.bfloat16)
    bias = random_bias(2, 50)
    agree(operators.attend(q, k, v, None, bias, H), wanted(q, k, v, None, bias))
    leading = operators.attend(q[:, :1].contiguous(), k, v, None, bias, H)
    agree(leading, wanted(q[:, :1], k, v, None, bias))


def test_queries_keys_and_values_of_projections_of_their_own() -> None:
    q, k, v = (t.contiguous() for t in joint(2, 50, H, 64, torch.bfloat16))
    log_size = random_sizes(2, 50).log2()
    agree(operators.attend(q, k, v, log_size, None, H), wanted(q, k, v, log_size))


def test_an_image_is_the_same_in_any_batch() -> None:
    q, k, v = joint(3, 50, H, 64, torch.bfloat16)
    log_size = random_sizes(3, 50).log2()
    together = operators.attend(q, k, v, log_size, None, H)
    for b in range(3):
        alone = operators.attend(q[b : b + 1], k[b : b + 1], v[b : b + 1], log_size[b : b + 1].clone(), None, H)
        assert torch.equal(alone, together[b : b + 1])
    assert torch.equal(operators.attend(q, k, v, log_size, None, H), together)


def test_scores_that_differ_widely_stay_finite() -> None:
    q, k, v = joint(1, 50, H, 64, torch.float16)
    log_size = random_sizes(1, 50).log2()
    q, k = q * 30, k * 30  # scores of thousands
    got = operators.attend(q, k, v, log_size, None, H)
    assert got.isfinite().all()
    agree(got, wanted(q, k, v, log_size))
