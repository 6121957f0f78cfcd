"""``python -m quantkit_runtime.server MODEL``: serve a model with the runtime alone."""

from __future__ import annotations

import sys

from quantkit_runtime.errors import QuantkitRuntimeError
from quantkit_runtime.server.options import parse


def main() -> None:
    """Run the server that the command line asks for."""
    from quantkit_runtime.server.run import serve

    try:
        serve(parse(sys.argv[1:]))
    except QuantkitRuntimeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
