"""``python -m quantkit_runtime.server MODEL``: serve a model with the runtime alone."""

from __future__ import annotations

import sys

from quantkit_runtime.errors import MissingDependencyError, QuantkitRuntimeError
from quantkit_runtime.server.options import parse


def main() -> None:
    """Run the server that the command line asks for."""
    try:
        settings = parse(sys.argv[1:])
        try:
            from quantkit_runtime.server.run import serve
        except ImportError as error:
            raise MissingDependencyError(f"{error}: pip install 'quantkit-runtime[server]'") from error
        serve(settings)
    except QuantkitRuntimeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
