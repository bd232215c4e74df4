"""Draws the photos that the page offers to start with, the same pixels each time.

    python docs/images/samples.py server/static/samples

Lengths are shares of the picture's side, from its top left corner.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from scene import N, colour, gradient, inside, mix, noise, random, x, y

SIDE, QUALITY = 320, 86


def shaded(picture: np.ndarray, shade: str | np.ndarray, shape: np.ndarray) -> np.ndarray:
    """One shape over a picture, of one colour or of a picture's own."""
    return mix(picture, colour(shade) if isinstance(shade, str) else shade, shape)


def box(left: float, top: float, right: float, bottom: float, round_by: float = 0.0) -> np.ndarray:
    """A rectangle, with rounded corners."""
    across = np.abs(x - (left + right) / 2) - (right - left) / 2 + round_by
    down = np.abs(y - (top + bottom) / 2) - (bottom - top) / 2 + round_by
    outside = np.hypot(np.maximum(across, 0), np.maximum(down, 0)) + np.minimum(np.maximum(across, down), 0)
    return inside(outside - round_by)


def ellipse(left: float, top: float, wide: float, high: float, softness: float = 0.004) -> np.ndarray:
    """An ellipse around a centre, with half its width and height."""
    return inside((np.hypot((x - left) / wide, (y - top) / high) - 1) * min(wide, high), softness)


def ball(left: float, top: float, wide: float, high: float, stops: tuple[str, str, str], grain: float) -> np.ndarray:
    """The colours of a round thing lit from the top left, with a rough skin."""
    u, v = (x - left) / wide, (y - top) / high
    light = np.clip(0.62 - 0.34 * u - 0.42 * v + 0.1 * (1 - u**2 - v**2), 0, 1)
    skin = gradient(light, (0.05, stops[2]), (0.55, stops[1]), (1.0, stops[0]))
    return np.clip(skin * (1 + grain * noise(110, 110, 2))[..., None], 0, 1)


def lighthouse() -> np.ndarray:
    picture = gradient(y, (0, "#3f7fc4"), (0.45, "#9cc6ea"), (0.64, "#e7eef2"))
    cloud = noise(6, 3, 6) - 0.35 - 5 * np.abs(y - 0.24)
    picture = mix(picture, colour("#ffffff"), 0.85 * np.clip(1.3 * cloud, 0, 1))
    sea = gradient(y, (0.64, "#5f9bbb"), (0.78, "#2d6b93"), (1.0, "#17445f")) * (1 + 0.1 * noise(150, 14, 3))[..., None]
    picture = mix(picture, sea, inside(0.64 - y, 0.003))
    edge = 0.8 - 0.17 * np.exp(-(((x - 0.6) / 0.34) ** 2)) + 0.02 * noise(1, 14, 6)[N // 2]
    rock = gradient(y, (0.62, "#8b7f70"), (0.8, "#6c6257"), (1.0, "#3d3933")) * (1 + 0.35 * noise(26, 26, 6))[..., None]
    grass = colour("#6f8f42") * (1 + 0.25 * noise(80, 80, 3))[..., None]
    rock = mix(rock, grass, np.clip(1 - (y - edge) / 0.05 + 0.5 * noise(20, 30, 3), 0, 1))
    foam = np.clip(1.6 * noise(60, 24, 4) - 0.3, 0, 1) * np.exp(-((np.abs(y - edge - 0.015) / 0.02) ** 2))
    picture = mix(picture, np.clip(rock, 0, 1), inside(edge - y, 0.004))
    picture = mix(picture, colour("#f4f8fa"), foam * (x < 0.33))

    middle, top, bottom = 0.58, 0.24, 0.68
    half = 0.05 + 0.035 * np.clip((y - top) / (bottom - top), 0, 1)
    tower = inside(np.maximum(np.abs(x - middle) - half, np.abs(y - (top + bottom) / 2) - (bottom - top) / 2))
    turn = np.clip((x - middle) / half, -1, 1)
    band = (np.floor((y - top) / 0.088 + 0.02 * turn) % 2)[..., None]
    paint = np.where(band == 0, colour("#f6f3ec"), colour("#c8322b"))
    picture = shaded(picture, np.clip(paint * (0.95 - 0.32 * turn - 0.22 * turn**2)[..., None], 0, 1), tower)
    for height in (0.37, 0.5, 0.6):
        picture = shaded(picture, "#3a3f4a", box(middle - 0.016, height, middle + 0.006, height + 0.035, 0.008))
    picture = shaded(picture, "#2f3238", box(middle - 0.082, top - 0.012, middle + 0.082, top + 0.01))
    for post in np.linspace(-0.076, 0.076, 9):
        picture = shaded(picture, "#2f3238", box(middle + post - 0.002, top - 0.045, middle + post + 0.002, top))
    picture = shaded(picture, "#2f3238", box(middle - 0.08, top - 0.048, middle + 0.08, top - 0.043))
    glass = gradient(np.abs(x - middle) / 0.04, (0, "#fff9d8"), (0.5, "#ffe48a"), (1.0, "#8fb1bd"))
    picture = shaded(picture, glass, box(middle - 0.04, top - 0.1, middle + 0.04, top - 0.01))
    for bar in (-0.04, -0.014, 0.014, 0.04):
        picture = shaded(picture, "#3b4048", box(middle + bar - 0.0025, top - 0.1, middle + bar + 0.0025, top - 0.01))
    roof = inside(np.maximum(np.abs(x - middle) - 0.055 * (y - top + 0.17) / 0.07, np.abs(y - top + 0.135) - 0.035))
    picture = shaded(
        picture, mix(np.broadcast_to(colour("#b52c27"), (N, N, 3)), colour("#5e1614"), 9 * (x - 0.56)), roof
    )
    return shaded(picture, "#3b4048", box(middle - 0.003, top - 0.205, middle + 0.003, top - 0.16))


def school_bus() -> np.ndarray:
    picture = gradient(y, (0, "#6fa6d8"), (0.5, "#d6e6f0"))
    edge = 0.43 + 0.05 * noise(1, 8, 6)[N // 2]
    trees = gradient(y, (0.3, "#5d8a3c"), (0.62, "#2c4f24")) * (1 + 0.4 * noise(34, 34, 5))[..., None]
    picture = mix(picture, np.clip(trees, 0, 1), inside(edge - y, 0.01))
    verge = colour("#7f9c4d") * (1 + 0.2 * noise(90, 60, 3))[..., None]
    picture = mix(picture, verge, inside(0.63 - y, 0.004))
    road = gradient(y, (0.68, "#85868a"), (1.0, "#5c5d62")) * (1 + 0.07 * noise(140, 140, 2))[..., None]
    picture = mix(picture, road, inside(0.69 - y, 0.003))
    picture = shaded(picture, "#e8e6da", inside(np.abs(y - 0.93 - 0.01 * x) - 0.008) * (np.sin(x * 26) > -0.3))
    picture = mix(picture, colour("#26272b"), 0.75 * ellipse(0.5, 0.805, 0.47, 0.03, 0.03))

    body = gradient(y, (0.28, "#ffd24a"), (0.5, "#f6b514"), (0.76, "#cf8a06"))
    picture = shaded(picture, body, box(0.06, 0.28, 0.78, 0.77, 0.035))
    picture = shaded(picture, body, box(0.72, 0.52, 0.95, 0.77, 0.03))
    picture = shaded(picture, "#ffe189", box(0.09, 0.285, 0.75, 0.3, 0.007))
    for left in np.arange(0.095, 0.6, 0.098):
        pane = gradient(y + 0.35 * (x - left), (0.36, "#d3e6ee"), (0.47, "#31414c"), (0.52, "#50636e"))
        picture = shaded(picture, "#2a2419", box(left - 0.005, 0.355, left + 0.083, 0.5, 0.012))
        picture = shaded(picture, pane, box(left, 0.36, left + 0.078, 0.495, 0.01))
        picture = shaded(picture, "#2a2419", box(left, 0.425, left + 0.078, 0.43))
    picture = shaded(picture, "#2a2419", box(0.683, 0.345, 0.765, 0.51, 0.012))
    picture = shaded(picture, gradient(y, (0.35, "#cfe3ec"), (0.5, "#3b4d58")), box(0.69, 0.352, 0.76, 0.503, 0.01))
    for line in (0.545, 0.6, 0.655):
        picture = shaded(picture, "#231f18", box(0.06, line, 0.93 if line > 0.55 else 0.72, line + 0.012))
    picture = shaded(picture, "#1d1b18", box(0.04, 0.745, 0.965, 0.775, 0.01))
    picture = shaded(picture, "#2a2419", box(0.655, 0.34, 0.66, 0.745))
    letters = box(0.23, 0.318, 0.52, 0.342) * (np.sin(x * 210) + 0.6 * np.sin(x * 97) > -0.2)
    picture = shaded(picture, "#231f18", letters)
    picture = shaded(picture, "#fff7d9", ellipse(0.935, 0.62, 0.016, 0.024))
    picture = shaded(picture, "#d8402c", box(0.075, 0.315, 0.105, 0.335, 0.008))
    for wheel in (0.22, 0.8):
        picture = shaded(picture, "#2b2926", ellipse(wheel, 0.755, 0.092, 0.092))
        picture = shaded(picture, "#17171a", ellipse(wheel, 0.765, 0.078, 0.078))
        picture = shaded(picture, "#b9bcc0", ellipse(wheel, 0.765, 0.04, 0.04))
        picture = shaded(picture, "#e5b52d", ellipse(wheel, 0.765, 0.024, 0.024))
    return picture


def fruit() -> np.ndarray:
    wall = gradient(x + 0.4 * y, (0, "#e9e1d2"), (1.3, "#a79f92")) * (1 + 0.02 * noise(40, 40, 3))[..., None]
    wood = gradient(y, (0.55, "#b98a58"), (1.0, "#8f6237"))
    wood = wood * (1 + 0.13 * noise(70, 3, 4) + 0.04 * noise(160, 60, 2))[..., None]
    picture = mix(np.clip(wall, 0, 1), np.clip(wood, 0, 1), inside(0.5 - y, 0.004))
    orange = ("#ffc766", "#f58a1c", "#9a3f06")
    lemon = ("#fff08a", "#f3cf2b", "#a87a0a")
    fruits = [  # left, top, half width, half height, colours
        (0.66, 0.46, 0.17, 0.165, orange),
        (0.3, 0.56, 0.2, 0.195, orange),
        (0.62, 0.69, 0.215, 0.21, orange),
    ]
    for left, top, wide, high, stops in fruits:
        shadow = ellipse(left + 0.06, top + 0.88 * high, 1.05 * wide, 0.3 * high, 0.06)
        picture = mix(picture, colour("#3a2413"), 0.6 * shadow)
        picture = shaded(picture, ball(left, top, wide, high, stops, 0.05), ellipse(left, top, wide, high))
        shine = ellipse(left - 0.36 * wide, top - 0.46 * high, 0.2 * wide, 0.13 * high, 0.05)
        picture = mix(picture, colour("#fff6e0"), 0.6 * shine)
    picture = shaded(picture, "#5c6b24", ellipse(0.6, 0.55, 0.016, 0.012))
    picture = mix(picture, colour("#3a2413"), 0.5 * ellipse(0.24, 0.87, 0.16, 0.03, 0.05))
    tip = ellipse(0.055, 0.8, 0.03, 0.026) + ellipse(0.35, 0.8, 0.03, 0.026)
    skin = ball(0.2, 0.79, 0.14, 0.1, lemon, 0.06)
    return shaded(picture, skin, np.clip(ellipse(0.2, 0.79, 0.145, 0.095) + tip, 0, 1))


def ladybug() -> np.ndarray:
    far = gradient(y + 0.3 * x, (0, "#b8d987"), (0.7, "#6fa44c"), (1.3, "#2f6130"))
    blur = noise(5, 5, 2)
    picture = np.clip(far * (1 + 0.25 * blur)[..., None], 0, 1)
    u, v = x - 0.5, y - 0.56
    along, across = 0.93 * u - 0.37 * v, 0.37 * u + 0.93 * v
    leaf_edge = np.abs(across) - 0.31 * np.sqrt(np.clip(1 - (along / 0.62) ** 2, 0, 1))
    vein = np.exp(-((across / 0.006) ** 2)) + 0.6 * np.exp(-((np.sin(34 * (along - 0.9 * np.abs(across))) / 0.14) ** 2))
    leaf = gradient(across, (-0.3, "#8fc34f"), (0.0, "#5f9c35"), (0.3, "#3b7527"))
    leaf = np.clip(leaf * (1 + 0.08 * noise(60, 60, 3) + 0.2 * np.clip(vein, 0, 1))[..., None], 0, 1)
    picture = shaded(picture, leaf, inside(leaf_edge, 0.004))
    left, top, size = 0.5, 0.5, 0.21
    picture = mix(picture, colour("#1b3312"), 0.65 * ellipse(left + 0.05, top + 0.14, 1.2 * size, 0.62 * size, 0.08))
    for leg in (-0.13, 0.01, 0.13):
        for side in (-1, 1):
            reach = side * (y - top)
            line = np.abs(x - left - leg - 1.4 * (leg + 0.02) * (reach - 0.15)) - 0.008
            picture = shaded(picture, "#15130f", inside(line) * (reach > 0.1) * (reach < 0.26))
    head = left + 0.94 * size
    picture = shaded(
        picture, ball(head, top, 0.09, 0.1, ("#55534e", "#1b1a18", "#050505"), 0.0), ellipse(head, top, 0.085, 0.105)
    )
    for side in (-1, 1):
        picture = shaded(picture, "#f2eee0", ellipse(head + 0.02, top + side * 0.065, 0.026, 0.022))
        feeler = np.abs(y - top - side * (0.04 + 0.6 * (x - head - 0.06))) - 0.005
        picture = shaded(picture, "#15130f", inside(feeler) * (x > head + 0.05) * (x < head + 0.14))
    shell = ball(left, top, 1.15 * size, size, ("#ff8a5c", "#d92a1c", "#6b0a08"), 0.0)
    picture = shaded(picture, shell, ellipse(left - 0.02, top, 1.15 * size, size))
    picture = shaded(picture, "#1a0605", inside(np.abs(y - top) - 0.004) * (np.abs(x - left + 0.02) < 1.14 * size))
    for at, off, radius in [(0.1, 0.085, 0.036), (-0.05, 0.125, 0.04), (-0.15, 0.055, 0.034), (0.0, 0.045, 0.026)]:
        for side in (-1, 1):
            picture = shaded(picture, "#160908", ellipse(left + at, top + side * off, radius, radius * 0.92))
    return mix(picture, colour("#fff3ea"), 0.7 * ellipse(left - 0.08, top - 0.12, 0.07, 0.028, 0.03))


def photo(picture: np.ndarray) -> Image.Image:
    """With the grain of a sensor."""
    grained = np.clip(picture + random.normal(0, 0.015, (N, N, 1)), 0, 1)
    return Image.fromarray((255 * grained).round().astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    for draw in (lighthouse, school_bus, fruit, ladybug):
        name = draw.__name__.replace("_", "-")
        photo(draw()).save(Path(sys.argv[1]) / f"{name}.jpg", "JPEG", quality=QUALITY, optimize=True)
