"""The stage that decodes, on the CPU: images beside Pillow's, refused files, mixed batches; whether there is one."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from server.device import preparing
from server.device.models import LoadedModel, load_model
from server.device.prepared import Prepared, stacked
from server.device.preparing import Preparer
from server.engine_process import build_engine
from server.errors import ServerError, SettingsError, UndecodableError
from server.images import nvjpeg as decoding
from server.images.image import JpegFile, Pixels
from server.images.nvjpeg import by_libjpeg, engine_decodes
from server.images.pillow import decode, read
from server.images.preprocessing import Preprocessing
from server.ipc.messages import Classify, Item
from server.model_spec import ModelSpec
from server.settings import Settings
from server.types import BatchKey
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


def as_it_is(width: int = 40, height: int = 30) -> Preprocessing:
    """Of a model that takes images of this size as they are."""
    half = (0.5, 0.5, 0.5)
    return Preprocessing((height, width), (height, width), "squash", "bicubic", half, half)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_its_images_are_pillows(mode: str, options: dict[str, Any]) -> None:
    files = [jpeg(40, 30, index, mode, **options) for index in range(3)]
    batch = torch.zeros(4, 30, 40, 3, dtype=torch.uint8)
    assert by_libjpeg([JpegFile(file, 40, 30) for file in files], as_it_is(), batch, [3, 1, 0]) == []
    for file, row in zip(files, (3, 1, 0), strict=True):
        wanted = np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int)
        # Both are libjpeg, though not of one version.
        assert np.abs(batch[row].numpy() - wanted).max() <= 2
    assert (batch[2] == 0).all()


@pytest.mark.parametrize("bad", [{0}, {6}, {2, 3}, set(range(7)), set()])
def test_files_that_it_refuses_cost_their_neighbours_nothing(bad: set[int]) -> None:
    files = [JpegFile(broken() if index in bad else jpeg(seed=index), 40, 30) for index in range(7)]
    batch = torch.zeros(7, 30, 40, 3, dtype=torch.uint8)
    assert by_libjpeg(files, as_it_is(), batch, range(7)) == sorted(bad)
    assert [bool(image.any()) for image in batch] == [index not in bad for index in range(7)]


def test_an_image_of_another_size_than_was_told_is_refused() -> None:
    batch = torch.zeros(2, 30, 40, 3, dtype=torch.uint8)
    assert by_libjpeg([JpegFile(jpeg(), 40, 31), JpegFile(jpeg(), 40, 30)], as_it_is(), batch, [0, 1]) == [0]


def test_the_engine_decodes_where_it_is_told_to_and_by_itself_on_a_gpu_alone() -> None:
    assert engine_decodes("device", CPU) is True
    assert (
        engine_decodes("cpu", CPU)
        is engine_decodes("auto", CPU)
        is engine_decodes("cpu", torch.device("cuda"))
        is False
    )


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (OSError("no nvJPEG in this build\nand a long trace"), "no nvJPEG in this build"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_a_decoder_that_does_not_work_is_told_of(
    failure: Exception, told: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(device: torch.device) -> None:
        raise failure

    monkeypatch.setattr(decoding, "decoder_on", fail)
    with pytest.raises(SettingsError, match=f"--decode device: cpu cannot decode JPEG: {told}$"):
        engine_decodes("device", CPU)
    assert engine_decodes("auto", torch.device("meta")) is False


def test_a_decoder_that_refuses_what_any_takes_or_gives_other_colours_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuses(files: Sequence[JpegFile], seen: Preprocessing, batch: Tensor, rows: Sequence[int]) -> list[int]:
        return list(range(len(files)))

    monkeypatch.setattr(decoding, "decoder_on", lambda device: refuses)
    with pytest.raises(SettingsError, match="refuses the simplest file$"):
        engine_decodes("device", CPU)
    monkeypatch.setattr(decoding, "decoder_on", lambda device: lambda *args: [])
    with pytest.raises(SettingsError, match="wrong colours"):
        engine_decodes("device", CPU)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(ModelSpec.model_validate({"source": "bundled"}))


@pytest.fixture
def prepare(loaded: LoadedModel) -> Preparer:
    return Preparer(CPU, {loaded.info.name: loaded.info}, MAX_PIXELS)


@pytest.fixture
def key(loaded: LoadedModel) -> BatchKey:
    return loaded.info.batch_key(loaded.info.schedule(4))


def items_of(loaded: LoadedModel, files: Sequence[bytes]) -> list[Item]:
    """Images of one request: whole JPEGs and broken ones as files, others as pixels, as the HTTP process sends them."""
    images: list[Pixels | JpegFile] = [
        JpegFile(file, 40, 30) if file == broken() else read(file, loaded.info.preprocessing, MAX_PIXELS, True)
        for file in files
    ]
    request = Classify(model=loaded.info.name, images=images, deadline=0.0, top_k=3)
    return [Item(request, index) for index in range(len(images))]


def by_pillow(loaded: LoadedModel, files: Sequence[bytes]) -> Tensor:
    pixels = [decode(file, loaded.info.preprocessing, MAX_PIXELS) for file in files]
    return stacked(pixels, loaded.info.preprocessing.input_size, CPU)


def pixels_of(outcomes: Sequence[Prepared | ServerError]) -> Tensor:
    """Of one batch of which nothing was refused."""
    ready = [each for each in outcomes if isinstance(each, Prepared)]
    assert len(ready) == len(outcomes) and len({id(each.batch) for each in ready}) == 1
    return torch.stack([each.batch.pixels[each.row] for each in ready])


def test_a_mixed_batch_is_ready_in_order_and_errors_are_those_of_their_own_images(
    loaded: LoadedModel, prepare: Preparer, key: BatchKey
) -> None:
    files = [jpeg(), encode(noise(50, 60, 1)), broken(), jpeg(300, 200, 2), jpeg(64, 64, 3, "L"), broken()]
    items = items_of(loaded, files)
    outcomes = prepare(key, items)
    ready = [each for each in outcomes if isinstance(each, Prepared)]
    assert [each.item for each in ready] == [items[index] for index in (0, 1, 3, 4)]
    assert [each.row for each in ready] == [0, 1, 2, 3]
    for index in (2, 5):
        error = outcomes[index]
        with pytest.raises(UndecodableError) as alone:
            decode(files[index], loaded.info.preprocessing, MAX_PIXELS)
        assert isinstance(error, UndecodableError)
        assert error.message == alone.value.message and error.details["image"] == index

    batch = ready[0].batch.pixels
    assert batch.dtype == torch.uint8 and batch.shape == (4, *key.input_size, 3) and batch.is_contiguous()
    levels = (pixels_of(ready).int() - by_pillow(loaded, [files[index] for index in (0, 1, 3, 4)]).int()).abs()
    assert levels.max() <= 4 and levels.float().mean() <= 0.2
    assert levels[1].max() == 0  # not decoded here


def test_a_batch_of_which_nothing_can_be_decoded_has_errors_alone(
    loaded: LoadedModel, prepare: Preparer, key: BatchKey
) -> None:
    outcomes = prepare(key, items_of(loaded, [broken()] * 2))
    assert all(isinstance(each, ServerError) for each in outcomes) and len(outcomes) == 2


def test_a_file_that_only_pillow_reads_is_answered(
    loaded: LoadedModel, key: BatchKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuses_all = lambda files, *args: list(range(len(files)))  # noqa: E731
    monkeypatch.setattr(preparing, "decoder_on", lambda device: refuses_all)
    files = [jpeg(), jpeg(seed=1)]
    outcomes = Preparer(CPU, {loaded.info.name: loaded.info}, MAX_PIXELS)(key, items_of(loaded, files))
    assert torch.equal(pixels_of(outcomes), by_pillow(loaded, files))


def test_files_are_decoded_in_parts_that_memory_holds(
    loaded: LoadedModel, prepare: Preparer, key: BatchKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[int] = []

    def counted(files: Sequence[JpegFile], *args: Any) -> list[int]:
        parts.append(len(files))
        return by_libjpeg(files, *args)

    items = items_of(loaded, [jpeg(seed=seed) for seed in range(5)])
    whole = prepare(key, items)
    monkeypatch.setattr(preparing, "decoder_on", lambda device: counted)
    monkeypatch.setattr(preparing, "PART_PIXELS", 2 * 1200)
    split = Preparer(CPU, {loaded.info.name: loaded.info}, MAX_PIXELS)(key, items)
    assert parts == [2, 2, 1]
    assert torch.equal(pixels_of(whole), pixels_of(split))


def test_it_warms_up(prepare: Preparer, key: BatchKey) -> None:
    prepare.warm_up(key)


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
