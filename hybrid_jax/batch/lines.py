"""The lines of OpenAI's batch files: requests in, results out, each one JSON object. Knows nothing of files."""

import hashlib
from typing import Any, Literal

import msgspec

LINE_BYTES = 9 * 2**20  # the server's limit of a body, and room for what is around it
ID_CHARACTERS = 512
SEED_BITS = 53  # every JSON reader keeps such a number exact


class RequestLine(msgspec.Struct, forbid_unknown_fields=True):
    """One line of the input. What is in the body is the server's to judge."""

    custom_id: str
    method: Literal["POST"]
    url: Literal["/v1/chat/completions", "/v1/completions"]
    body: msgspec.Raw


class _Streamed(msgspec.Struct):
    stream: bool | None = None


class Response(msgspec.Struct):
    """What the server would have answered."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class Failure(msgspec.Struct):
    """Why there is no response."""

    code: str
    message: str


class ResultLine(msgspec.Struct):
    """One line of the output, or of the errors where there is no response with status 200."""

    id: str
    custom_id: str | None
    response: Response | None
    error: Failure | None


class _Status(msgspec.Struct):
    status_code: int


class ResultHead(msgspec.Struct):
    """As much of a result as a resumed job looks at."""

    custom_id: str
    response: _Status | None

    @property
    def failed(self) -> bool:
        """Whether it belongs to the errors."""
        return self.response is None or self.response.status_code != 200


_request_decoder = msgspec.json.Decoder(RequestLine)
_stream_decoder = msgspec.json.Decoder(_Streamed)
_head_decoder = msgspec.json.Decoder(ResultHead)


def read_request(line: bytes) -> RequestLine:
    """The request of a line. Raises ValueError that says what is wrong with it."""
    try:
        line.decode()
        request = _request_decoder.decode(line)
        streamed = _stream_decoder.decode(request.body).stream
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"wanted custom_id, method, url and body, got {str(error)[:300]}") from None
    if not 1 <= len(request.custom_id) <= ID_CHARACTERS:
        raise ValueError(f"wanted custom_id of 1 to {ID_CHARACTERS} characters, got {len(request.custom_id)}")
    if streamed:
        raise ValueError("wanted a body without stream, got stream: true; an answer in a file is whole")
    return request


def read_head(line: bytes) -> ResultHead:
    """The part of a result that says whose it is. Raises ValueError for anything else, as for a torn line."""
    try:
        return _head_decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(f"wanted a result, got {error}") from None


def id_hash(custom_id: str) -> tuple[int, int]:
    """128 bits that stand for an id."""
    digest = hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return int.from_bytes(digest[:8]), int.from_bytes(digest[8:])


def complete_body(request: RequestLine, seed: int) -> bytes:
    """The body with a seed and an id that depend on the job's seed and the line's id alone, where it has none."""
    body: dict[str, Any] = msgspec.json.decode(request.body, type=dict[str, msgspec.Raw])
    high, low = id_hash(f"{seed}/{request.custom_id}")
    for name, value in (("seed", high >> (64 - SEED_BITS)), ("request_id", f"{high:016x}{low:016x}")):
        if name not in body or bytes(body[name]) == b"null":
            body[name] = value
    return msgspec.json.encode(body)


def write_response(custom_id: str, status: int, body: bytes) -> bytes:
    """The line of a request that the server answered, well or not."""
    name = _name(custom_id)
    return _line(ResultLine(f"batch_req_{name}", custom_id, Response(status, name, msgspec.Raw(body)), None))


def write_failure(custom_id: str | None, code: str, message: str) -> bytes:
    """The line of a request that no server answered."""
    return _line(ResultLine(f"batch_req_{_name(custom_id or message)}", custom_id, None, Failure(code, message)))


def _name(custom_id: str) -> str:
    return f"{id_hash(custom_id)[0]:016x}"


def _line(result: ResultLine) -> bytes:
    return msgspec.json.encode(result) + b"\n"
