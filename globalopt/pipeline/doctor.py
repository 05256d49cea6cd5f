"""Examine this machine and installation: versions of packages, devices, memory, disks, and trial computations.

Third-party packages are imported inside the functions, so that a broken one is reported instead of raised.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from globalopt.pipeline.health import Check, Device, Disk, Health, Part, Product

REQUIRED = (
    "torch",
    "transformers",
    "huggingface_hub",
    "accelerate",
    "datasets",
    "pyarrow",
    "safetensors",
    "optuna",
    "cmaes",
    "scipy",
    "numpy",
    "matplotlib",
    "jinja2",
    "rich",
    "typer",
    "pydantic",
    "psutil",
    "filelock",
)
OPTIONAL = {
    "peft": ("peft", "export --format adapter", "pip install 'globalopt[adapter]'"),
    "lm-eval": (
        "lm_eval",
        "scores on tasks: lm_eval --model_args pretrained=RUN/model",
        "pip install 'globalopt[eval]'",
    ),
    "gguf": ("gguf", "models in GGUF files", "pip install gguf"),
}

DTYPES = ("float32", "bfloat16", "float16", "float64")
SIZE = 256  # side of the matrices that are multiplied
REPEATS = 5
TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "float16": 2e-2, "bfloat16": 5e-2}


def examine() -> Health:
    """Examine packages, devices, memory and disks, and try the computations that every run needs.

    No failure is raised: each is reported in the result. Takes some seconds.

    >>> health = examine()
    >>> health.broken, health.devices[0].name, health.cores > 0
    ((), 'cpu', True)
    """
    required = tuple(_part(name, name) for name in REQUIRED)
    works = {part.name: part.problem is None for part in required}
    optional = tuple(_part(name, module, more, how) for name, (module, more, how) in OPTIONAL.items())
    total, free = _memory() if works["psutil"] and works["torch"] else (None, None)
    checks = (
        *((_check("factorisations", _factorise),) if works["torch"] else ()),
        *((_check("the bundled model", _run_reference),) if works["torch"] and works["transformers"] else ()),
    )
    return Health(
        globalopt=_version("globalopt") or "not installed",
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        required=required,
        optional=optional,
        devices=_devices(total, free) if works["torch"] else (),
        threads=_threads() if works["torch"] else None,
        cores=_cores(),
        memory_total=total,
        memory_free=free,
        disks=tuple(_disk(use, path) for use, path in _folders().items()),
        checks=checks,
    )


def _version(name: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _part(name: str, module: str, enables: str = "", install: str = "") -> Part:
    """Check the version of the distribution `name`, and that its `module` can be imported."""
    version = _version(name)
    problem = "not installed" if version is None else _too_old(name, version)
    if version is not None:
        try:
            importlib.import_module(module)
        # An import may raise anything, such as an error of the dynamic loader; all of it is reported.
        except Exception as cause:
            problem = f"cannot be imported: {_line(cause)}"
    return Part(name, version, problem, enables, install)


def _too_old(name: str, version: str) -> str | None:
    """Return the version that globalopt requires of a package, as a sentence, where the installed one is not it."""
    try:
        # A dependency of our dependencies, which may be missing where these are broken.
        from packaging.requirements import Requirement

        asked = [Requirement(line) for line in metadata.requires("globalopt") or ()]
    except (ImportError, metadata.PackageNotFoundError):
        return None
    for requirement in asked:
        if requirement.name.replace("-", "_") != name.replace("-", "_") or not requirement.specifier:
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            return f"{version} is installed, {requirement.specifier} is needed"
    return None


def _devices(total: int | None, free: int | None) -> tuple[Device, ...]:
    """List the CPU, with the given bytes of main memory, and the accelerators."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    processor = f"{platform.processor() or platform.machine()}, {capability}"
    found = [Device("cpu", processor, total, free, _products("cpu"))]
    for i in range(torch.cuda.device_count()):
        name = f"cuda:{i}"
        try:
            left, whole = torch.cuda.mem_get_info(i)
            found.append(Device(name, torch.cuda.get_device_name(i), whole, left, _products(name)))
        except RuntimeError as cause:
            found.append(Device(name, f"cannot be used: {_line(cause)}", None, None, ()))
    if torch.backends.mps.is_available():
        found.append(Device("mps", "Apple GPU", None, None, _products("mps")))
    return tuple(found)


def _products(device: str) -> tuple[Product, ...]:
    """Try the product in every dtype."""
    return tuple(_product(device, dtype) for dtype in DTYPES)


def _product(device: str, dtype: str) -> Product:
    """Multiply two matrices, compare with float64 on the CPU, and take the shortest of a few times."""
    import torch

    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    try:
        A = exact.to(device, getattr(torch, dtype))
        seconds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            product = A @ A.mT
            # Reading a value waits for a device that computes asynchronously.
            product[0, 0].item()
            seconds.append(time.perf_counter() - start)
        error = float((product.cpu().double() - exact @ exact.mT).norm() / (exact @ exact.mT).norm())
    except (RuntimeError, TypeError, NotImplementedError) as cause:
        return Product(dtype, None, _line(cause))
    if not error <= TOLERANCES[dtype]:
        return Product(dtype, None, f"wrong by {error:.1g} of the product")
    return Product(dtype, min(seconds), None)


def _factorise() -> None:
    """Try the factorisations that the solvers use, in float32: eigenvectors, singular vectors and Cholesky."""
    import torch

    A = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    G = A @ A.mT + torch.eye(64)
    values, vectors = torch.linalg.eigh(G)
    U, s, Vh = torch.linalg.svd(A)
    L = torch.linalg.cholesky(G)
    for made, whole in (((vectors * values) @ vectors.mT, G), ((U * s) @ Vh, A), (L @ L.mT, G)):
        if not torch.allclose(made, whole, rtol=1e-3, atol=1e-3):
            raise RuntimeError("a factorisation does not give its matrix back")


def _run_reference() -> None:
    """Run one forward pass of the bundled model."""
    import torch

    from globalopt.models.loading import load_model
    from globalopt.reference import reference_folder

    model = load_model(str(reference_folder()), device="cpu").model
    with torch.no_grad():
        logits = model(input_ids=torch.arange(8)[None]).logits
    if not bool(torch.isfinite(logits).all()):
        raise RuntimeError("its logits are not finite")


def _check(name: str, tried: Callable[[], None]) -> Check:
    """Run a trial computation, and report the error that it raises."""
    try:
        tried()
    # As for imports: any failure is reported.
    except Exception as cause:
        return Check(name, _line(cause))
    return Check(name, None)


def _threads() -> int:
    """Return the number of threads of torch."""
    import torch

    return torch.get_num_threads()


def _cores() -> int:
    """Count the CPU cores that this process may use."""
    affinity: Any = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _memory() -> tuple[int, int]:
    """Return total and free main memory in bytes, within the container's limit."""
    from globalopt.machine.memory import main_memory

    return main_memory()


def _folders() -> dict[str, Path]:
    """Return the folders for runs, temporary files and downloads, by use."""
    folders = {"runs": Path.cwd(), "temporary files": Path(tempfile.gettempdir())}
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return folders
    return {**folders, "downloads": Path(HF_HUB_CACHE)}


def _disk(use: str, path: Path) -> Disk:
    """Read the free space of the disk that a folder is on, and check that it can be written to."""
    # A download cache that was never used does not exist yet; its nearest existing parent is on the same disk.
    there = next((folder for folder in (path, *path.parents) if folder.exists()), path)
    try:
        usage = shutil.disk_usage(there)
    except OSError as cause:
        return Disk(use, str(path), None, None, cause.strerror or str(cause))
    problem = None if os.access(there, os.W_OK) else "cannot be written to"
    return Disk(use, str(path), usage.total, usage.free, problem)


def _line(cause: BaseException) -> str:
    """Return the first line of an error message, or the error's type where the message is empty."""
    lines = str(cause).strip().splitlines()
    return lines[0][:200] if lines else type(cause).__name__
