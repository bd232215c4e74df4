"""The Triton kernels against plain PyTorch: on a GPU where there is one, else by Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter of Triton 3.6 does not go with NumPy 2.4 and newer; the kernels do.
pytest.importorskip("triton", "3.7" if DEVICE == "cpu" else None, reason="the kernels need the package triton")

from tome_core.kernels import attention, matching, merging, reference  # noqa: E402
from tome_core.kernels.groups import Groups, groups_of, plan_of  # noqa: E402
from tome_core.matching import match as match_plan  # noqa: E402
from tome_core.schedule import max_r  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Of the largest value: half a step of the dtype, and some for sums."""


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def random_sizes(B: int, N: int) -> Tensor:
    return torch.randint(1, 40, (B, N), device=DEVICE).float()


def agree(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    error = (got.double() - wanted.double()).abs().max()
    assert error <= TOLERANCE[dtype] * wanted.abs().max(), error


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "D"), [(3, 64), (17, 32), (64, 72), (65, 80), (130, 96), (33, 128), (197, 64)])
@pytest.mark.parametrize("sized", [False, True], ids=["plain", "sized"])
def test_attention(dtype: torch.dtype, N: int, D: int, sized: bool) -> None:
    torch.manual_seed(N)
    q, k, v = random(3, N, 6 * D, dtype=dtype).split(2 * D, dim=-1)
    size = random_sizes(3, N) if sized else None
    got = attention.attend(q, k, v, size, 2)
    assert got.dtype == dtype and got.is_contiguous()
    agree(got, reference.attend(q.double(), k.double(), v.double(), size, 2), dtype)
    leading = attention.attend(q[:, :2], k, v, size, 2)
    agree(leading, got[:, :2], dtype)


@pytest.mark.skipif(DEVICE == "cpu", reason="takes minutes without a GPU")
@pytest.mark.parametrize("B", [1, 3, 7])
def test_attention_at_every_size(B: int) -> None:
    for N in range(3, 601):
        q, k, v = random(B, N, 3 * 128, dtype=torch.bfloat16).split(128, dim=-1)
        size = random_sizes(B, N)
        wanted = reference.attend(q.float(), k.float(), v.float(), size, 2)
        agree(attention.attend(q, k, v, size, 2), wanted, torch.bfloat16)


def test_attention_counts_a_token_as_its_copies() -> None:
    torch.manual_seed(0)
    q, k, v = random(1, 9, 3 * 64).split(64, dim=-1)
    size = torch.tensor([[1, 3, 1, 2, 1, 1, 1, 5, 1]], device=DEVICE).float()
    many_k, many_v = (t.repeat_interleave(size[0].long(), dim=1) for t in (k, v))
    agree(attention.attend(q, k, v, size, 1), attention.attend(q, many_k, many_v, None, 1), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "num_heads", "D"), [(3, 1, 64), (50, 3, 72), (33, 4, 32)])
def test_metric(dtype: torch.dtype, N: int, num_heads: int, D: int) -> None:
    torch.manual_seed(N)
    k = random(2, N, 2 * num_heads * D, dtype=dtype)[..., num_heads * D :]
    k[0, 1] = 0
    got = matching.metric(k, num_heads)
    agree(got, reference.metric(k, num_heads), torch.float32)
    assert (got[0, 1] == 0).all()


def same(got: Groups, wanted: Groups) -> None:
    for name, a, b in zip(Groups._fields, got, wanted, strict=True):
        assert torch.equal(a, b), name


@settings(max_examples=15)
@given(st.integers(3, 60), st.integers(0, 3), st.data())
def test_every_plan_is_valid(N: int, num_prefix_tokens: int, data: st.DataObject) -> None:
    most = max_r(N, num_prefix_tokens)
    assume(most > 0)
    r = data.draw(st.integers(1, most))
    torch.manual_seed(N)
    metric = reference.metric(torch.randint(-1, 2, (2, N, 16), device=DEVICE), 1)  # many ties
    got = matching.match(metric, r, num_prefix_tokens)
    valid(got, N)
    torch.testing.assert_close(gained(metric, got), gained(metric, reference.match(metric, r, num_prefix_tokens)))


def valid(groups: Groups, N: int) -> None:
    """Every token is in just one row, and rows hold their members in order."""
    tokens = torch.cat([groups.keep, groups.src], dim=1).sort(dim=1).values
    assert (tokens == torch.arange(N, device=tokens.device)).all()
    assert (groups.first[:, 0] == 0).all() and (groups.first[:, -1] == groups.src.shape[1]).all()
    assert (groups.first.diff(dim=1) >= 0).all()


def gained(metric: Tensor, groups: Groups) -> Tensor:
    """Similarity of all pairs together, which no choice among ties changes: (B,)."""
    plan = plan_of(groups)
    pairs = plan.src, plan.keep.gather(1, plan.dst)
    src, dst = (metric.gather(1, index[..., None].expand(-1, -1, metric.shape[2])) for index in pairs)
    return (src * dst).sum(dim=(1, 2))


SIZES = [3, 4, 31, 64, 129, 197, 257, 577, 600] if DEVICE == "cpu" else range(3, 601)  # the interpreter is slow


@pytest.mark.parametrize("N", SIZES)
def test_matching_at_many_sizes(N: int) -> None:
    torch.manual_seed(N)
    metric = reference.metric(random(3, N, 64), 1)
    for r in {1, max(max_r(N, 1) // 3, 1), max_r(N, 1)}:
        same(matching.match(metric, r, 1), reference.match(metric, r, 1))


def test_equal_tokens_merge_the_earlier_first() -> None:
    metric = torch.zeros(1, 21, 32, device=DEVICE)
    metric[..., 0] = 1  # exact ties everywhere
    same(matching.match(metric, 4, 1), reference.match(metric, 4, 1))


def test_what_is_not_a_number_merges_somewhere() -> None:
    metric = reference.metric(random(2, 40, 32), 1)
    metric[0, 5:9], metric[1] = torch.nan, torch.nan
    for r in (1, 7, max_r(40, 1)):
        valid(matching.match(metric, r, 1), 40)


@settings(max_examples=40)
@given(st.integers(3, 40), st.integers(0, 2), st.data())
def test_groups_are_the_plan_by_rows(N: int, num_prefix_tokens: int, data: st.DataObject) -> None:
    plan = match_plan(torch.randn(2, N, 8), data.draw(st.integers(0, N)), num_prefix_tokens)
    groups = groups_of(plan)
    valid(groups, N)
    back = plan_of(groups)
    assert torch.equal(back.keep, plan.keep) and torch.equal(back.target(), plan.target())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "C"), [(3, 64), (37, 192), (20, 1024)])
@pytest.mark.parametrize("sized", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "layer scale"])
def test_merging(dtype: torch.dtype, N: int, C: int, sized: bool, scaled: bool) -> None:
    torch.manual_seed(N)
    x, y = random(3, N, C, dtype=dtype), random(3, N, C, dtype=dtype)
    weight, bias = random(C, dtype=dtype), random(C, dtype=dtype)
    scale, size = random(C, dtype=dtype) if scaled else None, random_sizes(3, N) if sized else None
    wide_x, wide_y = x.double(), y.double()
    args: Any = (scale if scale is None else scale.double(), weight.double(), bias.double(), 1e-6)
    added = merging.add_norm(x, y, scale, weight, bias, 1e-6)
    for got, wanted in zip(added, reference.add_norm(wide_x, wide_y, *args), strict=True):
        assert got.dtype == dtype
        agree(got, wanted, dtype)
    groups = reference.match(reference.metric(x, 1), max_r(N, 1), 1)
    *merged, merged_size = merging.merge_add_norm(groups, x, y, size, scale, weight, bias, 1e-6)
    *wanted_merged, wanted_size = reference.merge_add_norm(groups, wide_x, wide_y, size, *args)
    for got, wanted in zip(merged, wanted_merged, strict=True):
        agree(got, wanted, dtype)
    assert torch.equal(merged_size, wanted_size)


def test_float16_sums_do_not_overflow() -> None:
    x = torch.full((1, 9, 32), 3e4, device=DEVICE, dtype=torch.float16)
    one, size = torch.ones(32, device=DEVICE, dtype=torch.float16), torch.full((1, 9), 50.0, device=DEVICE)
    groups = reference.match(reference.metric(random(1, 9, 32), 1), 4, 1)
    merged, normed, _ = merging.merge_add_norm(groups, x, x, size, one / 16, one, one, 1e-6)
    assert normed.isfinite().all() and (merged == merged[0, 0, 0]).all() and merged.isfinite().all()


def test_the_same_input_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    x, y = random(2, 50, 96, dtype=torch.bfloat16), random(2, 50, 96, dtype=torch.bfloat16)
    weight = random(96, dtype=torch.bfloat16)
    groups = matching.match(matching.metric(x, 3), 20, 1)
    first = merging.merge_add_norm(groups, x, y, None, None, weight, weight, 1e-6)
    for _ in range(3):
        same(matching.match(matching.metric(x, 3), 20, 1), groups)
        again = merging.merge_add_norm(groups, x, y, None, None, weight, weight, 1e-6)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_widths_over_many_batches_share_one_program() -> None:
    """Token counts are arguments of a kernel, not part of it: no `r` waits for a compiler."""
    if DEVICE != "cuda":
        pytest.skip("only a GPU compiles kernels")
    metric = reference.metric(random(2, 64, 64), 1)
    matching.match(metric, 3, 1)
    compiled = len(matching._match.device_caches[torch.cuda.current_device()][0])
    for r in range(4, 20):
        matching.match(metric, r, 1)
    assert len(matching._match.device_caches[torch.cuda.current_device()][0]) <= compiled + 1
