"""Find the data in a folder and below it."""

from __future__ import annotations

from pathlib import Path

from capture.data.readers import suffix_of

# Files that describe a dataset, of a suffix that data has.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json")


def is_saved_dataset(path: Path) -> bool:
    """Return whether `datasets` saved this folder."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def find_data(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the data files in a folder and below it, and the datasets saved below it, in sorted order.

    Links are followed, except to a folder that holds the link.

    Returns:
        The paths, and the names of everything else, each with the reason if its suffix does not say it.
    """
    found: list[Path] = []
    skipped: list[str] = []
    _search(folder, folder, (folder.resolve(),), found, skipped)
    return sorted(found, key=lambda path: path.parts), sorted(skipped)


def _search(folder: Path, top: Path, above: tuple[Path, ...], found: list[Path], skipped: list[str]) -> None:
    """Search one folder. `above` are the real paths of the folders that lead to it, itself included."""
    try:
        entries = list(folder.iterdir())
    except OSError as error:
        skipped.append(f"{folder.relative_to(top).as_posix()}/ ({error.strerror})")
        return
    for path in entries:
        name = path.relative_to(top).as_posix()
        if path.name.startswith("."):
            skipped.append(f"{name} (hidden)")
        elif path.is_dir():
            real = path.resolve()
            if real in above:
                skipped.append(f"{name}/ (a link to a folder above it)")
            elif is_saved_dataset(path):
                found.append(path)
            else:
                _search(path, top, (*above, real), found, skipped)
        elif not path.is_file():
            skipped.append(f"{name} (a broken link, or no plain file)")
        elif path.name in _DESCRIPTIONS:
            skipped.append(f"{name} (describes a dataset)")
        elif suffix_of(path) is None:
            skipped.append(name)
        else:
            found.append(path)
