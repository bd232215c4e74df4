"""Models with several labels: sigmoid is their default, `threshold` may stand for `top_k`, agreement is of sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from server.batching.drift import DriftWatch
from server.calibration.places import find
from server.cli import main
from server.curve import Curve
from server.errors import InvalidError, SettingsError
from server.images.image import Pixels
from server.images.photos import read_photo
from server.ipc.messages import Classify, Item, TopK
from server.metrics import DRIFT_AGREED, DRIFT_CHECKED
from server.model_spec import ModelSpec
from server.types import LABEL_THRESHOLD, Activation, BatchKey
from tests.server.conftest import (
    NUM_CLASSES,
    assert_is_error,
    facts,
    fake_curve,
    grey_png,
    model_info,
    score_of,
    serving,
)
from tests.server.model_folders import edit, load, noise_photos, random_vit

MULTI = "multi_label_classification"


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a small random ViT with several labels."""
    folder = random_vit(tmp_path_factory.mktemp("models") / "several", num_classes=7)
    edit(folder, lambda config: config.update(problem_type=MULTI))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise_photos(tmp_path_factory.mktemp("photos"), 12)


CONFIGS: list[tuple[dict[str, Any], dict[str, Any], Activation]] = [
    ({}, {}, "softmax"),
    ({"problem_type": MULTI}, {}, "sigmoid"),
    ({}, {"problem_type": MULTI}, "sigmoid"),
    ({"problem_type": "single_label_classification"}, {"problem_type": MULTI}, "softmax"),
    ({"function_to_apply": "sigmoid"}, {}, "sigmoid"),
    ({}, {"function_to_apply": "none"}, "none"),
    ({"problem_type": MULTI, "function_to_apply": "softmax"}, {}, "softmax"),
]


@pytest.mark.parametrize(("outer", "inner", "activation"), CONFIGS, ids=str)
def test_the_config_says_what_makes_scores(
    outer: dict[str, Any], inner: dict[str, Any], activation: Activation, tmp_path: Path
) -> None:
    folder = random_vit(tmp_path / "model", num_classes=7)
    edit(folder, lambda config: (config.update(outer), config["pretrained_cfg"].update(inner)))
    assert load(folder).info.activation == activation


@pytest.mark.parametrize("wrong", [{"problem_type": "regression"}, {"function_to_apply": "tanh"}])
def test_another_word_stops_the_start(wrong: dict[str, str], tmp_path: Path) -> None:
    folder = random_vit(tmp_path / "model", num_classes=7)
    edit(folder, lambda config: config.update(wrong))
    ((name, value),) = wrong.items()
    with pytest.raises(SettingsError, match=f"{name}: .*{value}"):
        load(folder)


async def scores(service: Any, **query: Any) -> list[float]:
    answer = await service.classify(grey_png(), **query)
    return [each["score"] for each in answer.json()["results"][0]["top_k"]]


async def test_a_request_says_what_makes_its_scores_and_else_the_model_does() -> None:
    async with serving(models=[model_info(), model_info("several", activation="sigmoid")]) as service:
        assert await scores(service, top_k=2) == [0.5, 0.25]
        assert await scores(service, top_k=2, function_to_apply="none") == [0, -1]
        assert await scores(service, top_k=2, function_to_apply="sigmoid") == [
            score_of(0, "sigmoid"),
            pytest.approx(1 / 3),
        ]
        assert await scores(service, top_k=2, model="several") == [score_of(0, "sigmoid"), pytest.approx(1 / 3)]
        assert await scores(service, top_k=2, model="several", function_to_apply="softmax") == [0.5, 0.25]


async def test_a_threshold_names_each_class_from_it_on() -> None:
    async with serving(models=[model_info(activation="sigmoid")]) as service:
        assert await scores(service, threshold=0.25) == pytest.approx([1 / 2, 1 / 3, 1 / 4])
        assert await scores(service, threshold=0.9) == []
        assert len(await scores(service, threshold=0)) == NUM_CLASSES
        assert len(await scores(service)) == 5


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"threshold": 0.5, "top_k": 2, "function_to_apply": "sigmoid"}, "threshold and top_k are both given"),
        ({"threshold": 0.5}, "threshold goes with function_to_apply=sigmoid, not with softmax"),
        ({"threshold": 1.5, "function_to_apply": "sigmoid"}, "threshold is '1.5'"),
        ({"function_to_apply": "tanh"}, "function_to_apply is 'tanh'"),
    ],
)
async def test_what_does_not_go_together_is_refused(query: dict[str, Any], said: str) -> None:
    async with serving() as service:
        response = await service.classify(grey_png(), status=422, **query)
        assert said in assert_is_error(response, 422, "invalid_parameter")


async def test_what_merged_has_no_threshold() -> None:
    async with serving() as service:
        query = "threshold=0.5&function_to_apply=sigmoid"
        headers = {"content-type": "image/png"}
        response = await service.client.post(f"/v1/explain?{query}", content=grey_png(), headers=headers)
        assert "threshold" in assert_is_error(response, 422, "invalid_parameter")


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_lies_between_0_and_1(threshold: float) -> None:
    with pytest.raises(InvalidError, match="must lie between 0 and 1"):
        model_info().most_classes("sigmoid", threshold=threshold)


def test_the_command_names_labels_as_the_server_does(
    several: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo, model = str(photos / "0.png"), ["--model", f"local-dir:{several}", "--device", "cpu"]

    def named(*more: str) -> dict[int, float]:
        assert main(["classify", "--json", *model, *more, photo]) == 0
        answer = json.loads(capsys.readouterr().out)
        return {each["index"]: each["score"] for each in answer["top_k"]}

    loaded = load(several)
    seen = loaded.info.preprocessing
    pixels = torch.frombuffer(bytearray(read_photo(photo, seen, 10**6)), dtype=torch.uint8).view(1, 32, 32, 3)
    with torch.inference_mode():
        logits = loaded.merged.from_pixels(seen.mean, seen.std)(pixels)[0]
    by_sigmoid = dict(enumerate(logits.sigmoid().tolist()))
    assert named("--top-k", "7") == pytest.approx(by_sigmoid, abs=1e-4)
    holds = {index: value for index, value in by_sigmoid.items() if value >= 0.5}
    assert named("--threshold", "0.5") == pytest.approx(holds, abs=1e-4) and 0 < len(holds) < 7
    assert sum(named("--function-to-apply", "softmax", "--top-k", "7").values()) == pytest.approx(1)
    assert named("--function-to-apply", "none", "--top-k", "7") == pytest.approx(
        dict(enumerate(logits.tolist())), abs=1e-3
    )
    assert main(["classify", *model, "--function-to-apply", "none", "--top-k", "1", photo]) == 0
    assert "%" not in capsys.readouterr().out.splitlines()[1]
    assert main(["classify", *model, "--function-to-apply", "softmax", "--threshold", "0.5", photo]) == 2
    assert "threshold goes with function_to_apply=sigmoid" in capsys.readouterr().err
    assert main(["models", "--model", f"local-dir:{several}"]) == 0
    assert "7 classes by sigmoid, 24 features" in capsys.readouterr().out


def test_calibrate_compares_sets_of_labels(
    several: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, labels = tmp_path / "curve.json", tmp_path / "labels.csv"
    command = ["calibrate", "--model", f"local-dir:{several}", "--images", str(photos), "-o", str(file), "--r", "20"]
    command += ["--device", "cpu", "--backend", "torch", "--max-batch-size", "2", "--state-dir", "none"]
    assert main(command) == 0
    curve = Curve.from_json(file.read_bytes())
    assert curve.agreement_of == "labels" and "labels agree % (95 %)" in capsys.readouterr().out
    loaded, sets = load(several), []
    seen = loaded.info.preprocessing
    files = sorted(photos.iterdir())
    pixels = [torch.frombuffer(bytearray(read_photo(str(each), seen, 10**6)), dtype=torch.uint8) for each in files]
    with torch.inference_mode():
        for r in (0, 20):
            logits = loaded.merged.from_pixels(seen.mean, seen.std)(torch.stack(pixels).view(-1, 32, 32, 3), r)
            sets.append(logits > 0)
    same = float((sets[0] == sets[1]).all(dim=1).double().mean())
    assert curve.rows[1].agreement == pytest.approx(same) and same < 1
    labels.write_text("file,label\n0.png,1\n")
    assert main([*command, "--labels", str(labels)]) == 2
    assert "--labels measures top-1, of one right class for each photo; the agreement here is of labels" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("activation", "of", "said"),
    [
        ("softmax", "top1", None),
        ("softmax", "labels", "made with agreement of labels, not of top1"),
        ("softmax", "neighbours", None),
        ("sigmoid", "top1", "made with agreement of top1, not of labels"),
        ("sigmoid", "labels", None),
        ("sigmoid", "neighbours", None),
    ],
)
def test_a_curve_holds_for_what_the_model_answers(
    activation: Activation, of: str, said: str | None, tmp_path: Path
) -> None:
    (tmp_path / "curve.json").write_text(fake_curve(agreement_of=of).to_json())
    spec = ModelSpec(source=f"local-dir:{tmp_path}", name="tiny")
    curve, refusals = find(spec, model_info(activation=activation), facts(), None)
    assert (curve is None) == bool(said) and (said is None or said in refusals[0])


def counted(metric: Any, r: str) -> float:
    return float(metric.labels("tiny", r)._value.get())


@pytest.mark.parametrize("same", [True, False])
async def test_drift_compares_sets_of_labels(same: bool) -> None:
    """Both the answer and that at r=0 are computed anew: a request may have named fewer than all of its labels."""
    asked: list[tuple[BatchKey, Classify]] = []

    async def run_batch(key: BatchKey, items: Any) -> list[TopK]:
        (item,) = items
        asked.append((key, item.request))
        return [TopK([2, 1] if same or not max(key.schedule) else [2], [0.9, 0.6])]

    info = model_info(activation="sigmoid")
    watch = DriftWatch(run_batch, {"tiny": fake_curve(agreement_of="labels")}, 1.0, models={"tiny": info})
    before = counted(DRIFT_CHECKED, "4"), counted(DRIFT_AGREED, "4")
    key = info.batch_key((4, 4, 4))
    watch.offer(key, [Pixels(b"abc")], [TopK([2], [0.9])])
    assert watch.num_waiting == 1
    await watch._check(watch._samples.popleft())
    assert [max(key.schedule) for key, _ in asked] == [4, 0]
    for _, request in asked:
        assert (request.top_k, request.activation, request.threshold) == (NUM_CLASSES, "sigmoid", LABEL_THRESHOLD)
        assert Item(request, 0).image == Pixels(b"abc")
    after = counted(DRIFT_CHECKED, "4"), counted(DRIFT_AGREED, "4")
    assert (after[0] - before[0], after[1] - before[1]) == (1, float(same))


def test_classes_are_not_held_against_a_curve_of_neighbours() -> None:
    async def run_batch(key: BatchKey, items: Any) -> list[TopK]:
        return []

    by_neighbours = DriftWatch(run_batch, {"tiny": fake_curve(agreement_of="neighbours")}, 1.0)
    by_class = DriftWatch(run_batch, {"tiny": fake_curve()}, 1.0)
    assert by_neighbours._rows == {} and by_class._rows
