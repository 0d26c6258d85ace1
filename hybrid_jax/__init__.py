"""An inference engine for hybrid-attention language models, on TPUs and GPUs."""

from hybrid_jax.llm import LLM
from hybrid_jax.request import CompletionOutput, RequestOutput, SamplingParams

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]
