"""Render conversations, lists of messages with a role and a content, as the text that a model was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from globalopt.errors import CalibrationError, one_line
from globalopt.text.beginning import prefix_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("messages", "conversations")
"""Columns of a table that hold conversations, the first one first."""

ROLES = {"human": "user", "gpt": "assistant"}
"""Roles under their names in files whose messages have the keys `from` and `value`."""


@dataclass(frozen=True, eq=False)
class Chat:
    """Render conversations with the chat template of a tokenizer.

    Args:
        tokenizer: of the model; it need not have a chat template before a conversation is rendered.
        begin: text with which windows, or whole texts, begin already. It is left out where a template writes it too, so
            that no window has two.

    >>> from globalopt.pipeline.example import example_tokenizer
    >>> tokenizer = example_tokenizer()
    >>> tokenizer.chat_template = "{% for m in messages %}{{ m.role }}, {{ m.content }}. {% endfor %}"
    >>> messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    >>> Chat.of(tokenizer, "auto").render(messages, "a.jsonl line 1")
    'user, hello. assistant, good day. '
    """

    tokenizer: PreTrainedTokenizerBase
    begin: str = ""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, bos: str) -> Chat:
        """Make the renderer for windows that begin as `bos` says, one of `BOS_CHOICES`."""
        # Without a beginning of every window, the tokenizer still puts one in front of the whole text.
        prefix = prefix_of(tokenizer, bos) or prefix_of(tokenizer, "auto")
        return cls(tokenizer, "".join(tokenizer.convert_ids_to_tokens(list(prefix))))

    @property
    def has_template(self) -> bool:
        """Tell whether the tokenizer has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def render(self, messages: Any, where: str, reply: bool = False) -> str:
        """Render a conversation.

        Args:
            messages: list of mappings with `role` and `content`, or with `from` and `value`.
            where: place of the conversation, for messages.
            reply: end where the model would reply.
        Raises:
            CalibrationError: the tokenizer has no chat template, or it cannot render the messages.
        """
        if not isinstance(messages, list) or not messages:
            raise CalibrationError(f"{where} holds no messages; a conversation is a list of them, at least one.")
        rows = [_message(message, where) for message in messages]
        if not self.has_template:
            raise CalibrationError(
                f"{where} holds messages, and the tokenizer {name_of(self.tokenizer)} has no chat template to write "
                "them with. Name a column of text with --text-column, or give a tokenizer with a template."
            )
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=reply)
        # Templates are programs that came with the model, and fail in their own ways.
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as cause:
            raise CalibrationError(
                f"{where}: the chat template of {name_of(self.tokenizer)} does not take these messages: "
                f"{one_line(cause, None).rstrip('.')}."
            ) from cause
        assert isinstance(text, str)
        return text.removeprefix(self.begin)


def name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the name or path of a tokenizer, or the name of its class.

    >>> from globalopt.pipeline.example import example_tokenizer
    >>> name_of(example_tokenizer())
    'TokenizersBackend'
    """
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__


def _message(message: Any, where: str) -> dict[str, Any]:
    """Return a message under the keys of chat templates; keys without a value, which tables have, are left out."""
    keys: Any = sorted(message) if isinstance(message, Mapping) else type(message).__name__
    if isinstance(message, Mapping):
        found = {name: value for name, value in message.items() if value is not None}
        if "from" in found and "role" not in found:
            found = {"role": ROLES.get(found["from"], found["from"]), "content": found.get("value", "")}
        if isinstance(found.get("role"), str):
            return found
    raise CalibrationError(f"{where} holds a message without a role and a content: {keys}.")
