"""vLLM in process, with its drafted tokens written down. Runs in vLLM's environment:

    python run_vllm.py REQUEST.json ANSWER.json

It imports nothing of this project. The request has target, draft (null for none), speculative (the
speculative config without the draft), dtype, prompts and max_new_tokens. The answer is the `Answer` of
`train.prove.engine`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

# In process, so that drafted tokens can be read; the V2 runner is the one that serves blocks.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
on_cpu = not torch.cuda.is_available()
if on_cpu:
    sys.path.insert(0, str(Path(__file__).parents[3] / "pipeline" / "vllm_worker"))
    import cpu_triton

    cpu_triton.install()

import vllm  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.v1.worker.gpu.model_runner import GPUModelRunner  # noqa: E402

Seen = list[tuple[int, list[int]]]


def watch_drafts(seen: Seen) -> None:
    """Add the number of tokens before each anchor, and the tokens drafted after it, to `seen`."""
    load = GPUModelRunner.load_model

    def load_and_watch(self: Any, *args: Any, **kwargs: Any) -> None:
        load(self, *args, **kwargs)
        speculator = self.speculator
        if speculator is None:
            return
        propose = speculator.propose

        def watched(batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            drafted = propose(batch, *args, **kwargs)
            if not kwargs.get("dummy_run") and batch.num_reqs == 1:
                sampled, rejected = args[4], args[5]
                if int(sampled[0]) > 0:  # not in the middle of a prompt
                    seen.append((int(batch.seq_lens[0]) - int(rejected[0]), drafted[0].tolist()))
            return drafted

        speculator.propose = watched

    GPUModelRunner.load_model = load_and_watch


def serve(request: dict[str, Any]) -> dict[str, Any]:
    """Answer a request."""
    seen: Seen = []
    watch_drafts(seen)
    prompts, new = request["prompts"], request["max_new_tokens"]
    speculative = None if request["draft"] is None else {**request["speculative"], "model": request["draft"]}
    drafted = 0 if speculative is None else speculative["num_speculative_tokens"]
    llm = LLM(
        model=request["target"],
        speculative_config=speculative,
        dtype=request["dtype"],
        enforce_eager=on_cpu,
        max_model_len=max(map(len, prompts)) + new + 2 * drafted + 1,
        max_num_seqs=1,
        enable_prefix_caching=False,
        seed=0,
        **({"kv_cache_memory_bytes": 2**30} if on_cpu else {}),
    )
    params = SamplingParams(temperature=0, max_tokens=new, detokenize=False)
    llm.generate([{"prompt_token_ids": prompts[0]}], params, use_tqdm=False)  # not timed: the first is slow
    texts, drafts, seconds = [], [], 0.0
    for number, prompt in enumerate(prompts, 1):
        seen.clear()
        begun = time.perf_counter()
        output = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0].outputs[0]
        seconds += time.perf_counter() - begun
        texts.append(list(output.token_ids))
        drafts.append([tokens for at, tokens in sorted(seen) if at >= len(prompt)])
        print(
            f"prompt {number} of {len(prompts)}: {len(texts[-1])} tokens, {len(drafts[-1])} rounds",
            flush=True,
        )
    return {"version": f"vLLM {vllm.__version__}", "texts": texts, "drafts": drafts, "seconds": seconds}


if __name__ == "__main__":
    asked, answered = map(Path, sys.argv[1:])
    answered.write_text(json.dumps(serve(json.loads(asked.read_text()))))
