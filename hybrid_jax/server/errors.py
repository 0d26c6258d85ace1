"""Refusals and failures in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`."""

import msgspec
from starlette.responses import Response

RETRY_AFTER_S = 1  # of a full queue, which moves within seconds
CODES = {404: "not_found", 405: "method_not_allowed"}


class ApiError(Exception):
    """An answer other than the one asked for. `reason` is what the log says of the request."""

    def __init__(self, status: int, message: str, code: str, reason: str = "refused", param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.reason, self.param = status, message, code, reason, param

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON that the client gets."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole answer."""
        headers = {"Retry-After": str(RETRY_AFTER_S)} if self.status == 503 else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Response(msgspec.json.encode(self.body), self.status, headers, "application/json")


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """400: this request can never be answered as it stands."""
    return ApiError(400, message, code, param=param)


def unavailable(message: str, code: str, reason: str) -> ApiError:
    """503: not now; the client may try again."""
    return ApiError(503, message, code, reason)
