"""Which backend computes, that it computes what torch does, and what it keeps."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from server.device import runner
from server.device.backend import BackendOptions
from server.device.choosing import choose_backend
from server.device.device import Device
from server.device.explainer import Explainer
from server.device.models import LoadedModel
from server.device.torch_backend import RecordedBackend, TorchBackend
from server.dial import Schedule
from server.errors import SettingsError
from server.images.image import Pixels
from server.images.preprocessing import Preprocessing
from server.ipc.messages import Classify, Item
from server.types import ModelInfo
from tests.server.test_graphs import Repeated
from tome_core import MergedViT, openvino_operator, wrap
from tome_core.embedding import Normalisation
from tome_core.vit import Implementation, Kernels

CPU = torch.device("cpu")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


def loaded(kernels: Kernels = "auto", embed_dim: int = 48) -> LoadedModel:
    """A small model whose weights spread its tokens, so that rounding decides no match."""
    torch.manual_seed(0)
    size: dict[str, Any] = {"img_size": 64, "depth": 2, "embed_dim": embed_dim, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, **size)
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.1)
    merged = wrap(model.eval(), kernels)
    info = ModelInfo(
        name="small",
        architecture="vit",
        source="test",
        labels=tuple("abcdefg"),
        preprocessing=Preprocessing((64, 64), (64, 64), "center", "bicubic", MEAN, STD),
        num_blocks=merged.num_blocks,
        num_tokens=merged.num_tokens,
        num_prefix_tokens=merged.num_prefix_tokens,
        max_r=merged.max_r,
    )
    return LoadedModel(merged, info)


def pixels(batch_size: int) -> Tensor:
    return torch.randint(256, (batch_size, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def images(batch_size: int) -> Tensor:
    """The same pixels, normalised."""
    return ((pixels(batch_size) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2).contiguous()


def test_whoever_works_on_a_device_takes_turns_with_all_of_its_runners_and_may_take_two_at_once() -> None:
    one, other = runner.Runner({}, "cpu"), runner.Runner({}, "cpu")
    assert one.alone is other.alone
    with one.alone, other.alone:
        pass


def test_a_gpu_is_the_one_of_the_thread_that_computes_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Played without one: each call of the backend is made inside."""
    entered: list[torch.device] = []

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield
        entered.pop()

    def outputs(self: TorchBackend, pixels: Tensor, schedule: Schedule) -> Tensor:
        calls.append(list(entered))
        return torch.zeros(len(pixels), 7)

    calls: list[list[torch.device]] = []
    monkeypatch.setattr(runner, "on", on)
    monkeypatch.setattr(TorchBackend, "outputs", outputs)
    monkeypatch.setattr(TorchBackend, "warm_up", lambda self, schedule, is_likely: calls.append(list(entered)))
    small = loaded()
    key = small.info.batch_key((0, 0))
    one = runner.Runner({"small": small}, "cpu", "fp32")
    one.top_k(key, pixels(1), 1)
    one.warm_up(key)
    assert calls == [[CPU]] * 3


def test_on_a_gpu_means_that_one() -> None:
    where = runner.on(torch.device("cuda", 1))
    assert isinstance(where, torch.cuda.device) and where.idx == 1
    assert not isinstance(runner.on(CPU), torch.cuda.device)


def test_without_the_package_torch_computes_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with caplog.at_level(logging.DEBUG):
        backend = choose_backend(loaded(), CPU, "auto", BackendOptions("auto"), Lock())
    assert (backend.info.name, backend.info.precision) == ("torch", "fp32")
    assert "not installed" in backend.info.reason
    assert "small runs on torch in fp32: the package openvino is not installed" in caplog.text


def test_without_the_package_openvino_refuses_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(SettingsError, match=r"pip install 'tome-server\[openvino\]'"):
        choose_backend(loaded(), CPU, "auto", BackendOptions("openvino"), Lock())


@torch.inference_mode()
def test_recordings_answer_as_launches_do_and_say_what_they_record() -> None:
    model = loaded()
    launched = TorchBackend(model, CPU, "fp32", "asked for")
    recorded = RecordedBackend(launched, 8, Repeated, Lock())
    recorded.warm_up((3, 3))
    for size in (1, 5, 8):
        for schedule in ((3, 3), (0, 2)):
            wanted = launched.outputs(pixels(size), schedule)
            torch.testing.assert_close(recorded.outputs(pixels(size), schedule), wanted, atol=1e-5, rtol=1e-5)
    assert recorded._graphs._held.dtype == torch.uint8  # a quarter of what normalised images take
    assert recorded.info.reason == "asked for; plain operations (there are no kernels for cpu), recorded as graphs"


@torch.inference_mode()
@pytest.mark.parametrize("kernels", ["plain", "fused"])
def test_torch_takes_pixels_and_answers_as_for_their_normalised_images(kernels: Kernels) -> None:
    model = loaded(kernels)
    backend = TorchBackend(model, CPU, "fp32")
    assert backend.implementation.name == kernels
    for schedule in ((0, 0), (5, 2)):
        wanted = model.merged.with_features()(images(3), schedule)
        torch.testing.assert_close(backend.outputs(pixels(3), schedule), wanted, atol=1e-5, rtol=1e-5)


def test_pixels_are_normalised_by_mean_and_std() -> None:
    seen = loaded().info.preprocessing
    normalised = Normalisation(tuple(seen.mean), tuple(seen.std))(pixels(2), torch.float32)
    assert normalised.is_contiguous()
    torch.testing.assert_close(normalised, images(2), atol=1e-6, rtol=1e-6)


def test_a_backend_is_given_bytes_and_no_image_of_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor] = []

    def outputs(self: TorchBackend, pixels: Tensor, schedule: Schedule) -> Tensor:
        given.append(pixels)
        return torch.zeros(len(pixels), 7)

    monkeypatch.setattr(TorchBackend, "outputs", outputs)
    small = loaded()
    explainer = Explainer({"small": small}, "cpu")
    device = Device(runner.Runner({"small": small}, "cpu", "fp32"), explainer)
    images = [Pixels(image.numpy().tobytes()) for image in pixels(3)]
    asked = Classify(model="small", images=list(images), deadline=1.0, top_k=1)
    device.compute(small.info.batch_key((0, 0)), [Item(asked, index) for index in range(3)])
    assert torch.equal(given[0], pixels(3)) and given[0].dtype == torch.uint8 and given[0].is_contiguous()


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_openvino_is_not_for_half_precisions_but_bf16(precision: str) -> None:
    with pytest.raises(SettingsError, match=f"^--backend openvino: OpenVINO has no {precision} on CPUs here"):
        choose_backend(loaded("fused", 384), CPU, precision, BackendOptions("openvino"), Lock())
    backend = choose_backend(loaded("fused", 384), CPU, precision, BackendOptions("auto"), Lock())
    assert (backend.info.name, backend.info.precision) == ("torch", precision)
    assert precision in backend.info.reason


def test_torch_is_taken_where_it_is_asked_for() -> None:
    backend = choose_backend(loaded(), CPU, "bf16", BackendOptions("torch"), Lock())
    assert (backend.info.name, backend.info.precision) == ("torch", "bf16")
    assert {weight.dtype for weight in backend.merged.parameters()} == {torch.bfloat16}


@torch.inference_mode()
def test_fp8_is_near_bf16_and_something_else() -> None:
    """The operations of a GPU, in plain PyTorch."""
    of = {precision: TorchBackend(loaded("fused", 384), CPU, precision) for precision in ("bf16", "fp8", "auto")}
    assert (of["fp8"].info.precision, of["auto"].info.precision) == ("fp8", "fp32")
    for schedule in ((0, 0), (4, 0)):
        bf16, fp8 = (of[precision].outputs(pixels(4), schedule).float() for precision in ("bf16", "fp8"))
        assert 0 < (fp8 - bf16).norm() / bf16.norm() < 0.2


@torch.inference_mode()
def test_the_model_that_a_runner_hands_out_is_the_one_that_answers() -> None:
    """By it benchmarks measure: in fp8 it must be the one in fp8."""
    small = loaded("fused", 384)
    one, key = runner.Runner({"small": small}, "cpu", "fp8"), small.info.batch_key((4, 0))
    answers = one.top_k(key, pixels(3), 7)
    wanted = one.merged("small")(pixels(3), (4, 0))[:, :7].float().softmax(dim=1)
    assert [scores for _, scores in answers] == wanted.sort(dim=1, descending=True).values.tolist()


@pytest.mark.parametrize(
    ("kernels", "embed_dim", "reason"),
    [
        ("auto", 384, "there are no kernels for cpu"),
        ("plain", 384, "asked for plain"),
        ("fused", 48, "float8 takes multiples of 16 from 384 on"),
    ],
)
def test_where_fp8_cannot_be_had_the_start_stops_with_one_line(kernels: Kernels, embed_dim: int, reason: str) -> None:
    with pytest.raises(SettingsError, match=r"^--precision fp8: model small: .*" + reason) as refusal:
        runner.Runner({"small": loaded(kernels, embed_dim)}, "cpu", "fp8", BackendOptions("auto"))
    assert "\n" not in str(refusal.value)


def test_fp8_is_refused_where_the_model_would_run_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU whose machine has no C compiler for Triton."""
    monkeypatch.setattr(MergedViT, "implementation", lambda self, images: Implementation("plain", "no compiler"))
    with pytest.raises(SettingsError, match="^--precision fp8: model small: it does not run fused: no compiler$"):
        TorchBackend(loaded("fused", 384), CPU, "fp8")


@pytest.fixture
def openvino() -> Any:
    return pytest.importorskip("server.device.openvino", reason="the package openvino is not installed")


@pytest.fixture
def openvino_compiler() -> Any:
    return pytest.importorskip("server.device.openvino_compiler", reason="the package openvino is not installed")


@torch.inference_mode()
def test_openvino_answers_as_torch_does_whatever_the_size_of_the_batch(openvino: Any, tmp_path: Path) -> None:
    model = loaded()
    backend = choose_backend(model, CPU, "fp32", BackendOptions("openvino", 1, tmp_path, max_batch_size=4), Lock())
    assert (backend.info.name, backend.info.precision) == ("openvino", "fp32")
    assert "1 threads" in backend.info.reason
    for schedule in ((0, 0), (5, 2)):
        backend.warm_up(schedule)
        for batch_size in (1, 3, 5, 6):
            wanted = model.merged.with_features()(images(batch_size), schedule)
            torch.testing.assert_close(backend.outputs(pixels(batch_size), schedule), wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_what_is_not_compiled_is_answered_by_torch_and_then_by_openvino(
    openvino: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded()
    backend: Any = choose_backend(model, CPU, "fp32", BackendOptions("openvino", 1, max_batch_size=1), Lock())
    may_compile, compile_now = threading.Event(), backend._compile

    def wait_and_compile(*args: Any, **named: Any) -> Any:
        may_compile.wait(60)
        return compile_now(*args, **named)

    monkeypatch.setattr(backend, "_compile", wait_and_compile)
    wanted = model.merged.with_features().from_pixels(MEAN, STD)(pixels(1), (3, 0))
    for _ in range(3):
        assert torch.equal(backend.outputs(pixels(1), (3, 0)), wanted)  # torch's own: bit for bit
    assert (3, 0) not in backend._runs
    thread = backend._later.thread
    may_compile.set()
    thread.join()
    assert (3, 0) not in backend._runs  # of this thread
    torch.testing.assert_close(backend.outputs(pixels(1), (3, 0)), wanted, atol=1e-4, rtol=1e-4)
    assert (3, 0) in backend._runs


@torch.inference_mode()
def test_torch_answers_while_a_schedule_is_translated(openvino: Any) -> None:
    model = loaded()
    backend: Any = choose_backend(model, CPU, "fp32", BackendOptions("openvino", 1, max_batch_size=1), Lock())
    wanted = model.merged.with_features()(images(1), (4, 0))
    backend.outputs(pixels(1), (4, 0))
    while (4, 0) not in backend._runs:
        torch.testing.assert_close(backend.outputs(pixels(1), (4, 0)), wanted, atol=1e-4, rtol=1e-4)


def test_a_translation_that_dies_is_told(openvino_compiler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = openvino_compiler.Compiler(loaded().merged, (64, 64), 1)
    monkeypatch.setattr(openvino_compiler.pickle, "dumps", lambda merged: b"no model")
    with pytest.raises(RuntimeError, match="status 1"):
        compiler.graph((4, 0), 1, "fp32", aside=True)


@torch.inference_mode()
def test_a_graph_that_computes_something_else_is_not_used(openvino: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_right = openvino.Compiler.graph

    def compile_wrong(*args: Any) -> Any:
        run = compile_right(*args)
        return lambda images: run(images) + 1

    monkeypatch.setattr(openvino.Compiler, "graph", compile_wrong)
    backend = choose_backend(loaded(), CPU, "fp32", BackendOptions("auto", 1, max_batch_size=1), Lock())
    assert backend.info.name == "torch"
    assert "differ from torch's" in backend.info.reason


def test_a_translation_is_made_once_for_the_same_weights(
    openvino_compiler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded()

    def answers() -> Tensor:
        compiler = openvino_compiler.Compiler(model.merged, (64, 64), 1, tmp_path)
        return compiler.graph((3, 0), 1, "fp32")(images(1))  # type: ignore[no-any-return]

    first = answers()
    with monkeypatch.context() as patch:
        patch.setattr(openvino_compiler, "translate", None)
        assert torch.equal(answers(), first)
    torch.nn.init.constant_(model.merged.get_parameter("model.head.bias"), 2.0)
    torch.testing.assert_close(answers(), first + 2.0)


@pytest.mark.parametrize("fp32_s, bf16_s, wanted", [(2.0, 1.0, "bf16"), (1.0, 1.0, "fp32"), (1.0, 2.0, "fp32")])
def test_auto_takes_bf16_only_where_it_is_faster(
    fp32_s: float, bf16_s: float, wanted: str, openvino: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, now = loaded(), [0.0]

    class FakeCompiler:
        threads, input_size, has_bf16, graph_bytes, folder = 2, (64, 64), True, 1, tmp_path

        def __init__(self, *args: Any) -> None:
            pass

        def keep(self, schedule: Any) -> None:
            pass

        def any_batch(self, schedule: Any, max_batch_size: int, precision: str, sizes: Any, aside: bool) -> Any:
            graph = self.graph(schedule, 1, precision)
            return openvino.AnyBatch(graph, {1: graph}, 2)

        def graph(self, schedule: Any, batch_size: int, precision: str, side_by_side: int = 1) -> Any:
            def run(images: Tensor) -> Tensor:
                now[0] += fp32_s if precision == "fp32" else bf16_s
                return model.merged(images, schedule)  # type: ignore[no-any-return]

            return run

    monkeypatch.setattr(openvino, "Compiler", FakeCompiler)
    monkeypatch.setattr(openvino.time, "perf_counter", lambda: now[0])
    backend = choose_backend(model, CPU, "auto", BackendOptions("openvino", max_batch_size=2), Lock())
    assert backend.info.precision == wanted
    assert f"bf16 measured {fp32_s / bf16_s:.2f} times as fast as fp32" in backend.info.reason
    monkeypatch.setattr(openvino.OpenVINOBackend, "_measured_ratio", None)  # the next start measures nothing
    again = choose_backend(model, CPU, "auto", BackendOptions("openvino", max_batch_size=2), Lock())
    assert again.info == backend.info


@pytest.mark.parametrize(
    "num_images, threads, wanted",
    [
        (2, 2, [(1, 2)]),
        (3, 2, [(2, 1), (1, 1)]),
        (5, 2, [(2, 2), (1, 1)]),
        (7, 2, [(4, 1), (2, 1), (1, 1)]),
        (8, 2, [(4, 2)]),
        (32, 2, [(4, 8)]),
        (32, 16, [(2, 16)]),
        (3, 16, [(1, 3)]),
        (6, 1, [(4, 1), (2, 1)]),
    ],
)
def test_a_batch_is_cut_so_that_every_thread_has_a_part(
    num_images: int, threads: int, wanted: list[tuple[int, int]], openvino: Any
) -> None:
    from server.device.openvino_graphs import groups_of

    assert groups_of(num_images, [1, 2, 4], threads) == wanted


@torch.inference_mode()
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_parts_side_by_side_come_back_in_their_order(threads: int, openvino: Any) -> None:
    model = loaded()
    run = openvino.Compiler(model.merged, (64, 64), threads).any_batch((5, 2), 11, "fp32")
    for batch_size in (1, 2, 3, 7, 11):
        wanted = model.merged(images(batch_size), (5, 2))
        torch.testing.assert_close(run(images(batch_size)), wanted, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_merging_does_without_a_compiler(
    openvino: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(openvino_operator, "_SHIPPED", tmp_path)
    model = loaded()
    with caplog.at_level(logging.INFO):
        run = openvino.Compiler(model.merged, (64, 64), 1).graph((5, 2), 3, "fp32")
    assert "OpenVINO merges by its own operators, which takes longer: there is no C++ compiler" in caplog.text
    torch.testing.assert_close(run(images(3)), model.merged(images(3), (5, 2)), atol=1e-4, rtol=1e-4)
