"""Stamps of files: what distinguishes a file from another one of the same name."""

from cytosae_pipeline.images.files import stamp_file, stamp_files


def test_files_are_stamped_together_as_one_by_one(tmp_path):
    names = [f"{number % 7}/{number:04d}.png" for number in range(700)]
    for name in names[::2]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    stamps = stamp_files(tmp_path, names)
    assert stamps == [stamp_file(tmp_path / name) for name in names]
    assert [stamp is None for stamp in stamps] == [False, True] * 350
    assert stamp_files(tmp_path, []) == []
