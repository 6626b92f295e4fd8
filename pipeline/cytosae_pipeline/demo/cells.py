"""Synthetic pictures of white blood cells: a pure function of class, random state and size.

Numpy and Pillow only. Lengths are in units of 1/224 of the frame's side, so that the same random state draws the same
cell at every size. The pictures imitate a Giemsa-stained smear well enough to try the tool; nothing about real cells
can be learned from them.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

Plane = npt.NDArray[np.float32]
Colour = tuple[float, float, float]

GENERATOR_VERSION = 1
"""Raised whenever the same seed gives other pixels; files of another version are drawn again."""

FRAME = 224.0
"""Side of the frame in drawing units."""

REGIONS: tuple[str, ...] = ("background", "red cell", "cytoplasm", "nucleus", "granule")
"""Meaning of the values of a region map."""

BACKGROUND: Colour = (238, 228, 230)
RED_CELL: Colour = (221, 172, 168)


class Granules(NamedTuple):
    """Small round spots inside a cell."""

    n: tuple[int, int]
    radius: tuple[float, float]
    colour: Colour
    strength: float
    over_nucleus: bool = False


@dataclass(frozen=True)
class CellLook:
    """How one class of white cells is drawn: ranges in frame units, colours in RGB 0-255."""

    radius: tuple[float, float]
    cytoplasm: Colour
    nucleus: Colour
    shape: Literal["lobes", "round", "kidney"]
    n_lobes: tuple[int, ...] = ()
    """Numbers of lobes to choose among, with repetition for weight."""
    nucleus_share: tuple[float, float] = (0.8, 0.88)
    """Radius of a round nucleus as a share of the cell's."""
    rim: float = 0.0
    """How much darker the cytoplasm is towards the cell's border."""
    chromatin: tuple[float, float] = (5.0, 0.12)
    """Grain of the chromatin in units, and its contrast."""
    nucleoli: tuple[int, int] = (0, 0)
    vacuoles: tuple[int, int] = (0, 0)
    granules: Granules | None = None


CELL_LOOKS: Mapping[str, CellLook] = MappingProxyType(
    {
        "neutrophil": CellLook(
            (52, 62), (232, 205, 212), (104, 58, 140), "lobes", (2, 3, 3, 3, 4, 4, 5), chromatin=(6, 0.16),
            granules=Granules((120, 200), (0.7, 1.3), (186, 138, 178), 0.55),
        ),
        "lymphocyte": CellLook(
            (38, 50), (158, 186, 226), (92, 52, 128), "round", nucleus_share=(0.8, 0.9), rim=0.10, chromatin=(8, 0.2),
        ),
        "monocyte": CellLook(
            (64, 77), (186, 186, 206), (136, 96, 166), "kidney", chromatin=(4.5, 0.15), vacuoles=(0, 7),
            granules=Granules((20, 60), (0.6, 1.1), (160, 110, 160), 0.45),
        ),
        "eosinophil": CellLook(
            (54, 64), (236, 190, 182), (108, 64, 142), "lobes", (2, 2, 2, 3), chromatin=(6, 0.15),
            granules=Granules((170, 260), (2.0, 3.0), (222, 112, 82), 0.85),
        ),
        "basophil": CellLook(
            (48, 58), (214, 190, 218), (132, 92, 164), "lobes", (2, 2, 3), chromatin=(7, 0.12),
            granules=Granules((45, 95), (2.0, 4.2), (62, 30, 98), 0.9, over_nucleus=True),
        ),
        "blast": CellLook(
            (50, 68), (142, 164, 214), (146, 92, 168), "round", nucleus_share=(0.79, 0.9), rim=0.14,
            chromatin=(2.6, 0.07), nucleoli=(1, 4),
        ),
    }
)  # fmt: skip

CELL_CLASSES: tuple[str, ...] = tuple(CELL_LOOKS)


@dataclass(frozen=True)
class Stain:
    """What the slide and the lamp of one patient do to every cell."""

    depth: Colour = (1.0, 1.0, 1.0)
    """Exponent of the transmitted light per channel: above 1 stains darker."""
    light: Colour = (1.0, 1.0, 1.0)
    slope: tuple[float, float] = (0.0, 0.0)
    """Relative change of the light from the centre to the right and the lower border."""

    def seen_by(self, other: "Stain") -> "Stain":
        """The same slide under another lamp and sensor: both change every channel."""
        depth = np.array(self.depth) * other.depth
        light = np.array(self.light) * other.light
        return Stain(_triple(depth), _triple(light), self.slope)


def make_stain(rng: np.random.Generator) -> Stain:
    """Draw one patient's stain and illumination."""
    depth = np.exp(rng.normal(0.0, 0.12) + rng.normal(0.0, 0.045, 3))
    light = rng.uniform(0.93, 1.03) * np.exp(rng.normal(0.0, 0.01, 3))
    slope = rng.normal(0.0, 0.02, 2)
    return Stain(_triple(depth), _triple(light), (float(slope[0]), float(slope[1])))


def make_cell(cell_class: str, rng: np.random.Generator, *, size: int = 224, stain: Stain | None = None) -> Image.Image:
    """Draw one stained white cell among red cells, as an RGB image of `size` pixels a side.

    Args:
        cell_class: One of `CELL_CLASSES`.
        rng: Source of all variation; the same state draws the same pixels.
        size: Side in pixels.
        stain: The slide's stain; drawn from `rng` where none is given.

    Raises:
        ValueError: If the class is unknown or the size below 16.
    """
    return make_cell_with_regions(cell_class, rng, size=size, stain=stain)[0]


def make_cell_with_regions(
    cell_class: str, rng: np.random.Generator, *, size: int = 224, stain: Stain | None = None
) -> tuple[Image.Image, npt.NDArray[np.uint8]]:
    """Draw one cell as `make_cell` does, with the map (size, size) of which region each pixel shows (see `REGIONS`)."""
    if cell_class not in CELL_LOOKS:
        raise ValueError(f"cell class {cell_class!r} is unknown; known are {', '.join(CELL_CLASSES)}")
    if size < 16:
        raise ValueError(f"size is {size} pixels; expected at least 16")
    look = CELL_LOOKS[cell_class]
    stain = make_stain(rng) if stain is None else stain
    canvas = _Canvas.make(size, rng)
    radius = rng.uniform(*look.radius)
    x, y = FRAME / 2 + rng.normal(0.0, 5.0, 2).clip(-12, 12)
    _draw_red_cells(canvas, rng, keep_out=(x, y, radius))
    _draw_white_cell(canvas, look, rng, x, y, radius)
    return _develop(canvas, stain, rng), canvas.regions


@dataclass(frozen=True)
class _Canvas:
    """Planar picture (3, h, w), region map and warped coordinates; windows are views into them."""

    rgb: Plane
    regions: npt.NDArray[np.uint8]
    x: Plane
    y: Plane
    left: int
    top: int
    scale: float
    """Pixels per unit."""

    @classmethod
    def make(cls, size: int, rng: np.random.Generator) -> "_Canvas":
        """Empty background; circles drawn in its warped coordinates come out irregular, without computing an angle."""
        axis = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(FRAME / size)
        x, y = (np.ascontiguousarray(grid) for grid in np.broadcast_arrays(axis[None, :], axis[:, None]))
        rgb = np.empty((3, size, size), dtype=np.float32)
        blank = cls(rgb, np.zeros((size, size), dtype=np.uint8), x, y, 0, 0, size / FRAME)
        for grid in (x, y):
            grid += blank.noise(rng, 48) * np.float32(3.2) + blank.noise(rng, 18) * np.float32(1.1)
        rgb[:] = _column(BACKGROUND) + blank.noise(rng, 40) * np.float32(1.5)
        return blank

    def window(self, x: float, y: float, radius: float) -> "_Canvas":
        """The part of a whole canvas that a disc reaches, with room for the warp and the edge."""
        size, reach = self.regions.shape[0], radius + 14.0
        top, bottom, left, right = (
            min(size, max(0, int(value * self.scale))) for value in (y - reach, y + reach, x - reach, x + reach)
        )
        box = (slice(top, bottom), slice(left, right))
        return _Canvas(self.rgb[:, *box], self.regions[box], self.x[box], self.y[box], left, top, self.scale)

    def noise(self, rng: np.random.Generator, grain: float) -> Plane:
        """Smooth noise (h, w) of about unit variance, blobs `grain` units wide; always draws the same amount."""
        n = int(FRAME / grain) + 4
        coarse = Image.fromarray(rng.standard_normal((n, n), dtype=np.float32) * np.float32(1.4))
        height, width = self.regions.shape
        step = grain * self.scale
        box = (
            1 + self.left / step,
            1 + self.top / step,
            1 + (self.left + width) / step,
            1 + (self.top + height) / step,
        )
        return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC, box=box))

    def cover(self, distance: Plane, softness: float = 1.6) -> Plane:
        """Share of each pixel inside an outline, from its signed distance in units (negative inside)."""
        width = max(softness, 1 / self.scale)  # never sharper than a pixel
        cover: Plane = np.clip(np.float32(0.5) - distance * np.float32(1 / width), 0, 1)
        return cover

    def paint(self, cover: Plane, colour: Plane, region: int | None = None) -> None:
        """Lay a colour (3, 1, 1) or (3, h, w) over the picture where `cover` says."""
        self.rgb[:] += cover * (colour - self.rgb)
        if region is not None:
            self.regions[cover > 0.5] = region

    def ellipse(self, x: float, y: float, a: float, b: float, angle: float = 0.0) -> Plane:
        """Signed distance, nearly, to an ellipse of half axes `a` (along `angle`) and `b`."""
        dx, dy = self.x - np.float32(x), self.y - np.float32(y)
        cos, sin = float(np.cos(angle)), float(np.sin(angle))
        u, v = dx * np.float32(cos / a) + dy * np.float32(sin / a), dy * np.float32(cos / b) - dx * np.float32(sin / b)
        distance: Plane = (np.sqrt(u * u + v * v) - np.float32(1)) * np.float32(min(a, b))
        return distance

    def strand(self, start: npt.NDArray[np.float64], stop: npt.NDArray[np.float64], thickness: float) -> Plane:
        """Signed distance to the thick line between two points."""
        (x, y), (ux, uy) = start.astype(np.float32), (stop - start).astype(np.float32)
        dx, dy = self.x - x, self.y - y
        along = np.clip((dx * ux + dy * uy) / (ux * ux + uy * uy + np.float32(1e-6)), 0, 1)
        distance: Plane = np.hypot(dx - along * ux, dy - along * uy) - np.float32(thickness)
        return distance

    def spots(self, centres: npt.NDArray[np.float64], radii: npt.NDArray[np.float64], shades: Sequence[int]) -> Plane:
        """Cover (h, w) of many small discs, drawn three times too large and averaged."""
        height, width = self.regions.shape
        picture = Image.new("L", (3 * width, 3 * height))
        draw = ImageDraw.Draw(picture)
        pixels = 3 * (centres * self.scale - (self.left, self.top))
        boxes = np.hstack([pixels - radii[:, None] * 3 * self.scale, pixels + radii[:, None] * 3 * self.scale])
        for box, shade in zip(boxes.tolist(), shades, strict=True):
            draw.ellipse(box, fill=shade)
        return np.asarray(picture.reduce(3), dtype=np.float32) / np.float32(255)


def _triple(values: npt.NDArray[np.float64]) -> Colour:
    red, green, blue = values.tolist()
    return red, green, blue


def _column(colour: Colour | npt.NDArray[np.float64]) -> Plane:
    return np.asarray(colour, dtype=np.float32).reshape(3, 1, 1)


def _jitter(colour: Colour, rng: np.random.Generator, spread: float) -> Plane:
    return _column(np.asarray(colour) + rng.normal(0.0, spread, 3) + rng.normal(0.0, spread))


def _join(outlines: Sequence[Plane], blend: float) -> Plane:
    """Signed distance to the union of outlines, the corners between them filled over `blend` units."""

    def join(first: Plane, second: Plane) -> Plane:
        gap = np.clip(np.float32(blend) - np.abs(first - second), 0, None)
        joined: Plane = np.minimum(first, second) - gap * gap * np.float32(0.25 / blend)
        return joined

    return functools.reduce(join, outlines)


def _draw_red_cells(canvas: _Canvas, rng: np.random.Generator, keep_out: tuple[float, float, float]) -> None:
    """Scatter red cells around the white one, many of them cut by the frame."""
    placed = [keep_out]
    n_wanted = int(rng.integers(4, 10))
    for _ in range(40):
        radius = float(rng.uniform(27, 34))
        x, y = rng.uniform(-0.6 * radius, FRAME + 0.6 * radius, 2).tolist()
        if len(placed) <= n_wanted and all(np.hypot(x - px, y - py) > 0.94 * (radius + pr) for px, py, pr in placed):
            placed.append((x, y, radius))
    for x, y, radius in placed[1:]:
        part = canvas.window(x, y, radius)
        colour, pallor = _jitter(RED_CELL, rng, 3.0), np.float32(rng.uniform(0.35, 0.75))
        distance = part.ellipse(x, y, radius, radius * rng.uniform(0.86, 1.0), rng.uniform(0, np.pi))
        pale = np.clip(distance * np.float32(-1.35 / radius), 0, 1) ** 2 * pallor
        part.paint(part.cover(distance) * np.float32(0.92), colour + pale * (_column(BACKGROUND) - colour), 1)


def _draw_white_cell(
    canvas: _Canvas, look: CellLook, rng: np.random.Generator, x: float, y: float, radius: float
) -> None:
    """Draw cytoplasm, nucleus and granules of one cell."""
    part = canvas.window(x, y, radius)
    distance = part.ellipse(x, y, radius, radius * rng.uniform(0.9, 1.0), rng.uniform(0, np.pi))
    body = part.cover(distance, 2.2)
    colour = _jitter(look.cytoplasm, rng, 4.0)
    rim = np.float32(look.rim) * np.clip(1 + distance * np.float32(4 / radius), 0, 1)
    shade = np.float32(1) - rim + part.noise(rng, 6) * np.float32(0.018)
    part.paint(body * np.float32(0.96), colour * shade, 2)
    for _ in range(int(rng.integers(look.vacuoles[0], look.vacuoles[1] + 1))):
        (dx, dy), width = rng.normal(0.0, 0.5 * radius, 2), rng.uniform(2.5, 5.0)
        hole = part.cover(part.ellipse(x + dx, y + dy, width, width), 2.5) * body
        part.paint(hole * np.float32(0.6), _column(BACKGROUND))
    nucleus = _draw_nucleus(part, look, rng, np.array([x, y]), radius, body)
    spec = look.granules
    if spec is None:
        return
    n = int(rng.integers(spec.n[0], spec.n[1] + 1))
    angle, reach = rng.uniform(0, 2 * np.pi, n), 0.93 * radius * np.sqrt(rng.uniform(0, 1, n))
    centres = np.array([x, y]) + reach[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    spots = part.spots(centres, rng.uniform(*spec.radius, n), rng.integers(150, 256, n).tolist())
    hidden = np.float32(1) - nucleus * np.float32(0.15 if spec.over_nucleus else 0.93)
    cover = spots * body * hidden
    part.paint(cover * np.float32(spec.strength), _jitter(spec.colour, rng, 4.0))
    part.regions[cover > 0.45] = REGIONS.index("granule") if spec.radius[1] > 1.5 else REGIONS.index("cytoplasm")


def _draw_nucleus(
    part: _Canvas, look: CellLook, rng: np.random.Generator, centre: npt.NDArray[np.float64], radius: float, body: Plane
) -> Plane:
    """Draw the nucleus with its chromatin and nucleoli, and return its cover (h, w)."""
    outline = {"lobes": _lobes, "round": _round, "kidney": _kidney}[look.shape](part, look, rng, centre, radius)
    cover = part.cover(outline, 2.0) * body
    grain, contrast = look.chromatin
    clumps = np.tanh(part.noise(rng, grain) * np.float32(1.5)) + part.noise(rng, 2.2) * np.float32(0.35)
    border = np.clip(np.float32(1) + outline * np.float32(0.25), 0, 1)  # the membrane is darker
    shade = np.float32(1) + clumps * np.float32(contrast) - border * np.float32(0.08)
    part.paint(cover * np.float32(0.97), _jitter(look.nucleus, rng, 5.0) * shade, 3)
    if look.nucleoli[1]:
        pale = _jitter((182, 150, 210), rng, 4.0)
        for _ in range(int(rng.integers(look.nucleoli[0], look.nucleoli[1] + 1))):
            x, y = centre + rng.uniform(-0.42, 0.42, 2) * radius
            spot = part.ellipse(x, y, rng.uniform(5.0, 9.5), rng.uniform(4.5, 8.0), rng.uniform(0, np.pi))
            part.paint(part.cover(spot, 4.0) * cover * np.float32(0.75), pale)
    return cover


def _round(
    part: _Canvas, look: CellLook, rng: np.random.Generator, centre: npt.NDArray[np.float64], radius: float
) -> Plane:
    """One large round nucleus, a little off the centre, sometimes with a shallow cleft."""
    size = radius * rng.uniform(*look.nucleus_share)
    x, y = centre + rng.normal(0.0, 0.35 * (radius - size), 2)
    outline = part.ellipse(x, y, size, size * rng.uniform(0.88, 1.0), rng.uniform(0, np.pi))
    angle, depth = rng.uniform(0, 2 * np.pi), rng.choice([0.0, 0.0, 0.12, 0.2])
    reach, width = size * (1.35 - depth), size * 0.4
    dent = part.ellipse(x + reach * np.cos(angle), y + reach * np.sin(angle), width, width)
    return -_join([-outline, dent], 5)


def _kidney(
    part: _Canvas, look: CellLook, rng: np.random.Generator, centre: npt.NDArray[np.float64], radius: float
) -> Plane:
    """A bean with one deep indentation."""
    angle = rng.uniform(0, 2 * np.pi)
    across = np.array([-np.sin(angle), np.cos(angle)])
    x, y = centre - across * radius * 0.08
    bean = part.ellipse(x, y, radius * rng.uniform(0.7, 0.8), radius * rng.uniform(0.5, 0.6), angle)
    dent = centre + across * radius * rng.uniform(0.42, 0.6)
    width = radius * rng.uniform(0.24, 0.34)
    return -_join([-bean, part.ellipse(dent[0], dent[1], width, width * 1.3, angle)], 8)


def _lobes(
    part: _Canvas, look: CellLook, rng: np.random.Generator, centre: npt.NDArray[np.float64], radius: float
) -> Plane:
    """Two to five lobes on an arc, joined by strands."""
    n = int(rng.choice(look.n_lobes))
    step = {2: 2.5, 3: 1.55, 4: 1.3, 5: 1.12}[n]
    angles = rng.uniform(0, 2 * np.pi) + step * np.arange(n) + rng.normal(0.0, 0.12, n)
    arc = radius * (0.4 + 0.02 * n) * rng.uniform(0.9, 1.08, n)
    centres = centre + arc[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    width = radius * {2: 0.33, 3: 0.28, 4: 0.245, 5: 0.22}[n] * rng.uniform(0.85, 1.12, n)
    outlines = [
        part.ellipse(x, y, w * rng.uniform(1.0, 1.35), w, angle + np.pi / 2)
        for (x, y), w, angle in zip(centres.tolist(), width.tolist(), angles.tolist(), strict=True)
    ]
    thickness = rng.uniform(1.5, 3.5)
    outlines += [part.strand(a, b, thickness) for a, b in itertools.pairwise(centres)]
    return _join(outlines, 5)


def _develop(canvas: _Canvas, stain: Stain, rng: np.random.Generator) -> Image.Image:
    """Turn the painted picture into what the camera saw: stain depth, lamp, focus, grain."""
    size, blur = canvas.regions.shape[0], float(rng.uniform(0.3, 0.9)) * canvas.scale
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    lamp = 1 + ramp[None, :] * np.float32(stain.slope[0]) + ramp[:, None] * np.float32(stain.slope[1])
    rgb = canvas.rgb * lamp
    rgb += rng.standard_normal((size, size), dtype=np.float32) * np.float32(2.0)
    picture = Image.fromarray(np.ascontiguousarray(np.clip(rgb, 0, 255).astype(np.uint8).transpose(1, 2, 0)))
    levels = np.arange(256)[None, :] / 255
    table = 255 * np.asarray(stain.light)[:, None] * levels ** np.asarray(stain.depth)[:, None]
    picture = picture.point(table.clip(0, 255).round().astype(int).ravel().tolist())
    return picture.filter(ImageFilter.GaussianBlur(blur))
