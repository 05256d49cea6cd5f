"""Give a llama2.c model a Hugging Face tokenizer: read its `tokenizer.bin`, write `tokenizer.json`.

    python benchmarks/llama2c_tokenizer.py MODEL_FOLDER OUT_FOLDER

`OUT_FOLDER` becomes a copy of the model folder with the tokenizer files added; `MODEL_FOLDER` is left as it is.

llama2.c encodes greedily: a space is put before the text, every character becomes its entry or else its UTF-8 bytes,
and then, as long as there is one, the pair of neighbours whose concatenation is the entry with the best score is
merged, the leftmost first. This is byte-fallback BPE with one merge per way to cut an entry in two, ordered by score.
"""

from __future__ import annotations

import argparse
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import TokenizersBackend

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
SPECIAL = 3  # ids 0, 1, 2; then come 256 bytes
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


@dataclass(frozen=True)
class Entry:
    """One vocabulary entry; the higher the score, the earlier it is merged."""

    text: str
    score: float


def read_vocabulary(path: Path) -> list[Entry]:
    """Read a `tokenizer.bin`: int32 longest entry, then per entry float32 score, int32 length, UTF-8 bytes.

    Raises:
        ValueError: the file is cut short, its specials and bytes are not where llama2.c has them, or an entry repeats.
    """
    data = path.read_bytes()
    entries: list[Entry] = []
    at = 4
    while at < len(data):
        if at + 8 > len(data):
            raise ValueError(f"{path} is cut short: entry {len(entries)} has no score and length.")
        score, length = struct.unpack_from("<fi", data, at)
        at += 8
        if not 0 <= length <= len(data) - at:
            raise ValueError(f"{path} is broken: entry {len(entries)} says {length} bytes, {len(data) - at} are left.")
        entries.append(Entry(data[at : at + length].decode(), score))
        at += length
    texts = [entry.text for entry in entries]
    head = [text.strip() for text in texts[:SPECIAL]]
    if head != [UNK, BOS, EOS] or tuple(texts[SPECIAL : SPECIAL + 256]) != BYTES:
        raise ValueError(f"{path} is no llama2.c vocabulary: it must start with {UNK}, {BOS}, {EOS} and the 256 bytes.")
    repeated = [text for text, count in Counter(texts).items() if count > 1]
    if repeated:
        raise ValueError(f"{path} lists {repeated[0]!r} twice; which of them an encoder finds is undefined.")
    return entries


def cuts(text: str, known: frozenset[str]) -> Iterator[tuple[str, str]]:
    """The ways to cut an entry into two entries."""
    return ((text[:i], text[i:]) for i in range(1, len(text)) if text[:i] in known and text[i:] in known)


def merges(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """Every pair of entries that concatenates to an entry, best score of the result first.

    Raises:
        ValueError: BPE, which ranks pairs, would merge in another order than llama2.c, which ranks results and then
            goes from left to right: two results share a score, or one has two cuts that can overlap (`x y` and `y z`).
    """
    merged = [entry for entry in entries[SPECIAL:] if entry.text not in BYTES]
    known = frozenset(entry.text for entry in merged)
    pairs: list[tuple[str, str]] = []
    before: Entry | None = None
    for entry in sorted(merged, key=lambda entry: -entry.score):
        made = list(cuts(entry.text, known))
        if not made:
            continue
        if before is not None and before.score == entry.score:
            raise ValueError(f"Entries {before.text!r} and {entry.text!r} share the score {entry.score:g}.")
        if any(x != y and y == left for x, y in made for left, _ in made):
            raise ValueError(f"Entry {entry.text!r} can be cut in overlapping ways; no list of merges keeps its order.")
        pairs += made
        before = entry
    return pairs


def convert(entries: Sequence[Entry]) -> TokenizersBackend:
    """The tokenizer that encodes as llama2.c does, `<s>` first; text that reads `<s>` stays text."""
    names = [UNK, BOS, EOS, *(entry.text for entry in entries[SPECIAL:])]
    ids = {name: index for index, name in enumerate(names)}
    backend = Tokenizer(models.BPE(ids, merges(entries), unk_token=UNK, byte_fallback=True))
    backend.normalizer = normalizers.Prepend(" ")  # pyright: ignore[reportAttributeAccessIssue]
    backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, ids[BOS])]
    )
    steps = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    return TokenizersBackend(
        tokenizer_object=backend, unk_token=UNK, bos_token=BOS, eos_token=EOS, split_special_tokens=True
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL_FOLDER", help="with config, weights and tokenizer.bin")
    parser.add_argument("out", type=Path, metavar="OUT_FOLDER")
    options = parser.parse_args(arguments)
    entries = read_vocabulary(options.model / "tokenizer.bin")
    tokenizer = convert(entries)
    shutil.copytree(options.model, options.out, dirs_exist_ok=True)
    tokenizer.save_pretrained(options.out)
    print(f"{options.out}: the model with a tokenizer of {len(entries)} entries")
    return 0


if __name__ == "__main__":
    sys.exit(main())
