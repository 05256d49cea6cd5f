"""Register the packed format with transformers, at once or as soon as transformers is imported."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"


def register() -> None:
    """Register config and quantizer with transformers; a second call changes nothing.

    Where transformers is not imported yet, it is left so: the registration follows when it is.

    >>> register()
    >>> from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    >>> AUTO_QUANTIZER_MAPPING["globalopt"].__name__
    'SparseLowRankQuantizer'
    """
    if _REGISTRY in sys.modules:
        _add(sys.modules[_REGISTRY])
    elif not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
        finder: Any = _OnImport()
        sys.meta_path.insert(0, finder)


def _add(registry: ModuleType) -> None:
    """Add config and quantizer to the registry of transformers."""
    from globalopt.export import quantizer

    if quantizer.METHOD not in registry.AUTO_QUANTIZER_MAPPING:
        registry.register_quantization_config(quantizer.METHOD)(quantizer.SparseLowRankConfig)
        registry.register_quantizer(quantizer.METHOD)(quantizer.SparseLowRankQuantizer)


class _OnImport:
    """Find the registry of transformers on its import, and have it loaded by a loader that adds to it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the registry of transformers; None for other modules."""
        if fullname != _REGISTRY:
            return None
        us: Any = self
        sys.meta_path.remove(us)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            adding: Any = _Adding(spec.loader)
            spec.loader = adding
        return spec


class _Adding:
    """Load a module by another loader, then add to it."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module by the other loader."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module by the other loader, then add to it."""
        self._loader.exec_module(module)
        _add(module)

    def __getattr__(self, name: str) -> Any:
        # Requests for the source or the files of the module go to the real loader.
        return getattr(self._loader, name)
