"""Read the prompts that a model goes on with when it writes its own calibration text."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from globalopt.errors import CalibrationError
from globalopt.text.messages import Chat
from globalopt.text.reading import file_content, jsonl_rows

FORMS = "a .txt file with one prompt per line, or a .jsonl file with a column `prompt` or `messages`"
"""The forms in which prompts can be given, for messages."""


@dataclass(frozen=True)
class Prompts:
    """Hold prompts as the model reads them.

    Args:
        texts: the prompts, rendered with the chat template where there is one.
        chat: whether they were rendered.
        file: their file, as the user gave it.

    >>> Prompts(("Once upon a time",), chat=False, file="prompts.txt").record()["number"]
    1
    """

    texts: tuple[str, ...]
    chat: bool
    file: str

    @property
    def sha256(self) -> str:
        """Hash the prompts in their order."""
        return hashlib.sha256("\0".join(self.texts).encode()).hexdigest()

    def record(self) -> dict[str, Any]:
        """Describe the prompts in JSON values."""
        return {"file": self.file, "sha256": self.sha256, "number": len(self.texts), "chat": self.chat}


def read_prompts(file: str, chat: Chat) -> Prompts:
    """Read prompts, and render them with the chat template of the tokenizer where it has one.

    A line of a `.txt` file, or the value of `prompt`, is what a user says; `messages` is a conversation to reply to,
    which needs a template.

    Raises:
        CalibrationError: the file is missing, holds no prompts, or a prompt is empty or broken.

    >>> from globalopt.pipeline.example import example_tokenizer
    >>> _ = Path("prompts.txt").write_text("once upon a time" + chr(10) + "a rank is" + chr(10))
    >>> read_prompts("prompts.txt", Chat.of(example_tokenizer(), "auto")).texts
    ('once upon a time', 'a rank is')
    """
    path = Path(file)
    kind = path.suffix.lower()
    if kind not in (".txt", ".jsonl"):
        raise CalibrationError(f"Cannot read prompts from '{file}'; give {FORMS}.")
    content = file_content(path)
    found: list[str] = []
    if kind == ".txt":
        for number, line in enumerate(content.split("\n"), start=1):
            if line.strip():
                found.append(_rendered(line.strip(), chat, f"{file} line {number}"))
    else:
        for where, row in jsonl_rows(content, path):
            if row.get("messages") is not None:
                found.append(chat.render(row["messages"], where, reply=True))
            elif isinstance(row.get("prompt"), str) and row["prompt"].strip():
                found.append(_rendered(row["prompt"], chat, where))
            else:
                raise CalibrationError(f"{where} has no `prompt` or `messages`; it has: {', '.join(row)}.")
    if not found:
        raise CalibrationError(f"{file} holds no prompts; give {FORMS}.")
    return Prompts(tuple(found), chat.has_template, file)


def _rendered(prompt: str, chat: Chat, where: str) -> str:
    """Write what a user says as the model reads it."""
    if not chat.has_template:
        return prompt
    return chat.render([{"role": "user", "content": prompt}], where, reply=True)
