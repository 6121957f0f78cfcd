"""Log lines: one JSON object each, or text for people, with the id of the request that they are about."""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar
from typing import Literal, TextIO

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Id of the request that this task works for."""

LogFormat = Literal["json", "text"]
_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class JsonFormatter(logging.Formatter):
    """One line per record; whatever was passed as ``extra`` becomes a key."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a JSON object."""
        fields = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (current := request_id.get()) is not None:
            fields["request_id"] = current
        fields |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """``time level message key=value ...``."""

    def __init__(self, process: str) -> None:
        super().__init__("%(asctime)s %(levelname)s " + process + ": %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a line."""
        extra = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if (current := request_id.get()) is not None:
            extra.setdefault("request_id", current)
        return super().format(record) + "".join(f" {key}={_in_line(value)}" for key, value in extra.items())


def _in_line(value: object) -> str:
    """Return a value as text that cannot begin another line, or move a terminal's cursor, whoever sent it."""
    text = str(value)
    return text if text.isprintable() else repr(text)


def set_up_logging(style: str, process: str = "server", stream: TextIO | None = None) -> None:
    """Send what this process logs to standard error, or another stream, in this style."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(TextFormatter(process) if style == "text" else JsonFormatter(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("quantkit_runtime").setLevel(logging.INFO)
