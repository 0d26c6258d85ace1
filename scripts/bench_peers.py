"""Times our kernels and those of other libraries at the same shapes, in one run on one GPU.

python scripts/bench_peers.py --only "gdn prefill"

The libraries are jax-linear-attention 0.1 (JAX, Mosaic GPU) and fla-core 0.6 (torch, Triton); one that is not installed
is left out, and said. Ours are the cases of `hybrid-jax bench kernels`, which are checked before they are timed. JAX
must leave memory to torch: set XLA_PYTHON_CLIENT_PREALLOCATE=false. In decode, fla's recurrence stands alone, without
convolution, norms and gates, which ours computes too.
"""

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax.bench.ceilings import measure_ceilings
from hybrid_jax.bench.kernels import require_kernels, time_kernel, wanted_cases
from hybrid_jax.bench.timing import time_case
from kernels_pallas.cases.case import Case

PREFILLS = ((1, 8192), (8, 1024), (8, 4096), (1, 65536))  # rows, tokens of each
DECODES = (1, 8, 64, 256)
HEADS, KEY_HEADS, WIDTH = 32, 16, 128
KINDS = ("gdn", "lightning", "kda")

Timed = tuple[str, Callable[[], str]]  # what it is; runs it and says how long it took
Made = tuple[Callable[..., tuple[Any, ...]], tuple[Any, ...], tuple[int, ...]]  # as `Case.make` gives


def main(only: str) -> int:
    """Print a line for each case whose name contains `only`; 1 where one failed."""
    require_kernels()
    ceilings = measure_ceilings()
    print(ceilings.description)
    ours = [(case.name, partial(_line, case, ceilings)) for case in wanted_cases(only)]
    theirs = [case for case in (*jla_cases(), *fla_cases()) if only in case[0]]
    failed = 0
    for name, run in ours + theirs:
        try:
            print(run(), flush=True)
        except Exception as error:  # of any sort: one must not hide the others
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
            failed = 1
    return failed


def _line(case: Case, ceilings: Any) -> str:
    return time_kernel(case, ceilings).line


def jla_cases() -> list[Timed]:
    """Reading prompts with jax-linear-attention; its simple GLA beside lightning."""
    if importlib.util.find_spec("jla") is None:
        print("jax-linear-attention is not installed, so not timed")
        return []
    return [
        _named("jla", f"{kind} prefill, {rows} x {tokens}", partial(_jla_s, kind, rows, tokens))
        for kind in KINDS
        for rows, tokens in PREFILLS
    ]


def fla_cases() -> list[Timed]:
    """Reading prompts and decoding with fla-core."""
    if importlib.util.find_spec("fla") is None:
        print("fla-core is not installed, so not timed")
        return []
    prefills = [
        _named("fla", f"{kind} prefill, {rows} x {tokens}", partial(_graph_s, kind, rows, tokens))
        for kind in KINDS
        for rows, tokens in PREFILLS
    ]
    decodes = [
        _named("fla", f"{kind} decode, recurrence alone, batch {rows}", partial(_graph_s, kind, rows, 1))
        for kind in KINDS
        for rows in DECODES
    ]
    return prefills + decodes


def _named(library: str, what: str, seconds: Callable[[], float]) -> Timed:
    name = f"{library}, {what}"
    return name, lambda: f"{name}: {seconds() * 1e6:,.1f} us"


def _jla_s(kind: str, rows: int, tokens: int) -> float:
    return time_case(Case(kind, "", partial(_make_jla, kind, rows, tokens), 0, 0))[0]


def _make_jla(
    kind: str, rows: int, tokens: int
) -> tuple[Callable[..., tuple[Any, ...]], tuple[Any, ...], tuple[int, ...]]:
    from jla.ops.mosaic_gpu.gated_delta_rule import gated_delta_rule
    from jla.ops.mosaic_gpu.kda import kda
    from jla.ops.mosaic_gpu.scalar_gate import simple_gla

    kernel = {"gdn": gated_delta_rule, "lightning": simple_gla, "kda": kda}[kind]

    def call(*arguments: jax.Array) -> tuple[Any, ...]:
        return tuple(kernel(*arguments, output_final_state=True))

    return call, _jax_tokens(kind, rows, tokens), ()


def _jax_tokens(kind: str, rows: int, tokens: int) -> tuple[jax.Array, ...]:
    """Queries, keys, values and gates as the library takes them, `[B, T, H, d]`; unit keys."""
    normal = [jax.random.normal(jax.random.key(seed), (rows, tokens, HEADS, WIDTH)) for seed in range(3)]
    heads = KEY_HEADS if kind == "gdn" else HEADS
    unit = [x[:, :, :heads] / jnp.linalg.norm(x[:, :, :heads], axis=-1, keepdims=True) for x in normal[:2]]
    q, k, v = (x.astype(jnp.bfloat16) for x in (*unit, normal[2]))
    gate_shape = (rows, tokens, HEADS, WIDTH) if kind == "kda" else (rows, tokens, HEADS)
    gates = -jnp.exp(jax.random.normal(jax.random.key(3), gate_shape) - 3)
    if kind == "lightning":
        return q, k, v, gates
    return q, k, v, gates, jax.nn.sigmoid(jax.random.normal(jax.random.key(4), (rows, tokens, HEADS)))


def _make_fla(kind: str, rows: int, tokens: int) -> Callable[[], Any]:
    import torch
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
    from fla.ops.kda import chunk_kda, fused_recurrent_kda
    from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla

    q, k, v = (torch.randn(rows, tokens, HEADS, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    gates = -torch.rand(rows, tokens, HEADS, *((WIDTH,) if kind == "kda" else ()), device="cuda")
    beta = torch.rand(rows, tokens, HEADS, device="cuda").to(torch.bfloat16)
    state = torch.randn(rows, HEADS, WIDTH, WIDTH, device="cuda")
    chunked = {"gdn": chunk_gated_delta_rule, "lightning": chunk_simple_gla, "kda": chunk_kda}
    recurrent = {
        "gdn": fused_recurrent_gated_delta_rule,
        "lightning": fused_recurrent_simple_gla,
        "kda": fused_recurrent_kda,
    }
    function = (recurrent if tokens == 1 else chunked)[kind]
    settings = {"initial_state": state, "output_final_state": True, "g": gates}
    if kind != "lightning":
        settings |= {"beta": beta, "use_qk_l2norm_in_kernel": True}
    return partial(function, q, k, v, **settings)


def _graph_s(kind: str, rows: int, tokens: int, runs: int = 20) -> float:
    """Median seconds of a call, replayed from a CUDA graph, by CUDA's events."""
    import torch

    call = torch.no_grad()(_make_fla(kind, rows, tokens))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph, times_ms = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        call()
    for _ in range(runs):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times_ms.append(start.elapsed_time(stop))
    return statistics.median(times_ms) * 1e-3


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    raise SystemExit(main(parser.parse_args().only))
