"""The definition of sampling in NumPy float64, and rows to try it on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import sampling
from hybrid_jax.request import Request, SamplingParams, make_request

EOS = (3,)
SHORT = 1e-6  # of a share or a weight: closer to a limit than this, float32 and float64 may fall on different sides


def request(choice: int = 0, **params: object) -> Request:
    return make_request("r", [1], SamplingParams(**{"seed": 0, **params}), max_model_len=1000, choice=choice)


def packed(
    *requests: Request,
    sampled: list[int] | None = None,
    padded_rows: int | None = None,
    rows: list[int] | None = None,
) -> sampling.SamplingRows:
    return sampling.pack(requests, sampled or [0] * len(requests), padded_rows or len(requests), EOS, rows)


def widened(logits: object, rows: int, vocabulary: int) -> jax.Array:
    """`logits` with more rows of zeros and a padded tail of -inf, so that most tests share one compiled program."""
    logits = np.atleast_2d(np.asarray(logits, np.float32))
    wide = np.full((rows, vocabulary), -np.inf, np.float32)
    wide[:, : logits.shape[1]] = 0.0
    wide[: len(logits), : logits.shape[1]] = logits
    return jnp.asarray(wide)


def shape(logits: np.ndarray, params: SamplingParams, prompt: list[int], output: list[int]) -> np.ndarray:
    """Allowed tokens and bias, then repetition, then frequency and presence, one token after the other."""
    logits = np.asarray(logits, np.float32).astype(np.float64)
    for token, bias in params.logit_bias:
        logits[token] += bias
    for token in range(len(logits)):
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            logits[token] = -np.inf
        if token in prompt or token in output:
            logits[token] *= 1 / params.repetition_penalty if logits[token] > 0 else params.repetition_penalty
        logits[token] -= params.frequency_penalty * output.count(token)
        logits[token] -= params.presence_penalty * (token in output)
    return logits


def logprobs(logits: np.ndarray) -> np.ndarray:
    """Log-softmax of one row."""
    logits = np.asarray(logits, np.float32).astype(np.float64) - np.max(logits)
    likeliest = int(np.argmax(logits))
    return logits - np.log1p(np.exp(np.delete(logits, likeliest)).sum())


@dataclasses.dataclass(frozen=True)
class Oracle:
    """The probabilities of one row by definition; `sharp` is False where rounding decides which tokens are kept."""

    probabilities: np.ndarray
    sharp: bool


def define(logits: np.ndarray, params: SamplingParams, sampled: int = 0) -> Oracle:
    """The order of operations in float64, one after the other, with a sort."""
    logits = np.asarray(logits, np.float32).astype(np.float64)
    if sampled < params.min_tokens:
        stops = [*params.stop_token_ids, *(() if params.ignore_eos else EOS)]
        logits[[i for i in stops if i < len(logits)]] = -np.inf
    if params.greedy:
        return Oracle(np.eye(len(logits))[np.argmax(logits)], True)
    order = np.argsort(-logits, kind="stable")
    weights = np.exp((logits - logits.max()) / np.float64(np.float32(params.temperature)))[order]
    order = order[: params.top_k or None]
    weights, sharp = weights[: params.top_k or None], True
    if params.top_p < 1:
        share, p = np.cumsum(weights) / weights.sum(), np.float64(np.float32(params.top_p))
        keep = int(np.searchsorted(share, p)) + 1
        sharp &= abs(share - p).min() > SHORT
        order, weights = order[:keep], weights[:keep]
    min_p = np.float64(np.float32(params.min_p))
    sharp &= min_p == 0 or abs(weights[1:] - min_p).min(initial=1) > SHORT
    weights = np.where(weights >= min_p, weights, 0)
    probabilities = np.zeros(len(logits))
    probabilities[order] = weights / weights.sum()
    return Oracle(probabilities, bool(sharp))
