"""The verbs of `hybrid-jax bench`: one a function, its flags made from the function's arguments."""

import json as jsonlib
import sys
from typing import Annotated, Any

import jax
import tyro

from hybrid_jax.bench import kernels as kernel_cases
from hybrid_jax.bench.ceilings import measure_ceilings
from hybrid_jax.bench.latency import measure_latency
from hybrid_jax.bench.step import Repeats, time_steps
from hybrid_jax.bench.subject import Subject, open_subject
from hybrid_jax.bench.throughput import Bench, measure_throughput
from hybrid_jax.bench.traffic import Traffic
from hybrid_jax.config import Backend, Dtype, EngineConfig
from hybrid_jax.hub import DEMO

Model = Annotated[str, tyro.conf.Positional]


def step(
    config: Model,
    /,
    layers: int | None = None,
    context: tuple[int, ...] = (1024, 8192),
    batch: tuple[int, ...] = (1, 8, 64, 128),
    prefill: int = 0,
    prompt_tokens: int = 1024,
    loops: int = EngineConfig.decode_steps,
    dispatches: int = 8,
    dtype: Dtype = "bfloat16",
    backend: Backend = "auto",
    json: bool = False,
) -> None:
    """Time single steps of a model against the floor of what they must read, compute and write.

    Args:
        config: a config.json, whose weights are made up, or a checkpoint directory.
        layers: only so many first layers.
        context: tokens that every row has seen, each with every batch.
        batch: rows in decode.
        prefill: prompts read in one step; 0 for none.
        prompt_tokens: tokens of each prompt.
        loops: tokens that a row draws in one dispatch.
        dispatches: dispatches that are timed.
        dtype: of weights and caches.
        backend: who computes attention.
        json: print one JSON object instead of lines.
    """
    ceilings = measure_ceilings()
    subject = open_subject(config, dtype, backend, layers)
    _say(ceilings.description, subject.description, json=json)
    cases = []
    for case in time_steps(subject, ceilings, context, batch, (prefill, prompt_tokens), Repeats(loops, dispatches)):
        _say(case.line, json=json)
        cases.append(case.to_json())
    if json:
        _dump(_about(subject) | {"read": ceilings.read, "copy": ceilings.copy, "products": ceilings.products}, cases)


def throughput(
    model: Model = DEMO,
    /,
    requests: int = 64,
    prompt: tuple[int, int] = (16, 256),
    answer: tuple[int, int] = (16, 256),
    rate: float | None = None,
    seed: int = 0,
    repeats: int = 3,
    layers: int | None = None,
    max_num_seqs: int | None = None,
    max_num_batched_tokens: int = EngineConfig.max_num_batched_tokens,
    decode_steps: int = EngineConfig.decode_steps,
    memory_fraction: float = EngineConfig.memory_fraction,
    dtype: Dtype = "bfloat16",
    backend: Backend = "auto",
    json: bool = False,
) -> None:
    """Run requests of mixed lengths through the engine, and through static batches of the same programs.

    Args:
        model: a checkpoint directory, a config.json, whose weights are made up, or 'demo'.
        requests: how many.
        prompt: least and most tokens of a prompt; lengths are log-uniform.
        answer: least and most tokens of an answer; the model's own end is ignored.
        rate: requests a second; unset, all come at once.
        seed: of lengths, prompts and arrivals.
        repeats: runs of each way, by turns; the one of median time is shown.
        layers: only so many first layers of a config.json.
        max_num_seqs: most requests that run at once, in both ways.
        max_num_batched_tokens: most tokens of a step that reads prompts, in both ways.
        decode_steps: most tokens that a request draws in one dispatch, in both ways.
        memory_fraction: what may be used of the device's memory.
        dtype: of weights and caches.
        backend: who computes attention.
        json: print one JSON object instead of lines.
    """
    traffic = Traffic(requests, prompt, answer, rate, seed)
    subject = open_subject(model, dtype, backend, layers)
    _say(_device(), subject.description, json=json)
    config = EngineConfig(
        dtype=dtype,
        backend=backend,
        max_model_len=traffic.longest,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        decode_steps=decode_steps,
        memory_fraction=memory_fraction,
        max_waiting=max(requests, EngineConfig.max_waiting),
    )
    found = measure_throughput(Bench(subject, config), traffic, repeats)
    _say(*found.lines(), json=json)
    if json:
        _dump(_about(subject), [found.to_json()])


def latency(
    model: Model = DEMO,
    /,
    batch: tuple[int, ...] = (1, 4),
    input: int = 128,
    output: int = 128,
    repeats: int = 5,
    layers: int | None = None,
    decode_steps: int = EngineConfig.decode_steps,
    memory_fraction: float = EngineConfig.memory_fraction,
    dtype: Dtype = "bfloat16",
    backend: Backend = "auto",
    json: bool = False,
) -> None:
    """Time the first and the further tokens of requests that come at once.

    Args:
        model: a checkpoint directory, a config.json, whose weights are made up, or 'demo'.
        batch: how many requests come at once; each is measured.
        input: tokens of a prompt.
        output: tokens of an answer; the model's own end is ignored.
        repeats: runs of each batch.
        layers: only so many first layers of a config.json.
        decode_steps: most tokens that a request draws in one dispatch, and so the most that come at once.
        memory_fraction: what may be used of the device's memory.
        dtype: of weights and caches.
        backend: who computes attention.
        json: print one JSON object instead of lines.
    """
    subject = open_subject(model, dtype, backend, layers)
    _say(_device(), subject.description, json=json)
    cases = []
    for rows in batch:
        config = EngineConfig(
            dtype=dtype,
            backend=backend,
            max_model_len=max(input + output, 2),
            max_num_seqs=rows,
            decode_steps=decode_steps,
            memory_fraction=memory_fraction,
        )
        found = measure_latency(Bench(subject, config), rows, input, output, repeats)
        _say(found.line, json=json)
        cases.append(found.to_json())
    if json:
        _dump(_about(subject), cases)


def kernels(only: str = "", json: bool = False) -> None:
    """Time each kernel against the floor of its bytes and operations.

    A kernel that fails is one line of errors; the exit code is 1 then.

    Args:
        only: cases whose name or shape has this in it.
        json: print one JSON object instead of lines.
    """
    kernel_cases.require_kernels()
    wanted = kernel_cases.wanted_cases(only)
    ceilings = measure_ceilings()
    _say(ceilings.description, json=json)
    cases = []
    for case in wanted:
        try:
            found = kernel_cases.time_kernel(case, ceilings)
        except Exception as error:  # of any sort: one kernel must not hide the others
            print(f"{case.name}, {case.shape}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
            continue
        _say(found.line, json=json)
        cases.append(found.to_json())
    if json:
        _dump({"device": ceilings.device, "jax": jax.__version__}, cases)
    if len(cases) < len(wanted):
        raise SystemExit(1)


def _device() -> str:
    return f"{jax.devices()[0].device_kind}, JAX {jax.__version__}"


def _about(subject: Subject) -> dict[str, Any]:
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "model": subject.name,
        "layers": len(subject.model.layers),
        "parameters": sum(subject.routing.parameters.values()),
        "dtype": subject.dtype,
        "backends": subject.backends,
    }


def _say(*lines: str, json: bool) -> None:
    """Lines for people, where those are wanted."""
    for line in lines if not json else ():
        print(line, flush=True)


def _dump(about: dict[str, Any], cases: list[dict[str, Any]]) -> None:
    print(jsonlib.dumps(about | {"cases": cases}, indent=1))


Benches = (  # tyro runs the one that is named
    Annotated[None, tyro.conf.subcommand("step", constructor=step)]
    | Annotated[None, tyro.conf.subcommand("throughput", constructor=throughput)]
    | Annotated[None, tyro.conf.subcommand("latency", constructor=latency)]
    | Annotated[None, tyro.conf.subcommand("kernels", constructor=kernels)]
)
