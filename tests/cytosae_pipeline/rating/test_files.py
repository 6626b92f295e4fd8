"""Files of ratings: nothing is lost or overwritten, and nothing in them is trusted."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from cytosae_cache.errors import WriteError
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.rating.answers import check_answer
from cytosae_pipeline.rating.files import rater_path, read_all_ratings, read_ratings, save_answer
from cytosae_pipeline.statistics.notes import Subject
from tests.support.nursery import ROOT, SOURCES
from tests.support.patience import patience

SUBJECT = Subject("sae", "store")


def answer(item="ab12", **changes):
    value = {"item": item, "name": "nuclei ✓", "concept": "yes", "confidence": 4, "clicked": 2, "n_row": 5}
    return check_answer({**value, "found": True, **changes})


def save(folder, rater, latent, value, **options):
    save_answer(folder, rater, 100, latent, value, **{"subject": SUBJECT, **options})


def read(folder, rater="anna", **options):
    return read_ratings(folder, rater, 100, **{"subject": SUBJECT, **options})


def test_answers_are_read_as_they_were_saved(tmp_path):
    assert len(read(tmp_path)) == 0
    assert read_all_ratings(tmp_path, 100, subject=SUBJECT) == []
    save(tmp_path, "anna", 12, answer())
    save(tmp_path, "anna", 3, answer(concept="no", name=""))
    save(tmp_path, "anna", -1, answer("cd34", found=False))
    save(tmp_path, "anna", 12, answer(name="changed"))
    save(tmp_path, "bert", 12, answer(confidence=1))
    anna = read(tmp_path)
    assert anna.latents == {3: answer(concept="no", name=""), 12: answer(name="changed")}
    assert anna.decoys == {"cd34": answer("cd34", found=False)}
    assert [one.rater for one in read_all_ratings(tmp_path, 100, subject=SUBJECT)] == ["anna", "bert"]
    assert sorted(path.name for path in (tmp_path / "latent_ratings").glob("*.json")) == ["anna.json", "bert.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concept": "maybe"}, "concept must be no, partly or yes"),
        ({"concept": ["yes"]}, "concept must be no, partly or yes"),
        ({"confidence": 6}, "confidence must be a whole number from 1 to 5"),
        ({"confidence": True}, "confidence must be a whole number"),
        ({"confidence": 3.0}, "confidence must be a whole number"),
        ({"clicked": 5}, "clicked must be a whole number from 0 to 4"),
        ({"clicked": None}, "clicked must be a whole number"),
        ({"n_row": 10**30}, "n_row must be a whole number from 2 to 100"),
        ({"name": "x" * 201}, "name must be text of at most 200 characters"),
        ({"name": 3}, "name must be text"),
        ({"name": "\ud800"}, "half of a surrogate pair"),
        ({"name": "  "}, "a concept needs a name"),
        ({"found": 1}, "found must be true or false"),
        ({"item": "../x"}, "item must be a digest"),
    ],
)
def test_what_is_not_an_answer_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        answer(**changes)
    with pytest.raises(ValueError, match="an answer must be an object"):
        check_answer([])


def _record(**changes):
    return {"format": 1, "about": SUBJECT._asdict(), "rater": "anna", "latents": {}, "decoys": {}, **changes}


@pytest.mark.parametrize(
    "data",
    [
        b"", b"null", b"[]", b"{", b"[" * 100_000, b"\xff\xfe", b"\x80\x04N.", b"9" * 5000,
        json.dumps(_record(format=2)).encode(),
        json.dumps(_record(latents=[])).encode(),
        json.dumps(_record(latents={"x": answer()})).encode(),
        json.dumps(_record(latents={"100": answer()})).encode(),
        json.dumps(_record(latents={"-1": answer()})).encode(),
        json.dumps(_record(latents={"1": {**answer(), "confidence": float("nan")}})).encode(),
        json.dumps(_record(decoys={"x": {}})).encode(),
    ],
)  # fmt: skip
def test_hostile_files_are_refused_and_never_overwritten(tmp_path, data):
    path = rater_path(tmp_path, "anna")
    path.parent.mkdir()
    path.write_bytes(data)
    for act in (lambda: read(tmp_path), lambda: save(tmp_path, "anna", 1, answer())):
        with pytest.raises(UserError, match=r"anna.json' is not a file of ratings \(.*fix or move it"):
            act()
    with pytest.raises(UserError, match="is not a file of ratings"):
        read_all_ratings(tmp_path, 100, subject=SUBJECT)
    assert path.read_bytes() == data


def test_links_pipes_and_large_files_are_not_opened(tmp_path):
    path = rater_path(tmp_path, "anna")
    path.parent.mkdir()
    (tmp_path / "secret").write_text(json.dumps(_record()))
    for make in (
        lambda: path.symlink_to(tmp_path / "secret"),
        lambda: path.symlink_to("/dev/zero"),
        lambda: os.mkfifo(path),
    ):
        make()
        with pytest.raises(UserError, match="is not a file of ratings but a link, a folder or a device"):
            read(tmp_path)
        path.unlink()
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="larger than 16 MB"):
        read(tmp_path)


def test_files_of_somebody_or_something_else_are_refused(tmp_path):
    save(tmp_path, "anna", 1, answer())
    path = rater_path(tmp_path, "anna")
    path.rename(path.with_name("Anna2.json"))
    with pytest.raises(UserError, match="contains the ratings of another rater, 'anna'"):
        read(tmp_path, "Anna2")
    path.with_name("Anna2.json").rename(path)
    for subject, what in (
        (Subject("other", "store"), "another autoencoder"),
        (Subject("sae", "other"), "other images: the store was made again since"),
    ):
        with pytest.raises(UserError, match=f"are about {what}"):
            read(tmp_path, subject=subject)
        with pytest.raises(UserError, match="give --keep_notes if they still apply"):
            save(tmp_path, "anna", 2, answer(), subject=subject)
        assert read(tmp_path, subject=subject, keep=True).latents == {1: answer()}


def test_other_files_of_the_folder_are_not_read(tmp_path):
    save(tmp_path, "anna", 1, answer())
    folder = tmp_path / "latent_ratings"
    for name in (".hidden.json", "two words.json", "notes.txt", f"{'x' * 41}.json"):
        (folder / name).write_text("garbage")
    assert [one.rater for one in read_all_ratings(tmp_path, 100, subject=SUBJECT)] == ["anna"]
    for number in range(200):
        (folder / f"r{number}.json").write_text("garbage")
    with pytest.raises(UserError, match="has files of 201 raters, at most 200 are read"):
        read_all_ratings(tmp_path, 100, subject=SUBJECT)


def test_answers_saved_at_once_are_all_kept(tmp_path):
    threads = [threading.Thread(target=save, args=(tmp_path, "anna", at, answer())) for at in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(read(tmp_path).latents) == list(range(16))


_SAVE_FOREVER = """
import sys
from pathlib import Path
from cytosae_pipeline.rating.files import save_answer
from cytosae_pipeline.statistics.notes import Subject
value = {"item": "ab", "name": "x" * 200, "concept": "yes", "confidence": 1, "clicked": 0, "n_row": 5, "found": True}
for latent in range(100):
    save_answer(Path(sys.argv[1]), "anna", 100, latent, value, subject=Subject("sae", "store"))
    print(latent, flush=True)
"""


def test_a_killed_process_loses_nothing_that_it_said_was_saved(tmp_path):
    for n in (1, 7, 23):
        folder = tmp_path / str(n)
        folder.mkdir()
        child = subprocess.Popen(
            [sys.executable, "-c", _SAVE_FOREVER, str(folder)],
            stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": SOURCES},
        )  # fmt: skip
        for _ in range(n):
            child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        rest = child.communicate(timeout=patience())[0]
        said = n + len(rest.split())
        assert set(range(said)) <= set(read(folder).latents)
        save(folder, "anna", 99, answer())
        assert 99 in read(folder).latents


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    if os.geteuid() == 0:
        (tmp_path / "latent_ratings").write_text("in the way")
        with pytest.raises((WriteError, OSError)):
            save(tmp_path, "anna", 1, answer())
        return
    tmp_path.chmod(0o500)
    with pytest.raises(WriteError):
        save(tmp_path, "anna", 1, answer())
    tmp_path.chmod(0o700)
