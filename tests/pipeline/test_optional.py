"""Fields that the format gained later: written only where they differ from their default."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import config
from pipeline.cache import Identity, Manifest, read_manifest
from pipeline.cache.optional import LEFT_OUT, plain_values
from tests.pipeline.handmade import HandCache
from train.draft.settings import run_config
from train.runs.directory import begin
from train.runs.names import RUN

EXAMPLE = Path(__file__).parents[2] / "configs/example.toml"


@dataclass(frozen=True, kw_only=True)
class Extra:
    name: str
    count: int = field(default=1, metadata=LEFT_OUT)


@dataclass(frozen=True, kw_only=True)
class Later(Identity):
    """An identity as a later version could have it."""

    extra: Extra | None = field(default=None, metadata=LEFT_OUT)
    words: tuple[str, ...] = field(default_factory=tuple, metadata=LEFT_OUT)


@dataclass(frozen=True, kw_only=True)
class Table:
    extras: tuple[Extra, ...] = ()
    plain: int = 0


def test_only_marked_fields_with_their_default_are_left_out() -> None:
    table = Table(extras=(Extra(name="a"), Extra(name="b", count=2)))
    assert plain_values(table) == {"extras": ({"name": "a"}, {"name": "b", "count": 2}), "plain": 0}
    assert config.build(Table, json.loads(json.dumps(plain_values(table)))) == table


def old_manifest(tmp_path: Path) -> Manifest:
    return read_manifest(HandCache().save(tmp_path / "hand"))


def later(identity: Identity, **values: object) -> Later:
    return Later(**{f.name: getattr(identity, f.name) for f in dataclasses.fields(identity)}, **values)


def test_a_manifest_without_new_values_keeps_its_bytes(tmp_path) -> None:
    old = old_manifest(tmp_path)
    assert json.loads(json.dumps(plain_values(old.identity))) == HandCache().manifest["identity"]
    new = dataclasses.replace(old, identity=later(old.identity))
    assert new.to_json() == old.to_json()
    wider = dataclasses.replace(old, identity=later(old.identity, extra=Extra(name="x"), words=("y",)))
    found = json.loads(wider.to_json())["identity"]
    assert (found.pop("extra"), found.pop("words")) == ({"name": "x"}, ["y"])
    assert found == json.loads(old.to_json())["identity"]


def test_a_run_records_the_same_without_new_values(tmp_path) -> None:
    old = old_manifest(tmp_path)
    settings = run_config(config.load_toml(EXAMPLE), str(EXAMPLE))
    for name, identity in (("old", old.identity), ("new", later(old.identity))):
        (tmp_path / name).mkdir()
        begin(tmp_path / name, settings, identity, fresh=False)
    assert (tmp_path / "old" / RUN).read_bytes() == (tmp_path / "new" / RUN).read_bytes()
