"""Faults tried on whole builds and stores: nothing is lost, mixed up or silently wrong. The table is docs/faults.md."""

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from cytosae_cache.creation import create_store
from cytosae_cache.errors import StoreError
from cytosae_cache.format.metadata import ATTRIBUTES_KEY, _digest
from cytosae_cache.format.shard import shard_name
from cytosae_cache.reading.reader import StoreReader
from cytosae_cache.store import ActivationStore
from cytosae_cache.verify import verify_store
from cytosae_cache.writer import StoreWriter
from cytosae_pipeline.building import fill as fill_module
from cytosae_pipeline.runtime.progress import Progress
from tests.support.nursery import Nursery
from tests.support.pictures import LAYOUT, write_pictures, write_vit
from tests.support.stores import PROVENANCE, make_activations, make_shard, make_spec, make_store, make_table, seal

N_KILLS = 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, sessions and signals as Linux has them")


def _snapshot(path: Path) -> dict[str, bytes]:
    """All files but locks, and but the options that builds were given, which may differ."""
    return {
        str(item.relative_to(path)): item.read_bytes()
        for item in sorted(path.rglob("*"))
        if item.is_file() and item.suffix != ".lock" and item.parent.name != "builds"
    }


def _private_mounts(folder: Path) -> tuple[str, ...] | None:
    """Command under which file systems can be mounted that nobody else sees; None where there is none."""
    for prefix in (("unshare", "-m"), ("unshare", "-Urm")):
        command = [*prefix, "mount", "-t", "tmpfs", "none", str(folder)]
        if shutil.which("unshare") and not subprocess.run(command, capture_output=True, check=False).returncode:
            return prefix
    return None


class Site:
    """A data set, a checkpoint, the store of an unbroken build, and a nursery for builds of it elsewhere."""

    def __init__(self, folder: Path, nursery: Nursery, *, mounts: bool) -> None:
        self.folder, self.nursery, self.mounts = folder, nursery, mounts
        self.images = write_pictures(folder / "images", 100)
        self.vit = write_vit(folder / "vit.pth")
        for _ in range(2):  # the first is slower: nothing is in the machine's caches
            whole = self.build(folder / "whole", "--overwrite")
            assert whole.code == 0, whole.output
        self.seconds = whole.seconds
        self.store = _snapshot(folder / "whole" / "out")
        assert len([name for name in self.store if "activations/c/" in name]) == 51

    def command(self, root: Path, *more: object) -> list[object]:
        return [
            "build", "--root_dir", root, "--dataset_name", "toy", "--images", self.images, "--model_path", self.vit,
            "--layout", LAYOUT, "--workers", 1, "--shard_images", 2, *more,
        ]  # fmt: skip

    def build(self, root: Path, *more: object, **fault):
        return self.nursery.run(*self.command(root, *more), **fault)

    def assert_whole(self, root: Path) -> None:
        assert _snapshot(root / "out") == self.store


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    folder = tmp_path_factory.mktemp("site")
    (folder / "probe").mkdir()
    prefix = _private_mounts(folder / "probe")
    with Nursery(prefix=prefix or (), SOURCE_DATE_EPOCH="1700000000") as nursery:
        yield Site(folder, nursery, mounts=prefix is not None)


def _n_marks(root: Path) -> int:
    return len(list(root.glob("out/activations/toy/*.zarr/progress/*.json")))


# Kills


@linux
@pytest.mark.slow
def test_builds_killed_at_twenty_instants_resume_to_the_same_bytes(site, tmp_path):
    rng = np.random.default_rng(0)
    # Every second kill comes at an instant; on a machine whose speed varies, these may come too late.
    instants, n_shards = rng.uniform(size=2 * N_KILLS) * site.seconds, rng.permutation(45)
    hits, progress, root = 0, [], tmp_path / "0"
    for number, instant in enumerate(instants.tolist()):
        when = {"kill_at_marks": (root, int(n_shards[number // 2]))} if number % 2 else {"kill_after_s": instant}
        ended = site.build(root, **when, group=number % 4 > 1)
        assert not ended.left_over, "processes outlived the build they worked for"
        if ended.code == -signal.SIGKILL:
            hits += 1
            progress.append(_n_marks(root))
        else:
            assert ended.code == 0, ended.output
        if hits % 3 or ended.code == 0:  # two of three builds are killed once or twice, the others more often
            ended = site.build(root)
            assert ended.code == 0, ended.output
            site.assert_whole(root)
            root = tmp_path / str(number + 1)
        if hits == N_KILLS:
            break
    assert hits == N_KILLS
    assert len(set(progress)) >= 5, f"the kills did not spread over the build: {progress}"
    site.build(root)
    site.assert_whole(root)


@linux
def test_a_killed_worker_ends_the_build_with_advice(site, tmp_path):
    ended = site.build(tmp_path, kill_after_s=0.0, worker=True)
    assert ended.code == 1
    assert "a decoding process was killed" in ended.output
    assert "--workers 0" in ended.output
    assert "Traceback" not in ended.output
    assert not ended.left_over
    assert site.build(tmp_path, "--workers", 0).code == 0
    site.assert_whole(tmp_path)


@linux
@pytest.mark.parametrize(("number", "n_shards"), [(signal.SIGINT, 1), (signal.SIGINT, 30), (signal.SIGTERM, 10)])
def test_an_interrupted_build_resumes_to_the_same_bytes(site, tmp_path, number, n_shards):
    ended = site.build(tmp_path, kill_at_marks=(tmp_path, n_shards), number=number, group=True)
    assert ended.code == 130, ended.output
    assert "interrupted; finished work is kept. Resume with:" in ended.output
    assert shlex.join(["cytosae-cache", *map(str, site.command(tmp_path))]) in ended.output
    assert "Traceback" not in ended.output
    assert not ended.left_over
    assert n_shards <= _n_marks(tmp_path) < 51
    assert site.build(tmp_path).code == 0
    site.assert_whole(tmp_path)


# Disks


@pytest.fixture
def mounts(site) -> None:
    if not site.mounts:
        pytest.skip("needs private mounts: root, or user namespaces")


def test_a_full_disk_stops_the_build_and_keeps_what_is_finished(site, tmp_path, mounts):
    small, seen = tmp_path / "small", tmp_path / "seen"
    small.mkdir()
    ended = site.build(small, before=f"mount -t tmpfs -o size=320k none {small}", after=f"cp -a {small} {seen}")
    assert ended.code == 1
    (error,) = [line for line in ended.output.splitlines() if line.startswith("Error")]
    assert f"store '{small}/out/activations/toy/" in error
    assert "cannot be written: No space left on device (" in error
    assert "Finished work is kept: free some space, then run the command again to resume" in error
    assert "Traceback" not in ended.output
    assert 5 < _n_marks(seen) < 51
    assert not list(seen.rglob("*.partial"))
    shutil.rmtree(seen)
    ended = site.build(small, before=f"mount -o remount,size=8m {small}", after=f"cp -a {small} {seen}; umount {small}")
    assert ended.code == 0, ended.output
    n_kept = int(ended.output.partition("resuming after ")[2].split()[0])
    assert n_kept >= 10
    site.assert_whole(seen)


@linux
def test_a_limit_on_the_size_of_files_is_a_full_disk(site, tmp_path):
    ended = site.build(tmp_path, "--shard_images", 20, file_bytes=4000)
    assert ended.code == 1
    assert "cannot be written: File too large" in ended.output
    assert "Traceback" not in ended.output
    assert site.build(tmp_path, "--shard_images", 20).code == 0
    assert site.build(tmp_path / "whole", "--shard_images", 20).code == 0
    assert _snapshot(tmp_path / "out") == _snapshot(tmp_path / "whole" / "out")


def test_a_read_only_folder_is_reported_and_left_unchanged(site, tmp_path, mounts):
    for root in (tmp_path / "new", tmp_path / "begun"):
        root.mkdir()
    site.build(tmp_path / "begun", kill_at_marks=(tmp_path / "begun", 20))
    for root in (tmp_path / "new", tmp_path / "begun"):
        before = _snapshot(root)
        bind = f"mount --bind {root} {root}; mount -o remount,ro,bind {root}"
        ended = site.build(root, before=bind, after=f"umount {root}")
        assert ended.code == 1
        assert "cannot be written: Read-only file system. Make the folder writable, or use another --root_dir" in (
            ended.output
        )
        assert "Traceback" not in ended.output
        assert _snapshot(root) == before


@pytest.mark.skipif(getattr(os, "geteuid", int)() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_reported(with_images):
    with_images.root.chmod(0o555)
    try:
        output = with_images.build(code=1).output
    finally:
        with_images.root.chmod(0o755)
    assert "cannot be written: Permission denied. Make the folder writable" in output


def test_errors_of_other_files_are_not_blamed_on_the_store(with_images, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(5, "Input/output error", "/elsewhere/weights")

    monkeypatch.setattr(fill_module, "load_backbone", fail)
    output = with_images.build(code=1).output
    assert "/elsewhere/weights" in output
    assert "cannot be written" not in output


@pytest.mark.parametrize(
    ("code", "message"),
    [(5, "cannot be written: Input/output error. Finished work is kept"), (122, r"free some space, then run")],
)
def test_every_error_of_the_disk_names_the_store(with_images, monkeypatch, code, message):
    def fail(file, data):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("cytosae_cache.storage.local.write_all", fail)
    output = with_images.build(code=1).output
    assert f"store '{with_images.root}/out/activations/toy/" in output
    assert message in output


# Sources that change


def _at(monkeypatch, n_images: int, action) -> None:
    """Do something while a build runs, when it has computed so many images."""
    advance, left = Progress.advance, [action]

    def hooked(self, n=1, note=""):
        advance(self, n, note)
        if self.what == "build" and self.done >= n_images and left:
            left.pop()()

    monkeypatch.setattr(Progress, "advance", hooked)


def _interrupt() -> None:
    raise KeyboardInterrupt


def _skipped(place) -> dict[str, str]:
    with place.store.with_name(f"{place.store.name}.skipped.csv").open(newline="") as file:
        return {row["path"]: row["reason"] for row in csv.DictReader(file)}


def _rewrite(path: Path, data: bytes) -> None:
    """Other contents at another time, however coarse the file system's clock."""
    later = path.stat().st_mtime_ns + 2_000_000_000
    path.write_bytes(data)
    os.utime(path, ns=(later, later))


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_change_while_a_build_runs_are_set_aside(with_images, monkeypatch, workers):
    write_pictures(with_images.images, 80, broken=False)
    paths = sorted((with_images.images / "neutrophil" / "p3").glob("*.png"))[-4:]
    names = [str(path.relative_to(with_images.images)) for path in paths]
    size = paths[1].stat().st_size

    def change():
        paths[0].unlink()
        _rewrite(paths[1], paths[1].read_bytes()[:100])
        _rewrite(paths[2], paths[2].read_bytes())

    _at(monkeypatch, 5, change)
    output = with_images.build("--workers", workers).output
    reasons = _skipped(with_images)
    assert reasons[names[0]] == "vanished while the build was running"
    assert reasons[names[1]] == f"changed while the build was running: {size:,} bytes when it was listed, 100 now"
    assert reasons[names[2]] == "changed while the build was running: it was written to after it was listed"
    assert len(reasons) == 4
    assert "set aside as unreadable: 4 (2 changed while the build was running, 1 " in output
    store = ActivationStore.open(with_images.store)
    for name in names:
        row = store.images.path.index(name)
        assert store.valid[row] == (name == names[3])
        assert (store.column("images/n_bytes")[row] > 0) == (name == names[3])


def test_an_image_that_changes_stops_a_strict_build(with_images, monkeypatch):
    (with_images.images / "neutrophil/p2/broken.png").unlink()
    path = with_images.images / "neutrophil/p3/011.png"
    _at(monkeypatch, 5, lambda: _rewrite(path, path.read_bytes()[:100]))
    output = with_images.build("--strict-images", code=1).output
    assert "image 'neutrophil/p3/011.png' cannot be read: changed while the build was running: " in output


def test_a_disk_of_images_that_is_taken_away_stops_the_build(with_images, with_store, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    with_store.build("--overwrite")
    away = with_images.root / "away"

    def take_away():
        with_images.images.rename(away)
        with_images.images.mkdir()

    _at(monkeypatch, 8, take_away)
    output = with_images.build(code=1).output
    assert "3 consecutive images have vanished since the build began, the first 'neutrophil/" in output
    assert "was a disk unmounted?" in output
    with_images.images.rmdir()
    away.rename(with_images.images)
    output = with_images.build().output
    # Some images of the fourth shard were gone already: it was kept with them set aside, and is computed again now.
    assert "resuming after 15 images" in output
    assert _snapshot(with_images.root / "out") == _snapshot(with_store.root / "out")


def test_images_that_came_back_are_read_when_the_build_resumes(with_images, with_store, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    with_store.build("--overwrite")
    path = with_images.images / "lymphocyte/p0/004.png"
    gone = path.rename(with_images.root / "gone.png")
    (with_images.images / "manifest.csv").write_text(
        "path,label,patient\n"
        + "".join(
            f"{row},{row.split('/')[0]},{row.split('/')[1]}\n" for row in ActivationStore(with_store.store).images.path
        )
    )
    _at(monkeypatch, 20, _interrupt)
    with_images.build(code=130)
    gone.rename(path)
    output = with_images.build().output
    assert "resuming after 10 images" in output  # of the 15 that were finished
    assert _snapshot(with_images.root / "out") == _snapshot(with_store.root / "out")


@pytest.mark.parametrize("change", ["contents", "vanished"])
def test_old_and_new_images_are_never_mixed(with_images, with_store, monkeypatch, change):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    with_store.build("--overwrite")
    _at(monkeypatch, 15, _interrupt)
    with_images.build(code=130)
    paths = sorted((with_images.images / "blast").rglob("*.png"))[:4]
    old = [path.read_bytes() for path in paths]
    if change == "contents":
        for path, data in zip(paths, old[1:] + old[:1], strict=True):
            path.write_bytes(data)
    else:
        # In a manifest, so that the list stays the same.
        rows = ActivationStore(with_store.store).images.path
        lines = [f"{row},{row.split('/')[0]},{row.split('/')[1]}\n" for row in rows]
        (with_images.images / "manifest.csv").write_text("path,label,patient\n" + "".join(lines))
        for path in paths:
            path.unlink()
    before = _snapshot(with_images.store)
    output = with_images.build(code=1).output
    names = [str(path.relative_to(with_images.images)) for path in paths]
    assert "4 images changed since the build of store" in output
    note = " (file not found)" if change == "vanished" else ""
    assert ", ".join(f"'{name}'{note}" for name in names[:3]) + " and 1 more. " in output
    assert "Restore the old ones, or --overwrite" in output
    assert _snapshot(with_images.store) == before
    for path, data in zip(paths, old, strict=True):
        path.write_bytes(data)
    with_images.build()
    assert _snapshot(with_images.root / "out") == _snapshot(with_store.root / "out")


def test_an_image_that_changed_before_it_was_read_is_taken_as_it_is(with_images, monkeypatch):
    _at(monkeypatch, 5, _interrupt)
    with_images.build(code=130)
    path = with_images.images / "neutrophil/p3/011.png"
    path.write_bytes((with_images.images / "blast/p0/000.png").read_bytes())
    with_images.build()
    store = ActivationStore.open(with_images.store)
    row = store.images.path.index("neutrophil/p3/011.png")
    assert store.column("images/n_bytes")[row] == path.stat().st_size
    with_images.run("verify", "--dataset_name", "toy", "--deep", "--model_path", with_images.vit)


def test_images_of_another_size_are_found_before_a_finished_store_is_reused(with_store):
    path = with_store.images / "blast/p0/000.png"
    size, data = path.stat().st_size, path.read_bytes()
    path.write_bytes(data + b"0")
    output = with_store.build(code=1).output
    assert f"1 of 23 images changed since store '{with_store.store}' was built" in output
    assert f"'blast/p0/000.png' ({size:,} bytes then, {size + 1:,} now)" in output
    assert "--overwrite" in output
    path.write_bytes(data)
    assert "already complete" in with_store.build().output


def test_deep_verify_hashes_every_image(with_store):
    arguments = ["verify", "--dataset_name", "toy", "--deep", "--model_path", with_store.vit]
    for path in with_store.images.rglob("*.png"):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        name = path.relative_to(with_store.images)
        assert f"('{name}'): the image file changed since" in with_store.run(*arguments, code=1).output
        path.write_bytes(data)


def test_a_failing_disk_of_images_stops_the_build(with_images, with_store, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.setattr("cytosae_pipeline.images.files._RETRY_DELAYS_S", (0.0,))
    with_store.build("--overwrite")
    read, failing = os.read, []

    def fail(file, n):
        if failing:
            raise OSError(5, "Input/output error")
        return read(file, n)

    monkeypatch.setattr(os, "read", fail)
    _at(monkeypatch, 10, lambda: failing.append(True))
    output = with_images.build(code=1).output
    assert "cannot be read at the moment: Input/output error (2 attempts). Finished work is kept: run" in output
    assert "put an empty file in its place" in output
    failing.clear()
    assert "resuming after 15 images" in with_images.build().output
    assert _snapshot(with_images.root / "out") == _snapshot(with_store.root / "out")


# Numbers


def test_activations_beyond_the_stores_type_stop_the_build_with_the_images_name(with_images):
    checkpoint = torch.load(with_images.vit, weights_only=True)
    checkpoint["teacher"]["backbone.cls_token"][...] = 1e6
    torch.save(checkpoint, with_images.vit)
    output = with_images.build(code=1).output
    assert "image 'blast/p0/000.png' (row 0) has activations of NaN or infinity in float16" in output
    assert "--store-dtype float32" in output
    with_images.build("--store_dtype", "float32")


# Hostile stores and manifests


def _refused(path: Path) -> str:
    """The one error that every way of using a store ends with."""
    messages = []
    for use in (ActivationStore, ActivationStore.open, _verify, _read):
        try:
            use(path)
        except StoreError as error:
            messages.append(str(error))
    assert messages, "the store was taken for a sound one"
    assert all(len(message) < 1000 for message in messages)
    return messages[-1]


def _verify(path: Path) -> None:
    report = verify_store(ActivationStore.open(path))
    if not report.sound:
        raise StoreError("; ".join(report.problems))


def _read(path: Path) -> None:
    store = ActivationStore.open(path)
    assert len(store.images.path) == store.n_images
    with StoreReader(store) as reader:
        reader.read(store.valid_rows)


def _edit_attributes(path: Path, change) -> None:
    """Change our attributes and their digest, as a program would that knows the format."""
    metadata = json.loads((path / "zarr.json").read_text())
    ours = metadata["attributes"][ATTRIBUTES_KEY]
    change(ours)
    try:
        ours["digest"] = _digest(ours)
    except (ValueError, RecursionError):
        ours["digest"] = "0" * 64
    (path / "zarr.json").write_text(json.dumps(metadata))


@pytest.mark.parametrize(
    "name", ["activations", "activations/c", "activations/c/0", "activations/c/0/0/0", "images", "images/path", "extra"]
)
def test_links_out_of_a_store_are_not_followed(tmp_path, name):
    make_store(tmp_path / "outside" / "s.zarr", make_activations(6))
    store = make_store(tmp_path / "s.zarr", make_activations(6))
    other = tmp_path / "outside" / "s.zarr" / name
    path = store.path / name
    if name == "extra":
        other.mkdir()
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    path.symlink_to(other)
    seal(store)
    before = _snapshot(tmp_path / "outside")
    assert f"'{path}' is a link that leads out of the store" in _refused(store.path)
    assert _snapshot(tmp_path / "outside") == before


def test_links_within_a_store_and_to_it_are_followed(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(6))
    path = store.path / shard_name(0)
    path.rename(path.with_name("real"))
    path.symlink_to("real")
    (tmp_path / "link.zarr").symlink_to(store.path)
    _read(tmp_path / "link.zarr")


def test_links_out_of_an_unfinished_store_are_not_written_through(tmp_path):
    (tmp_path / "outside").mkdir()
    store = create_store(tmp_path / "s.zarr", make_spec(), make_table(6), PROVENANCE, shard_images=4)
    (store.path / "progress").symlink_to(tmp_path / "outside")
    with (
        pytest.raises(StoreError, match="is a link that leads out of the store"),
        StoreWriter(ActivationStore(store.path)) as writer,
    ):
        writer.submit(make_shard(store, 0, make_activations(4)))
    assert not list((tmp_path / "outside").iterdir())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
@pytest.mark.parametrize("name", ["zarr.json", "activations/zarr.json", "activations/c/0/0/0", "images/path/zarr.json"])
def test_pipes_in_a_store_do_not_hang(tmp_path, name):
    store = make_store(tmp_path / "s.zarr", make_activations(6))
    (store.path / name).unlink()
    os.mkfifo(store.path / name)
    assert f"'{store.path / name}' is neither a file nor a " in _refused(store.path)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/hostname", "a\0b", "a\nb", "a" * 5000, "images/../../outside", ""]
)
def test_recorded_names_that_lead_out_are_refused(tmp_path, name):
    (tmp_path / "outside").write_text("x")
    store = make_store(tmp_path / "s.zarr", make_activations(6))
    _edit_attributes(store.path, lambda ours: ours["files"].update({name: "0" * 64}))
    assert any(words in _refused(store.path) for words in ("missing", "invalid file name", "leads out"))


@pytest.mark.parametrize(
    "change",
    [
        lambda ours: ours.update(files=[]),
        lambda ours: ours.update(files={"activations/zarr.json": 7}),
        lambda ours: ours.update(spec=None),
        lambda ours: ours.update(spec=[1]),
        lambda ours: ours.update(dataset=7),
        lambda ours: ours.update(dataset="\ud800"),
        lambda ours: ours.update(dataset=float("nan")),
        lambda ours: ours.update(created={"a": []}),
        lambda ours: ours.update(complete="yes"),
        lambda ours: ours.update(format=True),
        lambda ours: ours["spec"].update(d_model=10**30),
        lambda ours: ours["spec"].update(d_model=8.0),
        lambda ours: ours["spec"].update(block="2"),
        lambda ours: ours["spec"].update(weights_sha256=["a"] * 64),
        lambda ours: ours["spec"].update(store_dtype="object"),
        lambda ours: ours["spec"].update(tokens={"n_cls": 1, "n_registers": 0, "grid": [1 << 16, 1 << 16]}),
        lambda ours: ours["spec"].update(tokens={"n_cls": 1, "n_registers": 0, "grid": 3}),
        lambda ours: ours["spec"].update(extra=1),
    ],
)
def test_attributes_of_wrong_types_are_refused(tmp_path, change):
    store = make_store(tmp_path / "s.zarr", make_activations(6))
    _edit_attributes(store.path, change)
    _refused(store.path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 3000 + "1" + "}" * 3000, "[]", "null", "7" * 5000, "\udcff"])
def test_metadata_that_is_no_object_is_refused(tmp_path, text):
    store = make_store(tmp_path / "s.zarr", make_activations(6))
    (store.path / "zarr.json").write_bytes(text.encode(errors="surrogateescape"))
    _refused(store.path)


@pytest.mark.parametrize("place", ["images/valid", "images/path", "images/crc32c", "moments/sum", "shards/n_bytes"])
@pytest.mark.parametrize(
    "change",
    [
        lambda array: array.update(shape=[1 << 40]),
        lambda array: array.update(shape=[6, 1 << 40]),
        lambda array: array.update(shape=[-1]),
        lambda array: array.update(shape="x"),
        lambda array: array.update(shape=[]),
        lambda array: array.update(data_type="variable_length_bytes", fill_value=""),
        lambda array: array.update(
            data_type={"name": "fixed_length_utf32", "configuration": {"length_bytes": 1 << 40}}
        ),
        lambda array: array.update(data_type="object"),
        lambda array: array.update(data_type="complex128"),
        lambda array: array.update(codecs=[{"name": "pickle"}]),
        lambda array: array.update(codecs=[]),
        lambda array: array.update(chunk_grid={"name": "regular", "configuration": {"chunk_shape": [0]}}),
        lambda array: array.update(node_type="group"),
        lambda array: array.clear(),
    ],
)
def test_tables_that_no_writer_made_are_refused(tmp_path, place, change):
    store = make_store(tmp_path / "s.zarr", make_activations(6))
    path = store.path / place / "zarr.json"
    array = json.loads(path.read_text())
    change(array)
    path.write_text(json.dumps(array))
    seal(store)
    with pytest.raises(StoreError):
        _verify(store.path)


@pytest.mark.parametrize("compression", ["none", "lz4"])
def test_a_giant_shape_is_refused_at_once(tmp_path, compression):
    store = make_store(tmp_path / "s.zarr", make_activations(6), compression=compression)
    for path in [store.path / "activations" / "zarr.json", *store.path.glob("images/*/zarr.json")]:
        array = json.loads(path.read_text())
        array["shape"][0] = 1 << 30
        path.write_text(json.dumps(array))
    seal(store)
    assert "promises 1,073,741,824 images, but its shard files have only" in _refused(store.path)


@pytest.mark.parametrize(
    "configuration", [{"cname": "evil"}, {"clevel": 99}, {"blocksize": -1}, {"typesize": "x"}, {"extra": 1}]
)
def test_codecs_with_odd_settings_are_errors_of_ours(tmp_path, configuration):
    store = make_store(tmp_path / "s.zarr", make_activations(6), compression="lz4")
    path = store.path / "activations" / "zarr.json"
    array = json.loads(path.read_text())
    array["codecs"][0]["configuration"]["codecs"][1]["configuration"].update(configuration)
    path.write_text(json.dumps(array))
    seal(store)
    try:
        _verify(store.path)
        _read(store.path)
    except StoreError:
        return
    # What zarr-python takes for harmless must have given the right numbers: their checksums were compared.


def test_paths_in_a_stores_table_lead_nowhere(with_store):
    # A hostile store, given to `verify --deep`: the images that it names are looked for below the data set only.
    group = zarr.open_group(with_store.store, mode="r+")
    paths = sorted(["../../vit.pth", "/etc/hostname", "a\0b", "new\nline.png"] + [f"z{n:02d}" for n in range(19)])
    group["images/path"][...] = np.array(paths, dtype=np.dtypes.StringDType())
    seal(ActivationStore(with_store.store))
    output = with_store.run("verify", "--dataset_name", "toy", "--deep", "--model_path", with_store.vit, code=1).output
    assert output.count("leads out of the data set's folder") == 3
    assert "Traceback" not in output


@pytest.mark.parametrize(
    "cell", ["/etc/hostname", "../secret.png", "x/../../secret.png", "a" * 200_000, "C:/secret.png", "a\0b.png"]
)
def test_hostile_manifests_are_one_message(with_images, cell):
    (with_images.root / "secret.png").write_bytes(b"x")
    path = with_images.images / "manifest.csv"
    path.write_text(f'path,label\nblast/p0/000.png,x\n"{cell}",x\n')
    before = _snapshot(with_images.root)
    output = with_images.build(code=1).output
    assert output.startswith(f"Error: '{path}' ")
    assert "Traceback" not in output
    assert _snapshot(with_images.root) == before


def test_marks_left_by_a_build_killed_at_its_very_end_are_tidied(with_store):
    whole = {path for path in with_store.store.rglob("*") if path.is_file()}
    (with_store.store / "progress").mkdir()
    (with_store.store / "progress" / "0.json").write_text("{}")
    assert "already complete" in with_store.build().output
    assert {path for path in with_store.store.rglob("*") if path.is_file()} == whole
