"""The layer-id convention, checked against the design's words and numbers worked by hand."""

from __future__ import annotations

import warnings
from itertools import pairwise

import pytest
import torch

from pipeline.errors import DSparkError, LayerIdError
from pipeline.features import (
    default_layer_ids,
    extract_context_feature,
    head_logits,
    validate_target_layer_ids,
)


def test_default_layers_of_qwen3_4b():
    assert default_layer_ids(36) == [1, 9, 17, 25, 33]


@pytest.mark.parametrize("num_layers", range(1, 101))
def test_default_layers_are_valid_for_every_target(num_layers):
    ids = default_layer_ids(num_layers)
    assert 1 <= len(ids) <= 5
    with warnings.catch_warnings():
        if num_layers == 1:  # its only layer is the last one, which can't be served
            warnings.simplefilter("ignore")
        assert validate_target_layer_ids(ids, num_layers) == ids


@pytest.mark.parametrize("num_layers", range(8, 101))
def test_default_layers_are_five_and_evenly_spread(num_layers):
    ids = default_layer_ids(num_layers)
    gaps = [b - a for a, b in pairwise(ids)]
    assert len(ids) == 5
    assert (ids[0], ids[-1]) == (1, num_layers - 3)
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_default_layers_of_another_count(count):
    assert len(default_layer_ids(36, count)) == count
    assert validate_target_layer_ids(default_layer_ids(36, count), 36)


@pytest.mark.parametrize("ids", [[0], [34], [0, 34], [1, 9, 17, 25, 33], list(range(35))])
def test_servable_layers_pass_without_a_warning(ids):
    assert validate_target_layer_ids(ids, 36) == ids
    assert validate_target_layer_ids(tuple(ids), 36) == ids
    assert validate_target_layer_ids((i for i in ids), 36) == ids


@pytest.mark.parametrize(("ids", "named"), [([-1, 3], "-1"), ([3, 35], "35"), ([-1], "-1"), ([-1, 35], "35")])
def test_unservable_layers_pass_with_a_warning_that_names_them(ids, named):
    with pytest.warns(UserWarning, match=rf"{named}.*SGLang"):
        assert validate_target_layer_ids(ids, 36) == ids


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([], ["at least one"]),
        ([36], ["36", "-1", "35"]),
        ([-2], ["-2"]),
        ([1, 2**70], [str(2**70)]),
        ([3, 3], ["strictly increasing", "[3, 3]"]),
        ([9, 1], ["strictly increasing", "[9, 1]"]),
        ([1, 5, 4], ["strictly increasing"]),
        ([1.0], ["integers", "1.0"]),
        ([True], ["integers", "True"]),
        (["1"], ["integers", "'1'"]),
        ("1,9", ["integers"]),
        ([None], ["integers", "None"]),
    ],
)
def test_impossible_layers_are_refused(ids, words):
    with pytest.raises(LayerIdError) as caught:
        validate_target_layer_ids(ids, 36)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, DSparkError)
    for word in words:
        assert word in str(caught.value)


def test_context_features_are_concatenated_in_the_order_asked():
    """HF's tuple has the embedding output first, so layer i sits at i + 1."""
    states = [torch.full((2, 3), float(i)) for i in range(7)]  # a 6-layer target
    out = extract_context_feature(states, [-1, 0, 5])
    assert out.tolist() == [[0, 0, 0, 1, 1, 1, 6, 6, 6]] * 2
    assert extract_context_feature(states, [3, 1]).tolist() == [[4, 4, 4, 2, 2, 2]] * 2
    assert extract_context_feature([s[None] for s in states], [2]).shape == (1, 2, 3)


def test_head_logits_by_hand():
    hidden = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    head = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-2.0, 0.0]])
    out = head_logits(hidden, head)
    assert out.dtype == torch.float32
    assert out.tolist() == [[1.0, 2.0, 3.0, -2.0]]


def test_head_logits_with_softcap_by_hand():
    """2 tanh(x / 2) of 1, 2, 3, -2, from a table of tanh."""
    hidden = torch.tensor([[1.0, 2.0]])
    head = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-2.0, 0.0]])
    out = head_logits(hidden, head, softcap=2.0)
    expected = torch.tensor([[0.9242343145, 1.5231883120, 1.8102965072, -1.5231883120]])
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=0)
