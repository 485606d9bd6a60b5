"""The numbers of the checkpoints there are, for programs that have not loaded JAX."""

from pathlib import Path

FOLDER = "checkpoints"


def numbers(folder: Path) -> list[int]:
    """List the checkpoints of the run in `folder`, the last one last; those that were not finished do not count."""
    there = (folder / FOLDER).glob("*") if (folder / FOLDER).is_dir() else ()
    return sorted(int(path.name) for path in there if path.name.isdecimal())
