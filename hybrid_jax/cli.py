"""The command `hybrid-jax`: one verb a function, its flags made from the function's arguments.

Exit codes: 0 done; 1 a problem was found in a checkpoint, or something unexpected happened; 2 bad usage, config or
checkpoint; 130 interrupted.
"""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from hybrid_jax import convert as conversion
from hybrid_jax import inspection
from hybrid_jax import plan as planning
from hybrid_jax.batch.command import batch
from hybrid_jax.bench.verbs import Benches
from hybrid_jax.config import Backend, Dtype, EngineConfig, Quantization
from hybrid_jax.hub import find_model
from hybrid_jax.llm import LLM
from hybrid_jax.memory import Limits, plan_memory
from hybrid_jax.progress import show_progress
from hybrid_jax.request import SamplingParams
from hybrid_jax.routing import summary, to_json, to_table

Model = Annotated[str, tyro.conf.Positional]
Directory = Annotated[Path, tyro.conf.Positional]
Several = tyro.conf.UseAppendAction[tuple[str, ...]]
CONFIG_ONLY = ("config.json",)
DEFAULT_ENGINE = EngineConfig()


def routing(
    model: Model,
    /,
    json: bool = False,
    dtype: Dtype = "bfloat16",
    backend: Backend = "auto",
    quantization: Quantization | None = None,
) -> None:
    """Print the routing of a model: for each role and layer its kind, what it keeps, and who computes it.

    Nothing is loaded; the config is enough.

    Args:
        model: a checkpoint directory, a config.json, or 'demo'.
        json: print one JSON object instead of a table.
        dtype: of weights and caches.
        backend: who computes attention; 'auto' takes the platform's own kernel where there is one.
        quantization: what weights become on load; unset, they are as stored.
    """
    built = planning.build(find_model(model, CONFIG_ONLY), dtype, backend, quantization)
    found = built.routing
    if json:
        print(_dump(to_json(found) | {"weights": list(built.weights.describe())}))
        return
    console = Console()
    console.print(to_table(found, model))
    for line in (summary(found), *built.weights.describe()):
        console.print(line, highlight=False, soft_wrap=True)


def generate(
    model: Model,
    /,
    prompt: str,
    chat: bool = False,
    max_tokens: int = 256,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    stop: tuple[str, ...] = (),
    ignore_eos: bool = False,
    dtype: Dtype = "bfloat16",
    backend: Backend = "auto",
    quantization: Quantization | None = None,
    max_model_len: int | None = None,
) -> None:
    """Generate text from one prompt and print it as it comes.

    Args:
        model: a checkpoint directory, or 'demo'.
        prompt: the text to go on from.
        chat: render the prompt as a user's message with the checkpoint's chat template.
        max_tokens: most tokens to generate.
        temperature: 0 takes the most likely token; unset, like the next three, is what the checkpoint says.
        top_k: only the k most likely tokens.
        top_p: only the most likely tokens that together reach this probability.
        min_p: only tokens at least this many times as likely as the most likely one.
        seed: the same seed gives the same text.
        stop: texts that end the answer.
        ignore_eos: go on behind the model's end of text.
        dtype: of weights and caches.
        backend: who computes attention.
        quantization: what weights become on load; unset, they are as stored.
        max_model_len: most tokens of prompt and answer together.
    """
    llm = LLM(model, dtype, backend, quantization=quantization, max_model_len=max_model_len, max_num_seqs=1)
    tokens = llm.encode_chat(prompt) if chat else llm.encode(prompt)
    default = llm.default_params
    params = SamplingParams(
        temperature=default.temperature if temperature is None else temperature,
        top_k=default.top_k if top_k is None else top_k,
        top_p=default.top_p if top_p is None else top_p,
        min_p=default.min_p if min_p is None else min_p,
        seed=seed,
        stop=stop,
        max_tokens=min(max_tokens, max(llm.max_model_len - len(tokens), 1)),
        ignore_eos=ignore_eos,
    )
    pieces = llm.stream(tokens, params)
    if not chat:
        print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def convert(source: Directory, destination: Directory, /, to: Literal["orbax", "hf"]) -> None:
    """Convert a checkpoint, bit for bit. An interrupted conversion goes on where it stopped.

    Args:
        source: a published directory (safetensors) or an Orbax directory.
        destination: a new directory.
        to: 'orbax', or 'hf' for published safetensors files.
    """
    verb = {"orbax": conversion.to_orbax, "hf": conversion.to_hf}[to]
    with show_progress(Console(stderr=True)) as progress:
        verb(source, destination, progress)


def inspect(model: Model, /) -> None:
    """Print what a checkpoint holds. Ends with exit code 1 where `verify` would find a problem.

    Args:
        model: a checkpoint directory, a config.json, or 'demo'.
    """
    found = inspection.inspect(find_model(model))
    inspection.render_inspection(found, Console())
    if found.problems:
        raise SystemExit(1)


def verify(model: Model, /) -> None:
    """Check a checkpoint: files, index, names and shapes are those that its config asks for, and nothing is left over.

    Args:
        model: a checkpoint directory, or 'demo'.
    """
    found = inspection.verify(find_model(model))
    inspection.render_verification(found, Console())
    if found.problems:
        raise SystemExit(1)


def plan(
    model: Model,
    /,
    hbm_gib: float,
    devices: int = 1,
    max_model_len: int | None = None,
    max_num_seqs: int | None = None,
    pages: int | None = None,
    slots: int | None = None,
    page_size: int = Limits.page_size,
    max_num_batched_tokens: int = Limits.max_num_batched_tokens,
    memory_fraction: float = Limits.memory_fraction,
    prefix_caching: bool = Limits.prefix_caching,
    dtype: Dtype = "bfloat16",
    backend: Backend = "auto",
    quantization: Quantization | None = None,
    json: bool = False,
) -> None:
    """Print how the memory of each device would be shared out, and what fits. Ends with exit code 2 where it does not.

    Nothing is loaded; the config is enough. What is unset is worked out.

    Args:
        model: a checkpoint directory, a config.json, owner/name of a hub repository, or 'demo'.
        hbm_gib: memory of one device, in GiB.
        devices: devices that share every layer.
        max_model_len: most tokens of a request, prompt and answer together.
        max_num_seqs: most requests that run at once.
        pages: pages of keys and values, the null page included.
        slots: slots of states and snapshots, the null slot included.
        page_size: tokens a page.
        max_num_batched_tokens: most tokens of a step.
        memory_fraction: what may be used of a device's memory.
        prefix_caching: keep states and pages of prompts for later requests.
        dtype: of weights and caches.
        backend: who computes attention; plain XLA needs more temporaries than a kernel.
        quantization: what weights become on load; unset, they are as stored.
        json: print one JSON object instead of a table.
    """
    limits = Limits(
        max_model_len, max_num_seqs, pages, slots, page_size, max_num_batched_tokens, memory_fraction, prefix_caching
    )
    memory_bytes = planning.device_bytes(hbm_gib, devices)
    built = planning.build(find_model(model, CONFIG_ONLY), dtype, backend, quantization)
    layout = planning.plan_layout(built, devices)
    found = plan_memory(planning.measure(built, devices), memory_bytes, limits)
    if json:
        print(_dump(planning.to_json(found, built.routing, layout)))
        return
    planning.render(found, built.routing, layout, f"{model}, {devices} x {hbm_gib:g} GiB", Console())
    for line in built.weights.describe():
        print(line)


def aot(
    model: Model,
    /,
    topology: str,
    json: bool = False,
    engine: Annotated[EngineConfig, tyro.conf.arg(name="")] = DEFAULT_ENGINE,
) -> None:
    """Compile the decode and the prefill step for TPUs that are not there, and print whether they fit and their cost.

    Nothing is loaded; the config is enough. Needs the extra 'tpu'. Ends with 0 where they fit, and with 1 where not.

    Args:
        model: a checkpoint directory, a config.json, owner/name of a hub repository, or 'demo'.
        topology: of the slice, such as v5e:4x4, v5p:2x2x4, v6e:4x4 or tpu7x:2x2x1; its first devices, as many as
            tensor-parallel and expert-parallel make, divide the model.
        json: print one JSON object instead of a table.
        engine: how an engine would run the model.
    """
    from hybrid_jax import aot_report  # an extra: other verbs run without it
    from hybrid_jax.aot import NoRoom, compile_steps

    try:
        found = compile_steps(find_model(model, CONFIG_ONLY), model, topology, engine)
    except NoRoom as error:
        print(_dump({"fits": False, "reason": str(error)}) if json else f"It does NOT fit: {error}")
        raise SystemExit(1) from None
    if json:
        print(_dump(found.to_json()))
    else:
        aot_report.render(found, Console())
    raise SystemExit(0 if found.fits else 1)


def serve(
    model: Model,
    /,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: Several = (),
    api_key_file: Path | None = None,
    served_model_name: Several = (),
    shutdown_timeout_s: Annotated[float, tyro.conf.arg(name="shutdown-timeout")] = 30.0,
    stall_timeout_s: Annotated[float, tyro.conf.arg(name="stall-timeout")] = 60.0,
    queue_timeout_s: Annotated[float, tyro.conf.arg(name="queue-timeout")] = 600.0,
    watchdog_timeout_s: Annotated[float, tyro.conf.arg(name="watchdog-timeout")] = 300.0,
    strict_fields: bool = False,
    engine: Annotated[EngineConfig, tyro.conf.arg(name="")] = DEFAULT_ENGINE,
) -> None:
    """Serve a model over HTTP, as OpenAI does. Needs the extra 'serve'.

    The port opens at once; /ready tells when the model is loaded and compiled. Ends with 0 after SIGTERM, once running
    requests are answered, with 1 when the engine breaks, and at once at a second signal, with 128 and its number.

    Args:
        model: a checkpoint directory, or 'demo'.
        host: address to listen on; without an API key leave it on this machine.
        port: port to listen on; 0 takes a free one.
        api_key: a key that opens the server, repeatable; everybody on this machine can read it off the command line.
        api_key_file: file with a key a line.
        served_model_name: name of the model in requests, repeatable; unset, MODEL as given.
        shutdown_timeout_s: seconds that running requests may go on after SIGTERM.
        stall_timeout_s: seconds without a turn of the engine after which /health fails.
        queue_timeout_s: seconds that a request may wait for its turn before it ends with a 503.
        watchdog_timeout_s: seconds without a turn of the engine after which the process ends with exit code 1.
        strict_fields: refuse every unknown field of a request.
        engine: how the engine runs the model.
    """
    from hybrid_jax.server.process import serve as serve_http  # an extra: other verbs run without it
    from hybrid_jax.server.settings import ServerConfig, read_keys

    config = ServerConfig(
        names=served_model_name or (model,),
        host=host,
        port=port,
        api_keys=(*api_key, *read_keys(api_key_file)),
        shutdown_timeout_s=shutdown_timeout_s,
        stall_timeout_s=stall_timeout_s,
        queue_timeout_s=queue_timeout_s,
        watchdog_timeout_s=watchdog_timeout_s,
        strict_fields=strict_fields,
    )
    raise SystemExit(serve_http(partial(_open, model, engine), config))


def _open(model: str, engine: EngineConfig) -> LLM:
    return LLM(
        model,
        engine.dtype,
        engine.backend,
        quantization=engine.quantization,
        tensor_parallel=engine.tensor_parallel,
        expert_parallel=engine.expert_parallel,
        max_model_len=engine.max_model_len,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        page_size=engine.page_size,
        pages=engine.pages,
        slots=engine.slots,
        memory_fraction=engine.memory_fraction,
        decode_steps=engine.decode_steps,
        prefix_caching=engine.prefix_caching,
        snapshot_interval=engine.snapshot_interval,
        max_waiting=engine.max_waiting,
        run_ahead=engine.run_ahead,
        compilation_cache=engine.compilation_cache,
        canary=engine.canary,
    )


def bench(what: Annotated[Benches, tyro.conf.arg(name="")]) -> None:
    """Measure steps, throughput, latency or kernels on this machine's device."""


VERBS: dict[str, Callable[..., None]] = {
    "routing": routing,
    "plan": plan,
    "aot": aot,
    "generate": generate,
    "serve": serve,
    "batch": batch,
    "convert": convert,
    "inspect": inspect,
    "verify": verify,
    "bench": bench,
}


def main() -> None:
    """Run one verb; a bad input is one message and exit code 2."""
    try:
        tyro.extras.subcommand_cli_from_dict(VERBS, prog="hybrid-jax", description=__doc__)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read us has gone
    except (ValueError, NotImplementedError, OSError) as error:
        print(f"hybrid-jax: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _dump(value: Any) -> str:
    return json.dumps(value, indent=1)


if __name__ == "__main__":
    main()
