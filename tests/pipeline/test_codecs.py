"""Codecs: the examples of FORMAT.md by plain arithmetic, both ways, and what must hold for any row."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pipeline.cache
from pipeline.cache import CacheReader
from pipeline.cache.codecs import CODECS, Statistics, bits_per_value, get_codec
from pipeline.cache.index import index_bytes
from pipeline.cache.layout import shard_specs
from pipeline.cache.manifest import ShardPlan
from pipeline.errors import CacheError
from pipeline.options import CONTEXT_CODECS, LAST_CODECS
from tests.pipeline.hostile import assert_refuses
from tests.pipeline.stored import stored_cache, stored_identity
from tests.pipeline.written import make_writing, read_all

QUICK = settings(max_examples=25)
WIDTHS = (1, 3, 64, 100, 576, 640, 2560, 2880, 5120)
SCALED = ("fp8", "int8", "nf4", "lm3")
STANDARDISED = ("int8", "nf4", "lm3")
# Largest relative error on real activations: the bars.
BARS = {"fp8": 0.025, "int8": 0.007, "nf4": 0.07, "lm3": 0.13}
# The same, of standard normal values: what theory gives for the levels and for the peaks of 5,120 values.
NORMAL_ERRORS = {"bf16": 0.0018, "fp16": 0.0018, "fp32": 0.0018, "fp8": 0.0275, "int8": 0.0095} | {
    "nf4": 0.095,
    "lm3": 0.18,
}


# FORMAT.md in plain Python: doubles, rounded where the page says so. Nothing here is the project's.

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
NORMAL = (-2.152, -1.344, -0.756, -0.2451, 0.2451, 0.756, 1.344, 2.152)
SPARSE = tuple(2.152 * x for x in (-1, -0.535, -0.2469, 0, 0.1833, 0.382, 0.623, 1))


def f32(value: float) -> float:
    """Rounded to fp32. Of a sum, product or quotient of fp32 numbers this is what fp32 arithmetic gives."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def bits32(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def from_bf16(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits << 16))[0]


def to_bf16(value: float) -> float:
    """Rounded to nearest even, from fp32."""
    bits = bits32(value)
    upper, lower = bits >> 16, bits & 0xFFFF
    return from_bf16(upper + (lower > 0x8000 or (lower == 0x8000 and upper % 2 == 1)))


def scale_bits(quotient: float) -> int:
    """The least bf16 not below a positive fp32 number."""
    bits = bits32(quotient)
    return (bits >> 16) + (bits & 0xFFFF != 0)


def e4m3(code: int) -> float:
    exponent, mantissa = code >> 3 & 15, code & 7
    size = math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10)
    return 0.0 if code & 0x7F == 0x7F else -size if code & 0x80 else size


def nearest(value: float, levels: Sequence[float]) -> int:
    value = to_bf16(value)
    return sum(value > (low + high) / 2 for low, high in pairwise(levels))


def groups(values: Sequence[float]) -> list[list[float]]:
    found = [list(values[start : start + 64]) for start in range(0, len(values), 64)]
    return [[*group, *[0.0] * (64 - len(group))] for group in found]


def standardised(row: Sequence[float], mean: Sequence[float], deviation: Sequence[float]) -> list[float]:
    return [f32(f32(x - m) / d) for x, m, d in zip(row, mean, deviation, strict=True)]


def restored(z: Sequence[float], mean: Sequence[float], deviation: Sequence[float]) -> list[float]:
    width = len(mean)
    return [to_bf16(f32(f32(v * d) + m)) for v, m, d in zip(z[:width], mean, deviation, strict=True)]


def hand_encode(name: str, row: list[float], mean: list[float], deviation: list[float]) -> dict[str, bytes]:
    """One row's parts, byte by byte."""
    if name in ("fp16", "fp32"):
        return {"": struct.pack(f"<{len(row)}{'e' if name == 'fp16' else 'f'}", *row)}
    if name == "bf16":
        return {"": b"".join(struct.pack("<H", bits32(to_bf16(x)) >> 16) for x in row)}
    scales: list[int] = []

    def divisor(quotient: float) -> float:
        scales.append(scale_bits(quotient))
        return from_bf16(scales[-1]) or 1.0

    def packed(codes: bytes) -> dict[str, bytes]:
        return {"": codes, "scale": struct.pack(f"<{len(scales)}H", *scales)}

    if name == "fp8":
        s = divisor(f32(max(map(abs, row)) / 448))
        codes = []
        for x in row:
            v = abs(f32(x / s))
            best = min(range(0x7F), key=lambda c: (abs(e4m3(c) - v), c % 2))
            codes.append(best | (0x80 if math.copysign(1, x) < 0 else 0))
        return packed(bytes(codes))
    z = standardised(row, mean, deviation)
    if name == "int8":
        s = divisor(f32(max(map(abs, z)) / 127))
        return packed(struct.pack(f"{len(z)}b", *(round(f32(v / s)) for v in z)))
    if name == "nf4":
        codes = []
        for group in groups(z):
            s = divisor(max(map(abs, group)))
            codes += [nearest(f32(v / s), NF4) for v in group]
        codes = codes[: len(row) + len(row) % 2]
        return packed(bytes(a | b << 4 for a, b in zip(codes[::2], codes[1::2], strict=True)))
    codes = []
    for group in groups(z):
        tried = []
        outermost = f32(max(map(abs, group)) / f32(2.152))
        for levels, multiple in *((NORMAL, m) for m in (1.0, 0.85, 0.72, 0.6)), (SPARSE, 1.0):
            stored = scale_bits(f32(outermost * f32(multiple)))
            s = from_bf16(stored) or 1.0
            chosen = [nearest(f32(v / s), levels) for v in group]
            error = sum((f32(f32(levels[c]) * s) - v) ** 2 for c, v in zip(chosen, group, strict=True))
            tried.append((error, len(tried), chosen, stored | (0x8000 if levels is SPARSE else 0)))
        _, _, chosen, stored = min(tried)
        codes += chosen
        scales.append(stored)
    codes = codes[: -(-len(row) // 8) * 8]
    eights = [codes[i : i + 8] for i in range(0, len(codes), 8)]
    numbers = [sum(code << 3 * i for i, code in enumerate(eight)) for eight in eights]
    return packed(b"".join(number.to_bytes(3, "little") for number in numbers))


def hand_decode(name: str, parts: dict[str, bytes], mean: list[float], deviation: list[float]) -> list[float]:
    """One row from its parts' bytes."""
    data, width = parts[""], len(mean)
    if name == "bf16":
        return [from_bf16(bits) for bits in struct.unpack(f"<{width}H", data)]
    if name in ("fp16", "fp32"):
        return [to_bf16(x) for x in struct.unpack(f"<{width}{'e' if name == 'fp16' else 'f'}", data)]
    stored = struct.unpack(f"<{len(parts['scale']) // 2}H", parts["scale"])
    scales = [from_bf16(bits) for bits in stored]
    if name == "fp8":
        return [to_bf16(f32(e4m3(code) * scales[0])) for code in data]
    if name == "int8":
        z = [f32(q * scales[0]) for q in struct.unpack(f"{width}b", data)]
    elif name == "nf4":
        codes = [code for byte in data for code in (byte & 15, byte >> 4)]
        z = [f32(NF4[code] * scales[i // 64]) for i, code in enumerate(codes[:width])]
    else:
        numbers = [int.from_bytes(data[i : i + 3], "little") for i in range(0, len(data), 3)]
        codes = [number >> 3 * i & 7 for number in numbers for i in range(8)]
        tables = [SPARSE if bits & 0x8000 else NORMAL for bits in stored]
        z = [f32(f32(tables[i // 64][c]) * abs(scales[i // 64])) for i, c in enumerate(codes[:width])]
    return restored(z, mean, deviation)


# Between bytes and our tensors


def bytes_of(parts: dict[str, Tensor], row: int = 0) -> dict[str, bytes]:
    return {k: v[row].contiguous().view(-1).view(torch.uint8).numpy().tobytes() for k, v in parts.items()}


def parts_of(name: str, stored: dict[str, bytes], width: int) -> dict[str, Tensor]:
    specs = get_codec(name).specs(1, width)
    assert {k: math.prod(shape) * dtype.itemsize for k, (dtype, shape) in specs.items()} == {
        k: len(v) for k, v in stored.items()
    }
    return {k: torch.frombuffer(bytearray(v), dtype=specs[k][0]).view(specs[k][1]) for k, v in stored.items()}


def decoded(name: str, parts: dict[str, Tensor], statistics: Statistics) -> Tensor:
    rows = len(parts[""])
    out = torch.full((rows, len(statistics.mean)), float("nan"), dtype=torch.bfloat16)
    get_codec(name).decode(parts, out, statistics)
    return out


def made_statistics(width: int, seed: int = 0) -> Statistics:
    """Channels as unlike each other as real ones are."""
    generator = torch.Generator().manual_seed(seed)
    deviation = torch.exp(torch.randn(width, generator=generator))
    return Statistics(deviation * torch.randn(width, generator=generator), deviation)


def made_rows(count: int, width: int, statistics: Statistics, seed: int = 1) -> Tensor:
    z = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return statistics.mean + statistics.deviation * z


def errors(rows: Tensor, out: Tensor) -> Tensor:
    """Relative error of each row."""
    return (out.double() - rows.double()).norm(dim=1) / rows.double().norm(dim=1).clamp_min(1e-30)


# The examples of the page

MEAN, DEVIATION = [1.0, 0.0, -2.0, 0.5], [2.0, 1.0, 4.0, 0.25]
# Codec: row, bytes of its parts, and what it decodes to; as FORMAT.md has them.
EXAMPLES = {
    "bf16": ([1.0, -2.5], "80 3f 20 c0", None, [1.0, -2.5]),
    "fp16": ([1.0, -2.5], "00 3c 00 c1", None, [1.0, -2.5]),
    "fp32": ([1.0, -2.5], "00 00 80 3f 00 00 20 c0", None, [1.0, -2.5]),
    "fp8": ([900.0, -6.0, 0.6, 0.0], "7e c4 2a 00", "01 40", [904.0, -6.0625, 0.62890625, 0.0]),
    "int8": ([5.0, -1.0, 6.0, 0.5], "7e c1 7e 00", "82 3c", [5.0, -1.0, 6.0, 0.5]),
    "nf4": ([5.0, -1.0, 3.0], "2f 7d", "00 40", [5.0, -1.046875, 2.5]),
    "lm3": ([5.0, -1.0, 3.0], "8f b7 6d", "6e bf", [5.0, -1.0703125, 2.984375]),
}


def example(name: str) -> tuple[list[float], dict[str, bytes], list[float], list[float], list[float]]:
    row, codes, scale, back = EXAMPLES[name]
    stored = {"": bytes.fromhex(codes)} | ({"scale": bytes.fromhex(scale)} if scale else {})
    return row, stored, back, MEAN[: len(row)], DEVIATION[: len(row)]


def test_every_codec_has_an_example_on_the_page():
    page = " ".join((Path(pipeline.cache.__file__).parent / "FORMAT.md").read_text().split())
    assert EXAMPLES.keys() == CODECS.keys()
    for name, (row, codes, scale, back) in EXAMPLES.items():
        (rule,) = re.findall(rf"9\.\d\. `{name}`.*?(?= 9\.\d\. )", page)
        assert f"`{codes} | {scale}`" in rule if scale else f"`{codes}`" in rule
        said = [[float(v) for v in found.split(",")] for found in re.findall(r"\(([-\d., ]+)\)", rule)]
        assert row in said
        assert not scale or back in said


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_by_hand(name):
    row, stored, back, mean, deviation = example(name)
    assert hand_encode(name, row, mean, deviation) == stored
    assert hand_decode(name, stored, mean, deviation) == back


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_by_our_codecs(name):
    row, stored, back, mean, deviation = example(name)
    statistics = Statistics(torch.tensor(mean), torch.tensor(deviation))
    assert bytes_of(get_codec(name).encode(torch.tensor([row]), statistics)) == stored
    assert decoded(name, parts_of(name, stored, len(row)), statistics).tolist() == [back]


def test_the_sign_of_a_scale_chooses_the_other_levels():
    _, stored, _, mean, deviation = example("lm3")
    stored["scale"] = bytes.fromhex("6e 3f")
    statistics = Statistics(torch.tensor(mean), torch.tensor(deviation))
    assert hand_decode("lm3", stored, mean, deviation) == [5.0, -1.25, 3.0]
    assert decoded("lm3", parts_of("lm3", stored, 3), statistics).tolist() == [[5.0, -1.25, 3.0]]


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("width", [1, 3, 64, 100, 131])
def test_any_row_by_hand_and_by_our_codecs(name, width):
    """Normal rows, rows with an outlier, and zeros, both ways."""
    statistics = made_statistics(width)
    rows = made_rows(6, width, statistics)
    rows[1, width // 2] *= 1000
    rows[2] = 0
    rows[3, : width // 2] = 0
    rows[4] = statistics.mean
    mean, deviation = statistics.mean.tolist(), statistics.deviation.tolist()
    parts = get_codec(name).encode(rows, statistics)
    out = decoded(name, parts, statistics)
    for i, row in enumerate(rows.tolist()):
        stored = bytes_of(parts, i)
        assert stored == hand_encode(name, row, mean, deviation)
        assert out[i].tolist() == hand_decode(name, stored, mean, deviation)


def test_a_value_in_the_middle_of_two_levels_takes_the_lower():
    """0 is in the middle of lm3's two innermost levels; no other bf16 number is in the middle of any."""
    row = [*NORMAL * 8]
    row[-1] = 0.0
    codes = [*range(8)] * 8
    codes[-1] = 3
    number = sum(code << 3 * i for i, code in enumerate(codes))
    statistics = Statistics(torch.zeros(64), torch.ones(64))
    stored = bytes_of(get_codec("lm3").encode(torch.tensor([row]), statistics))
    assert stored == {"": number.to_bytes(24, "little"), "scale": bytes.fromhex("80 3f")}
    for levels in (NF4, NORMAL, SPARSE):
        middles = [(low + high) / 2 for low, high in pairwise(levels)]
        assert [m for m in middles if to_bf16(m) == m] == ([0.0] if levels is NORMAL else [])


# What must hold for any row


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("width", WIDTHS)
def test_normal_rows_come_back(name, width):
    statistics = Statistics(torch.zeros(width), torch.ones(width))
    rows = made_rows(100, width, statistics)
    out = decoded(name, get_codec(name).encode(rows, statistics), statistics)
    assert errors(rows, out).mean() <= NORMAL_ERRORS[name]
    if name in ("bf16", "fp32"):
        assert torch.equal(out, rows.bfloat16())


@pytest.mark.parametrize("name", STANDARDISED)
@pytest.mark.parametrize("width", WIDTHS[2:])
def test_channels_that_differ_a_thousandfold_are_all_kept(name, width):
    """Each is off by a share of its own deviation."""
    order = torch.randperm(width, generator=torch.Generator().manual_seed(0))
    deviation = 10 ** torch.linspace(-3, 3, width)[order]
    statistics = Statistics(torch.linspace(-1, 1, width) * deviation, deviation)
    rows = made_rows(200, width, statistics)
    out = decoded(name, get_codec(name).encode(rows, statistics), statistics)
    error = ((out.double() - rows) / deviation).square().mean(dim=0).sqrt()
    assert error.mean() <= NORMAL_ERRORS[name] + 2**-8
    assert error.max() <= 1.5 * (NORMAL_ERRORS[name] + 2**-8)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_row_of_zeros_and_one_of_means(name, width):
    statistics = made_statistics(width)
    rows = torch.stack([torch.zeros(width), statistics.mean])
    out = decoded(name, get_codec(name).encode(rows, statistics), statistics)
    assert torch.isfinite(out).all()
    scale = statistics.mean.abs().max() + statistics.deviation.max()
    assert (out[0].float().abs() <= 0.5 * scale).all()
    if name in STANDARDISED:
        assert torch.equal(out[1], statistics.mean.bfloat16())
        plain = Statistics(torch.zeros(width), torch.ones(width))
        zeros = decoded(name, get_codec(name).encode(rows[:1], plain), plain)
        assert not zeros.any()
    else:
        assert not out[0].any()


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("value", [1e6, -1e6])
def test_one_huge_outlier_stays_within_the_bars(name, width, value):
    statistics = Statistics(torch.zeros(width), torch.ones(width))
    rows = made_rows(3, width, statistics)
    rows[1, width // 3] = value
    out = decoded(name, get_codec(name).encode(rows, statistics), statistics)
    assert errors(rows, out)[1] <= BARS[name]
    assert torch.equal(out[::2], decoded(name, get_codec(name).encode(rows[::2], statistics), statistics))


@given(
    name=st.sampled_from(sorted(CODECS)),
    width=st.sampled_from([*WIDTHS[:6], 65, 127]),
    count=st.integers(1, 9),
    seed=st.integers(0, 2**20),
    data=st.data(),
)
@settings(QUICK, max_examples=150)
def test_a_row_does_not_depend_on_the_others(name, width, count, seed, data):
    """Encoded and decoded alone, among others, from any offset of a file, and into a strided output."""
    codec, statistics = get_codec(name), made_statistics(width, seed)
    rows = made_rows(count, width, statistics, seed) * 10.0 ** (torch.arange(count)[:, None] % 7 - 3)
    whole = codec.encode(rows, statistics)
    expected = decoded(name, whole, statistics)
    start = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(start + 1, count))
    some = codec.encode(rows[start:stop], statistics)
    assert [bytes_of(some, i) for i in range(stop - start)] == [
        bytes_of(whole, i) for i in range(start, stop)
    ]
    offset = data.draw(st.integers(0, 5))
    parts = {k: moved(v, offset)[start:stop] for k, v in whole.items()}
    out = torch.full((stop - start, 3 * width), 7.0, dtype=torch.bfloat16)
    codec.decode(parts, out[:, width : 2 * width], statistics)
    assert torch.equal(out[:, width : 2 * width], expected[start:stop])
    assert (out[:, :width] == 7).all()
    assert (out[:, 2 * width :] == 7).all()
    strided = torch.full((stop - start, 2 * width), 7.0, dtype=torch.bfloat16)
    codec.decode(parts, strided[:, ::2], statistics)
    assert torch.equal(strided[:, ::2], expected[start:stop])
    assert (strided[:, 1::2] == 7).all()


def moved(part: Tensor, offset: int) -> Tensor:
    """The same tensor, `offset` values into a buffer, as a part lies in a mapped shard."""
    buffer = torch.zeros(offset + part.numel() + 3, dtype=part.dtype)
    view = buffer[offset : offset + part.numel()].view(part.shape)
    view.copy_(part)
    return view


@pytest.mark.parametrize("name", CODECS)
def test_rows_in_many_chunks_are_as_rows_alone(name, monkeypatch):
    statistics = made_statistics(100)
    rows = made_rows(23, 100, statistics)
    whole = get_codec(name).encode(rows, statistics)
    out = decoded(name, whole, statistics)
    monkeypatch.setattr("pipeline.cache.codecs.base.CPU_CHUNK", 300)
    again = get_codec(name).encode(rows, statistics)
    assert [bytes_of(again, i) for i in range(23)] == [bytes_of(whole, i) for i in range(23)]
    assert torch.equal(decoded(name, again, statistics), out)


@pytest.mark.parametrize("name", CODECS)
def test_no_rows_are_no_error(name):
    statistics = made_statistics(5)
    parts = get_codec(name).encode(torch.empty(0, 5), statistics)
    assert all(part.shape[0] == 0 for part in parts.values())
    assert decoded(name, parts, statistics).shape == (0, 5)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_any_dtype_are_encoded_as_their_values_in_fp32(name, dtype):
    statistics = made_statistics(70)
    rows = made_rows(5, 70, statistics).to(dtype)
    one, other = get_codec(name).encode(rows, statistics), get_codec(name).encode(rows.float(), statistics)
    assert bytes_of(one, 3) == bytes_of(other, 3)


@pytest.mark.parametrize("name", SCALED)
@given(exponent=st.integers(-140, 60), seed=st.integers(0, 1000))
@QUICK
def test_scales_are_rounded_up(name, exponent, seed):
    """Never below the quotient, and by less than one bf16 step."""
    rows = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)) * 2.0 ** max(exponent, -126)
    rows = rows * 2.0 ** min(0, exponent + 126)
    statistics = Statistics(torch.zeros(64), torch.ones(64))
    stored = get_codec(name).encode(rows, statistics)["scale"].view(3).abs()
    quotient = rows.abs().amax(dim=1) / {"fp8": 448.0, "int8": 127.0, "nf4": 1.0, "lm3": 2.152}[name]
    if name == "lm3":  # which may prefer a smaller one
        quotient = torch.where(stored.float() < quotient, 0.6 * quotient, quotient)
    assert (stored.float() >= quotient).all()
    if name != "lm3":
        below = (stored.view(torch.int16) - 1).view(torch.bfloat16).float()
        assert ((below < quotient) | (stored == 0)).all()


# Hostile bytes

HOSTILE = [0.0, -0.0, 2**-133, -(2**-133), 2**-126, 1.0, -1.0, 3e-20, 2.0**60, -(2.0**60)]


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("statistic", [2.0**-60, 1.0, 2.0**60])
def test_every_code_with_every_scale_that_may_be_read_decodes_to_a_finite_value(name, statistic):
    width = 256 if name in ("fp8", "int8") else 512 if name == "nf4" else 8 * 256
    codes = torch.arange(256).to(torch.uint8)
    if name == "lm3":  # every byte in every place
        codes = torch.stack([codes, codes.flip(0), codes.roll(100)], dim=1).flatten()
    specs = get_codec(name).specs(len(HOSTILE), width)
    parts = {"": codes.expand(len(HOSTILE), -1).contiguous().view(specs[""][0])}
    shape = specs["scale"][1]
    parts["scale"] = torch.tensor(HOSTILE).bfloat16().view(-1, *[1] * (len(shape) - 1)).expand(shape)
    assert parts[""].shape == specs[""][1]
    statistics = Statistics(torch.full((width,), statistic), torch.full((width,), statistic))
    out = decoded(name, parts, statistics)
    assert torch.isfinite(out).all()
    mean, deviation = statistics.mean.tolist(), statistics.deviation.tolist()
    for row in range(len(HOSTILE)):
        assert out[row].tolist() == hand_decode(name, bytes_of(parts, row), mean, deviation)


@pytest.mark.parametrize("width", [2, 3])
def test_codes_that_are_nan_decode_to_0(width):
    """By two at a time, and one at a time where the width is odd."""
    parts = {
        "": torch.tensor([[0x7F, 0xFF, 0x38][:width]], dtype=torch.uint8).view(torch.float8_e4m3fn),
        "scale": torch.ones(1, dtype=torch.bfloat16),
    }
    statistics = Statistics(torch.zeros(width), torch.ones(width))
    assert decoded("fp8", parts, statistics).tolist() == [[0.0, 0.0, 1.0][:width]]


@pytest.mark.parametrize(("name", "state"), [(n, s) for n in SCALED for s in ("context.2", "last_hidden")])
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), float("-inf"), 2.0**60 * 1.01, -(2.0**61)])
def test_a_hostile_scale_is_refused_in_one_line(tmp_path, name, state, scale):
    def bend(tensors: dict[str, Tensor]) -> None:
        tensors[f"{state}.scale"].view(-1)[-1] = scale

    cache = stored_cache(tmp_path / "cache", name, name, bend=bend)
    message = assert_refuses(cache)
    assert f"a scale of {state}" in message
    assert "damaged" in message
    reader = CacheReader(cache)
    reader.read(0)  # another sample's


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("scale", [0.0, -0.0, 2**-133, -(2**-133), -0.5, 2.0**60])
def test_an_odd_scale_is_read(tmp_path, name, scale):
    def bend(tensors: dict[str, Tensor]) -> None:
        tensors["last_hidden.scale"].fill_(scale)
        tensors["context.0.scale"].fill_(scale)

    reader = CacheReader(stored_cache(tmp_path / "cache", name, name, bend=bend))
    for i in range(len(reader)):
        sample = reader.read(i)
        assert torch.isfinite(sample.context).all()
        assert torch.isfinite(sample.last_hidden).all()


# fp16


def test_fp16_refuses_what_it_cannot_hold_in_one_line():
    rows = torch.tensor([[1.0, 65519.0], [1e5, 0.0]])
    get_codec("fp16").encode(rows[:1])
    with pytest.raises(CacheError) as caught:
        get_codec("fp16").encode(rows)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert "100000" in message
    assert "65504" in message
    assert "bf16" in message
    with pytest.raises(CacheError):
        get_codec("fp16").encode(torch.tensor([[65520.0]]))


# Sizes and names


def test_bits_a_value():
    bits = {name: bits_per_value(codec, 2560) for name, codec in CODECS.items()}
    assert {name: bits[name] for name in ("bf16", "fp16", "fp32", "nf4", "lm3")} == {
        "bf16": 16.0,
        "fp16": 16.0,
        "fp32": 32.0,
        "nf4": 4.25,
        "lm3": 3.25,
    }
    assert bits["int8"] == bits["fp8"] == 8 + 16 / 2560
    for name, most in {"int8": 8.1, "nf4": 4.26, "lm3": 3.3, "fp8": 8.1}.items():
        assert bits[name] <= most


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", CODECS)
def test_what_encode_gives_is_what_specs_say(name, width):
    statistics = made_statistics(width)
    parts = get_codec(name).encode(made_rows(3, width, statistics), statistics)
    assert {k: (v.dtype, tuple(v.shape)) for k, v in parts.items()} == get_codec(name).specs(3, width)


def test_a_default_token_of_a_4b_model_takes_at_most_9450_bytes():
    """Width 2,560, five layers, everything supervised; index, ids and mask included; raw bf16: 30,720."""
    tokens = 32768
    identity = stored_identity("nf4", "int8", layers=(0, 1, 2, 3, 4), hidden=2560)
    specs = shard_specs(identity, ShardPlan(samples=64, tokens=tokens, last_rows=tokens))
    shard = sum(math.prod(shape) * dtype.itemsize for dtype, shape in specs.values())
    writing = make_writing([[1] * 512] * 20, limit=5120)
    index = len(index_bytes(writing.index)) / (20 * 512)
    a_token = shard / tokens + index
    assert 9300 < a_token <= 9450
    assert a_token <= 0.31 * 30720


def test_the_command_line_offers_every_codec():
    assert list(CODECS) == list(CONTEXT_CODECS)
    assert set(LAST_CODECS) == set(CODECS) - {"nf4", "lm3"}


def test_codecs_of_less_than_eight_bits_are_not_for_last_hidden_states():
    for codec in CODECS.values():
        assert not (codec.for_last and codec.bits(2560) < 8), codec.name
        assert codec.bits(2560) == bits_per_value(codec, 2560) == 8 * codec.row_bytes(2560) / 2560


def test_an_unknown_codec_is_refused_by_name():
    with pytest.raises(CacheError, match=r"unknown codec 'zip': this version knows bf16, .*lm3"):
        get_codec("zip")


# Through a file


@pytest.mark.parametrize("name", CODECS)
def test_a_cache_of_each_codec_reads_as_its_parts_decode(tmp_path, name):
    """Any sample, any layers, in any order: the same bits."""
    cache = stored_cache(tmp_path / "cache", name, name)
    reader = CacheReader(cache)
    assert reader.verify() == []
    everything = read_all(cache)
    assert everything == read_all(cache)
    for i in range(len(reader)):
        whole = reader.read(i)
        both = whole.context.split(reader.hidden_size, dim=1)
        swapped = torch.empty_like(whole.context)
        reader.read_context(i, (2, 0), swapped)
        assert torch.equal(swapped, torch.cat(both[::-1], dim=1))
