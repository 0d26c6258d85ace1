"""A job on a local Ray cluster of two nodes: every line exactly once, also when workers and nodes die."""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from hybrid_jax.batch.fleet import Fleet, fleet_runner, read_resources
from hybrid_jax.batch.settings import BatchConfig
from hybrid_jax.batch.verb import run_batch
from tests.hybrid_jax.batch.replicas import FakeOpener, check_output, config_of, read_lines, run_fake, write_input

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Ray leaves files and sockets open
ROOT = Path(__file__).parents[3]
FLEET = Fleet("auto", 2, (("replica", 1.0),))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head that runs nothing, and two nodes with room for one replica each."""
    variables = {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    head = {"num_cpus": 0, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        made = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(2):
            made.add_node(num_cpus=1, resources={"replica": 1}, object_store_memory=100 * 2**20)
        ray.init(made.address, logging_level="error", log_to_driver=False)
        yield made
        ray.shutdown()
        made.shutdown()


def run_fleet(config: BatchConfig, opener: FakeOpener) -> int:
    return run_batch(config, config.input.parent / "model.json", fleet_runner(FLEET, opener))


def journal_of(path: Path) -> list[tuple[int, str]]:
    pairs = (text.split(" ", 1) for text in path.read_text().splitlines()) if path.exists() else ()
    return [(int(process), prompt) for process, prompt in pairs]


def when(journal: Path, lines: int, act: Callable[[], None]) -> threading.Thread:
    """Do something once so many lines have begun."""

    def wait() -> None:
        end_s = time.monotonic() + 120
        while len(journal_of(journal)) < lines and time.monotonic() < end_s:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_two_nodes_share_a_job(tmp_path: Path, cluster: Cluster) -> None:
    journal = tmp_path / "journal"
    config = config_of(write_input(tmp_path, 100, l3="bad"), shard_lines=8)
    assert run_fleet(config, FakeOpener(delay_s=0.1, journal=journal)) == 3
    check_output(config, 100, failed=(3,))
    begun = journal_of(journal)
    assert len(begun) == 100 and len({process for process, _ in begun}) == 2


def test_a_killed_worker_loses_nothing(tmp_path: Path, cluster: Cluster) -> None:
    journal = tmp_path / "journal"
    config = config_of(write_input(tmp_path, 120), shard_lines=8)
    killing = when(journal, 30, lambda: os.kill(journal_of(journal)[-1][0], signal.SIGKILL))
    assert run_fleet(config, FakeOpener(delay_s=0.1, journal=journal)) == 0
    killing.join()
    check_output(config, 120)
    begun = journal_of(journal)
    assert len({process for process, _ in begun}) == 3, "nobody took the place of the killed worker"
    often = Counter(prompt for _, prompt in begun)
    assert len(often) == 120 and 120 < len(begun) <= 120 + 8


def test_a_line_that_kills_its_worker_is_given_up(tmp_path: Path, cluster: Cluster) -> None:
    config = config_of(write_input(tmp_path, 40), shard_lines=8)
    assert run_fleet(config, FakeOpener(delay_s=0.02, killers=("prompt 20",))) == 3
    check_output(config, 40, failed=(20,))
    assert read_lines(config.folder.errors)[0]["error"]["code"] == "engine_broken"


def test_a_removed_node_loses_nothing_and_a_new_one_takes_over(tmp_path: Path, cluster: Cluster) -> None:
    journal = tmp_path / "journal"
    config = config_of(write_input(tmp_path, 120), shard_lines=8)

    def replace_node() -> None:
        cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
        cluster.add_node(num_cpus=1, resources={"replica": 1}, object_store_memory=100 * 2**20)

    replacing = when(journal, 30, replace_node)
    assert run_fleet(config, FakeOpener(delay_s=0.1, journal=journal)) == 0
    replacing.join()
    check_output(config, 120)


def test_the_plain_runner_goes_on_with_a_fleets_job(tmp_path: Path, cluster: Cluster) -> None:
    config = config_of(write_input(tmp_path, 40), shard_lines=8)
    everything = tuple(f"prompt {n}" for n in range(16, 40))
    assert run_fleet(config, FakeOpener(breakers=everything)) == 1
    assert run_fake(config) == 0
    check_output(config, 40)


def test_resources_are_read_or_refused() -> None:
    assert read_resources(["GPU=1", "slice=0.5"]) == (("GPU", 1.0), ("slice", 0.5))
    for text in ("GPU", "=1", "GPU=x", "GPU=-1"):
        with pytest.raises(ValueError, match="NAME=COUNT"):
            read_resources([text])
    with pytest.raises(ValueError, match="replica"):
        Fleet(replicas=0)
