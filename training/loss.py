"""The student's loss: its distance from the teacher's answer for the same pixels.

It uses no labels. Beyer et al., Knowledge distillation: a good teacher is patient and consistent, CVPR 2022: both see
exactly the same augmented and mixed image, and training is long.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from tome_core.tuning import divergence

TEMPERATURE = 2.0
SHARE_OF_FEATURES = 1.0  # weight of the features beside the logits


class Answer(NamedTuple):
    """A model's answer for a batch: logits (B, K), and the class token that they come from, (B, C)."""

    logits: Tensor
    features: Tensor


def distance(student: Answer, teacher: Answer) -> Tensor:
    """The distance of the student from the teacher, a scalar.

    The divergence of the softened probabilities, times the temperature's square so that its gradient does not depend on
    it (Hinton et al., Distilling the knowledge in a neural network, 2015), plus the mean squared error of features
    against the teacher's, normalised. The logits alone say little about directions in which no class is likely.
    """
    logits = divergence(student.logits.float() / TEMPERATURE, teacher.logits.float() / TEMPERATURE)
    wanted = F.layer_norm(teacher.features.float(), teacher.features.shape[1:])
    return logits * TEMPERATURE**2 + SHARE_OF_FEATURES * F.mse_loss(student.features.float(), wanted)
