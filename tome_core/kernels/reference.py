"""The fused operations in plain PyTorch: the reference of the kernels, and the implementation without them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tome_core.attention import proportional_attention
from tome_core.kernels.groups import Groups, groups_of, plan_of
from tome_core.kernels.norms import Norm
from tome_core.kernels.relative import LOG2_E, Bias
from tome_core.matching import match as match_plan
from tome_core.merging import merge
from tome_core.precision import full_precision, widened


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_size: Tensor | None,
    bias: Bias | None,
    num_heads: int,
) -> Tensor:
    """Proportional attention over heads that lie side by side: softmax(q k^T / sqrt(D) + log s + bias) v.

    Args:
        q: Queries of the leading M tokens, (B, M, C); C = num_heads * D.
        k: Keys, (B, N, C).
        v: Values, (B, N, C).
        log_size: log2 of the sizes s of the tokens, (B, N) float32, or None for sizes of 1.
        bias: Bias by relative position, or None.
        num_heads: Heads.

    Returns:
        (B, M, C).

    Source: Bolya et al., Token Merging, ICLR 2023, equation 1.
    """
    size = None if log_size is None else log_size.exp2()
    pairs = None
    if bias is not None:
        code = bias.row_code[:, : q.shape[1], None] + bias.column_code[:, None, :]
        pairs = (bias.table / LOG2_E)[:, code].transpose(0, 1)
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    return proportional_attention(q, k, v, size, pairs).transpose(1, 2).flatten(2)


def metric(k: Tensor, num_heads: int) -> Tensor:
    """The metric of tokens: keys averaged over heads and scaled to length 1, (B, N, C) to (B, N, D) float32."""
    with full_precision(k.device):
        mean = widened(k).unflatten(-1, (num_heads, -1)).mean(dim=2)
        return F.normalize(mean, dim=-1)


def rotate(
    q: Tensor, k: Tensor, table: Tensor, size: Tensor | None, num_heads: int, halved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotary embedding of queries and keys, and the metric of the keys before it.

    Args:
        q: Queries of the leading M tokens, (B, M, C); C = num_heads * D.
        k: Keys, (B, N, C).
        table: Sines, then cosines, summed over the members of each token: (1 or B, N, 2D) for all heads, or (1 or B, N,
            num_heads * 2D).
        size: Members of each token, (B, N) float32, or None for one each.
        num_heads: Heads.
        halved: Whether channel d is rotated with channel d + D/2; otherwise with its neighbour.

    Returns:
        Queries (B, M, C) and keys (B, N, C), contiguous, and the metric of `metric`, (B, N, D).
    """
    found = metric(k, num_heads)
    wide = widened(table) if size is None else widened(table) / size[..., None]
    q, k = (_turned(t, wide[:, : t.shape[1]], num_heads, halved) for t in (q, k))
    return q, k, found


def _turned(x: Tensor, table: Tensor, num_heads: int, halved: bool) -> Tensor:
    heads = x.unflatten(-1, (num_heads, -1))
    sine, cosine = table.unflatten(-1, (-1, 2 * heads.shape[-1])).chunk(2, dim=-1)
    wide = widened(heads)
    turned = wide * cosine + _quarter_turn(wide, halved) * sine
    by_token: Tensor = turned.to(x.dtype).flatten(2)
    return by_token


def _quarter_turn(x: Tensor, halved: bool) -> Tensor:
    """Each pair of channels (a, b) as (-b, a)."""
    pairs = x.unflatten(-1, (2, -1)) if halved else x.unflatten(-1, (-1, 2)).transpose(-2, -1)
    first, second = pairs.unbind(dim=-2)
    turned = torch.stack([-second, first], dim=-2)
    return (turned if halved else turned.transpose(-2, -1)).flatten(-2)


def match(metric: Tensor, r: int, num_prefix_tokens: int) -> Groups:
    """Chooses the r most similar pairs, by the rules of `tome_core.matching.match`. r must fit.

    Args:
        metric: (B, N, D) float32, rows of length 1 or 0.
        r: Pairs to merge, 1 or more.
        num_prefix_tokens: Leading tokens that never merge.
    """
    return groups_of(match_plan(metric, r, num_prefix_tokens))


def attend_match(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_size: Tensor | None,
    bias: Bias | None,
    found: Tensor | None,
    num_heads: int,
    r: int,
    num_prefix_tokens: int,
) -> tuple[Tensor, Groups]:
    """Attention of all tokens, and the pairs that merge after it. The two are independent.

    Args:
        q, k, v, log_size, bias, num_heads: See `attend`; with a query for each key.
        found: The metric if it is not that of the keys k, in the form of `metric`; or None.
        r, num_prefix_tokens: See `match`.
    """
    groups = match(metric(k, num_heads) if found is None else found, r, num_prefix_tokens)
    return attend(q, k, v, log_size, bias, num_heads), groups


def norm(x: Tensor, offset: Tensor | None, norm: Norm, dtype: torch.dtype, multiplier: float) -> Tensor:
    """A norm of x + offset.

    Args:
        x: Tokens, (B, N, C).
        offset: A constant that is not yet added to the tokens, (C,) float32, or None.
        norm: The norm.
        dtype: Dtype of the result.
        multiplier: Factor of the result.
    """
    return _normed(widened(x), offset, norm, dtype, multiplier)


def add_norm(
    x: Tensor,
    y: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    norm: Norm,
    dtype: torch.dtype,
    multiplier: float,
) -> tuple[Tensor, Tensor]:
    """A residual sum and the norm that reads it.

    Args:
        x: Tokens, (1 or B, N, C).
        y: Added to the last tokens, (B, N or fewer, C).
        scale: LayerScale of y, (C,), or None for 1.
        offset, norm, dtype, multiplier: See `norm`.

    Returns:
        x + scale y in y's dtype, and the norm of that and the offset; both (B, N, C).
    """
    total = _sum(x, y, scale)
    return total.to(y.dtype), _normed(total, offset, norm, dtype, multiplier)


def merge_add_norm(
    groups: Groups,
    x: Tensor,
    y: Tensor | None,
    size: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    norm: Norm,
    dtype: torch.dtype,
    multiplier: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A residual sum, the merge of its tokens into size-weighted means, and the norm that reads these.

    Args:
        groups: The merge of N tokens into M.
        x: Tokens, (B, N, C).
        y: Added to them first, (B, N, C), or None.
        size: Token sizes, (B, N) float32, or None for sizes of 1.
        scale, offset, norm, dtype, multiplier: See `add_norm`.

    Returns:
        The merged tokens in x's dtype, and the norm of these and the offset, both (B, M, C); their sizes and log2 of
        these, (B, M) float32.
    """
    total, merged_size = merge(plan_of(groups), widened(x) if y is None else _sum(x, y, scale), size)
    normed = _normed(total, offset, norm, dtype, multiplier)
    return total.to(x.dtype), normed, merged_size, merged_size.log2()


def merge_sums(groups: Groups, sums: Tensor) -> Tensor:
    """Sums over the members of tokens, added up over the tokens that merge: (1 or B, N, K) to (B, M, K)."""
    plan = plan_of(groups)
    sums = sums.expand(groups.keep.shape[0], -1, -1)
    rows = torch.arange(plan.keep.shape[1], device=sums.device)
    with full_precision(sums.device):
        joins = (plan.dst[:, None, :] == rows[:, None]).to(sums.dtype)
        kept, lost = (sums.gather(1, index[..., None].expand(-1, -1, sums.shape[2])) for index in (plan.keep, plan.src))
        return torch.baddbmm(kept, joins, lost)


def cut(images: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    """Images as rows of their patches, for the product with a patch embedding's weights.

    Args:
        images: (B, channels, H, W) of a float dtype, or uint8 pixels (B, H, W, channels), from which 128 is subtracted:
            the result is exact in bfloat16, and half as large.
        patch: Side of a patch; it divides H and W.
        dtype: Dtype of the result.

    Returns:
        (B, patches, K): the values of a patch in the order of the image's memory, padded with zeros to a multiple of 8,
        without which products are slow.
    """
    if images.dtype == torch.uint8:
        rows = images.unflatten(2, (-1, patch)).unflatten(1, (-1, patch)).transpose(2, 3).flatten(3).flatten(1, 2)
        rows = rows.to(dtype) - 128
    else:
        rows = (
            images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2).to(dtype)
        )
    rows = rows.flatten(2)
    return F.pad(rows, (0, -rows.shape[2] % 8))


def linear_gelu8(a: Tensor, weight: Tensor, bias: Tensor, factor: float, multiplier: float) -> Tensor:
    """multiplier gelu(factor a weight^T + bias) in float8, GELU in its tanh form.

    Args:
        a: (B, N, K) in float8.
        weight: (C, K) in float8.
        bias: (C,).
        factor: Inverse of the scales of both.
        multiplier: The scale of the result.
    """
    y = F.gelu(F.linear(a.float(), weight.float()) * factor + bias.float(), approximate="tanh")
    return (y * multiplier).to(a.dtype)


def accumulate8(x: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, factor: float) -> None:
    """x += scale (factor a weight^T + bias), in place.

    Args:
        x: (B, N, C), contiguous.
        a, weight, factor: See `linear_gelu8`.
        bias: (C,), or None.
        scale: LayerScale, (C,), or None.
    """
    y = F.linear(a.float(), weight.float()) * factor
    y = y if bias is None else y + bias.float()
    x.add_((y if scale is None else y * scale.float()).to(x.dtype))


def _sum(x: Tensor, y: Tensor, scale: Tensor | None) -> Tensor:
    added = widened(y) if scale is None else widened(y) * widened(scale)
    return widened(x) + F.pad(added, (0, 0, x.shape[1] - y.shape[1], 0))


def _normed(x: Tensor, offset: Tensor | None, norm: Norm, dtype: torch.dtype, multiplier: float) -> Tensor:
    with full_precision(x.device):
        x = x if offset is None else x + offset.to(x.dtype)
        weight, bias = norm.weight.to(x.dtype), None if norm.bias is None else norm.bias.to(x.dtype)
        if norm.centred:
            return _stored(F.layer_norm(x, x.shape[-1:], weight, bias, norm.eps), dtype, multiplier)
        return _stored(x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * weight, dtype, multiplier)


def _stored(x: Tensor, dtype: torch.dtype, multiplier: float) -> Tensor:
    return (x if multiplier == 1 else widened(x) * multiplier).to(dtype)
