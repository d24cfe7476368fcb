"""The object store: checkpoints and snapshots, each a folder of files that appears whole or not at all."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Protocol

MANIFEST = "manifest.json"

_WRITING = ".writing-"
# Longer than writing any folder takes: one that nobody touched for so long is left from a crash.
_STALE_SECONDS = 3600.0


class Damaged(Exception):  # noqa: N818 - the name says what happened
    """A folder's manifest is missing, or a file does not match it, or one of them cannot be read."""


class Unavailable(OSError):  # noqa: N818 - the name says what is wrong
    """The store cannot be reached or refuses its work; it may be otherwise later."""


class ObjectStore(Protocol):
    def put(self, prefix: str, files: dict[str, bytes]) -> int:
        """Write `files` and then their manifest under `prefix`; durable on return. Their size in bytes.

        If the same files are there already and whole, they stay as they are. OSError if it cannot be done
        now, a full disk for example; nothing is to be seen of it then.
        """
        ...

    def get(self, prefix: str) -> dict[str, bytes]:
        """The files under `prefix`, checked against the manifest; Damaged if they do not match it, OSError
        if they cannot be read now."""
        ...

    def delete(self, prefix: str) -> None: ...


def manifest_of(files: dict[str, bytes]) -> bytes:
    entries = {
        name: {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()} for name, body in files.items()
    }
    return json.dumps({"files": entries}, indent=1, sort_keys=True).encode()


def read_manifest(prefix: str, manifest: bytes) -> dict[str, str]:
    """File name -> SHA-256; Damaged if it is no manifest."""
    try:
        checksums = {str(name): str(entry["sha256"]) for name, entry in json.loads(manifest)["files"].items()}
        if any("\0" in name or "/" in name for name in checksums):
            raise ValueError("no file names")
        return checksums
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(f"{prefix}: its {MANIFEST} does not list files and their checksums") from None


def check(prefix: str, files: dict[str, bytes], checksums: dict[str, str]) -> None:
    for name, body in files.items():
        if hashlib.sha256(body).hexdigest() != checksums[name]:
            raise Damaged(f"{prefix}: {name} does not match its checksum")


class DirectoryStore:
    """A directory of the local disk. A folder is written under a temporary name and renamed into place."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self._sweep()

    def put(self, prefix: str, files: dict[str, bytes]) -> int:
        target = self._folder(prefix)
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=_WRITING, dir=self.root))
        try:
            for name, body in (*files.items(), (MANIFEST, manifest_of(files))):
                with open(folder / name, "wb") as file:
                    file.write(body)
                    file.flush()
                    os.fsync(file.fileno())
            _sync(folder)
            if self._holds(prefix, files):
                shutil.rmtree(folder)  # a save that is executed again after a crash
            else:
                if target.exists():
                    shutil.rmtree(target)  # half of it, or other bytes that nothing refers to
                folder.rename(target)
            _sync(target.parent)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return sum(len(body) for body in files.values())

    def get(self, prefix: str) -> dict[str, bytes]:
        folder = self._folder(prefix)
        try:
            checksums = read_manifest(prefix, (folder / MANIFEST).read_bytes())
            files = {name: (folder / name).read_bytes() for name in checksums}
        except FileNotFoundError as error:
            raise Damaged(f"{prefix}: {Path(error.filename).name} is missing") from None
        except OSError as error:
            raise Damaged(
                f"{prefix}: {Path(error.filename or '').name} cannot be read: {error.strerror}"
            ) from None
        check(prefix, files, checksums)
        return files

    def delete(self, prefix: str) -> None:
        shutil.rmtree(self._folder(prefix), ignore_errors=True)

    def _holds(self, prefix: str, files: dict[str, bytes]) -> bool:
        try:
            return self.get(prefix) == files
        except Damaged:
            return False

    def _sweep(self) -> None:
        """Other processes may be writing at this moment, so only what was left long ago goes."""
        for folder in self.root.glob(f"{_WRITING}*"):
            try:
                age = time.time() - max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            except FileNotFoundError:
                continue  # renamed into place just now
            if age > _STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)

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


def open_store(
    url: str, *, endpoint: str = "", region: str = "", encryption: str = "", kms_key: str = ""
) -> ObjectStore:
    """The store at `url`: a local directory, or s3://bucket/prefix, where the other arguments count."""
    if not url.startswith("s3://"):
        return DirectoryStore(Path(url))
    from tinsmith_api.journal.s3 import S3Store

    return S3Store(url, endpoint=endpoint, region=region, encryption=encryption, kms_key=kms_key)
