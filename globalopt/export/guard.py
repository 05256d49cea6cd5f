"""Stop programs that do not know the packed format before they load a packed model as another one.

transformers skips a quantization method that it does not know, and with `ignore_mismatched_sizes=True` it puts random
weights where shapes do not fit. But it takes the name of the weight file from the field `transformers_weights` of
`config.json` if there is one, and refuses a name that is none, with that name in its message: so the field says what to
do. Our quantizer takes it out before files are looked for.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from globalopt.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FIELD = "transformers_weights"
NOTICE = "this model is packed by globalopt; install globalopt and run `import globalopt` before loading it"
_CONFIG = "config.json"


def place(model: PreTrainedModel) -> None:
    """Make `model.save_pretrained` write the notice too; transformers leaves the field out of what it saves.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> model = tiny_llama()
    >>> place(model)
    >>> model.save_pretrained("packed")
    >>> json.loads(Path("packed/config.json").read_text())["transformers_weights"]
    'this model is packed by globalopt; install globalopt and run `import globalopt` before loading it'
    """
    held: Any = model
    # Of the instance: no class of transformers is changed for models that are not packed.
    held.save_pretrained = functools.partial(_save, model)


def remove(model: PreTrainedModel) -> None:
    """Make `model.save_pretrained` that of transformers again; a model that is not packed stays as it is.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> model = tiny_llama()
    >>> place(model)
    >>> remove(model)
    >>> model.save_pretrained("dense")
    >>> "transformers_weights" in json.loads(Path("dense/config.json").read_text())
    False
    """
    vars(model).pop("save_pretrained", None)


def without_notice(config: Any) -> Any:
    """Return the content of a `config.json` without the notice; any other value of the field is kept.

    >>> without_notice({"hidden_size": 16, FIELD: NOTICE})
    {'hidden_size': 16}
    """
    if isinstance(config, dict) and config.get(FIELD) == NOTICE:
        return {name: value for name, value in config.items() if name != FIELD}
    return config


def _save(model: PreTrainedModel, save_directory: str | Path, *args: Any, **options: Any) -> None:
    """Save a packed model as transformers does, then add the notice to its config."""
    if options.get("push_to_hub"):
        # transformers would upload the config before the notice is in it.
        raise UsageError(
            "A packed model is not saved and pushed in one step: call model.push_to_hub(repo_id), or save_pretrained "
            "without push_to_hub."
        )
    type(model).save_pretrained(model, save_directory, *args, **options)
    path = Path(save_directory) / _CONFIG
    # Processes of a distributed save other than the first write no config.
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8")) | {FIELD: NOTICE}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
