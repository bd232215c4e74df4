"""Settings: where they come from, who wins, and what stops the start."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.cli import _parser
from server.errors import SettingsError
from server.model_spec import BUNDLED_NAME, ModelSpec
from server.settings import Settings
from server.settings_sources import load_settings


def from_yaml(folder: Path, content: Mapping[str, Any]) -> str:
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(dict(content)))
    return str(file)


def test_without_a_word_the_bundled_model_is_served() -> None:
    settings = load_settings({})
    assert settings == Settings.model_validate({})
    assert settings.specs() == (ModelSpec(source="bundled", name=BUNDLED_NAME, tuned="auto", r=0),)


def test_a_flag_wins_over_a_variable_over_the_file_over_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = from_yaml(tmp_path, {"port": 1, "max-batch-size": 1, "max_images": 1})
    monkeypatch.setenv("TOME_PORT", "2")
    monkeypatch.setenv("TOME_MAX_BATCH_SIZE", "2")
    settings = load_settings({"port": "3", "max_batch_size": None}, file)
    assert (settings.port, settings.max_batch_size, settings.max_images, settings.threads) == (3, 2, 1, 0)


def test_tome_config_names_the_file_and_the_flag_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOME_CONFIG", from_yaml(tmp_path, {"port": 1}))
    assert load_settings({}).port == 1
    other = tmp_path / "other.yaml"
    other.write_text("port: 2")
    assert load_settings({}, str(other)).port == 2


def test_an_empty_file_and_an_empty_variable_say_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOME_PORT", "")
    monkeypatch.setenv("TOME_CONFIG", "")
    (tmp_path / "empty.yaml").touch()
    settings = load_settings({}, str(tmp_path / "empty.yaml"))
    assert (settings.port, settings.api_key) == (8000, None)


@pytest.mark.parametrize("name", [name for name in Settings.model_fields if name not in ("model", "weights")])
def test_every_field_is_a_flag_a_variable_and_a_key(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = getattr(Settings.model_validate({}), name)
    words = {
        "cors_origin": "http://a:7",
        "precision": "fp16",
        "backend": "torch",
        "log_level": "debug",
        "log_format": "json",
        "access_log": "false",
        "device": "cpu",
        "host": "::1",
        "protocol": "vertex",
        "vertex_predict_route": "/p/1:predict",
        "vertex_health_route": "/h",
    }
    text = (words | {"decode": "cpu", "min_agreement": "0.9", "drift_sample": "0.9"}).get(name, "7")
    if name.endswith("_key_file"):
        text = str(tmp_path / "key")
        Path(text).write_text("7")
    if name in ("max_r", "min_agreement"):
        monkeypatch.setenv("TOME_R", "auto")  # they go with no other
    by_flag = vars(_parser().parse_args(["serve", f"--{name.replace('_', '-')}", text]))
    assert by_flag[name] == ([text] if name == "cors_origin" else text)
    by_file = load_settings({}, from_yaml(tmp_path, {name: text}))
    monkeypatch.setenv(f"TOME_{name.upper()}", text)
    assert load_settings({}) == by_file == load_settings({name: text})
    assert getattr(by_file, name) != default


@pytest.mark.parametrize("name", [name for name in Settings.model_fields if name != "log_level"])
def test_every_field_has_help_text(name: str) -> None:
    assert len(Settings.model_fields[name].description or "") > 10


def test_the_help_of_precision_names_each_and_says_that_fp8_is_a_choice() -> None:
    field = Settings.model_fields["precision"]
    assert all(name in (field.description or "") for name in ("fp32", "bf16", "fp8", "auto never takes"))
    assert load_settings({"precision": "fp8"}).precision == "fp8"


BAD = [
    ("port", "eighty", "port"),
    ("port", 65536, "port"),
    ("port", -1, "port"),
    ("r", "fast", "r is 'fast'"),
    ("r", "-1", "r is '-1'"),
    ("r", 1.5, "r is 1.5"),
    ("http_workers", 0, "http_workers"),
    ("precision", "int3", "precision"),
    ("decode", "gpu", "decode"),
    ("log_level", "loud", "log_level"),
    ("threads", -1, "threads"),
    ("max_batch_size", 0, "max_batch_size"),
    ("batch_timeout_s", 0, "batch_timeout_s"),
    ("batch_timeout_s", "nan", "batch_timeout_s"),
    ("max_queue_size", 0, "max_queue_size"),
    ("deadline_s", 0, "deadline_s"),
    ("deadline_s", 3601, "deadline_s"),
    ("max_body_bytes", 0, "max_body_bytes"),
    ("max_image_pixels", 0, "max_image_pixels"),
    ("max_images", 0, "max_images"),
    ("model", [], "model"),
    ("model", ["vit,r=fast"], "r is 'fast'"),
    ("model", ["vit,colour=red"], "colour"),
    ("model", ["vit,weights"], "SOURCE"),
    ("model", ["vit,name=a b"], "name"),
    ("model", [{"source": ""}], "source"),
    ("model", [{"weights": "x"}], "source"),
    ("api_key", [1], "api_key"),
    ("max_batchsize", 8, "max_batchsize"),
    ("device", "", "device"),
    ("device", "cpu,", "device"),
    ("device", "cuda:0,,cuda:1", "device"),
    ("device", "auto,cpu", "device"),
]


@pytest.mark.parametrize(("name", "value", "named"), BAD, ids=[f"{name}={value}" for name, value, _ in BAD])
def test_what_is_unknown_or_out_of_range_stops_the_start_by_name(
    name: str, value: object, named: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError) as refusal:
        load_settings({name: value})
    assert named in str(refusal.value)
    with pytest.raises(SettingsError) as refusal_of_file:
        load_settings({}, from_yaml(tmp_path, {name: value}))
    assert named in str(refusal_of_file.value)


def test_an_unknown_variable_stops_the_start_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOME_MAX_BATCHSIZE", "8")
    with pytest.raises(SettingsError, match="max_batchsize"):
        load_settings({})


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(SettingsError) as refusal:
        load_settings({"port": "x", "max_images": "0"})
    assert "port" in str(refusal.value) and "max_images" in str(refusal.value)


@pytest.mark.parametrize("text", ["- a list", "port", "1: 2", "port: [", "\tport: 1", "port: 8000\n- x"])
def test_a_file_that_is_no_mapping_stops_the_start_by_its_path(text: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=r"broken\.yaml"):
        load_settings({}, str(file))


def test_a_file_of_other_bytes_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(SettingsError, match=r"binary\.yaml"):
        load_settings({}, str(tmp_path / "binary.yaml"))


def test_a_missing_file_stops_the_start_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nothing\.yaml"):
        load_settings({}, str(tmp_path / "nothing.yaml"))


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("bundled", {"source": "bundled", "name": BUNDLED_NAME}),
        ("deit_tiny_patch16_224", {"source": "deit_tiny_patch16_224", "name": "deit_tiny_patch16_224"}),
        ("hf-hub:timm/vit_small@main", {"source": "hf-hub:timm/vit_small@main", "name": "vit_small"}),
        ("local-dir:/models/mine/", {"source": "local-dir:/models/mine/", "name": "mine"}),
        (
            "vit,weights=a.safetensors,name=fast,r=8",
            {"source": "vit", "weights": "a.safetensors", "name": "fast", "r": 8},
        ),
    ],
)
def test_a_model_is_said_as_text_or_as_a_mapping(text: str, spec: dict[str, Any], tmp_path: Path) -> None:
    (by_flag,) = load_settings({"model": [text]}).model
    (by_key,) = load_settings({}, from_yaml(tmp_path, {"model": [spec]})).model
    assert by_flag == by_key == ModelSpec(**spec)


def test_several_models_keep_their_order_and_their_own_r(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOME_MODEL", "one,r=4 two")
    specs = load_settings({"r": "8"}).specs()
    assert [(spec.name, spec.r) for spec in specs] == [("one", 4), ("two", 8)]


@pytest.mark.parametrize(
    ("text", "source", "weights", "name", "r"),
    [
        ("local-dir:/my models/a b", "local-dir:/my models/a b", None, "a-b", None),
        ("local-dir:/m/a,b,weights=/m/c,d.st,r=8", "local-dir:/m/a,b", "/m/c,d.st", "a-b", 8),
        ("local-dir:/m/a:b", "local-dir:/m/a:b", None, "a-b", None),
        ("local-dir:/m/日本", "local-dir:/m/日本", None, "model", None),
        ("local-dir:~/m,weights=~/w.st", "local-dir:/home/me/m", "/home/me/w.st", "m", None),
        ("vit,r=3,2,1", "vit", None, "vit", (3, 2, 1)),
    ],
)
def test_paths_may_hold_blanks_commas_and_a_home(
    text: str, source: str, weights: str | None, name: str, r: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    (spec,) = load_settings({"model": [text]}).model
    assert (spec.source, spec.weights, spec.name, spec.r) == (source, weights, name, r)


def test_a_variable_quotes_a_path_with_a_blank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOME_MODEL", "'local-dir:/my models/cats,r=4' bundled")
    cats, bundled = load_settings({}).model
    assert (cats.source, cats.r, bundled.source) == ("local-dir:/my models/cats", 4, "bundled")


def test_the_file_of_weights_and_the_config_file_may_lie_at_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my settings.yaml").write_text("weights: ~/w.safetensors\n")
    (spec,) = load_settings({}, "~/my settings.yaml").specs()
    assert spec.weights == f"{tmp_path}/w.safetensors"


@pytest.mark.parametrize("models", ["", " ", "'local-dir:/a b", [], ["local-dir:/\udcff"], ["bundled,colour=red"]])
def test_models_that_cannot_be_read_stop_the_start_with_one_line(models: Any) -> None:
    with pytest.raises(SettingsError, match="model") as refusal:
        load_settings({"model": models})
    assert "\n" not in str(refusal.value)


def test_weights_go_to_the_one_model() -> None:
    (spec,) = load_settings({"model": ["vit"], "weights": "a.safetensors"}).specs()
    assert spec.weights == "a.safetensors"


def test_tuned_numbers_go_to_the_one_model_and_auto_and_none_to_all() -> None:
    (spec,) = load_settings({"model": ["vit"], "tuned": "a.safetensors"}).specs()
    assert spec.tuned == "a.safetensors"
    models = ["one", "two,tuned=b.safetensors", "three,tuned=none"]
    assert [spec.tuned for spec in load_settings({"model": models}).specs()] == ["auto", "b.safetensors", "none"]
    none = load_settings({"model": models, "tuned": "none"})
    assert [spec.tuned for spec in none.specs()] == ["none", "b.safetensors", "none"]


@pytest.mark.parametrize("models", [["one", "two"], ["one,tuned=b.safetensors"]])
def test_a_file_of_tuned_numbers_beside_several_models_or_another_file_stops_the_start(models: list[str]) -> None:
    with pytest.raises(SettingsError, match="--tuned FILE is for one --model"):
        load_settings({"model": models, "tuned": "a.safetensors"})


def test_the_file_of_tuned_numbers_may_lie_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("TOME_TUNED", "~/t.safetensors")
    assert load_settings({}).specs()[0].tuned == "/home/me/t.safetensors"
    (spec,) = load_settings({"tuned": "auto", "model": ["vit,tuned=~/a, b.st,r=3"]}).specs()
    assert (spec.tuned, spec.r) == ("/home/me/a, b.st", 3)


@pytest.mark.parametrize("models", [["one", "two"], ["one,weights=b.safetensors"]])
def test_weights_beside_several_models_or_other_weights_stop_the_start(models: list[str]) -> None:
    with pytest.raises(SettingsError, match="--weights"):
        load_settings({"model": models, "weights": "a.safetensors"})


def test_two_models_of_one_name_stop_the_start() -> None:
    with pytest.raises(SettingsError, match="named alike"):
        load_settings({"model": ["a/vit", "hf-hub:b/vit"]})


def test_a_complaint_does_not_tell_the_keys() -> None:
    with pytest.raises(SettingsError) as refusal:
        load_settings({"api_key": "hush-1", "admin_key": "hush-2", "port": "x", "weights": "a", "model": ["a", "b"]})
    assert "hush" not in str(refusal.value)


def test_a_user_without_a_home_is_told_to_name_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container that runs with a number that no file knows."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", dict[int, object]().__getitem__)
    with pytest.raises(SettingsError, match="state_dir: .* no home folder"):
        load_settings({}).state_file()
    assert load_settings({"state_dir": "none"}).state_file() is None


def test_the_state_file_is_one_a_port_or_none(tmp_path: Path) -> None:
    assert Settings.model_validate({"state_dir": tmp_path, "port": 81}).state_file() == tmp_path / "config-81.json"
    assert load_settings({"state_dir": "none"}).state_file() is None
    default = Settings.model_validate({}).state_file()
    assert default is not None and "~" not in str(default)


def test_what_kubernetes_sets_for_a_service_of_our_name_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "TOME_PORT": "tcp://10.0.0.1:80",
        "TOME_SERVICE_HOST": "10.0.0.1",
        "TOME_SERVICE_PORT_HTTP": "80",
        "TOME_PORT_80_TCP": "tcp://10.0.0.1:80",
        "TOME_PORT_80_TCP_ADDR": "10.0.0.1",
        "TOME_SERVER_PORT": "tcp://10.0.0.1:80",
        "TOME_SERVER_SERVICE_PORT": "80",
        "TOME_SERVER_PORT_80_TCP_PROTO": "tcp",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TOME_MAX_IMAGES", "7")
    settings = load_settings({})
    assert (settings.port, settings.max_images) == (8000, 7)


@pytest.mark.parametrize(
    ("said", "devices"),
    [
        ("auto", ("auto",)),
        ("cpu", ("cpu",)),
        ("cuda:0,cuda:1", ("cuda:0", "cuda:1")),
        (" cpu, cpu ", ("cpu", "cpu")),
    ],
)
def test_each_device_of_a_list_has_an_engine(said: str, devices: tuple[str, ...]) -> None:
    assert load_settings({"device": said}).devices() == devices
