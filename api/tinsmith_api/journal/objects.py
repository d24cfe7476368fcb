"""The object store: checkpoints and snapshots, each a folder of files that appears whole or not at all."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Protocol

MANIFEST = "manifest.json"


class Damaged(Exception):  # noqa: N818 - the name says what happened
    """A folder's manifest is missing, or a file does not match it."""


class ObjectStore(Protocol):
    def put(self, prefix: str, files: dict[str, bytes]) -> int:
        """Write `files` and then their manifest under `prefix`; durable on return. The bytes written."""
        ...

    def get(self, prefix: str) -> dict[str, bytes]:
        """The files under `prefix`, checked against the manifest; Damaged if they do not match it."""
        ...

    def delete(self, prefix: str) -> None: ...


def manifest_of(files: dict[str, bytes]) -> bytes:
    entries = {
        name: {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()} for name, body in files.items()
    }
    return json.dumps({"files": entries}, indent=1, sort_keys=True).encode()


class DirectoryStore:
    """A directory of the local disk. A folder is written under a temporary name and renamed into place."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def put(self, prefix: str, files: dict[str, bytes]) -> int:
        target = self._folder(prefix)
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".writing-", dir=target.parent))
        try:
            for name, body in (*files.items(), (MANIFEST, manifest_of(files))):
                with open(folder / name, "wb") as file:
                    file.write(body)
                    file.flush()
                    os.fsync(file.fileno())
            _sync(folder)
            if target.exists():
                shutil.rmtree(target)  # a save that is executed again after a crash
            folder.rename(target)
            _sync(target.parent)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return sum(len(body) for body in files.values())

    def get(self, prefix: str) -> dict[str, bytes]:
        folder = self._folder(prefix)
        try:
            manifest = json.loads((folder / MANIFEST).read_bytes())["files"]
            files = {name: (folder / name).read_bytes() for name in manifest}
        except FileNotFoundError as error:
            raise Damaged(f"{prefix}: {Path(error.filename).name} is missing") from None
        for name, body in files.items():
            if hashlib.sha256(body).hexdigest() != manifest[name]["sha256"]:
                raise Damaged(f"{prefix}: {name} does not match its checksum")
        return files

    def delete(self, prefix: str) -> None:
        shutil.rmtree(self._folder(prefix), ignore_errors=True)

    def _folder(self, prefix: str) -> Path:
        folder = (self.root / prefix).resolve()
        assert self.root.resolve() in folder.parents, prefix
        return folder


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_store(url: str) -> ObjectStore:
    """The store at `url`: a local directory."""
    return DirectoryStore(Path(url))
