"""The bundled model in training: architecture, forward and backward pass under an `r`, and running average."""

from __future__ import annotations

import copy
from typing import Any, cast

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import tome_core
from tome_core.families.blocks import Halves
from training.loss import Answer, distance
from training.replay import Backward

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS: dict[str, Any] = {"img_size": 64, "patch_size": 4, "num_classes": 200}
AVERAGED_STEPS = 2000


class Student(nn.Module):
    """The model, and a projector from its features to the teacher's that only training needs.

    Args:
        teacher_width: Channels of the teacher's features.
    """

    def __init__(self, teacher_width: int) -> None:
        super().__init__()
        self.model = cast(VisionTransformer, timm.create_model(ARCHITECTURE, **MODEL_ARGS))
        self.projector = nn.Linear(self.model.num_features, teacher_width)


def backward_of(student: Student, gradients: Tensor, device: torch.device) -> Backward:
    """The forward and backward pass under a given `r`, from images and the teacher's answer to the loss.

    Args:
        student: Its gradients are views of `gradients`, which are zeroed in place because graphs write to them.
        gradients: One flat buffer.
        device: On a GPU the blocks are compiled and run in bfloat16.
    """
    merged = tome_core.wrap(student.model)
    on_gpu = device.type == "cuda"
    if on_gpu:
        compile_blocks(merged)

    def backward(r: int, images: Tensor, *taught: Tensor) -> Tensor:
        gradients.zero_()
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            tokens = merged.forward_tokens(images, r, prefix_only=True)
            answer = Answer(merged.forward_head(tokens), student.projector(tokens.x[:, 0]))
            loss = distance(answer, Answer(*taught))
        loss.backward()
        return loss.detach()

    return backward


def compile_blocks(merged: tome_core.MergedViT) -> None:
    """Compiles the halves of a block. A few graphs serve every block and every `r`, because the number of tokens is
    dynamic.
    """
    torch._dynamo.config.recompile_limit = 64  # some sizes get their own fusions, and so graphs
    halves = merged.family.halves(merged.family.blocks(merged.model)[0])
    compiled: list[Any] = [torch.compile(half, dynamic=True) for half in halves[:2]]
    family: Any = type(merged.family)()  # its own, because other models share theirs
    family.halves = lambda block: Halves(*compiled)
    merged.family = family


def decay_groups(module: nn.Module, weight_decay: float = 0.05) -> list[dict[str, object]]:
    """Weight decay only for matrices: not for biases, norms, the class token or positions."""
    matrices = [p for n, p in module.named_parameters() if p.ndim >= 2 and "token" not in n and "pos_embed" not in n]
    chosen = {id(p) for p in matrices}
    others = [p for p in module.parameters() if id(p) not in chosen]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


class Average:
    """The running average of a model's weights, which is the shipped model: over a tenth of the steps so far, at most
    `AVERAGED_STEPS`.

    Attributes:
        model: The averaged model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Adds the weights after a step, counted from 0."""
        weight = max(1 / AVERAGED_STEPS, 10 / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), weight)
