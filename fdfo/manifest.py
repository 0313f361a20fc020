"""Files that are there whole or not at all, and the SHA-256 sums by which a checkpoint knows its own."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from fdfo.config import UserError

LARGEST_JSON = 2**24  # bytes; the largest that this code writes is some hundred kilobytes


def sync(path: Path) -> None:
    """Returns once a file, or the names in a folder, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """The text under this name; until all of it is on the disk, whatever was there before."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write. It gets its name once all of it is on the disk; until then there is whatever was there before."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        sync(partial)
        partial.rename(path)
    except OSError:
        partial.unlink(missing_ok=True)  # makes room on a full disk
        raise
    sync(path.parent)


@contextlib.contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A folder to fill. It gets its name, which must be free, once all of it is on the disk, and goes where filling it fails."""
    partial = final.with_name(f".{final.name}.partial")
    final.parent.mkdir(parents=True, exist_ok=True)
    if partial.exists():  # of a process that was killed
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        yield partial
        for path in partial.rglob("*"):
            sync(path)
        sync(partial)
        partial.rename(final)
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)  # makes room on a full disk
        raise
    sync(final.parent)


def remove_folder(folder: Path) -> None:
    """Deletes a folder that whole_folder made. One that is killed half way leaves nothing under the folder's name."""
    doomed = folder.with_name(f".{folder.name}.partial")
    if doomed.exists():
        shutil.rmtree(doomed)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def is_file(path: Path) -> bool:
    """Whether there is such a file; False for a name that no file can have, such as one that is too long."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Whether there is such a folder; False for a name that none can have."""
    try:
        return path.is_dir()
    except OSError:
        return False


def read_bounded(path: Path, limit: int) -> bytes:
    """What a file holds that nobody vouches for. Raises ValueError above `limit` bytes, OSError when it cannot be read."""
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it has more than {limit} bytes")
    return content


def read_json(path: Path) -> dict:
    """The object in a JSON file that nobody vouches for. Raises ValueError when it is none, OSError when it cannot be read."""
    try:
        values = json.loads(read_bounded(path, LARGEST_JSON).decode("utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    return values


def file_sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_sum(values: object) -> str:
    """SHA-256 of plain JSON values, whatever their layout in a file."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def seal(folder: Path, name: str, state: dict) -> None:
    """Writes the state into folder/name, with the sums of all other files in the folder and one of its own."""
    content = {"state": state, "files": {path.name: file_sum(path) for path in sorted(folder.iterdir())}}
    text = json.dumps(content | {"sha256": text_sum(content)}, indent=2) + "\n"
    (folder / name).write_text(text, encoding="utf-8")


def sealed_state(folder: Path, name: str, files: Collection[str]) -> dict:
    """The state that seal wrote beside `files`, or some of them, once each has its sum.

    Raises UserError, naming the file, for one that is not as it was written.
    """
    path = folder / name
    try:
        content = read_json(path)
        if set(content) != {"state", "files", "sha256"}:
            raise ValueError("it has no checksums, as those of earlier versions of this code")
        if content.pop("sha256") != text_sum(content) or not isinstance(content["state"], dict):
            raise ValueError("its checksum is wrong")
        if not isinstance(content["files"], dict) or set(content["files"]) - set(files):
            raise ValueError("it names other files than a checkpoint has")
        for path in (folder / file for file in content["files"]):
            if not path.is_file() or file_sum(path) != content["files"][path.name]:
                raise ValueError("it is not the file that was written with this checkpoint")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or foreign ({error}): take another checkpoint.") from error
    return content["state"]
