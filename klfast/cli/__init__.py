"""The command ``klfast``: the library at work on files.

This module is the door and imports nothing that ``pip install klfast`` does not bring. Behind it,
``app`` holds the commands, ``files`` opens and writes arrays, ``rows`` compares them and counts,
``demo`` does so with the data that ships with the package, ``report`` shows the outcome.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit with its status.

    0 is success, 2 a request that cannot be met (one line on stderr says why), 130 an interrupt.
    """
    try:
        from klfast.cli.app import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"click", "rich"}:
            raise
        message = 'klfast: the command line needs click and rich: pip install "klfast[cli]"'
        print(message, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    app(prog_name="klfast")
