"""Trains the demo model on one GPU in a few minutes and writes it as an int8 checkpoint.

    python scripts/train_demo.py --text corpus/*.jsonl.xz --tokenizer tokenizer.json --out demo --minutes 10

The forward pass is the one that serves: the model's own prefill, one request of `--length` tokens per sequence. Only
the mixture of experts is computed densely here (every expert, weighted), because that differentiates and vectorises
well at eight experts. Experts are kept in balance without a loss term, by nudging the router's bias (arXiv 2408.15664).
Bits per byte are measured on held-out text that is never trained on.
"""

import argparse
import json
import lzma
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from kernels_pallas.op import Cache, KVSpec, RaggedBatch
from models.layers import Tally, swiglu
from models.registry import find_family

END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|end|>"
CHAT_TEMPLATE = (
    "{{ eos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>"
    "{% else %}{{ raise_exception('the roles are user and assistant') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HELD_OUT_EVERY = 100  # one piece of text of so many is held out
STEPS_A_CALL = 10
BALANCE_STEP = 1e-3  # change of a router's bias per step

CONFIG: dict[str, Any] = {
    "architectures": ["BailingMoeV2_5ForCausalLM"],
    "model_type": "bailing_hybrid",
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "first_k_dense_replace": 1,
    "group_norm_size": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 256,
    "intermediate_size": 768,
    "kv_lora_rank": 64,
    "layer_group_size": 4,
    "max_position_embeddings": 1024,
    "moe_intermediate_size": 144,
    "moe_router_enable_expert_bias": True,
    "n_group": 1,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 8,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "partial_rotary_factor": 0.5,
    "q_lora_rank": None,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "rms_norm_eps": 1e-6,
    "rope_interleave": True,
    "rope_scaling": None,
    "rope_theta": 10000,
    "rotary_dim": 32,
    "routed_scaling_factor": 1.0,
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "torch_dtype": "float32",
    "use_bias": False,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "v_head_dim": 64,
    "vocab_size": 8192,
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
                "input_activations": None,
            }
        },
        "ignore": [],
    },
}


# ---------------------------------------------------------------------------------------------------------------- text


def read_pieces(paths: list[Path]) -> list[str]:
    """The pieces of text of `.jsonl.xz` files, one JSON string a line."""
    pieces: list[str] = []
    for path in paths:
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            pieces.extend(json.loads(line) for line in lines)
    return pieces


def tokenize(tokenizer: Tokenizer, pieces: list[str]) -> np.ndarray:
    """All pieces as one array of tokens, each behind an end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    parts: list[np.ndarray] = []
    for start in range(0, len(pieces), 10_000):
        for encoding in tokenizer.encode_batch(pieces[start : start + 10_000]):
            parts.append(np.asarray([end, *encoding.ids], np.uint16))
    return np.concatenate(parts)


# --------------------------------------------------------------------------------------------------------------- model


class DenseExperts:
    """Every expert for every token, weighted by the router; counts who was chosen."""

    def __init__(self, experts: Any):
        self.gate_up, self.down = experts.gate_up[...], experts.down[...]
        self.counts = jnp.zeros((), jnp.float32)

    def __call__(self, x: jax.Array, experts: jax.Array, weights: jax.Array) -> jax.Array:
        chosen = jax.nn.one_hot(experts, self.gate_up.shape[0], dtype=jnp.float32)
        self.counts = chosen.sum((0, 1))
        shares = jnp.einsum("tke,tk->te", chosen, weights)
        inner = jnp.einsum("td,edcf->tecf", x, self.gate_up)
        inner = swiglu(inner.reshape(-1, *inner.shape[2:])).reshape(*inner.shape[:2], -1)
        inner = inner * shares.astype(inner.dtype)[:, :, None]
        return jnp.einsum("tef,efd->td", inner, self.down)


def fresh_cache(model: Any, length: int) -> Cache:
    """An empty cache for one request of `length` tokens: one page, and the null slot beside the request's own."""
    routes = model.routes()
    pools = []
    for index, spec in enumerate(model.specs):
        layers = 1 + max(route.place.layer for route in routes if route.place.pool == index)
        lead = (layers, 2, length) if isinstance(spec, KVSpec) else (layers, 2)
        pools.append(tuple(jnp.zeros(lead + spec.pool_shape(array), array.dtype) for array in spec.arrays))
    return Cache(model.specs, tuple(pools))


def one_request(length: int) -> RaggedBatch:
    """A batch of one new request with `length` tokens."""
    one, none = jnp.ones((1,), jnp.int32), jnp.zeros((1,), jnp.int32)
    start = jnp.array([0, length], jnp.int32)
    return RaggedBatch(start, none, jnp.int32(0), none, one, none, none, jnp.ones((1, 1), jnp.int32), "prefill")


def make_forward(config: Any, family: Any, length: int) -> tuple[Callable[..., Any], nnx.State]:
    """A function (bf16 state, tokens [T]) -> (logits [T, Y], expert counts), and the abstract bf16 state."""
    abstract = nnx.eval_shape(lambda: family.Model(config, rngs=nnx.Rngs(0), dtype="bfloat16", backend="xla"))
    graph, state = nnx.split(abstract)

    def forward(state: nnx.State, tokens: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        model = nnx.merge(graph, state)
        sparse = [layer.feed_forward for layer in list(model.layers)[config.dense_layers :]]
        dense = [DenseExperts(moe.experts) for moe in sparse]
        for moe, experts in zip(sparse, dense, strict=True):
            object.__setattr__(moe, "experts", experts)
        hidden, _ = model(tokens, fresh_cache(model, length), one_request(length))
        return model.logits(hidden), [experts.counts for experts in dense]

    return forward, state


def cast_like(state: nnx.State, abstract: nnx.State) -> nnx.State:
    """The master weights in the dtypes that the model computes with."""
    return jax.tree.map(lambda x, like: x.astype(like.dtype), state, abstract)


# ------------------------------------------------------------------------------------------------------------ training


def make_step(forward: Callable[..., Any], abstract: nnx.State, tx: Any, length: int) -> Callable[..., Any]:
    """A jitted function that trains several steps: (state, optimiser state, tokens, key, rate) -> the same, losses."""

    def loss(trained: nnx.State, rest: nnx.State, windows: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        state = cast_like(nnx.merge_state(trained, rest), abstract)
        logits, counts = jax.vmap(forward, in_axes=(None, 0))(state, windows[:, :-1])
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()
        return nats, [count.sum(0) for count in counts]

    def step(carry: Any, key: jax.Array, tokens: jax.Array, rate: jax.Array, groups: int) -> tuple[Any, jax.Array]:
        trained, rest, moments = carry
        starts = jax.random.randint(key, (groups,), 0, tokens.shape[0] - length - 1)
        windows = tokens[starts[:, None] + jnp.arange(length + 1)[None, :]].astype(jnp.int32)
        (nats, counts), gradient = jax.value_and_grad(loss, has_aux=True)(trained, rest, windows)
        updates, moments = tx.update(gradient, moments, trained)
        trained = jax.tree.map(lambda weight, update: weight - rate * update, trained, updates)
        return (trained, balance(rest, counts), moments), nats

    @partial(jax.jit, static_argnames=("groups",), donate_argnums=(0,))
    def steps(carry: Any, tokens: jax.Array, key: jax.Array, rate: jax.Array, groups: int) -> tuple[Any, jax.Array]:
        keys = jax.random.split(key, STEPS_A_CALL)
        return jax.lax.scan(lambda carry, key: step(carry, key, tokens, rate, groups), carry, keys)

    return steps


def balance(biases: nnx.State, counts: list[jax.Array]) -> nnx.State:
    """Raise the bias of experts that were chosen less than the mean, lower the others'."""
    leaves, tree = jax.tree.flatten(biases)
    nudged = [bias + BALANCE_STEP * jnp.sign(count.mean() - count) for bias, count in zip(leaves, counts, strict=True)]
    return jax.tree.unflatten(tree, nudged)


def train(args: argparse.Namespace, tokens: np.ndarray) -> tuple[nnx.State, Callable[..., Any], nnx.State]:
    """Train for `args.minutes`; the learning rate follows the clock. Returns master weights, forward and dtypes."""
    family = find_family(CONFIG)
    config = family.Config.from_hf(CONFIG)
    forward, abstract = make_forward(config, family, args.length)
    model = family.Model(config, rngs=nnx.Rngs(args.seed), dtype="float32", backend="xla")
    trained, rest = nnx.state(model, nnx.Param), nnx.state(model, Tally)
    matrices = jax.tree.map(lambda x: x.ndim > 1, trained)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(0.1, mask=matrices),
    )
    steps = make_step(forward, abstract, tx, args.length)
    carry, key, data = (trained, rest, tx.init(trained)), jax.random.key(args.seed), jnp.asarray(tokens)
    started, calls = time.monotonic(), 0
    while (progress := (time.monotonic() - started) / (60 * args.minutes)) < 1:
        warm = min(1.0, (calls + 1) * STEPS_A_CALL / 200)
        rate = args.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        key, now = jax.random.split(key)
        carry, nats = steps(carry, data, now, jnp.float32(rate), args.groups)
        calls += 1
        if calls % 10 == 1:
            seen = calls * STEPS_A_CALL * args.groups * args.length
            seconds = time.monotonic() - started
            print(f"{seconds:6.0f} s  {seen / 1e6:7.1f} M tokens  {float(nats[-1]):.4f} nats", flush=True)
    return nnx.merge_state(carry[0], carry[1]), forward, abstract


# -------------------------------------------------------------------------------------------------------------- result


def bits_per_byte(
    state: nnx.State, forward: Callable[..., Any], tokens: np.ndarray, text_bytes: int, length: int
) -> float:
    """Bits per byte of text over full windows of `length` tokens, counting the bytes those windows stand for."""
    count = (len(tokens) - 1) // length
    used = tokens[: count * length + 1].astype(np.int32)
    windows = np.stack([used[i * length : (i + 1) * length + 1] for i in range(count)])

    @jax.jit
    def nats(windows: jax.Array) -> jax.Array:
        logits, _ = jax.vmap(forward, in_axes=(None, 0))(state, windows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).sum()

    total = sum(float(nats(windows[start : start + 16])) for start in range(0, count - count % 16, 16))
    share = (count - count % 16) * length / (len(tokens) - 1)
    return total / math.log(2) / (text_bytes * share)


def quantise(tensor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A matrix as int8 with one scale per output channel (row)."""
    scale = np.maximum(np.abs(tensor).max(axis=1, keepdims=True), 1e-12) / 127
    return np.clip(np.rint(tensor / scale), -127, 127).astype(np.int8), scale.astype(np.float32)


def published(state: nnx.State, config: Any) -> dict[str, np.ndarray]:
    """The weights under their published names: matrices as int8 with scales, vectors as float32."""
    parameters = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    tensors: dict[str, np.ndarray] = {}
    for row in find_family(CONFIG).weight_table(config).weights:
        source = row.sources[0]
        parts = source.split(np.asarray(parameters[row.path][...], np.float32))
        for name, tensor in zip(source.names, parts, strict=True):
            if tensor.ndim == 2:
                tensors[name], tensors[f"{name}_scale"] = quantise(tensor)
            else:
                tensors[name] = tensor
    return tensors


def shipped(tensors: dict[str, np.ndarray], config: Any, state: nnx.State) -> nnx.State:
    """The weights as they will be read back from `tensors`, so that what is measured is what is shipped."""
    read = {name: tensor * tensors.get(f"{name}_scale", np.float32(1)) for name, tensor in tensors.items()}
    sources = {row.path: row.sources[0] for row in find_family(CONFIG).weight_table(config).weights}
    leaves = []
    for path, leaf in nnx.to_flat_state(state):
        source = sources[".".join(map(str, path))]
        leaves.append((path, leaf.replace(jnp.asarray(source.assemble([read[n] for n in source.names], leaf.shape)))))
    return nnx.from_flat_state(leaves)


def text_files(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """The small files beside a tokenizer: its chat template and the ids that end an answer."""
    ends = [tokenizer.token_to_id(token) for token in (END_OF_TEXT, END_OF_TURN)]
    return {
        "tokenizer_config.json": {"eos_token": END_OF_TEXT, "chat_template": CHAT_TEMPLATE},
        "generation_config.json": {"eos_token_id": ends, "temperature": 0.7, "top_p": 0.9},
    }


def main() -> None:
    """Read the text, train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--groups", type=int, default=64, help="sequences a step")
    parser.add_argument("--length", type=int, default=1024, help="tokens a sequence")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    pieces = read_pieces(args.text)
    np.random.default_rng(args.seed).shuffle(pieces)
    held_out, kept = pieces[::HELD_OUT_EVERY], [p for i, p in enumerate(pieces) if i % HELD_OUT_EVERY]
    tokens, test = tokenize(tokenizer, kept), tokenize(tokenizer, held_out)
    text_bytes = len(tokenizer.decode(test.tolist(), skip_special_tokens=True).encode())
    print(
        f"{len(tokens) / 1e6:.1f} M tokens to train on, {len(test) / 1e6:.2f} M held out ({text_bytes} bytes)",
        flush=True,
    )
    state, forward, abstract = train(args, tokens)
    family = find_family(CONFIG)
    config = family.Config.from_hf(CONFIG)
    args.out.mkdir(parents=True, exist_ok=True)
    tensors = published(state, config)
    save_file(tensors, args.out / "model.safetensors")
    (args.out / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    (args.out / "tokenizer.json").write_text(args.tokenizer.read_text())
    for name, content in text_files(tokenizer).items():
        (args.out / name).write_text(json.dumps(content, indent=1) + "\n")
    measure = partial(bits_per_byte, forward=forward, tokens=test, text_bytes=text_bytes, length=args.length)
    result = {
        "bits_per_byte": measure(cast_like(state, abstract)),
        "bits_per_byte_int8": measure(cast_like(shipped(tensors, config, state), abstract)),
        "held_out_bytes": text_bytes,
        "train_tokens": len(tokens),
    }
    (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
