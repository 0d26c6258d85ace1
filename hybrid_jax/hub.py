"""Finds the directory of a model: the embedded demo, a local path, or a repository of the Hugging Face hub."""

import re
from pathlib import Path

DEMO = "demo"
REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
PATTERNS = ("*.safetensors", "*.json", "*.jinja")  # data only: no code of a repository is fetched


def find_model(model: str, patterns: tuple[str, ...] = PATTERNS) -> Path:
    """The local path of a model.

    Args:
      model: `"demo"`, an existing path, or `owner/name` of a hub repository (needs the extra `hub`).
      patterns: names of the files that are wanted of a repository.
    Raises ValueError for anything else.
    """
    if model == DEMO:
        return Path(__file__).parent / DEMO
    path = Path(model).expanduser()
    if path.exists():
        return path
    if not REPOSITORY.fullmatch(model):
        raise ValueError(
            f"wanted a model directory, owner/name of a hub repository, or 'demo', got {model!r}: not found"
        )
    return _download(model, patterns)


def _download(repository: str, patterns: tuple[str, ...]) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f"{repository} is no local path; to fetch it from the hub: pip install 'hybrid-jax[hub]'"
        ) from None
    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns)))
    except Exception as error:  # of the library, its connections and its files
        raise ValueError(f"{repository}: wanted to fetch it from the hub, got {str(error)[:300]}") from None
