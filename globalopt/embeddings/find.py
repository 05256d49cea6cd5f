"""Find the embedding matrices of a model: the token embedding, and the head where it has a matrix of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from globalopt.errors import ArtefactError, UnsupportedModelError
from globalopt.models.decoder import token_embedding
from globalopt.values.embeddings import Embedding


def find_embeddings(model: PreTrainedModel) -> tuple[Embedding, ...]:
    """Find the token embedding of a model, and its head unless the two are one matrix; both in 16 bits.

    Raises:
        UnsupportedModelError: the model has no token embedding, or a head that is no linear layer.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> [(each.name, each.rows, each.width) for each in find_embeddings(tiny_llama())]
    [('model.embed_tokens', 64, 16), ('lm_head', 64, 16)]
    """
    embedding, head = token_embedding(model), model.get_output_embeddings()
    found = [Embedding(_name(model, embedding), *embedding.weight.shape)]
    if head is None or head is embedding:
        return tuple(found)
    if not isinstance(head, nn.Linear):
        raise UnsupportedModelError(
            f"The head of {type(model).__name__} is no linear layer but {type(head).__name__}, which --embeddings "
            "cannot store. Leave the option out."
        )
    if not _same(head.weight, embedding.weight):
        found.append(Embedding(_name(model, head), *head.weight.shape))
    return tuple(found)


def check_embeddings(model: PreTrainedModel, chosen: Sequence[Embedding], source: Path) -> None:
    """Check that embeddings of a budget file are those of a model; none are right for every model.

    Raises:
        ArtefactError: they are others; names `source` and the first that is wrong.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> check_embeddings(tiny_llama(), [Embedding("embed", 64, 16, bits=8)], Path("budget.json"))
    Traceback (most recent call last):
    globalopt.errors.ArtefactError: budget.json belongs to another model: it stores the embeddings embed (64 x 16), ...
    """
    if not chosen:
        return
    mine = {(each.name, each.rows, each.width) for each in find_embeddings(model)}
    theirs = {(each.name, each.rows, each.width) for each in chosen}
    if mine != theirs:
        raise ArtefactError(
            f"{source} belongs to another model: it stores the embeddings {_said(theirs)}, this one has {_said(mine)}."
        )


def _name(model: PreTrainedModel, module: nn.Module) -> str:
    """Return the path of a module in a model."""
    return next(name for name, found in model.named_modules() if found is module)


def _same(one: Tensor, other: Tensor) -> bool:
    """Tell whether two parameters are tied: one object, or one place in memory."""
    # A model without weights has zeros that take no memory, all in one place.
    real = not one.is_meta and one.untyped_storage().nbytes() >= one.nbytes
    return one is other or (real and one.data_ptr() == other.data_ptr())


def _said(found: set[tuple[str, int, int]]) -> str:
    """List names and shapes."""
    return " and ".join(f"{name} ({rows} x {width})" for name, rows, width in sorted(found))
