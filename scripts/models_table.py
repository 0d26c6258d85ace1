"""Writes docs/models.md: every family, its kinds, and what it was checked against, read from the code and the fixtures.

python scripts/models_table.py > docs/models.md
"""

import inspect
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from flax import nnx

from hybrid_jax.routing import route_model
from models.registry import families, find_family

ROOT = Path(__file__).parents[1]
HEAD = """# Model families

Made by `scripts/models_table.py`. *Reference* is what computed the expected numbers of a tiny checkpoint with random
weights in `tests/hf_reference/`: logits, hidden states of every layer and greedy tokens are compared in float32, draft
logits where the fixture has them; each fixture also converts to Orbax and back byte for byte. *Configs* are published
configs in `tests/configs/` that build abstractly with exactly the parameters given (model + draft layer; selection
biases of routers are not counted).

| family | architectures | kinds | reference | draft logits | configs: parameters |
|---|---|---|---|---|---|
"""


def build(path: Path) -> tuple[ModuleType, Any]:
    """The family of a config and the routing of its abstract model."""
    hf = json.loads(path.read_text())
    family = find_family(hf)
    config = family.Config.from_hf(hf)
    return family, route_model(nnx.eval_shape(lambda: family.Model(config, rngs=nnx.Rngs(0), backend="xla")))


def describe_fixture(folder: Path) -> tuple[ModuleType, str, str, set[str]]:
    """The family of a fixture, its reference, which draft logits it has, and its kinds."""
    family, routing = build(folder / "config.json")
    reference = json.loads((folder / "fixture.json").read_text())
    about = reference["reference"]
    version = f"transformers {about['transformers']}" if "transformers" in about else ""
    drafts = "yes" if reference.get("mtp_prompts") else "no"
    return family, f"`{folder.name}`: {about['class']}, {version}", drafts, {route.kind for route in routing.routes}


def describe_config(path: Path) -> tuple[ModuleType, str, set[str]]:
    """The family of a published config, its parameters, and its kinds."""
    family, routing = build(path)
    counts = [f"{count:,}" for count in routing.parameters.values()]
    return family, f"{path.stem}: {' + '.join(counts)}", {route.kind for route in routing.routes}


def table() -> str:
    """The page."""
    fixtures = [describe_fixture(folder) for folder in sorted((ROOT / "tests" / "hf_reference").iterdir())]
    configs = [describe_config(path) for path in sorted((ROOT / "tests" / "configs").glob("*.json"))]
    rows = []
    for module in sorted(set(families().values()), key=lambda module: module.__name__):
        title = (inspect.getdoc(module) or "").split("\n")[0].split(":")[0].rstrip(".")
        own = [row for row in fixtures if row[0] is module]
        published = [row for row in configs if row[0] is module]
        kinds = sorted(set().union(*(row[-1] for row in own + published)))
        cells = [
            f"{title} (`models/{module.__name__.split('.')[-1]}.py`)",
            ", ".join(f"`{name}`" for name in module.ARCHITECTURES),
            ", ".join(kinds),
            "; ".join(row[1] for row in own) or "none: built from parts that other families prove",
            ", ".join(row[2] for row in own) or "no",
            "; ".join(row[1] for row in published) or "none at hand",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(table(), end="")
