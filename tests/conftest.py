"""Settings of every test run: the platform, JAX's strict modes, hypothesis.

Knows nothing of what is tested. Runs on the CPU unless `--device` names another platform; tests marked `gpu` or `tpu`
are skipped on any other. Strict dtype promotion and no rank promotion: a kernel that mixes types or shapes by accident
fails here instead of losing precision on a device.
"""

import os
import tempfile

import hypothesis
import pytest

PLATFORMS = {"cpu": "cpu", "gpu": "cuda,cpu", "tpu": "tpu,cpu"}
COMPILED: pytest.StashKey[tempfile.TemporaryDirectory[str]] = pytest.StashKey()

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.register_profile("search", max_examples=2000, deadline=None, print_blob=True)
hypothesis.settings.load_profile("ci")  # `--hypothesis-profile=search` looks for new counterexamples


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--device`."""
    parser.addoption("--device", choices=sorted(PLATFORMS), default="cpu", help="platform that the tests run on")


def pytest_configure(config: pytest.Config) -> None:
    """Choose the platform, the threads and the strict modes before any test module imports JAX."""
    os.environ["NPROC"] = "16"  # threads of XLA: interpreted kernels wait for one another, with two of them for ever
    os.environ["JAX_PLATFORMS"] = PLATFORMS[config.getoption("--device")]
    import jax

    jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])  # a plugin may have imported JAX before
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_default_matmul_precision", "highest")
    config.stash[COMPILED] = tempfile.TemporaryDirectory(prefix="compiled")  # engines of one shape are made many times
    jax.config.update("jax_compilation_cache_dir", config.stash[COMPILED].name)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove this process's programs."""
    if COMPILED in config.stash:
        config.stash[COMPILED].cleanup()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a device that this run was not asked to use; refuse to run without the one that it was."""
    device = config.getoption("--device")
    if device != "cpu":  # on the CPU the backend stays unmade, so that a test may still choose the number of devices
        import jax

        if jax.default_backend() != device:
            raise pytest.UsageError(f"wanted --device={device}, JAX has {jax.default_backend()}: see its log")
    for item in items:
        for other in {"gpu", "tpu"} - {device}:
            if item.get_closest_marker(other):
                item.add_marker(pytest.mark.skip(reason=f"needs --device={other}"))
