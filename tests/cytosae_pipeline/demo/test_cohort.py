import csv
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cytosae_pipeline.demo import cohort as synthetic
from cytosae_pipeline.demo.cells import CELL_CLASSES, REGIONS, Stain, make_cell, make_cell_with_regions
from cytosae_pipeline.demo.cohort import GROUPS, CohortPlan, make_cohort_cell, plan_cohort, write_cohort
from tests.support.patience import patience


def draw(cell_class: str, number: int, size: int = 224) -> Image.Image:
    return make_cell(cell_class, np.random.default_rng([91, CELL_CLASSES.index(cell_class), number]), size=size)


def read_rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("cell_class", CELL_CLASSES)
def test_same_state_same_bytes(cell_class: str) -> None:
    assert draw(cell_class, 0).tobytes() == draw(cell_class, 0).tobytes()
    assert draw(cell_class, 0).tobytes() != draw(cell_class, 1).tobytes()


@pytest.mark.parametrize("size", [16, 37, 96, 224, 300])
def test_every_size_and_mode(size: int) -> None:
    for cell_class in CELL_CLASSES:
        picture = draw(cell_class, 2, size)
        assert picture.size == (size, size)
        assert picture.mode == "RGB"


def test_other_size_shows_the_same_cell() -> None:
    for cell_class in CELL_CLASSES:
        large = np.asarray(draw(cell_class, 3, 448).reduce(4), dtype=float)
        small = np.asarray(draw(cell_class, 3, 224).reduce(2), dtype=float)
        assert np.abs(large - small).mean() < 3


def test_global_random_state_is_left_alone() -> None:
    before = np.random.get_state()[1].copy()
    draw("blast", 0)
    assert (np.random.get_state()[1] == before).all()


def test_regions_match_the_class() -> None:
    shares = {}
    for cell_class in CELL_CLASSES:
        maps = [
            make_cell_with_regions(cell_class, np.random.default_rng([92, number]), size=112)[1] for number in range(8)
        ]
        shares[cell_class] = np.bincount(np.stack(maps).ravel(), minlength=len(REGIONS)) / np.stack(maps).size
    granule, nucleus, cytoplasm = (REGIONS.index(name) for name in ("granule", "nucleus", "cytoplasm"))
    assert {name for name, share in shares.items() if share[granule] > 0} == {"eosinophil", "basophil"}
    for name in ("lymphocyte", "blast"):  # thin rim
        assert shares[name][nucleus] > 1.5 * shares[name][cytoplasm]
    for name in ("neutrophil", "monocyte"):
        assert shares[name][nucleus] < shares[name][cytoplasm]


def test_stain_changes_the_colours_only() -> None:
    pictures = [
        make_cell("monocyte", np.random.default_rng(1), stain=stain)
        for stain in (Stain(), Stain(depth=(1.3, 1.3, 1.3)))
    ]
    plain, deep = (np.asarray(picture, dtype=float) for picture in pictures)
    assert deep.mean() < plain.mean() - 5
    assert np.corrcoef(plain.ravel(), deep.ravel())[0, 1] > 0.98


def test_classes_are_told_apart_by_colour_alone_better_than_by_chance() -> None:
    def describe(picture: Image.Image) -> np.ndarray:
        pixels = np.asarray(picture, dtype=float)[40:184, 40:184].reshape(-1, 3)
        return np.concatenate([np.percentile(pixels, (2, 10, 25, 50, 75), axis=0).ravel(), pixels.std(axis=0)])

    known = np.array([[describe(draw(name, number)) for number in range(10)] for name in CELL_CLASSES])
    asked = np.array([[describe(draw(name, number)) for number in range(10, 20)] for name in CELL_CLASSES])
    spread = known.reshape(-1, known.shape[-1]).std(axis=0)
    distance = (((asked[:, :, None] - known.mean(axis=1)) / spread) ** 2).sum(axis=-1)
    accuracy = (distance.argmin(axis=-1) == np.arange(len(CELL_CLASSES))[:, None]).mean()
    assert accuracy > 3 / len(CELL_CLASSES)


@pytest.mark.parametrize(
    ("cell_class", "size", "message"),
    [("plasma", 224, "'plasma' is unknown.*neutrophil"), ("blast", 15, "at least 16")],
)
def test_refuses_unknown_class_and_tiny_size(cell_class: str, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_cell(cell_class, np.random.default_rng(0), size=size)


def test_plan_has_the_promised_sizes_and_unique_paths() -> None:
    cells = plan_cohort(seed=3)
    assert len(cells) == 3 * 12 * 20
    assert len({cell.path for cell in cells}) == len(cells)
    assert len({cell.seed for cell in cells}) == len(cells)
    groups = {cell.patient: cell.group for cell in cells}
    assert {group: list(groups.values()).count(group) for group in GROUPS} == dict.fromkeys(GROUPS, 12)
    assert all(cell.path.split("/")[1] == cell.label for cell in cells)


def test_larger_cohort_only_adds() -> None:
    small = plan_cohort(seed=4, n_patients_per_group=2, cells_per_patient=5)
    large = plan_cohort(seed=4, n_patients_per_group=6, cells_per_patient=9)
    assert set(small) < set(large)
    assert plan_cohort(seed=5, n_patients_per_group=2, cells_per_patient=5) != small


def test_planted_shares_differ_as_planned_and_patients_vary() -> None:
    cells = plan_cohort(seed=0, n_patients_per_group=150, cells_per_patient=40)
    for group, shares in GROUPS.items():
        labels = [cell.label for cell in cells if cell.group == group]
        for name, share in shares.items():
            assert labels.count(name) / len(labels) == pytest.approx(share, abs=0.04)
    blasts = {cell.patient: [0, cell.group] for cell in cells}
    for cell in cells:
        blasts[cell.patient][0] += cell.label == "blast"
    found = {group: np.array([n for n, its in blasts.values() if its == group]) / 40 for group in GROUPS}
    assert found["AML-like"].std() > 0.08
    assert found["AML-like"].min() < found["healthy"].max()  # the groups overlap


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_patients_per_group": 0}, "positive numbers"),
        ({"seed": -1}, "seed >= 0"),
        ({"groups": {"odd": {"blast": 1.0}}}, "'odd'.*adding up to 1"),
        ({"groups": {"odd": dict.fromkeys(CELL_CLASSES, 0.5)}}, "'odd'.*adding up to 1"),
    ],
)
def test_refuses_impossible_plans(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CohortPlan(**{"seed": 0, **options})


def test_cohort_cell_takes_its_patients_stain(monkeypatch: pytest.MonkeyPatch) -> None:
    stains = []
    monkeypatch.setattr(synthetic, "make_cell", lambda label, rng, *, size, stain: stains.append(stain))
    for cell in plan_cohort(seed=1, n_patients_per_group=1, cells_per_patient=2):
        make_cohort_cell(cell)
    assert [stains[row] == stains[row + 1] for row in range(5)] == [True, False, True, False, True]


def test_write_cohort_is_right_and_resumable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = plan_cohort(seed=2, n_patients_per_group=1, cells_per_patient=3)
    steps = []
    manifest = write_cohort(tmp_path, cells, size=48, on_progress=lambda done, n: steps.append((done, n)))
    assert steps == [(row, 9) for row in range(1, 10)]
    assert manifest == tmp_path / "manifest.csv"
    assert read_rows(manifest) == [["path", "label", "patient"], *[[c.path, c.label, c.patient] for c in cells]]
    patients = [["P000", "healthy"], ["P001", "AML-like"], ["P002", "CML-like"]]
    assert read_rows(tmp_path / "patients.csv") == [["patient", "group"], *patients]
    contents = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(contents) == 9 + 2
    for cell in cells:
        with Image.open(tmp_path / cell.path) as picture:
            assert (picture.size, picture.mode, picture.format) == ((48, 48), "RGB", "JPEG")
            written = np.asarray(picture, dtype=float)
        assert np.abs(written - np.asarray(make_cohort_cell(cell, size=48), dtype=float)).mean() < 4

    missing, cut, changed = (tmp_path / cell.path for cell in cells[:3])
    missing.unlink()
    cut.write_bytes(contents[cut][:-40])
    changed.write_bytes(contents[changed][:400] + bytes([contents[changed][400] ^ 1]) + contents[changed][401:])
    drawn = []
    make_one = synthetic.make_cohort_cell
    monkeypatch.setattr(
        synthetic, "make_cohort_cell", lambda cell, *, size: (drawn.append(cell), make_one(cell, size=size))[1]
    )
    write_cohort(tmp_path, cells, size=48)
    assert drawn == cells[:3]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == contents
    write_cohort(tmp_path, cells, size=40)  # another size is another picture
    assert drawn == [*cells[:3], *cells]


def test_generator_needs_no_torch() -> None:
    code = "import sys, cytosae_pipeline.demo.cohort; sys.exit('torch' in sys.modules)"
    path = [str(Path(folder).resolve()) for folder in ("pipeline", "cache", ".")]
    code = f"import sys; sys.path[:0] = {path!r}; {code}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3], timeout=patience())


@pytest.fixture(scope="module")
def asset() -> dict:
    path = resources.files("cytosae_pipeline.assets") / "cytosae_tiny14.pth"
    with resources.as_file(path) as file:
        assert file.stat().st_size <= 4_000_000
        return torch.load(file, weights_only=True)


def test_embedded_weights_have_dinov2s_layout(asset: dict) -> None:
    architecture, state = asset["architecture"], asset["state_dict"]
    width, depth = architecture["width"], architecture["depth"]
    hidden = architecture["mlp_ratio"] * width
    assert architecture["name"] == "cytosae_tiny14"
    assert width % architecture["heads"] == 0
    assert (architecture["patch_size"], architecture["n_registers"], architecture["swiglu"]) == (14, 0, False)
    block = {
        **{f"{norm}.{kind}": (width,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")},
        **{"ls1.gamma": (width,), "ls2.gamma": (width,)},
        **{"attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,)},
        **{"attn.proj.weight": (width, width), "attn.proj.bias": (width,)},
        **{"mlp.fc1.weight": (hidden, width), "mlp.fc1.bias": (hidden,)},
        **{"mlp.fc2.weight": (width, hidden), "mlp.fc2.bias": (width,)},
    }
    expected = {
        **{"cls_token": (1, 1, width), "pos_embed": (1, 257, width), "mask_token": (1, width)},
        **{"patch_embed.proj.weight": (width, 3, 14, 14), "patch_embed.proj.bias": (width,)},
        **{f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in block.items()},
        **{"norm.weight": (width,), "norm.bias": (width,)},
    }
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected


def test_embedded_weights_are_finite_half_precision(asset: dict) -> None:
    for name, tensor in asset["state_dict"].items():
        assert tensor.dtype == torch.float16, name
        assert torch.isfinite(tensor).all(), name
