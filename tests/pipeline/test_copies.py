"""How many copies of a model's weights are in memory at once, by the storages of all live tensors."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from globalopt.models import tensor_file
from globalopt.pipeline import finish, measure
from solvers.sparsegpt import SparseGPT
from tests.command import done, write_text
from tests.tiny_models import VOCAB, save_tiny

NOISE = 0.3
"""Of a copy: hidden states, Grams, and tensors of a layer."""

LOOKS = 2
"""Calls of a function at which tensors are counted, as that takes a while."""


def held() -> int:
    """Bytes of all tensors in memory that were made in this test, each storage once."""
    gc.collect()
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        # By its type: some things answer to their class with a warning.
        if issubclass(type(thing), Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@pytest.fixture(autouse=True)
def nothing_before() -> Iterator[None]:
    """Leave out what there was before: the collector lists none of it, and goes through half a million objects less."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Copies:
    """Count copies of a model when functions are called: the most by name."""

    def __init__(self, parameters: int) -> None:
        self.unit = 4 * parameters
        self.most: dict[str, float] = {}

    def watch(self, patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)
        calls = itertools.count()

        def watching(*arguments: Any, **options: Any) -> Any:
            if next(calls) < LOOKS:
                copies = held() / self.unit
                self.most[name] = max(copies, self.most.get(name, 0.0))
            return function(*arguments, **options)

        patch.setattr(owner, name, watching)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "model")
    write_text(tmp_path / "text.txt")
    return tmp_path


def parameters(place: Path) -> int:
    return LlamaForCausalLM.from_pretrained(place / "model").num_parameters()


def words(place: Path, *more: str) -> tuple[object, ...]:
    sizes = ("--nsamples", 4, "--seqlen", 16, "--eval-windows", 2, "--samples", 1, "--batch-size", 2)
    command = ("compress", place / "model", "--budget", 0.5, "--solver", "sparsegpt", *more, "--device", "cpu")
    return (*command, "--calibration", place / "text.txt", *sizes, "--quiet", "--out", place / "run")


def test_one_copy_is_held_until_the_model_is_saved_and_two_in_its_evaluation(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = Copies(parameters(place))
    copies.watch(monkeypatch, SparseGPT, "solve_site")
    copies.watch(monkeypatch, tensor_file, "_body")
    copies.watch(monkeypatch, measure, "evaluate_both")
    copies.watch(monkeypatch, measure, "write_samples")
    done(*words(place))
    expected = {"solve_site": 1, "_body": 1, "evaluate_both": 2, "write_samples": 2}
    assert copies.most.keys() == expected.keys()
    for name, count in expected.items():
        # Not fewer either: that the tensors are seen at all.
        assert count <= copies.most[name] <= count + NOISE, copies.most


def test_measuring_later_and_matching_predictions_hold_two(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = Copies(parameters(place))
    copies.watch(monkeypatch, measure, "evaluate_both")
    copies.watch(monkeypatch, finish, "teacher_distributions")
    done(*words(place, "--match", "model", "--no-evaluate"))
    assert copies.most.keys() == {"teacher_distributions"}
    done(*words(place, "--match", "model"))
    for name in ("teacher_distributions", "evaluate_both"):
        assert 2 <= copies.most[name] <= 2 + NOISE, copies.most
