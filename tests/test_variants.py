"""The benchmark's rivals of token merging, each against its idea written out by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from benchmarks.coverage import randomise
from benchmarks.variants import (
    CHOICES,
    METHODS,
    DotProduct,
    KeepDst,
    MetricQ,
    MetricV,
    MetricX,
    PlainAttention,
    PlainMean,
    PruneAttention,
    PruneRandom,
    RandomPartition,
    SequentialPartition,
    Variant,
    project,
)
from tome_core import MergedViT, MergePlan, wrap
from tome_core.positions import NOWHERE
from tome_core.tokens import Tokens

ALL: dict[str, Any] = METHODS | CHOICES
PATCHES, PREFIX = 36, 1


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    torch.manual_seed(0)
    built = timm.create_model(
        "vit_tiny_patch16_224", img_size=96, depth=3, embed_dim=48, num_heads=3, num_classes=10, qk_norm=True
    )
    randomise(built)
    return cast(VisionTransformer, built.eval())


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 96, 96)


@pytest.fixture
def tokens() -> Tokens:
    """Tokens of two images, some of which have merged before."""
    return Tokens(torch.randn(2, 1 + PATCHES, 48), torch.randint(1, 6, (2, 1 + PATCHES)).float())


class Step(NamedTuple):
    """Tokens after a block's attention, and those left of them."""

    after: Tokens
    left: Tokens


def watched(merged: MergedViT, images: Tensor, r: int = 8) -> list[Step]:
    """Every merge of a forward pass."""
    seen: list[Step] = []
    merge: Callable[..., Tokens] = merged._merge

    def watch(block: nn.Module, tokens: Tokens, *args: Any) -> Tokens:
        left = merge(block, tokens, *args)
        seen.append(Step(tokens, left))
        return left

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merged, "_merge", watch)
        merged(images, r)
    return seen


def attention_of_class_token(block: Any, x: Tensor) -> Tensor:
    """Mean over heads of the class token's row of timm's own attention, (B, N), by attending to one-hot values."""
    q, k, _ = project(block, x)
    one_hot = torch.eye(x.shape[1]).expand(*q.shape[:2], -1, -1)
    return nn.functional.scaled_dot_product_attention(q, k, one_hot)[:, :, 0].mean(dim=1)


def test_a_variant_that_replaces_nothing_is_the_library(model: VisionTransformer, images: Tensor) -> None:
    for r in (0, 4, 1000):
        assert torch.equal(Variant(model)(images, r), wrap(model)(images, r))


@pytest.mark.parametrize("name", ALL)
def test_without_r_every_method_is_timm(model: VisionTransformer, images: Tensor, name: str) -> None:
    torch.testing.assert_close(ALL[name](model)(images), model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("r", [1, 5, 1000])
def test_every_method_leaves_as_many_tokens_and_the_prefix_first(
    model: VisionTransformer, images: Tensor, name: str, r: int
) -> None:
    merged = ALL[name](model)
    seen = watched(merged, images, r)
    assert [len(step.left.x[0]) for step in seen] == list(merged.token_counts(r)[1:3])  # the last block merges nothing
    for after, left in seen:
        assert torch.equal(left.x[:, :PREFIX], after.x[:, :PREFIX])


@pytest.mark.parametrize("name", [name for name in ALL if name != "tome"])
def test_every_method_but_the_default_says_something_else(model: VisionTransformer, images: Tensor, name: str) -> None:
    assert (ALL[name](model)(images, 8) - wrap(model)(images, 8)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_an_image_gets_the_same_logits_in_any_batch(model: VisionTransformer, images: Tensor, name: str) -> None:
    merged, alone = ALL[name](model), []
    together = merged(images, 8)
    for i, image in enumerate(images):
        merged.first_image = i
        alone.append(merged(image[None], 8))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_pruning_by_attention_drops_what_the_class_token_attends_to_least(
    model: VisionTransformer, images: Tensor
) -> None:
    merged = PruneAttention(model)
    x = merged.family.embed(model, images).x
    block = model.blocks[0]
    attention = attention_of_class_token(block, x)[:, PREFIX:]
    ((after, left), *_) = watched(merged, images)
    for b in range(len(images)):
        dropped = set(attention[b].argsort()[:8].tolist())
        kept = [0] + [PREFIX + i for i in range(PATCHES) if i not in dropped]
        assert torch.equal(left.x[b], after.x[b, kept])
    assert left.size is None


def test_random_pruning_drops_every_patch_as_often_and_never_the_prefix(model: VisionTransformer) -> None:
    merged, N, B = PruneRandom(model), 1 + PATCHES, 400
    places = torch.arange(N).float().expand(B, N)[..., None]
    kept = merged.drop(Tokens(places), merged.random(places), 9).x[..., 0].long()
    assert torch.equal(kept.sort(dim=1).values, kept)
    how_often = kept.flatten().bincount(minlength=N)
    assert how_often[0] == B
    mean = B * 27 / PATCHES
    assert (how_often[1:] - mean).abs().max() < 5 * (mean * 9 / PATCHES) ** 0.5


def test_what_is_random_depends_on_the_image_and_the_tokens_left_alone(model: VisionTransformer) -> None:
    merged, x = PruneRandom(model), torch.zeros(5, 20, 1)
    numbers = merged.random(x)
    assert len(numbers.unique()) == numbers.numel()
    assert not torch.isin(merged.random(x[:, 1:]), numbers).any()
    assert torch.equal(merged.random(x), numbers)
    merged.first_image = 3
    assert torch.equal(merged.random(x[:2]), numbers[3:])


@pytest.mark.parametrize(("variant", "part"), [(MetricQ, 0), (MetricV, 2)])
def test_queries_and_values_are_those_of_the_block(
    model: VisionTransformer, tokens: Tokens, variant: type[Variant], part: int
) -> None:
    block: Any = model.blocks[1]
    merged = variant(model)
    x, metric = merged._attend(block, tokens, NOWHERE, None)
    assert torch.equal(x, wrap(model)._attend(block, tokens, NOWHERE, None)[0])
    assert torch.equal(metric, project(block, tokens.x)[part])


def test_the_projections_are_those_of_timm(model: VisionTransformer, tokens: Tokens) -> None:
    block: Any = model.blocks[1]
    q, k, v = project(block, tokens.x)
    y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(block.attn.proj(y), block.attn(block.norm1(tokens.x)))


def test_features_are_compared_as_they_merge(model: VisionTransformer, tokens: Tokens) -> None:
    assert MetricX(model).metric(tokens, torch.empty(0)) is tokens.x


def test_a_dot_product_decides_by_length_too(model: VisionTransformer, tokens: Tokens) -> None:
    merged, keys = DotProduct(model), torch.randn(2, 3, 1 + PATCHES, 16)
    plan = merged.plan(merged.metric(tokens, keys), 9)
    metric = keys.mean(dim=1).double()
    for b in range(2):
        similarity = metric[b, 2::2] @ metric[b, 1::2].T
        best, partner = similarity.max(dim=1)
        src = best.argsort(descending=True)[:9]
        assert plan.src[b].tolist() == (2 + 2 * src).tolist()
        assert plan.keep[b][plan.dst[b]].tolist() == (1 + 2 * partner[src]).tolist()


@pytest.mark.parametrize("N", [1 + PATCHES, PATCHES, 3])
def test_a_sequential_partition_merges_the_first_half_into_the_second(model: VisionTransformer, N: int) -> None:
    metric = torch.randn(2, N, 16)
    plan = SequentialPartition(model).plan(metric, 5)
    half = PREFIX + (N - PREFIX) // 2
    for b in range(2):
        cosine = nn.functional.cosine_similarity(metric[b, PREFIX:half, None], metric[b, half:], dim=-1)
        best, partner = cosine.max(dim=1)
        src = best.argsort(descending=True)[:5]
        assert plan.src[b].tolist() == (PREFIX + src).tolist()
        assert plan.keep[b][plan.dst[b]].tolist() == (half + partner[src]).tolist()
        assert plan.keep[b].tolist() == [i for i in range(N) if i not in plan.src[b].tolist()]


def test_a_random_partition_is_a_plan_that_lets_any_two_patches_merge(model: VisionTransformer) -> None:
    metric = torch.randn(200, 1 + PATCHES, 16)
    plan = RandomPartition(model).plan(metric, 8)
    everyone = torch.arange(1 + PATCHES).expand(200, -1)
    assert torch.equal(torch.cat([plan.keep, plan.src], dim=1).sort(dim=1).values, everyone)
    assert (plan.keep[:, 0] == 0).all()
    assert plan.dst.min() >= PREFIX
    assert plan.src.unique().tolist() == list(range(PREFIX, 1 + PATCHES))
    assert plan.keep.gather(1, plan.dst).unique().tolist() == list(range(PREFIX, 1 + PATCHES))


PLAN = MergePlan(torch.tensor([[0, 2]]), torch.tensor([[1, 3]]), torch.tensor([[1, 1]]))
"""Tokens 1 and 3 join token 2."""


@pytest.mark.parametrize(("variant", "value"), [(Variant, 3.75), (PlainMean, 3.0), (KeepDst, 2.0)])
def test_what_becomes_of_tokens_that_merge(model: VisionTransformer, variant: type[Variant], value: float) -> None:
    before = Tokens(torch.tensor([[[9.0], [1.0], [2.0], [6.0]]]), torch.tensor([[1.0, 2.0, 2.0, 4.0]]))
    x, size = variant(model).combine(PLAN, before)
    assert size.tolist() == [[1.0, 8.0]]
    assert x[0, :, 0].tolist() == [9.0, value]


def test_plain_attention_knows_no_sizes_but_the_merge_does(model: VisionTransformer, tokens: Tokens) -> None:
    merged, block = PlainAttention(model), model.blocks[1]
    x, _ = merged._attend(block, tokens, NOWHERE, None)
    assert torch.equal(x, wrap(model)._attend(block, Tokens(tokens.x), NOWHERE, None)[0])
    left = merged._block(1, tokens, None, 4, False, None)
    assert left.size is not None and tokens.size is not None
    assert torch.equal(left.size.sum(1), tokens.size.sum(1))


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_base_patch16_rpn_224", "vit_medium_patch16_gap_240"])
def test_other_models_are_refused(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, depth=2)
    with pytest.raises(ValueError, match=f"PruneRandom is written for .*, not for this {type(model).__name__}"):
        PruneRandom(model)
