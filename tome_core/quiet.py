"""Imports of packages that send usage reports, with the reports off: `from tome_core.quiet import openvino`.

The import of openvino alone creates a permanent id of the machine in the home folder, and sends it to an analytics
host. The package openvino_telemetry does this; openvino also works without it, so it is hidden from this process.
onnxruntime reports at its first session, and huggingface_hub tells the hub which packages are installed; environment
variables stop both, also in child processes. Nothing is written for that. All code here imports these packages through
this file.
"""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnxruntime as onnxruntime
    import openvino as openvino

sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # so its import fails, as where it is missing
os.environ["ORT_DISABLE_TELEMETRY"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def __getattr__(name: str) -> object:
    if name not in ("onnxruntime", "openvino"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(name)
