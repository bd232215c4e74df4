"""What computes. The room that needs torch.

`Device` (device.py) has the computation of each operation, behind the stage that prepares. Where the engine decodes,
`Preparer` makes pixels of JPEG files in a thread and a stream of its own, and the batch is launched at once behind the
one that computes: the GPU never waits for Python. Otherwise images come as pixels, and are joined on the thread that
computes. `Fitting` halves what does not fit into memory. `Runner` classifies: logits by a backend, one copy back a
batch. `Explainer` follows tokens, by torch in float32 on the model's own weights, whatever answers the others.

On cuda the backend is torch, replayed from CUDA graphs (graphs.py): one for each schedule and each of a few batch
sizes, in one memory pool. Before the engine is ready every size is recorded of r=0 and of the deployment's `r`; under
`auto`, of the other rungs the largest and a lone image, and the rest while nothing is asked. A schedule that was asked
for three times is recorded too, where the device has memory for it or it is used more than another (uses.py). Nothing
is recorded beside another thread's work on the device.

On the CPU the backend is OpenVINO where that is installed and takes the model, else torch. OpenVINO compiles static
shapes, so there are graphs for each schedule: one for a lone image, by all threads, and those of several images that
run side by side, a thread each. At the start r=0 and the deployment's `r` are compiled for a lone image. A thread
compiles the rest (later.py): first what requests ask for, from the first request on, then the ladder of the curve.
Until then torch in float32 stands in, and answers say so. What is compiled fits a quarter of the container's memory;
where that is full, what requests use least makes room. All schedules share one translation (openvino_compiler.py).
Every graph is compared with torch on random images before it is used.
"""

from server.device import lean  # noqa: F401 - before any file of this room imports timm
