"""The page at ``/``: plain files of this package, and what the page must know of the models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse

from quantkit_runtime.server.routes.common import context_of

router = APIRouter(include_in_schema=False)
_FOLDER = Path(__file__).parent.parent / "page"
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data: blob:; "
        "media-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@router.get("/")
async def page() -> FileResponse:
    """Answer the page."""
    return FileResponse(_FOLDER / "index.html", headers=_HEADERS)


@router.get("/page.js")
async def script() -> FileResponse:
    """Answer its script."""
    return FileResponse(_FOLDER / "page.js", headers=_HEADERS)


@router.get("/page.css")
async def style() -> FileResponse:
    """Answer its style."""
    return FileResponse(_FOLDER / "page.css", headers=_HEADERS)


@router.get("/page/state")
async def state(request: Request) -> dict[str, Any]:
    """Tell what the models can do, and whether they can."""
    context = context_of(request)
    models = []
    for name, deployment in context.deployments.by_name.items():
        engine = deployment.engine
        info = engine.info
        models.append(
            {
                "id": name,
                "role": _role(name, context.settings.reference),
                "ready": engine.is_ready,
                "reason": engine.reason or "no answer",
                "kinds": sorted(info.kinds) if info else [],
                "parameters": sorted(info.parameters) if info else [],
                "defaults": info.defaults if info else {},
                "inputs": sorted(info.inputs) if info else [],
                "draws_from_image": info.draws_from_image if info else False,
                "outputs": sorted(info.outputs) if info else [],
                "voices": list(info.voices) if info else [],
                "size_multiple": info.size_multiple if info else 1,
                "description": info.description if info else "",
            }
        )
    return {"models": models}


def _role(name: str, reference: str | None) -> str:
    if reference is None:
        return ""
    return "reference" if name == reference else "candidate"
