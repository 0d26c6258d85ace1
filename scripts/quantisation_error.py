"""Measures what weights of eight bits cost: bits per byte of the demo model, logits of the small reference checkpoints.

    python scripts/quantisation_error.py tests/hf_reference

Each model is written once more as a checkpoint of eight bits, as publishers do, and read back by the loader, which
keeps the weights as they are stored. Both tables are Markdown, on standard output: those of `docs/quantisation.md`.
The demo's weights are int8 as shipped, so rounding them to int8 again shows the product, not the rounding.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from hybrid_jax import checkpoint
from hybrid_jax.cache import allocate
from hybrid_jax.config import Dtype
from hybrid_jax.hf_directory import CONFIG, SINGLE, open_hf, read_config
from hybrid_jax.hub import find_model
from hybrid_jax.quantisation import check_scale, quantise_model, round_weights, widen
from hybrid_jax.routing import route_model
from hybrid_jax.safetensors import DTYPE_NAMES, FileWriter, make_header
from hybrid_jax.spelling import cut_as_stored, match
from kernels_pallas.op import RaggedBatch
from models.decoder import Decoder
from models.quantised import BLOCK, DTYPES, Format, quantisable_paths
from models.registry import find_family

STORIES = Path(__file__).with_name("held_out_stories.txt")
FORMATS = (Format("int8"), Format("fp8"), Format("fp8", True))
WINDOW = 512  # tokens that are scored together; the first of them sees nothing before it


# ------------------------------------------------------------------------------------------- checkpoints of eight bits


def publish(source: Path, destination: Path, form: Format) -> Path:
    """Write a checkpoint again with every weight that may have eight bits rounded to a format; others in float32."""
    hf = read_config(source)
    tensors: dict[str, np.ndarray] = {}
    rounded = quantisable_tensors(source, hf)
    for name, tensor in wide_tensors(source, hf):
        if name in rounded:
            tensors[name], scale = round_tensor(name, tensor, form)
            tensors[f"{name}{'_scale_inv' if form.block else '_scale'}"] = scale
        else:
            tensors[name] = tensor
    left_out = sorted(
        name.removesuffix(".weight") for name in tensors if name.endswith(".weight") and name not in rounded
    )
    write(destination, {**hf, "quantization_config": state_format(form, left_out)}, tensors)
    return destination


def write(destination: Path, hf: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """Write a new checkpoint directory of one file."""
    destination.mkdir(parents=True)
    (destination / CONFIG).write_text(json.dumps(hf))
    header = make_header([(name, DTYPE_NAMES[tensor.dtype], tensor.shape) for name, tensor in tensors.items()], {})
    with FileWriter(destination / SINGLE, header) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.finish()


def state_format(form: Format, left_out: list[str]) -> dict[str, Any]:
    """The `quantization_config` of a format: of DeepSeek's kind for blocks, of compressed-tensors otherwise."""
    if form.block:
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": left_out,
        }
    stored = {"int8": "int-quantized", "fp8": "float-quantized"}[form.name]
    return {"quant_method": "compressed-tensors", "format": stored, "ignore": left_out}


def quantisable_tensors(source: Path, hf: dict[str, Any]) -> set[str]:
    """The names of the tensors of a checkpoint whose parameters may have eight bits."""
    family = find_family(hf)
    config = family.Config.from_hf(hf)
    paths = quantisable_paths(nnx.eval_shape(lambda: family.Model(config, rngs=nnx.Rngs(0), backend="xla")))
    plan = match(family.weight_table(config), open_hf(source).names)
    return {name for found in plan.found if found.weight.path in paths for name in found.names}


def wide_tensors(source: Path, hf: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of a checkpoint in float32, those of eight bits times their scales."""
    family, found = find_family(hf), open_hf(source)
    shapes = {name: found.shape(name) for name in found.names}
    plan = cut_as_stored(match(family.weight_table(family.Config.from_hf(hf)), found.names), shapes)
    for name in found.names:
        if name in plan.scales:
            scale = plan.scales[name]
            yield name, widen(found.read(name), check_scale(scale, found.read(scale)))
        elif name not in plan.kept:
            yield name, found.read(name).astype(np.float32)


def round_tensor(name: str, tensor: np.ndarray, form: Format) -> tuple[np.ndarray, np.ndarray]:
    """A published weight `[..., out, in]` in eight bits, and its scales as they are published."""
    dtype = np.dtype(DTYPES[form.name])
    *lead, rows, columns = tensor.shape
    if not form.block:
        return round_weights(name, tensor, dtype, (*lead, rows, 1))
    blocks = -(-rows // BLOCK), -(-columns // BLOCK)
    padding = [(0, 0)] * len(lead) + [(0, blocks[0] * BLOCK - rows), (0, blocks[1] * BLOCK - columns)]
    values, scale = round_weights(name, np.pad(tensor, padding), dtype, (*lead, *blocks))
    return np.ascontiguousarray(values[..., :rows, :columns]), scale


# ------------------------------------------------------------------------------------------------------------- logits


def load(path: Path, dtype: Dtype) -> Decoder:
    """The model of a checkpoint; weights of eight bits stay as they are stored."""
    hf = read_config(path)
    family = find_family(hf)
    config = family.Config.from_hf(hf)
    abstract = nnx.eval_shape(lambda: family.Model(config, rngs=nnx.Rngs(0), dtype=dtype, backend="xla"))
    table = family.weight_table(config)
    quantise_model(abstract, path, hf, table, None)
    graph, state = nnx.split(abstract)
    return nnx.merge(graph, checkpoint.load(path, state, table))


def log_probabilities(model: Decoder, rows: list[np.ndarray]) -> list[np.ndarray]:
    """Logarithms of the probabilities of every next token after each of the tokens `[T]`, float32 `[T, Y]` a row.

    Rows are read as one request each, padded to one length.
    """
    longest = max(map(len, rows))
    graph, state = nnx.split(model)
    one, none = jnp.ones((1,), jnp.int32), jnp.zeros((1,), jnp.int32)

    @jax.jit
    def run(state: nnx.State, tokens: jax.Array, length: jax.Array) -> jax.Array:
        model = nnx.merge(graph, state)
        start, table = jnp.stack([jnp.int32(0), length]), jnp.ones((1, 1), jnp.int32)
        batch = RaggedBatch(start, none, jnp.int32(0), none, one, none, none, table, "prefill")
        hidden, _ = model(tokens, allocate(model.specs, route_model(model), 2, 2, longest), batch)
        return jax.nn.log_softmax(model.logits(hidden), axis=-1)

    padded = [jnp.asarray(np.pad(row, (0, longest - len(row))), jnp.int32) for row in rows]
    return [np.asarray(run(state, p, jnp.int32(len(r))))[: len(r)] for p, r in zip(padded, rows, strict=True)]


@dataclass(frozen=True)
class Error:
    """How far logits are off: the greatest over their standard deviation, the mean divergence, the same first choices.

    Logits are compared with their mean over the vocabulary taken away, which no probability depends on.
    """

    greatest: float
    divergence_nats: float
    agreement: float


def compare(wanted: list[np.ndarray], got: list[np.ndarray]) -> Error:
    """The error of logarithms of probabilities `[T, Y]`, row by row."""
    p, q = np.concatenate(wanted).astype(np.float64), np.concatenate(got).astype(np.float64)
    centred_p, centred_q = (x - x.mean(axis=1, keepdims=True) for x in (p, q))
    return Error(
        float(np.abs(centred_p - centred_q).max() / centred_p.std()),
        float((np.exp(p) * (p - q)).sum(axis=1).mean()),
        float((p.argmax(axis=1) == q.argmax(axis=1)).mean()),
    )


def bits_per_byte(model: Decoder, windows: list[np.ndarray], text_bytes: int) -> tuple[float, list[np.ndarray]]:
    """Bits that a text of so many bytes takes, cut into windows of tokens, and the logarithms behind them."""
    logs = log_probabilities(model, [window[:-1] for window in windows])
    nats = -sum(float(log[np.arange(len(log)), window[1:]].sum()) for log, window in zip(logs, windows, strict=True))
    return nats / math.log(2) / text_bytes, logs


# -------------------------------------------------------------------------------------------------------------- tables


def demo_rows(folder: Path) -> Iterator[str]:
    """The demo model on the stories beside this script."""
    source, text = find_model("demo"), STORIES.read_text()
    tokens = np.asarray([0, *Tokenizer.from_file(str(source / "tokenizer.json")).encode(text).ids], np.int32)
    windows = [tokens[start : start + WINDOW + 1] for start in range(0, len(tokens) - 1, WINDOW)]
    wide = write_wide(source, folder / "wide")
    exact, wanted = bits_per_byte(load(wide, "float32"), windows, len(text.encode()))
    yield f"| float32 | float32 | {exact:.4f} | | | |"
    subjects: list[tuple[str, Path, Dtype]] = [("bfloat16", wide, "bfloat16")]
    subjects += [(str(form), publish(source, folder / str(form), form), "bfloat16") for form in FORMATS]
    for name, path, dtype in subjects:
        bits, got = bits_per_byte(load(path, dtype), windows, len(text.encode()))
        yield f"| {name} | {dtype} | {bits:.4f} | {bits - exact:+.4f} | {_cells(compare(wanted, got))} |"


def fixture_rows(fixture: Path, folder: Path) -> Iterator[str]:
    """One small checkpoint, in float32 but for its weights; and, to compare, all of it in bfloat16."""
    expected = load_file(fixture / "expected.safetensors")
    rows = [expected[name][0] for name in sorted(expected) if name.startswith("input_ids_")]
    wanted = log_probabilities(load(fixture, "float32"), rows)
    narrow = log_probabilities(load(fixture, "bfloat16"), rows)
    yield f"| {fixture.name} | bfloat16, activations too | {_cells(compare(wanted, narrow))} |"
    for form in FORMATS:
        got = log_probabilities(load(publish(fixture, folder / fixture.name / str(form), form), "float32"), rows)
        yield f"| {fixture.name} | {form} | {_cells(compare(wanted, got))} |"


def write_wide(source: Path, destination: Path) -> Path:
    """Write a checkpoint of eight bits again in float32."""
    stated = read_config(source)
    hf = {name: value for name, value in stated.items() if name != "quantization_config"}
    write(destination, hf, dict(wide_tensors(source, stated)))
    return destination


def _cells(error: Error) -> str:
    return f"{error.greatest:.3f} | {error.divergence_nats:.2e} | {error.agreement:.1%}"


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fixtures", type=Path, help="folder of small checkpoints with expected.safetensors")
    fixtures = sorted(path.parent for path in parser.parse_args().fixtures.glob("*/expected.safetensors"))
    with tempfile.TemporaryDirectory() as folder, jax.default_matmul_precision("highest"):
        print("| weights | activations | bits per byte | more | greatest error of a logit | divergence, nats | same |")
        print("|---|---|---|---|---|---|---|")
        for row in demo_rows(Path(folder)):
            print(row, flush=True)
        print("\n| checkpoint | weights | greatest error of a logit | divergence, nats | same first choice |")
        print("|---|---|---|---|---|")
        for fixture in fixtures:
            for row in fixture_rows(fixture, Path(folder)):
                print(row, flush=True)


if __name__ == "__main__":
    main()
