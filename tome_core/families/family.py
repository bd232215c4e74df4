"""What a family of models must offer so that tokens can be merged in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn


class UnsupportedModelError(TypeError):
    """The model has no known place where merging is right; the message names its class and what is supported."""


class Family(Protocol):
    """An adapter to one family of timm models. It holds no state: model and tokens come as arguments.

    In every method `size` is (B, N) float32, or None while each token stands for itself.
    """

    @property
    def model_classes(self) -> tuple[type[nn.Module], ...]:
        """The exact model classes that it serves."""
        ...

    def check(self, model: nn.Module) -> None:
        """Raises UnsupportedModelError where merging in this variant of the class would be wrong."""
        ...

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The transformer blocks, in order."""
        ...

    def num_prefix_tokens(self, model: nn.Module) -> int:
        """Leading tokens that never merge: class, distillation, registers."""
        ...

    def num_tokens(self, model: nn.Module) -> int:
        """Tokens that enter the first block at the model's own input size, prefix included."""
        ...

    def embed(self, model: nn.Module, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the tokens (B, N, C) that enter the first block."""
        ...

    def block(self, block: nn.Module, x: Tensor, size: Tensor | None) -> Tensor:
        """A whole block that merges nothing, with proportional attention: timm's own, bit for bit, at size None."""
        ...

    def attend(self, block: nn.Module, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
        """The attention half of a block: tokens after its residual (B, N, C), and the metric to match (B, N, D)."""
        ...

    def feed_forward(self, block: nn.Module, x: Tensor) -> Tensor:
        """The MLP half of a block."""
        ...

    def norm(self, model: nn.Module, x: Tensor) -> Tensor:
        """The norm after the last block."""
        ...

    def head(self, model: nn.Module, x: Tensor, size: Tensor | None) -> Tensor:
        """Normalised tokens to logits (B, K); a pooled token counts as often as its size."""
        ...
