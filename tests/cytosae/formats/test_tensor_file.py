"""Files of safetensors that we write contain a digest of their tensors, which the format itself has not."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cytosae.formats.checkpoint import SaeCheckpointError, load_sae
from cytosae.formats.saelens import SAELENS_WEIGHTS, write_saelens
from cytosae.formats.tensor_file import DIGEST_KEY, digest_tensors, write_safetensors
from cytosae.sae.registry import make_sae


def _flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_damaged_tensors_and_a_changed_config_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, make_sae("relu", 8, 16), {"seed": 42})
    whole = path.read_bytes()
    assert load_sae(path).cfg["seed"] == 42
    for at in (len(whole) - 1, len(whole) // 2, whole.index(b"42")):
        path.write_bytes(whole)
        _flip(path, at)
        with pytest.raises(SaeCheckpointError, match="a.safetensors was changed or damaged after it was written"):
            load_sae(path)


def test_damaged_weights_of_an_exported_saelens_folder_are_refused(tmp_path):
    write_saelens(tmp_path / "x", make_sae("relu", 8, 16), {}, write=lambda path, data: path.write_bytes(data))
    load_sae(tmp_path / "x")
    _flip(tmp_path / "x" / SAELENS_WEIGHTS, -1)
    with pytest.raises(SaeCheckpointError, match=f"{SAELENS_WEIGHTS} was changed or damaged after it was written"):
        load_sae(tmp_path / "x")


def test_files_without_a_digest_are_read(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, make_sae("relu", 8, 16), {})
    with_digest = load_sae(path).sae.state_dict()
    with safe_open(path, framework="pt") as file:
        metadata = {name: text for name, text in file.metadata().items() if name != DIGEST_KEY}
    save_file(load_file(path), path, metadata=metadata)
    torch.testing.assert_close(load_sae(path).sae.state_dict(), with_digest, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_the_digest_covers_names_types_and_shapes(dtype):
    tensor = torch.arange(6).to(dtype)
    every = [{"a": tensor}, {"b": tensor}, {"a": tensor.view(2, 3)}, {"a": tensor.flip(0)}, {"a": tensor[:0]}, {}]
    assert len({digest_tensors(state) for state in every}) == len(every)
    assert digest_tensors({"a": torch.zeros(())}) != digest_tensors({"a": torch.zeros(1)})
