"""One engine in several processes: each drives its own devices of one mesh, and all make the same calls in one order.

Every process plans the same steps from the same requests, so that nothing but arrays passes between them. If one ends,
the others cannot go on: they end, too. Knows nothing of models and requests.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import jax

LOST = 1  # exit code of a process that cannot go on
SILENCE_S = 10  # after which a process counts as gone


def join_processes(coordinator: str, count: int, index: int) -> None:
    """Make this process number `index` of `count`; before anything else of JAX. Waits for all of them.

    Args:
      coordinator: host:port of process 0, the same in all.
    Raises ValueError for an index that is not one of the processes.
    """
    if not 0 <= index < count:
        raise ValueError(f"wanted an index from 0 to {count - 1} of {count} processes, got {index}: number them from 0")
    if jax.config.jax_platforms == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, count, index, heartbeat_timeout_seconds=SILENCE_S)


@contextmanager
def end_together() -> Iterator[None]:
    """End one of several processes with one line and exit code 1 where JAX fails inside: the others cannot go on.

    At once, without the clean-up of the interpreter: that would wait for a process that is gone. Where JAX itself
    notices first that another one is gone, it ends this one with a message of its own.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = str(error).strip().split("\n")[0]
        line = f"process {jax.process_index()} of {jax.process_count()} ends, and so must the others: {reason}"
        print(f"hybrid-jax: {line}", file=sys.stderr, flush=True)
        os._exit(LOST)
