"""The kernels of residual sums, merges and norms against plain PyTorch, in every form that the loop asks for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.core.operands import DEVICE, agree, exact_metric, random, random_sizes
from tome_core.kernels import FLOAT8, Groups, Norm, operators, reference
from tome_core.schedule import max_r

pytestmark = pytest.mark.usefixtures("by_kernels")

KINDS = [
    (torch.float32, 192),
    (torch.float16, 192),
    (torch.bfloat16, 64),
    (torch.bfloat16, 192),
    (torch.bfloat16, 1152),
]


@pytest.fixture(params=["LayerNorm", "RMSNorm"])
def centred(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "LayerNorm")


def random_norm(C: int, centred: bool, dtype: torch.dtype) -> Norm:
    return Norm(random(C, dtype=dtype), random(C, dtype=dtype) if centred else None, 1e-6, centred)


def wide(norm: Norm) -> Norm:
    return norm._replace(weight=norm.weight.float(), bias=None if norm.bias is None else norm.bias.float())


def groups_of(B: int, N: int, r: int) -> Groups:
    return reference.match(exact_metric(B, N, 32), r, 1)


def all_agree(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert a.is_contiguous()
        agree(a, b)


@pytest.mark.parametrize(("dtype", "C"), KINDS, ids=str)
def test_norm(dtype: torch.dtype, C: int, centred: bool) -> None:
    x, norm = random(3, 37, C, dtype=dtype), random_norm(C, centred, dtype)
    offset = random(C) if centred else None
    got = operators.norm(x, offset, norm)
    assert got.dtype == dtype
    all_agree((got,), (reference.norm(x.float(), offset, wide(norm), torch.float32, 1.0),))


@pytest.mark.parametrize(("dtype", "C"), KINDS, ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["", "LayerScale"])
def test_sum_and_norm(dtype: torch.dtype, C: int, scaled: bool) -> None:
    x, y, norm = random(3, 37, C, dtype=dtype), random(3, 37, C, dtype=dtype), random_norm(C, scaled, dtype)
    scale, offset = random(C, dtype=dtype) if scaled else None, random(C) if scaled else None
    before = x.clone()
    got = operators.add_norm(x, y, scale, offset, norm)
    wide_scale = None if scale is None else scale.float()
    all_agree(got, reference.add_norm(x.float(), y.float(), wide_scale, offset, wide(norm), torch.float32, 1.0))
    assert torch.equal(x, before)


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("num_patches", [37, 30])
def test_patches_placed_on_a_table_behind_its_prefix_tokens(B: int, num_patches: int) -> None:
    table, y = random(1, 37, 192), random(B, num_patches, 192, dtype=torch.bfloat16)
    norm = random_norm(192, True, torch.bfloat16)
    x, n = operators.add_norm(table, y, None, None, norm)
    assert x.dtype == n.dtype == torch.bfloat16 and x.shape == n.shape == (B, 37, 192)
    all_agree((x, n), reference.add_norm(table, y.float(), None, None, wide(norm), torch.float32, 1.0))


FORMS = [(torch.bfloat16, 192, form) for form in ("first", "sized", "added", "scaled")]


@pytest.mark.parametrize(("dtype", "C", "form"), FORMS + [(*kind, "scaled") for kind in KINDS[:3] + KINDS[4:]], ids=str)
def test_sum_merge_and_norm(dtype: torch.dtype, C: int, form: str) -> None:
    N, B = 37, 2
    norm, offset = random_norm(C, form != "sized", dtype), random(C) if form != "first" else None
    x, y = random(B, N, C, dtype=dtype), random(B, N, C, dtype=dtype) if form in ("added", "scaled") else None
    size, scale = (
        None if form == "first" else random_sizes(B, N),
        random(C, dtype=dtype) if form == "scaled" else None,
    )
    wide_y, wide_scale = (None if t is None else t.float() for t in (y, scale))
    for r in (1, max_r(N, 1)):
        groups = groups_of(B, N, r)
        *got, got_size, log_size = operators.merge_add_norm(groups, x, y, size, scale, offset, norm)
        *wanted, wanted_size, _ = reference.merge_add_norm(
            groups, x.float(), wide_y, size, wide_scale, offset, wide(norm), torch.float32, 1.0
        )
        all_agree(tuple(got), tuple(wanted))
        assert [t.dtype for t in got] == [dtype, dtype] and torch.equal(got_size, wanted_size)
        agree(log_size, wanted_size.log2())


@pytest.mark.gpu
def test_norms_in_float8() -> None:
    """Within one step, for a value may lie on the other side of a middle. The interpreter rounds to float8 wrongly."""
    x, y = random(2, 37, 192, dtype=torch.bfloat16), random(2, 37, 192, dtype=torch.bfloat16)
    norm, groups = random_norm(192, True, torch.bfloat16), groups_of(2, 37, 9)
    pairs = [
        (operators.norm(x, None, norm, FLOAT8, 7.0), reference.norm(x, None, norm, FLOAT8, 7.0)),
        (
            operators.add_norm(x, y, None, None, norm, FLOAT8, 7.0)[1],
            reference.add_norm(x, y, None, None, norm, FLOAT8, 7.0)[1],
        ),
        (
            operators.merge_add_norm(groups, x, y, None, None, None, norm, FLOAT8, 7.0)[1],
            reference.merge_add_norm(groups, x, y, None, None, None, norm, FLOAT8, 7.0)[1],
        ),
    ]
    for got, wanted in pairs:
        assert got.dtype == FLOAT8
        torch.testing.assert_close(got.float(), wanted.float(), rtol=0.13, atol=0.02)


@pytest.mark.parametrize("K", [2, 7, 128, 197])
@pytest.mark.parametrize("shared", [False, True], ids=["", "one for all images"])
def test_sums_of_what_members_have(K: int, shared: bool) -> None:
    groups = groups_of(3, 37, 15)
    sums = torch.randint(0, 99, (1 if shared else 3, 37, K)).to(DEVICE).float()
    assert torch.equal(operators.merge_sums(groups, sums), reference.merge_sums(groups, sums))


def test_sums_in_half_precision() -> None:
    groups, sums = groups_of(2, 37, 15), torch.eye(37, device=DEVICE, dtype=torch.bfloat16)[None]
    got = operators.merge_sums(groups, sums)
    assert torch.equal(got, reference.merge_sums(groups, sums)) and (got.sum(dim=1) == 1).all()


def test_one_row_takes_all() -> None:
    """More members than a program's step of anything."""
    N, r = 200, 99
    metric = torch.zeros(2, N, 32, device=DEVICE)
    metric[..., 0] = 1
    groups = reference.match(metric, r, 1)
    x, norm = random(2, N, 192), random_norm(192, True, torch.float32)
    got = operators.merge_add_norm(groups, x, None, None, None, None, norm)
    all_agree(got, reference.merge_add_norm(groups, x, None, None, None, None, norm, torch.float32, 1.0))
    assert got[2].max() == 100


@pytest.mark.parametrize("y_too", [False, True])
def test_float16_sums_do_not_overflow(y_too: bool) -> None:
    x = torch.full((1, 9, 192), 3e4, device=DEVICE, dtype=torch.float16)
    one, size = torch.ones(192, device=DEVICE, dtype=torch.float16), torch.full((1, 9), 50.0, device=DEVICE)
    y, scale = (x, one / 16) if y_too else (None, None)
    merged, normed, *_ = operators.merge_add_norm(groups_of(1, 9, 4), x, y, size, scale, None, Norm(one, one, 1e-6))
    assert normed.isfinite().all() and merged.isfinite().all() and (merged == merged[0, 0, 0]).all()
    rms = operators.norm(x, None, Norm(one, None, 1e-6, centred=False))
    agree(rms, torch.ones_like(x, dtype=torch.float32))


def test_the_same_input_gives_the_same_bits() -> None:
    x, y = random(2, 50, 192, dtype=torch.bfloat16), random(2, 50, 192, dtype=torch.bfloat16)
    groups, norm, size = groups_of(2, 50, 20), random_norm(192, True, torch.bfloat16), random_sizes(2, 50)
    first = operators.merge_add_norm(groups, x, y, size, None, None, norm)
    for _ in range(3):
        again = operators.merge_add_norm(groups, x, y, size, None, None, norm)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    one = Groups(*(index[1:].clone() for index in groups))
    alone = operators.merge_add_norm(one, x[1:], y[1:], size[1:].clone(), None, None, norm)
    assert all(torch.equal(a[1:], b) for a, b in zip(first, alone, strict=True))
