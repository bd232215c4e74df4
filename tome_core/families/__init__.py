"""Model families: one small adapter each, and the choice among them. The only files of tome_core that know timm."""

from __future__ import annotations

from torch import nn

from tome_core.families.beit import BeitFamily
from tome_core.families.eva import EvaFamily
from tome_core.families.family import Embedded, Family, Images, UnsupportedModelError
from tome_core.families.naflexvit import NaFlexFamily
from tome_core.families.others import refusal
from tome_core.families.relpos import RelPosFamily
from tome_core.families.vit import ViTFamily
from tome_core.families.vlm import VisionTowerFamily

FAMILIES: tuple[Family, ...] = (
    ViTFamily(),
    EvaFamily(),
    NaFlexFamily(),
    RelPosFamily(),
    BeitFamily(),
    VisionTowerFamily(),
)


def family_of(model: nn.Module) -> Family:
    """Finds the adapter of a timm model, by its exact class: a subclass may compute something else.

    Raises:
        UnsupportedModelError: No family knows the class, or its family cannot merge this variant of it.
    """
    for family in FAMILIES:
        if type(model) in family.model_classes:
            family.check(model)
            return family
    raise UnsupportedModelError(refusal(model, [cls for family in FAMILIES for cls in family.model_classes]))


__all__ = ["Embedded", "Family", "Images", "UnsupportedModelError", "family_of"]
