"""A server process whose steps break when a prompt says so: `python -m tests.hybrid_jax.server.faulty oracle|demo …`.

The prompt is [a mark, k, …]: the fault comes with the first step at which the request has drawn k tokens.
`oracle` runs the real engine on a device without a model that notices every mix-up; `demo` runs the model of that name.
"""

import argparse
import os
import socket
import time
import types
from dataclasses import replace
from enum import IntEnum
from functools import partial
from pathlib import Path

import jax.numpy as jnp
from jax.errors import JaxRuntimeError

import hybrid_jax
from hybrid_jax.llm import LLM
from hybrid_jax.request import SamplingParams
from hybrid_jax.server import connection
from hybrid_jax.server.process import serve
from hybrid_jax.server.settings import ServerConfig
from hybrid_jax.tokenizer import Tokenizer
from kernels_pallas.op import StateSpec
from tests.hybrid_jax.oracle_device import EOS, Setup, make_engine


class Mark(IntEnum):
    """The first token of a prompt, and what it asks for."""

    RAISE = 8100
    NAN = 8101
    STALL = 8102
    EXHAUST = 8103
    EXHAUST_LATE = 8104  # when the results are waited for
    EXHAUST_TWICE = 8105
    NOTHING = 8106


LOADING_S = 8.0  # with --slow-load: enough for a few requests on a busy machine
MAX_MODEL_LEN = 256
BUFFER_BYTES = 4096
DEMO = Path(hybrid_jax.__file__).parent / "demo"


class FaultyDevice:
    """A device that does as it is told by prompts. poison: has a row come out as no number."""

    def __init__(self, device, poison, step_s):
        self._device, self._poison, self._step_s = device, poison, step_s
        self._left: dict[str, int] = {}
        self._late = False

    def __getattr__(self, name):
        return getattr(self._device, name)

    def submit(self, step):
        for row in step.rows:
            mark = self._due(row)
            if mark == Mark.RAISE:
                raise RuntimeError("told to break")
            if mark == Mark.NAN:
                self._poison(self._device, row)
            if mark == Mark.STALL:
                time.sleep(3600)
            if mark in (Mark.EXHAUST, Mark.EXHAUST_TWICE):
                raise JaxRuntimeError("RESOURCE_EXHAUSTED: told to be full")
            self._late |= mark == Mark.EXHAUST_LATE
        return self._device.submit(step)

    def collect(self, ticket):
        time.sleep(self._step_s)
        if self._late:
            self._late = False
            raise JaxRuntimeError("RESOURCE_EXHAUSTED: told to be full")
        return self._device.collect(ticket)

    def _due(self, row):
        """The mark of a row whose time has come; each comes once, one of them twice."""
        mark, *rest = row.request.prompt_token_ids
        left = self._left.get(row.request.id, 2 if mark == Mark.EXHAUST_TWICE else 1)
        if not Mark.RAISE <= mark < Mark.NOTHING or row.drawn < rest[0] or not left:
            return None
        self._left[row.request.id] = left - 1
        return mark


def fail_on_the_oracle(device, row):
    device.fails[row.request.id] = len(row.request.prompt_token_ids) + row.drawn


def fill_with_nan(runner, row):
    """What the layers remember of a row becomes no numbers."""
    memory = runner._memory
    pools = tuple(
        tuple(array.at[:, row.read_slot].set(jnp.nan) for array in pool) if type(spec) is StateSpec else pool
        for spec, pool in zip(memory.cache.specs, memory.cache.pools, strict=True)
    )
    runner._memory = replace(memory, cache=replace(memory.cache, pools=pools))


def load_oracle(slow_s, step_s):
    """As much of a model as a server asks for."""
    time.sleep(slow_s)
    engine, _ = make_engine(Setup(rows=4, pages=129, waiting=8, run_ahead=True))
    engine._device = FaultyDevice(engine._device, fail_on_the_oracle, step_s)
    return types.SimpleNamespace(
        config=types.SimpleNamespace(max_waiting=8),
        memory=types.SimpleNamespace(max_num_seqs=4),
        model_config=types.SimpleNamespace(vocabulary=8192),
        max_model_len=MAX_MODEL_LEN,
        eos_token_ids=EOS,
        default_params=SamplingParams(),
        tokenizer=Tokenizer.find(DEMO),
        routing=types.SimpleNamespace(routes=(), parameters={}, token_bytes=0, request_bytes=0),
        engine=engine,
        stats=engine.stats,
        get_ready=lambda prompt_scores: None,
        generate=lambda prompts, params: None,
    )


def load_demo(compiled):
    llm = LLM(
        "demo",
        "float32",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        max_waiting=8,
        decode_steps=4,
        compilation_cache=compiled,
    )
    llm.get_ready = lambda prompt_scores: None  # a few programs are met, and compiled then
    llm.engine._device = FaultyDevice(llm.engine._device, fill_with_nan, 0.0)
    return llm


def create_narrow_server(create, *places, **options):
    """A listening socket whose connections hold few bytes, so that it is soon seen when a client takes none."""
    listening = create(*places, **options)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    return listening


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("device")
    parser.add_argument("--port", type=int)
    parser.add_argument("--compiled")
    parser.add_argument("--slow-load", action="store_true")
    for name, default in (
        ("step", 0.005),
        ("shutdown", 30.0),
        ("stall", 60.0),
        ("watchdog", 300.0),
        ("slow_client", 60.0),
        ("queue", 600.0),
    ):
        parser.add_argument(f"--{name}", type=float, default=default)
    given = parser.parse_args()
    connection.SLOW_CLIENT_S = connection.HEAD_S = given.slow_client
    socket.create_server = partial(create_narrow_server, socket.create_server)
    times = (given.shutdown, given.stall, given.watchdog)
    config = ServerConfig(("demo",), "127.0.0.1", given.port, (), *times, queue_timeout_s=given.queue)
    loads = {
        "oracle": partial(load_oracle, LOADING_S if given.slow_load else 0.0, given.step),
        "demo": partial(load_demo, given.compiled),
    }
    raise SystemExit(serve(loads[given.device], config))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
