"""A merging model at one `r`: a module whose only input is images, for compilers and exporters."""

from __future__ import annotations

from types import FunctionType, MethodType

from torch import Tensor, nn

from tome_core.schedule import RLike, resolve
from tome_core.vit import MergedViT


class FixedR(nn.Module):
    """A merging model at one `r`: `FixedR(merged, 8)(images)` is `merged(images, 8)`.

    Token counts depend on the schedule alone, so this is one graph without a branch, as `torch.compile`,
    `torch.export`, ONNX and CUDA graphs need it. It shares the model's weights. Make one for each `r`; any number of
    them can be compiled in one process.

    Args:
        merged: The merging model.
        r: Tokens merged in each block: a number, a list of one per block, or a Ramp; None means `merged.r`.

    Attributes:
        merged: The merging model.
        schedule: `r` of each block, before clipping.

    Raises:
        ValueError: r is negative, or lists more blocks than there are.
    """

    def __init__(self, merged: MergedViT, r: RLike | None = None) -> None:
        super().__init__()
        self.merged = merged
        self.schedule = resolve(merged.r if r is None else r, merged.num_blocks)
        self.training = merged.training
        merged.at(self.schedule)  # tuned numbers are put in place before a compiler looks on
        # torch.compile counts recompilations by code object, whatever the instance, and fails at the ninth. A copy of
        # its own gives each instance a count of its own; isolate_recompiles=True does so too, in newer torch.
        forward = type(self).forward
        own = FunctionType(forward.__code__.replace(), forward.__globals__, forward.__name__)
        self.forward = MethodType(own, self)  # type: ignore[method-assign]

    def forward(self, images: Tensor) -> Tensor:
        """Classifies images (B, 3, H, W), normalised as the model wants them; gives logits (B, K)."""
        logits: Tensor = self.merged(images, self.schedule)
        return logits
