"""Help for settings in commands without a server, where they mean less than in `serve`."""

from __future__ import annotations

WITHOUT_SERVER = {
    "model": "the model, SOURCE[,weights=FILE][,tuned=FILE][,name=NAME][,r=R][,version=N] with SOURCE one of bundled, "
    "a timm name, hf-hub:ORG/NAME, local-dir:FOLDER",
    "weights": "safetensors file for the model; 'random' for untrained weights",
    "tuned": "tuned numbers, which 'tome-server tune' makes: auto takes those beside the weights or in the state "
    "folder, none takes none, else a FILE",
    "r": "tokens merged in each block: a number, or a list like 16,14,12 with one number per block",
    "device": "torch device; auto takes cuda where there is one, else the CPU; classify and run divide photos among "
    "several, as in cuda:0,cuda:1",
    "decode": "what decodes JPEG: Pillow (cpu), or the device in batches; auto: the device on cuda",
    "threads": "CPU threads; 0 takes what the container may use",
    "max_batch_size": "most images in a batch",
    "state_dir": "folder that keeps compiled models, curves and tuned numbers; none to keep none",
}
