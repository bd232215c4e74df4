"""Time of each operation of a block, beside the least that its arithmetic and memory traffic allow.

python -m benchmarks.kernels --model vit_base_patch16_224 --batch 256 --tokens 197,184,119,54 --r 13 --dtype bf16

Each runs alone, as a recorded CUDA graph of many repetitions. "floor" is the longer of two times: its floating-point
operations over the rate of a large product (twice that in float8), and its bytes over the rate of a large copy. Both
rates are measured in the same run. The last line is JSON: {"rows": [{"op", "tokens", "us", "floor_us"}]}.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.data.config import resolve_model_data_config

from benchmarks.forward import DTYPES, timed
from tome_core import kernels
from tome_core.kernels import reference
from tome_core.recorded import CudaRecorder

REPETITIONS = 20  # in a recording, so that its start counts for little


class Operation(NamedTuple):
    """A timed operation, with its floating-point operations and the bytes that it must read and write."""

    name: str
    call: Callable[[], Any]
    flops: float
    num_bytes: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224", help="timm name of a plain ViT")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--tokens", default="197,184,119,54", help="tokens that enter the block")
    parser.add_argument("--r", type=int, default=13)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    args = parser.parse_args()

    device, dtype = torch.device("cuda"), DTYPES[args.dtype]
    model: Any = timm.create_model(args.model).to(device, dtype).eval()
    rate, bandwidth = ceilings(device, dtype)
    print(f"{args.model}, batch {args.batch}, r={args.r}, {args.dtype}, {torch.cuda.get_device_name(device)}")
    print(f"ceilings: {rate / 1e12:.0f} TFLOP/s, {bandwidth / 1e12:.2f} TB/s")
    print(f"{'tokens':>6} {'operation':>20} {'us':>9} {'floor us':>9} {'of floor':>8}")
    rows = []
    for N in map(int, args.tokens.split(",")):
        for operation in operations(model, args.batch, N, args.r, device, dtype):
            us = 1e6 * seconds(operation.call)
            floor_us = 1e6 * max(operation.flops / rate, operation.num_bytes / bandwidth)
            rows.append({"op": operation.name, "tokens": N, "us": us, "floor_us": floor_us})
            print(f"{N:>6} {operation.name:>20} {us:>9.1f} {floor_us:>9.1f} {floor_us / us:>8.0%}", flush=True)
    print(json.dumps({"model": args.model, "batch": args.batch, "r": args.r, "dtype": args.dtype, "rows": rows}))


@torch.inference_mode()
def operations(model: Any, B: int, N: int, r: int, device: torch.device, dtype: torch.dtype) -> Iterator[Operation]:
    """The operations of a block that N tokens enter and M = N - r leave after the merge."""
    block, (C, H, hidden) = model.blocks[0], (model.embed_dim, model.blocks[0].attn.num_heads, 4 * model.embed_dim)
    M, width = N - r, dtype.itemsize
    x, y, merged = (torch.randn(B, n, C, device=device, dtype=dtype) for n in (N, N, M))
    wide, residual = (torch.randn(B, M, c, device=device, dtype=dtype) for c in (hidden, C))
    qkv = torch.randn(B, N, 3 * C, device=device, dtype=dtype)
    q, k, v = qkv.split(C, dim=-1)
    size = torch.randint(1, 5, (B, N), device=device).float()
    log_size, metric = size.log2(), kernels.metric(k, H)
    table = torch.randn(1, N, 2 * C // H, device=device)
    groups = reference.match(metric, r, 1)
    norm = kernels.Norm(block.norm2.weight, block.norm2.bias, block.norm2.eps)
    offset = torch.randn(C, device=device)
    token, fc1, fc2, proj = B * C * width, block.mlp.fc1, block.mlp.fc2, block.attn.proj

    def product(n: int, inputs: int, outputs: int, read: int = 0) -> tuple[float, float]:
        return 2 * B * n * inputs * outputs, (B * n * (inputs + outputs + read) + inputs * outputs) * width

    attention = 4 * B * N * N * C
    image = torch.randn(B, *resolve_model_data_config(model)["input_size"], device=device, dtype=dtype)
    patch = model.patch_embed.patch_size[0]
    yield Operation("cut", lambda: kernels.cut(image, patch, dtype), 0, 2 * image.numel() * width)
    yield Operation("qkv", lambda: block.attn.qkv(x), *product(N, C, 3 * C))
    yield Operation("rotate (rotary)", lambda: kernels.rotate(q, k, table, None, H, False), 0, 4 * N * token)
    yield Operation("attend", lambda: kernels.attend(q, k, v, log_size, None, H), attention, 4 * N * token)
    heads = [t.unflatten(-1, (H, -1)).transpose(1, 2) for t in (q, k, v)]
    yield Operation("(SDPA, no sizes)", lambda: F.scaled_dot_product_attention(*heads), attention, 4 * N * token)
    both = partial(kernels.attend_match, q, k, v, log_size, None, None, H, r, 1)
    yield Operation("attend + match", both, attention, 4 * N * token)
    yield Operation("metric", lambda: kernels.metric(k, H), 0, N * token + metric.numel() * 4)
    yield Operation("match", lambda: kernels.match(metric, r, 1), 0, metric.numel() * 4)
    yield Operation("proj, added", lambda: kernels.accumulate(y, x, proj.weight), *product(N, C, C, read=C))
    merge = partial(kernels.merge_add_norm, groups, x, None, size, None, offset, norm)
    yield Operation("merge_norm", merge, 0, (N + 2 * M) * token)
    yield Operation("norm", lambda: kernels.norm(merged, offset, norm), 0, 2 * M * token)
    yield Operation("add_norm", lambda: kernels.add_norm(x, y, None, None, norm), 0, 4 * N * token)
    yield Operation(
        "fc1 + gelu", lambda: kernels.linear_gelu(merged, fc1.weight, fc1.bias, False), *product(M, C, hidden)
    )
    yield Operation(
        "fc2, added", lambda: kernels.accumulate(residual, wide, fc2.weight), *product(M, hidden, C, read=C)
    )
    if dtype == torch.float32 or kernels.missing_on(device):
        return
    a8, wide8, qkv8, fc18, fc28 = (
        t.detach().to(kernels.FLOAT8) for t in (merged, wide, block.attn.qkv.weight, fc1.weight, fc2.weight)
    )
    one = torch.ones((), device=device)
    linear8 = partial(kernels.linear8, x.to(kernels.FLOAT8), qkv8, block.attn.qkv.bias, (one, one), dtype)
    yield Operation("qkv, float8", linear8, product(N, C, 3 * C)[0] / 2, (N * (C + 6 * C) * B + 3 * C * C))
    gelu8 = partial(kernels.linear_gelu8, a8, fc18, fc1.bias, 1.0, 1.0)
    yield Operation("fc1 + gelu, float8", gelu8, product(M, C, hidden)[0] / 2, B * M * (C + hidden) + C * hidden)
    added8 = partial(kernels.accumulate8, residual, wide8, fc28, None, None, 1e-3)
    yield Operation("fc2, added, float8", added8, product(M, hidden, C)[0] / 2, B * M * (hidden + 4 * C) + C * hidden)


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Floating-point operations and bytes a second, of a large product and of a large copy."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(1 << 30, device=device, dtype=torch.int32)
    target = torch.empty_like(source)
    copied = 2 * source.numel() * source.itemsize
    return 2 * 8192**3 / seconds(lambda: a @ b), copied / seconds(lambda: target.copy_(source))


@torch.inference_mode()
def seconds(call: Callable[[], Any]) -> float:
    """Median time of one call."""

    def repeated() -> torch.Tensor:
        for _ in range(REPETITIONS):
            call()
        return torch.empty(0)

    replay = CudaRecorder()(repeated).replay
    return statistics.median(timed(replay, torch.device("cuda")) for _ in range(10)) / REPETITIONS


if __name__ == "__main__":
    main()
