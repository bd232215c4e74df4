"""Merging as one compiled OpenVINO operator, if a C++ compiler makes it or an image ships it.

About 36 small operators of a merge become one. This matters most when each has little work: in bfloat16, and for a
single image. `openvino_operator.cpp` is its source; OpenVINO's headers come with its wheel.

    python -m tome_core.openvino_operator

compiles it into this package, for all CPUs of this architecture. The Docker image is built so, and needs no compiler.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tome_core.quiet import openvino

_SOURCE = Path(__file__).with_suffix(".cpp")
_SHIPPED = Path(__file__).with_name("compiled")
# Never unloaded: models compiled with it outlive the `openvino.Core` that loaded it, and would call freed code.
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-Wl,-z,nodelete")

_X86_FLAGS = {
    "AVX512": ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    "AVX2": ("-mavx2", "-mfma"),
}
"""Flags for the CPUs to which torch gives these names, by the same instructions. Others get what every CPU of their
architecture has. Not -march=native: a library must be right on each CPU that finds it in a shared folder."""


class OperatorError(RuntimeError):
    """The operator cannot be compiled here; the message says why. Models work without it."""


def build_operator(folder: Path) -> Path:
    """Finds the operator compiled for this CPU, or compiles it.

    Args:
        folder: Where it is kept, if this package does not ship it. The file name depends on its source, the CPU, the C
            library and OpenVINO's version.

    Returns:
        The library, for `to_openvino` and for `openvino.Core.add_extension`.

    Raises:
        OperatorError: There is no C++ compiler, OpenVINO lacks its headers, or compiling fails.
        OSError: The folder cannot be written.
    """
    cpu = torch.backends.cpu.get_cpu_capability()
    library = folder / _file_name(cpu)
    shipped = _SHIPPED / library.name
    if shipped.exists():
        return shipped
    if not library.exists():
        _compile(cpu, library)
    return library


def ship() -> None:
    """Compiles the operator into this package for all CPUs of this architecture.

    Raises:
        OperatorError: As in `build_operator`.
        OSError: The package's folder cannot be written.
    """
    with tempfile.TemporaryDirectory(dir=_SHIPPED.parent) as scratch:
        made = Path(scratch) / _SHIPPED.name
        made.mkdir()
        for cpu in ("any", *(_X86_FLAGS if platform.machine() == "x86_64" else ())):
            _compile(cpu, made / _file_name(cpu))
        shutil.rmtree(_SHIPPED, ignore_errors=True)
        made.rename(_SHIPPED)


def _file_name(cpu: str) -> str:
    from tome_core.quiet import openvino

    system = (platform.machine(), platform.libc_ver(), openvino.__version__)
    identity = _SOURCE.read_text() + repr((_FLAGS, _flags_for(cpu), system))
    return f"merge_tokens-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.so"


def _flags_for(cpu: str) -> tuple[str, ...]:
    return _X86_FLAGS.get(cpu, ()) if platform.machine() == "x86_64" else ()


def _compile(cpu: str, library: Path) -> None:
    from tome_core.quiet import openvino

    package = Path(openvino.__file__).parent
    compiler = shutil.which("c++")
    if compiler is None:
        raise OperatorError("there is no C++ compiler (c++)")
    libraries = sorted((package / "libs").glob("libopenvino.so.*"))
    if not libraries or not (package / "include").is_dir():
        raise OperatorError(f"OpenVINO's headers and library are not in {package}")
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch) / library.name
        include = ("-I", str(package / "include"))
        _run(compiler, *_FLAGS, *_flags_for(cpu), str(_SOURCE), *include, str(libraries[0]), "-o", str(made))
        made.replace(library)


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
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


if __name__ == "__main__":
    try:
        ship()
    except (OperatorError, ImportError, OSError) as error:
        sys.exit(f"the merging operator cannot be compiled: {error}")
