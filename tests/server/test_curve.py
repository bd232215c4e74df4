"""The curve: read as written, refused when it does not hold, found where it lies, and a ladder made of its rows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.batching.ladder import steps_of
from server.calibration import places
from server.calibration.measure import batch_sizes, fit
from server.calibration.places import find, save
from server.curve import Curve, CurveError, Neighbours, Timed, speed_staleness, staleness
from server.device.models import load_model
from server.errors import SettingsError
from server.model_config import BUNDLED
from server.model_spec import ModelSpec
from tests.server.conftest import assert_is_error, curve_row, facts, fake_curve, grey_png, model_info, serving


def test_what_is_written_is_read() -> None:
    assert Curve.from_json(fake_curve().to_json()) == fake_curve()
    without_speed = fake_curve(rows=(curve_row(0, 1.0, None), curve_row(4, 0.9, None)))
    assert Curve.from_json(without_speed.to_json()) == without_speed
    assert len(without_speed.to_json().splitlines()) == 1 + 2 + 1


def broken(change: Any) -> str:
    content = json.loads(fake_curve().to_json())
    change(content)
    return json.dumps(content)


BROKEN: list[tuple[str, str]] = [
    ("", "JSON"),
    ("{", "JSON"),
    ("[]", "valid dictionary|object"),
    (broken(lambda c: c.pop("facts")), "facts"),
    (broken(lambda c: c.update(colour="red")), "colour"),
    (broken(lambda c: c.update(rows=[])), "rows"),
    (broken(lambda c: c.update(measured="yesterday")), "measured"),
    (broken(lambda c: c["facts"].update(weights="mine")), "facts.weights"),
    (broken(lambda c: c["rows"][1].update(agreement=1.2)), "rows.1.agreement"),
    (broken(lambda c: c["rows"][1].update(agreement=float("nan"))), "rows.1.agreement"),
    (broken(lambda c: c["rows"][1].update(image_s=0)), "rows.1.image_s"),
    (broken(lambda c: c["rows"][1].update(r=[-1, 0, 0])), "rows.1.r"),
    (broken(lambda c: c["rows"].pop(0)), "first row must be r=0"),
    (broken(lambda c: c["rows"].append(c["rows"][1])), "once"),
    (broken(lambda c: c["rows"][1].update(r=[4, 4])), "as many blocks"),
]


@pytest.mark.parametrize(("text", "named"), BROKEN)
def test_what_is_no_curve_is_refused_with_the_place(text: str, named: str) -> None:
    with pytest.raises(CurveError, match=named):
        Curve.from_json(text)


def test_agreement_holds_for_the_weights_whatever_computes_them() -> None:
    curve = fake_curve()
    assert staleness(curve, facts()) is None
    assert staleness(curve, facts(device="loom", backend="openvino", threads=9, versions={"torch": "3"})) is None
    assert staleness(curve, facts(precision="bf16")) is None
    assert staleness(curve, facts(weights="cd" * 32)) == "made with other weights (abababababab, not cdcdcdcdcdcd)"


def test_agreement_holds_for_the_tuned_numbers_that_it_was_measured_with() -> None:
    plain, tuned, other = facts(), facts(tuned="cd" * 32), facts(tuned="ef" * 32)
    assert staleness(fake_curve(facts=tuned), tuned) is None
    assert staleness(fake_curve(facts=plain), tuned) == "made without tuned numbers"
    assert staleness(fake_curve(facts=tuned), plain) == "made with tuned numbers that are not used"
    assert staleness(fake_curve(facts=tuned), other) == "made with other tuned numbers"


def test_a_curve_of_before_there_were_tuned_numbers_is_read() -> None:
    content = json.loads(fake_curve().to_json())
    assert "tuned" not in content["facts"]
    assert Curve.from_json(json.dumps(content)) == fake_curve()
    content["facts"]["tuned"] = None  # as curves of before `timed` wrote it
    assert Curve.from_json(json.dumps(content)) == fake_curve()


def test_a_curve_of_before_there_were_neighbours_is_of_the_likeliest_class() -> None:
    content = json.loads(fake_curve().to_json())
    del content["agreement_of"]
    assert "neighbours" not in content["rows"][0]
    assert Curve.from_json(json.dumps(content)) == fake_curve()


def test_neighbours_are_kept() -> None:
    near = curve_row(4, 0.9, (0.5, 1.0), neighbours=Neighbours(same_index=0.8, cosine=0.97))
    curve = fake_curve(agreement_of="neighbours", rows=(curve_row(0, 1.0, (0.5, 1.0)), near))
    assert Curve.from_json(curve.to_json()) == curve


async def test_the_api_tells_what_agreement_is_of() -> None:
    near = curve_row(4, 0.9, (0.25, 0.5), neighbours=Neighbours(same_index=0.8, cosine=0.97))
    curve = fake_curve(agreement_of="neighbours", rows=(curve_row(0, 1.0, (0.5, 1.0)), near))
    async with serving(curve=curve) as service:
        told = (await service.client.get("/v1/models/tiny/curve")).json()
    assert told["agreement_of"] == "neighbours"
    assert [row["neighbours"] for row in told["rows"]] == [None, {"same_index": 0.8, "cosine": 0.97}]


@pytest.mark.parametrize("other", ["fp32", "bf16", "fp16"])
def test_agreement_in_fp8_is_of_fp8_alone(other: str) -> None:
    in_fp8 = fake_curve(facts=facts(precision="fp8"))
    assert staleness(in_fp8, facts(precision="fp8", device="loom")) is None
    assert staleness(in_fp8, facts(precision=other)) == f"made with precision fp8, not {other}"
    assert staleness(fake_curve(facts=facts(precision=other)), facts(precision="fp8")) == (
        f"made with precision {other}, not fp8"
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"device": "loom"}, "made with device abacus, not loom"),
        ({"backend": "openvino"}, "made with backend torch, not openvino"),
        ({"threads": 1}, "made with threads 2, not 1"),
        ({"precision": "bf16"}, "made with precision fp32, not bf16"),
        ({"versions": {"torch": "2.16.0"}}, "made with torch 2.15.0, not 2.16.0"),
        ({"versions": {"openvino": "2026.4"}}, "made with openvino of no known version, not 2026.4"),
    ],
)
def test_speed_holds_for_all_of_it(change: dict[str, Any], said: str) -> None:
    assert speed_staleness(fake_curve(), facts()) is None
    assert speed_staleness(fake_curve(), facts(**change)) == said


def test_a_curve_may_come_without_speeds() -> None:
    assert speed_staleness(fake_curve(rows=(curve_row(0, 1.0, None),)), facts()) == "made without speeds"


def test_the_ladder_leaves_out_what_is_no_faster_at_lower_or_equal_agreement() -> None:
    rows = (
        curve_row(0, 1.0, (0.0, 1.0)),
        curve_row(1, 0.99, (0.0, 1.1)),  # slower than r=0
        curve_row(2, 0.98, (0.0, 0.8)),
        curve_row(3, 0.97, (0.0, 0.8)),  # no faster than r=2
        curve_row(4, 0.90, (0.0, 0.7)),  # slower than r=5, which agrees more
        curve_row(5, 0.95, (0.0, 0.6)),
        curve_row(6, 0.80, (3.2, 0.4)),  # faster in full batches
    )
    steps = steps_of(fake_curve(rows=rows))
    assert [(step.schedule[0], step.agreement) for step in steps] == [(0, 1.0), (2, 0.98), (5, 0.95), (6, 0.8)]
    assert (steps[-1].overhead_s, steps[-1].image_s) == (3.2, 0.4)


LINES = st.tuples(st.floats(0, 10), st.floats(1e-3, 10))


@given(st.lists(st.tuples(st.floats(0, 1), LINES), max_size=8))
def test_any_ladder_is_ever_faster_and_ever_less_alike(rows: list[tuple[float, tuple[float, float]]]) -> None:
    others = tuple(curve_row(r, agreement, line) for r, (agreement, line) in enumerate(rows, start=1))
    steps = steps_of(fake_curve(rows=(curve_row(0, 1.0, (0.0, 5.0)), *others)))
    seconds = [step.overhead_s + 32 * step.image_s for step in steps]
    agreements = [step.agreement or 0.0 for step in steps]
    assert max(steps[0].schedule) == 0
    assert all(later < before for before, later in zip(seconds, seconds[1:], strict=False))
    assert agreements == sorted(agreements, reverse=True)


def test_batches_of_every_power_of_two_are_timed_and_the_largest() -> None:
    assert [batch_sizes(largest) for largest in (1, 2, 8, 12)] == [[1], [1, 2], [1, 2, 4, 8], [1, 2, 4, 8, 12]]


@given(a=st.floats(0, 1), b=st.floats(0.1, 1), largest=st.integers(2, 64))
def test_a_line_is_found_again(a: float, b: float, largest: int) -> None:
    found = fit({n: a + b * n for n in batch_sizes(largest)})
    assert found == pytest.approx((a, b), rel=1e-6, abs=1e-6)


@given(st.lists(st.floats(1e-4, 1e2), min_size=1, max_size=7))
def test_no_times_give_a_line_below_zero(times: list[float]) -> None:
    a, b = fit({2**power: seconds for power, seconds in enumerate(times)})
    assert a >= 0 and b > 0


def spec(source: str, **more: Any) -> ModelSpec:
    return ModelSpec.model_validate({"source": source, **more})


def test_a_curve_lies_beside_its_weights(tmp_path: Path) -> None:
    folder, state = tmp_path / "tiny", tmp_path / "state"
    folder.mkdir()
    assert save(fake_curve(), spec(f"local-dir:{folder}"), state) == (folder / "curve.json", None)
    weights = folder / "mine.safetensors"
    beside = folder / "mine.safetensors.curve.json"
    assert save(fake_curve(), spec("some_vit", weights=str(weights)), state) == (beside, None)
    in_state = state / "curves" / "some_vit-abababababab.json"
    assert save(fake_curve(), spec("hf-hub:someone/some_vit"), state) == (in_state, None)
    assert save(fake_curve(), spec("bundled"), state)[0].parent == state / "curves"
    for model in (spec(f"local-dir:{folder}"), spec("some_vit", weights=str(weights)), spec("some_vit")):
        assert find(model, model_info(), facts(), state) == (fake_curve(), [])
    with pytest.raises(SettingsError, match="-o FILE"):
        save(fake_curve(), spec("some_vit"), None)


def test_a_folder_that_cannot_be_written_leaves_the_state_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = places.write

    def refuse(curve: Curve, file: Path) -> None:
        if file.name == "curve.json":
            raise PermissionError(13, "Permission denied")
        write(curve, file)

    monkeypatch.setattr(places, "write", refuse)
    model = spec(f"local-dir:{tmp_path / 'tiny'}")
    kept, refusal = save(fake_curve(), model, tmp_path / "state")
    assert kept == tmp_path / "state" / "curves" / "tiny-abababababab.json"
    assert "curve.json cannot be written (Permission denied)" in str(refusal)
    assert find(model, model_info(), facts(), tmp_path / "state") == (fake_curve(), [])


def test_what_does_not_hold_is_not_found_and_said(tmp_path: Path) -> None:
    file, model = tmp_path / "curve.json", spec(f"local-dir:{tmp_path}")
    assert find(model, model_info(), facts(), None) == (None, [])
    file.write_text("{")
    found, said = find(model, model_info(), facts(), None)
    assert found is None and "curve.json cannot be used: it is no curve" in said[0]
    file.write_text(fake_curve().to_json())
    found, said = find(model, model_info(), facts(weights="1" * 64), None)
    assert found is None and "stale: made with other weights" in said[0]
    found, said = find(model, model_info(num_tokens=65), facts(), None)
    assert found is None and "a model of another size" in said[0]


def test_a_curve_of_this_device_goes_before_another_and_a_new_one_before_an_old_one(tmp_path: Path) -> None:
    model, state = spec(f"local-dir:{tmp_path}"), tmp_path / "state"
    elsewhere = fake_curve(facts=facts(device="loom"), measured="2026-12-01")
    places.write(elsewhere, tmp_path / "curve.json")
    here = places.in_state(model.name, facts().weights, state)
    assert here is not None
    here.parent.mkdir(parents=True)
    places.write(fake_curve(), here)
    assert find(model, model_info(), facts(), state)[0] == fake_curve()
    newer = fake_curve(measured="2026-11-23")
    places.write(newer, tmp_path / "curve.json")
    assert find(model, model_info(), facts(), state)[0] == newer


def test_the_bundled_model_has_its_curve() -> None:
    curve = Curve.from_json((BUNDLED / "curve.json").read_bytes())
    loaded = load_model(ModelSpec.model_validate("bundled"))
    weights = hashlib.sha256((BUNDLED / "model.safetensors").read_bytes()).hexdigest()
    assert (curve.model, curve.facts.weights, curve.facts.precision) == (loaded.info.name, weights, "fp32")
    assert find(spec("bundled"), loaded.info, facts(weights=weights), None) == (curve, [])
    assert all(0 <= row.agreement_interval[0] <= row.agreement <= row.agreement_interval[1] <= 1 for row in curve.rows)
    assert [row.r[0] for row in curve.rows] == sorted(row.r[0] for row in curve.rows)
    assert all(row.line is None and row.top1 is not None for row in curve.rows)


async def test_the_endpoint_tells_the_curve() -> None:
    async with serving(curve=fake_curve(), batch=4) as service:
        body = (await service.client.get("/v1/models/tiny/curve")).json()
        head = {name: value for name, value in body.items() if name != "rows"}
        measured = {"device": "abacus", "backend": "torch", "precision": "fp32", "measured": "2026-11-22"}
        assert head == {
            "model": "tiny",
            "speed_from": measured,
            "agreement_from": measured | {"photos": 100},
            "agreement_of": "top1",
        }
        assert body["rows"][1] == {
            "r": 4,
            "schedule": [4, 4, 4],
            "tokens": 5,
            "gflops": 1.5,
            "images_per_s": pytest.approx(4 / 2.25),
            "batch_s": {"a": 0.25, "b": 0.5},
            "agreement": 0.96,
            "agreement_interval": [0.96, 0.96],
            "top1": 0.75,
            "neighbours": None,
        }
        assert [row["r"] for row in body["rows"]] == [0, 4, 8]


async def test_the_endpoint_tells_where_speed_and_agreement_come_from() -> None:
    here = facts(device="loom", backend="openvino", precision="bf16")
    curve = fake_curve().at(lambda schedule: (0.0, 1.0), 8, Timed(facts=here, measured="2026-11-27"))
    async with serving(curve=curve) as service:
        body = (await service.client.get("/v1/models/tiny/curve")).json()
    assert body["speed_from"] == {
        "device": "loom",
        "backend": "openvino",
        "precision": "bf16",
        "measured": "2026-11-27",
    }
    assert body["agreement_from"] == {
        "device": "abacus",
        "backend": "torch",
        "precision": "fp32",
        "measured": "2026-11-22",
        "photos": 100,
    }


def test_a_curve_keeps_where_its_speeds_come_from() -> None:
    here = facts(device="loom")
    timed = fake_curve().at(lambda schedule: (0.0, 1.0), 8, Timed(facts=here, measured="2026-11-27"))
    assert Curve.from_json(timed.to_json()) == timed
    assert timed.at(lambda schedule: (0.0, 2.0), 8).speed_from == timed.speed_from
    assert fake_curve().speed_from == Timed(facts=facts(), measured="2026-11-22")
    assert speed_staleness(timed, here) is None
    assert speed_staleness(timed, facts()) == "made with device loom, not abacus"
    assert staleness(timed, facts(weights="cd" * 32)) == "made with other weights (abababababab, not cdcdcdcdcdcd)"


async def test_its_speeds_follow_the_batches_that_run() -> None:
    async with serving(curve=fake_curve()) as service:
        await service.classify(grey_png(), r=8, deadline_ms=9000)  # the fake device takes next to no time
        rows = (await service.client.get("/v1/models/tiny/curve")).json()["rows"]
        assert rows[2]["batch_s"]["b"] < 0.099 and rows[2]["images_per_s"] > 10.05
        assert rows[2]["agreement"] == 0.9


async def test_without_a_curve_it_is_a_404_that_names_the_command() -> None:
    async with serving() as service:
        message = assert_is_error(await service.client.get("/v1/models/tiny/curve"), 404, "not_found")
        assert "tome-server calibrate --model fake" in message
        assert "huge" in assert_is_error(await service.client.get("/v1/models/huge/curve"), 404, "not_found")


async def test_the_curve_needs_the_user_key() -> None:
    async with serving(curve=fake_curve(), api_key="user") as service:
        assert_is_error(await service.client.get("/v1/models/tiny/curve"), 401, "unauthorized")
        bearing = {"authorization": "Bearer user"}
        assert (await service.client.get("/v1/models/tiny/curve", headers=bearing)).status_code == 200
