"""Objects in any S3: files first, their manifest last, checked by their SHA-256 on the way back.

The files of PREFIX lie at PREFIX/DIGEST/NAME, where DIGEST is that of the manifest, PREFIX/manifest.json. So
two attempts that differ never share a file: a manifest is true whoever else writes, and whenever
(docs/decisions/0006-objects.md).

Nothing here relies on what servers disagree about: no conditional puts, no bulk deletes, no checksums in
trailers.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from typing import Any, TypeVar
from urllib.parse import urlsplit

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from s3transfer.exceptions import RetriesExceededError

from tinsmith_api.journal.objects import (
    MANIFEST,
    Body,
    Damaged,
    Entry,
    Unavailable,
    check,
    entry_of,
    manifest_of,
    pieces_of,
    read_manifest,
    size_of,
)

_PART_BYTES = 8 << 20
_PIECE_BYTES = 1 << 20
_FILES_AT_ONCE = 4
_PARTS_AT_ONCE = 4
_TRANSFER = TransferConfig(
    multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE
)
# Callers try for minutes. An attempt of theirs ends well before, also at a server that says nothing.
_TRIES = {"mode": "standard", "total_max_attempts": 4}
_CONNECT_SECONDS = 5.0
_READ_SECONDS = 30.0

T = TypeVar("T")
Name = TypeVar("Name")


class S3Store:
    """Keeps `objects.ObjectStore` under `s3://bucket/prefix`.

    Credentials: where boto3 looks for them; they need s3:ListBucket too, else S3 says "forbidden" of what is
    merely absent. encryption: "", "AES256" or "aws:kms" (kms_key: "" is the account's own). public_endpoint:
    where clients reach the server; without it, a server at an `endpoint` of one's own gives them no links.
    At construction ValueError for settings that
    cannot be right, Unavailable if the bucket cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        endpoint: str = "",
        region: str = "",
        encryption: str = "",
        kms_key: str = "",
        public_endpoint: str = "",
    ) -> None:
        self._bucket, self._root = _parts(url)
        self._encryption = _encryption(encryption, kms_key)
        self._client = _client(endpoint, region)
        self._linking = self._client if not endpoint else None
        if public_endpoint:
            self._linking = _client(public_endpoint, region)
        try:
            self._client.head_bucket(Bucket=self._bucket)
        except (ClientError, BotoCoreError) as error:
            raise Unavailable(_advice(self._bucket, endpoint, error)) from error

    def put(self, prefix: str, files: Mapping[str, Body]) -> int:
        return self.put_stream(prefix, {name: pieces_of(body) for name, body in files.items()})

    def put_stream(self, prefix: str, files: Mapping[str, Callable[[], Iterator[Body]]]) -> int:
        with _translated(f"{prefix} cannot be written"):
            if (size_bytes := self._size_if_whole(prefix)) is not None:
                return size_bytes  # this save was executed before, up to its end
            entries = {name: entry_of(pieces()) for name, pieces in files.items()}
            manifest = manifest_of(entries)
            folder = _folder(manifest)
            self._at_once(lambda name: self._upload(self._key(prefix, folder, name), files[name]()), files)
            # While this was written slowly, as by a process that was stopped, its successor may have finished
            # the same save and said so. Its files stay.
            if (size_bytes := self._size_if_whole(prefix)) is not None:
                return size_bytes
            self._upload(self._key(prefix, MANIFEST), iter([manifest]))
        return sum(entry.size_bytes for entry in entries.values())

    def get(self, prefix: str) -> dict[str, bytes]:
        with _translated(f"{prefix} cannot be read"):
            entries, folder = self._listed(prefix)
            bodies = self._at_once(lambda name: self._download(prefix, folder, name), entries)
        files = dict(zip(entries, bodies, strict=True))
        check(prefix, files, entries)
        return files

    def entries(self, prefix: str) -> dict[str, Entry]:
        with _translated(f"{prefix} cannot be read"):
            return self._listed(prefix)[0]

    def delete(self, prefix: str) -> None:
        """The manifest first: what is half deleted is nothing."""
        with _translated(f"{prefix} cannot be deleted"):
            self._client.delete_object(Bucket=self._bucket, Key=self._key(prefix, MANIFEST))
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._key(prefix, "")
            )
            for page in pages:
                keys = [entry["Key"] for entry in page.get("Contents", ())]
                self._at_once(lambda key: self._client.delete_object(Bucket=self._bucket, Key=key), keys)

    def tidy(self, *, older_than_seconds: float) -> int:
        """Parts of uploads that nobody will complete: they are listed nowhere else, and paid for."""
        count, before = 0, time.time() - older_than_seconds
        with _translated("unfinished uploads cannot be ended"):
            try:
                for upload in self._unfinished_uploads():
                    if upload["Initiated"].timestamp() < before:
                        self._client.abort_multipart_upload(
                            Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                        )
                        count += 1
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] not in (405, 501):
                    raise
                # This server does not list them: a lifecycle rule of the bucket has to do it.
        return count

    def _unfinished_uploads(self) -> list[Any]:
        pages = self._client.get_paginator("list_multipart_uploads").paginate(
            Bucket=self._bucket, Prefix=f"{self._root}/" if self._root else ""
        )
        return [upload for page in pages for upload in page.get("Uploads", ())]

    def links(self, prefix: str, seconds: int) -> dict[str, str]:
        with _translated(f"{prefix} cannot be read"):
            entries, folder = self._listed(prefix)
            return {name: self._link(self._key(prefix, folder, name), seconds) for name in entries}

    def stream(self, prefix: str, name: str) -> tuple[int, Iterator[bytes]]:
        with _translated(f"{prefix} cannot be read"):
            entries, folder = self._listed(prefix)
            size_bytes = size_of(prefix, name, entries)
            try:
                answer = self._client.get_object(Bucket=self._bucket, Key=self._key(prefix, folder, name))
            except self._client.exceptions.NoSuchKey:
                raise Damaged(f"{prefix}: {name} is missing") from None
        return size_bytes, answer["Body"].iter_chunks(_PIECE_BYTES)

    def _link(self, key: str, seconds: int) -> str:
        if self._linking is None:
            return ""
        asked = {"Bucket": self._bucket, "Key": key}
        link: str = self._linking.generate_presigned_url("get_object", asked, ExpiresIn=seconds)
        return link

    def _listed(self, prefix: str) -> tuple[dict[str, Entry], str]:
        """(the files under `prefix`, the folder they are in); Damaged if there are none."""
        manifest = self._manifest(prefix)
        if manifest is None:
            raise Damaged(f"{prefix}: {MANIFEST} is missing")
        return read_manifest(prefix, manifest), _folder(manifest)

    def _size_if_whole(self, prefix: str) -> int | None:
        """By its manifest, which was written last."""
        manifest = self._manifest(prefix)
        try:
            entries = read_manifest(prefix, manifest or b"")
        except Damaged:
            return None
        return sum(entry.size_bytes for entry in entries.values())

    def _manifest(self, prefix: str) -> bytes | None:
        """None if there is none."""
        try:
            answer = self._client.get_object(Bucket=self._bucket, Key=self._key(prefix, MANIFEST))
        except self._client.exceptions.NoSuchKey:  # and not NoSuchBucket, after which nothing is known
            return None
        manifest: bytes = answer["Body"].read()
        return manifest

    def _upload(self, key: str, pieces: Iterator[Body]) -> None:
        body = _Stream(pieces)
        self._client.upload_fileobj(body, self._bucket, key, ExtraArgs=self._encryption, Config=_TRANSFER)

    def _download(self, prefix: str, folder: str, name: str) -> bytes:
        body = BytesIO()
        try:
            self._client.download_fileobj(
                self._bucket, self._key(prefix, folder, name), body, Config=_TRANSFER
            )
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                raise Damaged(f"{prefix}: {name} is missing") from None
            raise
        return body.getvalue()

    def _at_once(self, do: Callable[[Name], T], names: Iterable[Name]) -> list[T]:
        """All have ended on return, also where one has failed. Threads of its own: who reads a large adapter
        holds up nobody who writes a small one."""
        with ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="s3") as threads:
            return list(threads.map(do, names))

    def _key(self, prefix: str, *names: str) -> str:
        parts = prefix.split("/")
        assert all(part not in ("", ".", "..") for part in parts), prefix
        return "/".join([*filter(None, [self._root]), *parts, *names])


def make_bucket(url: str, *, endpoint: str = "", region: str = "") -> None:
    """For a server of one's own, before its first use; nothing if the bucket is there."""
    client, (bucket, _) = _client(endpoint, region), _parts(url)
    try:
        client.create_bucket(Bucket=bucket)
    except (ClientError, BotoCoreError) as error:
        code = error.response["Error"]["Code"] if isinstance(error, ClientError) else ""
        if code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
            raise Unavailable(f"the bucket {bucket!r} cannot be made: {error}") from error


class _Stream:
    """Pieces of bytes, read like a file."""

    def __init__(self, pieces: Iterator[Body]) -> None:
        self._pieces = pieces
        self._left = b""

    def read(self, size: int = -1) -> bytes:
        parts: list[Body] = [self._left]
        missing = size - len(self._left)
        while size < 0 or missing > 0:
            piece = next(self._pieces, None)
            if piece is None:
                break
            parts.append(piece)
            missing -= len(piece)
        whole = b"".join(parts)
        self._left = b"" if size < 0 else whole[size:]
        return whole if size < 0 else whole[:size]


def _client(endpoint: str, region: str) -> Any:
    config = Config(
        retries=_TRIES,
        connect_timeout=_CONNECT_SECONDS,
        read_timeout=_READ_SECONDS,
        signature_version="s3v4",  # in links too: what is encrypted with KMS is given for no other
        max_pool_connections=4 * _FILES_AT_ONCE * _PARTS_AT_ONCE,  # saves and reads go on side by side
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        # Servers of one's own rarely have a host name for every bucket.
        s3={"addressing_style": "path" if endpoint else "auto"},
    )
    try:
        # A session of its own: boto3's default one keeps the credentials it saw first, and is made unguarded.
        session = boto3.session.Session(region_name=region or None)
        return session.client("s3", endpoint_url=endpoint or None, config=config)
    except ValueError:
        raise ValueError(
            f"TINSMITH_S3_ENDPOINT must be an address such as http://host:9000, which {endpoint!r} is not"
        ) from None


def _parts(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    if not parts.netloc:
        raise ValueError(f"TINSMITH_OBJECTS must be s3://BUCKET or s3://BUCKET/PREFIX, which {url!r} is not")
    return parts.netloc, parts.path.strip("/")


def _encryption(encryption: str, kms_key: str) -> dict[str, str]:
    if encryption not in ("", "AES256", "aws:kms"):
        raise ValueError(f"TINSMITH_S3_ENCRYPTION must be AES256, aws:kms or empty, not {encryption!r}")
    if kms_key and encryption != "aws:kms":
        raise ValueError("TINSMITH_S3_KMS_KEY counts with TINSMITH_S3_ENCRYPTION=aws:kms only: set both")
    given = {"ServerSideEncryption": encryption, "SSEKMSKeyId": kms_key}
    return {name: value for name, value in given.items() if value}


def _advice(bucket: str, endpoint: str, error: Exception) -> str:
    server = endpoint or "AWS"
    status = error.response["ResponseMetadata"]["HTTPStatusCode"] if isinstance(error, ClientError) else 0
    if status == 404:
        return (
            f"{server} has no bucket {bucket!r}: create it, or name another in TINSMITH_OBJECTS "
            "(s3://BUCKET/PREFIX)"
        )
    if status in (400, 401, 403):
        return (
            f"{server} refuses the bucket {bucket!r} to these credentials (status {status}): check "
            "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and TINSMITH_S3_REGION, and that they may list it"
        )
    return f"the bucket {bucket!r} cannot be reached ({error}): check TINSMITH_S3_ENDPOINT and AWS_*"


@contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except (ClientError, BotoCoreError, Boto3Error, RetriesExceededError) as error:
        raise Unavailable(f"{what}: {error}") from error


def _folder(manifest: bytes) -> str:
    return hashlib.sha256(manifest).hexdigest()[:16]
