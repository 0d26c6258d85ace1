"""The verb `batch`: its flags, and what they mean to a job. Imports nothing of an extra."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from hybrid_jax.batch.settings import BatchConfig
from hybrid_jax.config import EngineConfig

Several = tyro.conf.UseAppendAction[tuple[str, ...]]


@dataclass(frozen=True)
class Cluster:
    """Replicas on a Ray cluster. Needs the extra `ray`."""

    ray: str | None = None
    """Run replicas on a Ray cluster: its address, 'auto', or 'local'. Needs the extra 'ray'."""

    replicas: int = 1
    """With Ray, most replicas at once."""

    replica_resource: Several = ()
    """With Ray, what each replica takes, as NAME=COUNT, such as GPU=1; repeatable."""


DEFAULT_ENGINE, DEFAULT_CLUSTER = EngineConfig(), Cluster()


def batch(
    input: Annotated[Path, tyro.conf.arg(aliases=["-i"])],
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    model: str,
    served_model_name: Several = (),
    seed: int | None = None,
    skip_invalid: bool = False,
    shard_lines: int = BatchConfig.shard_lines,
    grace_s: Annotated[float, tyro.conf.arg(name="grace")] = BatchConfig.grace_s,
    shard_index: int = 0,
    num_shards: int = 1,
    merge: bool = False,
    restart: bool = False,
    force_resume: bool = False,
    cluster: Annotated[Cluster, tyro.conf.arg(name="")] = DEFAULT_CLUSTER,
    engine: Annotated[EngineConfig, tyro.conf.arg(name="")] = DEFAULT_ENGINE,
) -> None:
    """Answer the lines of an OpenAI batch file. The same command goes on where an earlier one ended.

    Needs the extra 'serve'. Ends with 0 when every line is answered, 3 when some failed, 75 after SIGTERM, 1 when the
    engine or the disk broke, 2 for an input that is none. docs/batch.md has the rest.

    Args:
        input: file with a request a line.
        output: file of answers, in the order of the input; failed lines go to OUTPUT.errors.jsonl.
        model: a checkpoint directory, or 'demo'.
        served_model_name: name of the model in requests, repeatable; unset, MODEL as given.
        seed: of lines that have none; unset, one is drawn and kept for when the job goes on.
        skip_invalid: lines that are no requests become errors instead of stopping the job.
        shard_lines: lines that workers share out at a time.
        grace_s: seconds that running lines may go on after SIGTERM.
        shard_index: number of this worker, from 0.
        num_shards: workers that share the lines, each started with this command and its own number.
        merge: only put the work of finished workers together.
        restart: move what an earlier run left aside.
        force_resume: go on although model, settings or version are not those that the job began with.
        cluster: where replicas run.
        engine: how the engine runs the model.
    """
    from hybrid_jax.batch.start import start_batch  # an extra: other verbs run without it

    names = served_model_name or (model,)
    # Of the engine's settings those that can change an answer by more than the last bits of its logits.
    settings = (("dtype", engine.dtype), ("backend", engine.backend), ("max_model_len", engine.max_model_len))
    config = BatchConfig(
        *(input, output, model, names, settings, seed, skip_invalid, shard_lines, grace_s),
        *(shard_index, num_shards, restart, force_resume),
    )
    raise SystemExit(start_batch(config, engine, merge, cluster))
