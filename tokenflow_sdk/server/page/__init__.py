"""The page at `/`, for trying the server in a browser. Its files lie beside this module and need no build step."""

from __future__ import annotations

import hashlib
from importlib.resources import files

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from tokenflow_sdk.server.errors import ApiError

__all__ = ["router"]

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_INDEX = "index.html"
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Names of the files stay the same when the package is upgraded, so browsers ask each time whether they have changed.
    "Cache-Control": "no-cache",
}


def router() -> APIRouter:
    """The routes `/` and `/page/NAME`."""
    routes = APIRouter(include_in_schema=False)
    found = {
        each.name: (each.read_bytes(), _TYPES[suffix])
        for each in files(__name__).iterdir()
        if (suffix := each.name[each.name.rfind(".") :]) in _TYPES
    }

    def file(name: str, request: Request) -> Response:
        if name not in found:
            raise ApiError(404, f"The page has no file {name[:200]!r}.")
        content, kind = found[name]
        headers = _HEADERS | {"ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}
        if headers["ETag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=kind, headers=headers)

    @routes.api_route("/", methods=["GET", "HEAD"])
    async def index(request: Request) -> Response:
        return file(_INDEX, request)

    @routes.api_route("/page/{name}", methods=["GET", "HEAD"])
    async def part(name: str, request: Request) -> Response:
        return file(name, request)

    return routes
