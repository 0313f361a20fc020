"""Writes files and folders whole or not at all, and the SHA-256 hashes by which a checkpoint knows its own files."""

import contextlib
import glob
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Collection, Iterator
from pathlib import Path

import psutil

from fdfo.config.errors import UserError


def sync(path: Path) -> None:
    """Return once a file, or the names in a folder, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file; until all of it is on the disk, the file stays as it was."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file; until all of it is on the disk, the file stays as it was."""
    partial = own_partial(path)
    try:
        partial.write_bytes(content)
        sync(partial)
        partial.rename(path)
    except OSError:
        partial.unlink(missing_ok=True)  # makes room on a full disk
        raise
    sync(path.parent)


def own_partial(final: Path) -> Path:
    """Return a name beside `final` that no other process uses; delete what killed processes left there under theirs."""
    start = f".{final.name}.{socket.gethostname()}-"
    for left in final.parent.glob(f"{glob.escape(start)}*.partial"):
        number = left.name.removeprefix(start).removesuffix(".partial")
        if number.isdecimal() and (int(number) == os.getpid() or not psutil.pid_exists(int(number))):
            delete(left)
    return final.with_name(f"{start}{os.getpid()}.partial")


def delete(path: Path) -> None:
    """Delete a file, or a folder with all in it."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@contextlib.contextmanager
def atomic_folder(final: Path, partial: Path | None = None) -> Iterator[Path]:
    """Yield a temporary folder; rename it to `final`, which must not exist, after fsync; delete it on error.

    partial: its name if processes compete for it. Raises FileExistsError if it exists. Files get the modes that the umask gives.
    """
    partial = own_partial(final) if partial is None else partial
    partial.mkdir()
    mode = partial.stat().st_mode & 0o666
    try:
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                path.chmod(mode)  # some libraries write for the owner alone
            sync(path)
        sync(partial)
        partial.rename(final)
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)  # makes room on a full disk
        raise
    sync(final.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder. If the process is killed half way, nothing is left under the folder's name."""
    partial = own_partial(folder)
    folder.rename(partial)
    shutil.rmtree(partial)


def read_json(path: Path) -> dict:
    """Read the object in a JSON file. Raises ValueError if there is none, OSError if the file cannot be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    return values


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_hash(values: object) -> str:
    """Return the SHA-256 of plain JSON values, whatever their layout in a file."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def seal(folder: Path, name: str, state: dict) -> None:
    """Write the state into folder/name, with the hashes of all other files in the folder, and a hash of its own."""
    content = {"state": state, "files": {path.name: file_hash(path) for path in sorted(folder.iterdir())}}
    text = json.dumps(content | {"sha256": json_hash(content)}, indent=2) + "\n"
    (folder / name).write_text(text, encoding="utf-8")


def read_sealed(folder: Path, name: str, files: Collection[str]) -> dict:
    """Return the state that seal wrote, after checking the hashes of all files; `files` are the names that it may list.

    Raises UserError, naming the file, for one that is not as it was written.
    """
    path = folder / name
    try:
        content = read_json(path)
        if set(content) != {"state", "files", "sha256"}:
            raise ValueError("it has no checksums, like those of early versions of this code")
        if content.pop("sha256") != json_hash(content) or not isinstance(content["state"], dict):
            raise ValueError("its checksum is wrong")
        if not isinstance(content["files"], dict) or set(content["files"]) - set(files):
            raise ValueError("it names other files than a checkpoint has")
        for path in (folder / file for file in content["files"]):
            if not path.is_file() or file_hash(path) != content["files"][path.name]:
                raise ValueError("it is not the file that was written with this checkpoint")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or foreign ({error}): take another checkpoint.") from error
    return content["state"]
