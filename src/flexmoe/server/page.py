"""The web page. Enters: a browser. Leaves: static/index.html at /, its parts under /static, all with strict headers.

The page holds no secret, so it is served without a key; what it asks of the API needs one where there are keys.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

FOLDER = Path(__file__).parent / "static"

# Scripts and styles are files of ours, and nothing is fetched from elsewhere: what a prompt or an answer smuggles into
# the page does not run, and cannot call home.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "img-src 'self'; require-trusted-types-for 'script'; trusted-types dompurify"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def add_page(api: FastAPI) -> None:
    """Serve the page."""
    api.mount("/static", _Parts(directory=FOLDER))

    @api.get("/", include_in_schema=False)
    async def page() -> Response:
        """The page."""
        return FileResponse(FOLDER / "index.html", headers=HEADERS)


class _Parts(StaticFiles):
    """Files with the page's headers."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response
