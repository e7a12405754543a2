"""TOML to frozen dataclasses: strict types, unknown keys, overrides, and back."""

from __future__ import annotations

import json
import tomllib
from dataclasses import FrozenInstanceError, dataclass
from typing import Literal

import pytest

from pipeline.config import apply_overrides, build, load_toml, to_toml
from pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Optim:
    lr: float = 6e-4
    betas: tuple[float, ...] = (0.9, 0.95)
    schedule: Literal["cosine", "constant"] = "cosine"

    def __post_init__(self):
        if self.lr <= 0:
            raise ConfigError(f"lr must be positive, got {self.lr}")


@dataclass(frozen=True, kw_only=True)
class Draft:
    block_size: int
    target_layer_ids: tuple[int, ...] | None = None
    name: str = "draft"
    note: str | None = None
    tied: bool = False
    extra: dict[str, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    draft: Draft
    optim: Optim = Optim()


def test_builds_nested_values_with_their_types():
    run = build(
        Run,
        {
            "draft": {"block_size": 7, "target_layer_ids": [1, 9], "extra": {"a": 1}},
            "optim": {"lr": 1, "betas": [0, 1]},
        },
    )
    assert run == Run(
        draft=Draft(block_size=7, target_layer_ids=(1, 9), extra={"a": 1}),
        optim=Optim(lr=1.0, betas=(0.0, 1.0)),
    )
    assert type(run.optim.lr) is float
    assert type(run.optim.betas[0]) is float
    with pytest.raises(FrozenInstanceError):
        run.draft.block_size = 8


@pytest.mark.parametrize(
    ("draft", "words"),
    [
        ({"block_size": True}, ["draft.block_size", "int", "True"]),
        ({"block_size": 7.0}, ["draft.block_size", "int", "7.0"]),
        ({"block_size": "7"}, ["draft.block_size", "int", "'7'"]),
        ({"block_size": None}, ["draft.block_size", "int", "None"]),
        ({"block_size": 7, "tied": 1}, ["draft.tied", "bool", "1"]),
        ({"block_size": 7, "name": 3}, ["draft.name", "str", "3"]),
        ({"block_size": 7, "note": 3}, ["draft.note", "str", "3"]),
        ({"block_size": 7, "target_layer_ids": 3}, ["draft.target_layer_ids", "list", "3"]),
        ({"block_size": 7, "target_layer_ids": "1,9"}, ["draft.target_layer_ids", "list"]),
        ({"block_size": 7, "target_layer_ids": [1, "9"]}, ["draft.target_layer_ids", "int", "'9'"]),
        ({"block_size": 7, "target_layer_ids": [1, False]}, ["draft.target_layer_ids", "int", "False"]),
        ({"block_size": 7, "extra": [1]}, ["draft.extra", "table"]),
        ({"block_size": 7, "extra": {"a": 1.5}}, ["draft.extra.a", "int", "1.5"]),
        ({}, ["draft", "missing", "'block_size'"]),
        (7, ["draft", "table", "7"]),
        ([], ["draft", "table"]),
    ],
)
def test_wrong_types_are_refused_by_name(draft, words):
    with pytest.raises(ConfigError) as caught:
        build(Run, {"draft": draft})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("lr", [True, "0.1", [0.1], None])
def test_floats_take_integers_and_nothing_else(lr):
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        build(Run, {"draft": {"block_size": 7}, "optim": {"lr": lr}})


def test_an_integer_too_large_for_a_float_is_a_config_error():
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        build(Run, {"draft": {"block_size": 7}, "optim": {"lr": 10**400}})


def test_a_deeply_nested_value_is_a_config_error():
    value: list = []
    for _ in range(100_000):
        value = [value]
    try:
        with pytest.raises(ConfigError, match=r"draft\.block_size"):
            build(Run, {"draft": {"block_size": value}})
    finally:
        while value:  # the interpreter frees deep nests recursively: unwind it by hand
            value = value.pop()


@pytest.mark.parametrize("schedule", ["linear", "Cosine", 1, None, ["cosine"], {}])
def test_a_literal_takes_its_values_and_names_them(schedule):
    with pytest.raises(ConfigError, match=r"optim\.schedule.*cosine, constant"):
        build(Run, {"draft": {"block_size": 7}, "optim": {"schedule": schedule}})


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match=r"draft.*'block_sise'.*did you mean block_size\?"):
        build(Run, {"draft": {"block_sise": 7}})


def test_an_unknown_key_without_a_neighbour_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"'zzz'.*draft, optim"):
        build(Run, {"zzz": 1})


def test_an_unknown_key_comes_before_a_missing_one():
    """A typo is both; the useful message is the one about the typo."""
    with pytest.raises(ConfigError, match="did you mean"):
        build(Run, {"drafts": {"block_size": 7}})


def test_a_class_checks_its_own_values_and_the_message_says_where():
    with pytest.raises(ConfigError, match=r"config\.optim: lr must be positive, got -1\.0"):
        build(Run, {"draft": {"block_size": 7}, "optim": {"lr": -1}})


def test_none_is_spelled_none_where_a_value_may_be_missing():
    """TOML has no null. A string field can't have it: there "none" is a word."""
    run = build(Run, {"draft": {"block_size": 7, "target_layer_ids": "none", "note": "none"}})
    assert run.draft.target_layer_ids is None
    assert run.draft.note == "none"
    with pytest.raises(ConfigError):
        build(Run, {"draft": {"block_size": "none"}})


@dataclass(frozen=True, kw_only=True)
class Anchors:
    count: int | Literal["all"]
    least: Literal["all"] | float | None = None


def test_a_value_may_be_of_one_of_several_types():
    assert build(Anchors, {"count": "all", "least": "all"}) == Anchors(count="all", least="all")
    assert build(Anchors, {"count": 5, "least": 2}) == Anchors(count=5, least=2.0)
    assert build(Anchors, {"count": 5, "least": None}).least is None
    for count in (True, 1.5, "some", None, []):
        with pytest.raises(ConfigError, match=r"count"):
            build(Anchors, {"count": count})


def test_unknown_keys_may_be_skipped_at_any_depth():
    values = {"draft": {"block_size": 7, "block_sise": 8}, "zzz": 1}
    assert build(Run, values, skip_unknown=True) == Run(draft=Draft(block_size=7))
    with pytest.raises(ConfigError, match=r"draft.*'block_size'"):
        build(Run, {"draft": {"block_sise": 8}}, skip_unknown=True)
    with pytest.raises(ConfigError, match=r"draft\.name"):
        build(Run, {"draft": {"block_size": 7, "name": 3}}, skip_unknown=True)


@dataclass(frozen=True, kw_only=True)
class Rows:
    rates: tuple[float | None, ...]
    rows: tuple[Draft, ...] = ()
    by_name: dict[str, Draft]
    best: Draft | None
    run: Run = Run(draft=Draft(block_size=1))


def test_misfits_may_be_skipped_where_the_class_can_do_without():
    good, bad = {"block_size": 7}, {"block_size": "7"}
    values = {
        "rates": [0.5, "x", None, True, 1],
        "rows": [bad, good, 3, {**good, "name": 3}],
        "by_name": {"a": bad, "b": {**good, "target_layer_ids": ["x"]}},
        "best": bad,
        "run": {"draft": bad},
    }
    draft = Draft(block_size=7)
    expected = Rows(rates=(0.5, None, None, None, 1.0), rows=(draft, draft), by_name={"b": draft}, best=None)
    assert build(Rows, values, skip_misfits=True) == expected
    assert build(Rows, {**values, "rows": 3}, skip_misfits=True).rows == ()
    for key in ("rates", "rows", "by_name", "best", "run"):
        others = {"rates": [], "by_name": {}, "best": None}
        with pytest.raises(ConfigError, match=rf"config\.{key}"):
            build(Rows, {**others, key: values[key]})
    for needed in ("rates", "by_name", "best"):  # without them there is none
        with pytest.raises(ConfigError, match=needed):
            build(Rows, {key: value for key, value in values.items() if key != needed}, skip_misfits=True)
    with pytest.raises(ConfigError, match=r"by_name"):
        build(Rows, {**values, "by_name": 3}, skip_misfits=True)
    with pytest.raises(ConfigError, match=r"betas"):  # leaving one out would shift the others
        build(Optim, {"betas": [0.9, "x"]})
    assert build(Optim, {"betas": [0.9, "x"]}, skip_misfits=True).betas == (0.9, 0.95)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr=1e-3", {"optim": {"lr": 1e-3, "schedule": "cosine"}}),
        ("optim.lr = 2", {"optim": {"lr": 2, "schedule": "cosine"}}),
        ("optim.schedule=constant", {"optim": {"lr": 0.5, "schedule": "constant"}}),
        ('optim.schedule="constant"', {"optim": {"lr": 0.5, "schedule": "constant"}}),
        ("optim.betas=[0.1, 0.2]", {"optim": {"lr": 0.5, "schedule": "cosine", "betas": [0.1, 0.2]}}),
        ("draft.tied=true", {"optim": {"lr": 0.5, "schedule": "cosine"}, "draft": {"tied": True}}),
        ("draft.name=a=b", {"optim": {"lr": 0.5, "schedule": "cosine"}, "draft": {"name": "a=b"}}),
        ("seed=3", {"optim": {"lr": 0.5, "schedule": "cosine"}, "seed": 3}),
    ],
)
def test_overrides(override, expected):
    values = {"optim": {"lr": 0.5, "schedule": "cosine"}}
    assert apply_overrides(values, [override]) == expected
    assert values == {"optim": {"lr": 0.5, "schedule": "cosine"}}  # the argument is left alone


def test_the_last_override_wins():
    assert apply_overrides({}, ["a.b=1", "a.b=2"]) == {"a": {"b": 2}}


def test_overrides_leave_nested_tables_of_the_argument_alone():
    values = {"a": {"b": {"c": 1}}}
    assert apply_overrides(values, ["a.b.c=2"]) == {"a": {"b": {"c": 2}}}
    assert values == {"a": {"b": {"c": 1}}}


@pytest.mark.parametrize("override", ["optim.lr", "=3", "  =3", "optim.lr.deep=3", "optim.=3", ".lr=3"])
def test_impossible_overrides_are_refused(override):
    with pytest.raises(ConfigError):
        build(
            Run,
            apply_overrides({"draft": {"block_size": 7}, "optim": {"lr": 0.5}}, [override]),
        )


def test_to_toml_round_trip():
    run = Run(
        draft=Draft(
            block_size=7, target_layer_ids=(1, 9), name='quo"te \\ é \n tab\t', tied=True, note="none"
        ),
        optim=Optim(lr=1e-5, betas=(0.5,), schedule="constant"),
    )
    text = to_toml(run)
    assert tomllib.loads(text)["draft"]["target_layer_ids"] == [1, 9]
    assert build(Run, tomllib.loads(text)) == run


def test_to_toml_leaves_none_out():
    text = to_toml(Run(draft=Draft(block_size=7)))
    assert "note" not in text
    assert build(Run, tomllib.loads(text)) == Run(draft=Draft(block_size=7))


@pytest.mark.parametrize("name", ["\U0001f600", "\x7f", "\u2028"], ids=["emoji", "delete", "separator"])
def test_to_toml_round_trip_of_unusual_characters(name):
    """TOML's escapes are Unicode scalars: JSON's surrogate pairs are not TOML."""
    run = Run(draft=Draft(block_size=7, name=name))
    assert build(Run, tomllib.loads(to_toml(run))) == run


@pytest.mark.parametrize("lr", [float("inf"), 1e300, 5e-324])
def test_to_toml_round_trip_of_unusual_floats(lr):
    run = Run(draft=Draft(block_size=7), optim=Optim(lr=lr))
    assert build(Run, tomllib.loads(to_toml(run))) == run


def test_load_toml(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[draft]\nname = "é"\n', encoding="utf-8")
    assert load_toml(path) == {"draft": {"name": "é"}}


@pytest.mark.parametrize("data", [b"a = ", b"\xff\xfe", b"a = 1\na = 2\n", json.dumps({"a": 1}).encode()])
def test_load_toml_refuses_what_is_not_toml(tmp_path, data):
    path = tmp_path / "run.toml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"run\.toml"):
        load_toml(path)


def test_load_toml_of_a_missing_file_or_a_directory(tmp_path):
    with pytest.raises(ConfigError, match="no config file"):
        load_toml(tmp_path / "run.toml")
    with pytest.raises(ConfigError):
        load_toml(tmp_path)
