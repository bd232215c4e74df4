"""Every message that crosses between an HTTP process and an engine, as hypothesis strategies."""

from __future__ import annotations

from typing import Any, get_args

from hypothesis import strategies as st

from server.curve import AgreementOf, Curve, Neighbours
from server.dial import MOST_MAX_R, AutoR
from server.errors import ServerError
from server.images.image import JpegFile, Pixels
from server.ipc.messages import (
    Alive,
    Answered,
    Call,
    Catalog,
    Choice,
    Classify,
    Configure,
    Deployed,
    Done,
    Embed,
    Explain,
    Failure,
    GetConfiguration,
    GetCurve,
    GetRepository,
    Load,
    Measured,
    Merges,
    Probe,
    Reply,
    Repository,
    Score,
    Seen,
    TopK,
    Unload,
    Vector,
    Withdraw,
)
from server.types import Activation, BackendInfo, Configuration, ModelState
from tests.server.conftest import curve_row, fake_curve, model_info

WORDS = st.text(max_size=20)
COUNTS = st.integers(0, 2**31)
SECONDS = st.floats(0, 1e9)
SHARES = st.floats(0, 1)
IDS = st.integers(0, 2**63 - 1)

SCHEDULES = st.lists(st.integers(0, 500), min_size=1, max_size=5).map(tuple)
BOUNDS = st.builds(AutoR, st.none() | st.integers(0, MOST_MAX_R), st.none() | SHARES)
SETTINGS = st.integers(0, 500) | SCHEDULES | BOUNDS

PIXELS = st.builds(Pixels, st.binary(max_size=100))
FILES = st.builds(JpegFile, st.binary(max_size=100), width=st.integers(1, 2**16), height=st.integers(1, 2**16))
IMAGES = st.lists(PIXELS | FILES, min_size=1, max_size=4)

ASKED: dict[str, Any] = {
    "model": WORDS,
    "images": IMAGES,
    "r": st.none() | SCHEDULES | BOUNDS,
    "deadline": SECONDS,
    "trace": st.none() | WORDS,
    "revision": WORDS,
}
ACTIVATIONS = st.sampled_from(get_args(Activation))
TOP = {"top_k": st.integers(1, 1000), "activation": ACTIVATIONS}
REQUESTS = (
    st.builds(Classify, **ASKED, **TOP, threshold=st.none() | SHARES)
    | st.builds(Score, **ASKED, activation=ACTIVATIONS, features=st.booleans())
    | st.builds(Embed, **ASKED)
    | st.builds(Explain, **ASKED, **TOP)
)
CHANGES = st.builds(Configure, st.dictionaries(WORDS, SETTINGS, max_size=3), st.none() | st.integers(0, 10**18))
ASKS = (
    REQUESTS
    | CHANGES
    | st.builds(Probe)
    | st.builds(GetCurve, WORDS)
    | st.builds(GetConfiguration)
    | st.builds(Load, WORDS, st.none() | WORDS)
    | st.builds(Unload, WORDS)
    | st.builds(GetRepository)
    | st.builds(Seen)
    | st.builds(Withdraw)
)
CALLS = st.builds(Call, IDS, ASKS)

TOP_KS = st.builds(TopK, st.lists(COUNTS, max_size=5), st.lists(SHARES, max_size=5))
GROUPS = st.lists(st.lists(st.integers(0, 400), max_size=9), max_size=3)
VECTORS = st.builds(Vector, st.binary(max_size=100))
MERGES = st.builds(Merges, TOP_KS, st.tuples(COUNTS, COUNTS), COUNTS, GROUPS)
CHOICES = st.builds(Choice, SCHEDULES, st.sampled_from(("idle", "load", "bounds", "shared")), st.none() | SHARES)
ANSWERED = st.builds(
    Answered,
    results=st.lists(TOP_KS, max_size=3) | st.lists(VECTORS, max_size=3) | st.lists(MERGES, max_size=3),
    schedule=SCHEDULES,
    config_version=IDS,
    batch_size=COUNTS,
    queue_s=SECONDS,
    inference_s=SECONDS,
    auto=st.none() | CHOICES,
)
FACTS = st.dictionaries(
    WORDS.filter(lambda word: word not in ("message", "retry_after_s", "self")),
    st.none() | st.booleans() | COUNTS | SHARES | WORDS | st.lists(WORDS, max_size=3),
    max_size=3,
)
ERRORS = st.builds(
    lambda kind, message, retry_after_s, details: kind(message, retry_after_s=retry_after_s, **details),
    st.sampled_from([ServerError, *ServerError.__subclasses__()]),
    WORDS,
    st.none() | SECONDS,
    FACTS,
)
ROWS = st.builds(
    lambda agreement, line, gflops, top1, neighbours: curve_row(
        4, agreement, line, gflops=gflops, top1=top1, neighbours=neighbours
    ),
    SHARES,
    st.none() | st.tuples(st.floats(0, 10), st.floats(1e-6, 10)),
    st.none() | st.floats(1e-3, 1e6),
    st.none() | SHARES,
    st.none() | st.builds(Neighbours, same_index=SHARES, cosine=st.floats(-1, 1)),
)
CURVES: st.SearchStrategy[Curve] = st.builds(
    lambda row, of, photos: fake_curve(agreement_of=of, rows=(curve_row(0, 1.0, (0.5, 1.0)), row), photos=photos),
    ROWS,
    st.sampled_from(get_args(AgreementOf)),
    st.integers(1, 10**9),
)
MODELS = st.builds(
    model_info,
    name=WORDS,
    source=WORDS,
    labels=st.lists(WORDS, max_size=4).map(tuple),
    max_r=COUNTS,
    backend=st.none() | st.builds(BackendInfo, WORDS, WORDS, WORDS),
    decodes_jpeg=st.booleans(),
    num_features=COUNTS,
    activation=ACTIVATIONS,
    version=WORDS,
    revision=WORDS,
)
STATES = st.builds(
    ModelState, WORDS, WORDS, st.sampled_from(("READY", "LOADING", "UNLOADING", "UNAVAILABLE")), reason=WORDS
)
CONFIGURATIONS = st.builds(Configuration, IDS, st.dictionaries(WORDS, SETTINGS, max_size=3))
ANSWERS = (
    ANSWERED
    | st.builds(Alive)
    | st.builds(Measured, CURVES)
    | st.builds(Deployed, CONFIGURATIONS)
    | st.builds(Done)
    | st.builds(Repository, st.lists(STATES, max_size=3))
    | ERRORS.map(Failure.of)
    | st.builds(Catalog, st.lists(MODELS, max_size=3))
)
REPLIES = st.builds(Reply, IDS, ANSWERS)
