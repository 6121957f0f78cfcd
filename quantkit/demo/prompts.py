"""Writes held-out captions to a prompt file, one a line.

The prompt files of the demo recipe were made by
``python -m quantkit.demo.prompts --count 32 --output eval/prompts/demo.txt`` and
``python -m quantkit.demo.prompts --skip 32 --count 64 --output eval/prompts/demo-calibration.txt``.
"""

import argparse
from pathlib import Path

from quantkit.demo.captions import held_out_captions
from quantkit.errors import OutputError


def write_prompts(output: Path, count: int, skip: int = 0) -> None:
    """Write ``count`` different held-out captions, after leaving out the first ``skip``.

    Raises:
        OutputError: the file cannot be written.
    """
    lines = [caption for _, caption in held_out_captions(skip + count)[skip:]]
    try:
        output.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{output}: cannot write the prompts: {error.strerror}") from error


def main() -> None:
    """Write a prompt file from the command line."""
    parser = argparse.ArgumentParser(prog="python -m quantkit.demo.prompts", description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--skip", type=int, default=0)
    options = parser.parse_args()
    write_prompts(options.output, options.count, options.skip)


if __name__ == "__main__":
    main()
