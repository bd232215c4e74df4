"""Models without a classifier: served for their vectors, and every command says what it can make of one."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from server.cli import main
from server.commands import tune
from server.curve import Curve
from server.device.backend import BackendOptions
from server.device.choosing import choose_backend
from server.device.device import Device
from server.device.explainer import Explainer
from server.device.models import load_model
from server.device.runner import Runner
from server.images.image import Pixels
from server.ipc.messages import Embed, Explain, Item, Merges, TopK, Vector
from server.model_spec import ModelSpec
from tests.server.conftest import NUM_FEATURES, assert_is_error, features_of, grey_png, model_info, numbers, serving
from tests.server.model_folders import load, noise_photos, random_vit

PNG = {"content-type": "image/png"}


@pytest.fixture(scope="module")
def headless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a small random ViT with num_classes=0."""
    return random_vit(tmp_path_factory.mktemp("models") / "headless", num_classes=0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise_photos(tmp_path_factory.mktemp("photos"), 12)


def pixels(count: int) -> torch.Tensor:
    return torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_a_folder_without_classes_is_loaded(headless: Path) -> None:
    info = load(headless).info
    assert (info.labels, info.num_features, info.activation) == ((), 24, "softmax")


def test_a_headless_model_of_timms_is_loaded_by_its_name() -> None:
    spec = ModelSpec(source="vit_small_patch14_reg4_dinov2", name="dino", weights="random")
    info = load_model(spec).info
    assert (info.labels, info.num_features) == ((), 384)


@torch.inference_mode()
@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_every_backend_gives_its_features(headless: Path, backend: str) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino", reason="the package openvino is not installed")
    loaded = load(headless)
    options = BackendOptions(backend, 1, max_batch_size=2)
    made = choose_backend(loaded, torch.device("cpu"), "fp32", options, nullcontext(True))
    schedule = loaded.info.schedule(3)
    made.warm_up(schedule)
    seen = loaded.info.preprocessing
    images = loaded.merged.from_pixels(seen.mean, seen.std).normalised(pixels(2))
    wanted = loaded.merged.forward_head(loaded.merged.forward_tokens(images, schedule), pre_logits=True)
    torch.testing.assert_close(made.outputs(pixels(2), schedule), wanted, atol=1e-4, rtol=1e-4)


def test_the_device_embeds_and_explains(headless: Path) -> None:
    loaded = load(headless)
    device = Device(Runner({"mine": loaded}, "cpu", "fp32"), Explainer({"mine": loaded}, "cpu"))
    images = [Pixels(image.numpy().tobytes()) for image in pixels(2)]
    key = loaded.info.batch_key(loaded.info.schedule(4))
    embed = Embed(model="mine", images=list(images), deadline=1.0)
    vectors = device.compute(key, [Item(embed, 0), Item(embed, 1)])
    assert all(isinstance(vector, Vector) and len(vector.values) == 4 * 24 for vector in vectors)
    explain = Explain(model="mine", images=list(images), deadline=1.0, top_k=0)
    (merges,) = device.compute(key._replace(operation="explain"), [Item(explain, 0)])
    assert isinstance(merges, Merges) and merges.top_k == TopK([], []) and len(merges.groups) == 4


def test_an_embedding_is_that_of_a_batch_of_its_own(headless: Path) -> None:
    """Vectors of two images in one batch are each other's neighbours in memory, and nothing else."""
    loaded = load(headless)
    device = Device(Runner({"mine": loaded}, "cpu", "fp32"), Explainer({"mine": loaded}, "cpu"))
    images = [Pixels(image.numpy().tobytes()) for image in pixels(3)]
    key, embed = loaded.info.batch_key(loaded.info.schedule(4)), Embed(model="mine", images=list(images), deadline=1.0)
    together = device.compute(key, [Item(embed, index) for index in range(3)])
    for index, vector in enumerate(together):
        (alone,) = device.compute(key, [Item(embed, index)])
        assert isinstance(alone, Vector) and isinstance(vector, Vector)
        np.testing.assert_allclose(numbers(vector), numbers(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("query", ["", "top_k=3", "threshold=0.5&function_to_apply=sigmoid"])
async def test_classify_says_why_not(query: str) -> None:
    async with serving(models=[model_info(labels=())]) as service:
        response = await service.client.post(f"/classify?{query}", content=grey_png(), headers=PNG)
        assert "model tiny has no classifier" in assert_is_error(response, 422, "invalid_parameter")
        assert service.device.batches == []


async def test_explain_works_and_names_no_class() -> None:
    async with serving(models=[model_info(labels=())]) as service:
        response = await service.client.post("/v1/explain?r=2", content=grey_png(), headers=PNG)
        assert response.status_code == 200, response.text
        assert response.json()["top_k"] == [] and len(response.json()["blocks"]) == 3


async def test_the_engine_embeds() -> None:
    async with serving(models=[model_info(labels=())]) as service:
        engine = service.app.state.service.engine
        asked = Embed(model="tiny", images=[Pixels(b"abc")], deadline=1e9)
        answered = await engine.answer(asked)
        assert [numbers(vector) for vector in answered.results] == [features_of(b"abc", (0, 0, 0))]


async def test_a_model_says_what_it_gives() -> None:
    async with serving(models=[model_info(labels=()), model_info("other", activation="sigmoid")]) as service:
        headless, other = [(await service.client.get(f"/v1/models/{name}")).json() for name in ("tiny", "other")]
        assert (headless["num_classes"], headless["classes"]) == (0, [])
        assert (headless["num_features"], headless["function_to_apply"]) == (NUM_FEATURES, "softmax")
        assert (other["num_classes"], other["function_to_apply"], other["version"]) == (101, "sigmoid", "1")


def test_the_commands_say_what_they_can_make_of_it(
    headless: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, photo = ["--model", f"local-dir:{headless}"], str(photos / "0.png")
    assert main(["classify", *model, "--device", "cpu", photo]) == 2
    assert "headless has no classifier" in capsys.readouterr().err
    assert main(["models", *model]) == 0
    assert "no classes but 24 features, 32 x 32 px" in capsys.readouterr().out
    assert main(["models", "--json", *model]) == 0
    described = json.loads(capsys.readouterr().out)
    assert (described["num_classes"], described["num_features"]) == (0, 24)
    assert main(["models", "--check", str(headless)]) == 0
    assert "is all right: vit_tiny_patch16_224, no classes but 24 features" in capsys.readouterr().out
    assert main(["explain", *model, "--device", "cpu", "--r", "4", "-o", str(tmp_path / "seen.png"), photo]) == 0
    assert capsys.readouterr().out == f"{photo}: tokens 65, after each block 61 57 53 49\n"
    monkeypatch.setattr(tune, "FEWEST", 10)
    assert main(["tune", *model, "--device", "cpu", "--images", str(photos)]) == 2
    assert "headless has no classifier" in capsys.readouterr().err


def test_it_is_exported_with_its_features(headless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    file = tmp_path / "model.onnx"
    assert main(["export", "--model", f"local-dir:{headless}", "--r", "4", "-o", str(file)]) == 0
    assert "to features (batch, 24)" in capsys.readouterr().out
    assert [output.name for output in onnx.load(file).graph.output] == ["features"]


def calibrate(folder: Path, photos: Path, file: Path, *more: str) -> int:
    model = ["--model", f"local-dir:{folder}", "--images", str(photos), "-o", str(file), "--state-dir", "none"]
    return main(["calibrate", *model, "--device", "cpu", "--backend", "torch", "--max-batch-size", "2", *more])


def test_calibrate_measures_its_neighbours(
    headless: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "curve.json"
    assert calibrate(headless, photos, file, "--r", "16") == 0
    curve = Curve.from_json(file.read_bytes())
    assert curve.agreement_of == "neighbours"
    unmerged, merged = curve.rows
    assert unmerged.neighbours is not None and merged.neighbours is not None
    assert (unmerged.agreement, unmerged.agreement_interval, unmerged.neighbours.same_index) == (1, (1, 1), 1)
    assert unmerged.neighbours.cosine == pytest.approx(1)
    assert merged.agreement_interval[0] <= merged.agreement <= merged.agreement_interval[1]
    assert merged.agreement * len(list(photos.iterdir())) * 10 == pytest.approx(round(merged.agreement * 120))
    assert merged.neighbours.cosine < 1
    table = capsys.readouterr().out.splitlines()
    assert table[1].startswith("neighbours: ") and "neighbours % (95 %) same r %   cosine" in table[2]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--limit", "10"], "10 photos are too few to measure a photo's 10 nearest neighbours; it takes 11 or more"),
        (["--labels", "labels.csv"], "--labels measures top-1"),
    ],
)
def test_calibrate_says_what_is_wrong(
    more: list[str], said: str, headless: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrate(headless, photos, tmp_path / "curve.json", *more) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "curve.json").exists()


def test_a_classifier_is_measured_by_its_neighbours_where_that_is_asked_for(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = random_vit(tmp_path / "classifier"), tmp_path / "curve.json"
    assert calibrate(folder, photos, file, "--neighbours", "--r", "8") == 0
    by_neighbours = Curve.from_json(file.read_bytes())
    assert by_neighbours.agreement_of == "neighbours" and by_neighbours.rows[1].neighbours is not None
    assert calibrate(folder, photos, file, "--r", "8") == 0
    by_class = Curve.from_json(file.read_bytes())
    assert by_class.agreement_of == "top1" and by_class.rows[1].neighbours is None
