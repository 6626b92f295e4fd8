"""Reports, keys and notes that meet a link, another process or a failing disk."""

import errno
import os
import subprocess
import sys
import threading

import pytest

from cytosae_cache.errors import StoreBusyError, WriteError
from cytosae_cache.storage import atomic
from cytosae_cache.storage.lock import locked
from cytosae_pipeline.report.data.pseudonyms import KEY_BYTES, ensure_key
from cytosae_pipeline.report.data.report_data import read_training
from cytosae_pipeline.report.figures import style
from cytosae_pipeline.statistics import notes as notes_module
from cytosae_pipeline.statistics.notes import read_notes, save_note

NOTE = {"name": "rim", "note": ""}


def report(place, out, *arguments, code=0):
    return place.run(
        "report", "--dataset_name", "toy", "--sae_path", place.sae(), "--n_latents", 2, "--masking_images", 0,
        "--map_images", 0, "--out", out, *arguments, code=code,
    )  # fmt: skip


def test_a_report_goes_where_a_link_leads(with_sae, tmp_path):
    disk, link = tmp_path / "disk", tmp_path / "link"
    link.symlink_to(disk / "page")
    output = report(with_sae, link, code=1).output
    assert f"'{link}' is a link to '{disk / 'page'}', whose folder does not exist. Create or mount it" in output
    disk.mkdir()
    assert f"open in a browser: {link}/index.html" in report(with_sae, link).output
    (disk / "page" / "of-the-older-one").touch()
    report(with_sae, link)
    assert link.is_symlink()
    assert (disk / "page" / "index.html").is_file()
    assert not (disk / "page" / "of-the-older-one").exists()
    assert [path.name for path in disk.iterdir()] == ["page"]


def test_one_report_at_a_time(with_sae, tmp_path):
    with locked(tmp_path / "page.lock", "page"):
        output = report(with_sae, tmp_path / "page", code=1).output
    assert f"is writing '{tmp_path / 'page'}'. Wait for it to finish, then run the command again" in output
    assert list(tmp_path.glob("page*")) == []


def test_a_figure_that_cannot_be_written_keeps_the_older_report(with_sae, tmp_path, monkeypatch):
    report(with_sae, tmp_path / "page")

    def fail(*arguments, **options):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(style.Figure, "savefig", fail)
    output = report(with_sae, tmp_path / "page", "--figures", code=1).output
    assert f"'{tmp_path / 'page'}' cannot be written: No space left on device (" in output
    assert (tmp_path / "page" / "index.html").is_file()
    assert not list(tmp_path.glob("page.*"))


def test_a_key_is_whole_or_not_there(tmp_path, monkeypatch):
    def fail(file):
        raise OSError(errno.ENOSPC, "full")

    path = tmp_path / "key"
    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "fsync", fail)
        with pytest.raises(WriteError, match=f"'{path}' cannot be written: No space left on device"):
            ensure_key(path)
    assert list(tmp_path.iterdir()) == []
    key = ensure_key(path)
    assert len(key) == KEY_BYTES
    assert ensure_key(path) == key
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs /proc")  # noqa: PTH110
def test_errors_of_reading_name_the_file(tmp_path):
    for name, read in (("metrics.jsonl", lambda path: read_training(path.with_name("sae.pt"))), ("notes", read_them)):
        path = tmp_path / name
        path.symlink_to("/proc/self/mem")  # reading its beginning fails
        with pytest.raises(OSError, match=f"Input/output error: '{path}'"):
            read(path)


def read_them(path):
    return read_notes(path, 5)


def test_a_file_of_the_user_with_the_name_of_the_notes_lock_is_left_alone(tmp_path):
    (tmp_path / "latent_notes.lock").write_text("mine")
    assert save_note(tmp_path / "latent_notes.json", 5, 3, NOTE) is None
    assert (tmp_path / "latent_notes.lock").read_text() == "mine"
    assert read_notes(tmp_path / "latent_notes.json", 5) == {3: NOTE}


def test_notes_wait_for_another_process_but_not_for_ever(tmp_path, monkeypatch):
    path, lock = tmp_path / "latent_notes.json", tmp_path / "latent_notes.lock"
    hold = (
        "import sys; from pathlib import Path; from cytosae_cache.storage.lock import locked\n"
        "with locked(Path(sys.argv[1]), 'notes'): print('held', flush=True); sys.stdin.readline()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", hold, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    with monkeypatch.context() as patch:
        patch.setattr(notes_module, "_MOST_WAIT_S", -1.0)
        with pytest.raises(StoreBusyError, match=rf"process {process.pid} on .+ is writing '{path}'"):
            save_note(path, 5, 3, NOTE)
    monkeypatch.setattr(notes_module, "_MOST_WAIT_S", 1e9)
    thread = threading.Thread(target=save_note, args=(path, 5, 3, NOTE))
    thread.start()
    process.communicate("\n")
    thread.join()
    assert read_notes(path, 5) == {3: NOTE}
    assert [item.name for item in tmp_path.iterdir()] == ["latent_notes.json"]
