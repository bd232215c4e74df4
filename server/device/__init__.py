"""Computes batches. This package needs torch.

`Device` (device.py) has the computation of each operation, after the stage that prepares. If the engine decodes,
`Preparer` makes pixels of JPEG files in its own thread and stream, and the batch is launched at once behind the running
one, so that the GPU never waits for Python. Otherwise images come as pixels, and the computing thread joins them.
`Fitting` halves a batch that does not fit into memory. `Runner` classifies: a backend computes logits, which are copied
back once for each batch. `Explainer` follows tokens, by torch in float32 on the model's own weights, with any backend.

On cuda the backend is torch, replayed from CUDA graphs (graphs.py): one for each schedule and each of a few batch
sizes, in one memory pool. Before the engine is ready, r=0 and the deployment's `r` are recorded in every size. Under
`auto`, the other rungs are recorded for the largest batch and a single image, and in other sizes while the device is
idle. A schedule of three batches is recorded too, if there is memory for it or another is used less (uses.py). No other
thread uses the device during a recording.

On the CPU the backend is OpenVINO if it is installed and supports the model, otherwise torch. OpenVINO compiles static
shapes, so there are graphs for each schedule: one for a single image, by all threads, and others for batches that run
side by side, a thread each. At the start r=0 and the deployment's `r` are compiled for a single image. A thread
compiles the rest (later.py): first the schedules of requests, then the ladder of the curve. Until then torch in float32
computes them, and answers say so. The graphs take at most a quarter of the container's memory. Beyond that, the graphs
that requests use least are dropped. All schedules that merge share one translation (openvino_compiler.py). Every graph
is compared with torch on random images before it is used.
"""

from server.device import lean  # noqa: F401 - before any file of this package imports timm
