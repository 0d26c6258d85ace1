"""Says how compiled steps grow with the depth of a model, and what a scan over groups of layers would change there.

    python scripts/tpu_depth.py 8 32 80

The model is Qwen3.5-0.8B with as many layers, of which every fourth keeps pages, and with a small vocabulary, compiled
for one chip of a v6e. A step
is made of its layers one after the other, as the engine makes it; `scanned` is an experiment that the engine does not
have: the four layers of a group once, the weights of all groups stacked, and the number of a layer a value of the loop.
Prefill kernels are compiled for the number of their layer, so that only decode is scanned.
"""

import dataclasses
import json
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from flax import nnx
from jaxtyping import Array

from hybrid_jax.aot import Subject, lower_program, prepare
from hybrid_jax.chips import open_slice
from hybrid_jax.config import EngineConfig
from kernels_pallas.op import Cache, Place, RaggedBatch
from models.decoder import Decoder

CONFIG = Path(__file__).parents[1] / "tests" / "configs" / "Qwen3.5-0.8B.json"
PERIOD = 4  # layers of a group: three that keep slots, one that keeps pages
ENGINE = EngineConfig(max_num_seqs=32, max_model_len=8192, max_num_batched_tokens=512, pages=1025, slots=65)
LESS = {"mtp_num_hidden_layers": 0, "vocab_size": 4096}  # sampling from a large vocabulary takes long to compile
HEAD = "| step | layers | form | arguments | instructions of the HLO | MB of code | traced and lowered s | compiled s |"


class Scanned(nnx.Module):
    """A decoder whose groups of layers run in one loop; its first group stands for all, with the weights stacked."""

    def __init__(self, decoder: Decoder, groups: int):
        self.rest = decoder
        self.group = nnx.List(list(decoder.layers)[:PERIOD])
        self.groups = groups
        self.specs = decoder.specs
        decoder.layers = nnx.List([])

    def __call__(self, tokens: Array, cache: Cache, batch: RaggedBatch) -> tuple[Array, Cache]:
        rotary = self.rest._rotary(tokens.shape[0], batch)
        graph, stacked = nnx.split(self.group)

        def run(carry: tuple[Array, Cache], given: tuple[Array, Any]) -> tuple[tuple[Array, Cache], None]:
            (x, cache), (index, state) = carry, given
            for number, layer in enumerate(nnx.merge(graph, state)):
                (mixer,) = layer.mixers
                of_kind = 1 if number == PERIOD - 1 else PERIOD - 1
                mixer.place = Place(mixer.place.pool, index * of_kind + number % (PERIOD - 1))
                x, cache = layer(x, rotary, cache, batch)
            return (x, cache), None

        start = self.rest.embedding(tokens), cache
        (x, cache), _ = jax.lax.scan(run, start, (jnp.arange(self.groups), stacked))
        return self.rest.norm(x), cache

    def logits(self, hidden: Array) -> Array:
        """Scores of the next token."""
        return self.rest.logits(hidden)


def cut(layers: int) -> dict[str, Any]:
    """The published config with so many layers."""
    hf = json.loads(CONFIG.read_text())
    text = hf["text_config"]
    kinds = text["layer_types"][:PERIOD] * (layers // PERIOD)
    return hf | {"text_config": text | {"num_hidden_layers": layers, "layer_types": kinds} | LESS}


def scan_layers(subject: Subject, layers: int) -> Subject:
    """The same model with its groups in one loop."""
    groups, one = layers // PERIOD, subject.placement.everywhere
    model: Any = Scanned(subject.model.decoder, groups)

    def shaped(path: tuple[Any, ...], leaf: Any) -> Any:
        lead = (groups,) if path[0] == "group" else ()
        return leaf.replace(jax.ShapeDtypeStruct((*lead, *leaf.shape), leaf.dtype, sharding=one))

    state = nnx.from_flat_state([(path, shaped(path, leaf)) for path, leaf in nnx.to_flat_state(nnx.state(model))])
    return dataclasses.replace(subject, model=dataclasses.replace(subject.model, decoder=model), state=state)


def line(sort: str, layers: int, form: str) -> str:
    """Compile one step and say what became of it."""
    subject = prepare(cut(layers), "Qwen3.5", open_slice("v6e:2x2"), ENGINE)
    if form == "scanned":
        subject = scan_layers(subject, layers)
    begin = time.process_time()
    lowered, arguments, _ = lower_program(subject, sort)
    lowered_s = time.process_time() - begin
    compiled = lowered.compile()
    stats: Any = compiled.memory_analysis()
    instructions = len(re.findall(r"^ +(?:ROOT )?%\S+ = ", compiled.as_text() or "", re.MULTILINE))
    spent_s = time.process_time() - begin - lowered_s
    return (
        f"| {sort} | {layers} | {form} | {arguments} | {instructions:,} | "
        f"{stats.generated_code_size_in_bytes / 1e6:.1f} | {lowered_s:.0f} | {spent_s:.0f} |"
    )


def report(layers: tyro.conf.Positional[tuple[int, ...]]) -> None:
    """Print a line a step, a depth and a form; seconds are those of the processor.

    Args:
        layers: depths, multiples of four.
    """
    print(HEAD + "\n" + "|---" * (HEAD.count("|") - 1) + "|")
    for sort, form in (("decode", "unrolled"), ("decode", "scanned"), ("prefill", "unrolled")):
        for depth in layers:
            print(line(sort, depth, form), flush=True)


if __name__ == "__main__":
    tyro.cli(report, description=__doc__)
