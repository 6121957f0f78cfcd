"""What differs between the tasks of a comparison; `open_task` finds the one that is asked for."""

from __future__ import annotations

from typing import Any

from quantkit.compare.tasks.base import Context, Task
from quantkit.recipe.schema import Task as TaskName


def open_task(name: TaskName, context: Context) -> Task[Any]:
    """Return the task of this name, ready to run.

    Raises:
        MissingExtraError: If a library that it needs is not installed.
        RecipeError: If the AlexNet weights for LPIPS are no good.
    """
    if name == "chat":
        from quantkit.compare.tasks.chat import Chat

        return Chat(context)
    if name == "t2i":
        from quantkit.compare.tasks.images import Images

        return Images(context)
    from quantkit.compare.tasks.videos import Videos

    return Videos(context)
