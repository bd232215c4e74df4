"""A model at one `r` in OpenVINO, the fastest runtime on CPUs.

The graph is torch's, with four changes. Merging, which is one operator in torch, is written in OpenVINO's own operators
with tables of whole rows, where torch's form would move an index for every number; or it is one OpenVINO operator, if
that could be compiled (`openvino_operator`). A joint projection becomes one projection a part, and queries are scaled
instead of scores, so that OpenVINO's fused attention accepts them directly. Weight and bias of a norm move into the
weights of the layers that read it. The operations that decide which tokens merge, and the sizes, stay float32 when the
layers run in bfloat16.
"""

from __future__ import annotations

import logging
import math
import operator
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from tome_core.export import export_program
from tome_core.matching import first_of_sides, match
from tome_core.merging import merge
from tome_core.schedule import RLike, max_r
from tome_core.tokens import Tokens
from tome_core.vit import MergedViT

if TYPE_CHECKING:
    from tome_core.quiet import openvino

_FLOAT32 = "float32."
"""Prefix of the names of nodes that stay in float32."""


@torch.library.custom_op("tome_core::merged_tokens", mutates_args=())
def _merged_tokens(x: Tensor, keys: Tensor, size: Tensor, r: int, num_prefix_tokens: int) -> Tensor:
    """Matching and merging as one operator: tokens (B, N, C), keys (B, num_heads, N, D) and sizes (B, N)."""
    return merge(match(keys.mean(dim=1), r, num_prefix_tokens), x, size)[0]


@_merged_tokens.register_fake
def _(x: Tensor, keys: Tensor, size: Tensor, r: int, num_prefix_tokens: int) -> Tensor:
    return x[:, r:].clone()


@torch.library.custom_op("tome_core::merged_size", mutates_args=())
def _merged_size(merged: Tensor, size: Tensor) -> Tensor:
    """The sizes of the result of `merged_tokens`. An OpenVINO operator may have one result only; this names the
    other.
    """
    raise NotImplementedError("this operator exists only to be translated")


@_merged_size.register_fake
def _(merged: Tensor, size: Tensor) -> Tensor:
    return size[:, : merged.shape[1]].clone()


class _OneOperator(MergedViT):
    """The model with merging as one operator, for families without tracking of tokens."""

    def _merge(self, block: nn.Module, tokens: Tokens, keys: Tensor, r: int, track: bool) -> Tokens:
        if track:
            return super()._merge(block, tokens, keys, r, track)
        B, N, _ = tokens.x.shape
        size = tokens.size if tokens.size is not None else torch.ones(B, N, device=keys.device)
        x = torch.ops.tome_core.merged_tokens(tokens.x, keys, size, r, self.num_prefix_tokens)
        return Tokens(x, torch.ops.tome_core.merged_size(x, size))


def to_openvino(
    merged: MergedViT, r: RLike, input_size: tuple[int, int], operator: Path | None = None
) -> openvino.Model:
    """Translates the model at one `r` to OpenVINO.

    Args:
        merged: The merging model, in eval mode and float32.
        r: Tokens merged in each block: a number, a list of one per block, or a Ramp.
        input_size: Height and width of its images, in pixels.
        operator: The library of `build_operator`, which every reader of the model must add as an extension. None merges
            by OpenVINO's own operators.

    Returns:
        A model of images (B, 3, H, W) that computes the same as `merged`, such as logits (B, K), for any B. `reshape`
        it to the batch size before compilation, which makes it faster. Write it with `save`, which marks the float32
        nodes.

    Raises:
        ExportError: The model is in training mode.
        ValueError: r is negative, or lists more blocks than there are.
    """
    from tome_core.quiet import openvino

    model = _OneOperator(merged.at(r).model)
    if merged.gives_features:
        model = model.with_features()
    program = export_program(model, r, input_size)
    _split_projections(program)
    _scale_queries(program)
    _fold_norms(program)
    translate = _translate if operator is None else _calls_of(operator)
    shapes = iter(
        node.args[1].meta["val"].shape[1:]
        for node in program.graph.find_nodes(
            op="call_function", target=torch.ops.tome_core.merged_tokens.default, sort=True
        )
    )
    sizes: dict[str, Any] = {}

    def tokens(node: Any) -> list[Any]:
        merged, size = translate(node, *next(shapes))
        sizes[merged.get_node().get_friendly_name()] = size
        return [merged]

    def size(node: Any) -> list[Any]:
        return [sizes[node.get_input(0).get_node().get_friendly_name()]]

    from openvino.frontend.pytorch import ConversionExtension  # not openvino.convert_model, which would report its use
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    frontend = openvino.frontend.FrontEndManager().load_by_framework("pytorch")
    frontend.add_extension(ConversionExtension("tome_core.merged_tokens.default", tokens))
    frontend.add_extension(ConversionExtension("tome_core.merged_size.default", size))
    root = logging.getLogger()
    root.addFilter(_is_news)
    try:
        decoder = TorchFXPythonDecoder.from_exported_program(program)
    finally:
        root.removeFilter(_is_news)
    return frontend.convert(frontend.load(decoder))


def _is_news(record: logging.LogRecord) -> bool:
    """Whether to log a line: OpenVINO warns about operators that newer torch lacks and no ViT needs."""
    return "not found in decomp table" not in record.getMessage()


def save(model: openvino.Model, file: Path) -> None:
    """Writes the model as OpenVINO's IR, `file` (.xml) and its weights beside it (.bin).

    Nodes that decide which tokens merge get the mark that OpenVINO's CPU plugin obeys; Python can only set it here.
    """
    from tome_core.quiet import openvino

    openvino.serialize(model, file)
    tree = ElementTree.parse(file)
    for layer in tree.iter("layer"):
        if layer.get("name", "").startswith(_FLOAT32):
            marks = layer.find("rt_info")
            if marks is None:
                marks = ElementTree.Element("rt_info")
                layer.insert(0 if layer.find("data") is None else 1, marks)
            ElementTree.SubElement(
                marks, "attribute", name="DisablePrecisionConversion", version="0", value="dynamic:f16"
            )
    tree.write(file)


def _rows_of(keys: Any) -> Any:
    """Keys (B, num_heads, N, D) as (B, N, num_heads * D)."""
    import numpy as np

    from tome_core.quiet import openvino

    ops = openvino.opset15
    if keys.get_node().get_type_name() == "Transpose":  # before it, the heads of a token lie side by side
        keys = keys.get_node().input_value(0)
    else:
        keys = ops.transpose(keys, ops.constant(np.array([0, 2, 1, 3])))
    return ops.reshape(keys, ops.constant(np.array([0, 0, -1])), True)


def _calls_of(library: Path) -> Any:
    """Like `_translate`, by the compiled operator."""
    from tome_core.quiet import openvino

    factory = openvino.utils.node_factory.NodeFactory()
    factory.add_extension(str(library))

    def call(node: Any, num_heads: int, N: int, D: int) -> tuple[Any, Any]:
        x, keys, size = (node.get_input(i) for i in range(3))
        r, num_prefix_tokens = (node.get_values_from_const_input(i) for i in (3, 4))
        facts = {"r": min(r, max_r(N, num_prefix_tokens)), "num_prefix_tokens": num_prefix_tokens}
        made = factory.create("MergeTokens", [x, _rows_of(keys), size], facts | {"num_heads": num_heads})
        return made.output(0), made.output(1)

    return call


def _translate(node: Any, num_heads: int, N: int, D: int) -> tuple[Any, Any]:
    """The operator `merged_tokens`, over keys (B, num_heads, N, D), in OpenVINO's operators."""
    import numpy as np

    from tome_core.quiet import openvino

    ops = openvino.opset15
    x, keys, size = (node.get_input(i) for i in range(3))
    r, num_prefix_tokens = (node.get_values_from_const_input(i) for i in (3, 4))
    r = min(r, max_r(N, num_prefix_tokens))

    def exact(made: Any) -> Any:
        made.set_friendly_name(_FLOAT32 + made.get_friendly_name())
        return made

    def integers(*values: int) -> Any:
        return ops.constant(np.array(values, dtype=np.int32))

    # Only rows: OpenVINO 2026.4 crashes in a Gather of single numbers from a batch of one.
    def gather(data: Any, index: Any, batch_dims: int = 1) -> Any:
        return ops.gather(data, index, integers(1), batch_dims)

    src, dst = (np.arange(first, N, 2, dtype=np.int32) for first in first_of_sides(num_prefix_tokens))

    # Cosine similarity is independent of scale, so the sum over heads replaces their mean. A product is the fastest
    # sum.
    heads = ops.constant(np.tile(np.eye(D, dtype=np.float32), (num_heads, 1)))
    metric = ops.matmul(_rows_of(keys), heads, False, False)
    # Root mean square instead of the norm: it differs by a constant factor, and is one fused operation.
    square = ops.reduce_mean(ops.power(metric, ops.constant(np.float32(2))), integers(2), True)
    root = ops.sqrt(ops.add(square, ops.constant(np.float32(1e-24))))
    metric = ops.multiply(metric, ops.divide(ops.constant(np.float32(1)), root))
    sides = [gather(metric, ops.constant(side), 0) for side in (src, dst)]
    similarity = exact(ops.matmul(*sides, False, True))
    nearest = exact(ops.topk(similarity, ops.constant(1), 2, "max", "none", index_element_type="i32"))
    flat = integers(0, -1)
    best, partner = exact(ops.reshape(nearest.output(0), flat, True)), ops.reshape(nearest.output(1), flat, True)
    ranked = exact(ops.topk(best, ops.constant(r), 1, "max", "value", index_element_type="i32", stable=True))
    merged = ranked.output(1)  # (B, r)
    away = ops.add(ops.multiply(merged, integers(2)), integers(int(src[0])))
    # All that stays except dst, in order: the smallest positions, with merged tokens moved past all others.
    stays = np.concatenate([np.arange(num_prefix_tokens, dtype=np.int32), src])[None, None]
    is_merged = ops.equal(ops.unsqueeze(away, integers(2)), ops.constant(stays))  # (B, r, prefix + N_src)
    late = ops.reduce_max(ops.select(is_merged, ops.constant(stays + N), ops.constant(stays)), integers(1))
    joined = ops.unsqueeze(ops.gather_elements(partner, merged, 1), integers(1))  # (B, 1, r)
    rows = ops.constant(np.arange(len(dst), dtype=np.int32)[None, :, None])
    joins = exact(ops.convert(ops.equal(joined, rows), openvino.Type.f32))  # (B, N_dst, r)
    lost = exact(ops.gather_elements(size, away, 1))
    gains = exact(ops.multiply(joins, exact(ops.reshape(lost, integers(0, 1, -1), True))))
    before = exact(ops.slice(size, *map(integers, (int(dst[0]), N, 2, 1))))
    after = exact(ops.add(before, exact(ops.reduce_sum(gains, integers(2)))))  # (B, N_dst)
    column = integers(0, -1, 1)
    weights = ops.divide(gains, ops.reshape(after, column, True))
    share = ops.reshape(exact(ops.divide(before, after)), column, True)
    received = ops.add(
        ops.multiply(gather(x, ops.constant(dst), 0), share), ops.matmul(weights, gather(x, away), False, False)
    )
    if stays.size == r:
        return received.output(0), after.output(0)
    kept = ops.topk(late, ops.constant(stays.size - r), 1, "min", "value", index_element_type="i32").output(0)
    sizes = exact(ops.concat([exact(ops.gather_elements(size, kept, 1)), after], 1))
    return ops.concat([gather(x, kept), received], 1).output(0), sizes.output(0)


def _split_projections(program: ExportedProgram) -> None:
    """Splits a linear layer whose output is cut into parts into one layer a part, which saves cutting at every call."""
    graph = program.graph
    for cut in list(graph.find_nodes(op="call_function", target=torch.ops.aten.split_with_sizes.default)):
        linear, widths = cut.args[0], cut.args[1]
        parts_alone = all(user.target is operator.getitem for user in cut.users)
        if linear.target is not torch.ops.aten.linear.default or len(linear.users) > 1 or not parts_alone:
            continue
        if len(cut.args) < 3 or cut.args[2] not in (-1, linear.meta["val"].ndim - 1):
            continue
        x, weight, *bias = linear.args
        for part in list(cut.users):
            start = sum(widths[: part.args[1]])
            end = start + widths[part.args[1]]
            with graph.inserting_before(part):
                rows = [
                    graph.call_function(torch.ops.aten.slice.Tensor, (each, 0, start, end)) for each in (weight, *bias)
                ]
                alone = graph.call_function(torch.ops.aten.linear.default, (x, *rows))
            alone.meta.update(part.meta)
            part.replace_all_uses_with(alone)
            graph.erase_node(part)
        graph.erase_node(cut)
        graph.erase_node(linear)
    program.graph_module.recompile()


def _scale_queries(program: ExportedProgram) -> None:
    """Scales queries by 1 / sqrt(D), which OpenVINO fuses. It would scale the keys in a separate step."""
    graph = program.graph
    for attention in graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default):
        if attention.kwargs.get("scale") is not None:
            continue
        q = attention.args[0]
        with graph.inserting_before(attention):
            scaled = graph.call_function(torch.ops.aten.mul.Tensor, (q, 1 / math.sqrt(q.meta["val"].shape[-1])))
        scaled.meta.update(q.meta)
        attention.args = (scaled, *attention.args[1:])
        attention.kwargs = {**attention.kwargs, "scale": 1.0}
    program.graph_module.recompile()


def _fold_norms(program: ExportedProgram) -> None:
    """Folds weight and bias of a norm into the linear layers that read it: one operation less at every call."""
    graph = program.graph
    for norm in graph.find_nodes(op="call_function", target=torch.ops.aten.layer_norm.default):
        x, widths, weight, bias, *rest = norm.args
        linears = _linears_after(norm, norm.meta["val"].ndim - 1)
        if not linears or None in (weight, bias) or len(widths) != 1:
            continue
        for linear in linears:
            rows, layer, *shift = linear.args
            with graph.inserting_before(linear):
                scaled = graph.call_function(torch.ops.aten.mul.Tensor, (layer, weight))
                shifted = graph.call_function(torch.ops.aten.linear.default, (bias, layer, *shift))
            linear.args = (rows, scaled, shifted)
        norm.args = (x, widths, None, None, *rest)
    program.graph_module.recompile()


def _linears_after(node: Node, last: int) -> list[Node]:
    """The linear layers that read a node, or some of its rows; none if anything else reads it too."""
    linears = []
    for user in node.users:
        cuts_rows = user.target in (torch.ops.aten.slice.Tensor, torch.ops.aten.select.int)
        if user.target is torch.ops.aten.linear.default and user.args[0] is node:
            linears.append(user)
        elif user.target is torch.ops.aten.dropout.default or (cuts_rows and user.args[1] in range(last)):
            further = _linears_after(user, last)
            if not further:
                return []
            linears += further
        else:
            return []
    return linears
