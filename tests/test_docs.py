"""README and docs/ name only what exists: links, commands, options, files, folders and settings."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache
from importlib import import_module
from pathlib import Path

import click
import pytest

from pipeline.cache.codecs import bits_per_value, get_codec
from pipeline.cli import COMMANDS
from train.config import TrainConfig
from train.draft import TABLES

ROOT = Path(__file__).parents[1]
MOST_LINES = 200
# Options of other programs, which the pages mention beside ours.
OTHERS = {"--list", "--shutdown-timeout", "--run-path", "--speculative-dspark-confidence-sts-path"}
FOLDERS = r"(?:pipeline|capture|train|tests|benchmarks|configs|docs)"

Pages = dict[str, str]


def read_pages() -> Pages:
    """Return README and every page of docs/, by path from the root."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


PAGES = read_pages()


@cache
def tracked() -> frozenset[str]:
    """Return the files that git knows and that are there."""
    command = ["git", "ls-files"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip("not a git checkout")
    return frozenset(name for name in result.stdout.splitlines() if (ROOT / name).is_file())


@cache
def tracked_folders() -> frozenset[str]:
    """Return every folder with a tracked file somewhere below it."""
    return frozenset(parent.as_posix() for name in tracked() for parent in Path(name).parents if parent.name)


def fences(text: str) -> list[tuple[str, str]]:
    """Return language and content of every fenced block."""
    return re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, flags=re.M | re.S)


def prose(text: str) -> str:
    """Return the text without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S)


def spans(text: str) -> list[str]:
    """Return what stands in backticks outside fenced blocks."""
    return re.findall(r"`([^`]+)`", prose(text))


def command_lines(text: str) -> list[str]:
    """Return every command line of a page: lines of fenced blocks, continued ones joined, and spans."""
    joined = [re.sub(r"\\\n\s*", " ", block) for _, block in fences(text)]
    lines = [line.strip().removeprefix("$ ") for block in joined for line in block.splitlines()]
    return lines + [" ".join(span.split()) for span in spans(text)]


def words(line: str) -> list[str]:
    """Split a command line as a shell does; nothing for a line that is no command."""
    try:
        return shlex.split(line, comments=True)
    except ValueError:
        return []


def dspark_calls(line: str) -> Iterator[tuple[str, list[str]]]:
    """Yield subcommand and arguments of a line that calls `dspark`, or a stage as a module."""
    found = words(line)
    if found[:1] == ["dspark"]:
        yield found[1] if found[1:] else "", found[2:]
    elif found[:1] in (["torchrun"], ["python"]) and "-m" in found[:-1]:
        module, *rest = found[found.index("-m") + 1 :]
        if module in ("capture", "train"):
            yield module, rest


def make_calls(line: str) -> Iterator[list[str]]:
    found = words(line)
    if found[:1] == ["make"]:
        yield found[1:]


@cache
def options_of(name: str) -> frozenset[str]:
    """Return every option of a subcommand."""
    module, _, attribute = COMMANDS[name][0].partition(":")
    command: click.Command = getattr(import_module(module), attribute)
    named = (opt for param in command.params for opt in (*param.opts, *param.secondary_opts))
    return frozenset(named) | {"-h", "--help"}


def slugs(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    found: list[str] = []
    for heading in re.findall(r"^#+ +(.+)$", prose(text), flags=re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        slug = re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)


def bad_links(pages: Pages) -> list[str]:
    bad = []
    for page, text in pages.items():
        plain = re.sub(r"`[^`]*`", "", prose(text))
        for link in re.findall(r"\]\(([^)\s]+)\)", plain) + re.findall(r'(?:src|href)="([^"]+)"', plain):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
            name = file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else "outside"
            if name not in pages and name not in tracked() and name not in tracked_folders():
                bad.append(f"{page}: {link}")
            elif anchor:
                target = pages[name] if name in pages else file.read_text(encoding="utf-8")
                if anchor not in slugs(target):
                    bad.append(f"{page}: {link}")
    return bad


def bad_commands(pages: Pages) -> list[str]:
    """Return the subcommands that don't exist, and the options that theirs doesn't have."""
    bad = []
    for page, text in pages.items():
        for line in command_lines(text):
            for name, arguments in dspark_calls(line):
                if name.startswith("-"):
                    continue
                if name not in COMMANDS:
                    bad.append(f"{page}: {line}")
                    continue
                given = {word.partition("=")[0] for word in arguments if re.match(r"--?[a-z]", word)}
                bad += [f"{page}: {name} {option}" for option in sorted(given - options_of(name))]
    return bad


def bad_options(pages: Pages) -> list[str]:
    """Return the options named alone in backticks that no subcommand has."""
    known = OTHERS.union(*(options_of(name) for name in COMMANDS))
    return [
        f"{page}: {span}"
        for page, text in pages.items()
        for span in spans(text)
        if (option := re.match(r"--[a-z][a-z-]*", span)) and option[0] not in known
    ]


def bad_targets(pages: Pages) -> list[str]:
    """Return the targets and variables that the Makefile doesn't have."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.M))
    variables = set(re.findall(r"^([A-Z_]+) \?=", makefile, flags=re.M))
    return [
        f"{page}: make {word}"
        for page, text in pages.items()
        for line in command_lines(text)
        for called in make_calls(line)
        for word in called
        if not (word.partition("=")[0] in variables if "=" in word else word in targets)
    ]


def bad_paths(pages: Pages) -> list[str]:
    """Return the paths in backticks and in fenced blocks that git doesn't know."""
    bad = []
    for page, text in pages.items():
        places = [*spans(text), *(word for _, block in fences(text) for word in block.split())]
        for place in places:
            match = re.match(rf"{FOLDERS}/[\w./-]*", place)
            if match and match[0].rstrip("/.") not in tracked() | tracked_folders():
                bad.append(f"{page}: {place}")
    return bad


def bad_settings(pages: Pages) -> list[str]:
    """Return the settings in code that a run doesn't have. `train.draft` and the like are modules."""
    tables = [pair for k in TABLES.values() for pair in (("draft", k.draft), ("loss", k.loss))]
    tables.append(("train", TrainConfig))
    known = {f"{name}.{setting.name}" for name, table in tables for setting in fields(table)}
    modules = {name.removesuffix(".py").replace("/", ".") for name in tracked() | tracked_folders()}
    return [
        f"{page}: {name}"
        for page, text in pages.items()
        for code in [*spans(text), *(block for _, block in fences(text))]
        for name in re.findall(r"(?<![\w/.])(?:draft|loss|train)\.\w+", code)
        if name not in known and name not in modules
    ]


def outline(text: str) -> dict[str, str]:
    """Return folder and annotation of every line of architecture.md's outline."""
    (block,) = (content for language, content in fences(text) if language == "folders")
    found = {}
    for line in block.splitlines():
        match = re.fullmatch(r"(\S+)/ {2,}(\S.*)", line)
        assert match, f"not a folder with its annotation: {line!r}"
        assert match[1] not in found, f"{match[1]} stands there twice"
        found[match[1]] = match[2]
    return found


def bad_outline(pages: Pages) -> list[str]:
    """Return the folders that only the outline or only the tree has."""
    there = {str(Path(name).parent) for name in tracked() if name.endswith(".py")} - {"."}
    return sorted(there ^ set(outline(pages["docs/architecture.md"])))


CHECKS: list[Callable[[Pages], list[str]]] = [
    bad_links,
    bad_commands,
    bad_options,
    bad_targets,
    bad_paths,
    bad_settings,
    bad_outline,
]


@pytest.mark.parametrize("check", CHECKS)
def test_the_pages_name_only_what_exists(check):
    assert check(PAGES) == []


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (bad_links, "[a](nowhere.md)"),
        (bad_links, "[a](../../outside.md)"),
        (bad_links, "[a](cache.md#no-such-heading)"),
        (bad_links, "[a](#no-such-heading)\n\n# Another\n"),
        (bad_links, '<img src="nowhere.svg">'),
        (bad_commands, "`dspark trian`"),
        (bad_commands, "```sh\ndspark trian --cache c\n```\n"),
        (bad_commands, "```sh\n$ dspark verify c \\\n      --quick\n```\n"),
        (bad_commands, "```sh\ntorchrun --nproc-per-node 2 -m train --cache c --runs r\n```\n"),
        (bad_options, "pass `--no-such-option`"),
        (bad_targets, "`make no`"),
        (bad_targets, "```sh\nmake train NO=1   # a comment\n```\n"),
        (bad_paths, "`train/no.py`"),
        (bad_paths, "`pipeline/no/`"),
        (bad_paths, "```sh\ndspark train --config configs/no.toml\n```\n"),
        (bad_settings, "`train.no = 1`"),
        (bad_settings, "```sh\ndspark train --set draft.no=1\n```\n"),
    ],
)
def test_each_check_sees_what_does_not_exist(check, text):
    assert check({**PAGES, "docs/broken.md": text})[-1].startswith("docs/broken.md: ")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: text.replace("```folders\n", "```folders\nno/such/  a folder\n"), "no/such"),
        (lambda text: re.sub(r"^pipeline/cache/codecs/ .*\n", "", text, flags=re.M), "pipeline/cache/codecs"),
    ],
)
def test_the_outline_check_sees_a_folder_too_many_and_one_too_few(change, reason):
    broken = {**PAGES, "docs/architecture.md": change(PAGES["docs/architecture.md"])}
    assert set(bad_outline(broken)) - set(bad_outline(PAGES)) == {reason}


@pytest.mark.parametrize("line", ["pipeline/", "pipeline/   ", "pipeline  what both stages share"])
def test_a_folder_without_an_annotation_is_no_outline(line):
    with pytest.raises(AssertionError, match="not a folder with its annotation"):
        outline(f"```folders\n{line}\n```\n")


def test_readme_is_short_and_links_every_page():
    readme = PAGES["README.md"]
    assert len(readme.splitlines()) <= MOST_LINES
    unlinked = [page for page in PAGES if page.startswith("docs/") and f"]({page}" not in readme]
    assert unlinked == []


def test_readme_lists_every_command():
    rows = re.findall(r"^\| `dspark (\w+)`", PAGES["README.md"], flags=re.M)
    assert sorted(rows) == sorted(COMMANDS)


def test_the_public_names_are_where_architecture_says():
    section = PAGES["docs/architecture.md"].split("\n## Public names\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([\w.]+)` \| (.*) \|$", section, flags=re.M)
    assert len(rows) > 5
    for module, names in rows:
        for name in re.findall(r"`(\w+)`", names):
            assert hasattr(import_module(module), name), f"{module}.{name}"


def test_the_table_of_costs_is_what_the_codecs_take():
    text = PAGES["docs/cache.md"].split("\n## What a cache costs\n")[1]
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.split("\n## ")[0].splitlines()
        if line.startswith("|")
    ][:6]
    widths = [int(cell.split("width ")[1].replace(",", "")) for cell in header[1:4]]
    assert widths == [2560, 4096, 5120]
    names = [re.findall(r"(\w+) \+ (\w+)", name) for name, *_ in rows]
    assert names == [
        [("bf16", "bf16")],
        [("int8", "int8"), ("fp8", "fp8")],
        [("nf4", "int8")],
        [("lm3", "int8")],
    ]
    for pairs, (_, *cells, share) in zip(names, rows, strict=True):
        for context, last in pairs:
            for width, cell in zip(widths, cells, strict=True):
                values = 5 * bits_per_value(get_codec(context), width) + bits_per_value(
                    get_codec(last), width
                )
                a_token = 4 + 1 + values * width / 8  # its id and its mask
                assert cell.replace(" per token", "") == f"{a_token:,.0f} B, {a_token * 1.237e-3:.1f} TB"
                assert abs(a_token / (12 * width + 5) - float(share)) < 0.001
