"""A small cohort of synthetic cells with a planted truth: groups, patients and their cell composition.

The plan is a pure function of its seed; writing it is resumable. No torch here: the pictures are ready before it is
loaded. `cells` draws them.
"""

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image

from cytosae_cache.storage.atomic import make_folder, write_file
from cytosae_pipeline.demo.cells import CELL_CLASSES, GENERATOR_VERSION, Stain, make_cell, make_stain
from cytosae_pipeline.workspace.csv_files import to_csv

__all__ = [
    "CELL_CLASSES",
    "GROUPS",
    "SCANNERS",
    "CohortPlan",
    "SyntheticCell",
    "make_cell",
    "make_cohort_cell",
    "plan_cohort",
    "write_cohort",
]

GROUPS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        name: MappingProxyType(dict(zip(CELL_CLASSES, shares, strict=True)))
        for name, shares in {
            "healthy": (0.52, 0.28, 0.09, 0.06, 0.03, 0.02),
            "AML-like": (0.20, 0.18, 0.12, 0.03, 0.02, 0.45),
            "CML-like": (0.44, 0.08, 0.08, 0.15, 0.17, 0.08),
        }.items()
    }
)
"""The planted truth: mean share of each cell class in each group's patients."""

SCANNERS: Mapping[str, Stain] = MappingProxyType(
    {"scanner-1": Stain(), "scanner-2": Stain(depth=(0.72, 1.1, 1.35), light=(1.0, 0.96, 0.9))}
)
"""The planted confounder: what each scanner does to colours, after the slide's own stain."""

_SECOND_SCANNER: Mapping[str, int] = MappingProxyType({"healthy": 3, "AML-like": 8, "CML-like": 6})
"""How many of twelve patients of each group the second scanner scans: groups and scanners go together in part."""


@dataclass(frozen=True)
class SyntheticCell:
    """One planned image."""

    path: str
    """POSIX, relative to the cohort's folder; its parent folder is the label."""
    label: str
    patient: str
    group: str
    seed: tuple[int, int, int]
    """Cohort seed, patient index, cell index: all that the pixels depend on, besides the size and the scanner."""
    scanner: str = ""
    """The scanner; '' where all are alike."""


@dataclass(frozen=True)
class CohortPlan:
    """Plan of a cohort; `make_cells` lists its cells."""

    seed: int
    n_patients_per_group: int = 12
    n_cells_per_patient: int = 20
    groups: Mapping[str, Mapping[str, float]] = field(default_factory=lambda: GROUPS)
    """Group -> mean share of each cell class."""
    concentration: float = 14.0
    """Of the Dirichlet that draws a patient's shares around the group's: larger means patients more alike."""
    scanners: bool = False
    """Whether patients are scanned by `SCANNERS`, unevenly over the groups."""

    def __post_init__(self) -> None:
        if self.seed < 0 or self.n_patients_per_group < 1 or self.n_cells_per_patient < 1 or self.concentration <= 0:
            raise ValueError(f"a cohort needs seed >= 0 and positive numbers, found {self}")
        for group, shares in self.groups.items():
            if set(shares) != set(CELL_CLASSES) or min(shares.values()) <= 0 or abs(sum(shares.values()) - 1) > 1e-6:
                raise ValueError(
                    f"group {group!r} has shares {dict(shares)}; expected a positive share for each of "
                    f"{', '.join(CELL_CLASSES)}, adding up to 1"
                )

    def make_cells(self) -> list[SyntheticCell]:
        """List every cell; patients take the groups in turn, so that a larger cohort extends a smaller one."""
        names = tuple(self.groups)
        return [
            cell
            for patient in range(self.n_patients_per_group * len(names))
            for cell in self._make_patient(patient, names[patient % len(names)])
        ]

    def _make_patient(self, patient: int, group: str) -> list[SyntheticCell]:
        mean = np.array([self.groups[group][name] for name in CELL_CLASSES])
        shares = _make_rng((self.seed, patient), "shares").dirichlet(mean * self.concentration)
        scanner = ""
        if self.scanners:
            place = 5 * (patient // len(self.groups)) % 12
            scanner = list(SCANNERS)[place < _SECOND_SCANNER.get(group, 6)]
        cells = []
        for index in range(self.n_cells_per_patient):
            seed = (self.seed, patient, index)
            label = CELL_CLASSES[int(_make_rng(seed, "class").choice(len(CELL_CLASSES), p=shares))]
            name = f"P{patient:03d}"
            cells.append(SyntheticCell(f"images/{label}/{name}_{index:04d}.jpg", label, name, group, seed, scanner))
        return cells


def plan_cohort(
    *, seed: int, n_patients_per_group: int = 12, cells_per_patient: int = 20, scanners: bool = False
) -> list[SyntheticCell]:
    """Plan the demonstration cohort: three groups whose patients differ in cell composition, and overlap."""
    return CohortPlan(seed, n_patients_per_group, cells_per_patient, scanners=scanners).make_cells()


def make_cohort_cell(cell: SyntheticCell, *, size: int = 224) -> Image.Image:
    """Draw a planned cell with its patient's stain."""
    stain = make_stain(_make_rng(cell.seed[:2], "stain"))
    if cell.scanner:
        stain = stain.seen_by(SCANNERS[cell.scanner])
    return make_cell(cell.label, _make_rng(cell.seed, "pixels"), size=size, stain=stain)


def write_cohort(
    folder: Path,
    cells: Sequence[SyntheticCell],
    *,
    size: int = 224,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the planned images as JPEG, `manifest.csv`, and the planted truth in `patients.csv`.

    Where there are scanners, `covariates.csv` has each patient's scanner, and an age that has to do with nothing.

    Images that exist and are correct, by the tag and the SHA-256 in their comment, are not written again.

    Args:
        folder: Created if missing; paths in the manifest are relative to it.
        cells: The plan.
        size: Side of the images in pixels.
        on_progress: Called with images done and images planned after each.

    Returns:
        The manifest's path: columns path, label, patient.
    """
    for n_done, cell in enumerate(cells, start=1):
        path = folder / cell.path
        look = f"{cell.label} seed {cell.seed} {f'{cell.scanner} ' if cell.scanner else ''}size {size}"
        tag = f"cytosae synthetic v{GENERATOR_VERSION} {look} sha256 ".encode()
        if not _is_right(path, tag):
            make_folder(path.parent)
            write_file(path, _encode(make_cohort_cell(cell, size=size), tag), durable=False)
        if on_progress is not None:
            on_progress(n_done, len(cells))
    patients = {cell.patient: cell.group for cell in cells}
    make_folder(folder)
    write_file(folder / "patients.csv", to_csv(("patient", "group"), patients.items()), durable=False)
    scanners = {cell.patient: (cell.scanner, cell.seed[:2]) for cell in cells if cell.scanner}
    if scanners:
        ages = {name: int(_make_rng(seed, "age").integers(20, 85)) for name, (_, seed) in scanners.items()}
        known = [(name, scanner, str(ages[name])) for name, (scanner, _) in scanners.items()]
        write_file(folder / "covariates.csv", to_csv(("patient", "scanner", "age"), known), durable=False)
    rows = [(cell.path, cell.label, cell.patient) for cell in cells]
    manifest = folder / "manifest.csv"
    write_file(manifest, to_csv(("path", "label", "patient"), rows), durable=False)
    return manifest


def _make_rng(seed: Sequence[int], purpose: str) -> np.random.Generator:
    """An independent stream for each purpose."""
    return np.random.default_rng([*seed, len(seed), int.from_bytes(purpose.encode(), "big")])


def _encode(picture: Image.Image, tag: bytes) -> bytes:
    """JPEG whose first segment is a comment: the tag, then the SHA-256 of all that follows it."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=92, subsampling=0)
    rest = buffer.getvalue()[2:]
    comment = tag + hashlib.sha256(rest).hexdigest().encode()
    return b"\xff\xd8\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + rest


def _is_right(path: Path, tag: bytes) -> bool:
    """Whether a file was made by `_encode` with this tag and is undamaged."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return False
    stop = 6 + len(tag) + 64
    return data[6:stop] == tag + hashlib.sha256(data[stop:]).hexdigest().encode()
