"""What every route works with: the model, the engine's thread, the settings, the counters."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property

from starlette.requests import Request

from hybrid_jax.llm import LLM
from hybrid_jax.server.dialects import THINK_CLOSE, Dialect, find_dialect
from hybrid_jax.server.engine_thread import EngineThread
from hybrid_jax.server.errors import ApiError, bad_request
from hybrid_jax.server.grammars import Grammars
from hybrid_jax.server.metrics import Metrics
from hybrid_jax.server.record import Record
from hybrid_jax.server.settings import ServerConfig
from hybrid_jax.server.template_process import IsolatedTemplate
from hybrid_jax.tokenizer import Tokenizer

TEXT_THREADS = 2


@dataclass(frozen=True, eq=False)
class Service:
    """One server."""

    llm: LLM
    engine: EngineThread
    config: ServerConfig
    metrics: Metrics
    started: int = field(default_factory=lambda: int(time.time()))
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(TEXT_THREADS, "text"))
    grammar_pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(TEXT_THREADS, "grammar"))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's, with its template rendered elsewhere. Raises ApiError 400 where the checkpoint has none."""
        found = self.llm.tokenizer
        if found is None:
            raise bad_request("the checkpoint has no tokenizer: send prompts as token ids", "prompt")
        template = found.chat_template
        return found if template is None else replace(found, chat_template=IsolatedTemplate(template))

    @cached_property
    def grammars(self) -> Grammars:
        """Compiled grammars. Raises as `tokenizer`."""
        return Grammars(self.tokenizer, self.llm.model_config.vocabulary, self.llm.eos_token_ids)

    @cached_property
    def thinks(self) -> bool:
        """Whether the chat template knows of thinking."""
        return THINK_CLOSE in self._template

    @cached_property
    def dialect(self) -> Dialect | None:
        """How the model spells calls, as far as its chat template says."""
        return find_dialect(self._template)

    @property
    def _template(self) -> str:
        tokenizer = self.llm.tokenizer
        return tokenizer.chat_template.source if tokenizer and tokenizer.chat_template else ""

    async def off_loop[Result](self, work: Callable[[], Result]) -> Result:
        """Do what takes time (tokenizing, templates) in a thread. A ValueError becomes ApiError 400."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.pool, work)
        except ValueError as error:
            raise bad_request(str(error)) from None

    def model_name(self, asked: str | None) -> str:
        """The name to answer with. Raises ApiError 404 for a model that is not served."""
        if asked is None:
            return self.config.names[0]
        if asked not in self.config.names:
            raise ApiError(
                404, f"the model {asked[:128]!r} is not served here: see /v1/models", "model_not_found", param="model"
            )
        return asked


def service_of(request: Request) -> Service:
    """The service behind a route."""
    found: Service = request.scope["service"]
    return found


def record_of(request: Request) -> Record:
    """The record of this request."""
    found: Record = request.scope["record"]
    return found
