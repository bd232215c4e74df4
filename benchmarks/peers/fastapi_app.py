"""A bare FastAPI route that reads the body: the upper bound of any server on FastAPI in one process."""

from __future__ import annotations

import os

import uvicorn
from fastapi import FastAPI, Request

app = FastAPI()


@app.post("/classify")
async def classify(request: Request) -> dict[str, int]:
    return {"bytes": len(await request.body())}


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ.get("PEER_PORT", "8000")), log_level="warning")
