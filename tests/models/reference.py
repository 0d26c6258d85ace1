"""Loads a fixture of `tests/hf_reference`: a tiny checkpoint in its published form, with the reference's outputs."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from hybrid_jax import checkpoint
from models.registry import find_family

FOLDER = Path(__file__).parents[1] / "hf_reference"


@dataclass(frozen=True)
class Fixture:
    """One folder of `hf_reference`; its README is the project's `docs/models.md`."""

    name: str

    @property
    def path(self) -> Path:
        return FOLDER / self.name

    @cached_property
    def expected(self) -> dict[str, np.ndarray]:
        return load_file(self.path / "expected.safetensors")

    @property
    def prompts(self) -> list[np.ndarray]:
        count = sum(name.startswith("logits_") for name in self.expected)
        return [self.expected[f"input_ids_{index}"][0] for index in range(count)]

    @property
    def hidden_prompt(self) -> int:
        return json.loads((self.path / "fixture.json").read_text())["hidden_prompt"]

    def load(self):
        """The model in float32 with its published weights."""
        hf = json.loads((self.path / "config.json").read_text())
        family = find_family(hf)
        config = family.Config.from_hf(hf)
        model = nnx.eval_shape(lambda: family.Model(config, rngs=nnx.Rngs(0), dtype="float32", backend="xla"))
        graph, state = nnx.split(model)
        return nnx.merge(graph, checkpoint.load(self.path, state, family.weight_table(config)))
