"""A file that is written tensor by tensor is the one that safetensors writes; a saved model takes no second copy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from globalopt.models import saving
from globalopt.models.saving import save_dense
from globalopt.models.tensor_file import TYPES, Pending, write_tensors
from tests.tiny_models import VOCAB, tiny_tokenizer


def pending(tensor: Tensor) -> Pending:
    return Pending(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def test_the_file_is_that_of_safetensors(tmp_path: Path) -> None:
    tensors = {f"x{n}.{name}": torch.ones(n, 3).to(dtype) for n, (name, dtype) in enumerate(TYPES.items())}
    tensors |= {"ü": torch.arange(6.0).view(2, 3), "one": torch.tensor(3.0), "none": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    write_tensors(tmp_path / "ours", {name: pending(x) for name, x in tensors.items()}, {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    # What has no memory of its own is written all the same.
    views = {"t": tensors["ü"].T, "u": tensors["ü"]}
    write_tensors(tmp_path / "views", {name: pending(x) for name, x in views.items()}, {})
    found = load_file(tmp_path / "views")
    assert all(torch.equal(found[name], x) for name, x in views.items())


def test_a_tensor_that_is_not_as_described_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="x"):
        write_tensors(tmp_path / "file", {"x": Pending(torch.float32, (2,), lambda: torch.zeros(3))}, {})


@pytest.mark.parametrize("stored", [False, True])
def test_one_tensor_at_a_time_is_made(stored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model: PreTrainedModel = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path / "origin")
    alive: list[int] = []
    held = 0

    class Counted:
        """The memory of a tensor that is made, while it is held."""

        def __init__(self, size: int) -> None:
            nonlocal held
            self.size = size
            held += size
            alive.append(held)

        def __del__(self) -> None:
            nonlocal held
            held -= self.size

    settle = saving.StoredTensors.settle

    def counting(self: saving.StoredTensors, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        made = settle(self, name, tensor, dtype)
        made.counted = Counted(made.nbytes)  # pyright: ignore[reportAttributeAccessIssue]
        return made

    monkeypatch.setattr(saving.StoredTensors, "settle", counting)
    origin = tmp_path / "origin" if stored else None
    save_dense(model.float(), tiny_tokenizer(), tmp_path / "saved", torch.bfloat16, origin)
    assert len(alive) == len(load_file(tmp_path / "saved" / "model.safetensors"))
    largest = max(p.numel() for p in model.parameters()) * torch.bfloat16.itemsize
    assert max(alive) <= largest
    assert held == 0
