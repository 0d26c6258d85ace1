"""An engine on N devices: `python -m tests.hybrid_jax.sharded_engine NAME N [PORT PROCESSES INDEX]`.

Prints the tokens and log-probabilities of the fixture's prompts and how the pools lie; several processes do so until
they are killed.
"""

import json
import sys

from hybrid_jax import LLM, SamplingParams
from hybrid_jax.processes import end_together, join_processes
from tests.models.reference import Fixture


def main(name, devices, forever):
    fixture = Fixture(name)
    llm = LLM(
        fixture.path, "float32", backend="xla", tensor_parallel=devices,
        max_model_len=128, max_num_seqs=2, max_num_batched_tokens=64, page_size=32, pages=16, slots=8, decode_steps=4,
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)
    prompts = [prompt.tolist() for prompt in fixture.prompts[:2]]
    while True:
        answers = [answer.outputs[0] for answer in llm.generate(prompts, params)]
        pools = [array for pool in llm._runner._memory.cache.pools for array in pool]
        found = {
            "tokens": [answer.token_ids for answer in answers],
            "logprobs": [[token.logprob for token in answer.logprobs] for answer in answers],
            "shares": sorted({array.size // array.addressable_shards[0].data.size for array in pools}),
        }
        print(json.dumps(found), flush=True)
        if not forever:
            return


if __name__ == "__main__":
    name, devices, *several = sys.argv[1:]
    if several:
        port, count, index = map(int, several)
        join_processes(f"127.0.0.1:{port}", count, index)
    with end_together():
        main(name, int(devices), bool(several))
