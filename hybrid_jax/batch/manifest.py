"""What a job is of: the input, the model, the settings and the version. A resumed job must be of the same.

Knows nothing of results.
"""

import hashlib
import secrets
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from hybrid_jax.batch import files
from hybrid_jax.batch.index import Index
from hybrid_jax.batch.lines import SEED_BITS
from hybrid_jax.batch.settings import BatchConfig

FORMAT = 1
DESCRIBING_SUFFIXES = {".json", ".jinja"}
DESCRIBING_BYTES = 256 * 2**20  # a larger file of these is known by its size
UNCOMPARED = ("created", "overrides")


class Manifest(msgspec.Struct, frozen=True):
    """The whole of it. overrides: what differed at a start that was forced."""

    format: int
    input_sha256: str
    input_bytes: int
    lines: int
    invalid_lines: int
    shard_lines: int
    model: str
    model_sha256: str
    names: list[str]
    engine: dict[str, str | int | float | bool | None]
    seed: int
    versions: dict[str, str]
    created: int
    overrides: list[str] = []


def settle_manifest(config: BatchConfig, index: Index, model_path: Path) -> Manifest:
    """The manifest of this job, written if it is new.

    Raises ValueError, with the differences, where the files at hand are of another job.
    """
    path = config.folder.manifest
    if not path.exists():
        seed = secrets.randbits(SEED_BITS) if config.seed is None else config.seed
        files.create(path, _encode(_describe(config, index, model_path, seed)))  # another worker may be first
    kept = read_manifest(path)
    wanted = _describe(config, index, model_path, kept.seed if config.seed is None else config.seed)
    differences = _differences(kept, wanted)
    if not differences:
        return kept
    if not config.force_resume or kept.shard_lines != wanted.shard_lines or kept.lines != wanted.lines:
        shown = "; ".join(differences)
        raise ValueError(
            f"wanted to go on with the job in {config.folder.work}, got another one: {shown}. Give what the job began"
            " with, or --restart, or --force-resume, which can neither change the lines nor their shards"
        )
    forced = msgspec.structs.replace(wanted, created=kept.created, overrides=[*kept.overrides, *differences])
    files.replace(path, _encode(forced))
    return forced


def read_manifest(path: Path) -> Manifest:
    """What was written. Raises ValueError for a damaged file."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except msgspec.MsgspecError as error:
        raise ValueError(f"wanted a manifest in {path}, got {error}: start anew with --restart") from None


def _encode(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest)) + b"\n"


def _describe(config: BatchConfig, index: Index, model_path: Path, seed: int) -> Manifest:
    return Manifest(
        format=FORMAT,
        input_sha256=index.sha256,
        input_bytes=index.size_bytes,
        lines=len(index),
        invalid_lines=index.invalid,
        shard_lines=config.shard_lines,
        model=config.model,
        model_sha256=digest_model(model_path),
        names=list(config.names),
        engine=dict(config.engine),
        seed=seed,
        versions={name: metadata.version(name) for name in ("hybrid-jax", "jax")},
        created=int(time.time()),
    )


def _differences(kept: Manifest, wanted: Manifest) -> list[str]:
    before, after = _flat(kept), _flat(wanted)
    names = [name for name in before | after if before.get(name) != after.get(name)]
    return [f"{name} was {before.get(name)}, is {after.get(name)}" for name in names]


def _flat(manifest: Manifest) -> dict[str, Any]:
    """The values to compare, those of tables under names of their own."""
    fields = msgspec.structs.asdict(manifest)
    tables = {name: fields.pop(name) for name in ("engine", "versions")}
    for name in UNCOMPARED:
        del fields[name]
    return fields | {f"{table}.{name}": value for table, values in tables.items() for name, value in values.items()}


def digest_model(path: Path) -> str:
    """A hash of a checkpoint: names and sizes of all files, and what is in those that describe it.

    Weights are known by their sizes alone, since reading them takes minutes.
    """
    digest = hashlib.sha256()
    for file in sorted([path] if path.is_file() else path.rglob("*")):
        if not file.is_file():
            continue
        size_bytes = file.stat().st_size
        digest.update(f"{file.relative_to(path.parent if path.is_file() else path)} {size_bytes}\n".encode())
        if file.suffix in DESCRIBING_SUFFIXES and size_bytes <= DESCRIBING_BYTES:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
