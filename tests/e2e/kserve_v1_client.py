"""KServe's own client by protocol v1, in a process of its own, as `kserve_client.py` is. It prints what came as JSON.

Run with the URL of a server, the model's name and a file with a photo.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from pathlib import Path
from typing import Any

import httpx
from kserve import InferenceRESTClient, RESTConfig


async def ask(url: str, model: str, photo: str) -> dict[str, Any]:
    client = InferenceRESTClient(RESTConfig(protocol="v1"))
    image = base64.b64encode(Path(photo).read_bytes()).decode()
    body = {"instances": [{"b64": image}], "parameters": {"r": 0}}
    told: dict[str, Any] = {
        "live": await client.is_server_live(url),
        "ready": await client.is_model_ready(url, model),
        "answer": await client.infer(url, body, model_name=model),
        "turned": await client.infer(url, {"instances": [image]}, model_name=model, headers={"x-r": "16"}),
        "errors": [],
    }
    for name, wrong in ((model, {**body, "parameters": {"r": 999}}), ("huge", body)):
        try:
            await client.infer(url, wrong, model_name=name)
        except httpx.HTTPStatusError as error:
            told["errors"].append(str(error))
    await client.close()
    return told


if __name__ == "__main__":
    print(json.dumps(asyncio.run(ask(*sys.argv[1:]))))
