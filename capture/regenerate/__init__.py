"""Regenerate answers: replace every assistant turn by the target's own answer.

The target accepts more of a draft that was trained on the target's own text. So regenerate conversations of
another origin before capture. The example's conversations were made by this command:

    dspark regenerate --target .cache/smollm2-135m-instruct --data capture/data/example.jsonl \
        --out example.jsonl --max-new-tokens 96 --temperature 0.2 --top-p 0.9 --seed 0
"""

from pipeline.lazy import lazy_exports

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "Dialogue": "capture.regenerate.dialogue",
        "EndpointEngine": "capture.regenerate.endpoint",
        "Engine": "capture.regenerate.engine",
        "HuggingFaceEngine": "capture.regenerate.huggingface",
        "Sampling": "capture.sampling",
        "regenerate": "capture.regenerate.run",
        "regenerate_file": "capture.regenerate.run",
        "trim_unfinished": "capture.regenerate.engine",
        "write_jsonl": "capture.regenerate.run",
    },
)
