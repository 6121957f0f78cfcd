"""Reading prompt files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import RecipeError


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Attributes:
        text: Of the prompt.
        image: Absolute path of the picture that goes with it; None without one.
        audio: Path of the sound that goes with it; None without one.
    """

    text: str
    image: str | None = None
    audio: str | None = None


def read_prompts(path: Path) -> list[Prompt]:
    """Read the prompts of a file in their order.

    Understands ``.txt`` (one prompt a line, blank lines and lines that start with ``#`` are skipped),
    ``.tsv`` and ``.csv`` with a column ``caption``, ``.jsonl`` with the key ``caption`` or ``prompt``. In all but
    ``.txt`` a column or key ``image`` may name a picture, by its path from the file's folder.

    Raises:
        RecipeError: If the file is missing, empty, of another kind, lacks the column or key, or names a picture
            that does not exist.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    readers = {".txt": _lines, ".tsv": _table, ".csv": _table, ".jsonl": _json_lines}
    if path.suffix not in readers:
        raise RecipeError(f"{path}: unknown kind of prompt file; use one of {', '.join(readers)}")
    prompts = [
        Prompt(caption, _find_image(path, line, image))
        for line, caption, image in readers[path.suffix](path, text)
        if caption.strip()
    ]
    if not prompts:
        raise RecipeError(f"{path}: holds no prompt")
    return prompts


def _find_image(path: Path, line: int, given: Any) -> str | None:
    if given is None or given == "":
        return None
    if not isinstance(given, str):
        raise RecipeError(f"{path}:{line}: image: must be a path, not {given!r}")
    image = path.resolve().parent / given
    if not image.is_file():
        raise RecipeError(f"{path}:{line}: image: no file {image}")
    return str(image)


def _lines(_path: Path, text: str) -> Iterator[tuple[int, str, None]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.lstrip().startswith("#"):
            yield number, line.strip(), None


def _table(path: Path, text: str) -> Iterator[tuple[int, str, str | None]]:
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",")
    try:
        if "caption" not in (rows.fieldnames or ()):
            raise RecipeError(f"{path}:1: has no column 'caption'")
        for row in rows:
            yield rows.line_num, row["caption"] or "", row.get("image")
    except csv.Error as error:
        raise RecipeError(f"{path}: is no table: {error}") from error


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"{path}:{number}: is not JSON: {error}") from error
        prompt = record.get("caption", record.get("prompt")) if isinstance(record, dict) else None
        if not isinstance(prompt, str):
            raise RecipeError(f"{path}:{number}: has no text under 'caption' or 'prompt'")
        yield number, prompt, record.get("image")
