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
    for ending in ((None, None), (bias, None), (bias, scale), (None, scale)):
        x = random(1, M, N)
        wanted = x.clone()
        products8.accumulate8(x, a, weight, *ending, factor)
        reference.accumulate8(wanted, a, weight, *ending, factor)
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


def float8(*shape: int) -> torch.Tensor:
    return (4 * random(*shape)).to(FLOAT8)


@pytest.mark.gpu
@pytest.mark.parametrize(("K", "N"), [(384, 1536), (1152, 432)])
@pytest.mark.parametrize("M", [1, 300, 4097, 20000])
def test_products_in_float8(K: int, N: int, M: int) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("only Hopper and newer multiply in float8 so")
    a, weight, bias, scale = float8(1, M, K), float8(N, K), random(N, dtype=torch.bfloat16), random(N)
    factor, scale = K**-0.5 / 16, scale.bfloat16()
    got = operators.linear_gelu8(a, weight, bias, factor, 8.0).float()
    wanted = reference.linear_gelu8(a, weight, bias, factor, 8.0).float()
    assert (got - wanted).norm() < 0.03 * wanted.norm()  # a step of float8 where tanh.approx is off by some
    assert ((got - wanted).abs() <= 0.13 * wanted.abs() + 0.1).all()
    for ending in ((bias, None), (bias, scale)):
        x = random(1, M, N, dtype=torch.bfloat16)
        summed = x.float()
        operators.accumulate8(x, a, weight, *ending, factor)
        reference.accumulate8(summed, a, weight, *ending, factor)
        agree(x, summed)
