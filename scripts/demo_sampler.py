"""Samples many texts at once from a Llama-shaped language model held in a GGUF file: the engine of `demo_corpus.py`.

One decode step serves all rows, each row at its own position, and is captured once as a CUDA graph. A prompt is fed
through the same step, token by token, so there is no prefill; a row that ends is given the next prompt. That keeps one
program, one shape and no padding. It does not know what the prompts ask for or what becomes of the texts.

Letters: B rows, D width, F MLP width, H query heads, G key/value heads, J = 2G heads of the cache, K head width,
S places of a row, Y vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# The number that names a prompt, and tokens: of the prompt, or of the answer to it.
Answer = tuple[int, list[int]]

CANDIDATES = 64
VOCABULARY_GROUP = 96
RECENT = 48
# Stands in places of a row that are not written yet: no token has this number.
NOTHING = -1
# Steps between two looks of the host: a row that ends idles half of this on average.
STRIDE = 16


@dataclass(frozen=True)
class Layer:
    """Weights of one layer, projections joined where they read the same input."""

    input_norm_D: torch.Tensor
    qkv: torch.Tensor
    out: torch.Tensor
    mlp_norm_D: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class Weights:
    """All weights, and the rotary tables."""

    layers: tuple[Layer, ...]
    embedding_YD: torch.Tensor
    norm_D: torch.Tensor
    cos_SK: torch.Tensor
    sin_SK: torch.Tensor
    heads: int
    kv_heads: int
    norm_epsilon: float


@dataclass(frozen=True)
class Rows:
    """What the step reads and writes in place: one text a row."""

    sequence_BS: torch.Tensor
    prompt_length_B: torch.Tensor
    position_B: torch.Tensor
    done_B: torch.Tensor
    noise_BC: torch.Tensor
    cache_LBJSK: torch.Tensor


@dataclass(frozen=True)
class Settings:
    """How tokens are drawn. The penalties are taken off logits: small models go in circles without them."""

    temperature: float
    top_p: float
    recent_penalty: float
    run_penalty: float
    end_ids: tuple[int, ...]


def load_model(gguf: Path, dtype: torch.dtype, device: str):
    """The tokenizer and the transformers model of a GGUF file, read with no network."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype)
    return tokenizer, model.to(device).eval()


def take_layer(block) -> Layer:
    """The weights of one layer of a transformers model."""
    attention, mlp = block.self_attn, block.mlp
    return Layer(
        input_norm_D=block.input_layernorm.weight.detach(),
        qkv=torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]).detach(),
        out=attention.o_proj.weight.detach(),
        mlp_norm_D=block.post_attention_layernorm.weight.detach(),
        gate_up=torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach(),
        down=mlp.down_proj.weight.detach(),
    )


def take_weights(model, places: int) -> Weights:
    """The weights of a transformers Llama model, products that share an input joined, with its rotary table."""
    config = model.config
    embedding_YD = model.get_input_embeddings().weight.detach()
    if embedding_YD.shape[0] % VOCABULARY_GROUP:
        raise ValueError(f"wanted a vocabulary that {VOCABULARY_GROUP} divides, got {embedding_YD.shape[0]}")
    positions = torch.arange(places, device=embedding_YD.device)[None]
    with torch.no_grad():
        cos, sin = model.model.rotary_emb(embedding_YD.float()[:1], positions)
    return Weights(
        layers=tuple(take_layer(block) for block in model.model.layers),
        embedding_YD=embedding_YD,
        norm_D=model.model.norm.weight.detach(),
        cos_SK=cos[0].to(embedding_YD.dtype),
        sin_SK=sin[0].to(embedding_YD.dtype),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        norm_epsilon=config.rms_norm_eps,
    )


def make_rows(weights: Weights, batch: int, places: int) -> Rows:
    """Empty rows: all done, so that the first look gives each a prompt."""
    like = weights.embedding_YD
    head_width = weights.cos_SK.shape[1]
    cache_shape = (len(weights.layers), batch, 2 * weights.kv_heads, places, head_width)
    whole = {"dtype": torch.int64, "device": like.device}
    return Rows(
        sequence_BS=torch.zeros((batch, places), **whole),
        prompt_length_B=torch.ones(batch, **whole),
        position_B=torch.zeros(batch, **whole),
        done_B=torch.ones(batch, dtype=torch.bool, device=like.device),
        noise_BC=torch.ones((batch, CANDIDATES), dtype=torch.float32, device=like.device),
        cache_LBJSK=torch.zeros(cache_shape, dtype=like.dtype, device=like.device),
    )


def attend_plain(q_BHK: torch.Tensor, cache_BJSK: torch.Tensor, position_B: torch.Tensor) -> torch.Tensor:
    """The definition of the attention: reads every place of every row and masks those not yet seen."""
    B, H, K = q_BHK.shape
    G, S = cache_BJSK.shape[1] // 2, cache_BJSK.shape[2]
    q_BGMK = q_BHK.reshape(B, G, H // G, K)
    seen_B11S = (torch.arange(S, device=q_BHK.device)[None] <= position_B[:, None])[:, None, None]
    out_BGMK = F.scaled_dot_product_attention(q_BGMK, cache_BJSK[:, :G], cache_BJSK[:, G:], attn_mask=seen_B11S)
    return out_BGMK.reshape(B, H, K)


def rotate(x_BHK: torch.Tensor, cos_B1K: torch.Tensor, sin_B1K: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in the half-split layout of transformers' Llama."""
    half = x_BHK.shape[-1] // 2
    turned = torch.cat([-x_BHK[..., half:], x_BHK[..., :half]], dim=-1)
    return x_BHK * cos_B1K + turned * sin_B1K


def attention_block(weights, layer, cache_BJSK, x_BD, position_B, attend):
    """Attention of one token per row over its cached keys and values."""
    B, K = x_BD.shape[0], weights.cos_SK.shape[1]
    H, G = weights.heads, weights.kv_heads
    h_BD = F.rms_norm(x_BD, x_BD.shape[1:], layer.input_norm_D, weights.norm_epsilon)
    qkv = F.linear(h_BD, layer.qkv).view(B, H + 2 * G, K)
    cos_B1K, sin_B1K = weights.cos_SK[position_B][:, None], weights.sin_SK[position_B][:, None]
    qk = rotate(qkv[:, : H + G], cos_B1K, sin_B1K)
    kv_BJK = torch.cat([qk[:, H:], qkv[:, H + G :]], dim=1)
    rows = torch.arange(B, device=x_BD.device)[:, None]
    heads = torch.arange(2 * G, device=x_BD.device)[None]
    cache_BJSK[rows, heads, position_B[:, None]] = kv_BJK
    out = attend(qk[:, :H], cache_BJSK, position_B).reshape(B, H * K)
    return x_BD + F.linear(out, layer.out)


def mlp_block(weights: Weights, layer: Layer, x_BD: torch.Tensor) -> torch.Tensor:
    """The SwiGLU MLP of one layer."""
    h_BD = F.rms_norm(x_BD, x_BD.shape[1:], layer.mlp_norm_D, weights.norm_epsilon)
    gate_BF, up_BF = F.linear(h_BD, layer.gate_up).chunk(2, dim=-1)
    return x_BD + F.linear(F.silu(gate_BF) * up_BF, layer.down)


def forward(weights: Weights, cache_LBJSK, token_B, position_B, attend: Attend) -> torch.Tensor:
    """Logits B Y of the token that follows `token_B`, which stands at `position_B`; writes the cache there."""
    x_BD = weights.embedding_YD[token_B]
    for layer, cache_BJSK in zip(weights.layers, cache_LBJSK, strict=True):
        x_BD = attention_block(weights, layer, cache_BJSK, x_BD, position_B, attend)
        x_BD = mlp_block(weights, layer, x_BD)
    x_BD = F.rms_norm(x_BD, x_BD.shape[1:], weights.norm_D, weights.norm_epsilon)
    return F.linear(x_BD, weights.embedding_YD)


def best_candidates(logits_BY: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The `CANDIDATES` largest logits in falling order and their tokens.

    They all lie in the `CANDIDATES` groups of the vocabulary whose largest logits are largest, so two small searches
    take the place of one over the whole vocabulary.
    """
    B, Y = logits_BY.shape
    grouped = logits_BY.view(B, Y // VOCABULARY_GROUP, VOCABULARY_GROUP)
    groups = grouped.amax(dim=-1).topk(CANDIDATES, dim=-1).indices
    members = grouped.gather(1, groups[:, :, None].expand(-1, -1, VOCABULARY_GROUP)).reshape(B, -1)
    logits_BC, index_BC = members.topk(CANDIDATES, dim=-1)
    token_BC = groups.gather(1, index_BC // VOCABULARY_GROUP) * VOCABULARY_GROUP + index_BC % VOCABULARY_GROUP
    return logits_BC, token_BC


def penalty(rows: Rows, token_BC: torch.Tensor, settings: Settings) -> torch.Tensor:
    """What is taken off the candidates' logits: `recent_penalty` for a token among the last `RECENT` ones, and
    `run_penalty` for one that would make a run of three tokens that the answer already has.
    """
    sequence_BS, here_B1 = rows.sequence_BS, rows.position_B[:, None]
    back = torch.arange(RECENT, device=here_B1.device)[None]
    recent_BR = sequence_BS.gather(1, (here_B1 - back).clamp(min=0))
    is_recent_BC = (token_BC[:, :, None] == recent_BR[:, None]).any(dim=-1)
    last_B1 = sequence_BS.gather(1, here_B1)
    before_last_B1 = sequence_BS.gather(1, (here_B1 - 1).clamp(min=0))
    in_answer = torch.arange(sequence_BS.shape[1] - 2, device=here_B1.device)[None] >= rows.prompt_length_B[:, None]
    is_pair = (sequence_BS[:, :-2] == before_last_B1) & (sequence_BS[:, 1:-1] == last_B1) & in_answer
    follower = torch.where(is_pair, sequence_BS[:, 2:], NOTHING)
    makes_run_BC = (token_BC[:, :, None] == follower[:, None]).any(dim=-1)
    return settings.recent_penalty * is_recent_BC.float() + settings.run_penalty * makes_run_BC.float()


def draw(logits_BY: torch.Tensor, rows: Rows, settings: Settings) -> torch.Tensor:
    """One token a row from the smallest set of best candidates that holds `top_p` of their probability.

    The noise of `rows` is drawn from the exponential distribution: the candidate whose probability over its noise is
    largest is a sample.
    """
    logits_BC, token_BC = best_candidates(logits_BY)
    logits_BC, order_BC = (logits_BC.float() - penalty(rows, token_BC, settings)).sort(dim=-1, descending=True)
    probability_BC = torch.softmax(logits_BC / settings.temperature, dim=-1)
    before_BC = probability_BC.cumsum(dim=-1) - probability_BC
    score_BC = torch.where(before_BC < settings.top_p, probability_BC / rows.noise_BC, -1.0)
    best_B1 = order_BC.gather(1, score_BC.argmax(dim=-1, keepdim=True))
    return token_BC.gather(1, best_B1)[:, 0]


def advance(weights: Weights, rows: Rows, settings: Settings, attend: Attend) -> None:
    """One step of all rows, in place. Prompt tokens are kept as they stand; rows that are done stand still."""
    places = rows.sequence_BS.shape[1]
    here_B1 = rows.position_B[:, None]
    token_B = rows.sequence_BS.gather(1, here_B1)[:, 0]
    logits_BY = forward(weights, rows.cache_LBJSK, token_B, rows.position_B, attend)
    drawn_B = draw(logits_BY, rows, settings)
    next_B1 = (here_B1 + 1).clamp(max=places - 1)
    standing_B = rows.sequence_BS.gather(1, next_B1)[:, 0]
    given_B = (rows.position_B + 1 < rows.prompt_length_B) | rows.done_B
    chosen_B = torch.where(given_B, standing_B, drawn_B)
    rows.sequence_BS.scatter_(1, next_B1, chosen_B[:, None])
    ended_B = (rows.position_B + 2 >= places).clone()
    for end_id in settings.end_ids:
        ended_B |= (chosen_B == end_id) & ~given_B
    rows.position_B.copy_(torch.where(rows.done_B, rows.position_B, next_B1[:, 0]))
    rows.done_B.logical_or_(ended_B)


def compile_step(weights: Weights, rows: Rows, settings: Settings, attend: Attend) -> Callable[[], None]:
    """A function that makes one step: plain calls on a CPU, the replay of a captured graph on a GPU."""
    if rows.done_B.device.type == "cpu":
        return lambda: advance(weights, rows, settings, attend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            advance(weights, rows, settings, attend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        advance(weights, rows, settings, attend)
    return graph.replay


def place_prompts(rows: Rows, index: torch.Tensor, prompts: list[list[int]]) -> None:
    """Gives the rows of `index` new prompts. A prompt takes less than the places of a row."""
    places = rows.sequence_BS.shape[1]
    longest = max(len(prompt) for prompt in prompts)
    if longest >= places or not all(prompts):
        raise ValueError(f"wanted prompts of 1 to {places - 1} tokens, got {longest} or none; shorten them")
    table = torch.tensor([prompt + [NOTHING] * (places - len(prompt)) for prompt in prompts])
    device = rows.done_B.device
    index = index.to(device)
    rows.sequence_BS[index] = table.to(device)
    rows.prompt_length_B[index] = torch.tensor([len(prompt) for prompt in prompts], device=device)
    rows.position_B[index] = 0
    rows.done_B[index] = False


def copy_texts(rows: Rows, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """On the host: the sequences of the rows of `index`, where their answers begin, and where they end."""
    index = index.to(rows.done_B.device)
    sequences = rows.sequence_BS[index].to(torch.int32).cpu()
    return sequences, rows.prompt_length_B[index].cpu(), rows.position_B[index].cpu() + 1


def cut_texts(copied: tuple[torch.Tensor, torch.Tensor, torch.Tensor], tags: list[int]) -> list[Answer]:
    """(tag, tokens after the prompt); a row that has not begun its answer gives no tokens, one with no tag nothing."""
    spans = zip(tags, *(part.tolist() for part in copied), strict=True)
    return [(tag, tokens[begin:end]) for tag, tokens, begin, end in spans if tag >= 0]


def sample_until(
    stop: Callable[[], bool], step: Callable[[], None], rows: Rows, prompts: Iterator[Answer]
) -> Iterator[list[Answer]]:
    """Yields (tag, tokens after the prompt) of ended rows, a list at each look, until `stop()`; then all the rest.

    `prompts` is endless and gives (tag, prompt tokens). The next `STRIDE` steps are queued before the texts are cut
    and the prompts to come are made, so that the host works while the device does.
    """
    batch = rows.done_B.shape[0]
    tags = [-1] * batch
    ready = [next(prompts) for _ in range(batch)]
    while not stop():
        index = rows.done_B.nonzero()[:, 0].cpu()
        copied, ended_tags = copy_texts(rows, index), [tags[row] for row in index]
        fresh, ready = ready[: len(index)], ready[len(index) :]
        for row, (tag, _) in zip(index.tolist(), fresh, strict=True):
            tags[row] = tag
        if fresh:
            place_prompts(rows, index, [prompt for _, prompt in fresh])
        for _ in range(STRIDE):
            rows.noise_BC.exponential_()
            step()
        ready += [next(prompts) for _ in fresh]
        yield cut_texts(copied, ended_tags)
    yield cut_texts(copy_texts(rows, torch.arange(batch)), tags)
