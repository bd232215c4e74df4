"""Reading a split, augmentation and mixing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.conftest import NAMES, WNIDS, DataSet
from training.augment import augment, mix
from training.data import Labels, load_labels, load_split


def test_a_split_is_read_from_all_its_files_in_order(data: DataSet) -> None:
    for name, expected in (("train", data.train), ("val", data.val)):
        images, labels = load_split(data.folder, name)
        assert images.dtype == torch.uint8 and images.is_contiguous()
        assert torch.equal(images, expected.images)
        assert labels.dtype == torch.int64 and torch.equal(labels, expected.labels)


def test_a_split_once_read_comes_from_the_cache(data: DataSet, tmp_path: Path) -> None:
    nowhere, cache = tmp_path / "nowhere", tmp_path / "deep" / "cache"
    first = load_split(data.folder, "val", cache)
    assert [file.name for file in cache.iterdir()] == ["val.pt"]
    again = load_split(nowhere, "val", cache)
    for split in (first, again):
        assert torch.equal(split.images, data.val.images) and torch.equal(split.labels, data.val.labels)
    with pytest.raises(FileNotFoundError, match=r"no train\*\.parquet in .*nowhere"):
        load_split(nowhere, "train", cache)


def test_labels_come_in_label_order_however_they_are_listed(data: DataSet) -> None:
    assert load_labels(data.folder) == Labels(WNIDS, NAMES)


def test_augmentation_keeps_shape_and_gives_floats_between_minus_one_and_one() -> None:
    extremes = torch.randint(2, (64, 3, 64, 64), dtype=torch.uint8) * 255  # where bicubic overshoots
    before = extremes.clone()
    x = augment(extremes)
    assert x.shape == extremes.shape and x.dtype == torch.float32
    assert x.min() >= -1 and x.max() <= 1
    assert x.min() < -0.9 and x.max() > 0.9
    assert torch.equal(extremes, before)


def test_augmentation_keeps_black_black_and_treats_each_image_its_own_way() -> None:
    assert torch.equal(augment(torch.zeros(16, 3, 64, 64, dtype=torch.uint8)), -torch.ones(16, 3, 64, 64))
    alike = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8).expand(16, -1, -1, -1)
    assert len(augment(alike).flatten(1).unique(dim=0)) == 16
    plain = torch.full((16, 3, 64, 64), 128, dtype=torch.uint8)  # where the geometry does nothing
    assert len(augment(plain).mean(dim=(1, 2, 3)).mul(1000).round().unique()) > 8


def test_the_share_of_a_mixture_is_what_its_partner_gave() -> None:
    worth = torch.arange(64.0)  # image i is i all over, so the mean of a mixture tells its proportion
    images = worth[:, None, None, None].expand(64, 3, 16, 12).contiguous()
    x, partner, share = mix(images)
    assert x.shape == images.shape and torch.equal(partner.sort().values, torch.arange(64))
    assert share.shape == (64,) and 0 <= share.min() and share.max() <= 1
    expected = worth + share * (worth[partner] - worth)
    torch.testing.assert_close(x.mean(dim=(1, 2, 3)), expected, atol=1e-4, rtol=0)
    assert torch.equal(images[:, 0, 0, 0], worth)


def test_half_of_the_images_get_a_box_the_others_a_blend_each_in_its_own_proportion() -> None:
    images = torch.arange(2.0).repeat(200)[:, None, None, None].expand(400, 3, 16, 16).contiguous()
    x, partner, share = mix(images)
    differs = (partner % 2 != torch.arange(400) % 2) & (share > 0) & (share < 1)
    given = (x != images)[differs, 0]  # (n, 16, 16): what the partner changed
    blended = given.all(dim=(1, 2))
    assert 0.3 < blended.float().mean() < 0.7
    assert len(share[differs].mul(1e4).round().unique()) > differs.sum() / 2
    for box in given[~blended]:
        rows, columns = box.any(1), box.any(0)
        assert torch.equal(box, rows[:, None] & columns)  # a rectangle, and in one piece:
        assert all((line.int().diff() != 0).sum() <= 2 for line in (rows, columns))
    assert ((x == 0) | (x == 1))[differs][~blended].all()
    for touched in (given[~blended].any(dim=2), given[~blended].any(dim=1)):
        assert touched[:, 0].any() and touched[:, -1].any()  # boxes reach every edge
