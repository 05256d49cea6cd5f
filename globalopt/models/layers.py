"""Find the compressible layers of a model by its structure: decoder blocks, linear layers, and shared inputs.

No architecture is named. The decoder blocks are the decoder's list of modules that holds most parameters; the layers
are the linear maps inside them; layers that read the very same tensor in one short forward pass share an input site.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from globalopt.errors import (
    GlobalOptError,
    NumericalError,
    UnknownNameError,
    UnsupportedModelError,
    UsageError,
    one_line,
)
from globalopt.models.reach import unreached
from globalopt.models.streaming import LazyBlocks, lazy_blocks
from globalopt.values.layer import LayerSpec

Linear = nn.Linear | Conv1D
"""Modules that are compressed: `Conv1D` is the linear layer of GPT-2, with its weight transposed."""
TRACE_TOKENS = 8
"""Tokens of the forward pass that finds out which layers share an input."""
FORESIGHT = 5e-4
"""Largest change of logits before a token that was changed, as a share of the change at it, in a causal model."""
FORESIGHT_16_BITS = 0.05
"""The same in bfloat16 and float16, where rounding may differ between the rows of a batch."""
UNREACHED = "layers that the loss does not reach"
"""What the linear layers of the blocks are called that stay dense, among the parameters that are not covered."""
LEAST_SHARE = 0.5
"""Smallest share of the block parameters that the compressible layers must cover."""


@dataclass(frozen=True)
class Coverage:
    """Count the parameters of the compressible layers and those of the rest; a shared (tied) tensor counts once.

    Args:
        covered: weights of the compressible layers.
        block_params: parameters of all decoder blocks.
        skipped: parameters of the rest of the model by what they are; `covered + sum(skipped)` is the whole model.

    >>> coverage = Coverage(covered=900, block_params=1000, skipped={"norms and biases": 100, "embeddings": 500})
    >>> coverage.share
    0.9
    """

    covered: int
    block_params: int
    skipped: Mapping[str, int]

    @property
    def share(self) -> float:
        """Compute the compressible share of the blocks, `covered / block_params`."""
        return self.covered / self.block_params


@dataclass(frozen=True, eq=False)
class ModelLayers:
    """Hold a model with its decoder blocks and their compressible layers, in model order, and read and replace weights.

    Of a lazy model (`globalopt.models.streaming`) a block is in memory only while it is `resident`; all methods work on
    both kinds of models.

    Args:
        model: the causal language model.
        blocks: its decoder blocks. blocks_path: their module path.
        specs: the compressible layers.
        coverage: how much of the model these are.
        apart: other linear layers of the blocks, which the loss does not reach; they stay dense.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> layers = find_layers(tiny_llama())
    >>> spec = layers.of_block(1)[0]
    >>> spec.name, tuple(layers.weight(spec.name).shape)
    ('model.layers.1.self_attn.q_proj', (16, 16))
    >>> layers.set_weight(spec.name, torch.zeros(16, 16))
    >>> bool(layers.module(spec.name).weight.any())
    False
    """

    model: PreTrainedModel
    blocks: nn.ModuleList
    blocks_path: str
    specs: tuple[LayerSpec, ...]
    coverage: Coverage
    apart: tuple[str, ...] = ()

    @cached_property
    def _modules(self) -> Mapping[str, Linear]:
        """Look up the modules of all layers by name."""
        return {spec.name: cast("Linear", self.model.get_submodule(spec.name)) for spec in self.specs}

    def module(self, name: str) -> Linear:
        """Return the module called `name`.

        Raises:
            UnknownNameError: it is none of the layers.
        """
        if name not in self._modules:
            raise UnknownNameError("layer", name, self._modules)
        return self._modules[name]

    @cached_property
    def lazy(self) -> LazyBlocks | None:
        """Return the reader of the blocks of a lazy model; None if all of the model is in memory."""
        return lazy_blocks(self.model)

    @contextmanager
    def resident(self, index: int, device: torch.device | str | None = None) -> Iterator[None]:
        """Keep block `index` in memory, on `device`, while the context is open, and move it back afterwards.

        Args:
            index: of the block.
            device: where to; None leaves it where it is.
        """
        if self.lazy is not None:
            with self.lazy.open(index, device):
                yield
            return
        block, home = self.blocks[index], self.device_of(index)
        try:
            if device is not None:
                block.to(device)
            yield
        finally:
            if device is not None:
                block.to(home)

    def device_of(self, index: int) -> torch.device:
        """Return the device of block `index`; for a lazy model the one it is read to."""
        device = next(self.blocks[index].parameters()).device
        return self.lazy.device if self.lazy is not None and device.type == "meta" else device

    def weight(self, name: str) -> Tensor:
        """Copy a layer's weight as float32 (d_out, d_in)."""
        if self.lazy is not None:
            self.module(name)
            return self.oriented(name, self.lazy.read(f"{name}.weight")).float().contiguous()
        return _as_linear(self.module(name)).to(torch.float32, copy=True).contiguous()

    def originals(self) -> Mapping[str, Tensor]:
        """Return the present weights of all layers, float32 (d_out, d_in) by name.

        For a lazy model they are not copied: the mapping reads those of the checkpoint whenever they are used.
        """
        if self.lazy is not None:
            return _Originals(self, self.lazy)
        return {spec.name: self.weight(spec.name) for spec in self.specs}

    def restore(self, name: str, originals: Mapping[str, Tensor]) -> None:
        """Put back the weight that a layer had when `originals` were taken."""
        if self.lazy is None:
            self.set_weight(name, originals[name])
        else:
            self.lazy.restore(f"{name}.weight")

    def place(self, name: str, make: Callable[[], Tensor]) -> None:
        """Replace a layer's weight by the result of `make`, (d_out, d_in), cast to the parameter's own type.

        For a lazy model, `make` is called whenever the layer's block is read, so that the weight need not be held in
        between. The errors of `make` and of `set_weight` are then raised at that time.
        """
        if self.lazy is None:
            self.set_weight(name, make())
        else:
            self.module(name)
            self.lazy.replace(f"{name}.weight", lambda: self.oriented(name, make()))

    def oriented(self, name: str, W: Tensor) -> Tensor:
        """Transpose `W` (d_out, d_in) if the layer's module holds its weight transposed."""
        return W.mT if isinstance(self.module(name), Conv1D) else W

    def set_weight(self, name: str, W: Tensor) -> None:
        """Overwrite a layer's weight in place, cast to the parameter's own type.

        Args:
            name: of the layer.
            W: (d_out, d_in).

        Raises:
            UsageError: `W` has another shape than the layer.
            NumericalError: `W` is not finite in the parameter's type.
        """
        weight = _as_linear(self.module(name))
        if W.shape != weight.shape:
            raise UsageError(f"Layer {name} is {tuple(weight.shape)}; the new weight is {tuple(W.shape)}.")
        if self.lazy is not None:
            kept = W.detach().to(weight.dtype, copy=True)
            self.place(name, lambda: kept)
            return
        cast = W.detach().to(device=weight.device, dtype=weight.dtype)
        if not bool(torch.isfinite(cast).all()):
            raise NumericalError(f"The new weight of layer {name} is not finite in {_dtype_name(weight.dtype)}.")
        with torch.no_grad():
            weight.copy_(cast)

    def set_parameter(self, name: str, value: Tensor) -> None:
        """Overwrite another parameter of the model in place, e.g. that of a norm."""
        if self.lazy is not None and self.lazy.has(name):
            kept = value.detach().clone()
            self.lazy.replace(name, lambda: kept)
            return
        parameter = self.model.get_parameter(name)
        with torch.no_grad():
            parameter.copy_(value)

    def of_block(self, index: int) -> tuple[LayerSpec, ...]:
        """Return the layers of block `index`."""
        return tuple(spec for spec in self.specs if spec.block == index)


class _Originals(Mapping[str, Tensor]):
    """Map layer names to the weights of a lazy model's checkpoint, float32 (d_out, d_in), read on every access."""

    def __init__(self, layers: ModelLayers, lazy: LazyBlocks) -> None:
        """Keep the layers and the reader of their blocks."""
        self._layers = layers
        self._lazy = lazy

    def __getitem__(self, name: str) -> Tensor:
        """Read a weight from the checkpoint; `UnknownNameError` if there is no such layer."""
        self._layers.module(name)
        return self._layers.oriented(name, self._lazy.original(f"{name}.weight")).float().contiguous()

    def __iter__(self) -> Iterator[str]:
        return (spec.name for spec in self._layers.specs)

    def __len__(self) -> int:
        return len(self._layers.specs)


def find_blocks(model: PreTrainedModel) -> ModelLayers:
    """Find the decoder blocks of a model without its layers: enough to walk it.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> layers = find_blocks(tiny_llama())
    >>> layers.blocks_path, len(layers.blocks), layers.specs
    ('model.layers', 2, ())
    """
    path, blocks = decoder_blocks(model)
    return ModelLayers(model, blocks, path, (), _coverage(model, blocks, []))


def find_layers(model: PreTrainedModel, allow_low_coverage: bool = False) -> ModelLayers:
    """Find the decoder blocks of `model`, their linear layers, and which of these share an input.

    Args:
        model: a causal language model; one short forward pass of it is run, nothing is changed.
        allow_low_coverage: accept a model whose layers are less than half of the block parameters.

    Raises:
        UnsupportedModelError: there are no decoder blocks, no linear layers in them, quantised weights, one weight
            under two names, or too low a coverage.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> layers = find_layers(tiny_llama())
    >>> {spec.kind: spec.site.removeprefix("model.layers.0.") for spec in layers.of_block(0)}["v_proj"]
    'self_attn.q_proj'
    >>> round(layers.coverage.share, 3)
    0.986
    """
    path, blocks = decoder_blocks(model)
    found = [
        (index, f"{path}.{index}.{name}", module)
        for index, block in enumerate(blocks)
        for name, module in block.named_modules(remove_duplicate=False)
        if isinstance(module, Linear)
    ]
    if not found:
        raise UnsupportedModelError(
            f"The decoder blocks {path} of {_architecture(model)} contain no linear layer to compress."
        )
    _check_weights(model, [(name, module) for _, name, module in found])
    # Before the trace, which reads all of a model that is larger than memory.
    coverage = _covered(model, blocks, found, (), allow_low_coverage)
    inputs, unreachable = _trace(model, blocks, found)
    taken = [entry for entry in found if entry[1] not in unreachable]
    apart = [entry for entry in found if entry[1] in unreachable]
    if apart:
        coverage = _covered(model, blocks, taken, apart, allow_low_coverage)
    sites = _input_sites(taken, inputs)
    kinds: dict[str, str] = {}
    for index in range(len(blocks)):
        names = [name for block, name, _ in taken if block == index]
        kinds.update(_kinds(names, f"{path}.{index}."))
    specs = tuple(
        LayerSpec(name, index, sites[name], kinds[name], *_as_linear(module).shape) for index, name, module in taken
    )
    return ModelLayers(model, blocks, path, specs, coverage, tuple(name for _, name, _ in apart))


def check_finite(layers: ModelLayers) -> None:
    """Check that all parameters of a model are finite.

    Raises:
        NumericalError: a parameter holds NaN or infinity; names the first module with one.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> model = tiny_llama()
    >>> _ = model.model.norm.weight.data.fill_(torch.inf)
    >>> check_finite(find_layers(model))
    Traceback (most recent call last):
        ...
    globalopt.errors.NumericalError: Layer model.norm: 16 of 16 values of its weight are NaN or infinite. ...
    """
    inside = f"{layers.blocks_path}."
    _check_finite((n, p) for n, p in layers.model.named_parameters() if not n.startswith(inside))
    for index, block in enumerate(layers.blocks):
        with layers.resident(index):
            _check_finite((f"{inside}{index}.{name}", parameter) for name, parameter in block.named_parameters())


def _check_finite(parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Check parameters by name; `NumericalError` for the first that is not finite."""
    for name, parameter in parameters:
        finite = torch.isfinite(parameter)
        if not bool(finite.all()):
            owner, _, what = name.rpartition(".")
            count = int((~finite).sum())
            raise NumericalError(
                f"Layer {owner}: {count} of {parameter.numel()} values of its {what} are NaN or infinite. The "
                "checkpoint is broken; fetch it again, or use --dtype float32 or bfloat16 if float16 overflowed."
            )


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
        raise UnsupportedModelError(f"{_architecture(model)} has no token embedding; it is no model of text.")
    return embedding


def _as_linear(module: Linear) -> Tensor:
    """View the weight of a module as (d_out, d_in)."""
    weight = module.weight.detach()
    return weight.mT if isinstance(module, Conv1D) else weight


def _architecture(model: PreTrainedModel) -> str:
    """Return the name of the model's class."""
    return type(model).__name__


def _dtype_name(dtype: torch.dtype) -> str:
    """Write a dtype without the prefix "torch."."""
    return str(dtype).removeprefix("torch.")


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
            f"{_architecture(model)} has no list{count} that could be its decoder blocks; "
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


def _check_weights(model: PreTrainedModel, found: Sequence[tuple[str, Linear]]) -> None:
    """Check that the weights of layers are unquantised matrices, each under one name.

    Raises:
        UnsupportedModelError: one is not.
    """
    users: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users[_identity(parameter)].append(name.rpartition(".")[0])
    for name, module in found:
        weight = module.weight
        if weight.ndim != 2 or not weight.is_floating_point():
            raise UnsupportedModelError(
                f"Layer {name} holds {tuple(weight.shape)} values of {_dtype_name(weight.dtype)}: it is quantised or "
                "sharded. Load the unquantised checkpoint."
            )
        if len(users[_identity(weight)]) > 1:
            both = " and ".join(users[_identity(weight)][:2])
            raise UnsupportedModelError(
                f"{both} use the same weight; a weight under two names cannot be given two budgets. Untie it first."
            )


def _identity(parameter: Tensor) -> int:
    """Return a number that tied parameters have in common: their address, or their id if they are not in memory."""
    return id(parameter) if parameter.is_meta else parameter.data_ptr()


def _covered(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    taken: Sequence[tuple[int, str, Linear]],
    apart: Sequence[tuple[int, str, Linear]],
    allow_low_coverage: bool,
) -> Coverage:
    """Count what the layers `taken` cover, where the loss does not reach the layers `apart`.

    Raises:
        UnsupportedModelError: there is none, or they are less than half of the block parameters and that is not
            allowed.
    """
    coverage = _coverage(model, blocks, [module for _, _, module in taken], [module for _, _, module in apart])
    if taken and (coverage.share >= LEAST_SHARE or allow_low_coverage):
        return coverage
    covered, unreached = ({id(module.weight) for _, _, module in some} for some in (taken, apart))
    inside = _skipped(blocks, covered, None, unreached)
    missing = ", ".join(f"{what} ({count:,})" for what, count in inside.items())
    raise UnsupportedModelError(
        f"Only {coverage.share:.1%} of the {coverage.block_params:,} block parameters of {_architecture(model)} "
        f"can be compressed. Not covered: {missing}."
        + (" Pass --allow-low-coverage to compress the rest." if taken else "")
    )


def _coverage(
    model: PreTrainedModel, blocks: nn.ModuleList, modules: Sequence[Linear], apart: Sequence[Linear] = ()
) -> Coverage:
    """Count the parameters of `modules`, of the blocks, and of the rest of the model, with `apart` by itself."""
    weights = {id(module.weight): _as_linear(module).numel() for module in modules}
    unreached = {id(module.weight) for module in apart}
    return Coverage(
        covered=sum(weights.values()),
        block_params=sum(parameter.numel() for parameter in blocks.parameters()),
        skipped=MappingProxyType(_skipped(model, set(weights), model.get_output_embeddings(), unreached)),
    )


def _skipped(root: nn.Module, covered: set[int], head: nn.Module | None, unreached: set[int]) -> dict[str, int]:
    """Count the parameters of `root` outside `covered` by what they are; both sets are ids of parameters."""
    counts: Counter[str] = Counter()
    seen = set(covered)
    for owner in root.modules():
        for parameter in owner.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                what = UNREACHED if id(parameter) in unreached else _what(owner, parameter, head)
                counts[what] += parameter.numel()
    return dict(counts)


def _what(owner: nn.Module, parameter: Tensor, head: nn.Module | None) -> str:
    """Name the category of a parameter that is not compressed."""
    if parameter.ndim <= 1:
        return "norms and biases"
    if isinstance(owner, nn.Embedding):
        return "embeddings"
    if owner is head:
        return "lm_head"
    if parameter.ndim == 3 and not isinstance(owner, nn.Conv1d):
        return "fused 3-D experts"
    return "other"


def _kinds(names: list[str], prefix: str) -> dict[str, str]:
    """Find, for each module path of one block, the shortest suffix that no other path of the block has.

    A path that is itself the end of another one (BERT's `output.dense` of `attention.output.dense`) stays whole.
    """
    paths = {name: name.removeprefix(prefix).split(".") for name in names}
    users: Counter[str] = Counter()
    for parts in paths.values():
        users.update(".".join(parts[-length:]) for length in range(1, len(parts) + 1))
    return {
        name: next(
            (suffix for n in range(1, len(parts) + 1) if users[suffix := ".".join(parts[-n:])] == 1), ".".join(parts)
        )
        for name, parts in paths.items()
    }


@contextmanager
def input_hooks(modules: Mapping[str, nn.Module], record: Any) -> Iterator[None]:
    """Call `record(name, x)` with every input `x` of the named modules, while the context is open.

    >>> seen = []
    >>> layer = nn.Linear(3, 2)
    >>> with input_hooks({"layer": layer}, lambda name, x: seen.append((name, tuple(x.shape)))):
    ...     y = layer(torch.ones(5, 3))
    >>> seen
    [('layer', (5, 3))]
    """

    def hook(name: str) -> Any:
        """Make the hook of one module."""

        def forward_pre(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            record(name, args[0] if args else next(iter(kwargs.values())))

        return forward_pre

    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_pre_hook(hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield


@torch.no_grad()
def _trace(
    model: PreTrainedModel, blocks: nn.ModuleList, found: Sequence[tuple[int, str, Linear]]
) -> tuple[Mapping[str, tuple[Any, ...]], set[str]]:
    """Run a short forward pass, and return the identities of every layer's inputs, and the layers that are unreached.

    Raises:
        UnsupportedModelError: the model cannot run, or is not causal.
    """
    seen: defaultdict[str, tuple[Any, ...]] = defaultdict(tuple)
    held: list[Tensor] = []

    def record(name: str, x: Tensor) -> None:
        """Note the identity of an input by layer."""
        # An empty tensor (an expert no token was sent to) has no address of its own.
        if x.numel():
            # The version changes with every operation in place on the tensor.
            seen[name] += ((x.data_ptr(), x.shape, x.stride(), x._version),)
            # The tensor is held, or its address might be used for another one; not so the graph that it is from.
            held.append(x.detach())

    embedding = token_embedding(model)
    ids = torch.arange(TRACE_TOKENS, device=embedding.weight.device)[None] % embedding.num_embeddings
    # The second row ends in another token, for `_check_causal`.
    ids = torch.cat([ids, torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % embedding.num_embeddings], 1)])
    watched = unreached(list(blocks), found, lazy_blocks(model))
    with input_hooks({name: module for _, name, module in found}, record), watched as apart:
        try:
            outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except (GlobalOptError, MemoryError, torch.OutOfMemoryError):
            raise
        # Fields of a config that do not fit together are found only when the model computes, as errors of any kind.
        except Exception as cause:
            reason = one_line(cause, 200)
            raise UnsupportedModelError(
                f"{_architecture(model)} cannot compute a text of {TRACE_TOKENS} tokens ({type(cause).__name__}: "
                f"{reason}). Check its config.json, and that transformers alone runs it."
            ) from cause
    _check_causal(model, getattr(outputs, "logits", None))
    return seen, apart


def _input_sites(found: Sequence[tuple[int, str, Linear]], seen: Mapping[str, tuple[Any, ...]]) -> dict[str, str]:
    """Find the input site of every layer: the first layer of its block that reads the same tensors, as `seen`."""
    sites: dict[str, str] = {}
    first: dict[Any, str] = {}
    for block, name, _ in found:
        inputs = seen.get(name)
        sites[name] = first.setdefault((block, inputs), name) if inputs else name
    return sites


def _check_causal(model: PreTrainedModel, logits: Tensor | None) -> None:
    """Check that the logits (2, tokens, vocabulary) of two texts that differ in the last token are equal before it.

    Raises:
        UnsupportedModelError: they are not; the model sees the tokens that follow.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 3 or model.training:
        return
    change = (logits[0].float() - logits[1].float()).abs().amax(1)
    # An encoder that was never trained changes by 0.003 of the last position's change; rounding is far below that in
    # float32. A comparison with NaN is false: parameters that are not finite are found later.
    share = FORESIGHT if logits.dtype == torch.float32 else FORESIGHT_16_BITS
    if bool(change[:-1].max() > share * change[-1]):
        raise UnsupportedModelError(
            f"{_architecture(model)} is an encoder here: a token changes the predictions before it. Only decoder-only "
            "causal language models can be compressed."
        )
