"""Do the losses of a rounded embedding and a rounded head add up, as the search takes them to, where they are untied?

    python benchmarks/untied_embeddings.py --out OUT
    python benchmarks/untied_embeddings.py --out OUT --model FOLDER --text TEXT.txt

The head of a model whose head is tied is given a copy of its matrix first, which changes no prediction.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import cells
import torch
from finished_cells import Cells
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from globalopt.embeddings.coding import decode_matrix, encode_matrix
from globalopt.errors import UsageError
from globalopt.models.decoder import token_embedding
from globalopt.reference import reference_folder, text_file
from globalopt.runs.files import write_json
from reports import formats
from reports.table_style import add_numbers, footed, report_table

BITS = (16, 8, 6)


@dataclass(frozen=True)
class Pair:
    """Loss of an embedding and a head in few bits together, and the sum of what each loses alone; nats per token."""

    embedding: int
    head: int
    together: float
    apart: float


@dataclass(frozen=True)
class Pairs:
    """All pairs of one model."""

    found: tuple[Pair, ...]


def untied(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Give the head of a model a matrix of its own, and return those of the embedding and of the head."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UsageError(f"{type(model).__name__} has no head that is a linear layer. Give another --model.")
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    return token_embedding(model).weight, head.weight


@torch.no_grad()
def measure(folder: Path, text: Path, windows: int, seqlen: int, batch: int) -> Pairs:
    """Measure the KL to the dense model with every pair of bits, on the first windows of a text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    ids = AutoTokenizer.from_pretrained(folder)(text.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    if len(ids) < windows * seqlen:
        raise UsageError(f"{text} has {len(ids)} tokens; {windows} windows of {seqlen} need {windows * seqlen}.")
    tokens = torch.tensor(ids[: windows * seqlen]).view(windows, seqlen)
    matrices = untied(model)
    menu: list[dict[int, Tensor]] = [
        {bits: m.clone() if bits == 16 else decode_matrix(encode_matrix(m, bits), m.dtype) for bits in BITS}
        for m in matrices
    ]
    loss = {(e, h): 0.0 for e in BITS for h in BITS}
    for part in tokens.split(batch):
        dense = torch.empty(0)
        for pair in loss:
            for matrix, rounded, bits in zip(matrices, menu, pair, strict=True):
                matrix.copy_(rounded[bits])
            logits = model(part).logits[:, :-1].log_softmax(-1)
            # The first pair is that of 16 bits.
            dense = dense if len(dense) else logits
            loss[pair] += float((dense.exp() * (dense - logits)).sum(dtype=torch.float64)) / (windows * (seqlen - 1))
    few = [bits for bits in BITS if bits < 16]
    return Pairs(tuple(Pair(e, h, loss[e, h], loss[e, 16] + loss[16, h]) for e in few for h in few))


def work(options: argparse.Namespace, command: str) -> None:
    store = Cells(options.out / "cells", {})
    identity = {
        "model": str(options.model),
        "text": str(options.text),
        "windows": options.windows,
        "seqlen": options.seqlen,
    }

    def compute() -> Pairs:
        return measure(options.model, options.text, options.windows, options.seqlen, options.batch_size)

    pairs = store.get(Pairs, "pairs", identity, compute).found
    rows = report_table("An embedding and a head in few bits")
    add_numbers(rows, ("embedding", "head", "together", "sum", "ratio"))
    for pair in pairs:
        losses = (formats.significant(pair.together), formats.significant(pair.apart))
        rows.add_row(str(pair.embedding), str(pair.head), *losses, f"{pair.together / pair.apart:.3f}")
    write_json(options.out / "untied_embeddings.json", {"command": command, "cells": [asdict(pair) for pair in pairs]})
    said = "embedding, head: bits; sum: of what each loses while the other is dense; nats per token"
    cells.console().print(footed(rows, said))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--model", type=Path, default=reference_folder(), help="the bundled one if left out")
    parser.add_argument("--text", type=Path, default=text_file("selection"), help="the bundled selection text")
    parser.add_argument("--windows", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens per window (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="windows at once (%(default)s)")
    return cells.run_script(work, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
