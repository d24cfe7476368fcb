"""Objects in any S3: files first, their manifest last, checked by their SHA-256 on the way back.

Nothing here relies on what servers disagree about: no conditional puts, no bulk deletes, no checksums in
trailers. What a prefix stands for is decided in the journal's database, never here.
"""

from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from tinsmith_api.journal.objects import MANIFEST, Damaged, Unavailable, check, manifest_of, read_manifest

# A part of 16 MiB is sent in well under the read timeout even on a slow line.
_PART_BYTES = 16 << 20
_TRANSFER = TransferConfig(
    multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES, max_concurrency=4
)
_CONFIG = Config(
    retries={"mode": "standard", "max_attempts": 5},
    connect_timeout=5,
    read_timeout=60,
    max_pool_connections=16,
    request_checksum_calculation="when_required",
    response_checksum_validation="when_required",
    s3={"addressing_style": "path"},
)
_FILES_AT_ONCE = 4


class S3Store:
    """Keeps `objects.ObjectStore` under `s3://bucket/prefix`. Credentials: where boto3 looks for them.

    encryption: "", "AES256" or "aws:kms" (with kms_key). Whatever the server or the network has against a
    request is Unavailable, after retries; so it is at construction if the bucket cannot be reached.
    """

    def __init__(
        self, url: str, *, endpoint: str = "", region: str = "", encryption: str = "", kms_key: str = ""
    ) -> None:
        parts = urlsplit(url)
        self._bucket, self._root = parts.netloc, parts.path.strip("/")
        self._extra: dict[str, str] = {}
        if encryption:
            self._extra["ServerSideEncryption"] = encryption
        if kms_key:
            self._extra["SSEKMSKeyId"] = kms_key
        self._client: Any = boto3.client(
            "s3", endpoint_url=endpoint or None, region_name=region or "us-east-1", config=_CONFIG
        )
        self._threads = ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="s3")
        try:
            self._client.head_bucket(Bucket=self._bucket)
        except (ClientError, BotoCoreError) as error:
            raise Unavailable(
                f"the bucket {self._bucket!r} cannot be used ({error}): does it exist, and are "
                "TINSMITH_S3_ENDPOINT and the AWS_* credentials right?"
            ) from error

    def put(self, prefix: str, files: dict[str, bytes]) -> int:
        manifest = manifest_of(files)
        try:
            if self._manifest(prefix) == manifest:
                return _size(files)  # a save that is executed again after a crash
            # While files are replaced, nothing may say that they are whole.
            self._client.delete_object(Bucket=self._bucket, Key=self._key(prefix, MANIFEST))
            list(self._threads.map(lambda item: self._upload(prefix, *item), files.items()))
            self._upload(prefix, MANIFEST, manifest)
        except (ClientError, BotoCoreError, Boto3Error) as error:
            raise Unavailable(f"{prefix} cannot be written: {error}") from error
        return _size(files)

    def get(self, prefix: str) -> dict[str, bytes]:
        try:
            manifest = self._manifest(prefix)
            if manifest is None:
                raise Damaged(f"{prefix}: {MANIFEST} is missing")
            checksums = read_manifest(prefix, manifest)
            bodies = self._threads.map(lambda name: self._download(prefix, name), checksums)
            files = dict(zip(checksums, bodies, strict=True))
        except (ClientError, BotoCoreError, Boto3Error) as error:
            raise Unavailable(f"{prefix} cannot be read: {error}") from error
        check(prefix, files, checksums)
        return files

    def delete(self, prefix: str) -> None:
        """The manifest first: what is half deleted is nothing."""
        try:
            self._client.delete_object(Bucket=self._bucket, Key=self._key(prefix, MANIFEST))
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._key(prefix, "")
            )
            for page in pages:
                for entry in page.get("Contents", ()):
                    self._client.delete_object(Bucket=self._bucket, Key=entry["Key"])
        except (ClientError, BotoCoreError) as error:
            raise Unavailable(f"{prefix} cannot be deleted: {error}") from error

    def _manifest(self, prefix: str) -> bytes | None:
        """None if there is none."""
        try:
            return self._download(prefix, MANIFEST)
        except Damaged:
            return None

    def _upload(self, prefix: str, name: str, body: bytes) -> None:
        # Small bodies in one request, large ones in parts, several at a time.
        self._client.upload_fileobj(
            BytesIO(body), self._bucket, self._key(prefix, name), ExtraArgs=self._extra, Config=_TRANSFER
        )

    def _download(self, prefix: str, name: str) -> bytes:
        """Damaged if there is no such file."""
        try:
            answer = self._client.get_object(Bucket=self._bucket, Key=self._key(prefix, name))
            body: bytes = answer["Body"].read()
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                raise Damaged(f"{prefix}: {name} is missing") from None
            raise
        return body

    def _key(self, prefix: str, name: str) -> str:
        parts = prefix.split("/")
        assert all(part not in ("", ".", "..") for part in parts), prefix
        return "/".join([*filter(None, [self._root]), *parts, name])


def make_bucket(url: str, *, endpoint: str = "", region: str = "") -> None:
    """For a server of one's own, before its first use; nothing if the bucket is there."""
    client: Any = boto3.client(
        "s3", endpoint_url=endpoint or None, region_name=region or "us-east-1", config=_CONFIG
    )
    try:
        client.create_bucket(Bucket=urlsplit(url).netloc)
    except (ClientError, BotoCoreError) as error:
        there = ("BucketAlreadyOwnedByYou", "BucketAlreadyExists")
        if not isinstance(error, ClientError) or error.response["Error"]["Code"] not in there:
            raise Unavailable(f"the bucket of {url} cannot be made: {error}") from error


def _size(files: dict[str, bytes]) -> int:
    return sum(len(body) for body in files.values())
