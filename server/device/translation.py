"""The process that translates a model for OpenVINO beside a server that answers. It may be killed at any time."""

from __future__ import annotations

import pickle
from multiprocessing import resource_tracker
from typing import Any

from server.lifetime import end_with_parent


def translate_pickled(merged: bytes, *args: Any) -> None:
    """Translates a model; the arguments are those of `translate`, with the model pickled."""
    end_with_parent()
    # Packages that torch imports make semaphores. Python would warn of them if this process was killed.
    resource_tracker.register = lambda name, rtype: None
    resource_tracker.unregister = lambda name, rtype: None
    from server.device.openvino_compiler import translate

    translate(pickle.loads(merged), *args)
