"""Draws the scene of explain.png: a balloon over hills and a lake, the same pixels each time.

    python docs/images/scene.py scene.png
    tome-server explain scene.png --r 13 -o docs/images/explain.png --model vit_tiny_patch16_224

It needs numpy, which torchvision brings. Lengths are shares of the picture's side, from its top left corner.
"""

from __future__ import annotations

import sys

import numpy as np
from PIL import Image

SIDE, SUPERSAMPLING = 448, 3
N = SIDE * SUPERSAMPLING
LAKE, SHORE = 0.72, 0.87  # where the water begins and ends
random = np.random.default_rng(7)
y, x = (np.mgrid[:N, :N] + 0.5) / N


def colour(text: str) -> np.ndarray:
    """`#rrggbb` as three numbers from 0 to 1."""
    return np.array([int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)])


def mix(a: np.ndarray, b: np.ndarray, share: np.ndarray) -> np.ndarray:
    """From a to b, pixel by pixel."""
    share = np.clip(share, 0, 1)[..., None]
    return a * (1 - share) + b * share


def gradient(at: np.ndarray, *stops: tuple[float, str]) -> np.ndarray:
    """Colours interpolated between stops along `at`."""
    places, colours = [place for place, _ in stops], np.array([colour(text) for _, text in stops])
    return np.stack([np.interp(at, places, colours[:, channel]) for channel in range(3)], axis=-1)


def noise(rows: float, columns: float, octaves: int) -> np.ndarray:
    """Smooth noise of mean 0, about 1 high, with so many bumps down and across in its coarsest octave."""
    total = np.zeros((N, N))
    for octave in range(octaves):
        shape = (int(rows * 2**octave) + 2, int(columns * 2**octave) + 2)
        coarse = Image.fromarray(random.uniform(-1, 1, shape).astype(np.float32))
        total += np.asarray(coarse.resize((N, N), Image.Resampling.BICUBIC)) / 2**octave
    return total


def inside(distance: np.ndarray, softness: float = 1 / N) -> np.ndarray:
    """1 where the distance is negative, 0 where it is positive, smooth over `softness`."""
    return np.clip(0.5 - distance / softness, 0, 1)


def sky() -> np.ndarray:
    picture = gradient(y, (0, "#2f6db5"), (0.35, "#7fb2df"), (0.6, "#f3dcc0"), (0.7, "#f9c98f"))
    glow = np.exp(-(((x - 0.14) ** 2 + (y - 0.5) ** 2) / 0.035))
    picture = mix(picture, colour("#fff1cf"), 0.85 * glow)
    picture = mix(picture, colour("#fffbe8"), inside(np.hypot(x - 0.14, y - 0.5) - 0.04, 0.006))
    cloud = noise(7, 3, 6) - 0.25 - 6 * np.abs(y - 0.2)
    return mix(picture, colour("#fffaf2"), 0.8 * np.clip(1.3 * cloud, 0, 1))


def ridge(
    picture: np.ndarray, top: float, height: float, bumps: float, shade: str, haze: str, grain: float
) -> np.ndarray:
    """Hills whose ridge lies about `top`; they fade into haze downwards, and carry grain as trees do."""
    line = top - height * noise(1, bumps, 7)[N // 2]
    slope = np.clip((y - line) / 0.14, 0, 1)
    hill = mix(np.broadcast_to(colour(shade), (N, N, 3)), colour(haze), slope)
    hill = hill * (1 + grain * noise(90, 60, 3))[..., None]
    return mix(picture, hill, inside(line - y))


def balloon(picture: np.ndarray, left: float, top: float, size: float, stripes: list[str], haze: float) -> np.ndarray:
    """A hot-air balloon, `size` high with its basket; the light comes from the left."""
    v = (y - top) / (0.78 * size)  # 0 at the crown, 1 at the mouth
    u = x - left
    bulge = np.sqrt(np.clip(1 - ((v - 0.42) / 0.42) ** 2, 0, 1))
    taper = np.interp(v, [0.42, 0.6, 0.8, 1.0], [1.0, 0.9, 0.56, 0.2])
    radius = 0.36 * size * np.where(v < 0.42, bulge, taper) + 1e-9
    angle = np.arcsin(np.clip(u / radius, -1, 1))
    gores = np.array([colour(text) for text in stripes])
    number = np.floor((angle / np.pi + 0.5) * 12).astype(int)
    envelope = gores[number % len(gores)]
    band = (np.abs(v - 0.5) < 0.06) & (number % 2 == 0)
    envelope = np.where(band[..., None], colour("#fdf6e3"), envelope)
    light = 0.62 + 0.42 * np.cos(angle + 0.75) + 0.12 * (0.4 - v)
    seam = np.abs((angle / np.pi + 0.5) * 12 % 1 - 0.5) > 0.47
    envelope = np.clip(envelope * (light * np.where(seam, 0.85, 1))[..., None], 0, 1)
    shape = inside(np.abs(u) - radius) * ((v > 0) & (v < 1))

    w = (y - top) / size
    for side in (-1, 1):
        rope = np.abs(u - side * (0.07 - 0.12 * (w - 0.78)) * size) - 0.004 * size
        picture = mix(picture, colour("#4a3a2c"), inside(rope) * ((w > 0.77) & (w < 0.9)))
    weave = 0.85 + 0.15 * np.sign(np.sin(x * 900) * np.sin(y * 900))
    basket = inside(np.maximum(np.abs(u) - 0.06 * size, np.abs(w - 0.945) * size - 0.05 * size))
    picture = mix(picture, np.clip(colour("#8a5a33") * weave[..., None], 0, 1), basket)
    return mix(picture, mix(envelope, colour("#cfdcea"), np.full((N, N), haze)), shape)


def water(picture: np.ndarray) -> np.ndarray:
    """Mirrors what stands above the lake, in ripples that grow towards the shore."""
    depth = np.clip((y - LAKE) / (SHORE - LAKE), 0, 1)
    ripple = noise(160, 5, 2) * 0.012 * (0.2 + depth)
    rows = np.clip(((LAKE - (y - LAKE) * 1.6 + ripple) * N), 0, N - 1).astype(int)
    mirrored = picture[rows, np.arange(N)[None, :]] * 0.82 + colour("#3d6f96") * 0.14
    glitter = np.exp(-(((x - 0.14) / 0.05) ** 2)) * np.clip(noise(200, 12, 2) - 0.1, 0, 1)
    return mix(picture, mix(mirrored, colour("#fff3d6"), glitter), inside(LAKE - y))


def meadow(picture: np.ndarray) -> np.ndarray:
    edge = SHORE - 0.05 * (x - 0.4) + 0.012 * noise(1, 6, 6)[N // 2]
    grass = gradient(y, (0.84, "#8fae4b"), (1.0, "#3f6b2a")) * (1 + 0.16 * noise(40, 120, 4))[..., None]
    flower = noise(120, 120, 1)
    grass = mix(grass, colour("#f2d24b"), 6 * (flower - 0.93))
    grass = mix(grass, colour("#d8574b"), 6 * (-flower - 0.97))
    return mix(picture, grass, inside(edge - y, 0.004))


def scene() -> Image.Image:
    """The whole picture, SIDE x SIDE pixels."""
    picture = sky()
    picture = ridge(picture, 0.56, 0.045, 3, "#7f93b5", "#c3c7d3", 0.0)
    picture = ridge(picture, 0.62, 0.04, 4, "#5f7f86", "#a9bcae", 0.03)
    picture = ridge(picture, 0.67, 0.022, 5, "#3f6a45", "#6f9556", 0.16)
    picture = meadow(water(picture))
    picture = balloon(picture, 0.86, 0.3, 0.17, ["#2f7f86", "#f0e2b6"], 0.25)
    picture = balloon(picture, 0.5, 0.06, 0.52, ["#d63a2f", "#f4a72c", "#2c5fa8"], 0.0)
    grained = np.clip(picture + random.normal(0, 0.012, (N, N, 1)), 0, 1)
    return Image.fromarray((255 * grained).round().astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    scene().save(sys.argv[1])
