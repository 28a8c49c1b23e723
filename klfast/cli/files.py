"""Arrays in files: opened without reading them if the format allows, written all or not at all."""

from __future__ import annotations

import os
import secrets
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import click
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

NPY_MAGIC = b"\x93NUMPY"
ZIP_MAGIC = b"PK"
UNREADABLE = (ValueError, EOFError, OverflowError, zipfile.BadZipFile, zlib.error)


class FileError(click.ClickException):
    """A file that cannot be used; the message names it and says what to do."""

    exit_code = 2


def split_member(argument: str) -> tuple[Path, str | None]:
    """Take ``FILE.npz:name`` apart; a file whose own name has a colon comes first."""
    file, colon, member = argument.rpartition(":")
    if colon and not Path(argument).exists() and Path(file).is_file():
        return Path(file), member
    return Path(argument), None


def open_array(argument: str, axis: int = -1) -> Array:
    """Open the array that `argument` names and put the classes on its last axis.

    Parameters
    ----------
    argument : str
        ``FILE.npy``, which is memory-mapped, or ``FILE.npz`` or ``FILE.npz:name``, which is read.
    axis : int
        The axis of the classes.

    Returns
    -------
    ndarray, shape (..., K)
        Real numbers of at most 64 bits, at least one; read-only if memory-mapped.

    Raises
    ------
    FileError
        If there is no such file or array, or it holds something else.
    """
    path, member = split_member(argument)
    name = click.format_filename(argument)
    try:
        magic = _first_bytes(path)
        if magic.startswith(NPY_MAGIC):
            if member is not None:
                raise FileError(f"{name}: a .npy file holds a single array: leave out ':{member}'")
            array = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        elif magic.startswith(ZIP_MAGIC):
            array = _read_member(path, member)
        else:
            raise FileError(f"{name} is neither a .npy nor a .npz file: write it with numpy.save")
    except OSError as error:
        reason = error.strerror or error
        raise FileError(f"cannot read {name}: {reason}: check path and permissions") from error
    except MemoryError as error:
        raise FileError(f"{name} does not fit in memory: save it as .npy") from error
    except UNREADABLE as error:
        holds_objects = "object" in str(error).lower()
        advice = "save numbers, not Python objects" if holds_objects else "damaged? save it again"
        raise FileError(f"cannot read {name}: {str(error).rstrip('.')}: {advice}") from error
    _check_numbers(array, name)
    if not -array.ndim <= axis < array.ndim:
        raise FileError(f"{name} has shape {array.shape}, so no axis {axis}: change --axis")
    return np.moveaxis(array, axis, -1)


def _first_bytes(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise FileError(f"{click.format_filename(path)} is not a regular file: give a .npy or .npz")
    with path.open("rb") as file:
        return file.read(len(NPY_MAGIC))


def _read_member(path: Path, member: str | None) -> Array:
    name = click.format_filename(path)
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        choice = ", ".join(archive.files)
        if not archive.files:
            raise FileError(f"{name} holds no array: write it with numpy.savez")
        if member is None and len(archive.files) > 1:
            raise FileError(f"{name} holds {choice}: pick one, as {name}:{archive.files[0]}")
        if member is not None and member not in archive.files:
            raise FileError(f"{name} has no array '{member}': it holds {choice}")
        array = archive[archive.files[0] if member is None else member]
    if not isinstance(array, np.ndarray):
        raise FileError(f"{name} holds something that is not an array: write it with numpy.savez")
    return array


def _check_numbers(array: Array, name: str) -> None:
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise FileError(f"{name} has dtype {array.dtype}: save real numbers, float32 or float64")
    if array.ndim == 0:
        raise FileError(f"{name} is a single number: klfast compares rows, of shape (..., classes)")
    if array.size == 0:
        raise FileError(f"{name} is empty (shape {array.shape}): there is nothing to compare")


def check_same_shape(p: Array, q: Array) -> None:
    """Refuse a pair of arrays, classes last, whose rows do not face each other."""
    if p.shape[-1] != q.shape[-1]:
        raise FileError(
            f"P has {p.shape[-1]} classes and Q has {q.shape[-1]}: both need the same classes"
        )
    if p.shape != q.shape:
        raise FileError(f"P has shape {p.shape} and Q has {q.shape}: both need the same rows")


def check_output(path: Path, inputs: list[str]) -> None:
    """Refuse an output that would destroy an input, or cannot be a .npy file in that place.

    Parameters
    ----------
    path : Path
        The file to write.
    inputs : list of str
        The inputs, as for `open_array`.
    """
    name = click.format_filename(path)
    if path.suffix != ".npy":
        raise FileError(f"-o {name}: the result is an array: give a name that ends in .npy")
    if not path.parent.is_dir():
        raise FileError(f"-o {name}: there is no directory {path.parent}: create it first")
    if path.exists() and not path.is_file():
        raise FileError(f"-o {name} is not a regular file: give another name")
    if path.exists() and any(path.samefile(split_member(file)[0]) for file in inputs):
        raise FileError(f"-o {name} is also an input: give another name")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a draft that takes the place of `path` when the block ends well and vanishes otherwise.

    The draft lies beside `path`, so that the step from old to new is one rename. It is opened
    first, so that a place which cannot be written is known before the work starts.
    """
    target = path.resolve()
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with draft.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        name = click.format_filename(path)
        reason = error.strerror or error
        raise FileError(f"cannot write {name}: {reason}: choose another place") from error
