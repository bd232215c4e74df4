"""What the kernels would refuse or misread, every machine refuses, by the operand's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tome_core import kernels
from tome_core.kernels import FLOAT8, Bias, Groups, Norm

B, N, H, D = 2, 20, 2, 32
C = H * D

Operands = dict[str, Any]


def apart(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor whose values lie in the reverse order of its dimensions."""
    return torch.ones(shape[::-1]).to(dtype).permute(*reversed(range(len(shape))))


def groups() -> Groups:
    return kernels.match(torch.randn(B, N, D), 6, 1)


def heads() -> Operands:
    q, k, v = torch.randn(B, N, 3 * C).split(C, dim=-1)
    return {"q": q, "k": k, "v": v, "num_heads": H}


def attention() -> Operands:
    codes = torch.zeros(B, N, dtype=torch.int32)
    return heads() | {"log_size": torch.zeros(B, N), "bias": Bias(torch.zeros(H, 9), codes, codes)}


def matched() -> Operands:
    return attention() | {"found": torch.randn(B, N, D), "r": 6, "num_prefix_tokens": 1}


def rotated() -> Operands:
    q, k, _ = torch.randn(B, N, 3 * C).split(C, dim=-1)
    table, size = torch.randn(B, N, 2 * D), torch.ones(B, N)
    return {"q": q, "k": k, "table": table, "size": size, "num_heads": H, "halved": False}


def normed() -> Operands:
    return {"x": torch.randn(B, N, C), "offset": torch.randn(C), "norm": Norm(torch.ones(C), torch.ones(C), 1e-6)}


def added() -> Operands:
    return normed() | {"y": torch.randn(B, N, C), "scale": torch.ones(C)}


def merged() -> Operands:
    return added() | {"groups": groups(), "size": torch.ones(B, N)}


def product8() -> Operands:
    a, weight = torch.randn(B, N, 32).to(FLOAT8), torch.randn(C, 32).to(FLOAT8)
    return {"a": a, "weight": weight, "bias": torch.zeros(C), "factor": 1.0}


def accumulated8() -> Operands:
    return product8() | {"x": torch.randn(B, N, C), "scale": torch.ones(C)}


OPERATIONS: dict[str, Callable[[], Operands]] = {
    "attend": attention,
    "attend_match": matched,
    "metric": lambda: {"k": torch.randn(B, N, 3 * C)[..., :C], "num_heads": H},
    "rotate": rotated,
    "match": lambda: {"metric": torch.randn(B, N, D), "r": 6, "num_prefix_tokens": 1},
    "norm": normed,
    "add_norm": added,
    "merge_add_norm": merged,
    "merge_sums": lambda: {"groups": groups(), "sums": torch.ones(B, N, 7)},
    "cut": lambda: {"images": torch.randn(B, 3, 32, 48), "patch": 16, "dtype": torch.float32},
    "linear_gelu8": lambda: product8() | {"multiplier": 1.0},
    "accumulate8": accumulated8,
}
"""Operands that are all right, by operation."""

Broken = tuple[Operands, str]
Case = tuple[str, Operands, str]


def each(operations: str, *broken: Broken) -> list[Case]:
    """What breaks a call, and the message, for each of some operations."""
    return [(operation, *case) for operation in operations.split() for case in broken]


def all_heads(C: int) -> Operands:
    return {name: torch.randn(B, N, C) for name in "qkv"}


ROWS = each(
    "attend attend_match",
    ({"q": apart(B, N, C)}, "q of shape .* tokens must follow each other"),
    ({"k": apart(B, N, C)}, "k of shape .* tokens must follow each other"),
    ({"v": apart(B, N, C)}, "v of shape .* tokens must follow each other"),
    ({"k": torch.randn(B, 2 * N, C)[:, :N]}, "k of shape .* tokens must follow each other"),
    ({"k": torch.randn(1, N, C).expand(B, -1, -1)}, "k of shape .* tokens must follow each other"),
    ({"q": torch.randn(B, N, C).half()}, "q is torch.float16"),
    ({"v": torch.randn(B, N, C).half()}, "v is torch.float16"),
    ({"v": torch.randn(B, N - 1, C)}, "v is .* of shape"),
    ({"q": torch.randn(B, N + 1, C)}, "q has shape"),
    ({"q": torch.randn(1, N, C)}, "q is .* of shape"),
    (all_heads(24), "24 channels are 2 heads of 12"),
    (all_heads(272), "272 channels are 2 heads of 136"),
    (all_heads(40), "40 channels are 2 heads of 20"),
    ({"num_heads": 3}, "64 channels are 3 heads of 21"),
    ({"log_size": torch.zeros(B, N).double()}, "log_size is torch.float64"),
    ({"log_size": torch.zeros(B, 1)}, "log_size is .* of shape"),
    ({"log_size": apart(B, N)}, "log_size is not contiguous"),
)

TABLE, CODES = torch.zeros(H, 9), torch.zeros(B, N, dtype=torch.int32)
BIASES = each(
    "attend attend_match",
    ({"bias": Bias(torch.zeros(H + 1, 9), CODES, CODES)}, "table of a bias"),
    ({"bias": Bias(TABLE.half(), CODES, CODES)}, "table is torch.float16"),
    ({"bias": Bias(apart(H, 9), CODES, CODES)}, "table is not contiguous"),
    ({"bias": Bias(TABLE, CODES.long(), CODES)}, "row_code is torch.int64"),
    ({"bias": Bias(TABLE, CODES[:1], CODES)}, "row_code is .* of shape"),
    ({"bias": Bias(TABLE, CODES, CODES[:, :3])}, "column_code is .* of shape"),
    ({"bias": Bias(TABLE, CODES, apart(B, N, dtype=torch.int32))}, "column_code is not contiguous"),
)

MATCHING = [
    *each(
        "attend_match",
        ({"q": torch.randn(B, 3, C)}, "3 queries for 20 keys"),
        ({"found": torch.randn(B, N, D).double()}, "metric is torch.float64"),
        ({"found": torch.randn(B, N, C)}, "metric is .* of shape"),
        ({"found": apart(B, N, D)}, "metric is not contiguous"),
    ),
    *each(
        "attend_match match",
        ({"r": 10}, "r is 10; it must be between 1 and 9"),
        ({"r": 0}, "r is 0"),
        ({"r": 8, "num_prefix_tokens": 5}, "r is 8; it must be between 1 and 7"),
    ),
    *each(
        "match",
        ({"metric": torch.randn(B, N, D).half()}, "metric is torch.float16"),
        ({"metric": torch.randn(N, D)}, "metric has shape"),
        ({"metric": apart(B, N, D)}, "metric is not contiguous"),
    ),
    *each("metric", ({"k": apart(B, N, C)}, "k of shape"), ({"k": torch.randn(B, N, 24)}, "heads of 12")),
]

ROTARY = each(
    "rotate",
    ({"q": apart(B, N, C)}, "q of shape"),
    ({"k": apart(B, N, C)}, "k of shape"),
    ({"q": torch.randn(B, N, C).half()}, "q is torch.float16"),
    ({"table": torch.randn(N, 2 * D)}, "rotary table has shape"),
    ({"table": torch.randn(3, N, 2 * D)}, "rotary table has shape"),
    ({"table": torch.randn(B, N - 1, 2 * D)}, "rotary table has shape"),
    ({"table": torch.randn(B, N, D)}, "rotary table has shape"),
    ({"table": apart(B, N, 2 * D)}, "table is not contiguous"),
    ({"size": torch.ones(B, N).long()}, "size is torch.int64"),
    ({"size": apart(B, N)}, "size is not contiguous"),
    ({"num_heads": 5}, "5 heads of 12.8"),
)

SUMS = [
    *each(
        "norm add_norm merge_add_norm",
        ({"x": apart(B, N, C)}, "x is not contiguous"),
        ({"offset": torch.ones(C).half()}, "offset is torch.float16"),
        ({"offset": torch.ones(1)}, "offset is .* of shape"),
        ({"norm": Norm(torch.ones(1), None, 1e-6)}, "weight is .* of shape"),
        ({"norm": Norm(torch.ones(2 * C)[::2], None, 1e-6)}, "weight is not contiguous"),
        ({"norm": Norm(torch.ones(C), torch.ones(C + 1), 1e-6)}, "bias is .* of shape"),
    ),
    *each(
        "add_norm merge_add_norm",
        ({"y": apart(B, N, C)}, "y is not contiguous"),
        ({"y": torch.randn(B, N + 1, C)}, "y has shape"),
        ({"y": torch.randn(B + 1, N, C)}, "y has shape"),
        ({"y": torch.randn(B, N, 1)}, "y is .* of shape"),
        ({"scale": torch.ones(2 * C)[::2]}, "scale is not contiguous"),
        ({"scale": torch.ones(1)}, "scale is .* of shape"),
    ),
]

GROUPS = groups()
MERGES = [
    *each(
        "merge_add_norm merge_sums",
        ({"groups": GROUPS._replace(keep=GROUPS.keep.long())}, "keep is torch.int64"),
        ({"groups": GROUPS._replace(src=GROUPS.src[:, :3])}, "src is .* of shape"),
        ({"groups": GROUPS._replace(first=GROUPS.first[:, :-1])}, "first is .* of shape"),
        ({"groups": Groups(*(index[:1] for index in GROUPS))}, "keep is .* of shape"),
        ({"groups": GROUPS._replace(keep=GROUPS.keep.t().contiguous().t())}, "keep is not contiguous"),
    ),
    *each(
        "merge_add_norm",
        ({"size": torch.ones(B, N).half()}, "size is torch.float16"),
        ({"size": torch.ones(B, 1)}, "size is .* of shape"),
        ({"size": apart(B, N)}, "size is not contiguous"),
    ),
    *each("merge_sums", ({"sums": apart(B, N, 7)}, "sums is not contiguous")),
]

PATCHES = each(
    "cut",
    ({"images": torch.randn(B, 32, 48, 3).permute(0, 3, 1, 2)}, "images are not contiguous"),
    ({"images": torch.randn(3, 32, 48)}, "images are not contiguous in four dimensions"),
    ({"images": torch.randn(B, 3, 32, 40)}, r"patches of 16 pixels do not divide images of \(32, 40\)"),
    ({"images": torch.zeros(B, 40, 32, 3, dtype=torch.uint8)}, r"do not divide images of \(40, 32\)"),
)

ODD = {"a": torch.ones(B, N, 24).to(FLOAT8), "weight": torch.ones(C, 24).to(FLOAT8)}
PRODUCTS = [
    *each(
        "linear_gelu8 accumulate8",
        ({"a": torch.randn(B, N, 32)}, "a is torch.float32"),
        ({"a": torch.randn(B, N, 48).to(FLOAT8)}, "a is .* of shape"),
        ({"a": apart(B, N, 32, dtype=FLOAT8)}, "a is not contiguous"),
        ({"weight": torch.randn(C, 32)}, "weight is torch.float32"),
        ({"weight": apart(C, 32, dtype=FLOAT8)}, "weight is not contiguous"),
        (ODD, "weights of 64 x 24 are not multiples of 16"),
        ({"bias": torch.zeros(1)}, "bias is .* of shape"),
        ({"bias": torch.zeros(2 * C)[::2]}, "bias is not contiguous"),
    ),
    *each(
        "accumulate8",
        ({"scale": torch.ones(1)}, "scale is .* of shape"),
        ({"x": apart(B, N, C)}, "x is not contiguous"),
        ({"x": torch.randn(B, N + 1, C)}, "x is .* of shape"),
        ({"x": torch.zeros(B, N, C, dtype=torch.int32)}, "x is torch.int32"),
    ),
]

CASES = ROWS + BIASES + MATCHING + ROTARY + SUMS + MERGES + PATCHES + PRODUCTS


def call(operation: str, operands: Operands) -> Any:
    return getattr(kernels, operation)(**operands)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_right_is_taken(operation: str) -> None:
    call(operation, OPERATIONS[operation]())


@pytest.mark.parametrize(("operation", "broken", "message"), CASES)
def test_what_a_gpu_would_misread_is_refused(operation: str, broken: Operands, message: str) -> None:
    operands = OPERATIONS[operation]()
    assert broken.keys() <= operands.keys()
    with pytest.raises(ValueError, match=message):
        call(operation, operands | broken)


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "cut" and not name.endswith("8")])
def test_float64_is_for_plain_pytorch(operation: str) -> None:
    """A CPU takes it; on a GPU, which stands here without one, it is refused."""

    def widest(operand: Any, device: str) -> Any:
        if isinstance(operand, tuple):
            return type(operand)(*(widest(one, device) for one in operand))
        if not isinstance(operand, Tensor):
            return operand
        made = torch.empty(operand.shape, dtype=operand.dtype, device=device)
        return made.double() if operand.ndim == 3 else made

    operands = OPERATIONS[operation]() | ({"bias": None} if operation == "attend" else {})
    with FakeTensorMode(), pytest.raises(ValueError, match="is torch.float64"):
        call(operation, {name: widest(operand, "cuda") for name, operand in operands.items()})


def test_one_image_may_lie_as_it_likes() -> None:
    """Its stride from image to image is never used."""
    k = torch.randn(3, 2 * N, C)[:1, :N]
    kernels.metric(k, H)
    kernels.attend(k[:, :1], k, k, None, None, H)


def test_tokens_may_lie_apart_from_each_other() -> None:
    k = torch.randn(B, 2 * N, C)[:, ::2]
    kernels.attend(k, k, k, None, None, H)


@pytest.mark.parametrize("D", [16, 24, 32, 64, 72, 80, 88, 96, 104, 120, 128])
def test_widths_of_heads_that_fit(D: int) -> None:
    assert kernels.fits_head(D)
    q, k, v = torch.randn(1, 5, 3 * D).split(D, dim=-1)
    kernels.attend(q, k, v, None, None, 1)


@pytest.mark.parametrize("D", [8, 12, 20, 136, 160])
def test_widths_of_heads_that_do_not(D: int) -> None:
    assert not kernels.fits_head(D)
    q, k, v = torch.randn(1, 5, 3 * D).split(D, dim=-1)
    with pytest.raises(ValueError, match=f"1 heads of {D}; heads must have a multiple of 8 from 16 to 128"):
        kernels.attend(q, k, v, None, None, 1)
