"""Break the example's target in the ways of the field, and print what the proof before the first shard sees.

    python benchmarks/broken_targets.py             # the example's target and conversations, about 5 minutes

Each case starts from the whole weights in fp32. The limits of capture/shards/prediction.py lie between the
healthy cases and the broken ones; the last column says which side a case fell on.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.record import record
from capture.data.conversations import TokenizedSample
from capture.engines.huggingface import HuggingFaceEngine
from capture.options import CaptureOptions, DataOptions
from capture.prepare import prepare
from capture.shards.evidence import predicted_rows
from capture.shards.prediction import judge, measure_prediction
from pipeline.cache import TargetIdentity
from pipeline.quiet import quiet_transformers
from pipeline.target_model.options import TargetOptions

MIDDLE = 15  # of 30 layers
GENERATOR = torch.Generator().manual_seed(0)
CHAT_TEMPLATES = {
    "another template (Alpaca)": "{% for m in messages %}{% if m['role'] == 'assistant' %}### Response:\n"
    "{{ m['content'] }}\n\n{% else %}### Instruction:\n{{ m['content'] }}\n\n{% endif %}{% endfor %}",
    "no template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
}


def rows_of(
    folder: Path, template: str | None = None, texts: list[str] | None = None, dtype: str = "float32"
) -> tuple[nn.Module, TargetIdentity, list[TokenizedSample]]:
    """Return the example's target, its facts, and the rows that the proof measures."""
    data = DataOptions(tokenize_workers=1)
    if template is not None:
        (folder / "template.jinja").write_text(template)
        data = DataOptions(chat_template=str(folder / "template.jinja"), tokenize_workers=1)
    if texts is not None:
        (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
        data = DataOptions(data=(str(folder / "texts.jsonl"),), format="text", tokenize_workers=1)
    target = TargetOptions(dtype=dtype, device="cpu")
    prepared = prepare(CaptureOptions(target=target, data=data, cache=folder / "cache"))
    return prepared.target.model(), prepared.identity.target, predicted_rows(prepared)


def matrices(*modules: nn.Module) -> list[Tensor]:
    return [weight.data for module in modules for weight in module.parameters() if weight.dim() == 2]


def random(*modules: nn.Module) -> None:
    for weight in matrices(*modules):
        weight.copy_(torch.randn(weight.shape, generator=GENERATOR) * 0.02)


def no_norms(*modules: nn.Module) -> None:
    for module in modules:
        for name, weight in module.named_parameters():
            if "norm" in name or weight.dim() == 1:
                weight.data.fill_(1)


def swap(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        kept = a.data.clone()
        a.data.copy_(b.data)
        b.data.copy_(kept)


def unscaled(*modules: nn.Module) -> None:
    """Multiply each output channel by 10^2 to 10^4, as if a quantised weight's scales were left out."""
    for weight in matrices(*modules):
        weight.mul_(10 ** (2 + 2 * torch.rand(len(weight), 1, generator=GENERATOR)))


def breaks(model: nn.Module) -> dict[str, Callable[[], object]]:
    """Return ways to break the weights, by their names."""
    layers, middle = list(model.model.layers), model.model.layers[MIDDLE]
    attention, mlp = middle.self_attn, middle.mlp
    return {
        "first layer random": lambda: random(layers[0]),
        "middle layer random": lambda: random(middle),
        "last layer random": lambda: random(layers[-1]),
        "all layers random": lambda: random(*layers),
        "all weights random": lambda: (random(model), no_norms(model)),
        "embedding and head random": lambda: random(model.lm_head),
        "final norm missing (ones)": lambda: no_norms(model.model.norm),
        "a layer's norms missing (ones)": lambda: no_norms(middle),
        "all norms missing (ones)": lambda: no_norms(model),
        "gate and up swapped in a layer": lambda: swap(mlp.gate_proj, mlp.up_proj),
        "gate and up swapped everywhere": lambda: [swap(x.mlp.gate_proj, x.mlp.up_proj) for x in layers],
        "k and v swapped in a layer": lambda: swap(attention.k_proj, attention.v_proj),
        "k and v swapped everywhere": lambda: [swap(x.self_attn.k_proj, x.self_attn.v_proj) for x in layers],
        "two layers exchanged": lambda: swap(layers[10], layers[20]),
        "a layer's weights without scales": lambda: unscaled(middle),
        "all layers' weights without scales": lambda: unscaled(*layers),
    }


def texts() -> dict[str, list[str]]:
    """Return texts that the whole target has not written: the docs, code, and digits."""
    root = Path(__file__).parents[1]
    docs = [path.read_text()[:2000] for path in sorted((root / "docs").glob("*.md"))]
    code = [path.read_text()[:2000] for path in sorted((root / "train").rglob("*.py"))[:8]]
    digits = np.random.default_rng(0).integers(0, 10**6, (4, 60))
    return {
        "whole, English text": docs,
        "whole, Python code": code,
        "whole, random digits": [" ".join(map(str, row)) for row in digits],
    }


def main() -> None:
    quiet_transformers()
    figures = []

    def show(case: str, model: nn.Module, facts: TargetIdentity, samples: list[TokenizedSample]) -> None:
        found = measure_prediction(HuggingFaceEngine(model, (0,)), facts, samples)
        if found is None:
            print(f"{case:36} states are not finite, which is refused", flush=True)
            return
        verdict = judge(found, model.lm_head.weight.shape[0]).verdict
        print(
            f"{case:36} {found.perplexity:12.4g} {found.shuffled:12.4g} {found.top1:7.1%}  {verdict}",
            flush=True,
        )
        figures.extend(
            (case, name.removeprefix("proof."), value, "") for name, value in found.figures().items()
        )

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, facts, samples = rows_of(folder)
        whole = {key: value.clone() for key, value in model.state_dict().items()}
        print(f"{'case':36} {'perplexity':>12} {'shuffled':>12} {'top-1':>7}  verdict")
        show("whole", model, facts, samples)
        show("whole, bfloat16", *rows_of(folder, dtype="bfloat16"))
        for case, kind in texts().items():
            show(case, *rows_of(folder, texts=kind))
        for case, template in CHAT_TEMPLATES.items():
            show(case, *rows_of(folder, template=template))
        for case, break_it in breaks(model).items():
            model.load_state_dict(whole)
            break_it()
            show(case, model, facts, samples)
        model.load_state_dict(whole)
        others = np.random.default_rng(0).permutation(model.lm_head.weight.shape[0]).astype(np.int32)
        moved = [TokenizedSample(s.source_row, others[s.input_ids], s.loss_mask) for s in samples]
        show("another tokenizer's ids (permuted)", model, facts, moved)
        frequencies = model.model.rotary_emb.inv_freq
        exponents = torch.arange(0, 1, 2 / (2 * len(frequencies)))
        frequencies.copy_(10_000**-exponents)
        show("RoPE theta 10,000, not 100,000", model, facts, samples)
        half, facts, samples = rows_of(folder, dtype="float16")
        for weight in matrices(half.model.layers[MIDDLE]):
            weight.mul_(100)
        show("fp16, a layer's weights times 100", half, facts, samples)
    record("broken_targets", torch.device("cpu"), figures)


if __name__ == "__main__":
    main()
