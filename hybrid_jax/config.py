"""The knobs of the engine, each with its meaning, unit and the reason of its default. Imports no JAX."""

from dataclasses import dataclass
from typing import Literal, get_args

CHUNK_TOKENS = 64  # prefill is cut at multiples of this, so that a state does not depend on how a prompt was cut

Dtype = Literal["bfloat16", "float32"]
Backend = Literal["auto", "xla", "tpu", "gpu"]


@dataclass(frozen=True)
class EngineConfig:
    """How an engine runs a model. Raises ValueError for a value out of range."""

    dtype: Dtype = "bfloat16"
    """Dtype of weights and activations; recurrent states are float32 either way. bfloat16 is what checkpoints store."""

    backend: Backend = "auto"
    """Who computes attention: `auto` takes the platform's own kernel of a kind where there is one, else plain XLA."""

    max_model_len: int | None = None
    """Most tokens of a request, prompt and output together. None: the model's own limit, but at most 8192."""

    max_num_seqs: int = 16
    """Most requests that run at once; each holds one state slot."""

    max_num_batched_tokens: int = 512
    """Most tokens of one prefill step. More fill the device better, but hold larger temporaries."""

    page_size: int = 64
    """Tokens a page of keys and values: large enough for one copy by a kernel, small enough to waste little."""

    decode_steps: int = 16
    """Tokens a request may generate in one dispatch of the on-device loop, before the host looks at them."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "page_size", "decode_steps"):
            self._require(name, 1, 2**20)
        if self.max_model_len is not None:
            self._require("max_model_len", 2, 2**24)
        if self.max_num_batched_tokens % CHUNK_TOKENS:
            raise ValueError(
                f"wanted max_num_batched_tokens in multiples of {CHUNK_TOKENS}, got {self.max_num_batched_tokens}: "
                f"set {self.max_num_batched_tokens // CHUNK_TOKENS * CHUNK_TOKENS + CHUNK_TOKENS}"
            )
        for name, value, known in (("dtype", self.dtype, Dtype), ("backend", self.backend, Backend)):
            if value not in get_args(known):
                raise ValueError(f"wanted {name} of {', '.join(get_args(known))}, got {value!r}")

    def _require(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"wanted {name} from {least} to {most}, got {value!r}: set it within this range")
