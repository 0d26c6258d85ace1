"""A job on several machines: Ray hands the numbers of shards to an actor pool, one replica an actor.

Only numbers and counts travel through Ray; lines and answers stay on the file system that all machines share, so that
what makes a job resumable there makes it survive workers, nodes and this process, too. The one module that imports ray.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import ray
import ray.data
from rich.console import Console

from hybrid_jax.batch.index import Index
from hybrid_jax.batch.journal import read_done
from hybrid_jax.batch.manifest import Manifest
from hybrid_jax.batch.replica import Opener
from hybrid_jax.batch.report import show_tally
from hybrid_jax.batch.run import Run, Signals
from hybrid_jax.batch.settings import BatchConfig
from hybrid_jax.batch.verb import Runner
from hybrid_jax.batch.work import FATAL_MARKS, SUSPECT_MARKS, Tally

INDEX = "index.npz"
# A line that kills its worker is given up after so many deaths, and a few may die of other things.
RESTARTS = SUSPECT_MARKS + FATAL_MARKS + 3
Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Fleet:
    """Where replicas run.

    address: of a running cluster, `auto` for the one of this machine, `local` for a new one on it.
    replicas: most at once. resources: of the cluster that each takes, such as GPU 1 or TPU 4.
    """

    address: str = "auto"
    replicas: int = 1
    resources: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ValueError(f"wanted at least 1 replica, got {self.replicas}: say how many")


def read_resources(stated: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """Resources from `NAME=COUNT` each. Raises ValueError for anything else."""
    found = []
    for text in stated:
        name, _, count = text.partition("=")
        if not name or not count.replace(".", "", 1).isdecimal():
            raise ValueError(f"wanted a resource as NAME=COUNT, got {text!r}: write GPU=1")
        found.append((name, float(count)))
    return tuple(found)


class ShardRunner:
    """An actor: one replica, and shard after shard."""

    def __init__(self, config: BatchConfig, seed: int, open_replica: Opener):
        self._config, self._seed = config, seed
        self._index = Index.load(config.folder.work / INDEX)
        self._loop = asyncio.new_event_loop()
        self._replica = open_replica()
        self._loop.run_until_complete(self._replica.start())

    def __call__(self, batch: Columns) -> Columns:
        """Run shards by their numbers; what came of each."""
        tallies = [self._run(shard) for shard in batch["shard"].tolist()]
        names = ("finished", "failed", "prompt_tokens", "cached_tokens", "output_tokens")
        return {name: np.array([getattr(tally, name) for tally in tallies]) for name in names}

    def _run(self, shard: int) -> Tally:
        path = self._config.folder.done(shard)
        tally = Tally(len(self._index.shard(shard, self._config.shard_lines)))
        if path.exists():  # whoever did it was thought dead
            done = read_done(path)
            tally.finished, tally.failed = done.finished, done.failed
            return tally
        run = Run(self._config, self._index, self._seed, self._replica, tally, Signals(), _look)
        self._loop.run_until_complete(run.run([shard]))
        return tally


def fleet_runner(fleet: Fleet, open_replica: Opener) -> Runner:
    """Runs shards on a cluster."""

    def run(config: BatchConfig, index: Index, manifest: Manifest, shards: list[int], signals: Signals) -> None:
        index.save(config.folder.work / INDEX)
        ray.init(None if fleet.address == "local" else fleet.address, ignore_reinit_error=True)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        tally = Tally(sum(len(index.shard(shard, config.shard_lines)) for shard in shards))
        try:
            with show_tally(Console(stderr=True)) as look:
                for row in _plan(fleet, config, manifest.seed, open_replica, shards).iter_rows():
                    _add(tally, row)
                    look(tally, 0)
        except ray.exceptions.RayError as error:
            raise RuntimeError(f"Ray gave up: {error}") from error

    return run


def _plan(fleet: Fleet, config: BatchConfig, seed: int, open_replica: Opener, shards: list[int]) -> "ray.data.Dataset":
    rows = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    special = {"CPU", "GPU"}
    counts = dict(fleet.resources)
    return rows.map_batches(
        ShardRunner,
        fn_constructor_args=(config, seed, open_replica),
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=min(fleet.replicas, len(shards)), max_tasks_in_flight_per_actor=1),
        num_cpus=counts.get("CPU", 0),
        num_gpus=counts.get("GPU", 0),
        resources={name: count for name, count in counts.items() if name not in special},
        max_restarts=RESTARTS,
        max_task_retries=RESTARTS,
    )


def _add(tally: Tally, row: dict[str, int]) -> None:
    for name, value in row.items():
        setattr(tally, name, getattr(tally, name) + value)


def _look(tally: Tally, under_way: int) -> None:
    """Nothing: an actor's counts come with its results."""
