"""Find what can be compressed in a model by structure: its decoder blocks, linear layers, and who shares an input.

No architecture is named. The blocks are the list of modules that holds most parameters; layers are the linear maps
inside them; layers that one short forward pass feeds with the very same tensor share an input site.
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

from globalopt.errors import NumericalError, UnknownNameError, UnsupportedModelError, UsageError
from globalopt.models.streaming import LazyBlocks, lazy_blocks
from globalopt.values.layer import LayerSpec

Linear = nn.Linear | Conv1D
TRACE_TOKENS = 8
LEAST_SHARE = 0.5


@dataclass(frozen=True)
class Coverage:
    """How much of a model the compressible layers are, in parameters; a shared (tied) tensor counts once.

    Args:
        covered: weights of the compressible layers.
        block_params: parameters of all decoder blocks.
        skipped: the rest of the model by what it is; `covered + sum(skipped)` is the whole model.
    """

    covered: int
    block_params: int
    skipped: Mapping[str, int]

    @property
    def share(self) -> float:
        """`covered / block_params`."""
        return self.covered / self.block_params


@dataclass(frozen=True, eq=False)
class ModelLayers:
    """A model together with its decoder blocks and their compressible layers, in model order.

    Of a lazy model (`globalopt.lazy`) the blocks are in memory only while they are `resident`; everything here works
    on both kinds.
    """

    model: PreTrainedModel
    blocks: nn.ModuleList
    blocks_path: str
    specs: tuple[LayerSpec, ...]
    coverage: Coverage

    @cached_property
    def _modules(self) -> Mapping[str, Linear]:
        return {spec.name: cast("Linear", self.model.get_submodule(spec.name)) for spec in self.specs}

    def module(self, name: str) -> Linear:
        """The module called `name`; `UnknownNameError` if it is none of the layers."""
        if name not in self._modules:
            raise UnknownNameError("layer", name, self._modules)
        return self._modules[name]

    @cached_property
    def lazy(self) -> LazyBlocks | None:
        """What opens the blocks of a lazy model; None if all of it is in memory."""
        return lazy_blocks(self.model)

    @contextmanager
    def resident(self, index: int, device: torch.device | str | None = None) -> Iterator[None]:
        """Keep block `index` in memory, on `device`, while open, and put it back after; None leaves it where it is."""
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
        """Where block `index` is, or would be if it were resident."""
        device = next(self.blocks[index].parameters()).device
        return self.lazy.device if self.lazy is not None and device.type == "meta" else device

    def weight(self, name: str) -> Tensor:
        """A float32 copy (d_out, d_in) of a layer's weight."""
        if self.lazy is not None:
            self.module(name)
            return self.oriented(name, self.lazy.read(f"{name}.weight")).float().contiguous()
        return _as_linear(self.module(name)).to(torch.float32, copy=True).contiguous()

    def originals(self) -> Mapping[str, Tensor]:
        """The weights of all layers as they now are, float32 (d_out, d_in) by name.

        Of a lazy model they are not held but those of the checkpoint, read whenever they are asked for.
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
        """Overwrite a layer's weight by what `make` returns (d_out, d_in), cast to the parameter's own type.

        In a lazy model `make` is called whenever the layer's block becomes resident, so that the weight need not be
        held in between; its errors, and those of `set_weight`, come then.
        """
        if self.lazy is None:
            self.set_weight(name, make())
        else:
            self.module(name)
            self.lazy.replace(f"{name}.weight", lambda: self.oriented(name, make()))

    def oriented(self, name: str, W: Tensor) -> Tensor:
        """`W` (d_out, d_in) in the orientation in which the layer's module holds its weight."""
        return W.mT if isinstance(self.module(name), Conv1D) else W

    def set_weight(self, name: str, W: Tensor) -> None:
        """Overwrite a layer's weight in place, cast to the parameter's own type.

        Args:
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
        """Overwrite another parameter of the model in place."""
        if self.lazy is not None and self.lazy.has(name):
            kept = value.detach().clone()
            self.lazy.replace(name, lambda: kept)
            return
        parameter = self.model.get_parameter(name)
        with torch.no_grad():
            parameter.copy_(value)

    def of_block(self, index: int) -> tuple[LayerSpec, ...]:
        """The layers of block `index`."""
        return tuple(spec for spec in self.specs if spec.block == index)


class _Originals(Mapping[str, Tensor]):
    """Weights read from the checkpoint of a lazy model, float32 (d_out, d_in) by layer."""

    def __init__(self, layers: ModelLayers, lazy: LazyBlocks) -> None:
        self._layers = layers
        self._lazy = lazy

    def __getitem__(self, name: str) -> Tensor:
        self._layers.module(name)
        return self._layers.oriented(name, self._lazy.original(f"{name}.weight")).float().contiguous()

    def __iter__(self) -> Iterator[str]:
        return (spec.name for spec in self._layers.specs)

    def __len__(self) -> int:
        return len(self._layers.specs)


def walkable(model: PreTrainedModel) -> ModelLayers:
    """The decoder blocks of a model without its layers: enough to walk it."""
    path, blocks = decoder_blocks(model)
    return ModelLayers(model, blocks, path, (), _coverage(model, blocks, []))


def find_layers(model: PreTrainedModel, allow_low_coverage: bool = False) -> ModelLayers:
    """Find the decoder blocks of `model`, their linear layers, and which of these share an input.

    Args:
        model: a causal language model; one short forward pass of it is run, nothing is changed.
        allow_low_coverage: accept a model of which the layers are less than half of the block parameters.

    Raises:
        UnsupportedModelError: there are no decoder blocks, no linear layers in them, quantised weights, one weight
            under two names, or too low a coverage.
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
    coverage = _coverage(model, blocks, [module for _, _, module in found])
    if coverage.share < LEAST_SHARE and not allow_low_coverage:
        inside = _skipped(blocks, {id(module.weight) for _, _, module in found}, None)
        missing = ", ".join(f"{what} ({count:,})" for what, count in inside.items())
        raise UnsupportedModelError(
            f"Only {coverage.share:.1%} of the {coverage.block_params:,} block parameters of {_architecture(model)} "
            f"can be compressed. Not covered: {missing}. Pass --allow-low-coverage to compress the rest."
        )
    sites = _input_sites(model, found)
    kinds: dict[str, str] = {}
    for index in range(len(blocks)):
        names = [name for block, name, _ in found if block == index]
        kinds.update(_kinds(names, f"{path}.{index}."))
    specs = tuple(
        LayerSpec(name, index, sites[name], kinds[name], *_as_linear(module).shape) for index, name, module in found
    )
    return ModelLayers(model, blocks, path, specs, coverage)


def check_finite(layers: ModelLayers) -> None:
    """`NumericalError` naming the first layer or other module whose weights hold NaN or infinity."""
    inside = f"{layers.blocks_path}."
    _check_finite((n, p) for n, p in layers.model.named_parameters() if not n.startswith(inside))
    for index, block in enumerate(layers.blocks):
        with layers.resident(index):
            _check_finite((f"{inside}{index}.{name}", parameter) for name, parameter in block.named_parameters())


def _check_finite(parameters: Iterable[tuple[str, Tensor]]) -> None:
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
    """The table that token ids are looked up in; `UnsupportedModelError` if the model has none."""
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise UnsupportedModelError(f"{_architecture(model)} has no token embedding; it is no model of text.")
    return embedding


def _as_linear(module: Linear) -> Tensor:
    """The weight as a (d_out, d_in) view of the parameter."""
    weight = module.weight.detach()
    return weight.mT if isinstance(module, Conv1D) else weight


def _architecture(model: PreTrainedModel) -> str:
    return type(model).__name__


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Path of the decoder blocks and they; `UnsupportedModelError` if there are none."""
    asked = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and (asked is None or len(module) == asked)
    ]
    if not lists:
        count = "" if asked is None else f" of the {asked} entries its config names"
        raise UnsupportedModelError(
            f"{_architecture(model)} has no list{count} that could be its decoder blocks; "
            "only models that stack their blocks in one nn.ModuleList can be compressed."
        )
    # The first of equals is the outermost, as named_modules goes from the outside in.
    return max(lists, key=lambda entry: sum(parameter.numel() for parameter in entry[1].parameters()))


def _check_weights(model: PreTrainedModel, found: Sequence[tuple[str, Linear]]) -> None:
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
    """What tied parameters share; a parameter that is not in memory has no address."""
    return id(parameter) if parameter.is_meta else parameter.data_ptr()


def _coverage(model: PreTrainedModel, blocks: nn.ModuleList, modules: Sequence[Linear]) -> Coverage:
    weights = {id(module.weight): _as_linear(module).numel() for module in modules}
    return Coverage(
        covered=sum(weights.values()),
        block_params=sum(parameter.numel() for parameter in blocks.parameters()),
        skipped=MappingProxyType(_skipped(model, set(weights), model.get_output_embeddings())),
    )


def _skipped(root: nn.Module, covered: set[int], head: nn.Module | None) -> dict[str, int]:
    """Parameters of `root` outside `covered` (ids of parameters), counted by what they are."""
    counts: Counter[str] = Counter()
    seen = set(covered)
    for owner in root.modules():
        for parameter in owner.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                counts[_what(owner, parameter, head)] += parameter.numel()
    return dict(counts)


def _what(owner: nn.Module, parameter: Tensor, head: nn.Module | None) -> str:
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
    """For each module path of one block the shortest suffix that no other path of the block has."""
    paths = {name: name.removeprefix(prefix).split(".") for name in names}
    users: Counter[str] = Counter()
    for parts in paths.values():
        users.update(".".join(parts[-length:]) for length in range(1, len(parts) + 1))
    return {
        name: next(suffix for n in range(1, len(parts) + 1) if users[suffix := ".".join(parts[-n:])] == 1)
        for name, parts in paths.items()
    }


@contextmanager
def input_hooks(modules: Mapping[str, nn.Module], record: Any) -> Iterator[None]:
    """While open, call `record(name, x)` with every input `x` of the named modules; the hooks never outlive it."""

    def hook(name: str) -> Any:
        def forward_pre(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            record(name, args[0] if args else next(iter(kwargs.values())))

        return forward_pre

    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_pre_hook(hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield


@torch.no_grad()
def _input_sites(model: PreTrainedModel, found: Sequence[tuple[int, str, nn.Module]]) -> dict[str, str]:
    """Site of every layer: the first layer of its block that is given the same tensors."""
    seen: defaultdict[str, tuple[Any, ...]] = defaultdict(tuple)
    held: list[Tensor] = []

    def record(name: str, x: Tensor) -> None:
        # An empty tensor (an expert no token was sent to) has no address of its own.
        if x.numel():
            # The version tells a tensor from itself after an operation in place.
            seen[name] += ((x.data_ptr(), x.shape, x.stride(), x._version),)
            # Held, so that its memory is not reused, which would make two tensors look the same.
            held.append(x)

    embedding = token_embedding(model)
    ids = torch.arange(TRACE_TOKENS, device=embedding.weight.device)[None] % embedding.num_embeddings
    with input_hooks({name: module for _, name, module in found}, record):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)

    sites: dict[str, str] = {}
    first: dict[Any, str] = {}
    for block, name, _ in found:
        sites[name] = first.setdefault((block, seen[name]), name) if seen[name] else name
    return sites
