"""Hold what was found about a machine and an installation, and tell what is broken and what to improve."""

from __future__ import annotations

from dataclasses import dataclass

NEEDED_DTYPES = ("float32", "float64")
SLOW = 3.0  # a dtype is called slow from this multiple of the seconds of float32 on
DISK_NEEDED = 5 * 2**30


@dataclass(frozen=True)
class Part:
    """Hold the state of one package.

    Args:
        name: name of the distribution.
        version: installed version, or None.
        problem: why the package cannot be used, or None.
        enables, install: of an optional package: the feature that needs it, and the command that installs it.

    >>> Part("lm-eval", None, "not installed", "scores on tasks").problem
    'not installed'
    """

    name: str
    version: str | None
    problem: str | None
    enables: str = ""
    install: str = ""


@dataclass(frozen=True)
class Product:
    """Hold the time of a matrix product in one dtype, or the reason why it failed.

    Args:
        dtype: floating-point type of the matrices.
        seconds: shortest of `doctor.REPEATS` times, or None.
        problem: error message, or None.

    >>> Product("float32", 0.0004, None).seconds < 1
    True
    """

    dtype: str
    seconds: float | None
    problem: str | None


@dataclass(frozen=True)
class Device:
    """Hold the memory of one device and the matrix products tried on it.

    Args:
        name: name of the device in torch.
        description: name of the hardware.
        total, free: bytes of memory; None where the device does not report them.
        products: one per dtype of `doctor.DTYPES`.

    >>> device = Device("cpu", "x86_64, AVX2", 8 * 2**30, 6 * 2**30, (Product("float32", 0.0004, None),))
    >>> [product.dtype for product in device.products if product.problem is None]
    ['float32']
    """

    name: str
    description: str
    total: int | None
    free: int | None
    products: tuple[Product, ...]


@dataclass(frozen=True)
class Disk:
    """Hold the free disk space of one folder.

    Args:
        use: what is written there.
        path: the folder.
        total, free: bytes, or None where they cannot be read.
        problem: why nothing can be written there, or None.

    >>> Disk("runs", "/data", 2**40, 2**39, None).free / 2**30
    512.0
    """

    use: str
    path: str
    total: int | None
    free: int | None
    problem: str | None


@dataclass(frozen=True)
class Check:
    """Hold the outcome of a trial computation.

    Args:
        name: name of the computation.
        problem: error message, or None where it succeeded.

    >>> Check("factorisations", None).problem is None
    True
    """

    name: str
    problem: str | None


@dataclass(frozen=True)
class Health:
    """Hold all findings about this machine and installation.

    Args:
        globalopt, python, system: versions, and the operating system.
        required, optional: packages.
        devices: the CPU first, then accelerators; empty where torch cannot be imported.
        threads: threads of torch, or None where it cannot be imported.
        cores: CPU cores that this process may use.
        memory_total, memory_free: bytes of main memory, within the container's limit; None without psutil.
        disks: folders for runs, temporary files and downloads.
        checks: trial computations.

    >>> torch = Part("torch", None, "not installed")
    >>> health = Health("1.0", "3.12", "Linux", (torch,), (), (), None, 2, None, None, (), ())
    >>> health.broken
    ('torch: not installed',)
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
        """List the required parts that do not work, one sentence each."""
        parts = [f"{part.name}: {part.problem}" for part in self.required if part.problem]
        products = [p for device in self.devices[:1] for p in device.products if p.dtype in NEEDED_DTYPES]
        cpu = [f"{p.dtype} on the CPU: {p.problem}" for p in products if p.problem]
        return (*parts, *cpu, *(f"{check.name}: {check.problem}" for check in self.checks if check.problem))

    @property
    def advice(self) -> tuple[str, ...]:
        """List settings that work and could be improved, one sentence each."""
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
