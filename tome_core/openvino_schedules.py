"""One translated model for every schedule that merges: another schedule sets another `r` in its compiled operators.

A translation takes seconds, because torch traces the whole model. The graphs of two schedules differ in the `r` of
their merging operators, and in the numbers of tokens in reshapes. So a model is translated once, at r=1 in every block.
Its reshapes then keep the dimension of tokens instead of naming it. Any other `r` is set in milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tome_core.openvino_operator import operators
from tome_core.schedule import max_r

if TYPE_CHECKING:
    from tome_core.quiet import openvino


def name_no_tokens(model: openvino.Model) -> None:
    """Makes reshapes keep a dimension of any size, where they name the dimension of their input at the same place."""
    from tome_core.quiet import openvino

    ops = openvino.opset15
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Reshape" or node.get_attributes()["special_zero"]:
            continue
        target = node.input_value(1).get_node()
        if target.get_type_name() != "Concat" or target.get_attributes()["axis"] != 0:
            continue
        parts = [target.input_value(place) for place in range(target.get_input_size())]
        if any(not part.get_partial_shape().is_static or list(part.get_shape()) != [1] for part in parts):
            continue
        shape = node.input_value(0).get_partial_shape()
        kept = [_names(part, shape, place) for place, part in enumerate(parts)]
        if not any(kept) or any(_value(part) == 0 for part in parts):
            continue
        zero = ops.constant([0], dtype=parts[0].get_element_type())
        new = [zero.output(0) if is_kept else part for part, is_kept in zip(parts, kept, strict=True)]
        made = ops.reshape(node.input_value(0), ops.concat(new, 0), True)
        made.set_friendly_name(node.get_friendly_name())
        for reader in node.output(0).get_target_inputs():
            reader.replace_source_output(made.output(0))
    model.validate_nodes_and_infer_types()


def set_schedule(model: openvino.Model, schedule: Sequence[int]) -> None:
    """Sets another schedule in a model that was translated at r=1. A block of r=0 loses its operator.

    Args:
        model: The result of `to_openvino` with an operator, after `name_no_tokens`.
        schedule: `r` of each block; clipped to the most that the block can merge.

    Raises:
        RuntimeError: The graph of this model depends on the schedule in another way.
    """
    merging = operators(model)
    # If the head reads only the class token, the last block needs no merging operator.
    if len(merging) not in (len(schedule), len(schedule) - 1):
        raise RuntimeError(f"the graph has {len(merging)} merging operators, and the model {len(schedule)} blocks")
    wanted = int(merging[0].input_value(0).get_partial_shape()[1].get_length())
    for node, r in zip(merging, schedule, strict=False):
        num_prefix_tokens = node.get_attributes()["num_prefix_tokens"]
        r = min(r, max_r(wanted, num_prefix_tokens))
        wanted -= r
        if r:
            node.set_attribute("r", r)
            continue
        for output, source in ((0, 0), (1, 2)):
            for reader in node.output(output).get_target_inputs():
                reader.replace_source_output(node.input_value(source))
    model.validate_nodes_and_infer_types()
    left = [node.get_output_partial_shape(0)[1].get_length() for node in operators(model)]
    if left and left[-1] != wanted:
        raise RuntimeError(f"{left[-1]} tokens leave the last block that merges; it must be {wanted}")


def _names(part: Any, shape: Any, place: int) -> bool:
    """Whether a part of a target shape equals the static dimension of the input at the same place."""
    return place < len(shape) and shape[place].is_static and _value(part) == shape[place].get_length()


def _value(part: Any) -> int | None:
    """The constant value of a part of a target shape; None if it is computed."""
    node = part.get_node()
    return int(node.data.reshape(-1)[0]) if node.get_type_name() == "Constant" else None
