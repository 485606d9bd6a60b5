"""Files that are there in full or not at all, in a folder that one run has to itself.

Nothing is replaced or deleted that these programs did not write, and nothing at all unless it was asked for.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class DiskError(OSError, ValueError):
    """A file or a folder that cannot be read, written, or had to oneself; a command line says so in one line."""


def make_folder(option: str, folder: Path) -> None:
    """Make `folder` if there is none; `option` of the command line is named in errors.

    Raises:
        DiskError: it is a file, or cannot be made or written to.
    """
    if folder.exists() and not folder.is_dir():
        raise DiskError(f"`{option}` must be a folder; {folder} is a file.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"`{option}` cannot be made: {folder}: {error.strerror}. Take another folder.") from None
    if not os.access(folder, os.W_OK):
        raise DiskError(f"`{option}` must be a folder that can be written to; {folder} cannot. Take another one.")


@contextlib.contextmanager
def hold(option: str, folder: Path) -> Iterator[None]:
    """Make `folder` if there is none, and lock it; `option` of the command line is named in errors.

    Raises:
        DiskError: it is a file, another run has it, or it cannot be made or written to.
    """
    make_folder(option, folder)
    # The lock is on the folder itself: it leaves no file, and goes with the process however that ends.
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DiskError(
                f"`{option}` must not be in use by another run; {folder} is. Wait for that one, or take another folder."
            ) from None
        yield
    finally:
        os.close(held)


def check_contents(option: str, folder: Path, record: str, keys: set[str], *, replace: bool | None = None) -> None:
    """Check that `folder` is empty, or holds a former run that may be written over.

    Args:
        option: of the command line, named in errors.
        folder: to write to.
        record: the name of the JSON object by which a former run is known.
        keys: that this object has.
        replace: whether a former run may be replaced; None where a run goes on from a former one.

    Raises:
        DiskError: it holds something else, or a former run that may not be replaced.
    """
    there = sorted(path.name for path in folder.iterdir())
    former = False
    with contextlib.suppress(OSError):
        value = read_json(folder / record)
        former = isinstance(value, dict) and keys <= value.keys()
    if not there or (former and replace is not False):
        return
    held = ", ".join(there[:3]) + (f" and {len(there) - 3} more" if len(there) > 3 else "")
    if former:
        remedy = "Pass `--replace` to replace that run, or take another folder."
    else:
        remedy = "It is no former run of this command, which alone can be written over. Take another folder."
    raise DiskError(f"`{option}` must be a new or an empty folder; {folder} holds {held}. {remedy}")


def write(path: Path, content: str | bytes) -> None:
    """Write a file that is there in full or not at all.

    Raises:
        DiskError: it cannot be written; a file of that name is as it was.
    """
    path = Path(os.path.realpath(path))  # a link stays a link
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")  # no other process's
    try:
        with partial.open("xb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, partial)
        partial.replace(path)
    except OSError as error:
        raise _not_written(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def append(path: Path, text: str) -> None:
    """Add whole lines to a file in one write: neither a killed program nor a full disk leaves a part of one.

    Raises:
        DiskError: they cannot be written; the file is as it was.
    """
    data = text.encode()
    try:
        with path.open("ab", buffering=0) as file:
            before = file.tell()
            if (file.write(data) or 0) < len(data):
                file.truncate(before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise _not_written(path, error) from None


def _not_written(path: Path, error: OSError) -> DiskError:
    return DiskError(f"{path} cannot be written: {error.strerror}. A file of that name is as it was.")


def remove_folder(folder: Path) -> None:
    """Delete a folder of a former run with all that it holds; nothing where there is none.

    Raises:
        DiskError: it cannot be deleted.
    """
    try:
        if folder.is_dir():
            shutil.rmtree(folder)
    except OSError as error:
        raise DiskError(f"{folder} of a former run cannot be deleted: {error.strerror}.") from None


def move_aside(path: Path, folder: Path) -> None:
    """Move a file or a folder into `folder`, under a name that nothing there has.

    Raises:
        DiskError: it cannot be moved.
    """
    names = (folder / f"{path.name}{end}" for end in ("", *(f".{n}" for n in range(1, 1000))))
    try:
        folder.mkdir(exist_ok=True)
        path.rename(next(name for name in names if not name.exists()))
    except OSError as error:
        raise DiskError(f"{path} cannot be moved to {folder}: {error.strerror}.") from None


def write_figure(path: Path, figure: "Figure", dpi: int) -> None:
    """Write a figure as PNG."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    write(path, drawn.getvalue())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON; lists of numbers are a line each."""
    text = json.dumps(value, indent=2, allow_nan=False)
    text = re.sub(r"\[\s+([-\d][^\[\]{}\"]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    write(path, text + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DiskError: it cannot be read, or holds no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DiskError(f"{path} must be a file that can be read: {error.strerror}.") from None
    except ValueError as error:
        raise DiskError(f"{path} must hold JSON, and is damaged: {error}.") from None


def write_checked(path: Path, record: dict[str, Any]) -> None:
    """Write a JSON object with its checksum."""
    write_json(path, record | {"sha256": _checksum(record)})


def read_checked(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object that `write_checked` wrote, without its checksum.

    Raises:
        DiskError: it is not as it was written; `remedy` says what to do.
    """
    try:
        record = read_json(path)
    except DiskError as error:
        raise DiskError(f"{error} {remedy}") from None
    found = record.pop("sha256", None) if isinstance(record, dict) else None
    if found is None or found != _checksum(record):
        raise DiskError(f"{path} must be as it was written, and its checksum says that it is not. {remedy}")
    return record


def _checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
