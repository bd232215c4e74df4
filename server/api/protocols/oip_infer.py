"""An inference of the Open Inference Protocol, by REST or gRPC: the engine's request, and the tensors of the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from server.api.access import Service
from server.api.asking import CLASSIFY, EMBED, SCORE, SCORE_AND_EMBED, Answer, Asking, Kind
from server.api.body import parse
from server.api.json_body import SMALL
from server.api.protocols.oip_tensors import INPUT, Output, Tensor, images_of
from server.api.schemas import LEAST_DEADLINE_MS, Parameters
from server.dial import r_of, text_of
from server.errors import DeadlineError, InvalidError, NotFoundError, shown
from server.ipc.messages import TopK, Vector
from server.types import Activation, ModelInfo, find_model

T = TypeVar("T")

OURS = ("r", "max_r", "min_agreement", "inflect", "deadline_ms", "function_to_apply")
"""Request parameters that our own endpoints have too."""

PARAMETERS = (*OURS, "timeout", "priority", "binary_data_output")
"""All request parameters. `timeout` is a deadline in microseconds; `priority` has no effect."""

_TRITONS = "triton_"
"""Prefix of parameters that Triton's clients send by themselves, and that only Triton understands."""


class Wanted(NamedTuple):
    """A requested output.

    Attributes:
        classification: Number of likeliest classes to return instead of all scores; 0 for all scores.
    """

    name: str
    classification: int = 0


@dataclass
class Inference:
    """A client's inference request.

    Attributes:
        inputs: Its inputs; there must be one.
        outputs: The requested outputs; none stand for the model's default.
        parameters: Parameters of the request.
        left_s: Seconds that are left of the client's call; None if it has no limit.
        size: Bytes of the request. Long work is done in a thread.
    """

    inputs: Sequence[Tensor]
    outputs: Sequence[Wanted] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    left_s: float | None = None
    size: int = 0


class Inferred(NamedTuple):
    """The answer.

    Attributes:
        answer: The answer of `Asking`.
        outputs: The tensors, in the order of the request.
        parameters: Facts about the computation.
    """

    answer: Answer[Any]
    outputs: list[Output]
    parameters: dict[str, Any]


def model_of(service: Service, name: str, version: str) -> ModelInfo:
    """The model of a request.

    Args:
        service: Has the models.
        name: Its name.
        version: Its version; empty for the served one.

    Raises:
        NotFoundError: There is no model of that name and version.
    """
    info = find_model(service.engine.catalog(), name)
    if version not in ("", info.version):
        raise NotFoundError(f"model {info.name} has no version {shown(version)}; it has {shown(info.version)}")
    return info


def classification_of(parameters: Mapping[str, Any]) -> int:
    """Number of classes that an output names; 0 if it has numbers."""
    k = parameters.get("classification", 0)
    if not isinstance(k, int) or isinstance(k, bool) or ("classification" in parameters and k < 1):
        raise InvalidError(f"classification is {shown(k)}; it must be an integer from 1")
    return k


def outputs_of(info: ModelInfo) -> dict[str, int]:
    """The outputs of a model, the default first, and their numbers for an image."""
    scores = {name: len(info.labels) for name in ("probabilities", "logits")} if info.labels else {}
    return scores | {"embedding": info.num_features}


async def infer(service: Service, asking: Asking, info: ModelInfo, inference: Inference) -> Inferred:
    """Answers an inference.

    Raises:
        InvalidError: An input, output or parameter is wrong.
        ServerError: Errors of `images_of` and `Asking`.
    """
    wanted = _checked(inference.outputs, info)
    parameters = _parameters(info.name, inference)
    activations = [_activation(each, parameters, info) for each in wanted]
    kind, asked = _plan(wanted, activations)
    longest_s = service.settings.deadline_s
    terms = asking.resolve(_within(parameters.model_copy(update=asked), inference.left_s, longest_s))
    if len(inference.inputs) != 1:
        raise InvalidError(f"the request has {len(inference.inputs)} inputs; it must have one, {INPUT}")
    (tensor,) = inference.inputs
    is_sliced = tensor.datatype == "BYTES" and not isinstance(tensor.content, list)
    sent = await _done(
        lambda: images_of(tensor, info.preprocessing, service.settings.max_images),
        size=0 if is_sliced else inference.size,
    )
    answer = await asking.answer(kind, sent, terms)
    results = answer.answered.results
    if kind is CLASSIFY:
        outputs = [_classes(each, info, results) for each in wanted]
    else:
        outputs = await _done(
            lambda: _tensors(wanted, activations, info, terms.activation, results),
            size=sum(len(each.values) for each in results),
        )
    return Inferred(answer, outputs, _computation_of(answer))


async def _done(work: Callable[[], T], size: int) -> T:
    """Runs work on `size` bytes or values. Small work runs at once, because a thread would take longer."""
    return work() if size <= SMALL else await asyncio.to_thread(work)


def _checked(outputs: Sequence[Wanted], info: ModelInfo) -> list[Wanted]:
    known, names = outputs_of(info), [each.name for each in outputs]
    for each in outputs[: len(known) + 1]:  # beyond that, one is repeated or unknown
        if each.name not in known:
            why = "" if info.labels else f", for {info.name} has no classifier"
            raise InvalidError(f"there is no output {shown(each.name)}{why}; there are: {', '.join(known)}")
        if names.count(each.name) > 1:
            raise InvalidError(f"output {each.name} is asked for twice")
        if each.classification and each.name == "embedding":
            raise InvalidError("classification goes with probabilities or logits, not with embedding")
        if not 0 <= each.classification <= len(info.labels):
            raise InvalidError(
                f"classification is {shown(each.classification)}; it must lie between 1 and {len(info.labels)}"
            )
    return list(outputs) or [Wanted(next(iter(known)))]


def _parameters(model: str, inference: Inference) -> Parameters:
    """The parameters of a request that our own endpoints have too."""
    said = inference.parameters
    if unknown := [name for name in said if name not in PARAMETERS and not name.startswith(_TRITONS)]:
        raise InvalidError(f"there is no parameter {shown(unknown[0])}; there are: {', '.join(PARAMETERS)}")
    ours = {name: said[name] for name in OURS if name in said}
    timeout = said.get("timeout", 0)
    if not isinstance(timeout, int) or isinstance(timeout, bool) or timeout < 0:
        raise InvalidError(f"timeout is {shown(timeout)}; it must be an integer from 0: microseconds, 0 for none")
    if timeout and "deadline_ms" in ours:
        raise InvalidError("timeout and deadline_ms are both given; give one of them")
    if timeout:
        ours["deadline_ms"] = min(timeout, 10**15) / 1e3
    return parse(Parameters, {"model": model, **ours})


def _within(parameters: Parameters, left_s: float | None, longest_s: float) -> Parameters:
    """Limits the deadline to the end of the client's call."""
    if left_s is None:
        return parameters
    left_ms = 1e3 * min(left_s, longest_s)
    if left_ms < LEAST_DEADLINE_MS:
        raise DeadlineError("the deadline of the call has passed")
    said_ms = parameters.deadline_ms
    return parameters.model_copy(update={"deadline_ms": left_ms if said_ms is None else min(left_ms, said_ms)})


def _activation(wanted: Wanted, parameters: Parameters, info: ModelInfo) -> Activation:
    """The activation of an output."""
    return (parameters.function_to_apply or info.activation) if wanted.name == "probabilities" else "none"


def _plan(wanted: Sequence[Wanted], activations: Sequence[Activation]) -> tuple[Kind[Any], dict[str, Any]]:
    """The engine's request and its parameters, chosen so that one request gives all outputs."""
    of_scores = {how for each, how in zip(wanted, activations, strict=True) if each.name != "embedding"}
    if not of_scores:
        return EMBED, {}
    function = of_scores.pop() if len(of_scores) == 1 else "none"
    asked: dict[str, Any] = {"function_to_apply": function}
    if len(wanted) == 1 and wanted[0].classification:
        return CLASSIFY, asked | {"top_k": wanted[0].classification}
    has_features = any(each.name == "embedding" for each in wanted)
    return SCORE_AND_EMBED if has_features else SCORE, asked


def _classes(wanted: Wanted, info: ModelInfo, top: Sequence[TopK]) -> Output:
    """The likeliest classes of each image, as "score:index:label"."""
    k = wanted.classification
    texts = [
        f"{score:.7g}:{index}:{info.labels[index]}"
        for each in top
        for index, score in zip(each.indices[:k], each.scores[:k], strict=True)
    ]
    return Output(wanted.name, "BYTES", [len(top), k], texts)


def _tensors(
    wanted: Sequence[Wanted],
    activations: Sequence[Activation],
    info: ModelInfo,
    computed: Activation,
    vectors: Sequence[Vector],
) -> list[Output]:
    """Outputs of numbers.

    Args:
        wanted: The requested outputs.
        activations: The activation of each.
        info: The model.
        computed: The activation of the scores in `vectors`; "none" if several are wanted.
        vectors: The scores of each image, if they are wanted, then its features, if they are wanted.
    """
    import numpy as np

    rows = np.frombuffer(b"".join(each.values for each in vectors), "<f4").reshape(len(vectors), -1)
    num_scores = 0 if all(each.name == "embedding" for each in wanted) else len(info.labels)
    outputs = []
    for each, how in zip(wanted, activations, strict=True):
        if each.name == "embedding":
            values = rows[:, num_scores:]
        else:
            values = rows[:, :num_scores]
            if how != computed:
                values = _activated(values, how)
            if each.classification:
                order = np.argsort(-values, axis=1, kind="stable")[:, : each.classification]
                scores = np.take_along_axis(values, order, axis=1)
                top = [TopK(*pair) for pair in zip(order.tolist(), scores.tolist(), strict=True)]
                outputs.append(_classes(each, info, top))
                continue
        outputs.append(Output(each.name, "FP32", list(values.shape), values.astype("<f4").tobytes()))
    return outputs


def _activated(logits: Any, how: Activation) -> Any:
    """Applies an activation to logits (B, K)."""
    import numpy as np

    if how == "none":
        return logits
    # exp of a number that is not positive never overflows
    raised = np.exp(-np.abs(logits) if how == "sigmoid" else logits - logits.max(axis=1, keepdims=True))
    if how == "sigmoid":
        return np.where(logits >= 0, 1, raised) / (1 + raised)
    return raised / raised.sum(axis=1, keepdims=True)


def _computation_of(answer: Answer[Any]) -> dict[str, Any]:
    """Facts about the computation as parameters: numbers, texts and booleans."""
    terms, answered = answer.terms, answer.answered
    r = r_of(answered.schedule)
    facts: dict[str, Any] = {
        "r": r if isinstance(r, int) else text_of(r),
        "r_source": terms.r_source,
        "tuned": terms.info.is_tuned(answered.schedule),
        "tokens": terms.info.token_counts(answered.schedule)[-1],
        "batch_size": answered.batch_size,
        "config_version": answered.config_version,
    }
    if answered.auto is not None:
        facts["auto_reason"] = answered.auto.reason
        if answered.auto.expected_agreement is not None:
            facts["expected_agreement"] = answered.auto.expected_agreement
    return facts
