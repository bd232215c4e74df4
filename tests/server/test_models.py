"""Model sources: folders, labels, weights that fit and weights that do not; a message for everything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data.imagenet_info import ImageNetInfo

from server.device import models
from server.device.models import load_model
from server.device.prepared import PixelBatch, Prepared, stacked
from server.device.runner import Runner
from server.errors import EngineError, SettingsError
from server.images.image import Pixels
from server.images.preprocessing import Preprocessing
from server.ipc.messages import Classify, Item, TopK
from server.model_spec import ModelSpec
from server.types import BatchKey

SMALL = "vit_tiny_patch16_224"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's folder that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture(scope="module", autouse=True)
def _small_timm() -> Any:
    """The registered timm model of these tests, made small: they are about its classes and its configuration."""
    patch = pytest.MonkeyPatch()
    create = timm.create_model

    def create_small(name: str, **options: Any) -> Any:
        size: dict[str, Any] = {"depth": 1, "embed_dim": 24} if name == SMALL else {}
        return create(name, **(size | options))

    patch.setattr(timm, "create_model", create_small)
    yield
    patch.undo()


def spec(source: str | Path, **more: Any) -> ModelSpec:
    text = f"local-dir:{source}" if isinstance(source, Path) else source
    return ModelSpec(source=text, **({"name": "mine"} | more))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a folder's config.json."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def test_a_folder_is_loaded_with_its_labels_its_preprocessing_and_its_weights(tiny_folder: Path) -> None:
    loaded = load_model(spec(tiny_folder))
    info = loaded.info
    assert (info.name, info.architecture, info.labels) == ("mine", SMALL, ("cat", "dog", "goldfish"))
    assert info.preprocessing == Preprocessing(
        (32, 32), (35, 35), "center", "bilinear", (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    )
    assert (info.num_blocks, info.num_tokens, info.num_prefix_tokens, info.max_r) == (2, 17, 1, 8)
    assert not loaded.merged.training
    saved = load_file(tiny_folder / "model.safetensors")
    held = {name.rpartition("model.")[2] or name: value for name, value in loaded.merged.state_dict().items()}
    assert len(held) == len(saved)
    assert all(held[name].dtype == torch.float32 and torch.equal(held[name], saved[name].float()) for name in saved)


def test_the_bundled_model_is_a_folder_of_the_same_layout(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "BUNDLED", tiny_folder)
    info = load_model(ModelSpec.model_validate("bundled")).info
    assert (info.name, info.source, info.labels[2]) == ("tome-vit-tiny-64", "bundled", "goldfish")


def test_label_names_alone_are_the_words(folder: Path) -> None:
    edit(folder, lambda config: config.pop("label_descriptions"))
    assert load_model(spec(folder)).info.labels == ("n01", "n02", "n03")


def test_without_label_names_an_odd_number_of_classes_is_numbered(folder: Path) -> None:
    edit(folder, lambda config: (config.pop("label_names"), config.pop("label_descriptions")))
    assert load_model(spec(folder)).info.labels == ("class 0", "class 1", "class 2")


def test_a_thousand_classes_are_imagenets() -> None:
    labels = load_model(spec(SMALL, weights="random")).info.labels
    assert labels == tuple(ImageNetInfo("imagenet-1k").label_descriptions())
    assert "goldfish" in labels[1] and len(labels) == 1000


def test_a_wrong_number_of_label_names_stops_the_start(folder: Path) -> None:
    edit(folder, lambda config: config.update(label_names=["n01", "n02"]))
    with pytest.raises(SettingsError, match="label"):
        load_model(spec(folder))


def test_squash_keeps_both_sides(folder: Path) -> None:
    edit(folder, lambda config: config["pretrained_cfg"].update(crop_mode="squash", crop_pct=1.0))
    preprocessing = load_model(spec(folder)).info.preprocessing
    assert (preprocessing.crop_mode, preprocessing.resize_size) == ("squash", (32, 32))


def test_a_crop_mode_that_is_not_supported_stops_the_start(folder: Path) -> None:
    edit(folder, lambda config: config["pretrained_cfg"].update(crop_mode="border"))
    with pytest.raises(SettingsError, match="'border'"):
        load_model(spec(folder))


def test_weights_from_a_file_go_into_the_named_model(tmp_path: Path) -> None:
    state = timm.create_model(SMALL).state_dict()
    save_file(state, tmp_path / "mine.safetensors")
    held = load_model(spec(SMALL, weights=str(tmp_path / "mine.safetensors"))).merged.state_dict()
    assert any(torch.equal(value, state["head.weight"]) for name, value in held.items() if name.endswith("head.weight"))


def test_random_weights_are_said_to_mean_nothing(caplog: pytest.LogCaptureFixture) -> None:
    load_model(spec(SMALL, weights="random"))
    assert "random weights" in caplog.text


def pickle_only(folder: Path) -> ModelSpec:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return spec(folder)


def without_config(folder: Path) -> ModelSpec:
    (folder / "config.json").unlink()
    return spec(folder)


def broken_config(folder: Path) -> ModelSpec:
    (folder / "config.json").write_text("{")
    return spec(folder)


def weights_of_another_shape(folder: Path) -> ModelSpec:
    save_file({"head.weight": torch.zeros(3, 5)}, folder / "model.safetensors")
    return spec(folder)


def broken_weights(folder: Path) -> ModelSpec:
    (folder / "model.safetensors").write_bytes(b"these are no weights")
    return spec(folder)


def weights_cut_short(folder: Path) -> ModelSpec:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return spec(folder)


def pickled_weights(folder: Path) -> ModelSpec:
    torch.save({"head.weight": torch.zeros(1)}, folder / "weights.pth")
    return spec(SMALL, weights=str(folder / "weights.pth"))


REFUSED: dict[str, tuple[Callable[[Path], ModelSpec], str]] = {
    "pickle only": (pickle_only, "safetensors only"),
    "no config": (without_config, r"there is no .*config\.json"),
    "broken config": (broken_config, r"config\.json cannot be read: it is not JSON"),
    "weights of another shape": (weights_of_another_shape, "do not fit"),
    "broken weights": (broken_weights, "not a safetensors file"),
    "weights cut short": (weights_cut_short, "not a safetensors file"),
    "pickled weights": (pickled_weights, "not a safetensors file"),
    "no folder": (lambda folder: spec(folder / "nothing"), "mine: there is no folder"),
    "no weights file": (lambda folder: spec(SMALL, weights=str(folder / "nothing")), "no weights file"),
    "a folder for weights": (lambda folder: spec(SMALL, weights=str(folder)), "mine"),
    "unknown name": (lambda folder: spec("vit_of_nobody"), "vit_of_nobody"),
    "not a ViT": (lambda folder: spec("resnet18", weights="random"), "(?i)resnet.*VisionTransformer"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore::UserWarning:timm")
def test_what_cannot_be_loaded_stops_the_start_with_a_reason(case: str, folder: Path) -> None:
    make, reason = REFUSED[case]
    wanted = make(folder)
    with pytest.raises(SettingsError, match=reason):
        load_model(wanted)


def test_the_runner_answers_as_the_model_does_whatever_else_is_in_the_batch(tiny_folder: Path) -> None:
    loaded = load_model(spec(tiny_folder))
    runner = Runner({"mine": loaded}, "cpu", "fp32")
    generator = torch.Generator().manual_seed(0)
    for schedule in ((0, 0), (8, 2)):
        key = BatchKey("mine", schedule, (32, 32))
        images = [torch.randint(256, (32, 32, 3), dtype=torch.uint8, generator=generator) for _ in range(3)]
        pixels = [image.numpy().tobytes() for image in images]
        batch = PixelBatch(stacked(pixels, (32, 32), torch.device("cpu")))
        asked = [
            Classify(model="mine", images=[Pixels(each)], r=schedule, deadline=1.0, top_k=top_k)
            for top_k, each in enumerate(pixels, 1)
        ]
        prepared = [Prepared(Item(request, 0), batch, row) for row, request in enumerate(asked)]
        for image, request, answer in zip(images, asked, runner.forward(key, prepared), strict=True):
            mean, std = torch.tensor(loaded.info.preprocessing.mean), torch.tensor(loaded.info.preprocessing.std)
            with torch.no_grad():
                logits = loaded.merged((((image / 255) - mean) / std).permute(2, 0, 1)[None], r=schedule)
            wanted = logits.softmax(1)[0].topk(request.top_k)
            assert isinstance(answer, TopK) and answer.indices == wanted.indices.tolist()
            assert answer.scores == pytest.approx(wanted.values.tolist(), abs=1e-5)


def test_a_model_that_gives_no_numbers_is_an_error_and_not_an_answer(tiny_folder: Path) -> None:
    loaded = load_model(spec(tiny_folder))
    torch.nn.init.constant_(loaded.merged.get_parameter("model.head.bias"), float("nan"))
    runner = Runner({"mine": loaded}, "cpu", "fp32")
    with pytest.raises(EngineError, match="precision"):
        runner.warm_up(BatchKey("mine", (0, 0), (32, 32)))


def test_a_model_of_the_hub_is_its_config_and_its_safetensors_at_the_revision_asked_for(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[tuple[str, str, str | None]] = []

    def fetch(repo: str, filename: str, revision: str | None = None, **options: Any) -> str:
        fetched.append((repo, filename, revision))
        return str(tiny_folder / filename)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", fetch)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    hub = load_model(ModelSpec.model_validate("hf-hub:someone/mine@v2"))
    assert fetched == [("someone/mine", "config.json", "v2"), ("someone/mine", "model.safetensors", "v2")]
    here = load_model(spec(tiny_folder))
    assert (hub.info.name, hub.info.labels) == ("mine", here.info.labels)
    assert all(torch.equal(hub.merged.state_dict()[name], value) for name, value in here.merged.state_dict().items())


def test_without_a_network_a_model_of_the_hub_is_one_sentence_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[str] = []

    def no_network(host: str, *_: Any, **__: Any) -> Any:
        asked.append(host)
        raise OSError("Name or service not known")

    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("socket.getaddrinfo", no_network)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SettingsError, match="has no address here, and the hub's cache has no such file") as refused:
        load_model(ModelSpec.model_validate("hf-hub:someone/mine-that-nobody-has"))
    assert len(asked) == 1 and "\n" not in str(refused.value)
    assert "Retrying" not in caplog.text
