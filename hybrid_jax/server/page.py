"""GET /: a page to chat with the model and to watch the engine. One file; it loads nothing from anywhere.

The page is open to everybody; what it calls wants the key. Its policy names the one script and the one style by their
hashes, so that no other script runs and no other host is called, whatever a model writes.
"""

import base64
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

TEXT = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")


def _hash_of(element: str) -> str:
    """How a policy names the only element of that kind."""
    (inside,) = re.findall(rf"<{element}>(.*?)</{element}>", TEXT, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"


HEADERS = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash_of('script')}",
            f"style-src {_hash_of('style')}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
        )
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


async def page(request: Request) -> Response:
    """The page."""
    return Response(TEXT, headers=HEADERS, media_type="text/html")
