"""What the start of an engine leaves out: torch's compiler, and the first random weights of a model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from server.device.models import load_model
from server.device.torch_backend import one_thread
from server.device.unfilled import Unfilled
from server.model_spec import ModelSpec

ROOT = Path(__file__).resolve().parents[2]

LOADS_THE_BUNDLED_MODEL = """
import sys
from server.device.models import load_model
from server.device.torch_backend import one_thread
from server.model_spec import ModelSpec
load_model(ModelSpec.model_validate("bundled"))
print("torch._dynamo" in sys.modules)
"""

USES_THE_COMPILER_LATER = """
import sys
import server.device
import torch
from timm.layers import disable_compiler
from torchvision.ops import roi_align

@disable_compiler
def kept_out(x):
    return x - 1 if torch.compiler.is_compiling() else x + 1

assert "torch._dynamo" not in sys.modules
assert kept_out(torch.zeros(1)) == 1
assert roi_align(torch.ones(1, 1, 4, 4), [torch.tensor([[0.0, 0.0, 2.0, 2.0]])], 1).item() == 1
compiled = torch.compile(lambda x: 2 * kept_out(x), backend="eager")
print(compiled(torch.zeros(1)).item(), torch._dynamo.utils.is_compile_supported("cpu"))
"""


def said_by(program: str) -> str:
    """What a program prints in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_a_model_is_loaded_without_torchs_compiler() -> None:
    assert said_by(LOADS_THE_BUNDLED_MODEL) == "False"


def test_the_compiler_works_once_somebody_asks_for_it() -> None:
    assert said_by(USES_THE_COMPILER_LATER).split()[0] == "2.0"


def test_loading_weights_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    load_model(ModelSpec.model_validate("bundled"))
    assert torch.equal(torch.get_rng_state(), before)


def test_one_thread_loads_and_the_others_are_back_afterwards() -> None:
    torch.set_num_threads(2)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)  # as every test has it


SMALL: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"embed_dim": 48, "num_heads": 3},
    "eva02_tiny_patch14_224": {"embed_dim": 48, "num_heads": 3},
    "vit_small_patch16_dinov3_qkvb": {"embed_dim": 48, "num_heads": 3},
    "vit_small_patch16_rope_mixed_224": {"embed_dim": 48, "num_heads": 3},
    "vit_relpos_small_patch16_224": {"embed_dim": 48, "num_heads": 3},
    "beit_base_patch16_224": {"embed_dim": 48, "num_heads": 3},
    "naflexvit_base_patch16_gap": {"embed_dim": 48, "num_heads": 3},
}


@pytest.mark.parametrize("name", SMALL)
def test_a_model_without_first_weights_is_the_same_once_its_weights_are_loaded(name: str) -> None:
    plain = timm.create_model(name, depth=2, **SMALL[name])
    torch.use_deterministic_algorithms(True)  # torch then fills fresh memory with NaN
    try:
        with Unfilled():
            lean = timm.create_model(name, depth=2, **SMALL[name])
    finally:
        torch.use_deterministic_algorithms(False)
    lean.load_state_dict(plain.state_dict())
    for (one, ours), (other, theirs) in zip(lean.named_buffers(), plain.named_buffers(), strict=True):
        assert one == other and torch.equal(ours, theirs), one
    for one, ours in lean.named_parameters():
        assert torch.equal(ours, plain.get_parameter(one)), one


def test_shapes_alone_are_made_of_nothing() -> None:
    with torch.device("meta"), Unfilled():
        model = timm.create_model("vit_tiny_patch16_224", depth=2)
    wanted = timm.create_model("vit_tiny_patch16_224", depth=2).state_dict()
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in wanted.items()
    }
    assert all(tensor.is_meta for tensor in model.state_dict().values())
