"""Find the tokens with which every window begins: those that a tokenizer puts in front of a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from globalopt.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOS_CHOICES = ("auto", "yes", "no")
"""Whether every window begins as the tokenizer begins a text: "auto" does as the tokenizer does."""


def prefix_of(tokenizer: PreTrainedTokenizerBase, choice: str) -> tuple[int, ...]:
    """Return the tokens with which every window begins.

    Args:
        choice: "no": none, then only the text as a whole begins as the tokenizer says; "auto": those that the tokenizer
            puts in front of every text, if any; "yes": those, or else the tokenizer's BOS token.
    Raises:
        UsageError: "yes", and the tokenizer has no BOS token; or there is no such choice.

    >>> from transformers import AutoTokenizer
    >>> from globalopt.reference import reference_folder
    >>> tokenizer = AutoTokenizer.from_pretrained(reference_folder())
    >>> prefix_of(tokenizer, "auto"), tokenizer.decode(prefix_of(tokenizer, "yes"))
    ((), '<s>')
    """
    if choice not in BOS_CHOICES:
        raise UsageError(f"--bos is {' or '.join(BOS_CHOICES)}; got {choice}.")
    if choice == "no":
        return ()
    encoded, bare = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (True, False))
    places = range(1, len(encoded) - len(bare) + 1)
    found = next((i for i in places if encoded[i : i + len(bare)] == bare), 0) if bare != encoded[: len(bare)] else 0
    if found or choice == "auto":
        return tuple(encoded[:found])
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        raise UsageError("--bos yes needs a tokenizer with a BOS token, and this one has none; use --bos no.")
    return (bos,)
