"""Reading files of conversations: text, images and audio, for models that one talks to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantkit.errors import RecipeError
from quantkit.recipe.prompts import Prompt, read_prompts

Conversation = list[dict[str, Any]]
"""Messages ``{"role": ..., "content": [part, ...]}`` with parts ``{"type": "text", "text": ...}``,
``{"type": "image", "image": path}`` and ``{"type": "audio", "audio": path}``."""

_ROLES = ("system", "user", "assistant")
_PART_TYPES = ("text", "image", "audio")


def read_conversations(path: Path) -> list[Conversation]:
    """Read the conversations of a file in their order.

    Understands ``.jsonl`` with ``messages`` in each line, where the content of a message is a text or a list of
    parts, and paths of images and audio are relative to the file; and every file of prompts, each of which becomes
    what a user says.

    Raises:
        RecipeError: If the file cannot be read, a line is no conversation, or a file that it names is missing.
    """
    if path.suffix != ".jsonl" or not _holds_messages(path):
        return [[user_message(prompt)] for prompt in read_prompts(path)]
    conversations = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            conversations.append(_conversation(line, path, number))
    return conversations


def _holds_messages(path: Path) -> bool:
    try:
        first = next((line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()), "")
        record = json.loads(first)
    except (OSError, ValueError, RecursionError):
        return False  # the reader of prompts says what is wrong
    return isinstance(record, dict) and "messages" in record


def _conversation(line: str, path: Path, number: int) -> Conversation:
    where = f"{path}:{number}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{where}: is not JSON: {error}") from error
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise RecipeError(f"{where}: messages: is missing or empty")
    conversation = []
    for index, message in enumerate(messages):
        key = f"{where}: messages[{index}]"
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise RecipeError(f"{key}: role: must be one of {', '.join(_ROLES)}")
        content = message.get("content")
        parts = [_text(content)] if isinstance(content, str) else content
        if not isinstance(parts, list) or not parts:
            raise RecipeError(f"{key}: content: must be a text or a list of parts")
        checked = [_part(part, path.parent, f"{key}: content[{place}]") for place, part in enumerate(parts)]
        conversation.append({"role": message["role"], "content": checked})
    return conversation


def user_message(prompt: Prompt) -> dict[str, Any]:
    """Return a prompt as what a user says."""
    picture = [] if prompt.image is None else [{"type": "image", "image": prompt.image}]
    sound = [] if prompt.audio is None else [{"type": "audio", "audio": prompt.audio}]
    return {"role": "user", "content": [*picture, *sound, _text(prompt.text)]}


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _part(part: object, folder: Path, where: str) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or kind not in _PART_TYPES:
        raise RecipeError(f"{where}: type: must be one of {', '.join(_PART_TYPES)}")
    value = part.get(kind)
    if not isinstance(value, str) or not value:
        raise RecipeError(f"{where}: {kind}: is missing")
    if kind == "text":
        return _text(value)
    file = folder / value
    if not file.is_file():
        raise RecipeError(f"{where}: {kind}: {file}: no such file")
    return {"type": kind, kind: str(file)}
