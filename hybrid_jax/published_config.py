"""The config of a checkpoint as its family understands it, from config.json and the names of the tensors.

Some families publish checkpoints whose config does not state all that is in them. Such a family defines `complete`,
which reads the rest off the names of the tensors.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from hybrid_jax.hf_directory import list_hf, read_config
from hybrid_jax.orbax_directory import is_orbax, open_orbax
from models.registry import find_family


def read_published_config(path: Path) -> dict[str, Any]:
    """The config of a checkpoint directory, completed by what its tensors show, or a config.json as it is.

    Raises ValueError as `read_config` and `find_family` do, and for a damaged checkpoint of a family that completes.
    """
    hf = read_config(path)
    if path.is_file():
        return hf
    complete = getattr(find_family(hf), "complete", None)
    return hf if complete is None else complete(hf, _tensor_names(path))


def _tensor_names(directory: Path) -> Collection[str]:
    """Published names of the tensors in a directory; none for a model that was never published."""
    if not is_orbax(directory):
        return {name for file in list_hf(directory).files.values() for name in file.header.entries}
    published = open_orbax(directory).published
    return () if published is None else published.names
