"""Reading prompt files."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import RecipeError


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Attributes:
        text: Of the prompt.
        image: Absolute path of the picture that goes with it; None without one.
    """

    text: str
    image: str | None = None


def read_prompts(path: Path) -> list[str]:
    """Read the prompts of a file in their order.

    Understands ``.txt`` (one prompt a line, blank lines and lines that start with ``#`` are skipped),
    ``.tsv`` and ``.csv`` with a column ``caption``, ``.jsonl`` with the key ``caption`` or ``prompt``.

    Raises:
        RecipeError: If the file is missing, empty, of another kind, or lacks the column or key.
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
    prompts = [prompt for prompt in readers[path.suffix](path, text) if prompt.strip()]
    if not prompts:
        raise RecipeError(f"{path}: holds no prompt")
    return prompts


def _lines(_path: Path, text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if not line.lstrip().startswith("#")]


def _table(path: Path, text: str) -> list[str]:
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",")
    try:
        if "caption" not in (rows.fieldnames or ()):
            raise RecipeError(f"{path}:1: has no column 'caption'")
        return [row["caption"] or "" for row in rows]
    except csv.Error as error:
        raise RecipeError(f"{path}: is no table: {error}") from error


def _json_lines(path: Path, text: str) -> list[str]:
    prompts = []
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
        prompts.append(prompt)
    return prompts
