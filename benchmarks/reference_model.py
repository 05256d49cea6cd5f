"""Remake the bundled reference model: its texts and its weights.

    python benchmarks/reference_model.py text  WIKITEXT_FOLDER globalopt/reference/text
    python benchmarks/reference_model.py train WIKITEXT_FOLDER OUT [--extra NOVELS.txt] [--minutes 55]

`WIKITEXT_FOLDER` is the tokenised release of WikiText-2 with its three parts as train, valid and test (`train.txt`,
`wiki.train.tokens`, ...). `train` also takes any plain text file. Both are deterministic given the seed, except that a
training bounded by minutes takes as many steps as the machine manages.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, TokenizersBackend

from globalopt.evaluation.perplexity import evaluate
from globalopt.text.reading import Text, read_text
from globalopt.text.splits import consecutive_split

# Bytes of each slice, about; the articles of `valid` are halved between selection and validation.
SLICES = {"calibration": 1_000_000, "selection": 350_000, "validation": 350_000, "test": 500_000}

BOS, EOS = "<s>", "</s>"


# ---------------------------------------------------------------------------------------------------- text


def detokenise(text: str) -> str:
    """Undo WikiText's word splitting; headings (` = Title = `) and line breaks stay.

    `' @-@ '`, `' @,@ '` and `' @.@ '` become the bare sign, `<unk>` becomes `unk`, the space before `. , ; : ! ? ) ] '`
    and the one after `( [` go.
    """
    for spaced, plain in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), ("<unk>", "unk")):
        text = text.replace(spaced, plain)
    text = re.sub(r" ([.,;:!?)\]'])", r"\1", text)
    return re.sub(r"([(\[]) ", r"\1", text)


def articles(text: str) -> list[str]:
    """Cut WikiText before every title, a line ` = Title = ` between blank lines; `"".join` gives the text back.

    Raises:
        ValueError: there is no title.
    """
    lines = ["", *text.splitlines(keepends=True), ""]
    starts = [
        i
        for i in range(1, len(lines) - 1)
        if re.fullmatch(r" = [^=\n]+ = \n", lines[i]) and not lines[i - 1].strip() and not lines[i + 1].strip()
    ]
    if not starts:
        raise ValueError("There is no line ' = Title = ' in the text; this is not WikiText.")
    bounds = [0, *starts[1:], len(lines)]
    return ["".join(lines[a:b]) for a, b in itertools.pairwise(bounds)]


def spread(pieces: Sequence[str], size: int) -> str:
    """Whole pieces in their order, evenly spread over all of them: `size` bytes together, give or take a piece.

    A piece is taken whenever too little is held for how far we are, whatever its own length, so that short pieces are
    not favoured.
    """
    lengths = [len(piece.encode()) for piece in pieces]
    total = sum(lengths)
    seen = held = 0
    chosen = []
    for piece, length in zip(pieces, lengths, strict=True):
        seen += length
        if held * total < size * (seen - length / 2):
            chosen.append(piece)
            held += length
    return "".join(chosen)


def wikitext_part(folder: Path, part: str) -> str:
    """Text of one part (train, valid, test) of a WikiText folder, under any of the names it is released with."""
    names = (f"{part}.txt", f"wiki.{part}.tokens", f"wiki.{part}.raw")
    for name in names:
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8")
    raise FileNotFoundError(f"{folder} holds none of {', '.join(names)}.")


def make_slices(folder: Path) -> dict[str, str]:
    """The four texts of `SLICES`, detokenised; no two share an article."""
    train, valid, test = (articles(wikitext_part(folder, part)) for part in ("train", "valid", "test"))
    half = len(valid) // 2
    sources = {"calibration": train, "selection": valid[:half], "validation": valid[half:], "test": test}
    return {name: detokenise(spread(sources[name], size)) for name, size in SLICES.items()}


def write_slices(folder: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, text in make_slices(folder).items():
        (out / f"{name}.txt").write_text(text, encoding="utf-8", newline="")
        print(f"{name}.txt: {len(text.encode()):,} bytes, {len(articles(text))} articles")


# ------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class Recipe:
    """Settings of the model and its training; the defaults are those of the bundled model.

    Training stops at `steps`, at `minutes`, or at whichever comes first; the learning rate rises over `warmup` steps,
    is flat for the first `flat` of the training and falls as a cosine to `floor` of its peak.
    """

    vocabulary: int = 4096
    blocks: int = 8
    width: int = 256
    ffn: int = 704
    heads: int = 8
    kv_heads: int = 4
    context: int = 512
    seqlen: int = 256
    batch: int = 8
    lr: float = 3e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    warmup: int = 200
    flat: float = 0.3
    floor: float = 0.02
    steps: int | None = None
    minutes: float | None = 55.0
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("Give --steps, --minutes or both: without either the training has no end.")

    def learning_rate(self, step: int, done: float) -> float:
        """Rate of `step` (from 0) when the fraction `done` of the training is over."""
        rate = self.lr * min(1.0, (step + 1) / self.warmup)
        if done <= self.flat:
            return rate
        fall = min(1.0, (done - self.flat) / (1 - self.flat))
        return rate * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * fall)) / 2)


def train_tokenizer(text: str, vocabulary: int) -> TokenizersBackend:
    """Byte-level BPE with `vocabulary` entries, `<s>` and `</s>` first; it adds neither by itself."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(text.splitlines(keepends=True), trainer)
    return TokenizersBackend(tokenizer_object=backend, bos_token=BOS, eos_token=EOS)


def build_model(recipe: Recipe, vocabulary: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.width,
        intermediate_size=recipe.ffn,
        num_hidden_layers=recipe.blocks,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def optimizer_of(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95))


def train_model(tokens: Tensor, recipe: Recipe, vocabulary: int, checkpoint: Path | None = None) -> LlamaForCausalLM:
    """Train a Llama on random windows of `tokens` (one long sequence).

    With `checkpoint`, the state is kept there every minute and a run that finds the file goes on from it; the file is
    removed at the end.
    """
    if len(tokens) <= recipe.seqlen:
        raise ValueError(f"{len(tokens)} tokens do not hold one window of {recipe.seqlen}.")
    torch.manual_seed(recipe.seed)
    draw = torch.Generator().manual_seed(recipe.seed)
    with torch.device(recipe.device):
        model = build_model(recipe, vocabulary).train()
    optimizer = optimizer_of(model, recipe)
    step, before = 0, 0.0
    if checkpoint and checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        draw.set_state(state["draw"])
        step, before = state["step"], state["seconds"]
        print(f"going on from step {step}")

    offsets = torch.arange(recipe.seqlen)
    began = saved = shown = time.monotonic()
    average = None
    while True:
        now = time.monotonic()
        seconds = before + now - began
        by_steps = step / recipe.steps if recipe.steps is not None else 0.0
        by_time = seconds / (60 * recipe.minutes) if recipe.minutes is not None else 0.0
        done = max(by_steps, by_time)
        if checkpoint and now - saved > 60:
            _save_checkpoint(checkpoint, model, optimizer, draw, step, seconds)
            saved = now
        if average is not None and (done >= 1 or now - shown > 10):
            print(f"step {step}: loss {average:.3f} nats, {100 * min(done, 1):.1f} % of the training", flush=True)
            shown = now
        if done >= 1:
            break
        rate = recipe.learning_rate(step, done)
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(tokens) - recipe.seqlen + 1, (recipe.batch, 1), generator=draw)
        batch = tokens[starts + offsets].to(recipe.device)
        with torch.autocast(torch.device(recipe.device).type, dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        step += 1
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    return model.eval()


def _save_checkpoint(
    path: Path,
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    draw: torch.Generator,
    step: int,
    seconds: float,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "draw": draw.get_state()}
    torch.save({**state, "step": step, "seconds": seconds}, part)
    part.replace(path)


def train(
    source: Path, out: Path, recipe: Recipe, extra: Path | None = None, extra_characters: int = 6_000_000
) -> None:
    """Learn the tokenizer, train, evaluate, and write a Hugging Face folder with a model card to `out`.

    Args:
        source: a WikiText-2 folder (its valid and test parts are then evaluated), or a plain text file.
        extra: a text file whose first `extra_characters` are trained on as well; the tokenizer does not see it.
    """
    held_out: dict[str, str] = {}
    if source.is_dir():
        text = detokenise(wikitext_part(source, "train"))
        held_out = {part: detokenise(wikitext_part(source, part)) for part in ("valid", "test")}
    else:
        text = read_text(str(source)).text
    tokenizer = train_tokenizer(text, recipe.vocabulary)
    corpus = text + (read_text(str(extra)).text[:extra_characters] if extra else "")
    tokens = torch.tensor(tokenizer(corpus, verbose=False)["input_ids"])
    print(f"{len(tokens):,} tokens, vocabulary {len(tokenizer)}")

    model = train_model(tokens, recipe, len(tokenizer), out / "checkpoint.pt")
    # What is measured is what is stored, rounded to 16 bits; it is computed in float32.
    model = model.bfloat16().float()
    lines = []
    for part, held in held_out.items():
        split = consecutive_split(tokenizer, Text.of(held, f"WikiText-2 {part}"), part, recipe.seqlen)
        measured = evaluate(model, split)
        lines.append(f"* {part}: perplexity {measured.perplexity:.1f} on {measured.windows} windows of {recipe.seqlen}")
        print(lines[-1][2:])
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "README.md").write_text(_card(model, recipe, source, extra, len(tokens), lines), encoding="utf-8")


def _card(
    model: LlamaForCausalLM, recipe: Recipe, source: Path, extra: Path | None, tokens: int, quality: Sequence[str]
) -> str:
    settings = "\n".join(f"| {name} | {value} |" for name, value in vars(recipe).items())
    return (
        f"# A small Llama trained on {source.name}\n\n"
        f"{model.num_parameters():,} parameters; {tokens:,} tokens of training text"
        f"{f', the end of it from {extra.name}' if extra else ''}; made by benchmarks/reference_model.py.\n\n"
        + "".join(f"{line}\n" for line in quality)
        + f"\n| setting | value |\n|---|---|\n{settings}\n"
    )


# ------------------------------------------------------------------------------------------------- command


def parser() -> argparse.ArgumentParser:
    default = Recipe()
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    text = commands.add_parser("text", help="cut the four texts out of WikiText-2")
    text.add_argument("source", type=Path)
    text.add_argument("out", type=Path)
    fit = commands.add_parser("train", help="train a tokenizer and a model", argument_default=argparse.SUPPRESS)
    fit.add_argument("source", type=Path)
    fit.add_argument("out", type=Path)
    fit.add_argument("--extra", type=Path, help="more training text, its first 6 M characters")
    fit.add_argument("--steps", type=int, help="stop after so many steps")
    fit.add_argument(
        "--minutes", type=float, help=f"stop after so many minutes ({default.minutes:g}; none with --steps)"
    )
    for name in (
        "vocabulary",
        "blocks",
        "width",
        "ffn",
        "heads",
        "kv_heads",
        "context",
        "seqlen",
        "batch",
        "warmup",
        "seed",
    ):
        value = getattr(default, name)
        fit.add_argument(f"--{name.replace('_', '-')}", dest=name, type=int, help=f"default {value}")
    fit.add_argument("--lr", type=float, help=f"default {default.lr:g}")
    fit.add_argument("--device", help="default cpu")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    given = vars(parser().parse_args(arguments))
    command, source, out = given.pop("command"), given.pop("source"), given.pop("out")
    if command == "text":
        write_slices(source, out)
        return 0
    extra = given.pop("extra", None)
    if "steps" in given:
        given.setdefault("minutes", None)
    train(source, out, Recipe(**given), extra)
    return 0


if __name__ == "__main__":
    sys.exit(main())
