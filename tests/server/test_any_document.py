"""Whatever a document holds, it is a configuration or it is refused: nothing else is raised by reading it."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st

from server import settings_sources
from server.config import watched
from server.config.local import LocalConfig
from server.config.stored import read_configuration
from server.curve import Curve, CurveError
from server.errors import InvalidError, NotFoundError, SettingsError
from server.ray_app import read_user_config
from server.settings import Settings
from server.settings_sources import load_settings
from tests.server.test_documents import MODELS, START, check

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(max_size=5)
    | st.dates()
    | st.binary(max_size=4)
    | st.sampled_from(["auto", "8", "8,4", "[1]"])
)
names = st.sampled_from(["models", "version", "tiny", "large", "r", "max_r", "min_agreement", "port", "start"])
values = st.recursive(
    scalars, lambda each: st.lists(each, max_size=3) | st.dictionaries(names | scalars, each, max_size=3), max_leaves=12
)
tags = st.sampled_from([f"!!{tag} " for tag in "int float bool null timestamp binary str set omap pairs seq".split()])
lines = st.text("rmodels: {}[],&*<!?|>-'\"#%\n\t0123456789xXbo_.eE+:TZ", max_size=40)
yaml_documents = (
    st.binary(max_size=60)
    | lines.map(str.encode)
    | st.tuples(tags | st.just(""), lines).map(lambda said: f"models: {{tiny: {{r: {''.join(said)}}}}}".encode())
    | values.map(lambda value: yaml.safe_dump(value).encode())
    | st.dictionaries(names | scalars, values, max_size=2).map(lambda said: yaml.safe_dump({"models": said}).encode())
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=5),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(names | st.text(max_size=3), each, max_size=3),
    max_leaves=12,
)
json_documents = (
    st.binary(max_size=60)
    | st.text('{}[]",:0123456789.eE-+ntrufalsNI\\u', max_size=40).map(str.encode)
    | json_values.map(lambda value: json.dumps(value).encode())
    | st.fixed_dictionaries({"version": json_values, "models": json_values}).map(lambda it: json.dumps(it).encode())
    | st.dictionaries(names, json_values, max_size=3).map(
        lambda models: json.dumps({"version": 3, "models": models}).encode()
    )
)


@given(yaml_documents)
def test_a_watched_file_is_read_or_refused(content: bytes) -> None:
    with contextlib.suppress(InvalidError):
        assert all(isinstance(name, str) for name in watched._models(content))


@given(yaml_documents)
def test_settings_are_read_or_refused(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "settings.yaml"
        file.write_bytes(content)
        with contextlib.suppress(SettingsError):
            assert isinstance(settings_sources._read_yaml(str(file)), dict)


@given(st.dictionaries(st.sampled_from([*Settings.model_fields, "model"]), values, max_size=3))
def test_values_of_settings_are_taken_or_refused(said: dict[str, Any]) -> None:
    with contextlib.suppress(SettingsError):
        load_settings(said)


@given(json_documents)
def test_what_servers_store_is_read_or_refused(content: bytes) -> None:
    with contextlib.suppress(InvalidError):
        configuration = read_configuration(content)
        json.dumps(configuration.version + 1)
        assert type(configuration.version) is int and configuration.version >= 0


@given(json_documents)
def test_a_state_file_is_read_or_refused(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_bytes(content)
        LocalConfig(START, file, check)  # where it is refused, the start setting goes on


@given(json_documents)
def test_a_curve_is_read_or_refused(content: bytes) -> None:
    with contextlib.suppress(CurveError):
        Curve.from_json(content)


@given(values | st.dictionaries(names | scalars, values, max_size=3))
def test_what_ray_tells_is_read_or_refused(said: Any) -> None:
    with contextlib.suppress(InvalidError, NotFoundError):
        read_user_config(said, MODELS)
