"""Hooks leave nothing behind, and models that can't be a target are refused by name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    masking_utils,
)

from pipeline.errors import TargetError
from pipeline.hooks import (
    check_states,
    find_decoder,
    find_final_norm,
    find_layers,
    input_device,
    rows_taken_as_given,
    tap_states,
)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=13,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


def num_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


ALL = [-1, 0, 2, 3]


def test_hooks_are_there_inside_and_gone_after(model):
    before = num_hooks(model)
    with tap_states(model, ALL) as states:
        assert num_hooks(model) > before
        model(torch.tensor([[1, 2, 3]]))
    assert num_hooks(model) == before
    assert states.keys() == {*ALL, "last_hidden"}
    kept = {key: value.clone() for key, value in states.items()}
    model(torch.tensor([[4, 5, 6]]))
    for key, value in kept.items():  # a later forward reaches nothing
        assert torch.equal(states[key], value)


def test_hooks_are_gone_after_an_exception_in_forward(model):
    before = num_hooks(model)

    def forward_that_fails():
        with tap_states(model, ALL):
            model(torch.tensor([[1, 999]]))  # no such token

    with pytest.raises(IndexError):
        forward_that_fails()
    assert num_hooks(model) == before


def test_hooks_are_gone_when_one_can_not_be_set(model):
    before = num_hooks(model)

    def tap_a_layer_that_is_not_there():
        with tap_states(model, [0, 2, 17]):
            pass

    with pytest.raises((IndexError, TargetError)):
        tap_a_layer_that_is_not_there()
    assert num_hooks(model) == before


def test_states_are_detached_and_follow_the_layer_convention(model):
    ids = torch.tensor([[1, 2, 3, 4]])
    with tap_states(model, ALL) as states:
        expected = model(ids, output_hidden_states=True).hidden_states
    assert expected[1].requires_grad
    for layer_id in ALL:
        assert not states[layer_id].requires_grad
        assert torch.equal(states[layer_id], expected[layer_id + 1])
    assert torch.equal(states["last_hidden"], expected[-1])


def test_an_encoder_decoder_is_refused_by_name():
    config = T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    with pytest.raises(TargetError, match=r"T5ForConditionalGeneration.*encoder-decoder"):
        find_decoder(T5ForConditionalGeneration(config))


class NoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Linear(2, 2)


def test_a_model_without_layers_is_refused_by_name():
    with pytest.raises(TargetError, match="NoLayers"):
        find_decoder(NoLayers())
    with pytest.raises(TargetError, match="NoLayers"):
        find_layers(NoLayers())


class Stack(nn.Module):
    """A decoder whose layers add 1, 2, 3, ... so that a wrong order shows."""

    def __init__(self, layers: nn.Module, norm: bool = True):
        super().__init__()
        self.layers = layers
        if norm:
            self.norm = nn.Identity()


class Add(nn.Module):
    def __init__(self, value: int):
        super().__init__()
        self.value = value

    def forward(self, x):
        return x + self.value


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.model = inner
        self.config = SimpleNamespace(is_encoder_decoder=False)


def test_layers_in_a_module_dict_come_in_the_order_of_their_numbers():
    stack = Stack(nn.ModuleDict({str(i): Add(i) for i in (10, 2, 0, 1, 9)}))
    model = Wrapper(stack)
    assert find_decoder(model) is stack
    assert [layer.value for layer in find_layers(model)] == [0, 1, 2, 9, 10]
    with tap_states(model, [0, 1], last_hidden=False) as states:
        x = torch.zeros(1)
        for layer in find_layers(model):
            x = layer(x)
    assert states[0].item() == 0
    assert states[1].item() == 1


@pytest.mark.parametrize("layers", [nn.ModuleDict(), nn.ModuleList()], ids=["ModuleDict", "ModuleList"])
def test_an_empty_stack_is_no_decoder(layers):
    with pytest.raises(TargetError, match="Wrapper"):
        find_decoder(Wrapper(Stack(layers)))


def test_a_decoder_without_a_final_norm_is_refused_by_name():
    with pytest.raises(TargetError, match="Stack"):
        find_final_norm(Wrapper(Stack(nn.ModuleList([Add(1)]), norm=False)))


class Tower(nn.Module):
    """What reads images or sound beside a text stack: layers and a norm, but no tokens."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Add(1), Add(2)])
        self.norm = nn.LayerNorm(2)


class Text(Stack):
    """A text stack: the tokens' embedding beside its layers, and a list that is not of layers."""

    def __init__(self, **names: nn.Module):
        super().__init__(nn.ModuleList([Add(1), Add(2), Add(3)]), norm=False)
        self.embed_tokens = nn.Embedding(5, 2)
        self.projections = nn.ModuleList([nn.Linear(2, 2)])
        for name, module in names.items():
            self.add_module(name, module)


class Both(nn.Module):
    def __init__(self, text: Text):
        super().__init__()
        self.vision_tower = Tower()
        self.language_model = text

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens


def test_towers_are_left_alone_however_deep_the_text_stack_lies():
    text = Text(norm=nn.LayerNorm(2))
    model = Wrapper(Wrapper(Both(text)))
    model.get_input_embeddings = lambda: text.embed_tokens
    assert find_decoder(model) is text
    assert [layer.value for layer in find_layers(model)] == [1, 2, 3]
    assert find_final_norm(model) is text.norm


@pytest.mark.parametrize(
    "names",
    [
        {"output_norm": nn.LayerNorm(2)},  # one norm, whatever its name
        {"closing": nn.RMSNorm(2)},  # known by its class
        {"ln_f": nn.LayerNorm(2), "embedding_norm": nn.LayerNorm(2)},
        {"final_norm": nn.LayerNorm(2), "per_layer_norm": nn.LayerNorm(2)},
    ],
    ids=lambda names: "+".join(names),
)
def test_the_final_norm_is_the_norm_beside_the_layers(names):
    model = Both(Text(**names))
    assert find_final_norm(model) is next(iter(names.values()))


def test_several_norms_of_unknown_names_are_refused():
    with pytest.raises(TargetError, match=r"in Text: expected one norm .* got several \(norm_a, norm_b\)"):
        find_final_norm(Both(Text(norm_a=nn.LayerNorm(2), norm_b=nn.LayerNorm(2))))


def test_a_stack_under_another_name_is_known_by_its_length():
    text = Text(norm=nn.LayerNorm(2))
    text.steps = text.layers
    del text.layers
    model = Wrapper(Both(text))
    model.get_input_embeddings = lambda: text.embed_tokens
    with pytest.raises(TargetError, match="no decoder layers found in Wrapper"):
        find_decoder(model)
    model.config.num_hidden_layers = 3
    assert [layer.value for layer in find_layers(model)] == [1, 2, 3]


def test_a_model_of_images_is_refused_by_name():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "image_size": 8, "patch_size": 4}
    config = ViTConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
    with pytest.raises(TargetError, match="ViTModel reads no token ids"):
        find_decoder(ViTModel(config))


def test_states_that_are_missing_or_of_another_shape_are_refused(model):
    states = {0: torch.zeros(2, 3, 8), 1: torch.zeros(4, 2, 3, 8)}
    check_states(model, states, [0], (2, 3))
    with pytest.raises(TargetError, match="LlamaForCausalLM did not run layer 2: remove it"):
        check_states(model, states, [0, 2], (2, 3))
    with pytest.raises(TargetError, match=r"LlamaForCausalLM: expected states .* got \(4, 2, 3, 8\) at 1"):
        check_states(model, states, [1], (2, 3))


def test_token_ids_go_where_the_embedding_is(model):
    assert input_device(model) == torch.device("cpu")
    with torch.device("meta"):
        assert input_device(LlamaForCausalLM(model.config)) == torch.device("meta")
    assert input_device(Wrapper(nn.Linear(2, 2))) == torch.device("cpu")


def test_transformers_looks_into_rows_again_after_an_exception():
    look = masking_utils.find_packed_sequence_indices
    with rows_taken_as_given():
        assert masking_utils.find_packed_sequence_indices is not look
    with pytest.raises(ZeroDivisionError), rows_taken_as_given():
        raise ZeroDivisionError
    assert masking_utils.find_packed_sequence_indices is look


def test_transformers_looks_into_rows_again_after_forwards_that_overlap():
    """Those of two threads need not end in the order that they began in."""
    look = masking_utils.find_packed_sequence_indices
    first, second = rows_taken_as_given(), rows_taken_as_given()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert masking_utils.find_packed_sequence_indices is look
