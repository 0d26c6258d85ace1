"""Times decode step and prefill of a model with random weights, from its config alone, against the memory floor.

    python scripts/bench_step.py CONFIG.json --layers 12 --context 1024 --batch 1 8 64

The floor of a decode step is (weights + pages read + states read and written) / (bandwidth of a large copy on the same
device). Times are of the device loop of the engine itself: one dispatch makes `--steps` tokens per request, and the
median of several dispatches is taken. Weights that a token does not use (experts not chosen) are not counted.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybrid_jax.engine import power_of_two
from hybrid_jax.request import SamplingParams, make_request
from hybrid_jax.routing import Routing, keeps_pages, route_model, unit_bytes
from hybrid_jax.runner import Runner
from hybrid_jax.sampling import pack
from kernels_pallas.op import host_batch
from models.registry import find_family

PAGE = 64


def build(path: Path, layers: int | None) -> tuple[Any, Routing]:
    """A model with random weights in bfloat16, perhaps of its first layers only."""
    hf = json.loads(path.read_text())
    fields = hf.get("text_config", hf)
    if layers is not None:
        fields["num_hidden_layers"] = layers
        fields.pop("layer_types", None)
        fields["mtp_num_hidden_layers" if "mtp_num_hidden_layers" in fields else "num_nextn_predict_layers"] = 0
    family = find_family(hf)
    config = family.Config.from_hf(hf)
    model = nnx.jit(lambda: family.Model(config, rngs=nnx.Rngs(0), dtype="bfloat16"))()
    return model, route_model(model)


def copy_bandwidth() -> float:
    """Bytes read and written a second by a large copy on the device."""
    x = jnp.ones((1 << 30,), jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)
    copy(x).block_until_ready()
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        copy(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * x.nbytes / statistics.median(seconds)


def weight_bytes(model: Any, chosen: int, tokens: int) -> int:
    """Bytes of weights that a decode step of `tokens` tokens reads: those of the target, each expert at most once.

    Args:
      chosen: experts that a token takes, at random: with E experts a share of 1 - (1 - chosen / E) ** tokens is read.
    """
    total = 0.0
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        name = ".".join(map(str, path))
        share = 1.0
        if name.startswith("draft.") or (name == "embedding.table" and model.head is not None):
            share = 0.0
        elif ".experts." in name:
            share = 1 - (1 - chosen / leaf.shape[0]) ** tokens
        total += share * leaf[...].nbytes
    return int(total)


def target_bytes(routing: Routing) -> tuple[int, int]:
    """Bytes that the target's layers keep for a token and for a request."""
    routes = [route for route in routing.routes if route.role == "target"]
    pages = sum(unit_bytes(route) for route in routes if keeps_pages(route))
    return pages, sum(unit_bytes(route) for route in routes) - pages


def time_decode(runner: Runner, batch: int, context: int, steps: int) -> float:
    """Seconds a step, median over dispatches."""
    params = SamplingParams(temperature=0, ignore_eos=True)
    requests = [make_request(str(row), [1] * 2, params, 1 << 20) for row in range(batch)]
    pages = -(-(context + steps) // PAGE)
    table = 1 + np.arange(batch * pages).reshape(batch, pages)
    table = np.pad(table, ((0, 0), (0, power_of_two(pages) - pages)))
    slot, none = np.arange(1, batch + 1), np.zeros(batch)
    seen = np.full(batch, context)
    ragged = host_batch(np.arange(batch + 1), seen, batch, (slot, slot, none), none, table, "decode")
    rows = pack(requests, [1] * batch, batch, [0])
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        runner.decode(np.ones(batch, np.int32), ragged, rows, steps)
        seconds.append((time.perf_counter() - start) / steps)
    return statistics.median(seconds[1:])


def time_prefill(runner: Runner, batch: int, length: int) -> float:
    """Tokens a second of one prefill step of `batch` prompts."""
    requests = [make_request(str(row), [1] * 2, SamplingParams(temperature=0), 1 << 20) for row in range(batch)]
    pages = -(-length // PAGE)
    table = 1 + np.arange(batch * pages).reshape(batch, pages)
    slot, none = np.arange(1, batch + 1), np.zeros(batch)
    start = np.arange(batch + 1) * length
    ragged = host_batch(start, np.zeros(batch), 0, (slot, slot, none), none, table, "prefill")
    rows = pack(requests, [0] * batch, batch, [0])
    tokens = np.random.default_rng(0).integers(0, 1000, batch * length).astype(np.int32)
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        runner.prefill(tokens, ragged, rows)
        seconds.append(time.perf_counter() - begin)
    return batch * length / statistics.median(seconds[1:])


def main() -> None:
    """Build, measure, print one line per batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--prefill", type=int, default=0, help="also time a prefill of so many prompts of 1024 tokens")
    args = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}: copy {bandwidth / 1e9:.0f} GB/s", flush=True)
    model, routing = build(args.config, args.layers)
    token_bytes, request_bytes = target_bytes(routing)
    hf = json.loads(args.config.read_text())
    chosen = hf.get("text_config", hf).get("num_experts_per_tok", 0)
    most = max([*args.batch, args.prefill])
    pages = most * -(-(max(args.context, 1024) + args.steps) // PAGE) + 1
    runner = Runner(model, routing, pages, most + 1, PAGE, None)
    for batch in args.batch:
        moved = weight_bytes(model, chosen, batch) + batch * (2 * request_bytes + args.context * token_bytes)
        begin = time.perf_counter()
        seconds = time_decode(runner, batch, args.context, args.steps)
        print(
            f"decode batch {batch} context {args.context}: {seconds * 1e3:.2f} ms a step, floor "
            f"{moved / bandwidth * 1e3:.2f} ms, {moved / bandwidth / seconds:.2f} of it; "
            f"{time.perf_counter() - begin:.0f} s with compilation",
            flush=True,
        )
    if args.prefill:
        rate = time_prefill(runner, args.prefill, 1024)
        print(f"prefill {args.prefill} x 1024: {rate:,.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
