"""The house rules: which room imports which, what each room alone may name, and how large anything may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from train.draft import DRAFTS

ROOT = Path(__file__).parents[1]
# Rooms of train/, from the ground up. A room imports rooms of lower floors only.
FLOORS = [
    ["config", "runtime"],
    ["data", "losses"],
    ["draft"],
    ["runs"],
    ["eval", "decode", "export"],
    ["trainer", "prove"],
    ["experiments"],
    ["cli"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS, start=1) for room in rooms}
# Documented paths of names that live elsewhere: they only re-export. And the entry point.
DOORS = {
    "train/__init__.py",
    "train/__main__.py",
    "train/anchors.py",
    "train/module.py",
    "train/losses/__init__.py",
}
KINDS = list(DRAFTS)
# The kinds' table, which has to name each.
TABLE = "train/draft/__init__.py"
LONGEST_FILE, LONGEST_FUNCTION = 400, 80


def sources(*folders: str) -> list[Path]:
    """Return the Python files of the folders, of a checkout or of a copy of one."""
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(found) > 5
    return found


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> Iterator[str]:
    """Yield the modules that a module imports anywhere, also by name, and `a.b` for `from a import b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the room: write absolute ones"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and str(node.value).startswith("train."):
            place = ROOT / node.value.replace(".", "/")
            if place.is_dir() or place.with_suffix(".py").is_file():
                yield node.value


def wrong_floors(name: str, tree: ast.Module) -> list[str]:
    """Return the imports of a module of train/ that its floor does not allow."""
    room = Path(name).parts[1].removesuffix(".py")
    found = []
    for module in imported(tree):
        package, _, rest = module.partition(".")
        other = rest.partition(".")[0]
        if package != "train" or not rest or other == room:
            continue
        if FLOOR.get(other, 99) >= FLOOR[room]:
            found.append(f"{name} imports {module}")
    return found


def wrong_kinds(name: str, tree: ast.Module, classes: set[str]) -> list[str]:
    """Return where a module outside a kind's folder imports the kind or names one of its classes."""
    found = [f"{name} imports {m}" for m in imported(tree) for k in KINDS if m.startswith(f"train.draft.{k}")]
    names = {getattr(node, "id", getattr(node, "attr", None)) for node in ast.walk(tree)}
    names |= {module.rpartition(".")[2] for module in imported(tree)}
    return found + [f"{name} names {each}" for each in sorted(classes & names)]


def wrong_names(name: str, tree: ast.Module, names: set[str]) -> list[str]:
    """Return the file names of a run directory that a module writes out, whole or at the end of a path."""
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    strings = {text for text in strings if isinstance(text, str)}
    parts = [part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values]
    texts = [part.value for part in parts if isinstance(part, ast.Constant)]
    found = (strings & names) | {each for each in names for text in texts if f"/{each}" in text}
    return [f"{name} names {text}" for text in sorted(found)]


def test_every_room_has_a_floor() -> None:
    rooms = {path.relative_to(ROOT / "train").parts[0].removesuffix(".py") for path in sources("train")}
    assert rooms - {Path(door).stem for door in DOORS} == set(FLOOR)


def test_a_floor_imports_lower_ones_only() -> None:
    modules = [path for path in sources("train") if name_of(path) not in DOORS]
    assert [line for path in modules for line in wrong_floors(name_of(path), parsed(path))] == []


def test_a_kind_knows_nothing_of_the_table_of_kinds() -> None:
    for path in sources("train/draft"):
        modules = set(imported(parsed(path)))
        if path.parent.name in KINDS or path.name in (
            "kind.py",
            "serving.py",
            "body.py",
            "tables.py",
            "vocabulary.py",
        ):
            assert not modules & {"train.draft.DRAFTS", "train.draft.shape", "train.draft.TABLES"}, path


def test_only_its_folder_names_a_kinds_classes() -> None:
    inside = [path for kind in KINDS for path in sources(f"train/draft/{kind}")]
    classes = {
        node.name for path in inside for node in ast.walk(parsed(path)) if isinstance(node, ast.ClassDef)
    }
    assert {"Qwen3DSparkModel", "DSparkTrainerModule", "RNNMarkovHead", "AcceptRatePredictor"} <= classes
    outside = [path for path in sources("train", "pipeline", "capture") if path not in inside]
    outside = [path for path in outside if name_of(path) not in {*DOORS, TABLE}]
    assert [line for path in outside for line in wrong_kinds(name_of(path), parsed(path), classes)] == []


def test_only_runs_names_the_files_of_a_run_directory() -> None:
    from train.runs import names

    own = {value for name, value in vars(names).items() if name.isupper() and isinstance(value, str)}
    own -= {names.BEST, names.LATEST}  # words that mean other things too
    assert {"config.toml", "run.json", "metrics.jsonl", "training.json", "evaluation.json"} <= own
    outside = [path for path in sources("train") if path.parent.name != "runs"]
    assert [line for path in outside for line in wrong_names(name_of(path), parsed(path), own)] == []


def test_only_commands_and_the_console_import_click() -> None:
    allowed = {"train/runtime/console.py"}
    modules = [path for path in sources("train") if "cli" not in path.parts and name_of(path) not in allowed]
    assert [name_of(path) for path in modules if "click" in set(imported(parsed(path)))] == []


def test_no_file_and_no_function_grows_without_end() -> None:
    for path in sources("pipeline", "capture", "train"):
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= LONGEST_FILE, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= LONGEST_FUNCTION, f"{path}: {node.name} has {lines} lines"


@pytest.mark.parametrize(
    ("name", "source", "wrong"),
    [
        ("train/data/x.py", "from train.draft.kind import DraftKind", True),
        ("train/data/x.py", "def f():\n    import train.losses.slots", True),
        ("train/data/x.py", "from train import runs", True),
        ("train/eval/x.py", "from train.export.writer import export", True),
        ("train/eval/x.py", "from train.anchors import build_eval_mask", True),
        ("train/data/x.py", "import importlib\nimportlib.import_module('train.runs.open')", True),
        ("train/data/x.py", "message = 'train.lr must be positive'", False),
        ("train/runs/x.py", "from train.draft.kind import DraftKind\nfrom train.runs import names", False),
    ],
)
def test_the_floor_check_sees(name: str, source: str, wrong: bool) -> None:
    assert bool(wrong_floors(name, ast.parse(source))) == wrong


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("from train.draft import dspark", True),
        ("import train.draft.dspark.model as m", True),
        ("x.Qwen3DSparkModel(config)", True),
        ("from train.draft import Qwen3DSparkModel as model", True),
        ("import_module('train.draft.dspark.model')", True),
        ("from train.draft import DRAFTS", False),
    ],
)
def test_the_kind_check_sees(source: str, wrong: bool) -> None:
    assert bool(wrong_kinds("train/eval/x.py", ast.parse(source), {"Qwen3DSparkModel"})) == wrong


def test_the_name_check_sees() -> None:
    assert wrong_names("x.py", ast.parse("f'{run}/metrics.jsonl'"), {"metrics.jsonl"})
    source = "path = run / 'metrics.jsonl'\n'''Write metrics.jsonl.'''"
    assert wrong_names("train/eval/x.py", ast.parse(source), {"metrics.jsonl"})
    assert not wrong_names("train/eval/x.py", ast.parse("'''Write metrics.jsonl.'''"), {"metrics.jsonl"})
