"""Products with their endings against plain PyTorch: the tiles by float32 operands, the arithmetic on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.core.operands import DEVICE, agree, random
from tome_core.kernels import FLOAT8, operators, products8, reference

pytestmark = pytest.mark.usefixtures("by_kernels")


@pytest.fixture
def five_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer than there are tiles, so that a program computes several."""
    monkeypatch.setattr(products8, "_num_processors", lambda device: 5)


interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="float32 operands do not fit into a GPU's tiles")


@interpreted
@pytest.mark.usefixtures("five_programs")
@pytest.mark.parametrize(("M", "K", "N"), [(1, 16, 16), (129, 160, 272), (300, 384, 528), (1300, 16, 272)])
def test_every_tile_is_computed_once(M: int, K: int, N: int) -> None:
    """The interpreter cannot multiply float8; how tiles are cut, ended and stored is the same in float32."""
    a, weight, bias, scale = random(1, M, K), random(N, K), random(N), random(N)
    factor = K**-0.5
    got = products8.linear_gelu8(a, weight, bias, factor, 2.0)
    agree(got, reference.linear_gelu8(a, weight, bias, factor, 2.0))
    for added, scaled in ((None, None), (bias, None), (bias, scale), (None, scale)):
        x = random(1, M, N)
        wanted = x.clone()
        products8.accumulate8(x, a, weight, added, scaled, factor)
        reference.accumulate8(wanted, a, weight, added, scaled, factor)
        agree(x, wanted)


@interpreted
@pytest.mark.usefixtures("five_programs")
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # to infinity, as a GPU does without a word
def test_gelu_of_any_number() -> None:
    y = torch.tensor([-1e4, -30.0, -5.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 5.0, 30.0, 1e4])
    weight = torch.zeros(16, 16)
    weight[:11, 0] = y
    a = torch.zeros(1, 1, 16)
    a[..., 0] = 1
    got = products8.linear_gelu8(a, weight, torch.zeros(16), 1.0, 1.0)
    torch.testing.assert_close(got, reference.linear_gelu8(a, weight, torch.zeros(16), 1.0, 1.0))


def test_no_number_of_rows_waits_for_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are as many as a batch has tokens: another number for every batch size and every r."""
    constants = []
    monkeypatch.setattr(products8, "_num_processors", lambda device: 132)
    monkeypatch.setattr(products8, "_launch", lambda *args, **kwargs: constants.append(args[3]))
    for M in (1, 300, 20000):
        products8.accumulate8(random(1, M, 272), random(1, M, 160), random(272, 160), None, None, 1.0)
    assert constants[0] == constants[1] == constants[2]


def float8(*shape: int) -> torch.Tensor:
    return (4 * random(*shape)).to(FLOAT8)


@pytest.mark.gpu
@pytest.mark.parametrize(("M", "K", "N"), [(1, 384, 1536), (20000, 384, 1536), (4097, 1152, 432)])
def test_products_in_float8(M: int, K: int, N: int) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("only Hopper and newer multiply in float8 so")
    a, weight, bias, scale = float8(1, M, K), float8(N, K), random(N, dtype=torch.bfloat16), random(N)
    factor, scale = K**-0.5 / 16, scale.bfloat16()
    got = operators.linear_gelu8(a, weight, bias, factor, 8.0).float()
    wanted = reference.linear_gelu8(a, weight, bias, factor, 8.0).float()
    assert (got - wanted).norm() < 0.05 * wanted.norm()  # here and there a step of float8
    assert ((got - wanted).abs() <= 0.13 * wanted.abs() + 0.1).all()
    for scaled in (None, scale):
        x = random(1, M, N, dtype=torch.bfloat16)
        summed = x.float()
        operators.accumulate8(x, a, weight, bias, scaled, factor)
        reference.accumulate8(summed, a, weight, bias, scaled, factor)
        agree(x, summed)
