"""YAML file -> `Recipe`, with every mistake of the file reported at once as ``file:line: key: reason``."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from quantkit.errors import RecipeError
from quantkit.recipe.schema import Recipe

MANIFEST = "quantkit.json"
_MAX_DEPTH = 20
_MAX_KEYS = 10_000

_Location = tuple[int | str, ...]


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe together with where it came from.

    Attributes:
        recipe: The recipe with all overrides applied.
        path: The file it was read from.
        sha256: Of the file's bytes, as hex.
        overrides: The ``key.path=value`` texts that were applied on top of the file.
    """

    recipe: Recipe
    path: Path
    sha256: str
    overrides: tuple[str, ...] = ()


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, except that ``1e-3`` is a number, as in YAML 1.2 and everywhere else."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read and check a recipe.

    Args:
        path: The YAML file.
        overrides: Texts ``key.path=value``; the value is read as YAML and replaces what the file says.

    Raises:
        RecipeError: With every problem found, if the file cannot be read or is no valid recipe.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    data, lines, problems = _parse(path, raw)
    origins: dict[_Location, str] = {}
    for text in overrides:
        _apply_override(data, text, lines, origins)
    try:
        # Through JSON, because pydantic's strict mode then takes a list where the schema has a tuple.
        recipe = Recipe.model_validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        problems += [
            _describe(path, detail, lines, origins)
            for detail in error.errors()
            # Items that are wrong are not counted: a list of one that is wrong would be said to be empty, too.
            if detail["type"] != "too_short" or not detail["input"]
        ]
        raise RecipeError(*sorted(set(problems), key=_by_line)) from error
    except (TypeError, ValueError) as error:  # a key that is a date, say, or a number of thousands of digits
        raise RecipeError(*problems, f"{path}:1: holds something that no recipe can hold: {error}") from error
    if problems:
        raise RecipeError(*problems)
    return LoadedRecipe(recipe, path, hashlib.sha256(raw).hexdigest(), tuple(overrides))


def recipe_of(checkpoint: Path) -> LoadedRecipe | None:
    """Return the recipe that a checkpoint was made with, from its manifest; None if it has no manifest.

    Raises:
        RecipeError: If the manifest cannot be read or holds no recipe that this version knows.
    """
    path = checkpoint / MANIFEST
    if not path.is_file():
        return None
    try:
        recorded = json.loads(path.read_bytes())["recipe"]
        recipe = Recipe.model_validate_json(json.dumps(recorded["effective"]))
        return LoadedRecipe(recipe, path, str(recorded["sha256"]))
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"recipe.effective.{_dotted(first['loc'])}: {first['msg']}"
        raise RecipeError(f"{path}: holds no recipe that this version can read: {reason}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{path}: holds no recipe that this version can read: {error}") from error


def _by_line(problem: str) -> tuple[int, str]:
    match = re.match(r".*?:(\d+)(?:, with .*?)?: ", problem)
    return (int(match[1]) if match else 0, problem)


def _parse(path: Path, raw: bytes) -> tuple[dict[str, Any], dict[_Location, int], list[str]]:
    """Return the data, the line of every key, and one problem for each key that occurs twice."""
    try:
        node = yaml.compose(raw, Loader=_Loader)
        data = yaml.load(raw, Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{path}:{line}: is not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # PyYAML lets through what its constructors raise, for example for a date in month 13.
        reason = str(error).splitlines()[0]
        raise RecipeError(f"{path}:1: is not valid YAML: {reason}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path}:1: a recipe is a mapping of keys, for example 'version: 1'")
    lines: dict[_Location, int] = {}
    problems: list[str] = []
    _index_lines(node, (), lines, problems, path)
    return data, lines, problems


def _index_lines(
    node: yaml.Node | None, where: _Location, lines: dict[_Location, int], problems: list[str], path: Path
) -> None:
    # An alias may hold itself, or ten of ten of ten: no recipe comes near these bounds.
    if len(where) > _MAX_DEPTH or len(lines) > _MAX_KEYS:
        raise RecipeError(f"{path}:{lines[where[:1]]}: {_dotted(where[:1])}: is nested too deep or holds too much")
    if isinstance(node, yaml.MappingNode):
        seen: set[Hashable] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            here = (*where, key.value)
            if key.value in seen:
                problems.append(f"{path}:{line}: {_dotted(here)}: is given twice")
            seen.add(key.value)
            lines[here] = line
            _index_lines(value, here, lines, problems, path)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*where, index)] = value.start_mark.line + 1
            _index_lines(value, (*where, index), lines, problems, path)


def _apply_override(
    data: dict[str, Any], text: str, lines: dict[_Location, int], origins: dict[_Location, str]
) -> None:
    key, separator, value = text.partition("=")
    keys = tuple(key.split("."))
    if not separator or not all(keys):
        raise RecipeError(f"--set {text}: write key.path=value, for example --set scheme.bits=4")
    try:
        parsed = yaml.load(value, Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"--set {text}: the value is not valid YAML") from error
    target = data
    for part in keys[:-1]:
        if target.get(part) is None:
            target[part] = {}
        if not isinstance(target[part], dict):
            raise RecipeError(f"--set {text}: {part} holds a value, not keys")
        target = target[part]
    target[keys[-1]] = parsed
    for places in (lines, origins):  # what was below is replaced, too
        for where in [where for where in places if where[: len(keys)] == keys]:
            del places[where]
    origins[keys] = f"--set {text}"


def _describe(
    path: Path, detail: ErrorDetails, lines: Mapping[_Location, int], origins: Mapping[_Location, str]
) -> str:
    where = detail["loc"]
    reason = detail["msg"].removeprefix("Value error, ").replace("Tuple", "list").partition(" after validation")[0]
    reason = reason[0].lower() + reason[1:]
    if detail["type"] == "extra_forbidden":
        reason = "unknown key" + _did_you_mean(where)
    elif detail["type"] == "missing":
        reason = "is missing"
    elif detail["type"] == "literal_error":
        reason = f"{detail['input']!r} is not one of {detail.get('ctx', {}).get('expected', '')}"
    elif detail["type"] != "value_error" and not isinstance(detail["input"], dict | list):
        reason += f", not {detail['input']!r}"
    key = f"{_dotted(where)}: " if where else ""
    # Keys that do not go together are told of the section: what was set in it may be one of them.
    within = [text for keys, text in origins.items() if len(keys) > len(where) and keys[: len(where)] == where]
    changed = f", with {', '.join(within)}" if within and detail["type"] == "value_error" else ""
    for end in range(len(where), -1, -1):
        if where[:end] in origins:
            return f"{origins[where[:end]]}: {key}{reason}"
        if where[:end] in lines:
            return f"{path}:{lines[where[:end]]}{changed}: {key}{reason}"
    return f"{path}:1{changed}: {key}{reason}"


def _did_you_mean(where: _Location) -> str:
    known = _fields_at(where[:-1])
    close = difflib.get_close_matches(str(where[-1]), known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else f" (known: {', '.join(known)})"


def _fields_at(where: _Location) -> list[str]:
    """Return the keys that the schema knows at a place in a recipe."""
    annotation: Any = Recipe
    for part in where:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            field = annotation.model_fields.get(str(part))
            annotation = None if field is None else field.annotation
        else:  # an index into a list, or a free key of a dict: the last argument is what they hold
            inner = [argument for argument in get_args(annotation) if argument is not Ellipsis]
            annotation = inner[-1] if inner else None
        if get_origin(annotation) in (Union, UnionType):
            annotation = next(argument for argument in get_args(annotation) if argument is not NoneType)
    return list(annotation.model_fields) if hasattr(annotation, "model_fields") else []


def _dotted(where: _Location) -> str:
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", ".".join(map(str, where)))
