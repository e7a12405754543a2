"""Measure the size, error and speed of each codec, on real activations.

    python benchmarks/codecs.py                                # speed, and quality on the example's target
    python benchmarks/codecs.py --target DIR [--gguf-file F]   # quality on another target

For each codec: bits per value; the relative error of held-out rows; ridge probes; the teacher's total
variation with the codec for the last hidden state; GB/s of bf16 decoded and encoded.

A probe estimates what a draft would lose. It predicts the last hidden state at an anchor from the context
features at the position before it and the anchor's embedding. It is a ridge regression, fitted on ENCODED
features and evaluated on RAW ones, as a served draft is. Its figure is the total variation between the
prediction's next-token distribution and the target's own. Statistics, probe and figures come from three
separate sets of samples.

A probe's only defence against noise is its ridge, so there are two: one of 0.3 of the mean diagonal, and a
light one of 0.001. The light one serves raw features better (the best of six tried), but it relies on
directions with little variance, where a codec's noise is largest relative to the signal. quality.py measures
which of them a draft resembles.

Position 0 of a sample is left out. Its states are hundreds of times larger in a few channels, which decide
the relative error of the row, and they are the same in every sample.

Tried in addition to the codecs, on the same rows of SmolLM2-135M-Instruct, and dropped:

- A lossless code, measured below as `planes`: exponents separate from the rest, compressed by zstd for 128
  rows at a time, so that a sample can be read alone. It saves a third, but a core decodes slower than a disk
  reads.
- int8 for the teacher with quantisation intervals weighted by the head's Fisher information F,
  deviation^(1-a) * F^(-a/2): total variation 0.0074 at a = 0 (plain int8), 0.0075 at 0.25, 0.0091 at 0.5.
  Decoding to bf16 limits it: decoded to fp32 it is 0.0072, then 0.0067 at a = 0.15 and 0.0073 at 0.25. Four
  bits gain from it (0.082, 0.075, 0.074) and remain ten times too coarse for a teacher.
- nf4 with the best of three or of seven scales per group: relative error 6.2% and 6.1% instead of 6.4%,
  encoded at a third of the speed or less.
- lm3 without its second table, which has a zero: relative error 12.8% instead of 12.4%, and inexact outlier
  rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.record import record
from capture.engines.huggingface import HuggingFaceEngine
from capture.options import CaptureOptions, DataOptions
from capture.prepare import PreparedCapture, prepare
from pipeline.cache import Identity
from pipeline.cache.codecs import CODECS, Codec, Statistics, bits_per_value
from pipeline.cache.fidelity import teacher_variation
from pipeline.cache.layout import LAST_HIDDEN
from pipeline.cache.statistics import StateStatistics
from pipeline.device import reuse_freed_memory
from pipeline.errors import CacheError
from pipeline.quiet import quiet_transformers
from pipeline.target_model.options import TargetOptions

STATISTICS_TOKENS, TRAIN_TOKENS, TEST_TOKENS = 5000, 30000, 4000
LOSSLESS_ROWS = 128
# Maximum of compared logits: all rows of SmolLM2, every fourth row for a vocabulary of 262,144.
MAX_LOGITS = 2**28
# Ridges, as shares of the mean diagonal.
RIDGES = {"ridge probe TV": 0.3, "light ridge probe TV": 1e-3}


def options(target: str | None, gguf_file: str | None, folder: Path) -> CaptureOptions:
    """Return options for the example's conversations, as plain text if the target has no chat template."""
    from capture.example import EXAMPLE_DATA
    from pipeline.target_model.load import open_target

    chosen = TargetOptions(target=target, gguf_file=gguf_file)
    data = EXAMPLE_DATA
    if open_target(chosen).tokenizer().chat_template is None:
        data = folder / "text.jsonl"
        with EXAMPLE_DATA.open() as rows, data.open("w") as texts:
            for row in rows:
                contents = [message["content"] for message in json.loads(row)["messages"]]
                texts.write(json.dumps({"text": "\n\n".join(contents)}) + "\n")
    return CaptureOptions(target=chosen, data=DataOptions(data=(str(data),)), cache=folder / "cache")


@dataclass
class Rows:
    """States of one set of samples: R rows in total, without position 0 of each sample."""

    context: list[Tensor]
    """Context features of each layer, `[R, H]` fp32."""
    last_hidden: Tensor  # [R, H] fp32
    embedding: Tensor  # [R, H] fp32, of the row's own token
    follows: Tensor  # [R] bool, True if the previous row is the previous position


@torch.no_grad()
def activations(engine: HuggingFaceEngine, prepared: PreparedCapture, picks: np.ndarray) -> Rows:
    """Return the target's states of some samples, run one by one."""
    context: list[list[Tensor]] = [[] for _ in prepared.layer_ids]
    last, embedding, follows = [], [], []
    embed = engine.embedding
    for i in tqdm(picks.tolist(), desc="target", unit="sample", leave=False):
        sample = prepared.data[i]
        states = engine.states([sample])
        for store, layer_id in zip(context, prepared.layer_ids, strict=True):
            store.append(states.take(layer_id)[1:].float().cpu())
        last.append(states.take(LAST_HIDDEN)[1:].float().cpu())
        embedding.append(embed[torch.from_numpy(sample.input_ids[1:]).long()].float().cpu())
        follows.append(torch.arange(len(last[-1])) > 0)
    return Rows(
        [torch.cat(rows) for rows in context], torch.cat(last), torch.cat(embedding), torch.cat(follows)
    )


def pick(lengths: np.ndarray, tokens: int, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split `order` into its first samples that together have more than `tokens` tokens, and the others."""
    count = int(np.searchsorted(np.cumsum(lengths[order]), tokens)) + 1
    return order[:count], order[count:]


def statistics_of(rows: Tensor) -> Statistics:
    sums = StateStatistics()
    sums.add(rows)
    return sums.result()


def through(codec: Codec, rows: Tensor, statistics: Statistics) -> Tensor:
    """Return rows encoded and decoded, `[R, H]` bf16."""
    out = torch.empty(rows.shape, dtype=torch.bfloat16)
    codec.decode(codec.encode(rows, statistics), out, statistics)
    return out


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.float() - want.float()).norm(dim=1) / want.float().norm(dim=1)).mean().item()


class Probe:
    """Ridge regression to last hidden, from context features one position earlier and the row's embedding."""

    def __init__(self, rows: Rows, scale: list[Statistics]):
        self._scale, self._follows = scale, rows.follows
        self._embedding = rows.embedding / rows.embedding.std()

    def inputs(self, context: list[Tensor]) -> Tensor:
        """Return inputs `[R', L*H + H + 1]` of the rows that follow their previous position."""
        scaled = [(c.float() - s.mean) / s.deviation for c, s in zip(context, self._scale, strict=True)]
        before = torch.cat(scaled, dim=1)[:-1][self._follows[1:]]
        here = self._embedding[1:][self._follows[1:]]
        return torch.cat([before, here, torch.ones(len(here), 1)], dim=1)

    def targets(self, rows: Tensor) -> Tensor:
        return rows[1:][self._follows[1:]]


def fit(inputs: Tensor, outputs: Tensor) -> dict[str, Tensor]:
    """Return the weights of each probe, `[L*H + H + 1, H]`."""
    square, product = (inputs.T @ inputs).double(), (inputs.T @ outputs).double()
    weights = {}
    for name, ridge in RIDGES.items():
        damped = square + ridge * square.diagonal().mean() * torch.eye(len(square))
        weights[name] = torch.cholesky_solve(product, torch.linalg.cholesky(damped)).float()
    return weights


def variation(head: Tensor, identity: Identity, one: Tensor, other: Tensor) -> float:
    """Return the mean of `teacher_variation`, computed in parts to save memory."""
    pairs = zip(one.split(256), other.split(256), strict=True)
    return torch.cat([teacher_variation(head, identity, a, b) for a, b in pairs]).mean().item()


def gigabytes_per_second(work: Callable[[], object], values: int, device: torch.device) -> float:
    def finished() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    finished()
    best = min(timeit.repeat(finished, number=1, repeat=15))
    return 2 * values / best / 1e9


def speed_rows(
    device: torch.device, rows: int = 4096, width: int = 2560
) -> list[tuple[str, str, float, str]]:
    """Measure encoding and decoding on a device. Decoding reuses its output buffer.

    Args:
        rows, width: of the states; Qwen3-4B's width by default.
    """
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(rows, width, generator=generator) * 3).bfloat16().to(device)
    statistics = Statistics(
        torch.randn(width, generator=generator).to(device),
        (torch.rand(width, generator=generator) + 0.5).to(device),
    )
    out, results = torch.empty_like(values), []
    for codec in CODECS.values():
        parts = codec.encode(values, statistics)
        speed = partial(gigabytes_per_second, values=values.numel(), device=device)
        decode = speed(lambda c=codec, p=parts: c.decode(p, out, statistics))
        encode = speed(lambda c=codec: c.encode(values, statistics))
        results += [(f"{codec.name} H={width}", "decode", decode, "GB/s of bf16")]
        results += [(f"{codec.name} H={width}", "encode", encode, "GB/s of bf16")]
    return results


ZSTD = pa.Codec("zstd", compression_level=1)


def split_planes(rows: np.ndarray) -> tuple[pa.Buffer, np.ndarray]:
    """Split bf16 rows, given as uint16, into compressed exponents and one byte each of sign and mantissa."""
    turned = rows << 1 | rows >> 15  # the sign joins the mantissa
    return ZSTD.compress((turned >> 8).astype(np.uint8)), turned.astype(np.uint8)


def join_planes(exponents: pa.Buffer, others: np.ndarray, out: np.ndarray) -> None:
    plane = np.frombuffer(ZSTD.decompress(exponents, others.size), np.uint8).reshape(out.shape)
    np.left_shift(plane, 8, out=out, dtype=np.uint16)
    np.bitwise_or(out, others, out=out)
    out[:] = out >> 1 | out << 15


def lossless_rows(states: list[Tensor], case: str) -> list[tuple[str, str, float, str]]:
    stored, seconds, values = 0, 0.0, 0
    for piece in torch.cat(states).split(LOSSLESS_ROWS):
        rows = piece.view(torch.int16).numpy().view(np.uint16)
        exponents, others = split_planes(rows)
        out = np.empty_like(rows)
        seconds += min(timeit.repeat(partial(join_planes, exponents, others, out), number=1, repeat=3))
        assert (out == rows).all()
        stored, values = stored + len(exponents) + others.nbytes, values + out.size
    return [
        (case, "bits a value", 8 * stored / values, ""),
        (case, "decode, one thread", 2 * values / seconds / 1e9, "GB/s of bf16"),
    ]


def quality_rows(prepared: PreparedCapture) -> list[tuple[str, str, float, str]]:
    engine = HuggingFaceEngine(prepared.target.model(), prepared.layer_ids)
    lengths = prepared.data.facts.lengths
    order = np.random.default_rng(0).permutation(len(lengths))
    sets = []
    for tokens in (STATISTICS_TOKENS, TRAIN_TOKENS, TEST_TOKENS):
        picks, order = pick(lengths, tokens, order)
        sets.append(activations(engine, prepared, picks))
    first, train, test = sets
    scale = [statistics_of(rows) for rows in first.context]
    last_scale = statistics_of(first.last_hidden)
    # Every codec is compared with bf16.
    raw, raw_test = ([rows.bfloat16() for rows in each.context] for each in (train, test))
    head = engine.head.float().cpu()
    vary = partial(variation, head, prepared.identity)
    learning, judging = Probe(train, scale), Probe(test, scale)
    some = slice(None, None, -(-TEST_TOKENS * len(head) // MAX_LOGITS))
    own, judged = judging.targets(test.last_hidden)[some], judging.inputs(raw_test)[some]
    outputs = learning.targets(train.last_hidden)
    facts = prepared.identity.target
    results, width = lossless_rows(raw_test, f"planes {facts.name}"), facts.hidden_size
    for codec in CODECS.values():
        case = f"{codec.name} {facts.name}"
        try:
            stored = [through(codec, rows, s) for rows, s in zip(raw, scale, strict=True)]
        except CacheError as error:  # fp16 refuses targets with large states
            tqdm.write(f"{case}: refused, {error}")
            continue
        errors = [
            relative_error(through(codec, rows, s), rows) for rows, s in zip(raw_test, scale, strict=True)
        ]
        results += [(case, "bits a value", bits_per_value(codec, width), "")]
        results += [(case, "relative error, context", float(np.mean(errors)), "")]
        for name, weights in fit(learning.inputs(stored), outputs).items():
            results += [(case, name, vary(judged @ weights, own), "")]
        if codec.for_last:
            rows = test.last_hidden.bfloat16()
            decoded = through(codec, rows, last_scale)
            results += [(case, "relative error, last", relative_error(decoded, rows), "")]
            results += [(case, "teacher TV", vary(decoded[some], rows[some]), "")]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", help="Hugging Face directory; default: the example's target")
    parser.add_argument("--gguf-file")
    parser.add_argument("--speed-only", action="store_true")
    arguments = parser.parse_args()
    quiet_transformers()
    reuse_freed_memory()
    if arguments.speed_only or not arguments.target:
        record("codecs", torch.device("cpu"), speed_rows(torch.device("cpu")))
    if not arguments.speed_only:
        with tempfile.TemporaryDirectory(prefix="dspark-bench-") as folder:
            prepared = prepare(options(arguments.target, arguments.gguf_file, Path(folder)))
            record("codecs", torch.device("cpu"), quality_rows(prepared))


if __name__ == "__main__":
    main()
