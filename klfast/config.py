"""What this installation of klfast is and uses."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from klfast import _kernels, threads

__all__ = ["describe", "show_config"]


def describe() -> dict[str, Any]:
    """
    Give version, instruction sets, threads, OpenMP and compiler as a dictionary.

    Returns
    -------
    dict
        ``version``, ``isa`` (in use), ``isa_available``, ``threads``, ``openmp`` (date of the
        specification, 0 when built without), ``compiler``, ``numpy``.

    Examples
    --------
    >>> from klfast.config import describe
    >>> describe()["isa"] in describe()["isa_available"]
    True
    """
    return {
        "version": version("klfast"),
        "isa": _kernels.isa,
        "isa_available": list(_kernels.available),
        "threads": threads.get_num_threads(),
        **_kernels.build(),
        "numpy": version("numpy"),
    }


def show_config() -> None:
    """
    Print version, instruction set in use and available, threads, OpenMP and compiler.

    Examples
    --------
    >>> import klfast
    >>> klfast.show_config()  # doctest: +ELLIPSIS
    version        ...
    """
    for key, value in describe().items():
        shown = ", ".join(value) if isinstance(value, list) else value
        print(f"{key:14} {shown}")
