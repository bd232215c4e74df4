"""Merging as one compiled OpenVINO operator, if there is a C++ compiler.

About 36 small operators of a merge become one. This matters most when each has little work: in bfloat16, and for a
single image. `openvino_operator.cpp` is its source; OpenVINO's headers come with its wheel.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tome_core.quiet import openvino

_SOURCE = Path(__file__).with_suffix(".cpp")
# Never unloaded: models compiled with it outlive the `openvino.Core` that loaded it, and would call freed code.
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared", "-Wl,-z,nodelete")


class OperatorError(RuntimeError):
    """The operator cannot be compiled here; the message says why. Models work without it."""


def build_operator(folder: Path) -> Path:
    """Compiles the operator for this machine, or finds it compiled.

    Args:
        folder: Its folder. The file name depends on its source, the compiler, the CPU and OpenVINO's version.

    Returns:
        The library, for `to_openvino` and for `openvino.Core.add_extension`.

    Raises:
        OperatorError: There is no C++ compiler, OpenVINO lacks its headers, or compiling fails.
        OSError: The folder cannot be written.
    """
    from tome_core.quiet import openvino

    package = Path(openvino.__file__).parent
    compiler = shutil.which("c++")
    if compiler is None:
        raise OperatorError("there is no C++ compiler (c++)")
    libraries = sorted((package / "libs").glob("libopenvino.so.*"))
    if not libraries or not (package / "include").is_dir():
        raise OperatorError(f"OpenVINO's headers and library are not in {package}")
    # The predefined macros contain the compiler's version and the meaning of -march=native on this machine.
    macros = _run(compiler, "-march=native", "-dM", "-E", "-x", "c++", "/dev/null")
    identity = (_SOURCE.read_text(), macros, repr(_FLAGS), openvino.__version__)
    library = folder / f"merge_tokens-{hashlib.sha256(''.join(identity).encode()).hexdigest()[:24]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / library.name
            _run(compiler, *_FLAGS, str(_SOURCE), "-I", str(package / "include"), str(libraries[0]), "-o", str(made))
            made.replace(library)
    return library


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except subprocess.CalledProcessError as error:
        raise OperatorError(f"{command[0]} failed: {error.stderr.strip()[-500:]}") from error


def operators(model: openvino.Model) -> list[Any]:
    """The merging operators of a model, in the order of its blocks."""
    return [node for node in model.get_ordered_ops() if node.get_type_name() == "MergeTokens"]


def to_bfloat16(model: openvino.Model) -> None:
    """Lets the operator read and write tokens in bfloat16, for a model to be compiled in it.

    A float32 graph serves both precisions, except that OpenVINO keeps the types of a custom operator and would convert.
    Sizes and the operator's arithmetic stay float32.
    """
    from tome_core.quiet import openvino

    ops = openvino.opset15
    for node in operators(model):
        readers = node.output(0).get_target_inputs()
        for port in (node.input(0), node.input(1)):
            port.replace_source_output(ops.convert(port.get_source_output(), openvino.Type.bf16).output(0))
        node.validate_and_infer_types()
        widened = ops.convert(node.output(0), openvino.Type.f32).output(0)
        for reader in readers:
            reader.replace_source_output(widened)
    model.validate_nodes_and_infer_types()
