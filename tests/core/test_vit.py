"""The forward loop: at r = 0 it is timm's model, at any r it keeps its books, and nothing outlives a call."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tome_core import MergedViT, MergePlan, Ramp, Tokens, match, vit, wrap
from tome_core.positions import NOWHERE
from tome_core.schedule import RLike

Build = Callable[..., VisionTransformer]
RS: list[RLike] = [1, 4, 11, 1000, [5], [0, 6, 0], [4, 0, 7], Ramp(6), Ramp(5, 1.0, "published")]


@pytest.fixture
def model(build: Build) -> VisionTransformer:
    return build()


@pytest.fixture
def merged(model: VisionTransformer) -> MergedViT:
    return wrap(model)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 96, 96)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("r", [0, [], [0, 0, 0], Ramp(0)])
def test_r_0_is_timm(model: VisionTransformer, merged: MergedViT, images: Tensor, r: RLike) -> None:
    torch.testing.assert_close(merged(images, r), model(images), rtol=1e-5, atol=1e-5)
    assert torch.equal(merged.forward_tokens(images, r).x, model.forward_features(images))


def test_the_last_block_computes_prefix_tokens_alone_where_the_head_reads_no_others(build: Build) -> None:
    seen: list[int] = []
    for pool in ("token", "avg"):
        model = build(reg_tokens=4, global_pool=pool)
        last: Any = model.blocks[-1]
        for module in (last.attn.proj, last.mlp):
            module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
        wrap(model)(torch.randn(1, 3, 96, 96))
    assert seen == [5, 5, 41, 41]


def test_head_and_features_are_the_two_parts_of_the_whole(merged: MergedViT, images: Tensor) -> None:
    tokens = merged.forward_tokens(images, 4)
    torch.testing.assert_close(merged.forward_head(tokens), merged(images, 4), rtol=1e-5, atol=1e-5)
    pooled = merged.forward_head(tokens, pre_logits=True)
    head: Any = merged.model.head
    assert pooled.shape == (4, 48)
    torch.testing.assert_close(head(pooled), merged.forward_head(tokens))


@pytest.mark.parametrize("r", RS)
def test_token_counts_are_what_really_enters_and_leaves_the_blocks(
    model: VisionTransformer, merged: MergedViT, images: Tensor, r: RLike
) -> None:
    seen: list[int] = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].shape[1])

    blocks: list[Any] = list(model.blocks)
    blocks[0].norm1.register_forward_pre_hook(count)
    for block in blocks:
        block.mlp.register_forward_pre_hook(count)
    tokens = merged.forward_tokens(images, r)
    assert merged.token_counts(r) == tuple(seen)
    assert merged.token_counts(r)[-1] == tokens.x.shape[1] < merged.num_tokens == 37
    assert merged.max_r == 18


@pytest.mark.parametrize("r", RS)
def test_sizes_add_up_to_the_tokens_that_came_in(merged: MergedViT, images: Tensor, r: RLike) -> None:
    size = merged.forward_tokens(images, r).size
    assert size is not None
    assert size.sum(1).tolist() == [37.0] * 4


@pytest.mark.parametrize("r", RS)
def test_a_source_finds_as_many_tokens_in_a_row_as_its_size_says(merged: MergedViT, images: Tensor, r: RLike) -> None:
    tokens = merged.forward_tokens(images, r, track=True)
    assert tokens.size is not None and tokens.source is not None
    for source, size in zip(tokens.source, tokens.size, strict=True):
        assert source.bincount(minlength=len(size)).tolist() == size.tolist()


@settings(max_examples=25)
@given(st.lists(st.integers(0, 30), max_size=3), st.integers(0, 3))
def test_any_schedule_keeps_the_books(build: Build, r: list[int], reg_tokens: int) -> None:
    prefix = 1 + reg_tokens
    merged = wrap(build(reg_tokens=reg_tokens))
    tokens = merged.forward_tokens(torch.randn(2, 3, 96, 96), r, track=True)
    left = prefix + 36
    for wanted in r:
        left -= min(wanted, (left - prefix) // 2)
    assert tokens.x.shape[1] == left
    if left == prefix + 36:
        assert tokens.size is None and tokens.source is None
    else:
        assert tokens.size is not None and tokens.source is not None
        assert tokens.size.sum(1).tolist() == [prefix + 36] * 2
        for source, size in zip(tokens.source, tokens.size, strict=True):
            assert source[:prefix].tolist() == list(range(prefix))
            assert source.bincount(minlength=left).tolist() == size.tolist()


def test_tracking_changes_no_feature_and_is_off_unless_asked(merged: MergedViT, images: Tensor) -> None:
    tokens = merged.forward_tokens(images, 4)
    assert tokens.source is None
    assert torch.equal(tokens.x, merged.forward_tokens(images, 4, track=True).x)


@pytest.mark.parametrize("reg_tokens", [0, 4, 5])
def test_prefix_tokens_survive_any_r_in_their_places(build: Build, images: Tensor, reg_tokens: int) -> None:
    prefix = 1 + reg_tokens
    tokens = wrap(build(reg_tokens=reg_tokens)).forward_tokens(images, 10**9, track=True)
    assert tokens.size is not None and tokens.source is not None
    assert torch.equal(tokens.source[:, :prefix], torch.arange(prefix).expand(4, -1))
    assert tokens.source[:, prefix:].min() == prefix
    assert tokens.size[:, :prefix].unique().tolist() == [1.0]


@pytest.mark.parametrize("r", RS)
def test_an_image_gets_the_same_logits_in_any_batch(merged: MergedViT, images: Tensor, r: RLike) -> None:
    alone = torch.cat([merged(image[None], r) for image in images])
    torch.testing.assert_close(merged(images, r), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("r", RS)
def test_merging_identical_patches_changes_nothing(build: Build, r: RLike) -> None:
    model = build(pos_embed="none")
    image = torch.randn(2, 3, 1, 1).expand(-1, -1, 96, 96)
    torch.testing.assert_close(wrap(model)(image, r), model(image), rtol=0, atol=1e-4)


def test_merging_different_patches_changes_the_logits(merged: MergedViT, images: Tensor) -> None:
    assert (merged(images, 4) - merged(images)).abs().max() > 1e-3


def test_different_ways_to_say_the_same_schedule_give_the_same_logits(merged: MergedViT, images: Tensor) -> None:
    for same in ([4, 4, 4], (4, 4, 4), Ramp(4, 0.0)):
        assert torch.equal(merged(images, same), merged(images, 4))


@pytest.mark.parametrize(("r", "error"), [(-1, ValueError), ([1, 1, 1, 1], ValueError), ("4", TypeError)])
def test_a_wrong_r_is_refused(merged: MergedViT, images: Tensor, r: RLike, error: type[Exception]) -> None:
    for use in (merged, merged.forward_tokens):
        with pytest.raises(error):
            use(images, r)
    with pytest.raises(error):
        merged.token_counts(r)


def test_threads_with_different_r_share_one_model(merged: MergedViT, images: Tensor) -> None:
    calls = RS * 4
    with torch.inference_mode():
        expected = [merged(images, r) for r in calls]

    def call(r: RLike) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = merged(images, r)
        return logits

    with ThreadPoolExecutor(max_workers=4) as pool:
        for logits, alone in zip(pool.map(call, calls), expected, strict=True):
            torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-5)


def test_the_timm_model_stays_as_it_was_and_shares_its_weights(model: VisionTransformer, images: Tensor) -> None:
    before = copy.deepcopy(model)
    merged = wrap(model)
    merged(images, 4)
    assert list(model.state_dict()) == list(before.state_dict())
    assert [type(module) for module in model.modules()] == [type(module) for module in before.modules()]
    assert [list(vars(module)) for module in model.modules()] == [list(vars(module)) for module in before.modules()]
    assert torch.equal(model(images), before(images))
    for ours, theirs in zip(merged.parameters(), model.parameters(), strict=True):
        assert ours is theirs


@pytest.mark.parametrize("training", [True, False])
def test_wrapping_keeps_the_mode_of_every_module(model: VisionTransformer, training: bool) -> None:
    model.train(training)
    model.patch_embed.train(not training)  # a frozen stem, say
    before = [module.training for module in model.modules()]
    assert wrap(model).training == training
    assert [module.training for module in model.modules()] == before


def test_a_model_survives_pickling(merged: MergedViT, images: Tensor) -> None:
    assert torch.equal(pickle.loads(pickle.dumps(merged))(images, 4), merged(images, 4))


@pytest.mark.usefixtures("fresh_dynamo")
def test_it_compiles_whole_for_several_r(merged: MergedViT, images: Tensor) -> None:
    compiled = torch.compile(merged, fullgraph=True, dynamic=False, backend="eager")
    for r in (0, 4, [5, 0, 2], 1000):
        torch.testing.assert_close(compiled(images, r), merged(images, r), rtol=1e-5, atol=1e-5)


def test_checkpointing_runs_blocks_again_and_gives_the_same_gradients(
    model: VisionTransformer, merged: MergedViT, images: Tensor
) -> None:
    runs: list[nn.Module] = []
    first: Any = model.blocks[0]
    first.mlp.register_forward_pre_hook(lambda module, inputs: runs.append(module))

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(merged(images, [4, 0, 5]).square().sum(), list(model.parameters()))

    plain = gradients()
    assert len(runs) == 1
    model.set_grad_checkpointing()
    for ours, expected in zip(gradients(), plain, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(ours, expected)
    assert len(runs) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_metric_is_the_mean_of_the_keys_over_heads_in_float32_or_wider(
    merged: MergedViT, images: Tensor, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def spy(metric: Tensor, r: int, num_prefix_tokens: int) -> MergePlan:
        seen.append(metric)
        return match(metric, r, num_prefix_tokens)

    monkeypatch.setattr(vit, "match", spy)
    merged = copy.deepcopy(merged).to(dtype)
    x = merged.family.embed(merged.model, images.to(dtype)).x
    block = merged.family.blocks(merged.model)[0]
    _, keys = merged._attend(block, Tokens(x), NOWHERE, None)
    merged.forward_tokens(images.to(dtype), [4])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert seen[0].dtype == wide
    torch.testing.assert_close(seen[0], keys.to(wide).mean(dim=1), rtol=1e-6, atol=1e-6)


def test_prefix_only_is_for_heads_that_read_no_more(build: Build, images: Tensor) -> None:
    merged = wrap(build(reg_tokens=2))
    tokens = merged.forward_tokens(images, 4, prefix_only=True)
    assert tokens.x.shape == (4, 3, 48)
    torch.testing.assert_close(merged.forward_head(tokens), merged(images, 4))
    with pytest.raises(ValueError, match="prefix_only leaves nothing to track"):
        merged.forward_tokens(images, 4, prefix_only=True, track=True)
    with pytest.raises(ValueError, match="needs a head that reads prefix tokens alone"):
        wrap(build(global_pool="avg")).forward_tokens(images, 4, prefix_only=True)


@pytest.mark.parametrize("r", [0, 4, [5, 0, 2]])
def test_bfloat16_stays_close_to_float32(merged: MergedViT, images: Tensor, r: RLike) -> None:
    expected = merged(images, r)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = merged(images, r)
    lowered = copy.deepcopy(merged).bfloat16()(images.bfloat16(), r)
    for logits in (autocast, lowered):
        assert logits.dtype == torch.bfloat16
        assert (logits - expected).abs().max() < 0.1 * expected.abs().max()
