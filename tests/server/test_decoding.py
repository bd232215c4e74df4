"""The engine's decoder and the stage around it, on the CPU: images beside Pillow's, refused files, mixed batches."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor

from server.device import preparing
from server.device.models import LoadedModel, load_model
from server.device.preparing import Preparer
from server.device.runner import Prepared, Runner
from server.engine_process import build_engine
from server.errors import ServerError, UndecodableError
from server.images import nvjpeg as decoding
from server.images.nvjpeg import decode_jpegs, engine_decodes
from server.images.pillow import decode
from server.settings import ModelSpec, Settings, SettingsError
from server.types import Job
from tests.server.conftest import encode, serving

CPU = torch.device("cpu")
MAX_PIXELS = 1_000_000


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def jpeg(width: int = 40, height: int = 30, seed: int = 0, mode: str = "RGB", **options: Any) -> bytes:
    return encode(noise(width, height, seed).convert(mode), "JPEG", **options)


def broken() -> bytes:
    """A whole header, an end, and nothing in between."""
    file = jpeg()
    return file[: file.index(b"\xff\xda")] + b"\xff\xd9"


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_its_images_are_pillows(mode: str, options: dict[str, Any]) -> None:
    files = [jpeg(40 + 7 * index, 30, index, mode, **options) for index in range(3)]
    for file, image in zip(files, decode_jpegs(files, CPU), strict=True):
        wanted = np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int)
        assert image is not None and image.dtype == torch.uint8
        # Both are libjpeg, though not of one version.
        assert np.abs(image.permute(1, 2, 0).numpy() - wanted).max() <= 2


@pytest.mark.parametrize("bad", [{0}, {6}, {2, 3}, set(range(7)), set()])
def test_files_that_it_refuses_cost_their_neighbours_nothing(bad: set[int]) -> None:
    files = [broken() if index in bad else jpeg(seed=index) for index in range(7)]
    images = decode_jpegs(files, CPU)
    assert {index for index, image in enumerate(images) if image is None} == bad


def test_out_of_memory_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(files: list[Tensor], *args: object) -> list[Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torchvision.io, "decode_jpeg", fail)
    with pytest.raises(torch.OutOfMemoryError):
        decode_jpegs([jpeg(), jpeg()], CPU)


def test_the_engine_decodes_where_it_is_told_to_and_by_itself_on_a_gpu_alone() -> None:
    assert engine_decodes("device", CPU) is True
    assert (
        engine_decodes("cpu", CPU)
        is engine_decodes("auto", CPU)
        is engine_decodes("cpu", torch.device("cuda"))
        is False
    )


def test_a_decoder_that_does_not_work_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(files: Sequence[bytes], device: torch.device) -> list[Tensor | None]:
        raise RuntimeError("no nvJPEG in this build\nand a long trace")

    monkeypatch.setattr(decoding, "decode_jpegs", fail)
    with pytest.raises(SettingsError, match="--decode device: cpu decodes no JPEG: no nvJPEG in this build$"):
        engine_decodes("device", CPU)
    assert engine_decodes("auto", torch.device("cuda")) is False
    assert "no nvJPEG" in caplog.text


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(ModelSpec.model_validate({"source": "bundled"}))


@pytest.fixture(scope="module")
def runner(loaded: LoadedModel) -> Runner:
    return Runner({loaded.info.name: loaded}, "cpu", "fp32")


def jobs_of(loaded: LoadedModel, files: Sequence[bytes]) -> list[Job]:
    """JPEGs as files, others as pixels, as the HTTP process sends them."""
    name, seen = loaded.info.name, loaded.info.preprocessing
    return [
        Job(name, file, None, 3, 1.0, jpeg_pixels=1200)
        if file.startswith(b"\xff\xd8")
        else Job(name, decode(file, seen, MAX_PIXELS), None, 3, 1.0)
        for file in files
    ]


def test_a_mixed_batch_is_ready_in_order_and_errors_are_those_of_their_own_jobs(
    loaded: LoadedModel, runner: Runner
) -> None:
    key = loaded.info.batch_key(loaded.info.schedule(4))
    files = [jpeg(), encode(noise(50, 60, 1)), broken(), jpeg(300, 200, 2), jpeg(64, 64, 3, "L"), broken()]
    jobs = jobs_of(loaded, files)
    prepare = Preparer(runner, {loaded.info.name: loaded.info}, MAX_PIXELS)
    outcomes = prepare(key, jobs)
    ready = [each for each in outcomes if isinstance(each, Prepared)]
    assert [each.job for each in ready] == [jobs[index] for index in (0, 1, 3, 4)]
    for index in (2, 5):
        error = outcomes[index]
        with pytest.raises(UndecodableError) as by_pillow:
            decode(files[index], loaded.info.preprocessing, MAX_PIXELS)
        assert isinstance(error, UndecodableError) and error.message == by_pillow.value.message

    pixels = [decode(files[index], loaded.info.preprocessing, MAX_PIXELS) for index in (0, 1, 3, 4)]
    batch = ready[0].batch
    assert batch.dtype == torch.uint8 and batch.shape == (4, *key.input_size, 3) and batch.is_contiguous()
    levels = (batch.int() - runner.pixels(key, pixels).int()).abs()
    assert levels.max() <= 4 and levels.float().mean() <= 0.2
    assert levels[1].max() == 0  # not decoded here
    whole = runner.run_prepared(key, ready)
    for parts in ([ready[:1], ready[1:]], [ready[::2], ready[1::2]]):
        scores = [top_k for part in parts for top_k in runner.run_prepared(key, part)]
        order = [each.job for part in parts for each in part]
        for each, got in zip(order, scores, strict=True):
            expected = whole[[one.job for one in ready].index(each)]
            assert got.indices == expected.indices and got.scores == pytest.approx(expected.scores, abs=1e-5)


def test_a_batch_of_which_nothing_can_be_decoded_has_errors_alone(loaded: LoadedModel, runner: Runner) -> None:
    key = loaded.info.batch_key(loaded.info.schedule(0))
    outcomes = Preparer(runner, {loaded.info.name: loaded.info}, MAX_PIXELS)(key, jobs_of(loaded, [broken()] * 2))
    assert all(isinstance(each, ServerError) for each in outcomes) and len(outcomes) == 2


def test_a_file_that_only_pillow_reads_is_answered(
    loaded: LoadedModel, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "decode_jpegs", lambda files, device: [None] * len(files))
    key = loaded.info.batch_key(loaded.info.schedule(0))
    ready = Preparer(runner, {loaded.info.name: loaded.info}, MAX_PIXELS)(key, jobs_of(loaded, [jpeg(), jpeg(seed=1)]))
    pixels = [decode(jpeg(seed=seed), loaded.info.preprocessing, MAX_PIXELS) for seed in (0, 1)]
    (batch,) = {id(each.batch): each.batch for each in ready if isinstance(each, Prepared)}.values()
    assert torch.equal(batch, runner.pixels(key, pixels))


def test_files_are_decoded_in_parts_that_memory_holds(
    loaded: LoadedModel, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[int] = []

    def counted(files: Sequence[bytes], device: torch.device) -> list[Tensor | None]:
        parts.append(len(files))
        return decode_jpegs(files, device)

    key = loaded.info.batch_key(loaded.info.schedule(0))
    jobs = jobs_of(loaded, [jpeg(seed=seed) for seed in range(5)])
    prepare = Preparer(runner, {loaded.info.name: loaded.info}, MAX_PIXELS)
    whole = prepare(key, jobs)
    monkeypatch.setattr(preparing, "decode_jpegs", counted)
    monkeypatch.setattr(preparing, "PART_PIXELS", 2 * 1200)
    split = prepare(key, jobs)
    assert parts == [2, 2, 1]
    assert isinstance(whole[0], Prepared) and isinstance(split[0], Prepared)
    assert torch.equal(whole[0].batch, split[0].batch)


async def test_one_process_of_both_sides_decodes_in_its_engine() -> None:
    """As a replica of Ray holds them: the application around the engine itself."""
    told: dict[str, Any] = {"decode": "device", "device": "cpu", "backend": "torch", "state_dir": None, "threads": 1}
    engine = build_engine(Settings.model_validate(told))
    engine.start()
    photo, png = jpeg(90, 70), encode(noise(90, 70))
    async with serving(engine=engine) as service:
        (info,) = engine.catalog().values()
        assert info.decodes_jpeg
        for file in (photo, png):
            answer = (await service.classify(file, r=4)).json()
            assert answer["r"] == 4 and len(answer["results"][0]["top_k"]) == 5
        error = (await service.classify(broken(), status=400)).json()["error"]
        assert error["code"] == "undecodable" and error["details"]["image"] == 0
        explained = await service.client.post("/v1/explain", content=photo, headers={"content-type": "image/jpeg"})
        assert explained.status_code == 200
    await engine.close()
