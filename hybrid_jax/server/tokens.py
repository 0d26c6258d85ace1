"""POST /tokenize and /detokenize, GET /tokenizer_info: the tokenizer over HTTP."""

from functools import partial

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from hybrid_jax.server.body import read_json
from hybrid_jax.server.errors import bad_request
from hybrid_jax.server.messages import encode_messages
from hybrid_jax.server.schema import DetokenizeBody, TokenizeBody
from hybrid_jax.server.service import Service, service_of
from hybrid_jax.server.settings import CHARACTERS_PER_TOKEN
from hybrid_jax.server.tools import offered_tools


async def tokenize(request: Request) -> Response:
    """Token ids of a prompt, or of messages by the chat template."""
    service = service_of(request)
    body = await read_json(request, TokenizeBody)
    service.model_name(body.model)
    tokens = await service.off_loop(partial(_encode, service, body))
    answer = {"tokens": tokens, "count": len(tokens), "max_model_len": service.llm.max_model_len}
    return Response(msgspec.json.encode(answer), media_type="application/json")


def _encode(service: Service, body: TokenizeBody) -> list[int]:
    if body.prompt is None and body.messages is not None:
        return encode_messages(
            service,
            body.messages,
            offered_tools(service, body.tools),
            body.add_generation_prompt,
            body.chat_template_kwargs,
        )
    if body.prompt is None or body.messages is not None:
        raise bad_request("wanted either prompt or messages: send one of them", "prompt")
    longest = service.llm.max_model_len * CHARACTERS_PER_TOKEN
    if len(body.prompt) > longest:
        raise bad_request(f"wanted at most {longest} characters, got {len(body.prompt)}: send less", "prompt")
    return service.tokenizer.encode(body.prompt, body.add_special_tokens)


async def detokenize(request: Request) -> Response:
    """The text of token ids, special tokens as they are spelled."""
    service = service_of(request)
    body = await read_json(request, DetokenizeBody)
    service.model_name(body.model)
    vocabulary = service.llm.model_config.vocabulary
    if any(not 0 <= token < vocabulary for token in body.tokens):
        raise bad_request(f"wanted token ids from 0 to {vocabulary - 1}: is it the right model?", "tokens")
    text = await service.off_loop(partial(service.tokenizer.decode, body.tokens, skip_special_tokens=False))
    return Response(msgspec.json.encode({"prompt": text}), media_type="application/json")


async def tokenizer_info(request: Request) -> Response:
    """How the special tokens are spelled, and the chat template: what a client needs to render prompts by itself."""
    tokenizer = service_of(request).tokenizer
    template = tokenizer.chat_template
    named = {} if template is None else template.special_tokens
    ends = [tokenizer.backend.id_to_token(token) for token in tokenizer.eos_token_ids]
    answer = {
        "eos_token": named.get("eos_token", ends[0] if ends else None),
        "bos_token": named.get("bos_token"),
        "pad_token": named.get("pad_token"),
        "chat_template": None if template is None else template.source,
    }
    return Response(msgspec.json.encode(answer), media_type="application/json")
