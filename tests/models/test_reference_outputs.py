"""Law 3: every family gives the reference's logits, hidden states, greedy tokens and draft logits, in float32.

The caches are filled with NaN first, so that whatever is read before it was written shows. A wrong reading of a family
moves some logit by 0.3 or more; rounding moves it by less than 2e-4 (the reference with weights one float32 step off).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_jax import LLM, SamplingParams
from tests.models.reference import Fixture
from tests.ragged import checked, make_batch, nan_cache

FIXTURES = (
    "ling2_5",
    "ling2_5_mtp",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_next",
    "minimax_text",
    "nemotron_h",
    "falcon_h1",
    "granitemoehybrid",
    "kimi_linear",
    "ling3",
    "olmo_hybrid",
    "lfm2",
    "lfm2_moe",
)
BUCKET = 192  # packed tokens in every call
LOGITS = 5e-4  # of the standard deviation of the reference's logits
HIDDEN = 1e-4  # of the largest entry


@pytest.fixture(scope="module", params=FIXTURES)
def outputs(request):
    """The fixture, and a function from tokens to (logits, hidden state per layer, draft logits or None)."""
    fixture = Fixture(request.param)
    graph, state = nnx.split(fixture.load())

    @jax.jit
    def forward(state, tokens, following, cache, batch):
        model = nnx.merge(graph, state)
        outputs = list(model.layer_outputs(tokens, cache, batch))
        layers, cache = [x for x, _ in outputs], outputs[-1][1]
        hidden = model.norm(layers[-1])
        draft = None
        if model.draft is not None:
            draft = model.logits(model.draft_hidden(following, hidden, cache, batch)[0])
        return model.logits(hidden), layers, draft

    def run(tokens, next_token):
        length = len(tokens)
        padded = jnp.zeros(BUCKET, jnp.int32).at[:length].set(tokens)
        following = jnp.zeros(BUCKET, jnp.int32).at[:length].set(np.append(tokens[1:], next_token))
        batch = checked(make_batch([length]), BUCKET)
        cache = nan_cache(nnx.merge(graph, state))
        result = forward(state, padded, following, cache, batch)
        return jax.tree.map(lambda x: np.asarray(x)[:length], result)

    return fixture, run


def test_logits(outputs):
    fixture, run = outputs
    for index, prompt in enumerate(fixture.prompts):
        wanted = fixture.expected[f"logits_{index}"]
        logits, _, _ = run(prompt, 0)
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=LOGITS * wanted.std(), err_msg=f"prompt {index}")


def test_hidden_states(outputs):
    fixture, run = outputs
    _, layers, _ = run(fixture.prompts[fixture.hidden_prompt], 0)
    for index, layer in enumerate(layers):
        wanted = fixture.expected[f"hidden_{fixture.hidden_prompt}_layer_{index}"]
        np.testing.assert_allclose(layer, wanted, rtol=0, atol=HIDDEN * np.abs(wanted).max(), err_msg=f"layer {index}")


def test_draft_logits(outputs):
    fixture, run = outputs
    given = [index for index in range(len(fixture.prompts)) if f"mtp_logits_{index}" in fixture.expected]
    for index in given:
        wanted = fixture.expected[f"mtp_logits_{index}"]
        _, _, draft = run(fixture.prompts[index], fixture.expected[f"greedy_{index}"][0])
        np.testing.assert_allclose(draft, wanted, rtol=0, atol=LOGITS * wanted.std(), err_msg=f"prompt {index}")


def test_decoding_with_the_cache_gives_the_logits_of_a_full_forward(outputs):
    """The longest prompt's first half in one prefill, then four tokens one by one."""
    fixture, run = outputs
    prompt = fixture.prompts[-1]
    full, _, _ = run(prompt, 0)
    graph, state = nnx.split(fixture.load())

    @jax.jit
    def forward(state, tokens, cache, batch):
        model = nnx.merge(graph, state)
        hidden, cache = model(tokens, cache, batch)
        return model.logits(hidden), cache

    half = len(prompt) // 2
    padded = jnp.zeros(BUCKET, jnp.int32).at[:half].set(prompt[:half])
    _, cache = forward(state, padded, nan_cache(nnx.merge(graph, state)), checked(make_batch([half]), BUCKET))
    for t in range(half, half + 4):
        one = checked(make_batch([1], [t], decodes=1, content="decode"), 1)
        logits, cache = forward(state, jnp.asarray(prompt[t : t + 1]), cache, one)
        np.testing.assert_allclose(logits[0], full[t], rtol=0, atol=LOGITS * full.std(), err_msg=f"token {t}")


@pytest.mark.parametrize("name", FIXTURES)
def test_greedy_tokens_through_the_engine(name):
    """Prompts of several lengths at once, prefilled in pieces, then decoded with the cache in the on-device loop."""
    fixture = Fixture(name)
    sizes = {"max_model_len": 192, "max_num_seqs": 3, "max_num_batched_tokens": 64, "page_size": 32}
    llm = LLM(fixture.path, "float32", decode_steps=8, **sizes)
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    answers = llm.generate([prompt.tolist() for prompt in fixture.prompts], params)
    for index, answer in enumerate(answers):
        assert answer.outputs[0].token_ids == tuple(fixture.expected[f"greedy_{index}"].tolist()), f"prompt {index}"
        assert answer.outputs[0].finish_reason == "length"
