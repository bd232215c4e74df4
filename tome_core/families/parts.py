"""timm's pre-norm blocks as fused operations: x + scale attention(norm(x)), then x + scale mlp(norm(x))."""

from __future__ import annotations

from typing import Any, NamedTuple

from timm.layers.activations import GELUTanh
from timm.layers.attention import Attention, AttentionRope
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.layers.norm import LayerNorm, LayerNormFp32, RmsNorm, RmsNormFp32
from timm.models import beit
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block
from timm.models.vision_transformer_relpos import RelPosAttention, RelPosBlock
from torch import Tensor, nn

from tome_core.families.family import Family
from tome_core.kernels import LARGEST_HEAD, SMALLEST_HEAD, Norm, fits_head, linear_gelu

try:
    from timm.models.deepseek_vit import DeepseekVitBlock
except ImportError:  # older timm
    BLOCKS: tuple[type[nn.Module], ...] = (Block, EvaBlock, RelPosBlock, beit.Block)
else:
    BLOCKS = (Block, EvaBlock, RelPosBlock, beit.Block, DeepseekVitBlock)

ATTENTIONS = (Attention, AttentionRope, EvaAttention, RelPosAttention, beit.Attention)


class Parts(NamedTuple):
    """The parts of a block.

    Attributes:
        norm1: The norm before attention.
        attn: The attention layer; `families.attention.project` gives its queries, keys and values.
        scale1: LayerScale of its output, (C,), or None.
        norm2: The norm before the MLP.
        mlp: The MLP.
        scale2: LayerScale of its output, or None.
    """

    norm1: Norm
    attn: Any
    scale1: Tensor | None
    norm2: Norm
    mlp: Any
    scale2: Tensor | None


def parts_of(block: Any) -> Parts:
    """Reads a block that can run fused."""
    norm1, norm2 = norm_of(block.norm1), norm_of(block.norm2)
    assert norm1 is not None and norm2 is not None
    return Parts(norm1, block.attn, _scale(block, 1), norm2, block.mlp, _scale(block, 2))


def norm_of(norm: nn.Module) -> Norm | None:
    """The numbers of a norm; None if it is not a LayerNorm or RMSNorm with weights."""
    weight: Any = getattr(norm, "weight", None)
    if weight is None:
        return None
    if type(norm) in (nn.LayerNorm, LayerNorm, LayerNormFp32):
        return Norm(weight, norm.bias, float(norm.eps))  # type: ignore[arg-type]
    if type(norm) in (RmsNorm, RmsNormFp32):
        return Norm(weight, None, float(norm.eps), centred=False)  # type: ignore[arg-type]
    return None


def output_of(mlp: Any) -> nn.Linear | None:
    """The last product of an MLP, which `hidden` leaves out; None if it cannot be separated."""
    last = mlp.fc2 if type(mlp) in (Mlp, GluMlp, SwiGLU) else None
    return last if type(last) is nn.Linear else None


def hidden(mlp: Any, n: Tensor) -> Tensor:
    """The input of the last product of an MLP that `output_of` knows."""
    if type(mlp) is Mlp:
        tanh = gelu_of(mlp)
        if tanh is None:
            h = mlp.act(mlp.fc1(n))
        else:
            h = linear_gelu(n, mlp.fc1.weight, mlp.fc1.bias, tanh)  # type: ignore[arg-type]  # `gelu_of` saw a bias
    elif type(mlp) is SwiGLU:
        h = mlp.act(mlp.fc1_g(n)) * mlp.fc1_x(n)
    else:
        first, second = mlp.fc1(n).chunk(2, dim=-1)
        h = first * mlp.act(second) if mlp.gate_last else mlp.act(first) * second
    normed: Tensor = mlp.norm(h)
    return normed


def gelu_of(mlp: Any) -> bool | None:
    """Whether an MLP's GELU is the tanh form (True) or exact (False); None if it has another activation, or no bias."""
    if type(mlp.fc1) is not nn.Linear or mlp.fc1.bias is None:
        return None
    act = mlp.act
    if type(act) is nn.GELU:
        return bool(act.approximate == "tanh")
    return True if type(act) is GELUTanh else None


def is_gelu_mlp(mlp: Any) -> bool:
    """Whether an MLP is only two products with GELU between them."""
    return type(mlp) is Mlp and gelu_of(mlp) is not None and type(mlp.norm) is nn.Identity


def reason_against(family: Family, model: Any) -> str | None:
    """Why a model's blocks cannot run fused; None if they can."""
    for i, block in enumerate(family.blocks(model)):
        found = _unlike(block)
        if found:
            return f"block {i} {found}"
    return None


def _unlike(block: Any) -> str | None:
    """The difference of a block from those that `parts_of` reads, or None."""
    if type(block) not in BLOCKS:
        return f"is a {type(block).__name__}"
    attn = block.attn
    if type(attn) not in ATTENTIONS:
        return f"has a {type(attn).__name__}"
    for norm in (block.norm1, block.norm2):
        if norm_of(norm) is None:
            return f"has a {type(norm).__name__}, not LayerNorm or RMSNorm with weights"
    if getattr(attn, "num_kv_heads", attn.num_heads) != attn.num_heads:
        return f"has {attn.num_kv_heads} heads of keys for {attn.num_heads} of queries"
    if type(attn.proj) is not nn.Linear:
        return f"projects the output of attention by a {type(attn.proj).__name__}"
    D = attn.proj.in_features // attn.num_heads
    if not fits_head(D):
        return f"has heads of {D} channels; fused: multiples of 8 from {SMALLEST_HEAD} to {LARGEST_HEAD}"
    for scale in (getattr(block, "ls1", None), getattr(block, "ls2", None)):
        if scale is not None and type(scale) not in (nn.Identity, LayerScale):
            return f"has a {type(scale).__name__}, not LayerScale"
    return None


def _scale(block: Any, half: int) -> Tensor | None:
    """LayerScale, which timm stores as a module, as a parameter, or not at all."""
    layer = getattr(block, f"ls{half}", None)
    if isinstance(layer, LayerScale):
        return layer.gamma
    scale: Tensor | None = getattr(block, f"gamma_{half}", None)
    return scale
