"""Files that appear whole or not at all, and errors that say what is wrong with one.

JSON for what people read, safetensors for tensors, never pickle. A write goes to a temporary file beside its target
and is renamed, so a reader never sees half a file and a full disk loses nothing that was finished.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from globalopt.errors import ArtefactError

PARTIAL = ".partial"
"""How names of temporary files end."""

_ADVICE = ContextVar("advice", default="Choose a writable --out or --cache.")
_HEX = re.compile("[0-9a-f]{8}")
_DAY = 24 * 3600.0
_LONGEST = 200
"""Most bytes of a file's name that is used whole in the name of its temporary file."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it over `path` on success, remove it on failure.

    Works for files and for folders (an existing folder is replaced). A full or read-only disk becomes an
    `ArtefactError` that says what to do.

    >>> with replacing(Path("poem.txt")) as temporary:
    ...     _ = temporary.write_text("whole")
    ...     Path("poem.txt").exists()
    False
    >>> Path("poem.txt").read_text()
    'whole'
    """
    # Of this process and this call alone: two writers of one path must not write into each other's file.
    temporary = path.with_name(f"{_prefix(path)}{_machine()}.{os.getpid()}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _settle_modes(temporary)
        if temporary.is_dir() and path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except OSError as cause:
        if isinstance(cause, ArtefactError):
            raise
        raise _write_error(path, cause) from cause
    except SafetensorError as cause:
        # safetensors wraps the system's error in its own; the text still names it.
        raise ArtefactError(f"Cannot write {path}: {cause}. Free space and run the same command again.") from cause
    finally:
        _remove(temporary)


def _remove(temporary: Path) -> None:
    """Remove a temporary file or folder, if it is there and can be removed."""
    if temporary.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _prefix(path: Path) -> str:
    """Begin the name of the temporary files of `path`; a long name is shortened, as the disk bounds its length."""
    name = path.name
    if len(os.fsencode(name)) > _LONGEST:
        name = f"{name[:20]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    return f".{name}."


def _settle_modes(temporary: Path) -> None:
    """Give files the permissions that the umask of the process says: safetensors writes for the owner alone.

    A file with a second name keeps its own.
    """
    if not temporary.exists():
        return
    # Its name ends as that of a temporary file does, so that it is removed where this process is killed here.
    name, *owner = temporary.name.rsplit(".", 4)
    probe = temporary.with_name(".".join((name, "mode", *owner)))
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in temporary.rglob("*") if temporary.is_dir() else [temporary]:
        if path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1:
            path.chmod(mode)


def remove_abandoned(folder: Path) -> None:
    """Remove temporary files below `folder` that were left behind by processes that were killed.

    >>> with replacing(Path("note.txt")) as temporary:  # of a process that lives
    ...     temporary.touch()
    ...     remove_abandoned(Path("."))
    ...     temporary.exists()
    True
    """
    for temporary in list(folder.rglob(f".*{PARTIAL}")):
        if _is_abandoned(temporary):
            _remove(temporary)


def remove_abandoned_beside(path: Path) -> None:
    """Remove the temporary files of `path` itself that were left behind by processes that were killed.

    >>> with replacing(Path("note.txt")) as temporary:  # of a process that lives
    ...     temporary.touch()
    ...     remove_abandoned_beside(Path("note.txt"))
    ...     temporary.exists()
    True
    """
    with contextlib.suppress(OSError):
        for temporary in list(path.parent.iterdir()):
            name = temporary.name
            if name.startswith(_prefix(path)) and name.endswith(PARTIAL) and _is_abandoned(temporary):
                _remove(temporary)


def _is_abandoned(temporary: Path) -> bool:
    """Tell whether the process that wrote a temporary file is gone.

    A process of another machine, or of a container that had another name, cannot be asked: its file is abandoned when
    nothing was written to it for a day.
    """
    # A file of another program may end in the same way.
    machine, pid, secret = ("", "", *temporary.name.removesuffix(PARTIAL).rsplit(".", 3))[-3:]
    if not (_HEX.fullmatch(machine) and pid.isdecimal() and _HEX.fullmatch(secret)):
        return False
    try:
        written = max(path.lstat().st_mtime for path in [temporary, *temporary.rglob("*")])
        if machine != _machine():
            return time.time() - written > _DAY
        # A process that was started after the last write is another one with the same number.
        return psutil.Process(int(pid)).create_time() > written + 1
    except psutil.NoSuchProcess:
        return True
    except (OSError, OverflowError, psutil.Error):
        return False


def _machine() -> str:
    """Name this machine in a file name: a hash, since the name itself may hold dots."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _write_error(path: Path, cause: OSError) -> ArtefactError:
    if cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return ArtefactError(
            f"Cannot write {path}: the disk is full ({cause.strerror}). Free space and run the same command again; it "
            "goes on from the last finished artefact."
        )
    return ArtefactError(f"Cannot write {path}: {cause.strerror or cause}. {_ADVICE.get()}".rstrip())


@contextlib.contextmanager
def advising(advice: str) -> Iterator[None]:
    """While the context is open, an error of writing ends in `advice`: it names the options of the command that runs.

    >>> Path("note.txt").touch()
    >>> with advising("Choose a writable --out."):
    ...     write_text(Path("note.txt/inner.txt"), "text")
    Traceback (most recent call last):
    globalopt.errors.ArtefactError: Cannot write note.txt/inner.txt: ... Choose a writable --out.
    """
    token = _ADVICE.set(advice)
    try:
        yield
    finally:
        _ADVICE.reset(token)


def is_there(path: Path) -> bool:
    """Tell whether a file or folder is there.

    Raises:
        ArtefactError: the system does not say, as the name is too long or a folder above may not be entered.

    >>> is_there(Path("nothing here"))
    False
    """
    try:
        path.lstat()
        return path.exists()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as cause:
        raise ArtefactError(f"Cannot read {path}: {cause.strerror or cause}.") from None


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; the same value gives the same bytes.

    >>> write_json(Path("one.json"), {"loss": 0.5})
    >>> print(Path("one.json").read_text(), end="")
    {
     "loss": 0.5
    }
    """
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path, advice: str = "Make it again.") -> Any:
    """Read JSON; `ArtefactError` if the file is missing, unreadable or not JSON.

    Args:
        advice: how to repair a file that is not JSON, a sentence for the error.

    >>> write_json(Path("one.json"), [1, None])
    >>> read_json(Path("one.json"))
    [1, None]
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtefactError(f"There is no file {path}.") from None
    # ValueError: also a whole number of thousands of digits; RecursionError: brackets as deep.
    except (ValueError, RecursionError) as cause:
        raise ArtefactError(f"{path} is not valid JSON ({cause}); it is truncated or not ours. {advice}") from None
    except OSError as cause:
        raise ArtefactError(f"Cannot read {path}: {cause.strerror or cause}.") from None


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, atomically.

    >>> write_text(Path("page.html"), "<p>")
    >>> read_text(Path("page.html"))
    '<p>'
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def read_text(path: Path) -> str:
    """Read UTF-8 text, with or without a byte order mark; `ArtefactError` if it is missing or no text.

    >>> _ = Path("words.txt").write_bytes(b"\\xef\\xbb\\xbfwords")
    >>> read_text(Path("words.txt"))
    'words'
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ArtefactError(f"There is no file {path}.") from None
    except UnicodeDecodeError:
        raise ArtefactError(f"{path} is no UTF-8 text.") from None
    except OSError as cause:
        raise ArtefactError(f"Cannot read {path}: {cause.strerror or cause}.") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None) -> None:
    """Write tensors and a JSON-able record of facts as one safetensors file, atomically.

    >>> import torch
    >>> write_tensors(Path("gram.safetensors"), {"matrix": torch.eye(2)}, {"tokens": 7})
    >>> read_metadata(Path("gram.safetensors"))
    {'tokens': 7}
    """
    with replacing(path) as temporary:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            temporary,
            metadata={"facts": json.dumps(dict(facts or {}), sort_keys=True)},
        )


def read_tensors(path: Path, end: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote, or the tensors whose names end with `end`; `ArtefactError` if it is broken.

    Tensors begin where those of a computation do, at a multiple of 64 bytes: from another place some processors sum
    in another order, and what is used again would not be what is computed again.

    >>> import torch
    >>> write_tensors(Path("gram.safetensors"), {"matrix": torch.eye(2)}, {"tokens": 7})
    >>> tensors, facts = read_tensors(Path("gram.safetensors"))
    >>> tensors["matrix"].shape, facts["tokens"]
    (torch.Size([2, 2]), 7)
    """
    with _opened(path) as (file, facts):
        wanted = [name for name in file.keys() if name.endswith(end)]  # noqa: SIM118 - not a dict
        return {name: _aligned(file.get_tensor(name)) for name in wanted}, facts


def _aligned(value: Tensor) -> Tensor:
    return value.clone() if value.data_ptr() % 64 else value


def read_metadata(path: Path) -> dict[str, Any]:
    """Read the facts of what `write_tensors` wrote, without its tensors; errors as in `read_tensors`.

    >>> import torch
    >>> write_tensors(Path("gram.safetensors"), {"matrix": torch.eye(2)}, {"tokens": 7})
    >>> read_metadata(Path("gram.safetensors"))["tokens"]
    7
    """
    with _opened(path) as (_, facts):
        return facts


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """An open safetensors file with its facts; `ArtefactError` if it, or what is read from it, is missing or broken."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file, json.loads((file.metadata() or {}).get("facts", "{}"))
    except FileNotFoundError:
        raise ArtefactError(f"There is no file {path}.") from None
    except (SafetensorError, ValueError, OSError) as cause:
        raise ArtefactError(f"{path} is broken ({cause}). Delete it and run the same command again.") from None


def link_or_copy(source: Path, path: Path) -> None:
    """Give a finished file a second name: a hard link where the file system has them, else a copy.

    >>> write_text(Path("one.txt"), "text")
    >>> link_or_copy(Path("one.txt"), Path("other.txt"))
    >>> Path("one.txt").unlink()
    >>> read_text(Path("other.txt"))
    'text'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def digest(value: Any) -> str:
    """Compute the sha256 of a JSON-able value, independent of key order.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
