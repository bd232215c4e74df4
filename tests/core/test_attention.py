"""Proportional attention: a token of size s is attended to as s copies of it would be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tome_core.attention import proportional_attention, size_bias


@st.composite
def attentions(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random q, k, v (B, H, N, D), and whole sizes (B, N) float32."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    B, H, N, D = (draw(st.integers(1, most)) for most in (2, 3, 12, 8))
    q, k, v = torch.randn(3, B, H, N, D, generator=generator)
    return q, k, v, torch.randint(1, 9, (B, N), generator=generator).float()


@given(attentions())
def test_a_size_equals_that_many_copies_of_key_and_value(case: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    q, k, v, size = case
    y = proportional_attention(q, k, v, size)
    for b, copies in enumerate(size.long()):
        k_copied, v_copied = (t[b].repeat_interleave(copies, dim=1) for t in (k, v))
        torch.testing.assert_close(y[b], F.scaled_dot_product_attention(q[b], k_copied, v_copied), rtol=0, atol=1e-5)


@given(attentions())
def test_without_sizes_it_is_plain_attention(case: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    q, k, v, size = case
    plain = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(proportional_attention(q, k, v), plain)
    torch.testing.assert_close(proportional_attention(q, k, v, torch.ones_like(size)), plain)


@given(attentions(), st.sampled_from([2.0, 1000.0]))
def test_only_the_proportion_of_sizes_counts(case: tuple[Tensor, Tensor, Tensor, Tensor], factor: float) -> None:
    q, k, v, size = case
    scaled = proportional_attention(q, k, v, factor * size)
    torch.testing.assert_close(scaled, proportional_attention(q, k, v, size), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_answer_has_the_dtype_of_the_query(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 2, 3, 5, 8)
    size = torch.tensor([[1.0, 2, 3, 500, 1]]).expand(2, 5)
    y = proportional_attention(q.to(dtype), k.to(dtype), v.to(dtype), size)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), proportional_attention(q, k, v, size), rtol=0.05, atol=0.05)


def test_dropout_drops_attention_weights() -> None:
    q, k, v = torch.randn(3, 1, 2, 64, 8)
    assert not torch.equal(proportional_attention(q, k, v, dropout=0.5), proportional_attention(q, k, v))


def test_the_bias_is_the_log_of_the_size_broadcast_over_heads_and_queries() -> None:
    size = torch.tensor([[1.0, 2.0, 8.0], [4.0, 1.0, 1.0]])
    bias = size_bias(size, torch.float64)
    assert bias is not None
    assert bias.shape == (2, 1, 1, 3)
    assert bias.dtype == torch.float64
    torch.testing.assert_close(bias.exp()[:, 0, 0].float(), size)
    rough = size_bias(torch.tensor([[257.0]]), torch.bfloat16)
    assert rough is not None
    assert rough.item() == torch.tensor(257.0).log().bfloat16().item()  # the logarithm is rounded, not the size


def test_sizes_of_one_need_no_bias() -> None:
    assert size_bias(None, torch.float32) is None
