from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from globalopt.errors import ArtefactError, NumericalError, UsageError
from globalopt.matching.parameters import Trainable
from globalopt.matching.training import Trained, Training, train
from globalopt.runs.files import write_tensors


class Line(Trainable):
    """Two numbers `a`, `b`; batch i asks for `a x_i + b = y_i`."""

    def __init__(self) -> None:
        self.a, self.b = nn.Parameter(torch.tensor([0.2])), nn.Parameter(torch.tensor([3.0]))
        self.layers, self.norms = {}, {"slope.weight": self.a, "height.bias": self.b}

    def loss(self, i: int) -> Tensor:
        return (self.a * i + self.b - (2 * i + 1)).square().sum()


def trained(options: Training, line: Line | None = None, batches: int = 8, **named) -> tuple[Line, Trained]:
    line = line or Line()
    return line, train(line, line.loss, batches, options, seed=3, where="a line", **named)


def test_it_finds_the_line():
    line, found = trained(Training(epochs=200, rate=0.05, held_out=0.0))
    assert found.after < 0.05 * found.before
    assert float(line.a.detach()) == pytest.approx(2, abs=0.3)


def test_the_best_epoch_is_kept_and_patience_ends_it():
    line = Line()
    asked: list[float] = []

    def held_out_rises(i: int) -> Tensor:
        # What is trained on falls with a; what is held out (batch 7) is best after two steps of 0.1.
        loss = (line.a - 0.4).square().sum() if i == 7 else -line.a.sum()
        if i == 7:
            asked.append(float(loss.detach()))
        return loss

    options = Training(epochs=50, rate=0.1 / 7, floor=1.0, relative=False, held_out=0.125, patience=3)
    found = train(line, held_out_rises, 8, options, seed=0, where="a line")
    assert (found.kept_epoch, found.epochs) == (2, 5)
    assert found.after == min(asked)
    assert float(line.a.detach()) == pytest.approx(0.4, abs=0.01)


def test_held_out_batches_are_not_trained_on():
    line = Line()
    with_gradient: set[int] = set()

    def loss(i: int) -> Tensor:
        if torch.is_grad_enabled():
            with_gradient.add(i)
        return line.loss(i)

    train(line, loss, 8, Training(epochs=2, held_out=0.25), seed=0, where="a line")
    assert with_gradient == set(range(6))


def test_nothing_got_better_so_the_start_is_kept():
    line = Line()
    before = line.state()
    found = train(line, lambda i: -line.a.sum() if i < 7 else line.a.sum(), 8, Training(), seed=0, where="a line")
    assert found.kept_epoch == 0
    assert found.before == found.after
    assert all(torch.equal(a, b) for a, b in zip(line.state(), before, strict=True))


def test_a_refused_epoch_is_taken_back_and_the_next_takes_smaller_steps():
    starts: list[float] = []
    line = Line()

    def loss(i: int) -> Tensor:
        if not torch.is_grad_enabled():
            return (line.a - 0.214).square().sum()
        starts.append(float(line.a.detach()))
        return -line.a.sum()

    options = Training(epochs=4, rate=0.1, floor=1.0, relative=False, held_out=0.5, patience=9)
    found = train(line, loss, 2, options, seed=0, where="a line")
    # One step an epoch: 0.3 is too far and refused, 0.21 is nearer, 0.22 is refused again.
    assert starts == pytest.approx([0.2, 0.2, 0.21, 0.21], abs=1e-4)
    assert (found.kept_epoch, found.epochs) == (4, 4)


def test_a_refused_epoch_leaves_no_moments_behind():
    starts: list[float] = []
    line = Line()

    def loss(i: int) -> Tensor:
        if not torch.is_grad_enabled():
            return (line.a - 0.24).square().sum()
        starts.append(float(line.a.detach()))
        # The first step is steep and refused. Its moments would make the next, of a flat slope, two thirds as long.
        return -line.a.sum() * (1.0 if len(starts) == 1 else 1e-3)

    options = Training(epochs=3, rate=0.1, floor=1.0, relative=False, held_out=0.5, patience=9)
    train(line, loss, 2, options, seed=0, where="a line")
    assert starts == pytest.approx([0.2, 0.2, 0.21], abs=1e-4)


def test_parameters_that_are_zero_are_trained_in_the_unit_of_their_norm():
    line = Line()
    line.norms = {"norm.weight": line.a, "norm.bias": line.b}
    with torch.no_grad():
        line.b.zero_()
    assert line.units() == pytest.approx([0.2, 0.2])
    train(line, lambda i: -(line.a + line.b).sum(), 1, Training(epochs=1, rate=0.1), seed=0, where="a line")
    assert float(line.b.detach()) == pytest.approx(0.02, rel=1e-3)
    with torch.no_grad():
        line.a.zero_()
        line.b.zero_()
    assert line.units() == [1.0, 1.0]


def test_without_held_out_batches_the_last_epoch_is_kept():
    _, found = trained(Training(epochs=3, rate=0.5, held_out=0.0, patience=9))
    assert (found.epochs, found.kept_epoch) == (3, 3)


def test_without_held_out_batches_only_the_start_and_the_end_are_judged():
    line = Line()
    judged: list[int] = []

    def loss(i: int) -> Tensor:
        if not torch.is_grad_enabled():
            judged.append(i)
        return line.loss(i)

    found = train(line, loss, 4, Training(epochs=5, held_out=0.0), seed=0, where="a line")
    assert judged == [0, 1, 2, 3] * 2
    assert found.after == pytest.approx(sum(float(line.loss(i).detach()) for i in range(4)) / 4)


def test_one_batch_is_trained_on_and_judged():
    _, found = trained(Training(epochs=3), batches=1)
    assert found.kept_epoch == 3
    assert found.after < found.before


def test_the_same_seed_gives_the_same_bits():
    first, second = trained(Training()), trained(Training())
    assert first[1] == second[1]
    assert torch.equal(first[0].a, second[0].a)


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_training_that_was_killed_ends_with_the_same_bits(tmp_path, stop):
    class Killed(Exception):
        pass

    epochs = 0

    def kill(detail: str) -> None:
        nonlocal epochs
        epochs += 1
        if epochs == stop:
            raise Killed

    options = Training(epochs=5, rate=0.1)
    whole, expected = trained(options)
    path: Path = tmp_path / "training.safetensors"
    with pytest.raises(Killed):
        trained(options, checkpoint=path, advance=kill)
    again, found = trained(options, checkpoint=path)
    assert found == expected
    assert torch.equal(again.a, whole.a)
    assert torch.equal(again.b, whole.b)


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    path = tmp_path / "training.safetensors"
    write_tensors(path, {"now:0": torch.zeros(1)}, {"epoch": 1})
    with pytest.raises(ArtefactError, match="is of another training"):
        trained(Training(), checkpoint=path)


def test_a_loss_that_is_not_finite():
    with pytest.raises(NumericalError, match="a line: the loss is nan"):
        train(Line(), lambda i: torch.tensor(torch.nan), 4, Training(), seed=0, where="a line")


@pytest.mark.parametrize("bad", [{"epochs": 0}, {"rate": -1.0}, {"held_out": float("nan")}, {"patience": 0}])
def test_options_out_of_range(bad):
    with pytest.raises(UsageError, match=next(iter(bad))):
        Training(**bad)
