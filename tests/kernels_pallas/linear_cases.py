"""The linear kinds as tests see them: random inputs, a call of the op, an oracle that loops over tokens in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.gdn import GDN, GDNWeights
from kernels_pallas.kda import KDA, BoundedDecay, Decay, KDAWeights, SoftplusDecay
from kernels_pallas.lightning import LIGHTNING, LightningWeights
from kernels_pallas.mamba2 import MAMBA2, Mamba2Weights
from kernels_pallas.op import token_positions
from kernels_pallas.rotary import frequencies, rotary_tables
from kernels_pallas.short_conv import SHORT_CONV
from tests.ragged import SLOTS

HEADS, KEY_HEADS, WIDTH, LAYERS, EPSILON = 4, 2, 16, 2, 1e-6


@dataclass(frozen=True)
class Case:
    """One linear kind. Inputs are a dict of arrays `[T, ...]`; states a tuple of arrays without the slot axis."""

    name: str
    inputs: Callable[[np.random.Generator, int], dict[str, np.ndarray]]
    pools: Callable[[], tuple[jax.Array, ...]]
    run: Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]]
    oracle: Callable[..., tuple[np.ndarray, tuple[np.ndarray, ...]]]  # (inputs of one row, first position, states)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rms(x, weight):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + EPSILON) * weight


def nan_pool(*shape, dtype="float32"):
    return jnp.full((LAYERS, SLOTS, *shape), jnp.nan, dtype)


# ------------------------------------------------------------------------------------------------------------ lightning

_rng = np.random.default_rng(11)
LIGHTNING_WEIGHTS = LightningWeights(
    slopes=np.float32([1.03, 0.3, 0.01, 0.0]),
    output_norm=_rng.normal(1, 0.2, HEADS * WIDTH).astype(np.float32),
    query_norm=_rng.normal(1, 0.2, WIDTH).astype(np.float32),
    key_norm=_rng.normal(1, 0.2, WIDTH).astype(np.float32),
)
INVERSE = frequencies(WIDTH // 2, 10000.0)


def lightning_inputs(rng, tokens):
    return {
        "qkv": rng.normal(size=(tokens, 3, HEADS, WIDTH)).astype(np.float32),
        "gate": rng.normal(size=(tokens, HEADS * WIDTH)).astype(np.float32),
    }


@partial(jax.jit, static_argnames=("layer",))
def run_lightning(inputs, pools, batch, layer):
    rotary = rotary_tables(token_positions(batch, inputs["gate"].shape[0]), INVERSE)
    out, pool = LIGHTNING.on("xla")(
        inputs["qkv"], inputs["gate"], LIGHTNING_WEIGHTS, rotary, pools[0], layer, batch,
        scale=WIDTH**-0.5, groups=2, epsilon=EPSILON,
    )  # fmt: skip
    return out, (pool,)


def rotate(x, position):
    r = len(INVERSE)
    cos, sin = np.cos(position * INVERSE.astype(np.float64)), np.sin(position * INVERSE.astype(np.float64))
    a, b, rest = x[:, :r], x[:, r : 2 * r], x[:, 2 * r :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)


def lightning_oracle(inputs, first, states):
    weights = jax.tree.map(lambda w: np.asarray(w, np.float64), LIGHTNING_WEIGHTS)
    state, outs = states[0].astype(np.float64), []
    for t in range(len(inputs["gate"])):
        q, k, v = inputs["qkv"][t].astype(np.float64)
        q = rotate(rms(q, weights.query_norm), first + t) * WIDTH**-0.5
        k = rotate(rms(k, weights.key_norm), first + t)
        state = np.exp(-weights.slopes)[:, None, None] * state + v[:, :, None] * k[:, None, :]
        o = np.einsum("hvk,hk->hv", state, q).reshape(2, -1)
        o = rms(o, 1.0).reshape(-1) * weights.output_norm
        outs.append(o * sigmoid(inputs["gate"][t].astype(np.float64)))
    return np.stack(outs), (state,)


# The form without norms and rotary of queries and keys, but with SiLU before them, and one norm group.
ACTIVATED_WEIGHTS = LightningWeights(LIGHTNING_WEIGHTS.slopes, LIGHTNING_WEIGHTS.output_norm)


@partial(jax.jit, static_argnames=("layer",))
def run_activated_lightning(inputs, pools, batch, layer):
    out, pool = LIGHTNING.on("xla")(
        inputs["qkv"], inputs["gate"], ACTIVATED_WEIGHTS, None, pools[0], layer, batch,
        scale=1.0, groups=1, epsilon=EPSILON, silu=True,
    )  # fmt: skip
    return out, (pool,)


def activated_lightning_oracle(inputs, first, states):
    weights = jax.tree.map(lambda w: np.asarray(w, np.float64), ACTIVATED_WEIGHTS)
    state, outs = states[0].astype(np.float64), []
    for t in range(len(inputs["gate"])):
        q, k, v = (x * sigmoid(x) for x in inputs["qkv"][t].astype(np.float64))
        state = np.exp(-weights.slopes)[:, None, None] * state + v[:, :, None] * k[:, None, :]
        o = rms(np.einsum("hvk,hk->hv", state, q).reshape(-1), weights.output_norm)
        outs.append(o * sigmoid(inputs["gate"][t].astype(np.float64)))
    return np.stack(outs), (state,)


# ------------------------------------------------------------------------------------------------------------------ gdn

CHANNELS = 2 * KEY_HEADS * WIDTH + HEADS * WIDTH
GDN_WEIGHTS = GDNWeights(
    convolution=_rng.normal(0, 0.5, (4, CHANNELS)).astype(np.float32),
    decay_log=np.float32([-3, 0, 1, 2]),
    decay_bias=_rng.normal(size=HEADS).astype(np.float32),
    output_norm=_rng.normal(1, 0.2, WIDTH).astype(np.float32),
)


def gdn_inputs(rng, tokens):
    inputs = {
        "mixed": rng.normal(size=(tokens, CHANNELS)).astype(np.float32),
        "z": rng.normal(size=(tokens, HEADS, WIDTH)).astype(np.float32),
        "b": 3 * rng.normal(size=(tokens, HEADS)).astype(np.float32),
        "a": 2 * rng.normal(size=(tokens, HEADS)).astype(np.float32),
    }
    inputs["a"][::7] = 60.0  # the state is forgotten at once
    inputs["a"][3::7] = -60.0  # nothing is forgotten
    inputs["b"][::5] = 40.0  # beta = 1
    inputs["mixed"][10:40] = inputs["mixed"][10:11]  # repeated keys
    return inputs


def packed_by_head(mixed, z, b, a, key_heads):
    """The inputs of the gated delta rule, one by one, as its op takes them."""
    tokens = mixed.shape[0]
    projected = jnp.concatenate([x.reshape(tokens, key_heads, -1) for x in (mixed, z)], axis=2)
    return projected, jnp.stack([x.reshape(tokens, key_heads, -1) for x in (b, a)], axis=2)


@partial(jax.jit, static_argnames=("layer", "beta_scale"))
def run_gdn(inputs, pools, batch, layer, beta_scale=1.0):
    out, state, tail = GDN.on("xla")(
        *packed_by_head(*(inputs[name] for name in ("mixed", "z", "b", "a")), KEY_HEADS),
        GDN_WEIGHTS, *pools, layer, batch, epsilon=EPSILON, beta_scale=beta_scale,
    )  # fmt: skip
    return out, (state, tail)


def gdn_oracle(inputs, first, states, beta_scale=1.0):
    weights = jax.tree.map(lambda w: np.asarray(w, np.float64), GDN_WEIGHTS)
    state, tail, outs = states[0].astype(np.float64), states[1].astype(np.float64), []
    for t in range(len(inputs["z"])):
        window = np.concatenate([tail, inputs["mixed"][t : t + 1].astype(np.float64)])
        tail, x = window[1:], (window * weights.convolution).sum(0)
        x = x * sigmoid(x)
        q, k, v = np.split(x.reshape(KEY_HEADS, -1), [WIDTH, 2 * WIDTH], axis=1)
        q, k = (np.repeat(y, HEADS // KEY_HEADS, 0) for y in (q, k))
        q, k = (y / np.sqrt((y * y).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
        v = v.reshape(HEADS, WIDTH)
        beta = beta_scale * sigmoid(inputs["b"][t].astype(np.float64))
        rate = np.logaddexp(0, inputs["a"][t].astype(np.float64) + weights.decay_bias)
        state = np.exp(-np.exp(weights.decay_log) * rate)[:, None, None] * state
        u = beta[:, None] * (v - np.einsum("hvk,hk->hv", state, k))
        state = state + u[:, :, None] * k[:, None, :]
        z = inputs["z"][t].astype(np.float64)
        o = rms(np.einsum("hvk,hk->hv", state, q) * WIDTH**-0.5, weights.output_norm) * z * sigmoid(z)
        outs.append(o.reshape(-1))
    return np.stack(outs), (state, tail)


# ------------------------------------------------------------------------------------------------------------------ kda

KDA_CHANNELS = 3 * HEADS * WIDTH
_kda_rng = np.random.default_rng(12)
KDA_WEIGHTS = KDAWeights(
    convolution=_kda_rng.normal(0, 0.5, (4, KDA_CHANNELS)).astype(np.float32),
    decay_log=np.float32([-3, 0, 1, 2]),
    decay_bias=_kda_rng.normal(size=(HEADS, WIDTH)).astype(np.float32),
    output_norm=_kda_rng.normal(1, 0.2, WIDTH).astype(np.float32),
)


def kda_inputs(rng, tokens):
    inputs = {
        "mixed": rng.normal(size=(tokens, KDA_CHANNELS)).astype(np.float32),
        "f": 2 * rng.normal(size=(tokens, HEADS, WIDTH)).astype(np.float32),
        "b": 3 * rng.normal(size=(tokens, HEADS)).astype(np.float32),
        "gate": rng.normal(size=(tokens, HEADS, WIDTH)).astype(np.float32),
    }
    inputs["f"][::7] = 60.0  # the state is forgotten at once
    inputs["f"][3::7] = -60.0  # nothing is forgotten
    inputs["f"][20:60, :, ::2] = -60.0  # some channels keep everything while others lose it
    inputs["f"][20:60, :, 1::4] = 60.0
    inputs["b"][::5] = 40.0  # beta = 1
    inputs["mixed"][10:40] = inputs["mixed"][10:11]  # repeated keys
    return inputs


@partial(jax.jit, static_argnames=("decay", "layer"))
def run_kda(decay: Decay, inputs, pools, batch, layer):
    out, state, tail = KDA.on("xla")(
        inputs["mixed"], inputs["f"], inputs["b"], inputs["gate"], KDA_WEIGHTS, *pools, layer, batch,
        decay=decay, epsilon=EPSILON,
    )  # fmt: skip
    return out, (state, tail)


def softplus_decay(x, rate):
    return -rate * np.logaddexp(0, x)


def bounded_decay(x, rate):
    return -5.0 / (1 + np.exp(np.clip(-rate * x, None, 700)))


def kda_oracle(decay: Callable[..., np.ndarray], inputs, first, states):
    weights = jax.tree.map(lambda w: np.asarray(w, np.float64), KDA_WEIGHTS)
    state, tail, outs = states[0].astype(np.float64), states[1].astype(np.float64), []
    for t in range(len(inputs["b"])):
        window = np.concatenate([tail, inputs["mixed"][t : t + 1].astype(np.float64)])
        tail, x = window[1:], (window * weights.convolution).sum(0)
        q, k, v = (x * sigmoid(x)).reshape(HEADS, 3, WIDTH).transpose(1, 0, 2)
        q, k = (y / np.sqrt((y * y).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
        beta = sigmoid(inputs["b"][t].astype(np.float64))
        g = decay(inputs["f"][t] + weights.decay_bias, np.exp(weights.decay_log)[:, None])
        state = state * np.exp(g)[:, None, :]
        u = beta[:, None] * (v - np.einsum("hvk,hk->hv", state, k))
        state = state + u[:, :, None] * k[:, None, :]
        o = rms(np.einsum("hvk,hk->hv", state, q) * WIDTH**-0.5, weights.output_norm)
        outs.append((o * sigmoid(inputs["gate"][t].astype(np.float64))).reshape(-1))
    return np.stack(outs), (state, tail)


def kda_case(name: str, decay: Decay, oracle_decay: Callable[..., np.ndarray]) -> Case:
    return Case(
        name,
        kda_inputs,
        lambda: (nan_pool(HEADS, WIDTH, WIDTH), nan_pool(3, KDA_CHANNELS)),
        partial(run_kda, decay),
        partial(kda_oracle, oracle_decay),
    )


# --------------------------------------------------------------------------------------------------------------- mamba2

STATE_WIDTH = 8
MAMBA2_CHANNELS = HEADS * WIDTH + 2 * KEY_HEADS * STATE_WIDTH
MAMBA2_WEIGHTS = Mamba2Weights(
    convolution=_rng.normal(0, 0.5, (4, MAMBA2_CHANNELS)).astype(np.float32),
    convolution_bias=_rng.normal(0, 0.5, MAMBA2_CHANNELS).astype(np.float32),
    decay_log=np.float32([-20, -3, 0, 3]),  # from a head that forgets nothing to one that forgets at once
    step_bias=_rng.normal(size=HEADS).astype(np.float32),
    skip=_rng.normal(size=HEADS).astype(np.float32),
    output_norm=_rng.normal(1, 0.2, HEADS * WIDTH).astype(np.float32),
)
STEP_LIMIT = (0.01, 5.0)


def mamba2_inputs(rng, tokens):
    inputs = {
        "z": rng.normal(size=(tokens, HEADS * WIDTH)).astype(np.float32),
        "mixed": rng.normal(size=(tokens, MAMBA2_CHANNELS)).astype(np.float32),
        "step_size": rng.normal(size=(tokens, HEADS)).astype(np.float32),
    }
    inputs["step_size"][::7] = 60.0  # above the largest step
    inputs["step_size"][3::7] = -60.0  # below the smallest
    return inputs


@partial(jax.jit, static_argnames=("layer",))
def run_mamba2(inputs, pools, batch, layer):
    out, state, tail = MAMBA2.on("xla")(
        inputs["z"], inputs["mixed"], inputs["step_size"], MAMBA2_WEIGHTS, *pools, layer, batch,
        groups=KEY_HEADS, epsilon=EPSILON, step_limit=STEP_LIMIT,
    )  # fmt: skip
    return out, (state, tail)


def mamba2_oracle(inputs, first, states):
    weights = jax.tree.map(lambda w: np.asarray(w, np.float64), MAMBA2_WEIGHTS)
    state, tail, outs = states[0].astype(np.float64), states[1].astype(np.float64), []
    for t in range(len(inputs["z"])):
        window = np.concatenate([tail, inputs["mixed"][t : t + 1].astype(np.float64)])
        tail, channels = window[1:], (window * weights.convolution).sum(0) + weights.convolution_bias
        channels = channels * sigmoid(channels)
        values = HEADS // KEY_HEADS * WIDTH
        x, b, c = np.split(channels.reshape(KEY_HEADS, -1), [values, values + STATE_WIDTH], axis=1)
        x = x.reshape(HEADS, WIDTH)
        b, c = (np.repeat(y, HEADS // KEY_HEADS, 0) for y in (b, c))
        step = np.logaddexp(0, inputs["step_size"][t].astype(np.float64) + weights.step_bias).clip(*STEP_LIMIT)
        state = np.exp(-np.exp(weights.decay_log) * step)[:, None, None] * state
        state = state + (step[:, None] * x)[:, :, None] * b[:, None, :]
        o = np.einsum("hvk,hk->hv", state, c) + weights.skip[:, None] * x
        z = inputs["z"][t].astype(np.float64)
        o = rms((o.reshape(-1) * z * sigmoid(z)).reshape(KEY_HEADS, -1), 1.0)
        outs.append(o.reshape(-1) * weights.output_norm)
    return np.stack(outs), (state, tail)


# ----------------------------------------------------------------------------------------------------------- short_conv

SHORT_CONV_WEIGHT = np.random.default_rng(13).normal(0, 0.5, (3, WIDTH)).astype(np.float32)


def short_conv_inputs(rng, tokens):
    mixed = rng.normal(size=(tokens, 3, WIDTH)).astype(np.float32)
    mixed[::7, 0] = 0.0  # the gate before the convolution is closed
    mixed[3::7, 1] = 0.0  # the gate behind it is
    return {"mixed": mixed}


@partial(jax.jit, static_argnames=("layer",))
def run_short_conv(inputs, pools, batch, layer):
    out, tail = SHORT_CONV.on("xla")(inputs["mixed"], SHORT_CONV_WEIGHT, pools[0], layer, batch)
    return out, (tail,)


def short_conv_oracle(inputs, first, states):
    tail, outs = states[0].astype(np.float64), []
    for in_gate, out_gate, channels in inputs["mixed"].astype(np.float64):
        window = np.concatenate([tail, (in_gate * channels)[None]])
        tail = window[1:]
        outs.append(out_gate * (window * SHORT_CONV_WEIGHT.astype(np.float64)).sum(0))
    return np.stack(outs), (tail,)


CASES = (
    Case("lightning", lightning_inputs, lambda: (nan_pool(HEADS, WIDTH, WIDTH),), run_lightning, lightning_oracle),
    Case(
        "lightning_activated",
        lightning_inputs,
        lambda: (nan_pool(HEADS, WIDTH, WIDTH),),
        run_activated_lightning,
        activated_lightning_oracle,
    ),
    Case("gdn", gdn_inputs, lambda: (nan_pool(HEADS, WIDTH, WIDTH), nan_pool(3, CHANNELS)), run_gdn, gdn_oracle),
    Case(
        "gdn_negative_eigenvalues",
        gdn_inputs,
        lambda: (nan_pool(HEADS, WIDTH, WIDTH), nan_pool(3, CHANNELS)),
        partial(run_gdn, beta_scale=2.0),
        partial(gdn_oracle, beta_scale=2.0),
    ),
    Case(
        "mamba2",
        mamba2_inputs,
        lambda: (nan_pool(HEADS, WIDTH, STATE_WIDTH), nan_pool(3, MAMBA2_CHANNELS)),
        run_mamba2,
        mamba2_oracle,
    ),
    kda_case("kda", SoftplusDecay(), softplus_decay),
    kda_case("kda_bounded", BoundedDecay(-5.0), bounded_decay),
    Case("short_conv", short_conv_inputs, lambda: (nan_pool(2, WIDTH),), run_short_conv, short_conv_oracle),
)


def fresh_states(case: Case) -> tuple[np.ndarray, ...]:
    """The states of a request that has seen nothing."""
    return tuple(np.zeros(pool.shape[2:]) for pool in case.pools())


def part(inputs: dict[str, np.ndarray], start: int, stop: int) -> dict[str, np.ndarray]:
    """Tokens [start, stop) of each input."""
    return {name: value[start:stop] for name, value in inputs.items()}


def packed(parts: list[dict[str, np.ndarray]], tokens: int) -> dict[str, Any]:
    """The parts one behind the other, padded with NaN to `tokens`."""
    out = {}
    for name in parts[0]:
        whole = np.concatenate([p[name] for p in parts])
        padding = np.full((tokens - len(whole), *whole.shape[1:]), np.nan, whole.dtype)
        out[name] = np.concatenate([whole, padding])
    return out
