"""A timm model whose tokens merge: the forward loop. State travels in arguments and results, never in the module."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tome_core import schedule
from tome_core.families import family_of
from tome_core.matching import match
from tome_core.merging import merge, track_source
from tome_core.schedule import RLike


class Tokens(NamedTuple):
    """Tokens on their way through the model.

    Attributes:
        x: Features, (B, N, C).
        size: How many input tokens each stands for, (B, N) float32; None while nothing has merged.
        source: Row that now holds each input token, (B, N0) int64; None when not tracked, or nothing has merged.
    """

    x: Tensor
    size: Tensor | None = None
    source: Tensor | None = None


class MergedViT(nn.Module):
    """A Vision Transformer that merges `r` tokens in every block, between attention and MLP.

    It shares the weights of the timm model it wraps and leaves that model as it was. It keeps nothing between calls,
    so one instance serves every `r` from several threads.

    Attributes:
        model: The wrapped timm model, untouched.

    Source: Bolya et al., Token Merging, ICLR 2023.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.family = family_of(model)
        self.model = model
        self.num_blocks = len(self.family.blocks(model))
        self.num_prefix_tokens = self.family.num_prefix_tokens(model)
        self.num_tokens = self.family.num_tokens(model)
        self.max_r = schedule.max_r(self.num_tokens, self.num_prefix_tokens)
        self.training = model.training

    def forward(self, images: Tensor, r: RLike = 0) -> Tensor:
        """Classifies images.

        Args:
            images: (B, 3, H, W), normalised as the model wants them.
            r: Tokens merged in each block: a number, a list of one per block, or a Ramp. What a block cannot merge
                is clipped; `token_counts` shows the outcome.

        Returns:
            Logits, (B, K).

        Raises:
            ValueError: r is negative, or lists more blocks than there are.
        """
        tokens = self.forward_features(images, r)
        return self.family.head(self.model, tokens.x, tokens.size)

    def forward_features(self, images: Tensor, r: RLike = 0, *, track: bool = False) -> Tokens:
        """Runs all but the head.

        Args:
            images: (B, 3, H, W).
            r: As in `forward`.
            track: Whether to follow where each input token went (`Tokens.source`).

        Returns:
            The tokens after the final norm.
        """
        tokens = Tokens(self.family.embed(self.model, images))
        blocks = self.family.blocks(self.model)
        per_block = schedule.resolve(r, self.num_blocks)
        per_block = schedule.clip(per_block, tokens.x.shape[1], self.num_prefix_tokens)
        for block, block_r in zip(blocks, per_block, strict=True):
            if getattr(self.model, "grad_checkpointing", False):
                tokens = checkpoint(self._block, block, tokens, block_r, track, use_reentrant=False)
            else:
                tokens = self._block(block, tokens, block_r, track)
        return tokens._replace(x=self.family.norm(self.model, tokens.x))

    def token_counts(self, r: RLike = 0) -> tuple[int, ...]:
        """Tokens entering the first block, then leaving each block, at the model's own input size."""
        return schedule.token_counts(schedule.resolve(r, self.num_blocks), self.num_tokens, self.num_prefix_tokens)

    def _block(self, block: nn.Module, tokens: Tokens, r: int, track: bool) -> Tokens:
        if r == 0:
            return tokens._replace(x=self.family.block(block, tokens.x, tokens.size))
        x, metric = self.family.attend(block, tokens.x, tokens.size)
        plan = match(metric, r, self.num_prefix_tokens)
        x, size = merge(plan, x, tokens.size)
        source = track_source(plan, tokens.source) if track else None
        return Tokens(self.family.feed_forward(block, x), size, source)


def wrap(model: nn.Module) -> MergedViT:
    """Gives a timm model a dial: `merged(images, r=8)` merges 8 tokens in every block.

    Args:
        model: A timm Vision Transformer; it stays as it is and shares its weights.

    Returns:
        The merging model; at r=0 it computes what `model` computes.

    Raises:
        UnsupportedModelError: Merging is not known to be right in this model; the message says what is supported.
    """
    return MergedViT(model)
