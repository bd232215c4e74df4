"""Training on a handful of images: reading, augmentation, loss, schedule, a resumed run, and the folder it exports."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor

pytest.importorskip("pyarrow")

import pyarrow as pa
import pyarrow.parquet as parquet

from server.models import LoadedModel, load_model
from server.settings import ModelSpec
from training import export, train
from training.augment import augment, mix
from training.data import Labels, Split, load_labels, load_split
from training.teacher import from_imagenet

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3}
WNIDS: list[str] = ImageNetInfo().label_names()[:200]
NAMES = [f"thing {label}" for label in range(200)]
TRAIN_LABELS = [7, 199, 0, 42, 7, 128]
VAL_LABELS = [3, 0, 199, 55]
STEPS = len(TRAIN_LABELS) // 2  # of an epoch at --batch-size 2


class DataSet(NamedTuple):
    """A folder as the training reads it, and the splits that lie there."""

    folder: Path
    train: Split
    val: Split


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    """Lossless images, so that the pixels are known; the classes are listed backwards."""
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    train_images, val_images = (
        torch.randint(256, (len(labels), 3, 64, 64), dtype=torch.uint8, generator=generator)
        for labels in (TRAIN_LABELS, VAL_LABELS)
    )
    train_images[1] = train_images[1, :1]  # a grey one
    write(folder / "train-00000.parquet", train_images[:4], TRAIN_LABELS[:4])
    write(folder / "train-00001.parquet", train_images[4:], TRAIN_LABELS[4:])
    write(folder / "val-00000.parquet", val_images, VAL_LABELS)
    rows = [f"{label},{WNIDS[label]},{NAMES[label]}" for label in reversed(range(200))]
    (folder / "classes.csv").write_text("\n".join(["label,wnid,name", *rows]) + "\n")
    splits = Split(train_images, torch.tensor(TRAIN_LABELS)), Split(val_images, torch.tensor(VAL_LABELS))
    return DataSet(folder, *splits)


def write(file: Path, images: Tensor, labels: list[int]) -> None:
    """One parquet file of encoded images; grey ones are stored as grey."""
    encoded = []
    for image in images:
        grey = bool((image == image[:1]).all())
        picture = Image.fromarray(image[0].numpy()) if grey else Image.fromarray(image.permute(1, 2, 0).numpy())
        buffer = io.BytesIO()
        picture.save(buffer, "PNG" if grey else "WEBP", **({} if grey else {"lossless": True}))
        encoded.append(buffer.getvalue())
    parquet.write_table(pa.table({"image": encoded, "label": labels}), file)


def said_by(patch: pytest.MonkeyPatch, main: Callable[[], None], *arguments: object) -> list[str]:
    """Runs a program with arguments; gives the lines that it prints."""
    patch.setattr("sys.argv", ["program", *map(str, arguments)])
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main()
    return out.getvalue().splitlines()


class Run(NamedTuple):
    """A training of two epochs in two parts: what each part printed, left, and was fed."""

    folder: Path
    first: list[str]
    second: list[str]
    after_first: dict[str, Any]
    after_second: dict[str, Any]
    fed: list[Tensor]


@pytest.fixture(scope="module")
def small_model() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setitem(train.MODEL_ARGS, name, value)
        yield


@pytest.fixture(scope="module")
def run(data: DataSet, small_model: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The first part ends for want of time; the second goes on. Both have a teacher."""
    folder = tmp_path_factory.mktemp("run")
    teacher, checkpoint = folder / "teacher.safetensors", folder / "run" / "checkpoint.pt"
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=200).state_dict(), teacher)
    arguments = ["--data", data.folder, "--run", checkpoint.parent, "--device", "cpu", "--batch-size", 2, "--epochs", 2]
    arguments += ["--teacher", teacher]
    fed: list[Tensor] = []

    def noted(images: Tensor) -> Tensor:
        fed.append(augment(images))
        return fed[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "augment", noted)
        first = said_by(patch, train.main, *arguments, "--stop-after-s", 1e-9)
        after_first = torch.load(checkpoint, weights_only=True)
        second = said_by(patch, train.main, *arguments)
    return Run(checkpoint.parent, first, second, after_first, torch.load(checkpoint, weights_only=True), fed)


class Exported(NamedTuple):
    """What the export printed and wrote, and the model that the server reads from it."""

    folder: Path
    said: list[str]
    loaded: LoadedModel


@pytest.fixture(scope="module")
def exported(run: Run, data: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("exported") / "model"
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["--data", data.folder, "--run", run.folder, "--out", folder, "--device", "cpu", "--r", "4,20"]
        said = said_by(patch, export.main, *arguments)
    return Exported(folder, said, load_model(ModelSpec.model_validate({"source": f"local-dir:{folder}"})))


def test_a_split_is_read_from_all_its_files_in_order(data: DataSet) -> None:
    for name, expected in (("train", data.train), ("val", data.val)):
        images, labels = load_split(data.folder, name)
        assert images.dtype == torch.uint8 and images.is_contiguous()
        assert torch.equal(images, expected.images)
        assert labels.dtype == torch.int64 and torch.equal(labels, expected.labels)


def test_a_split_once_read_comes_from_the_cache(data: DataSet, tmp_path: Path) -> None:
    nowhere, cache = tmp_path / "nowhere", tmp_path / "deep" / "cache"
    first = load_split(data.folder, "val", cache)
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


def test_mixing_gives_images_and_targets_in_the_same_proportion() -> None:
    worth = torch.arange(8.0)  # image i is i all over, so the mean of a mixture tells its proportion
    images, targets = worth[:, None, None, None].expand(8, 3, 16, 16).contiguous(), torch.eye(8)
    pasted = blended = 0
    for _ in range(50):
        x, soft = mix(images, targets)
        assert x.shape == images.shape and soft.shape == targets.shape
        torch.testing.assert_close(soft.sum(1), torch.ones(8))
        assert soft.min() >= 0
        torch.testing.assert_close(x.mean(dim=(1, 2, 3)), soft @ worth, atol=1e-4, rtol=0)
        if not torch.equal(x, images):
            whole = torch.equal(x, x.round())
            pasted, blended = pasted + whole, blended + (not whole)
    assert pasted > 10 and blended > 10
    assert torch.equal(images[:, 0, 0, 0], worth) and torch.equal(targets, torch.eye(8))


def test_random_r_takes_every_value_up_to_the_largest_and_most_often_none() -> None:
    drawn = [train.random_r() for _ in range(1000)]
    assert set(drawn) == set(range(21))
    assert 200 < drawn.count(0) < 400
    assert max(drawn.count(r) for r in range(1, 21)) < 100


def test_without_a_teacher_the_loss_is_smoothed_cross_entropy() -> None:
    logits, targets = torch.randn(4, 10), torch.rand(4, 10).softmax(1)
    smoothed = 0.9 * targets + 0.1 / 10
    expected = -(smoothed * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(train.loss_of(logits, targets, None), expected)


def test_the_taught_part_of_the_loss_is_least_where_the_teacher_agrees() -> None:
    logits, targets = torch.randn(4, 10), F.one_hot(torch.arange(4), 10).float()
    labelled = 0.2 * F.cross_entropy(logits, targets)
    torch.testing.assert_close(train.loss_of(logits, targets, logits), labelled)
    for teacher in (logits + 0.1 * torch.randn(4, 10), torch.randn(4, 10), -logits):
        log_p, log_q = (teacher / 2).log_softmax(1), (logits / 2).log_softmax(1)
        taught = (log_p.exp() * (log_p - log_q)).sum(1).mean()
        loss = train.loss_of(logits, targets, teacher)
        assert loss > labelled
        torch.testing.assert_close(loss, labelled + 0.8 * 4 * taught)


def test_the_learning_rate_warms_up_from_nothing_and_falls_to_a_thousandth() -> None:
    args = argparse.Namespace(lr=0.5, epochs=105)
    ends = [train.learning_rate(epoch, args) for epoch in (0, 2.5, 5, 55, 105)]
    assert ends == pytest.approx([0, 0.25, 0.5, 0.5 * 0.5005, 0.0005])
    assert train.learning_rate(5 - 1e-9, args) == pytest.approx(0.5)
    falling = [train.learning_rate(epoch, args) for epoch in range(5, 106)]
    assert all(later < earlier for earlier, later in zip(falling, falling[1:], strict=False))


def test_decay_groups_hold_each_parameter_once_and_decay_matrices_alone() -> None:
    model = timm.create_model("vit_tiny_patch16_224", **(train.MODEL_ARGS | SMALL))
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    groups: list[dict[str, Any]] = train.decay_groups(model)
    decayed, spared = ([name_of[id(parameter)] for parameter in group["params"]] for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    assert sorted(decayed + spared) == sorted(name_of.values())
    of_matrices = ("proj.weight", "qkv.weight", "fc1.weight", "fc2.weight", "head.weight")
    assert set(decayed) == {name for name in name_of.values() if name.endswith(of_matrices)}
    assert {"cls_token", "pos_embed", "norm.weight", "head.bias"} <= set(spared)


def test_the_teacher_starts_as_the_imagenet_model_cut_to_our_classes(tmp_path: Path) -> None:
    whole: Any = timm.create_model("vit_tiny_patch16_224").eval()
    for parameter in whole.head.parameters():
        torch.nn.init.normal_(parameter)
    save_file(whole.state_dict(), tmp_path / "weights.safetensors")
    rows = [999, 0, 517, 3]
    wnids = [ImageNetInfo().label_names()[row] for row in rows]
    teacher: Any = from_imagenet(tmp_path / "weights.safetensors", Labels(wnids, wnids)).eval()
    assert torch.equal(teacher.head.weight, whole.head.weight[rows])
    assert torch.equal(teacher.head.bias, whole.head.bias[rows])
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(teacher(x), whole(x)[:, rows])


def test_training_tells_its_progress_and_goes_on_where_it_ended(run: Run) -> None:
    assert [line.split(" loss ")[0] for line in run.first] == ["epoch 1/2"]
    assert [line.split(" loss ")[0] for line in run.second] == ["resumed after epoch 1", "epoch 2/2"]
    for part, (state, epochs) in enumerate(((run.after_first, 1), (run.after_second, 2))):
        assert state["epoch"] == epochs
        assert state["average"]["n_averaged"] == epochs * STEPS, f"part {part}"
        assert {int(moments["step"]) for moments in state["optimizer"]["state"].values()} == {epochs * STEPS}


def test_a_resumed_training_does_not_draw_the_same_again(run: Run) -> None:
    assert len(run.fed) == 2 * STEPS
    assert len(torch.stack(run.fed).flatten(1).unique(dim=0)) == 2 * STEPS


def test_training_changes_every_weight_and_the_average_follows(run: Run) -> None:
    for which in ("model", "average"):
        before, after = run.after_first[which], run.after_second[which]
        unchanged = [name for name in before if torch.equal(before[name], after[name])]
        assert not unchanged, which
        assert all(value.isfinite().all() for value in after.values())


def test_training_a_finished_run_again_does_nothing(
    run: Run, data: DataSet, monkeypatch: pytest.MonkeyPatch, small_model: None
) -> None:
    arguments = ["--data", data.folder, "--run", run.folder, "--device", "cpu", "--batch-size", 2, "--epochs", 2]
    before = (run.folder / "checkpoint.pt").read_bytes()
    assert said_by(monkeypatch, train.main, *arguments) == ["resumed after epoch 2"]
    assert (run.folder / "checkpoint.pt").read_bytes() == before


def test_the_export_is_the_average_in_half_precision(run: Run, exported: Exported) -> None:
    weights, average = load_file(exported.folder / "model.safetensors"), run.after_second["average"]
    assert {f"module.{name}" for name in weights} == average.keys() - {"n_averaged"}
    for name, value in weights.items():
        assert value.dtype == torch.float16
        assert torch.equal(value, average[f"module.{name}"].half()), name


def test_the_server_reads_the_exported_folder(exported: Exported) -> None:
    info = exported.loaded.info
    assert info.labels == tuple(NAMES)
    assert (info.architecture, info.num_blocks, info.num_tokens) == ("vit_tiny_patch16_224", 2, 257)
    shown = info.preprocessing
    assert shown.input_size == shown.resize_size == (64, 64)
    assert shown.mean == shown.std == (0.5, 0.5, 0.5)


def test_the_export_ends_with_a_measurement_that_the_served_model_repeats(exported: Exported, data: DataSet) -> None:
    rows = json.loads(exported.said[-1])["rows"]
    assert [row["r"] for row in rows] == [0, 4, 20]
    assert [row["tokens"] for row in rows] == [257, 257 - 2 * 4, 257 - 2 * 20]
    x = data.val.images.float() / 127.5 - 1
    with torch.inference_mode():
        guesses = [exported.loaded.merged(x, row["r"]).argmax(1) for row in rows]
    for row, guess in zip(rows, guesses, strict=True):
        assert row["top1"] == pytest.approx((guess == data.val.labels).float().mean().item())
        assert row["agreement"] == pytest.approx((guess == guesses[0]).float().mean().item())


def test_top1_is_agreement_where_the_labels_are_the_answers_without_merging() -> None:
    model = timm.create_model("vit_tiny_patch16_224", **(train.MODEL_ARGS | SMALL)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # large enough that images differ in their answers
            torch.nn.init.normal_(parameter, std=2 * parameter[0].numel() ** -0.5)
    images = torch.randint(256, (24, 3, 16, 16), dtype=torch.uint8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    with torch.no_grad():
        labels = model(images.float() / 127.5 - 1).argmax(1)
    assert len(labels.unique()) > 3
    labels[0] = (labels[0] + 1) % 200
    none, some, most = export.measure(model, Split(images, labels), [8, 20])
    assert none["agreement"] == 1 and none["top1"] == pytest.approx(23 / 24)
    for row in (some, most):
        assert abs(row["agreement"] - row["top1"]) <= 1 / 24 + 1e-6
    assert most["agreement"] < 1


def test_the_same_seed_trains_the_same_model(
    data: DataSet, small_model: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []
    for name in "ab":
        run = tmp_path / name
        arguments = ["--data", data.folder, "--run", run, "--device", "cpu", "--batch-size", 2, "--epochs", 1]
        said_by(monkeypatch, train.main, *arguments)
        states.append(torch.load(run / "checkpoint.pt", weights_only=True)["model"])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
