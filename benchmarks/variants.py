"""Alternatives to token merging, and to the paper's choices one at a time, in minimal form.

They wrap a timm model like `tome_core.wrap`, remove as many tokens in the same place, and share the shortcut of the
last block. They are for `benchmarks.accuracy`, not for serving.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from tome_core import MergedViT
from tome_core.families.attention import heads
from tome_core.matching import MergePlan, match
from tome_core.merging import gather_tokens, merge
from tome_core.positions import Position
from tome_core.tokens import Tokens


class Variant(MergedViT):
    """Token merging in three parts, of which a variant replaces one; without replacement it is the library's.

    Attributes:
        first_image: Place of the batch's first image among all: randomness depends on the image, not on its batch.

    Raises:
        ValueError: The model is not a `VisionTransformer` of plain blocks with a class token.
    """

    first_image = 0

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, "plain")
        plain = all(type(b) is Block and type(b.attn) is Attention for b in self.family.blocks(model))
        if type(model) is not VisionTransformer or not plain or not model.has_class_token:
            raise ValueError(
                f"{type(self).__name__} is written for a VisionTransformer of plain blocks with a class token, "
                f"not for this {type(model).__name__}"
            )

    def _merge(self, block: nn.Module, tokens: Tokens, keys: Tensor, r: int, track: bool) -> Tokens:
        assert not track
        return Tokens(*self.combine(self.plan(self.metric(tokens, keys), r), tokens))

    def metric(self, tokens: Tokens, keys: Tensor) -> Tensor:
        """The metric of tokens, (B, N, D), from the keys (B, num_heads, N, D)."""
        return keys.mean(dim=1, dtype=torch.float32)

    def plan(self, metric: Tensor, r: int) -> MergePlan:
        """The plan of r merges."""
        return match(metric, r, self.num_prefix_tokens)

    def combine(self, plan: MergePlan, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """The tokens left, (B, M, C), and their sizes, (B, M)."""
        return merge(plan, tokens.x, tokens.size)

    def random(self, like: Tensor) -> Tensor:
        """A random number from 0 to 1 for each token of `like` (B, N, ...), by image and number of tokens: (B, N)."""
        B, N = like.shape[:2]
        seeds = ((self.first_image + b) * 2**16 + N for b in range(B))
        rows = [torch.rand(N, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(rows).to(like.device)

    def drop(self, tokens: Tokens, score: Tensor, r: int) -> Tokens:
        """The tokens without the r patches of lowest score (B, N), in order."""
        prefix = torch.arange(self.num_prefix_tokens, device=score.device).expand(len(score), -1)
        patches = score[:, self.num_prefix_tokens :]
        kept = patches.topk(patches.shape[1] - r, dim=1).indices.sort(dim=1).values
        return Tokens(gather_tokens(tokens.x, torch.cat([prefix, self.num_prefix_tokens + kept], dim=1)))


class PruneAttention(Variant):
    """Drops the patches that the class token attends to least, in the mean over heads."""

    def _attend(
        self, block: nn.Module, tokens: Tokens, position: Position, num_queries: int | None
    ) -> tuple[Tensor, Tensor]:
        x, keys = super()._attend(block, tokens, position, num_queries)
        query, _, _ = project(block, tokens.x[:, :1])
        scores = query.float() @ keys.float().transpose(2, 3) * keys.shape[-1] ** -0.5
        return x, scores.softmax(dim=-1)  # (B, num_heads, 1, N)

    def _merge(self, block: nn.Module, tokens: Tokens, keys: Tensor, r: int, track: bool) -> Tokens:
        return self.drop(tokens, keys.mean(dim=(1, 2)), r)


class PruneRandom(Variant):
    """Drops patches at random."""

    def _merge(self, block: nn.Module, tokens: Tokens, keys: Tensor, r: int, track: bool) -> Tokens:
        return self.drop(tokens, self.random(tokens.x), r)


class MetricX(Variant):
    """Compares features instead of keys: those after attention, which merge."""

    def metric(self, tokens: Tokens, keys: Tensor) -> Tensor:
        return tokens.x


class MetricQ(Variant):
    """Compares queries instead of keys."""

    def _attend(
        self, block: nn.Module, tokens: Tokens, position: Position, num_queries: int | None
    ) -> tuple[Tensor, Tensor]:
        x, _ = super()._attend(block, tokens, position, num_queries)
        return x, project(block, tokens.x)[0]


class MetricV(Variant):
    """Compares values instead of keys."""

    def _attend(
        self, block: nn.Module, tokens: Tokens, position: Position, num_queries: int | None
    ) -> tuple[Tensor, Tensor]:
        x, _ = super()._attend(block, tokens, position, num_queries)
        return x, project(block, tokens.x)[2]


class ConcatHeads(Variant):
    """Compares the keys of all heads side by side instead of their mean."""

    def metric(self, tokens: Tokens, keys: Tensor) -> Tensor:
        return keys.transpose(1, 2).flatten(2)


class DotProduct(Variant):
    """Compares keys by their dot product instead of their cosine."""

    def metric(self, tokens: Tokens, keys: Tensor) -> Tensor:
        metric = super().metric(tokens, keys)
        # An extra feature, which the compared tokens lack, brings every token to the longest one's length. A cosine is
        # then the dot product over that length squared.
        squared = metric.square().sum(dim=-1, keepdim=True)
        missing = (squared.amax(dim=1, keepdim=True) - squared).sqrt()
        is_src = (torch.arange(metric.shape[1], device=metric.device) % 2 == 0)[:, None]
        return torch.cat([metric, missing * is_src, missing * ~is_src], dim=-1)


class SequentialPartition(Variant):
    """Merges the first half of the patches into the second half."""

    def plan(self, metric: Tensor, r: int) -> MergePlan:
        return self.partitioned(metric, r, torch.arange(metric.shape[1], device=metric.device).expand(metric.shape[:2]))

    def partitioned(self, metric: Tensor, r: int, order: Tensor) -> MergePlan:
        """The plan with the first patches in `order` (B, N) as src and the others as dst."""
        N, prefix = metric.shape[1], self.num_prefix_tokens
        places = torch.arange(N, device=metric.device)
        odd_last = (places % 2).masked_fill(places < prefix, -1).argsort(stable=True)  # the places of src, then of dst
        order = order.gather(1, odd_last.argsort().expand_as(order))
        plan = match(gather_tokens(metric, order), r, prefix)
        return MergePlan(order.gather(1, plan.keep), order.gather(1, plan.src), plan.dst)


class RandomPartition(SequentialPartition):
    """Merges a random half of the patches into the other half."""

    def plan(self, metric: Tensor, r: int) -> MergePlan:
        random = self.random(metric)
        random[:, : self.num_prefix_tokens] = -1
        return self.partitioned(metric, r, random.argsort(dim=1, stable=True))


class PlainMean(Variant):
    """Merges into the plain mean: a token of size 5 counts as one of size 1."""

    def combine(self, plan: MergePlan, tokens: Tokens) -> tuple[Tensor, Tensor]:
        return merge(plan, tokens.x)[0], merge(plan, tokens.x, tokens.size)[1]


class KeepDst(Variant):
    """Keeps dst unchanged: src is dropped, but attention still counts it."""

    def combine(self, plan: MergePlan, tokens: Tokens) -> tuple[Tensor, Tensor]:
        return gather_tokens(tokens.x, plan.keep), merge(plan, tokens.x, tokens.size)[1]


class PlainAttention(Variant):
    """Attends to a token of any size as to one."""

    def _attend(
        self, block: nn.Module, tokens: Tokens, position: Position, num_queries: int | None
    ) -> tuple[Tensor, Tensor]:
        return super()._attend(block, tokens._replace(size=None), position, num_queries)


METHODS: dict[str, type[MergedViT]] = {
    "tome": MergedViT,
    "prune-attention": PruneAttention,
    "prune-random": PruneRandom,
}
"""Methods that remove r tokens after every block."""

CHOICES: dict[str, type[MergedViT]] = {
    "metric-x": MetricX,
    "metric-q": MetricQ,
    "metric-v": MetricV,
    "concat-heads": ConcatHeads,
    "dot-product": DotProduct,
    "sequential-partition": SequentialPartition,
    "random-partition": RandomPartition,
    "plain-mean": PlainMean,
    "keep-dst": KeepDst,
    "plain-attention": PlainAttention,
}
"""Token merging with one of the paper's choices replaced."""


def project(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a plain block, (B, num_heads, N, D) each, from its input (B, N, C)."""
    attn = block.attn
    q, k, v = (heads(t, attn.num_heads) for t in attn.qkv(block.norm1(x)).chunk(3, dim=-1))
    return attn.q_norm(q), attn.k_norm(k), v
