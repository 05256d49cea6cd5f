"""What this machine and installation can do: versions, devices, memory, disk, and what optional parts add.

Nothing heavy is imported above the functions: where a package is broken, that is the finding, and no crash.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

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
}

DTYPES = ("float32", "bfloat16", "float16", "float64")
NEEDED_DTYPES = ("float32", "float64")
SIZE = 256  # of the matrices that are multiplied
REPEATS = 5
SLOW = 3.0  # times the seconds of float32, on the CPU
DISK_NEEDED = 5 * 2**30
TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "float16": 2e-2, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Part:
    """A package.

    Args:
        version: None where it is not installed.
        problem: why it cannot be used, or None.
        enables: what an optional part adds; how to get it in `install`.
    """

    name: str
    version: str | None
    problem: str | None
    enables: str = ""
    install: str = ""


@dataclass(frozen=True)
class Product:
    """A product of two matrices in one dtype: how long it took, or why there is none."""

    dtype: str
    seconds: float | None
    problem: str | None


@dataclass(frozen=True)
class Device:
    """Where a model can compute; memory in bytes, None where the device does not say."""

    name: str
    description: str
    total: int | None
    free: int | None
    products: tuple[Product, ...]


@dataclass(frozen=True)
class Disk:
    """Free space where something is written; `problem` where nothing can be."""

    use: str
    path: str
    total: int | None
    free: int | None
    problem: str | None


@dataclass(frozen=True)
class Check:
    """Something that must work, tried."""

    name: str
    problem: str | None


@dataclass(frozen=True)
class Health:
    """The whole finding.

    Args:
        memory_total, memory_free: bytes of main memory; the total is the container's limit where that is lower.
        threads: of torch; `cores` are those this process may use.
    """

    globalopt: str
    python: str
    system: str
    required: tuple[Part, ...]
    optional: tuple[Part, ...]
    devices: tuple[Device, ...]
    threads: int | None
    cores: int
    memory_total: int | None
    memory_free: int | None
    disks: tuple[Disk, ...]
    checks: tuple[Check, ...]

    @property
    def broken(self) -> tuple[str, ...]:
        """What is required and does not work, one sentence each."""
        parts = [f"{part.name}: {part.problem}" for part in self.required if part.problem]
        products = [p for device in self.devices[:1] for p in device.products if p.dtype in NEEDED_DTYPES]
        cpu = [f"{p.dtype} on the CPU: {p.problem}" for p in products if p.problem]
        return (*parts, *cpu, *(f"{check.name}: {check.problem}" for check in self.checks if check.problem))

    @property
    def advice(self) -> tuple[str, ...]:
        """What works and could be better, one sentence each."""
        found = []
        if self.threads is not None and self.threads > self.cores:
            found.append(f"torch has {self.threads} threads on {self.cores} cores; set OMP_NUM_THREADS={self.cores}.")
        seconds = {p.dtype: p.seconds for device in self.devices[:1] for p in device.products if p.seconds}
        for dtype in ("bfloat16", "float16"):
            if dtype in seconds and "float32" in seconds and seconds[dtype] > SLOW * seconds["float32"]:
                times = seconds[dtype] / seconds["float32"]
                found.append(f"{dtype} takes {times:.0f} times as long as float32 on this CPU; add --dtype float32.")
        if self.devices and len(self.devices) == 1:
            found.append("No accelerator: everything runs on the CPU.")
        for disk in self.disks:
            if disk.problem is not None:
                found.append(f"{disk.path} ({disk.use}): {disk.problem}.")
            elif disk.free is not None and disk.free < DISK_NEEDED:
                found.append(f"{disk.path} ({disk.use}) has {disk.free / 2**30:.1f} GiB left.")
        return tuple(found)


def examine() -> Health:
    """Look at everything; whatever fails is in the result."""
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
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _part(name: str, module: str, enables: str = "", install: str = "") -> Part:
    version = _version(name)
    problem = "not installed" if version is None else _too_old(name, version)
    if version is not None:
        try:
            importlib.import_module(module)
        # Whatever an import may raise, a loader's error included, is what we came to find out.
        except Exception as cause:
            problem = f"cannot be imported: {_line(cause)}"
    return Part(name, version, problem, enables, install)


def _too_old(name: str, version: str) -> str | None:
    """What globalopt asks of a package, where the version does not meet it."""
    try:
        # Others bring it; where they are broken it may be missing.
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
    """The CPU, whose memory is given, then accelerators."""
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
            # A copy waits for a device that works on its own time.
            product[0, 0].item()
            seconds.append(time.perf_counter() - start)
        error = float((product.cpu().double() - exact @ exact.mT).norm() / (exact @ exact.mT).norm())
    except (RuntimeError, TypeError, NotImplementedError) as cause:
        return Product(dtype, None, _line(cause))
    if not error <= TOLERANCES[dtype]:
        return Product(dtype, None, f"wrong by {error:.1g} of the product")
    return Product(dtype, min(seconds), None)


def _factorise() -> None:
    """The factorisations that the solvers need, in float32."""
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
    """One forward pass of the bundled model."""
    import torch

    from globalopt.models.loading import load_model, reference_folder

    model = load_model(str(reference_folder()), device="cpu").model
    with torch.no_grad():
        logits = model(input_ids=torch.arange(8)[None]).logits
    if not bool(torch.isfinite(logits).all()):
        raise RuntimeError("its logits are not finite")


def _check(name: str, tried: Callable[[], None]) -> Check:
    try:
        tried()
    # As for imports: the failure is the finding.
    except Exception as cause:
        return Check(name, _line(cause))
    return Check(name, None)


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _cores() -> int:
    """Cores this process may use."""
    affinity: Any = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _memory() -> tuple[int, int]:
    """Total and free main memory in bytes, within the container's limit."""
    from globalopt.machine.memory import main_memory

    return main_memory()


def _folders() -> dict[str, Path]:
    """Where runs, temporary files and downloads go."""
    folders = {"runs": Path.cwd(), "temporary files": Path(tempfile.gettempdir())}
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return folders
    return {**folders, "downloads": Path(HF_HUB_CACHE)}


def _disk(use: str, path: Path) -> Disk:
    # A cache that was never used is made where its nearest parent is.
    there = next((folder for folder in (path, *path.parents) if folder.exists()), path)
    try:
        usage = shutil.disk_usage(there)
    except OSError as cause:
        return Disk(use, str(path), None, None, cause.strerror or str(cause))
    problem = None if os.access(there, os.W_OK) else "cannot be written to"
    return Disk(use, str(path), usage.total, usage.free, problem)


def _line(cause: BaseException) -> str:
    """The first line of an error, or its kind where it says nothing."""
    lines = str(cause).strip().splitlines()
    return lines[0][:200] if lines else type(cause).__name__
