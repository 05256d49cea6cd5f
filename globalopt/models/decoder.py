"""Find the decoder of a model, the list of its blocks and its token embedding, by structure.

No architecture is named. The decoder blocks are the decoder's list of modules that holds most parameters.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from globalopt.errors import UnsupportedModelError


def token_embedding(model: PreTrainedModel) -> nn.Embedding:
    """Return the embedding table of token ids.

    Raises:
        UnsupportedModelError: the model has none.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> token_embedding(tiny_llama())
    Embedding(64, 16)
    """
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise UnsupportedModelError(f"{type(model).__name__} has no token embedding; it is no model of text.")
    return embedding


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Find the decoder blocks: their module path, and the list of modules.

    Of all lists in the decoder with as many entries as the text config has hidden layers, it is the one with most
    parameters. The decoder is what the model itself says (`get_decoder`), without submodels that have a config of their
    own, such as a vision tower; where it has no such list, the whole model is searched.

    Raises:
        UnsupportedModelError: there is none.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> path, blocks = decoder_blocks(tiny_llama())
    >>> path, len(blocks)
    ('model.layers', 2)
    """
    text = model.config.get_text_config(decoder=True)
    depth = getattr(text, "num_hidden_layers", None)
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and (depth is None or len(module) == depth)
    ]
    if not lists:
        count = "" if depth is None else f" of the {depth} entries its config names"
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list{count} that could be its decoder blocks; "
            "only models that stack their blocks in one nn.ModuleList can be compressed."
        )
    configs = {path: module.config for path, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    owners = {path: configs[max((p for p in configs if _inside(path, p)), key=len)] for path, _ in lists}
    lists = [entry for entry in lists if any(owners[entry[0]] is config for config in (text, model.config))] or lists
    decoder = _decoder_path(model)
    lists = [entry for entry in lists if _inside(entry[0], decoder)] or lists
    # Of equally large lists, max returns the first, the outermost, as named_modules goes from the outside in.
    return max(lists, key=lambda entry: sum(parameter.numel() for parameter in entry[1].parameters()))


def _decoder_path(model: PreTrainedModel) -> str:
    """Return the module path of the decoder as the model names it; "" if it names none of its modules."""
    try:
        decoder = model.get_decoder()
    # Code that comes with a model may do anything here.
    except Exception:
        return ""
    return next((path for path, module in model.named_modules() if module is decoder), "")


def _inside(path: str, root: str) -> bool:
    """Tell whether the module path `path` is `root` or below it."""
    return not root or path == root or path.startswith(f"{root}.")
