"""The knobs of the engine, each with its meaning, unit and the reason of its default. Imports no JAX."""

from dataclasses import dataclass
from typing import Literal, get_args

CHUNK_TOKENS = 64  # prefill is cut at multiples of this, so that a state does not depend on how a prompt was cut

Dtype = Literal["bfloat16", "float32"]
Backend = Literal["auto", "xla", "tpu", "gpu"]
Quantization = Literal["fp8", "int8"]


def step_tokens(asked: int, requests: int) -> int:
    """Most tokens of a step: what was asked for, but room for all requests in decode and a chunk of a prompt."""
    return max(asked, requests + CHUNK_TOKENS)


@dataclass(frozen=True)
class EngineConfig:
    """How an engine runs a model. Raises ValueError for a value out of range."""

    dtype: Dtype = "bfloat16"
    """Dtype of weights and activations; recurrent states are float32 either way. bfloat16 is what checkpoints store."""

    quantization: Quantization | None = None
    """What weights become on load, with a scale for each output channel; activations stay as they are. None: they stay
    as stored, but for one thing: a CPU gets those that are stored in eight bits in the dtype above, since it has no
    product that reads them. A checkpoint that is stored in eight bits can be given no others."""

    backend: Backend = "auto"
    """Who computes attention: `auto` takes the platform's own kernel of a kind where there is one, else plain XLA."""

    tensor_parallel: int = 1
    """Devices that divide the model among them by heads, inner channels and experts. For copies of a model, each with
    requests of its own, start an engine for each."""

    expert_parallel: int = 1
    """Groups of so many devices that repeat the heads and divide everything else further, for a model whose heads do
    not divide among all the devices that its experts need."""

    max_model_len: int | None = None
    """Most tokens of a request, prompt and output together. None: the model's own limit, but at most 8192."""

    max_num_seqs: int | None = None
    """Most requests that run at once; each holds one state slot. None: what the memory allows, up to 256, and 16 on a
    CPU, which larger batches do not make faster."""

    max_num_batched_tokens: int = 2048
    """Most tokens of a step that reads prompts. More fill the device better, but keep requests in decode waiting."""

    page_size: int = 64
    """Tokens a page of keys and values: large enough for one copy by a kernel, small enough to waste little."""

    pages: int | None = None
    """Pages, the null page included. None: what the memory allows."""

    slots: int | None = None
    """State slots, the null slot included; a running request needs one, a snapshot in the prefix cache another. None:
    what the memory allows, up to three for each request that may run."""

    memory_fraction: float = 0.9
    """Share of the device's memory for weights, pages, slots and temporaries; the rest is the driver's."""

    decode_steps: int = 16
    """Tokens a request may generate in one dispatch of the on-device loop, before the host looks at them."""

    prefix_caching: bool = True
    """Keep the pages and states of prompts and answers, for later requests that begin with the same tokens."""

    snapshot_interval: int = 512
    """Prompt tokens between snapshots of the state on a grid, beside those at the ends of prompts and answers and where
    prompts branch; 0 for none. Writing one costs as much as reading it; a new one displaces the one before it first."""

    max_waiting: int = 4096
    """Most requests in line; one more is refused."""

    run_ahead: bool = True
    """Start a step before the tokens of the step before it are known, so that the device never waits for the host."""

    compilation_cache: str | None = None
    """Folder in which compiled programs are kept, so that the next start need not compile them. None: as JAX is set."""

    canary: bool = False
    """Stamp every page and slot with owner and position and check that on reading: finds faults of the engine."""

    def __post_init__(self) -> None:
        for name in (
            "tensor_parallel",
            "expert_parallel",
            "max_num_batched_tokens",
            "page_size",
            "decode_steps",
            "max_waiting",
        ):
            self._require(name, 1, 2**20)
        self._require("snapshot_interval", 0, 2**20)
        for name, least, most in (
            ("max_model_len", 2, 2**24),
            ("max_num_seqs", 1, 2**16),
            ("pages", 2, 2**31 - 1),
            ("slots", 2, 2**31 - 1),
        ):
            if getattr(self, name) is not None:
                self._require(name, least, most)
        if not 0 < self.memory_fraction <= 1:
            raise ValueError(f"wanted memory_fraction above 0 and up to 1, got {self.memory_fraction}: set 0.9")
        if self.max_num_batched_tokens % CHUNK_TOKENS:
            raise ValueError(
                f"wanted max_num_batched_tokens in multiples of {CHUNK_TOKENS}, got {self.max_num_batched_tokens}: "
                f"set {self.max_num_batched_tokens // CHUNK_TOKENS * CHUNK_TOKENS + CHUNK_TOKENS}"
            )
        for name, value, known in (("dtype", self.dtype, Dtype), ("backend", self.backend, Backend)):
            if value not in get_args(known):
                raise ValueError(f"wanted {name} of {', '.join(get_args(known))}, got {value!r}")
        if self.quantization not in (None, *get_args(Quantization)):
            names = ", ".join(get_args(Quantization))
            raise ValueError(f"wanted quantization of {names}, or None, got {self.quantization!r}")

    def _require(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"wanted {name} from {least} to {most}, got {value!r}: set it within this range")
