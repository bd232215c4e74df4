"""A timm model whose tokens merge: the forward loop. State travels in arguments and results, never in the module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tome_core import fp8, fused, schedule
from tome_core.as_timm import AsTimm, chosen_blocks
from tome_core.embedding import Normalisation, embed
from tome_core.families import Images, UnsupportedModelError, family_of
from tome_core.families.parts import reason_against
from tome_core.fp8 import Block8
from tome_core.kernels import DTYPES, missing_on
from tome_core.matching import match
from tome_core.merging import merge, track_source
from tome_core.padding import match_padded
from tome_core.positions import Position, follow
from tome_core.schedule import RLike
from tome_core.tokens import PADDING, Tokens
from tome_core.tuned import Band, Tuned, sharing


class Implementation(NamedTuple):
    """How a model computes.

    Attributes:
        name: "fused", by the operations of `tome_core.kernels`, or "plain", layer by layer.
        reason: Why the other is not used.
    """

    name: str
    reason: str


Kernels = Literal["auto", "plain", "fused"]


class MergedViT(AsTimm):
    """A Vision Transformer that merges `r` tokens in every block, between attention and MLP.

    It shares the weights of the timm model it wraps and leaves that model as it was. A call changes no state, so one
    instance serves every `r` from several threads. It has timm's attributes and methods (`AsTimm`).

    Args:
        model: A timm Vision Transformer.
        kernels: As for `wrap`.

    Attributes:
        model: The wrapped timm model, untouched. Its blocks must stay; their weights may change.
        tuned: The tuned numbers that `load_tuned` has read; None without.
        gives_features: Whether `forward` gives pooled features beside the logits (`with_features`).

    Source: Bolya et al., Token Merging, ICLR 2023.
    """

    def __init__(self, model: nn.Module, kernels: Kernels = "auto") -> None:
        super().__init__()
        self.family = family_of(model)
        self.gives_features = False
        self.tuned: Tuned | None = None
        self._r: RLike = 0
        self._kernels = kernels
        self._normalisation: Normalisation | None = None
        self._float8: list[Block8 | None] = []
        self._in_bands: tuple[object, list[Self]] = (None, [])
        self._unfusable = reason_against(self.family, model)
        self._layers = list(model.modules())[1:]
        if kernels == "fused" and self._unfusable:
            raise UnsupportedModelError(f"cannot run a {type(model).__name__} by fused kernels: {self._unfusable}")
        self.training = model.training
        self.model = model

    @property
    def r(self) -> RLike:
        """The `r` of calls without one: a number, a list of one per block, or a Ramp; 0 at first.

        Raises:
            ValueError: It is negative, or lists more blocks than there are.
            TypeError: It is neither an integer, a sequence of integers nor a Ramp.
        """
        return self._r

    @r.setter
    def r(self, r: RLike) -> None:
        schedule.resolve(r, self.num_blocks)
        self._r = r

    def forward(self, images: Images, r: RLike | None = None) -> Tensor:
        """Classifies images.

        If the head reads only prefix tokens (class-token pooling), the last block computes only those: the same logits
        for less work.

        Args:
            images: (B, 3, H, W), normalised as the model wants them; for a NaFlexVit also its dictionary of patches.
            r: Tokens merged in each block: a number, a list of one per block, or a Ramp; None means `self.r`. More
                than a block can merge is clipped; `token_counts` shows the outcome.

        Returns:
            Logits, (B, K); the outputs of the timm model if it gives several (distilled, in training). A model made by
            `with_features` gives logits and pooled features side by side, (B, K + C).

        Raises:
            UnsupportedModelError: No right form of the model's pooling is known.
            ValueError: r is negative, or lists more blocks than there are.
            TypeError: r is neither an integer, a sequence of integers nor a Ramp.
        """
        prefix_only = self.family.reads_prefix_only(self.model)
        tokens = self.forward_tokens(images, r, prefix_only=prefix_only)
        return self._both(tokens) if self.gives_features else self.forward_head(tokens)

    def forward_features(self, images: Images, r: RLike | None = None) -> Any:
        """Runs the model without its head, as timm's method of this name.

        Args:
            images: As in `forward`.
            r: As in `forward`.

        Returns:
            The tokens after the final norm, (B, M, C); of a NaFlexVit's dictionary {"patches", "patch_valid"}. A head
            that reads more than prefix tokens needs their sizes too, which `forward_tokens` gives.
        """
        tokens = self.forward_tokens(images, r)
        if tokens.size is None or not tokens.padded:
            return tokens.x
        return {"patches": tokens.x, "patch_valid": tokens.size[:, self.num_prefix_tokens :] >= 1}

    def forward_tokens(
        self, images: Images, r: RLike | None = None, *, track: bool = False, prefix_only: bool = False
    ) -> Tokens:
        """Runs the model without its head; gives tokens with sizes and, with `track`, the row of every input token.

        Args:
            images: As in `forward`.
            r: As in `forward`.
            track: Whether to follow where each input token went (`Tokens.source`).
            prefix_only: Whether to give prefix tokens alone, for a head that reads no others. The last block then
                computes only those, and merges nothing.

        Returns:
            The tokens after the final norm; with `prefix_only`, the prefix tokens.

        Raises:
            ValueError: prefix_only is set with `track`, or the model's head reads other tokens.
        """
        if prefix_only and (track or not self.family.reads_prefix_only(self.model)):
            raise ValueError("prefix_only leaves nothing to track, and needs a head that reads prefix tokens alone")
        r = self.r if r is None else r
        if (chosen := self.at(r)) is not self:
            return chosen.forward_tokens(images, r, track=track, prefix_only=prefix_only)
        device = _device(images)
        if device.type == "cuda" and not torch.compiler.is_compiling() and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):  # Triton launches on the current device
                return self.forward_tokens(images, r, track=track, prefix_only=prefix_only)
        if isinstance(images, Tensor) and not track and self.implementation(images).name == "fused":
            x, n, positions = embed(self.family, self.model, images, self._normalisation, self._dtype)
            per_block = schedule.clip(schedule.resolve(r, self.num_blocks), x.shape[1], self.num_prefix_tokens)
            args = (self.family, self.model, x, n, positions, per_block, prefix_only, self._float8)
            return Tokens(*fused.run_blocks(*args))
        (tokens,) = self._run(images, r, [self.num_blocks - 1], track=track, prefix_only=prefix_only)
        return tokens._replace(x=self.family.norm(self.model)(tokens.x))

    def implementation(self, images: Images) -> Implementation:
        """How `forward` would compute these images, and why. Tracked and intermediate tokens are always "plain"."""
        if not isinstance(images, Tensor):
            return Implementation("plain", "the images are a dictionary of patches")
        if self._kernels == "plain":
            return Implementation("plain", "asked for")
        against = self._unfusable
        if self._kernels == "auto":
            against = against or missing_on(images.device)
        against = against or self._not_now(images)
        return Implementation("plain", against) if against else Implementation("fused", "nothing is against it")

    def has_training_layers(self) -> bool:
        """Whether any layer of the timm model is in training mode."""
        return any(layer.training for layer in self._layers)

    def load_tuned(self, file: Path | str) -> Self:
        """Takes tuned numbers for some bands of `r`: the norms and biases that `tome-server tune` has made.

        Every other `r` is computed as before, bit for bit. All bands share the matrices, which may change later, in
        place; other weights must not. Models made of this one afterwards (`plain`, `from_pixels`, `in_float8`) have the
        tuned numbers too.

        Args:
            file: A file of `Tuned.save`.

        Returns:
            This model.

        Raises:
            TunedError: The file holds no tuned numbers, or those of another model or other weights.
            OSError: The file cannot be read.
        """
        tuned = Tuned.load(file)
        tuned.check(self.model, self.family)
        return self.take_tuned(tuned)

    def take_tuned(self, tuned: Tuned | None) -> Self:
        """Like `load_tuned`, with numbers that are known to fit this model; None removes them."""
        self.tuned = tuned
        self._in_bands = (None, [])
        if tuned is not None:
            self._made_for(tuned.bands)  # now, because neither a compiler nor several threads should trigger it later
        return self

    def at(self, r: RLike) -> Self:
        """The model that computes this `r`: this one, or the one with the tuned numbers of its band.

        The latter is made again after this model has moved or has changed its dtype, mode, size or head.
        `torch.compile` with `fullgraph` cannot trace that: call `at` once before.
        """
        tuned = self.tuned
        if tuned is None:
            return self
        mean = schedule.mean_r(schedule.resolve(r, self.num_blocks))
        for place, band in enumerate(tuned.bands):
            if mean in band:
                return self._made_for(tuned.bands)[place]
        return self

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """The same model with other tensors for some parameters, which are named as in the timm model.

        It shares everything else, as `tome_core.tuned.sharing` does.
        """
        model = self._twin()
        model.take_tuned(None)
        model.model = sharing(self.model, tensors)
        model._layers = list(model.model.modules())[1:]
        if self._float8:
            model._float8 = fp8.quantise(self.family, model.model, like=self._float8)
        return model

    def _made_for(self, bands: Sequence[Band]) -> list[Self]:
        """The models of the bands in this model's present device, dtype and mode."""
        weight = next(self.model.parameters())
        flags = self.model.training, self.family.trunk(self.model).grad_checkpointing
        parts = [
            *self.model.children(),
            *self.model.parameters(recurse=False),
            weight,
        ]  # for example, the head may be new
        state = [weight.device, weight.dtype, *flags, self.num_tokens, *map(id, parts)]
        state += [layer.training for layer in self._layers]
        known, models = self._in_bands  # read once, because another thread may replace them
        if known != state:
            own = dict(self.model.named_parameters())
            with torch.inference_mode(False):  # they may be used with gradients later
                models = [self.with_tensors(_like(own, band.tensors)) for band in bands]
            self._in_bands = (state, models)
        return models

    def plain(self) -> Self:
        """The same model, over the same weights, that is always computed plain."""
        model = self._twin()
        model._kernels = "plain"
        return model

    def in_float8(self) -> Self:
        """The same model with most products of its blocks in float8 (e4m3), from its weights as they are now.

        The GPU must have compute capability 9.0 (Hopper) or newer. The model must be on it, in bfloat16 or float16.
        `tome_core.fp8` lists these products and the loss of accuracy.

        Raises:
            UnsupportedModelError: The model or its device cannot; the message says why.
        """
        device = next(self.model.parameters()).device
        against = self._unfusable or ("asked for plain" if self._kernels == "plain" else None)
        if self._kernels == "auto":
            against = against or fp8.missing_on(device)
        if self._dtype not in (torch.bfloat16, torch.float16):
            against = against or f"its dtype is {self._dtype}; it must be bfloat16 or float16"
        if against:
            raise UnsupportedModelError(f"cannot multiply a {type(self.model).__name__} in float8: {against}")
        model = self._twin()
        model._float8 = fp8.quantise(self.family, self.model)
        return model

    def from_pixels(self, mean: Sequence[float], std: Sequence[float]) -> Self:
        """The same model, over the same weights, that takes pixels, (B, H, W, 3) uint8, instead of images.

        It normalises them: (byte / 255 - mean) / std. The fused form makes no normalised image.

        Args:
            mean: Of each channel, as the model was trained with.
            std: Of each channel.
        """
        if len(mean) != len(std):
            raise ValueError(f"mean has {len(mean)} channels, std {len(std)}")
        model = self._twin()
        model._normalisation = Normalisation(tuple(mean), tuple(std))
        return model

    def with_features(self) -> Self:
        """The same model, over the same weights, whose `forward` gives pooled features beside the logits.

        Both come from one pass, as one tensor (B, K + C): the K logits, then the C pooled features that the classifier
        reads. A model without a classifier gives its features alone.
        """
        model = self._twin()
        model.gives_features = True
        return model

    def _twin(self) -> Self:
        """A model over the same timm model, with attributes and hooks of its own."""
        twin = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, dict):
                twin.__dict__[name] = copy(value)
        twin._in_bands = (None, [])
        return twin

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def normalised(self, images: Tensor) -> Tensor:
        """Images, or pixels for a model made by `from_pixels`, as the timm model takes them: (B, 3, H, W).

        Raises:
            ValueError: images are pixels, and the model is not made for them.
        """
        if self._normalisation is not None:
            return self._normalisation(images, self._dtype)
        if images.dtype == torch.uint8:
            raise ValueError(
                "images are uint8; normalise them, or make a model that does: merged.from_pixels(mean, std)"
            )
        return images

    def _not_now(self, images: Tensor) -> str | None:
        """Why the fused kernels cannot run this call; None if they can."""
        dtype = self._dtype
        if torch.is_grad_enabled():
            return "gradients are on; call it under torch.inference_mode() or no_grad()"
        if self.has_training_layers():
            return "the model is in training mode, or a layer of it"
        if torch.is_autocast_enabled(images.device.type):
            return "autocast is on; convert the model instead"
        if dtype not in DTYPES or images.dtype != (dtype if self._normalisation is None else torch.uint8):
            return f"the model is {dtype}, the images are {images.dtype}; fused: both float32, bfloat16 or float16"
        if any(layer._forward_hooks or layer._forward_pre_hooks for layer in self._layers):
            return "a layer has hooks"
        return None

    def forward_head(self, tokens: Tokens | Tensor, pre_logits: bool = False) -> Tensor:
        """Pools and classifies.

        Args:
            tokens: The result of `forward_tokens` or `forward_features`.
            pre_logits: Whether to stop before the classifier.

        Returns:
            Logits, (B, K), or pooled features, (B, C).

        Raises:
            UnsupportedModelError: No right form of the model's pooling is known.
            ValueError: The head reads more than prefix tokens, and the sizes of these tokens are not known.
        """
        self.family.check_head(self.model)
        if not isinstance(tokens, Tokens):
            tokens = Tokens(tokens.flatten(1, -2))
            if tokens.x.shape[1] != self.num_tokens and not self.family.reads_prefix_only(self.model):
                raise ValueError(
                    f"the head weighs {tokens.x.shape[1]} tokens by their sizes, which features alone do not have; "
                    "give it forward_tokens(images, r), or Tokens(features) where nothing has merged"
                )
        return self.family.head(self.model, tokens.x, tokens.size, pre_logits)

    def _both(self, tokens: Tokens) -> Tensor:
        """Logits and pooled features of the result of `forward_tokens`, side by side."""
        self.family.check_head(self.model)
        logits, features = self.family.head_and_features(self.model, tokens.x, tokens.size)
        return features if logits is None else torch.cat([logits, features], dim=1)

    def tokens_after(self, blocks: Sequence[int], images: Images, r: RLike | None = None) -> list[Tokens]:
        """The tokens as they leave chosen blocks; no block after the last of them runs.

        Args:
            blocks: Blocks, counted from 0 or, if negative, from the end.
            images: As in `forward`.
            r: As in `forward`.

        Returns:
            Tokens with their `source`, before any final norm, in the order of the model.

        Raises:
            ValueError: There is no such block.
        """
        r = self.r if r is None else r
        return self.at(r)._run(images, r, chosen_blocks(blocks, self.num_blocks), track=True)

    def token_counts(self, r: RLike | None = None, input_size: tuple[int, int] | None = None) -> tuple[int, ...]:
        """Tokens entering the first block, then leaving each block.

        Args:
            r: As in `forward`.
            input_size: Height and width of the images; None means the model's own, as `set_input_size` has left it.

        Raises:
            ValueError: The model takes no images of this size, or r is wrong.
        """
        per_block = schedule.resolve(self.r if r is None else r, self.num_blocks)
        return schedule.token_counts(per_block, self.family.num_tokens(self.model, input_size), self.num_prefix_tokens)

    def _run(
        self, images: Images, r: RLike, blocks: Sequence[int], *, track: bool = False, prefix_only: bool = False
    ) -> list[Tokens]:
        """The tokens as they leave some blocks, in order; the last of these is the last that runs."""
        x, positions, valid = self.family.embed(self.model, self._checked(images))
        x = self.family.norm_pre(self.model)(x)
        per_block = schedule.clip(schedule.resolve(r, self.num_blocks), x.shape[1], self.num_prefix_tokens)
        grad_checkpointing = self.family.trunk(self.model).grad_checkpointing
        track = track or self.family.positional
        tokens, kept = Tokens(x), []
        if valid is not None:
            tokens = Tokens(x, valid.float().clamp(min=PADDING), padded=True)
        for i in range(blocks[-1] + 1):
            last = prefix_only and i == self.num_blocks - 1
            args = (i, tokens, positions, 0 if last else per_block[i], track, self.num_prefix_tokens if last else None)
            if grad_checkpointing:
                tokens = checkpoint(self._block, *args, use_reentrant=False)
            else:
                tokens = self._block(*args)
            if i in blocks:
                kept.append(tokens)
        return kept

    def _checked(self, images: Images) -> Images:
        """Images as the timm model takes them.

        Raises:
            ValueError: It cannot take them.
        """
        if isinstance(images, Tensor):
            return self.normalised(images)
        if not self.family.takes_patches or self._normalisation is not None:
            what = f"a {type(self.model).__name__}" if self._normalisation is None else "a model made by from_pixels"
            raise ValueError(f"images are a dictionary, which a NaFlexVit takes; this is {what}")
        return images

    def _block(
        self, i: int, tokens: Tokens, positions: Tensor | None, r: int, track: bool, num_queries: int | None
    ) -> Tokens:
        """Block i: attention, merging of r tokens, MLP. With `num_queries`, only for that many leading tokens."""
        block = self.family.blocks(self.model)[i]
        position = self.family.position(self.model, positions, i)
        if tokens.source is not None:
            size = tokens.size if tokens.padded else None
            position = follow(position, tokens.source, tokens.x.shape[1], self.num_prefix_tokens, size)
        x, keys = self._attend(block, tokens, position, num_queries)
        tokens = Tokens(x) if num_queries is not None else tokens._replace(x=x)
        if r:
            tokens = self._merge(block, tokens, keys, r, track)
        return tokens._replace(x=self.family.halves(block).feed_forward(block, tokens.x))

    def _attend(
        self, block: nn.Module, tokens: Tokens, position: Position, num_queries: int | None
    ) -> tuple[Tensor, Tensor]:
        """Proportional attention: features after its residual, (B, num_queries, C), and the keys for `_merge`."""
        return self.family.halves(block).attend(block, tokens.x, tokens.size, position, num_queries)

    def _merge(self, block: nn.Module, tokens: Tokens, keys: Tensor, r: int, track: bool) -> Tokens:
        """Merges by similarity of the keys (B, num_heads, N, D), averaged over heads."""
        metric = keys.mean(dim=1, dtype=torch.promote_types(keys.dtype, torch.float32))
        if tokens.padded and tokens.size is not None:
            plan = match_padded(metric, tokens.size, r, self.num_prefix_tokens)
        else:
            plan = match(metric, r, self.num_prefix_tokens)
        x, size = merge(plan, tokens.x, tokens.size)
        return Tokens(x, size, track_source(plan, tokens.source) if track else None, tokens.padded)


def _like(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """Tensors as parameters without gradients, on the devices and in the dtypes of those that they replace."""
    return {name: nn.Parameter(tensor.to(own[name]), requires_grad=False) for name, tensor in tensors.items()}


def _device(images: Images) -> torch.device:
    return images.device if isinstance(images, Tensor) else next(iter(images.values())).device


def wrap(model: nn.Module, kernels: Kernels = "auto") -> MergedViT:
    """Makes a merging model of a timm model: `merged(images, r=8)` merges 8 tokens in every block.

    Args:
        model: A timm Vision Transformer; it stays as it is and shares its weights.
        kernels: "auto" runs fused kernels on a GPU that has them, if the model and the call allow it
            (see `MergedViT.implementation`). "plain" never runs them. "fused" runs them on any device, in plain PyTorch
            where there is no kernel.

    Returns:
        The merging model; at r=0 it computes what `model` computes.

    Raises:
        UnsupportedModelError: Merging is not known to be right in this model, or `kernels` is "fused" and the model
            cannot run fused. The message gives the reason.
    """
    return MergedViT(model, kernels)
