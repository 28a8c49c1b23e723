"""``python -m klfast`` is the command ``klfast``."""

from klfast.cli import main

if __name__ == "__main__":
    main()
