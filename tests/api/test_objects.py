"""The object store: a directory, a lenient S3 and a strict one keep the same promises, on good days and bad ones."""

import errno
import functools
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import boto3
import httpx
import pytest
from botocore.config import Config

from tests.servers import Moto, wait_until
from tests.servers_s3 import Flaky, Swift
from tinsmith_api.journal import s3
from tinsmith_api.journal.objects import Damaged, DirectoryStore, ObjectStore, Unavailable, open_store

SMALL = {"x": b"1", "y": b"22", "empty": b""}
# More than one part of an upload, and not a whole number of them.
LARGE = {"small": b"1", "large": bytes(range(256)) * (77 << 10) + b"end", "medium": b"2" * 100_000}

_numbers = itertools.count()


class Place(Protocol):
    """One of the stores, and the bytes in it as somebody sees them who does not go through it."""

    url: str
    endpoint: str

    def names(self) -> list[str]: ...
    def write(self, name: str, body: bytes) -> None: ...
    def remove(self, name: str) -> None: ...


class Directory:
    endpoint = ""

    def __init__(self, folder: Path) -> None:
        self.url, self._folder = str(folder), folder

    def names(self) -> list[str]:
        return sorted(str(p.relative_to(self._folder)) for p in self._folder.rglob("*") if p.is_file())

    def write(self, name: str, body: bytes) -> None:
        self._found(name).write_bytes(body)

    def remove(self, name: str) -> None:
        self._found(name).unlink()

    def _found(self, name: str) -> Path:
        [found] = self._folder.rglob(name)
        return found


class Bucket:
    def __init__(self, endpoint: str) -> None:
        self.endpoint, self._root = endpoint, f"root-{next(_numbers)}"
        self.url = f"s3://bucket/{self._root}"
        self.client = _with_bucket(endpoint)

    def names(self) -> list[str]:
        listed = self.client.list_objects_v2(Bucket="bucket", Prefix=f"{self._root}/")
        return sorted(entry["Key"].removeprefix(f"{self._root}/") for entry in listed.get("Contents", ()))

    def write(self, name: str, body: bytes) -> None:
        self.client.put_object(Bucket="bucket", Key=self.key(name), Body=body)

    def remove(self, name: str) -> None:
        self.client.delete_object(Bucket="bucket", Key=self.key(name))

    def key(self, name: str) -> str:
        [found] = [key for key in self.names() if key.endswith(f"/{name}")]
        return f"{self._root}/{found}"


@functools.cache  # a client takes half a second to make
def _with_bucket(endpoint: str) -> Any:
    s3.make_bucket("s3://bucket", endpoint=endpoint)
    s3.make_bucket("s3://bucket", endpoint=endpoint)  # done once, it is done
    config = Config(request_checksum_calculation="when_required")
    return boto3.session.Session().client("s3", endpoint_url=endpoint, config=config)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Moto | Swift]]:
    """By name, started when first asked for."""
    running: dict[str, Moto | Swift] = {}

    def start(name: str) -> Moto | Swift:
        if name not in running:
            running[name] = {"moto": Moto, "swift": Swift}[name](tmp_path_factory.mktemp(name))
        return running[name]

    yield start
    for server in running.values():
        server.stop()


@pytest.fixture(params=["moto", "swift"])
def server(
    request: pytest.FixtureRequest, servers: Callable[[str], Moto | Swift], monkeypatch: pytest.MonkeyPatch
) -> Moto | Swift:
    server = servers(request.param)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture
def bucket(server: Moto | Swift) -> Bucket:
    return Bucket(server.url)


@pytest.fixture
def flaky(server: Moto | Swift) -> Iterator[Flaky]:
    between = Flaky(server.url)
    yield between
    between.stop()


@pytest.fixture
def through(bucket: Bucket, flaky: Flaky) -> ObjectStore:
    """The bucket's store, reached through `flaky`."""
    return open_store(bucket.url, endpoint=flaky.url)


@pytest.fixture(params=["directory", "moto", "swift"])
def place(
    request: pytest.FixtureRequest,
    servers: Callable[[str], Moto | Swift],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Place:
    if request.param == "directory":
        return Directory(tmp_path / "store")
    server = servers(request.param)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return Bucket(server.url)


@pytest.fixture
def store(place: Place) -> ObjectStore:
    return open_store(place.url, endpoint=place.endpoint)


# -- what every store promises -------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [SMALL, LARGE, {}], ids=["small", "large", "none"])
def test_what_was_put_is_got_until_it_is_deleted(
    place: Place, store: ObjectStore, files: dict[str, bytes]
) -> None:
    assert store.put("t/a", files) == sum(map(len, files.values()))
    assert store.get("t/a") == files
    assert open_store(place.url, endpoint=place.endpoint).get("t/a") == files
    store.delete("t/a")
    with pytest.raises(Damaged, match=r"t/a: manifest\.json is missing"):
        store.get("t/a")
    assert place.names() == []
    store.delete("t/a")


def test_a_file_that_comes_in_pieces_is_put_like_any_other(store: ObjectStore) -> None:
    pieces = [LARGE["large"][start : start + 70_001] for start in range(0, len(LARGE["large"]), 70_001)]
    assert store.put_stream("made", {"one": lambda: iter(pieces)}) == len(LARGE["large"])
    assert store.get("made") == {"one": LARGE["large"]}
    assert store.entries("made")["one"].size_bytes == len(LARGE["large"])
    assert store.put_stream("made", {"one": lambda: iter([b"another"])}) == len(LARGE["large"]), (
        "the first stays"
    )
    assert store.put_stream("nothing", {"one": lambda: iter([])}) == 0


def test_links_open_every_file_for_a_while_and_no_other(
    store: ObjectStore, place: Place, request: pytest.FixtureRequest
) -> None:
    store.put("a/b", SMALL)
    store.put("a/c", {"x": b"other"})
    links = store.links("a/b", 60)
    assert links.keys() == SMALL.keys()
    for name, body in SMALL.items():
        size_bytes, pieces = store.stream("a/b", name)
        assert (size_bytes, b"".join(pieces)) == (len(body), body)
    for name in ("manifest.json", "../c/x", "nothing"):
        with pytest.raises(Damaged):
            store.stream("a/b", name)
    with pytest.raises(Damaged):
        store.stream("a/none", "x")
    assert set(links.values()) == {""}, "nobody said that clients reach it"
    if place.endpoint:
        store = open_store(place.url, endpoint=place.endpoint, public_endpoint=place.endpoint)
        links = store.links("a/b", 60)
        for name, link in links.items():
            assert httpx.get(link).content == SMALL[name]
        if "swift" in request.node.name:  # moto looks at no signature
            assert httpx.get(links["x"].replace("/a/b/", "/a/c/")).status_code == 403
            assert httpx.get(links["x"].split("?")[0]).status_code in (400, 403)
            early = store.links("a/b", 1)["x"]
            time.sleep(2.1)
            assert httpx.get(early).status_code == 403
    with pytest.raises(Damaged):
        store.links("a/none", 60)


def test_links_lead_where_clients_reach_the_store(server: Moto | Swift, bucket: Bucket) -> None:
    outside = server.url.replace("127.0.0.1", "localhost")
    store = open_store(bucket.url, endpoint=server.url, public_endpoint=outside)
    store.put("a", {"x": b"1"})
    (link,) = store.links("a", 60).values()
    assert link.startswith(outside)
    assert httpx.get(link).content == b"1"


def test_prefixes_that_begin_alike_are_apart(store: ObjectStore) -> None:
    for prefix in ("tenant/a", "tenant/ab", "tenant2/a"):
        store.put(prefix, {"x": prefix.encode()})
    store.delete("tenant/a")
    with pytest.raises(Damaged):
        store.get("tenant/a")
    for prefix in ("tenant/ab", "tenant2/a"):
        assert store.get(prefix) == {"x": prefix.encode()}


def test_a_prefix_cannot_leave_the_store(store: ObjectStore) -> None:
    for prefix in ("../out", "", "a/../.."):
        with pytest.raises(AssertionError):
            store.put(prefix, {"x": b""})


@pytest.mark.parametrize(
    "damage",
    [
        lambda place: place.write("y", b"2x"),
        lambda place: place.write("y", b"2"),
        lambda place: place.remove("y"),
        lambda place: place.remove("manifest.json"),
        lambda place: place.write("manifest.json", b"{ torn"),
        lambda place: place.write("manifest.json", b"\xff\xfe\xff"),
        lambda place: place.write("manifest.json", b"[]"),
    ],
    ids=["other bytes", "cut", "gone", "no manifest", "torn manifest", "no text", "no manifest's form"],
)
def test_a_folder_that_does_not_match_its_manifest_is_damaged(
    place: Place, store: ObjectStore, damage: Callable[[Place], None]
) -> None:
    store.put("a/b", SMALL)
    damage(place)
    with pytest.raises(Damaged, match=r"a/b: .* (does not match|is missing|does not list)"):
        store.get("a/b")


@pytest.mark.parametrize("manifest", [b"", b"{ torn"], ids=["gone", "torn"])
def test_a_folder_without_a_true_manifest_may_be_put_again(
    place: Place, store: ObjectStore, manifest: bytes
) -> None:
    store.put("a/b", SMALL)
    if manifest:
        place.write("manifest.json", manifest)
    else:
        place.remove("manifest.json")
    store.put("a/b", SMALL)
    assert store.get("a/b") == SMALL


def test_a_save_that_is_whole_stays_as_it_is_whoever_executes_it_again(
    place: Place, store: ObjectStore
) -> None:
    store.put("a/b", {"x": b"1", "y": b"2"})
    names = place.names()
    for again in ({"x": b"1", "y": b"2"}, {"x": b"other bits", "y": b"2"}):
        assert store.put("a/b", again) == 2
        assert store.get("a/b") == {"x": b"1", "y": b"2"}
    assert place.names() == names, "nothing is left over"


# -- a directory ---------------------------------------------------------------------------------------------


def _write_manifest(folder: Path, content: object) -> None:
    (folder / "manifest.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "manifest.json").write_bytes(b"{ torn"),
        lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\xff"),
        lambda f: _write_manifest(f, {}),
        lambda f: _write_manifest(f, []),
        lambda f: _write_manifest(f, {"files": ["x"]}),
        lambda f: _write_manifest(f, {"files": {"x": {"bytes": 1}}}),
        lambda f: _write_manifest(f, {"files": {"x\0": {"sha256": ""}}}),
        lambda f: ((f / "x").unlink(), (f / "x").mkdir()),
        lambda f: ((f / "x").unlink(), (f / "x").symlink_to(f / "x")),
    ],
)
def test_whatever_is_wrong_with_a_folder_it_is_damaged(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    store = DirectoryStore(tmp_path)
    store.put("a/b", {"x": b"1"})
    damage(tmp_path / "a/b")
    with pytest.raises(Damaged, match=r"a/b: .* (cannot be read|does not list)"):
        store.get("a/b")
    store.put("a/b", {"x": b"1"})
    assert store.get("a/b") == {"x": b"1"}, "a save may be written again"


def test_files_that_cannot_be_read_for_now_are_not_called_damaged(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    store.put("a/b", SMALL)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, before[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            store.get("a/b")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert store.get("a/b") == SMALL


def test_what_a_crash_left_half_written_is_swept_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    two_hours_ago = time.time() - 7200
    for name in (".writing-old", ".writing-slow", ".writing-new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_bytes(b"1")
        os.utime(tmp_path / name, (two_hours_ago, two_hours_ago))
    os.utime(tmp_path / ".writing-old" / "x", (two_hours_ago, two_hours_ago))
    os.utime(tmp_path / ".writing-new")
    DirectoryStore(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".writing-new", ".writing-slow"]


# -- S3 on bad days ------------------------------------------------------------------------------------------


def test_a_server_that_answers_503_three_times_is_asked_again(through: ObjectStore, flaky: Flaky) -> None:
    for call in (
        lambda: through.put("a/b", LARGE),
        lambda: through.get("a/b"),
        lambda: through.delete("a/b"),
    ):
        flaky.fail_next = 3
        call()
        assert flaky.fail_next == 0


def test_an_answer_that_breaks_off_is_asked_for_again(through: ObjectStore, flaky: Flaky) -> None:
    through.put("a/b", LARGE)
    flaky.cut_next = 3
    assert through.get("a/b") == LARGE
    assert flaky.cut_next == 0


def test_a_slow_server_is_waited_for(through: ObjectStore, flaky: Flaky) -> None:
    flaky.delay_seconds = 0.3
    through.put("a/b", SMALL)
    assert through.get("a/b") == SMALL


def test_a_server_that_stays_away_is_unavailable_and_not_damaged(through: ObjectStore, flaky: Flaky) -> None:
    through.put("a/b", SMALL)
    flaky.failing = True
    for call in (
        lambda: through.get("a/b"),
        lambda: through.put("a/c", SMALL),
        lambda: through.delete("a/b"),
    ):
        with pytest.raises(Unavailable, match=r"a/[bc] cannot be (read|written|deleted)"):
            call()
    flaky.failing = False
    assert through.get("a/b") == SMALL


@pytest.mark.parametrize("cut_at", ["/x", "/y", "/manifest.json"])
def test_a_put_that_is_cut_shows_nothing_and_succeeds_when_tried_again(
    through: ObjectStore, bucket: Bucket, flaky: Flaky, cut_at: str
) -> None:
    flaky.only = lambda line: line.startswith("PUT") and line.split("?")[0].split()[1].endswith(cut_at)
    flaky.failing = True
    with pytest.raises(Unavailable):
        through.put("a/b", SMALL)
    assert bucket.names(), "some of it was written"
    with pytest.raises(Damaged, match=r"manifest\.json is missing"):
        through.get("a/b")
    flaky.failing = False
    through.put("a/b", SMALL)
    assert through.get("a/b") == SMALL


def test_a_process_killed_while_it_puts_leaves_nothing_to_be_read(bucket: Bucket, flaky: Flaky) -> None:
    flaky.only = lambda line: line.startswith("PUT") and "/large" in line
    flaky.delay_seconds = 60
    program = (
        "from tests.api.test_objects import LARGE, open_store\n"
        f"open_store({bucket.url!r}, endpoint={flaky.url!r}).put('a/b', LARGE)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[2])
    wait_until(lambda: any("PUT" in line and "/large" in line for line in flaky.lines()))
    wait_until(lambda: len(bucket.names()) == 2, what="the other two files")
    process.send_signal(signal.SIGKILL)
    process.wait()
    survivor = open_store(bucket.url, endpoint=bucket.endpoint)
    with pytest.raises(Damaged):
        survivor.get("a/b")
    survivor.put("a/b", LARGE)
    assert survivor.get("a/b") == LARGE
    survivor.delete("a/b")
    assert bucket.names() == []


@pytest.mark.parametrize("stopped_at", ["/x", "/manifest.json"])
def test_a_put_that_wakes_up_late_never_mixes_with_its_successor_s(
    through: ObjectStore, bucket: Bucket, flaky: Flaky, stopped_at: str
) -> None:
    mine, theirs = {"x": b"mine", "y": b"of mine"}, {"x": b"theirs", "y": b"of theirs"}
    flaky.only = lambda line: line.startswith("PUT") and line.split()[1].endswith(stopped_at)
    flaky.delay_seconds = 60
    late = threading.Thread(target=through.put, args=("a/b", mine))
    late.start()
    wait_until(lambda: any(map(flaky.only, flaky.lines())))
    successor = open_store(bucket.url, endpoint=bucket.endpoint)
    successor.put("a/b", theirs)
    assert successor.get("a/b") == theirs
    flaky.delay_seconds = 0
    late.join()
    # Stopped in the very request that writes the manifest, it is the later of two whole ones.
    assert successor.get("a/b") == (mine if stopped_at == "/manifest.json" else theirs)


def test_a_bucket_that_vanishes_is_no_proof_that_its_objects_are_gone(server: Moto | Swift) -> None:
    s3.make_bucket("s3://vanishing", endpoint=server.url)
    store = open_store("s3://vanishing", endpoint=server.url)
    _with_bucket(server.url).delete_bucket(Bucket="vanishing")
    with pytest.raises(Unavailable, match="NoSuchBucket"):
        store.get("a/b")


# -- S3: what is asked of the server -------------------------------------------------------------------------


def test_large_files_go_in_parts_and_small_ones_in_one_request(through: ObjectStore, flaky: Flaky) -> None:
    through.put("a/b", LARGE)
    puts = [line for line in flaky.lines() if line.startswith("PUT")]
    assert len([line for line in puts if "/large?" in line and "partNumber=" in line]) == 3
    assert len([line for line in puts if "/small " in line]) == 1
    assert "/manifest.json " in puts[-1]


def test_uploads_of_writers_that_died_are_ended_and_those_under_way_are_not(
    server: Moto | Swift, bucket: Bucket
) -> None:
    store = open_store(bucket.url, endpoint=bucket.endpoint)
    client, root = bucket.client, bucket.url.removeprefix("s3://bucket/")
    elsewhere = client.create_multipart_upload(Bucket="bucket", Key=f"{root}x/not/ours")["UploadId"]
    left = client.create_multipart_upload(Bucket="bucket", Key=f"{root}/a/b/digest/large")["UploadId"]

    def unfinished() -> set[str]:
        listed = client.list_multipart_uploads(Bucket="bucket", Prefix=root).get("Uploads", ())
        return {upload["UploadId"] for upload in listed}

    if isinstance(server, Swift):  # moto says of every upload that it began in 2010
        assert store.tidy(older_than_seconds=3600) == 0
    assert unfinished() == {elsewhere, left}
    # The server's clock may be ahead of ours by a moment, and counts in seconds.
    assert store.tidy(older_than_seconds=-60) == 1
    assert unfinished() == {elsewhere}
    assert store.tidy(older_than_seconds=-60) == 0
    client.abort_multipart_upload(Bucket="bucket", Key=f"{root}x/not/ours", UploadId=elsewhere)


def test_what_cannot_be_deleted_now_is_not_called_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DirectoryStore(tmp_path)
    store.put("a/b", SMALL)

    def refuses(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", refuses)
        with pytest.raises(PermissionError):
            store.delete("a/b")
    store.delete("a/b")
    with pytest.raises(Damaged):
        store.get("a/b")
    store.delete("a/b")


@pytest.mark.parametrize(
    "given, said",
    [
        ({"encryption": "AES256"}, {"ServerSideEncryption": "AES256"}),
        (
            {"encryption": "aws:kms", "kms_key": "alias/ours"},
            {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "alias/ours"},
        ),
    ],
    ids=["AES256", "aws:kms"],
)
@pytest.mark.parametrize("server", ["moto"], indirect=True)
def test_every_file_is_encrypted_as_asked(
    bucket: Bucket, given: dict[str, str], said: dict[str, str]
) -> None:
    store = open_store(bucket.url, endpoint=bucket.endpoint, **given)
    store.put("a/b", LARGE)
    assert store.get("a/b") == LARGE
    for name in (*LARGE, "manifest.json"):
        head = bucket.client.head_object(Bucket="bucket", Key=bucket.key(name))
        assert {key: head.get(key) for key in said} == said, name


# -- S3: what is wrong is said at the start ------------------------------------------------------------------


def test_a_bucket_that_is_not_there_is_said_at_the_start(server: Moto | Swift) -> None:
    with pytest.raises(Unavailable, match="no bucket 'elsewhere': create it"):
        open_store("s3://elsewhere/p", endpoint=server.url)


@pytest.mark.parametrize("server", ["swift"], indirect=True)
def test_credentials_that_do_not_hold_are_said_at_the_start(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(Unavailable, match=r"refuses the bucket 'bucket'.*AWS_SECRET_ACCESS_KEY"):
        open_store(bucket.url, endpoint=bucket.endpoint)


def test_a_server_that_is_not_there_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in Moto.environment.items():
        monkeypatch.setenv(name, value)
    started = time.monotonic()
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:9.*check TINSMITH_S3_ENDPOINT"):
        open_store("s3://bucket", endpoint="http://127.0.0.1:9")
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    "url, given, says",
    [
        ("s3://", {}, "TINSMITH_OBJECTS must be s3://BUCKET"),
        ("s3://bucket", {"endpoint": "localhost:9000"}, "TINSMITH_S3_ENDPOINT must be an address"),
        ("s3://bucket", {"encryption": "rot13"}, "TINSMITH_S3_ENCRYPTION must be"),
        ("s3://bucket", {"kms_key": "k"}, "set both"),
        ("s3://bucket", {"encryption": "AES256", "kms_key": "k"}, "set both"),
    ],
)
def test_settings_that_cannot_be_right_are_refused(url: str, given: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        open_store(url, **given)
