"""KServe's own client in a process of its own: its messages and those of Triton's client cannot be in one process.

It asks a server, by REST and by gRPC, and prints what came as JSON. Run with the model's name, the URL, the address of
gRPC and a file with a photo.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from kserve import (
    InferenceGRPCClient,
    InferenceRESTClient,
    InferInput,
    InferOutput,
    InferRequest,
    RESTConfig,
)
from kserve.protocol.infer_type import RequestedOutput


def request(model: str, *inputs: InferInput, **options: Any) -> InferRequest:
    return InferRequest(model_name=model, infer_inputs=list(inputs), **options)


def file(photo: bytes) -> InferInput:
    tensor = InferInput("image", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([photo], dtype=np.object_), binary_data=True)
    return tensor


def text(photo: bytes) -> InferInput:
    return InferInput("image", [1], "BYTES", data=[base64.b64encode(photo).decode()])


def shape(output: InferOutput) -> list[Any]:
    return [output.name, *np.asarray(output.as_numpy()).shape]


async def by_rest(model: str, url: str, photo: bytes) -> dict[str, Any]:
    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    found: dict[str, Any] = {
        "live": await client.is_server_live(url),
        "ready": await client.is_server_ready(url),
        "model": await client.is_model_ready(url, model),
        "other": await client.is_model_ready(url, "none"),
    }
    top = RequestedOutput("probabilities", {"classification": 3, "binary_data": True})
    for name, asked in {
        "binary": request(model, file(photo), parameters={"r": 8, "binary_data_output": True}),
        "json": request(model, text(photo), parameters={"r": 8}),
        "top": request(model, file(photo), request_outputs=[top, RequestedOutput("embedding", {})]),
    }.items():
        answer = await client.infer(url, asked, model_name=model, headers={} if name != "top" else {"x-r": "8"})
        found[name] = [shape(output) for output in answer.outputs]
        found[f"{name} best"] = [str(each) for each in np.ravel(answer.outputs[0].as_numpy())[:1]]
        found[f"{name} r"] = answer.parameters["r"]
    try:
        await client.infer(url, request(model, text(photo), parameters={"q": 1}), model_name=model)
    except Exception as error:
        found["error"] = str(error)
    await client.close()
    return found


async def by_grpc(model: str, address: str, photo: bytes) -> dict[str, Any]:
    client = InferenceGRPCClient(address)
    found: dict[str, Any] = {
        "live": await client.is_server_live(),
        "ready": await client.is_server_ready(),
        "model": await client.is_model_ready(model),
    }
    for name, tensor in {"raw": file(photo), "contents": text(photo)}.items():
        answer = await client.infer(request(model, tensor, parameters={"r": 8}))
        found[name] = [shape(output) for output in answer.outputs]
        found[f"{name} best"] = int(np.argmax(answer.outputs[0].as_numpy()))
        found[f"{name} r"] = answer.parameters["r"]
    answer = await client.infer(request(model, file(photo)), headers=[("x-r", "8")])
    found["header r"] = answer.parameters["r"]
    try:
        await client.infer(request(model, file(photo), parameters={"r": 10**6}))
    except Exception as error:
        found["error"] = str(error)
    await client.close()
    return found


async def main(model: str, url: str, address: str, path: str) -> None:
    photo = Path(path).read_bytes()
    found = {"rest": await by_rest(model, url, photo), "grpc": await by_grpc(model, address, photo)}
    print(json.dumps(found, default=str))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
