"""The object store: checkpoints and snapshots, each a folder of files that appears whole or not at all."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

MANIFEST = "manifest.json"

_PIECE_BYTES = 1 << 20
_WRITING = ".writing-"
# Longer than writing any folder takes: one that nobody touched for so long is left from a crash.
_STALE_SECONDS = 3600.0


class Damaged(Exception):  # noqa: N818 - the name says what happened
    """A folder's manifest is missing, or a file does not match it, or one of them cannot be read."""


class Unavailable(OSError):  # noqa: N818 - the name says what is wrong
    """The store cannot be reached or refuses its work; it may be otherwise later."""


Body = bytes | memoryview
"""A file's bytes."""


class ObjectStore(Protocol):
    def put(self, prefix: str, files: Mapping[str, Body]) -> int:
        """Write `files` and then their manifest under `prefix`; durable on return. Their size in bytes.

        A prefix stands for one save. Files that are there already and whole are that save's, executed before:
        they stay as they are, whatever was read of them stays true, and the size is theirs. OSError if it
        cannot be done now, a full disk for example; nothing is to be seen of it then.
        """
        ...

    def put_stream(self, prefix: str, files: Mapping[str, Callable[[], Iterator[Body]]]) -> int:
        """As `put`, of files that are never in memory as a whole. Each may be asked for its pieces twice, on
        any thread."""
        ...

    def get(self, prefix: str) -> dict[str, bytes]:
        """The files under `prefix`, checked against the manifest; Damaged if they do not match it, OSError
        if they cannot be read now."""
        ...

    def entries(self, prefix: str) -> dict[str, "Entry"]:
        """What the manifest says of the files under `prefix`. Damaged or OSError as for `get`."""
        ...

    def delete(self, prefix: str) -> None:
        """Nothing if there is nothing; OSError if it cannot be done now."""
        ...

    def tidy(self, *, older_than_seconds: float) -> int:
        """Let go of what writers that died left half-written in the store's own ways, and that no prefix
        shows; how many pieces. Nobody has touched them for so long."""
        ...

    def links(self, prefix: str, seconds: int) -> dict[str, str]:
        """For every file under `prefix` an address at which anybody can read it for so long; "" if the store
        has none that clients reach. Damaged or OSError as for `get`."""
        ...

    def stream(self, prefix: str, name: str) -> tuple[int, Iterator[bytes]]:
        """(the size, the bytes piece by piece) of a file, unchecked. Damaged or OSError as for `get`."""
        ...


class Entry(NamedTuple):
    size_bytes: int
    sha256: str


def entry_of(pieces: Iterable[Body]) -> Entry:
    size_bytes, sha256 = 0, hashlib.sha256()
    for piece in pieces:
        size_bytes += len(piece)
        sha256.update(piece)
    return Entry(size_bytes, sha256.hexdigest())


def pieces_of(body: Body) -> Callable[[], Iterator[Body]]:
    view = memoryview(body)
    return lambda: (view[start : start + _PIECE_BYTES] for start in range(0, len(view), _PIECE_BYTES))


def manifest_of(entries: Mapping[str, Entry]) -> bytes:
    listed = {name: {"bytes": entry.size_bytes, "sha256": entry.sha256} for name, entry in entries.items()}
    return json.dumps({"files": listed}, indent=1, sort_keys=True).encode()


def read_manifest(prefix: str, manifest: bytes) -> dict[str, Entry]:
    """By file name; Damaged if it is no manifest."""
    try:
        given = json.loads(manifest)["files"]
        entries = {str(name): Entry(int(e["bytes"]), str(e["sha256"])) for name, e in given.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        entries = None
    if entries is None or any("/" in name or "\0" in name or name in (".", "..") for name in entries):
        raise Damaged(f"{prefix}: its {MANIFEST} does not list files and their checksums")
    return entries


def check(prefix: str, files: dict[str, bytes], entries: dict[str, Entry]) -> None:
    for name, body in files.items():
        if hashlib.sha256(body).hexdigest() != entries[name].sha256:
            raise Damaged(f"{prefix}: {name} does not match its checksum")


class DirectoryStore:
    """A directory of the local disk. A folder is written under a temporary name and renamed into place."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self.tidy(older_than_seconds=_STALE_SECONDS)

    def put(self, prefix: str, files: Mapping[str, Body]) -> int:
        whole = self._read_if_whole(prefix)
        if whole is None:
            self._write(prefix, {name: pieces_of(body) for name, body in files.items()})
        self._sync_parents(prefix)
        return sum(len(body) for body in (whole or files).values())

    def put_stream(self, prefix: str, files: Mapping[str, Callable[[], Iterator[Body]]]) -> int:
        if not (self._folder(prefix) / MANIFEST).exists():  # appears with all the others, or not at all
            self._write(prefix, files)
        self._sync_parents(prefix)
        return sum(entry.size_bytes for entry in self.entries(prefix).values())

    def get(self, prefix: str) -> dict[str, bytes]:
        folder = self._folder(prefix)
        with _damage_told(prefix):
            entries = read_manifest(prefix, (folder / MANIFEST).read_bytes())
            files = {name: (folder / name).read_bytes() for name in entries}
        check(prefix, files, entries)
        return files

    def entries(self, prefix: str) -> dict[str, Entry]:
        with _damage_told(prefix):
            return read_manifest(prefix, (self._folder(prefix) / MANIFEST).read_bytes())

    def delete(self, prefix: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._folder(prefix))

    def links(self, prefix: str, seconds: int) -> dict[str, str]:
        return dict.fromkeys(self.entries(prefix), "")

    def stream(self, prefix: str, name: str) -> tuple[int, Iterator[bytes]]:
        folder = self._folder(prefix)
        with _damage_told(prefix):
            entries = read_manifest(prefix, (folder / MANIFEST).read_bytes())
            size_bytes = size_of(prefix, name, entries)
            file = open(folder / name, "rb")  # noqa: SIM115 - closed when it is read
        return size_bytes, _pieces(file)

    def _write(self, prefix: str, files: Mapping[str, Callable[[], Iterator[Body]]]) -> None:
        target = self._folder(prefix)
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=_WRITING, dir=self.root))
        try:
            entries = {name: entry_of(_written(folder / name, pieces())) for name, pieces in files.items()}
            entry_of(_written(folder / MANIFEST, iter([manifest_of(entries)])))
            _sync(folder)
            if target.exists():
                shutil.rmtree(target)  # it is not whole
            folder.rename(target)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _sync_parents(self, prefix: str) -> None:
        for folder in self._folder(prefix).parents:
            _sync(folder)
            if folder == self.root.resolve():
                break

    def _read_if_whole(self, prefix: str) -> dict[str, bytes] | None:
        try:
            return self.get(prefix)
        except Damaged:
            return None

    def tidy(self, *, older_than_seconds: float) -> int:
        count = 0
        for folder in self.root.glob(f"{_WRITING}*"):
            try:
                age = time.time() - max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            except FileNotFoundError:
                continue  # renamed into place just now
            if age > older_than_seconds:
                shutil.rmtree(folder, ignore_errors=True)
                count += 1
        return count

    def _folder(self, prefix: str) -> Path:
        folder = (self.root / prefix).resolve()
        assert self.root.resolve() in folder.parents, prefix
        return folder


def size_of(prefix: str, name: str, entries: dict[str, Entry]) -> int:
    """Damaged if the manifest names no such file."""
    if name not in entries:
        raise Damaged(f"{prefix}: it has no file {name}")
    return entries[name].size_bytes


def _written(path: Path, pieces: Iterator[Body]) -> Iterator[Body]:
    """The same pieces, each once it was written; all are on disk at the end."""
    with open(path, "wb") as file:
        for piece in pieces:
            file.write(piece)
            yield piece
        file.flush()
        os.fsync(file.fileno())


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while piece := file.read(_PIECE_BYTES):
            yield piece


@contextmanager
def _damage_told(prefix: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise Damaged(f"{prefix}: {Path(error.filename).name} is missing") from None
    except OSError as error:
        # The rest may pass: too many open files, a network file system that does not answer.
        if error.errno not in (errno.EISDIR, errno.ENOTDIR, errno.ELOOP):
            raise
        raise Damaged(f"{prefix}: {Path(error.filename).name} cannot be read: {error.strerror}") from None


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_store(
    url: str,
    *,
    endpoint: str = "",
    region: str = "",
    encryption: str = "",
    kms_key: str = "",
    public_endpoint: str = "",
) -> ObjectStore:
    """The store at `url`: a local directory, or s3://bucket/prefix, where the other arguments count."""
    if not url.startswith("s3://"):
        return DirectoryStore(Path(url))
    from tinsmith_api.journal.s3 import S3Store

    return S3Store(
        url,
        endpoint=endpoint,
        region=region,
        encryption=encryption,
        kms_key=kms_key,
        public_endpoint=public_endpoint,
    )
