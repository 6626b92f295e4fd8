"""A command that a message names works when it is copied, from a root folder with a blank in its name, too."""

import re
import shlex
import shutil

import numpy as np
import pytest

from tests.support.pictures import write_vit


def _commands(output: str) -> list[list[str]]:
    """The words of every command in a text, without the program's name."""
    found = re.findall(r"(?:(?:: |^ *)cytosae-cache |\(see: cytosae-cache )((?:\w+).*)$", output, re.MULTILINE)
    return [shlex.split(text.rstrip(").;")) for text in found]


@pytest.fixture
def elsewhere(with_sae, tmp_path):
    """The workspace below a folder with a blank."""
    place = type(with_sae)(tmp_path / "my files" / "root")
    place.root.parent.mkdir()
    shutil.move(with_sae.root, place.root)
    return place


def _follow(place, output: str, n: int = 1) -> str:
    commands = _commands(output)
    assert len(commands) == n, output
    return "".join(place.run_plain(*command).output for command in commands)


def test_train_then_features_then_report(elsewhere):
    output = elsewhere.train("--run_name", "again").output
    output = _follow(elsewhere, output)
    assert "wrote in" in output
    assert "open in a browser" in _follow(elsewhere, output)


def test_a_store_named_by_its_path_another_block_and_kind_are_kept(elsewhere):
    elsewhere.build("--block_layer", 1)
    store = sorted(elsewhere.root.glob("out/activations/toy/*.zarr"))[0]
    output = elsewhere.train("--store", store, "--run_name", "s").output
    (words,) = _commands(output)
    assert str(store) in words
    _follow(elsewhere, output)
    output = elsewhere.train("--block_layer", 1, "--vit_type", "mine", "--run_name", "b").output
    _follow(elsewhere, _follow(elsewhere, output))
    assert (elsewhere.root / "out" / "feature_data" / "sae_b" / "mine" / "toy" / "report").is_dir()


def test_a_resumed_run_names_its_own_data_set(elsewhere):
    output = elsewhere.run("train", "--resume", "r").output
    assert "wrote in" in _follow(elsewhere, output)


def test_info_and_verify_take_the_option_that_they_recommend(elsewhere):
    elsewhere.build("--store-dtype", "float32")
    first, second = sorted(elsewhere.root.glob("out/activations/toy/*.zarr"))
    for verb in ("info", "verify"):
        output = elsewhere.run(verb, "--dataset_name", "toy", code=1).output
        assert "2 stores of data set 'toy' fit; choose one with --store PATH:" in output
        listed = [shlex.split(line)[0] for line in output.splitlines()[1:]]
        assert listed == [str(first), str(second)]
        for store in listed:
            elsewhere.run(verb, "--store", store)
            elsewhere.run(verb, store)
            elsewhere.run(verb, store, "--store", store)
        output = elsewhere.run(verb, str(first), "--store", str(second), code=2).output
        assert "leave one out" in " ".join(output.split())


def test_models_are_a_choice_only_if_they_differ(elsewhere):
    write_vit(elsewhere.root / "other.pth", name="other_vit")
    elsewhere.build("--model_path", elsewhere.root / "other.pth")
    output = elsewhere.run("info", "--dataset_name", "toy", code=1).output
    assert "--store PATH or --model_name NAME" in output
    elsewhere.run("info", "--dataset_name", "toy", "--model_name", "other_vit")


def test_what_is_missing_is_listed_from_the_same_root(elsewhere):
    for output in (
        elsewhere.run("features", "--dataset_name", "toy", "--sae_path", "none.pt", code=1).output,
        elsewhere.run("info", "none.zarr", code=1).output,
    ):
        assert str(elsewhere.store) in _follow(elsewhere, output)
    output = elsewhere.run("info", code=1).output
    assert f"(see: cytosae-cache list --root_dir '{elsewhere.root}')" in output


def test_a_missing_store_is_built_by_the_command_named(elsewhere):
    options = ("--images", elsewhere.images, "--layout", "class/patient")
    output = elsewhere.run("train", "--dataset_name", "new", *options, code=1).output
    (words,) = _commands(output)
    words = [str(elsewhere.vit) if word == "CHECKPOINT" else word for word in words]
    elsewhere.run_plain(*words, "--workers", 0)
    assert list(elsewhere.root.glob("out/activations/new/*.zarr"))


def test_unusable_results_are_computed_again_by_the_command_named(elsewhere):
    options = ("--dataset_name", "toy", "--sae_path", elsewhere.sae(), "--masking_images", 0)
    elsewhere.run("report", *options)
    for name in ("sae_sparsity.pt", "patient_counts.npz"):
        (elsewhere.features() / name).write_bytes(b"damaged")
        output = elsewhere.run("report", *options, code=1).output
        assert "wrote in" in _follow(elsewhere, output)
        elsewhere.run("report", *options)


def test_reused_results_name_the_command_that_honours_the_option(elsewhere):
    options = ("--dataset_name", "toy", "--sae_path", elsewhere.sae(), "--masking_images", 0)
    elsewhere.run("report", *options)
    more = ("--top_k", 3, "--threshold", 0.5, "--normalize", "none")
    output = elsewhere.run("report", *options, *more).output
    assert "wrote in" in _follow(elsewhere, output, 3)
    output = elsewhere.run("report", *options, *more).output
    assert "has no effect" not in output


def test_a_folder_of_the_demo_is_quoted(tmp_path):
    from cytosae_pipeline.demo.run import DemoResult

    root = tmp_path / "my demo"
    fields = dict.fromkeys(DemoResult.__dataclass_fields__, 0)
    text = DemoResult(**{**fields, "files": [], "root": root, "report": root / "index.html"}).describe()
    assert f"cytosae-cache list --root_dir '{root}'" in text


def test_what_was_interrupted_is_resumed_by_the_same_command(capsys, monkeypatch):
    from cytosae_pipeline.cli.output import messages

    def resume(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["cytosae-cache", *words])
        with pytest.raises(SystemExit), messages():
            raise KeyboardInterrupt
        return capsys.readouterr().err.splitlines()[-1].strip()

    command = "cytosae-cache build --dataset_name 'a b' --overwrite"
    assert resume("build", "--dataset_name", "a b", "--overwrite") == command
    assert resume() == "cytosae-cache"


def test_verify_gives_no_advice_to_build_again_for_files_that_are_not_its_own(elsewhere):
    (elsewhere.store / ".DS_Store").write_text("x")
    output = elsewhere.run("verify", "--dataset_name", "toy").output
    assert f"'{elsewhere.store}/.DS_Store'" in output
    assert "harmless" in output
    assert "--overwrite" not in output
    (elsewhere.store / "notes").mkdir()
    (elsewhere.store / "notes" / "mine.txt").write_text("x")
    output = elsewhere.run("verify", "--dataset_name", "toy", code=1).output
    assert f"'{elsewhere.store}/notes/' (1 file) does not belong to the store" in output
    assert "the store itself is sound" in output
    assert "--overwrite" not in output


def test_build_ends_with_a_training_command_that_finds_its_store(with_images):
    for options in ((), ("--block_layer", "0"), ("--store_dtype", "float32", "--block_layer", "0")):
        output = with_images.build(*options).output
        words = shlex.split(output.split("next: cytosae-cache ")[1].splitlines()[0])
        assert words[0] == "train"
        assert "--total_training_tokens" in words
        assert ("--store" in words) == (len(options) == 4)
        with_images.run_plain(*words, "--expansion_factor", "2", "--n_checkpoints", "0", "--device", "cpu")


def test_counts_end_with_the_command_that_shows_them(elsewhere):
    for verb in ("patients", "classes"):
        output = elsewhere.run(verb, "--dataset_name", "toy", "--sae_path", "latest").output
        assert f"look at them: cytosae-cache report --root_dir '{elsewhere.root}'" in output
        assert str(elsewhere.sae()) in output
    assert "open in a browser" in _follow(elsewhere, output)


def test_an_unfinished_store_beside_a_finished_one_is_no_choice(elsewhere, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    finished = elsewhere.store
    with monkeypatch.context() as patch:
        patch.setattr("cytosae_cache.writer.StoreWriter.finish", stop)
        elsewhere.build("--store_dtype", "float32", code=130)
    (unfinished,) = set(finished.parent.glob("*.zarr")) - {finished}
    output = elsewhere.run("verify", "--dataset_name", "toy").output
    assert f"taking the finished store '{finished}'; unfinished, and not used: '{unfinished}'" in output
    output = elsewhere.run("verify", "--store", unfinished, code=1).output
    assert "store_dtype float32" in _follow_build(elsewhere, output)
    assert "2 stores of data set 'toy' fit" in elsewhere.run("verify", "--dataset_name", "toy", code=1).output


def _follow_build(place, output: str) -> str:
    """Run the command that finishes a store; returns the command."""
    (words,) = _commands(output)
    assert "store (resumed): " in place.run_plain(*words).output
    return " ".join(words).replace("--", "")


def test_a_demo_ends_with_commands_that_work_once_the_paths_are_ones_own(demo_run, tmp_path, with_images):
    commands = [words for words in _commands(demo_run.output) if words[0] != "list"]
    assert [words[0] for words in commands] == ["build", "train", "features", "patients", "report"]
    own = {"PATH": str(with_images.images), "./DinoBloom-B.pth": str(with_images.vit)}
    quick = {
        "build": ["--layout", "class/patient", "--workers", "0"],
        "train": ["--total_training_tokens", "60", "--expansion_factor", "4"],
    }
    for words in commands:
        words = [own.get(word, word) for word in words]
        with_images.run_plain(*words, "--root_dir", tmp_path, *quick.get(words[0], []))
    assert list(tmp_path.glob("out/feature_data/*/custom/mine/report/index.html"))


def _stop(*_):
    raise KeyboardInterrupt


def test_every_command_that_is_printed_works_as_it_stands(elsewhere, monkeypatch, tmp_path):
    """Each verb and each error in turn: all that they print is run, in another folder than the one they ran in."""
    place, data = elsewhere, ("--dataset_name", "toy")
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32))
    shutil.copytree(place.sae().parent, place.root / "out" / "checkpoints" / "broken")
    place.sae("broken").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("cytosae_cache.writer.StoreWriter.finish", _stop)
        place.build("--dataset_name", "unfinished", "--images", place.images, "--layout", "class/patient", code=130)
    sae = (*data, "--sae_path", "r")
    printed = [
        place.build().output,
        place.run("import", tmp_path / "rows.npy", "--grid", "rows", "--dataset_name", "rows").output,
        place.run("train", "--resume", "r").output,
        place.run("features", *sae).output,
        place.run("classes", *sae).output,
        place.run("patients", *sae).output,
        place.run("report", *sae, "--n_latents", 3, "--top_k", 2).output,
        place.run("export", *sae[2:], "--out", tmp_path / "e.saelens").output,
        place.run("export", *sae, "--format", "csv", "--out", tmp_path / "tables").output,
        place.run("evaluate", *sae).output,
        place.run("list").output,
        place.run("features", *data, code=1).output,
        place.run("features", *data, "--sae_path", "misspelt", code=1).output,
        place.run("features", *data, "--sae_path", "broken", code=1).output,
        place.run("info", "gone.zarr", code=1).output,
        place.run("train", "--dataset_name", "unfinished", code=1).output,
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    commands = {tuple(words): None for output in printed for words in _commands(output)}
    assert {words[0] for words in commands} == {"build", "train", "features", "report", "list"}
    assert len(commands) >= 8
    for words in commands:
        place.run_plain(*words)
