"""From the command line to a job: which model, and on one replica here or on many through Ray."""

from hybrid_jax.batch.command import Cluster
from hybrid_jax.batch.replica import EngineOpener
from hybrid_jax.batch.settings import BatchConfig
from hybrid_jax.batch.verb import Runner, local_runner, merge_batch, run_batch
from hybrid_jax.config import EngineConfig
from hybrid_jax.hub import find_model


def start_batch(config: BatchConfig, engine: EngineConfig, merge: bool, cluster: Cluster) -> int:
    """Run or merge a job; the exit code. Raises ValueError and OSError for what must be changed first."""
    if merge:
        return merge_batch(config)
    opener = EngineOpener(config.model, config.names, engine)
    if cluster.ray is None:
        if cluster != Cluster():
            raise ValueError("wanted an address with replicas and their resources, got none: add --ray auto")
        return run_batch(config, find_model(config.model), local_runner(opener))
    if config.num_shards != 1:
        raise ValueError("wanted either Ray or num_shards to share the work out, got both: leave one out")
    return run_batch(config, find_model(config.model), _fleet_runner(opener, cluster.ray, cluster))


def _fleet_runner(opener: EngineOpener, address: str, cluster: Cluster) -> Runner:
    try:
        from hybrid_jax.batch.fleet import Fleet, fleet_runner, read_resources
    except ModuleNotFoundError:
        raise ValueError("wanted ray, got a Python without it: pip install 'hybrid-jax[ray]'") from None
    return fleet_runner(Fleet(address, cluster.replicas, read_resources(cluster.replica_resource)), opener)
