"""A model served with tuned numbers: its answers, what they say, the curve of `auto`, and OpenVINO's graphs."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from server.batching.engine import LocalEngine
from server.cli import main
from server.curve import Curve
from server.device.models import load_model
from server.engine_process import build_engine
from server.errors import NotFoundError
from server.images.pillow import decode
from server.model_spec import ModelSpec
from server.settings import Settings
from tests.core.tuned_numbers import numbers
from tests.server.conftest import Service, encode, serving
from tests.server.test_backends import images, loaded

BACKENDS = pytest.mark.parametrize("backend", ["torch", "openvino"])


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's folder, with tuned numbers for r of 3 to 4 and 6 to 8."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "tiny-vit"))
    merged = load_model(ModelSpec.model_validate(f"local-dir:{folder}")).merged
    numbers(merged, (3, 4), (6, 8)).save(folder / "model.tuned.safetensors")
    return folder


@pytest.fixture(scope="module")
def photo() -> bytes:
    return encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 36, 3), np.uint8)))


def engine(folder: Path, backend: str = "torch", **more: Any) -> LocalEngine:
    said = {"model": f"local-dir:{folder}", "device": "cpu", "backend": backend, "threads": 1, "max_batch_size": 4}
    said["precision"] = "fp32"  # OpenVINO's own choice is timed at every start: two engines may differ
    return build_engine(Settings.model_validate(said | {"state_dir": None} | more))


@asynccontextmanager
async def served(folder: Path, backend: str = "torch", **more: Any) -> AsyncIterator[Service]:
    """The application around a real engine."""
    if backend == "openvino":
        pytest.importorskip("openvino")
    local = engine(folder, backend, **more)
    local.start()
    async with serving(engine=local) as service:
        yield service
    await local.close()


async def scores(service: Service, photo: bytes, r: object) -> tuple[list[float], bool]:
    """What each class gets, and whether tuned numbers computed it."""
    body = (await service.classify(photo, r=r)).json()
    found = {each["index"]: each["score"] for each in body["results"][0]["top_k"]}
    return [found[index] for index in sorted(found)], body["tuned"]


@BACKENDS
async def test_answers_of_a_band_are_tuned_and_all_others_stay_bit_for_bit(
    backend: str, folder: Path, photo: bytes
) -> None:
    """r=4 is compiled at the start; OpenVINO leaves the other numbers above 0 to torch."""
    asked = ["0", "1", "2", "3", "4", "5", "6", "8", "5,0", "4,2"]
    answers = []
    for tuned in ("auto", "none"):
        async with served(folder, backend, r="4", tuned=tuned) as service:
            answers.append({r: await scores(service, photo, r) for r in asked})
    with_them, without = answers
    assert [r for r in asked if with_them[r][1]] == ["3", "4", "6", "8", "5,0", "4,2"]
    assert not any(tuned for _, tuned in without.values())
    model = load_model(ModelSpec.model_validate(f"local-dir:{folder}"))
    seen = model.info.preprocessing
    merged = model.merged.from_pixels(seen.mean, seen.std)
    pixels = torch.frombuffer(bytearray(decode(photo, seen, 10_000)), dtype=torch.uint8).view(1, 32, 32, 3)
    for r, (found, is_tuned) in with_them.items():
        if is_tuned:
            assert found != pytest.approx(without[r][0], abs=1e-2)
        else:
            assert found == without[r][0]
        with torch.inference_mode():
            wanted = merged(pixels, json.loads(f"[{r}]") if "," in r else int(r)).softmax(dim=1)[0]
        assert found == pytest.approx(wanted.tolist(), abs=1e-4)


async def test_explanations_are_tuned_too(folder: Path, photo: bytes) -> None:
    async def explained(service: Service, r: int) -> dict[str, Any]:
        answer = await service.client.post(
            "/v1/explain", content=photo, headers={"content-type": "image/png"}, params={"r": r}
        )
        body: dict[str, Any] = answer.json()
        del body["timings_ms"]
        return body

    async with served(folder) as service:
        with_them = {r: await explained(service, r) for r in (0, 2, 4)}
        wanted = (await service.classify(photo, r=4)).json()["results"][0]["top_k"]
    async with served(folder, tuned="none") as service:
        without = {r: await explained(service, r) for r in (0, 2, 4)}
    assert {r: body["tuned"] for r, body in with_them.items()} == {0: False, 2: False, 4: True}
    assert with_them[0] == without[0] and with_them[2] == without[2]
    assert with_them[4]["top_k"] != without[4]["top_k"]
    assert with_them[4]["top_k"] == wanted


async def test_a_model_says_its_bands(folder: Path) -> None:
    async with served(folder) as service:
        assert (await service.client.get("/v1/models/tiny-vit")).json()["tuned"] == [[3, 4], [6, 8]]
    async with served(folder, tuned="none") as service:
        assert (await service.client.get("/v1/models/tiny-vit")).json()["tuned"] == []


async def test_stale_ones_leave_the_answers_as_they_were(
    folder: Path, photo: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    merged = load_model(ModelSpec.model_validate(f"local-dir:{folder},tuned=none")).merged
    stale = numbers(merged, (3, 4))._replace(weights={"float32": "ab" * 32})
    stale.save(folder / "model.tuned.safetensors")
    async with served(folder) as service:
        found = await scores(service, photo, 4)
    assert "is stale: made with other weights or for another image size (abababababab, not " in caplog.text
    async with served(folder, tuned="none") as service:
        assert found == await scores(service, photo, 4)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Pictures of noise."""
    (tmp_path / "photos").mkdir()
    random_numbers = np.random.default_rng(1)
    for number in range(8):
        noise = Image.fromarray(random_numbers.integers(0, 256, (8, 8, 3), np.uint8)).resize((40, 36))
        (tmp_path / "photos" / f"{number}.png").write_bytes(encode(noise))
    return tmp_path / "photos"


async def test_auto_goes_by_the_curve_that_was_measured_with_them(
    folder: Path, photos: Path, photo: bytes, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    def calibrated(*more: str) -> Curve:
        plain = ["--device", "cpu", "--backend", "torch", "--threads", "1", "--max-batch-size", "4"]
        asked = ["--model", f"local-dir:{folder}", "--images", str(photos), "--r", "2", "4", "--state-dir", "none"]
        assert main(["calibrate", *asked, *plain, *more]) == 0
        return Curve.from_json(capsys.readouterr().out.splitlines()[-1])

    def agreement(tuned: str, r: int) -> float:
        """As the commands see it that classify the same photos one by one."""
        classes: list[list[int]] = []
        for each in (r, 0):
            files = sorted(map(str, photos.iterdir()))
            flags = ["--model", f"local-dir:{folder}", "--tuned", tuned, "--r", str(each), "--top-k", "1", "--json"]
            assert main(["classify", "--device", "cpu", *flags, *files]) == 0
            lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
            assert {line["tuned"] for line in lines} == {tuned == "auto" and each == 4}
            classes.append([line["top_k"][0]["index"] for line in lines])
        merged, unmerged = classes
        return sum(one == other for one, other in zip(merged, unmerged, strict=True)) / len(merged)

    without, with_them = calibrated("--tuned", "none"), calibrated()
    assert (without.facts.tuned is None) and with_them.facts.tuned is not None
    for curve, tuned in ((without, "none"), (with_them, "auto")):
        assert [row.agreement for row in curve.rows] == [1.0, agreement(tuned, 2), agreement(tuned, 4)]
    assert without.rows[1].agreement == with_them.rows[1].agreement
    assert without.rows[2].agreement != with_them.rows[2].agreement

    local = engine(folder)
    assert (await local.curve("tiny-vit")).facts.tuned == with_them.facts.tuned
    assert [row.agreement for row in (await local.curve("tiny-vit")).rows] == [row.agreement for row in with_them.rows]
    with pytest.raises(NotFoundError):
        await engine(folder, tuned="none").curve("tiny-vit")
    assert "curve.json is stale: made with tuned numbers that are not used" in caplog.text
    (folder / "curve.json").write_text(without.to_json())
    with pytest.raises(NotFoundError):
        await engine(folder).curve("tiny-vit")
    assert "curve.json is stale: made without tuned numbers" in caplog.text


def test_an_export_says_whether_it_is_tuned(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    images = torch.randn(2, 3, 32, 32)
    merged = load_model(ModelSpec.model_validate(f"local-dir:{folder}")).merged
    for r, tuned in ((2, "false"), (4, "true")):
        file = tmp_path / "tiny.onnx"
        assert main(["export", "--model", f"local-dir:{folder}", "-o", str(file), "--r", str(r)]) == 0
        told = {each.key: each.value for each in onnx.load(file).metadata_props}
        assert told["tuned"] == tuned
        (logits,) = runtime.InferenceSession(file).run(["logits"], {"images": images.numpy()})
        with torch.inference_mode():
            torch.testing.assert_close(torch.from_numpy(logits), merged(images, r), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_graphs_of_openvino_are_of_the_tuned_numbers(tmp_path: Path) -> None:
    compiler_of: Any = pytest.importorskip("server.device.openvino_compiler")
    merged, photos = loaded().merged, images(2)
    runs = []  # kept to the end: this test once stood still in native code after it had dropped a graph

    def answers(*schedules: tuple[int, int]) -> list[torch.Tensor]:
        compiler = compiler_of.Compiler(merged, (64, 64), 1, tmp_path)
        graphs = [compiler.graph(schedule, 1, "fp32") for schedule in schedules]
        runs.extend(graphs)
        return [graph(photos) for graph in graphs]

    before = answers((0, 0), (2, 1), (5, 3))
    merged.take_tuned(numbers(merged, (4, 6)))
    tuned, tuned_wanted = answers((0, 0), (2, 1), (5, 3)), merged(photos, (5, 3))
    merged.take_tuned(numbers(merged, (3, 3), (4, 6)))
    (other,), other_wanted = answers((5, 3)), merged(photos, (5, 3))
    merged.take_tuned(None)
    (again,) = answers((5, 3))
    assert torch.equal(tuned[0], before[0]) and torch.equal(tuned[1], before[1])
    torch.testing.assert_close(tuned[2], tuned_wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other, other_wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(again, before[2])
    for one, two in ((tuned_wanted, before[2]), (other_wanted, before[2]), (tuned_wanted, other_wanted)):
        assert not torch.allclose(one, two, atol=1e-2)


@torch.inference_mode()
def test_a_process_that_translates_for_openvino_gets_the_tuned_numbers(tmp_path: Path) -> None:
    compiler_of: Any = pytest.importorskip("server.device.openvino_compiler")
    merged, photos = loaded().merged, images(2)
    untuned = merged(photos, (5, 3))
    merged.take_tuned(numbers(merged, (4, 6)))
    merged(photos, 4)  # the model of the band is made, and goes along
    graph = compiler_of.Compiler(merged, (64, 64), 1, tmp_path).graph((5, 3), 1, "fp32", aside=True)
    tuned, wanted = graph(photos), merged(photos, (5, 3))
    torch.testing.assert_close(tuned, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(wanted, untuned, atol=1e-2)
