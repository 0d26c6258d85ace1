"""What a batch job is told at its start, checked, and where its files lie. Knows nothing of models."""

from dataclasses import dataclass
from pathlib import Path

SHARD_LINES = 1024  # small enough to be an even share of the work, large enough that its end costs little
GRACE_S = 20.0  # spot machines give about 30 s between the signal and the end


@dataclass(frozen=True)
class BatchConfig:
    """One job. Raises ValueError for a value out of range.

    input: file of request lines. output: file of answers; `output.errors.jsonl` and `output.work` beside it are the
      job's too.
    model: as it was given; names: of the model in requests, the first one in answers.
    engine: settings of the engine that can change an answer, by name.
    seed: of lines that have none; None draws one, which the manifest keeps.
    skip_invalid: lines that are no requests become errors instead of stopping the job.
    shard_lines: lines of a shard, the unit that workers share out and a resumed job looks through.
    grace_s: lines that run may finish for so long after a signal.
    shard_index, num_shards: this worker takes the shards whose number divided by num_shards leaves shard_index.
    restart: move the files of an earlier run aside. force_resume: go on in spite of a manifest that differs.
    """

    input: Path
    output: Path
    model: str
    names: tuple[str, ...]
    engine: tuple[tuple[str, str | int | float | bool | None], ...] = ()
    seed: int | None = None
    skip_invalid: bool = False
    shard_lines: int = SHARD_LINES
    grace_s: float = GRACE_S
    shard_index: int = 0
    num_shards: int = 1
    restart: bool = False
    force_resume: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.shard_lines <= 2**20:
            raise ValueError(f"wanted shard_lines from 1 to {2**20}, got {self.shard_lines}: take {SHARD_LINES}")
        if not 0 <= self.grace_s < 1e9:
            raise ValueError(f"wanted grace of at least 0 seconds, got {self.grace_s}: take {GRACE_S:g}")
        if not 0 <= self.shard_index < self.num_shards:
            raise ValueError(
                f"wanted shard_index from 0 to num_shards - 1, got {self.shard_index} of {self.num_shards}: from 0"
            )
        if self.seed is not None and not 0 <= self.seed < 2**53:
            raise ValueError(f"wanted seed from 0 to 2**53 - 1, got {self.seed}: bring it into that range")
        if not self.names:
            raise ValueError("wanted a name of the model, got none: leave the flag out")
        if self.restart and self.num_shards > 1:
            raise ValueError(
                "wanted restart without num_shards, since every worker would restart: move the files aside"
            )

    @property
    def folder(self) -> "Folder":
        """Where the job's files lie."""
        return Folder(self.output)


@dataclass(frozen=True)
class Folder:
    """The files of a job, all named after its output."""

    output: Path

    def _beside(self, ending: str) -> Path:
        return self.output.with_name(self.output.name + ending)

    @property
    def errors(self) -> Path:
        """Lines without an answer."""
        return self._beside(".errors.jsonl")

    @property
    def work(self) -> Path:
        """Everything that a resumed job needs."""
        return self._beside(".work")

    @property
    def shards(self) -> Path:
        """Answers, as they come."""
        return self.work / "shards"

    @property
    def manifest(self) -> Path:
        """What the job is of."""
        return self.work / "manifest.json"

    @property
    def merged(self) -> Path:
        """There once the output is whole."""
        return self.work / "merged.json"

    @property
    def invalid(self) -> Path:
        """Results of lines that are no requests."""
        return self.work / "invalid.jsonl"

    def done(self, shard: int) -> Path:
        """There once a shard is finished."""
        return self.shards / f"{shard:06d}.done"
