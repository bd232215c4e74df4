"""A model at one `r` as a graph that runs without this package: a `torch.export` program or an ONNX file.

The schedule fixes every shape but the batch size. Merging uses no scatter, because runtimes support it badly or compute
it wrong. So the graph has plain operators only, and any runtime gives torch's answer.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.export import Dim, ExportedProgram

from tome_core.fixed import FixedR
from tome_core.schedule import RLike
from tome_core.vit import MergedViT

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

OPSETS = range(18, 23)
"""ONNX operator sets to choose from. torch translates to none before; after, onnxruntime's attention refuses log s."""

TOLERANCE = 1e-3
"""Largest allowed difference of an exported logit from torch's, relative to the largest logit."""


class ExportError(RuntimeError):
    """The model cannot be exported; the message says why. No file is left behind, and an old file is unchanged."""


class OnnxFile(NamedTuple):
    """A written and checked ONNX file.

    Attributes:
        path: Its path. Weights of more than 1.5 GB are in a second file, `path` plus `.data`.
        num_bytes: Its size, including the second file.
        difference: Largest absolute difference from torch's logits on random images; None if onnxruntime is not
            installed.
    """

    path: Path
    num_bytes: int
    difference: float | None


def export_program(
    merged: MergedViT, r: RLike, input_size: tuple[int, int], *, batch_size: int | None = None
) -> ExportedProgram:
    """Captures the model at one `r` with `torch.export`.

    Args:
        merged: The merging model, in eval mode.
        r: Tokens merged in each block: a number, a list of one per block, or a Ramp.
        input_size: Height and width of its images, in pixels.
        batch_size: The one batch size of the program; None allows any.

    Returns:
        A program from `images` (B, 3, H, W), in the model's dtype and on its device, to logits (B, K).

    Raises:
        ExportError: The model is in training mode.
        ValueError: r is negative, or lists more blocks than there are.
    """
    if any(module.training for module in merged.model.modules()):
        raise ExportError("the model is in training mode, and dropout would be exported too; call eval() first")
    weight = next(merged.parameters())
    # # torch always takes a size of 1 for a constant, so the example has 2.
    images = torch.zeros(batch_size or 2, 3, *input_size, dtype=weight.dtype, device=weight.device)
    batch = {0: Dim("batch", min=1)} if batch_size is None else None
    # # Fused operations would need this package at run time.
    return torch.export.export(FixedR(merged.at(r).plain(), r), (images,), dynamic_shapes={"images": batch})


def export_onnx(
    merged: MergedViT,
    r: RLike,
    input_size: tuple[int, int],
    file: Path | str,
    *,
    batch_size: int | None = None,
    opset: int = 20,
    metadata: Mapping[str, object] | None = None,
) -> OnnxFile:
    """Writes the model at one `r` as an ONNX file, and checks it.

    Its input is `images` (batch, 3, H, W), float32, normalised as the model expects. Its output is `logits` (batch, K),
    or `features` (batch, C) for a model without a classifier. The file appears only if `onnx` finds it valid and
    onnxruntime, if installed, gives torch's numbers.

    Args:
        merged: The merging model, in eval mode and float32.
        r: Tokens merged in each block: a number, a list of one per block, or a Ramp.
        input_size: Height and width of its images, in pixels.
        file: Path to write; an existing file is replaced.
        batch_size: The one batch size of the file; None allows any.
        opset: Version of the ONNX operators, from `OPSETS`.
        metadata: Facts for the file's `metadata_props`, each as JSON, in addition to the `schedule`.

    Raises:
        ExportError: A package is missing, the model is not in eval mode and float32, `opset` is out of range, the
            folder does not exist, or the graph does not compute torch's numbers.
        ValueError: r is negative, or lists more blocks than there are.
        OSError: The file cannot be written.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  # torch.onnx needs it
    except ImportError as error:
        raise ExportError(
            f"exporting to ONNX needs the package {error.name}; install it with: pip install 'tome-server[export]'"
        ) from error
    file = Path(file)
    if opset not in OPSETS:
        raise ExportError(f"opset is {opset}; it must lie between {OPSETS[0]} and {OPSETS[-1]}")
    if not file.parent.is_dir() or file.is_dir():
        raise ExportError(f"{file} cannot be written: " + ("it is a folder" if file.is_dir() else "no such folder"))
    dtype = next(merged.parameters()).dtype
    if dtype != torch.float32:
        raise ExportError(f"the model is {dtype}; an ONNX file is written in float32: call float() first")

    fixed = FixedR(merged, r)
    output = "logits" if getattr(merged.model, "num_classes", 1) else "features"
    written = to_onnx(export_program(merged, r, input_size, batch_size=batch_size), opset, ["images"], [output])
    facts = {"schedule": fixed.schedule, **(metadata or {})}
    written.model.metadata_props.update({name: json.dumps(fact) for name, fact in facts.items()})
    with TemporaryDirectory(dir=file.parent, prefix=f".{file.name}-") as folder:
        unchecked = Path(folder) / file.name
        # # torch still writes a second file when the weights are near protobuf's 2 GB
        written.save(unchecked, external_data=False)
        onnx.checker.check_model(unchecked, full_check=True)
        difference = _difference(unchecked, fixed, input_size, (1, 8) if batch_size is None else (batch_size,) * 2)
        parts = sorted(Path(folder).iterdir(), reverse=True)  # # the file itself moves last
        num_bytes = sum(part.stat().st_size for part in parts)
        for part in parts:
            part.replace(file.with_name(part.name))
    return OnnxFile(file, num_bytes, difference)


def to_onnx(program: ExportedProgram, opset: int, inputs: Sequence[str], outputs: Sequence[str]) -> ONNXProgram:
    """Translates a program to ONNX operators, without the source lines and paths that torch adds.

    Args:
        program: The program; a first dimension that is dynamic in all inputs gets the name "batch".
        opset: Version of the ONNX operators.
        inputs: Names of the inputs.
        outputs: Names of the outputs.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    with warnings.catch_warnings():
        # # torch.onnx of torch 2.11 uses functions that torch.utils of that version deprecates.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        written = torch.onnx.export(
            program,
            input_names=inputs,
            output_names=outputs,
            opset_version=opset,
            # # sets only the name: the program knows which dimensions are dynamic
            dynamic_shapes={name: {0: "batch"} for name in inputs},
            custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
            dynamo=True,
            verbose=False,
        )
    assert written is not None  # # None only if torch.onnx.export itself writes a file
    ClearMetadataAndDocStringPass()(written.model)
    return written


def _stable_sort(values: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """aten::sort.stable, which torch.onnx lacks: TopK of all elements, which breaks ties by the lower index."""
    from onnxscript import opset18

    op: Any = opset18  # # its annotations do not cover tracing
    length = op.Constant(value_ints=[values.shape[dim]])
    return op.TopK(values, length, axis=dim, largest=int(descending), sorted=1)


def _difference(file: Path, fixed: FixedR, input_size: tuple[int, int], batch_sizes: tuple[int, ...]) -> float | None:
    """Largest difference between onnxruntime's logits and torch's; None without onnxruntime.

    Raises:
        ExportError: They differ by more than rounding.
    """
    try:
        from tome_core.quiet import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    device = next(fixed.parameters()).device
    expected, differences = [], []
    for batch_size in batch_sizes:
        images = torch.randn(batch_size, 3, *input_size, generator=generator)
        with torch.inference_mode():
            expected.append(fixed(images.to(device)).cpu())
        (logits,) = session.run(None, {"images": images.numpy()})
        differences.append((torch.from_numpy(logits) - expected[-1]).abs().amax(dim=1))
    *others, largest = torch.cat(differences).sort().values.tolist()
    # # Two token pairs that differ only by rounding may merge in either order. Both are right, but the logits move:
    # this may happen to one image of all.
    allowed = TOLERANCE * torch.cat(expected).abs().max().item()
    if not others[-1] <= allowed:
        raise ExportError(f"onnxruntime's logits differ from torch's by {others[-1]:.2g}; at most {allowed:.2g} may be")
    return float(largest)
