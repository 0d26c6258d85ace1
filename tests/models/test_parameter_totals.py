"""Real configs build without memory, with exactly the published number of parameters, and every one has a source."""

import json
from pathlib import Path

import pytest
from flax import nnx

from hybrid_jax.checkpoint import check_table, read_state
from hybrid_jax.routing import route_model
from models.registry import find_family

CONFIGS = Path(__file__).parents[1] / "configs"

# Parameters of the model itself, and of its draft layer. Routers' selection biases are not counted.
TOTALS = {
    "Kimi-Linear-48B-A3B": (49_122_675_072, 0),
    "Ling-3.0-flash": (124_414_191_072, 3_072_193_536),
    "Ling-2.5-1T": (1_012_231_140_864, 0),
    "Ling-2.6-1T": (1_012_231_140_864, 13_183_264_768),
    "Ling-2.6-flash": (104_186_907_648, 3_307_493_376),
    "Qwen3.5-0.8B": (752_393_024, 20_452_864),
    "Qwen3.5-2B": (1_881_825_088, 60_828_160),
    "Qwen3.5-4B": (4_205_751_296, 120_599_552),
    "Qwen3.5-9B": (8_953_803_264, 243_290_624),
    "Qwen3.5-27B": (26_895_998_464, 424_699_392),
    "Qwen3.5-35B-A3B": (34_660_610_688, 844_640_768),
    "Qwen3.5-122B-A10B": (122_111_526_912, 2_523_679_232),
    "Qwen3.5-397B-A17B": (396_346_350_336, 6_595_568_128),
    "Qwen3-Next-80B-A3B-Instruct": (79_674_391_296, 0),
    "MiniMax-Text-01": (456_089_655_296, 0),
    "Ring-mini-linear-2.0": (16_423_443_456, 0),
    "Nemotron-3-Nano-30B-A3B-BF16": (31_577_937_344, 0),
    "Nemotron-3.5-Lightning-30B-A3B-NVFP4": (31_577_937_344, 1_335_325_824),
    "Nemotron-3-Super-120B-A12B-FP8": (120_668_687_360, 2_942_324_736),
    "Nemotron-3-Ultra-550B-A55B-BF16": (549_308_968_960, 11_215_609_856),
    "Nemotron-H-56B-Base-8K": (56_324_350_464, 0),
}


@pytest.mark.parametrize("name", TOTALS)
def test_total(name):
    hf = json.loads((CONFIGS / f"{name}.json").read_text())
    family = find_family(hf)
    config = family.Config.from_hf(hf)
    model = nnx.eval_shape(lambda: family.Model(config, rngs=nnx.Rngs(0), backend="xla"))
    counts = route_model(model).parameters
    assert (counts["target"], counts.get("draft", 0)) == TOTALS[name]
    leaves, table = read_state(nnx.state(model)), family.weight_table(config)
    check_table(table, leaves)
    for row in table.weights:
        for source in row.sources:
            assert all(source.tensor_shape(leaves[row.path].shape))


def test_ling_2_6_has_the_published_total():
    assert sum(TOTALS["Ling-2.6-1T"]) == 1_025_414_405_632
