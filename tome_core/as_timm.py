"""The interface of timm's models: attributes, parameter groups for optimizers, intermediate features.

timm's optimizers, feature extractors and data configuration accept a merging model like the timm model inside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import nn

from tome_core import schedule
from tome_core.families.family import Family, Images
from tome_core.schedule import RLike
from tome_core.tokens import Tokens

PREFIX = "model."
"""Prefix of timm's parameter names in a merging model."""


class AsTimm(nn.Module):
    """A module around a timm model, `self.model`, with the interface of the timm model.

    An attribute that only the timm model has is read from it and set on it: `num_classes`, `pretrained_cfg`,
    `get_classifier()`, `reset_classifier(10)`, `set_grad_checkpointing()`, `set_input_size((384, 384))`, `head = ...`.
    """

    model: nn.Module
    family: Family

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("_modules", {}).get("model")
            if model is None or not hasattr(model, name):
                raise
        return getattr(model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        model = self.__dict__.get("_modules", {}).get("model")
        own = name in self.__dict__ or name in self.__dict__.get("_modules", {}) or hasattr(type(self), name)
        if model is None or own or not hasattr(model, name):
            super().__setattr__(name, value)
        else:
            setattr(model, name, value)

    @property
    def r(self) -> RLike:
        """The `r` of a call without one."""
        raise NotImplementedError

    def at(self, r: RLike) -> Self:
        """The model that computes this `r`."""
        raise NotImplementedError

    def tokens_after(self, blocks: Sequence[int], images: Images, r: RLike | None = None) -> list[Tokens]:
        """The tokens after chosen blocks, in the order of the model."""
        raise NotImplementedError

    @property
    def num_features(self) -> int:
        """Channels of the pooled features."""
        model: Any = self.model
        return int(model.num_features)

    @property
    def num_prefix_tokens(self) -> int:
        """Leading tokens that never merge."""
        return self.family.num_prefix_tokens(self.model)

    @property
    def num_tokens(self) -> int:
        """Tokens that enter the first block at the model's own input size, prefix included."""
        return self.family.num_tokens(self.model)

    @property
    def num_blocks(self) -> int:
        """Blocks of the model."""
        return len(self.blocks)

    @property
    def max_r(self) -> int:
        """The most tokens that the first block can merge."""
        return schedule.max_r(self.num_tokens, self.num_prefix_tokens)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks, in order."""
        return self.family.blocks(self.model)

    def no_weight_decay(self) -> set[str]:
        """Names of this module's parameters without weight decay."""
        model: Any = self.model
        return {PREFIX + name for name in model.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's patterns that sort parameters by depth, for the names in this module.

        Args:
            coarse: As in timm.
        """
        model: Any = self.model
        return {group: _prefixed(patterns) for group, patterns in model.group_matcher(coarse=coarse).items()}

    def get_intermediate_layers(
        self,
        images: Images,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        *,
        r: RLike | None = None,
    ) -> Any:
        """DINO's name for `forward_intermediates`; gives only the list of features.

        Args:
            images: (B, 3, H, W).
            n: As `indices` in `forward_intermediates`.
            reshape: Whether to give maps, (B, C, rows, columns), not rows, (B, rows * columns, C).
            return_prefix_tokens: As in `forward_intermediates`.
            norm: As in `forward_intermediates`.
            r: As in `forward_intermediates`.
        """
        return self.forward_intermediates(
            images,
            n,
            return_prefix_tokens,
            norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
            r=r,
        )

    def forward_intermediates(
        self,
        images: Images,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        *,
        r: RLike | None = None,
    ) -> Any:
        """Dense features after chosen blocks: every patch has the features of the token that it merged into.

        Arguments and results are timm's. Masks between tokens (`attn_mask`, `is_causal`) are not supported.

        Args:
            images: (B, 3, H, W); for a NaFlexVit also its dictionary, with `output_fmt` "NLC".
            indices: Blocks, counted from 0 or, if negative, from the end; a number n means the last n, None all.
            return_prefix_tokens: Whether to give (patches, prefix tokens) for each block, if the model has any.
            norm: Whether to apply the model's final norm.
            stop_early: Whether to stop after the last chosen block, which then gives the final features.
            output_fmt: "NCHW", maps (B, C, rows, columns), or "NLC", (B, rows * columns, C).
            intermediates_only: Whether to leave the final features out.
            output_dict: Whether to give a dictionary.
            r: As in `MergedViT.forward`.

        Returns:
            (final features, intermediates). The features are merged, (B, M, C), as from `forward_features`. The
            intermediates are a list with an entry for each chosen block, in order; with `intermediates_only` only this
            list. With `output_dict` a dictionary: "image_features", "image_intermediates" and, if requested,
            "image_intermediates_prefix"; for a NaFlexVit's dictionary also "patch_valid".

        Raises:
            ValueError: output_fmt is neither, there is no such block, or patches were dropped (in training).
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}; it must be 'NCHW' or 'NLC'")
        padded = isinstance(images, Mapping)
        if padded and output_fmt == "NCHW":
            raise ValueError("output_fmt is 'NCHW', but each image of a dictionary has its own grid; use 'NLC'")
        chosen = chosen_blocks(indices, self.num_blocks)
        last = [] if intermediates_only or stop_early else [self.num_blocks - 1]
        after = dict(zip(ran := sorted({*chosen, *last}), self.tokens_after(ran, images, r), strict=True))
        grid = self._grid(images)
        final_norm = self.family.norm(self.at(self.r if r is None else r).model)
        patches, prefixes = [], []
        for block in chosen:
            x = after[block].unmerged()
            x = final_norm(x) if norm else x
            prefix, x = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
            if x.shape[1] != (found := grid[0] * grid[1]):
                raise ValueError(f"{x.shape[1]} patches are left of {found}: patch dropout leaves no whole map")
            patches.append(x.transpose(1, 2).unflatten(2, grid).contiguous() if output_fmt == "NCHW" else x)
            prefixes.append(prefix)
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            made: dict[str, Any] = {"image_intermediates": patches}
            made |= {"image_intermediates_prefix": prefixes} if with_prefix else {}
            made |= {"patch_valid": images["patch_valid"]} if isinstance(images, Mapping) else {}
            return made if intermediates_only else made | {"image_features": final_norm(after[ran[-1]].x)}
        intermediates: list[Any] = list(zip(patches, prefixes, strict=True)) if with_prefix else patches
        return intermediates if intermediates_only else (final_norm(after[ran[-1]].x), intermediates)

    def _grid(self, images: Images) -> tuple[int, int]:
        """Rows and columns of patches; one row of all patches if each image has its own grid."""
        if isinstance(images, Mapping):
            return 1, images["patches"].shape[1]
        height, width = images.shape[1:3] if images.dtype == torch.uint8 else images.shape[2:4]
        return self.family.grid(self.model, (height, width))


def chosen_blocks(indices: int | Sequence[int] | None, num_blocks: int) -> list[int]:
    """The blocks that `indices` names, from 0, in order.

    Raises:
        ValueError: There is no such block.
    """
    if indices is None:
        return list(range(num_blocks))
    if isinstance(indices, int):
        if not 1 <= indices <= num_blocks:
            raise ValueError(f"indices is {indices}; a number of last blocks must lie between 1 and {num_blocks}")
        return list(range(num_blocks - indices, num_blocks))
    for i in indices:
        if not -num_blocks <= i < num_blocks:
            raise ValueError(f"indices names block {i}; blocks lie between {-num_blocks} and {num_blocks - 1}")
    if not indices:
        raise ValueError("indices is empty; name at least one block")
    return sorted({i % num_blocks for i in indices})


def _prefixed(patterns: Any) -> Any:
    """timm's patterns, one or a list of (pattern, group), for names with `PREFIX`; anchors inside would not match."""
    if isinstance(patterns, str):
        unanchored = re.sub(r"(?<![\[\\])\^", "", patterns)
        return f"^{re.escape(PREFIX)}(?:{unanchored})"
    return [(_prefixed(pattern), group) for pattern, group in patterns]
