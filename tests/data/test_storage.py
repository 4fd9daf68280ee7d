"""One contract for every kind of address; what a remote store adds: queries, blocks, broken connections."""

import importlib.util
import io
import os
import random
import re
import signal
import socket
import tarfile
import time
import uuid

import pyarrow.fs
import pytest

from dfa.data import storage
from dfa.data.shards import BrokenShardError, read_shard
from tests.data.object_store import BUCKET, DisturbedWay, address, object_store


@pytest.fixture(scope="module")
def port():
    with object_store() as port:
        yield port


@pytest.fixture
def way(port, monkeypatch):
    monkeypatch.setattr(storage, "RETRY_PAUSE_S", 0.0)
    way = DisturbedWay(port)
    yield way
    way.close()


@pytest.fixture(params=["path", "file", "memory", "s3"])
def root(request, tmp_path):
    """A folder that is not there yet, by each kind of address."""
    name = uuid.uuid4().hex
    if request.param == "s3":
        return address(request.getfixturevalue("port"), name)
    return {"path": f"{tmp_path}/{name}", "file": f"file://{tmp_path}/{name}", "memory": f"memory://{name}"}[
        request.param
    ]


def put(place, data):
    storage.write_atomic(place, lambda file: file.write(data))
    return place


# One contract


def test_a_folder_is_made_listed_and_found(root):
    assert not storage.exists(root)
    inner = storage.join(root, "inner")
    for _ in range(2):
        storage.make_folder(inner)
    assert storage.exists(root) and storage.exists(inner) and storage.list_names(inner) == []
    for name in ("b.json", "a.tar"):
        put(storage.join(root, name), name.encode())
    assert storage.list_names(root) == ["a.tar", "b.json", "inner"]


def test_what_is_written_is_read_and_replaced_and_removed(root):
    storage.make_folder(root)
    place = storage.join(root, "a file, 100%20 plain.bin")
    for data in (b"first content", b"", os.urandom(70_000)):
        put(place, data)
        assert storage.exists(place) and storage.size_bytes(place) == len(data)
        assert storage.read_bytes(place) == data
        assert storage.list_names(root) == ["a file, 100%20 plain.bin"]
    for _ in range(2):
        storage.remove(place)
    assert not storage.exists(place) and storage.list_names(root) == []


def test_a_read_can_seek_like_any_file(root):
    storage.make_folder(root)
    data = os.urandom(5000)
    with storage.open_read(put(storage.join(root, "x"), data)) as file:
        assert file.seekable() and file.read(10) == data[:10] and file.tell() == 10
        assert file.seek(-100, os.SEEK_END) == 4900 and file.read() == data[4900:] and file.read(1) == b""
        assert file.seek(2000) == 2000 and file.seek(5, os.SEEK_CUR) == 2005 and file.read(3) == data[2005:2008]


def test_a_write_that_fails_leaves_nothing_and_keeps_what_was_there(root):
    storage.make_folder(root)
    old = put(storage.join(root, "old"), b"old")

    def fail(file):
        file.write(bytes(100_000))
        raise RuntimeError("image 7 is broken")

    for name in ("old", "new"):
        with pytest.raises(RuntimeError, match="image 7"):
            storage.write_atomic(storage.join(root, name), fail)
    assert storage.list_names(root) == ["old"] and storage.read_bytes(old) == b"old"


def test_a_folder_is_removed_with_all_that_it_holds_and_nothing_beside_it(root):
    storage.make_folder(storage.join(root, "old/inner"))
    for name in ("old/x", "old/inner/y", "older"):
        put(storage.join(root, name), b"data")
    for _ in range(2):
        storage.remove_tree(storage.join(root, "old"))
    assert storage.list_names(root) == ["older"]
    storage.remove_tree(storage.join(root, "older"))
    assert storage.list_names(root) == []


def test_what_is_not_there_is_named(root):
    missing = storage.join(root, "nothing")
    for read in (storage.read_bytes, storage.read_json, storage.size_bytes):
        with pytest.raises(FileNotFoundError, match=re.escape(missing.removeprefix("file://"))):
            read(missing)
    if not storage.is_local(root):  # stores have no empty folders
        assert storage.list_names(root) == []


def test_broken_json_is_named_and_json_is_the_same_bytes_each_time(root):
    storage.make_folder(root)
    place = storage.join(root, "x.json")
    storage.write_json(place, {"b": [1], "a": "é"})
    first = storage.read_bytes(place)
    storage.write_json(place, {"a": "é", "b": [1]})
    assert storage.read_bytes(place) == first and storage.read_json(place) == {"a": "é", "b": [1]}
    with pytest.raises(ValueError, match=r"x\.json.* is not valid JSON"):
        storage.read_json(put(place, b"{"))


# Addresses


@pytest.mark.parametrize(
    ("folder", "joined"),
    [
        ("/data/x/", "/data/x/a.tar"),
        ("x?y", "x?y/a.tar"),
        ("", "a.tar"),
        ("/", "/a.tar"),
        ("file:///data", "file:///data/a.tar"),
        ("memory://", "memory://a.tar"),
        ("s3://bucket", "s3://bucket/a.tar"),
        ("s3://bucket/x/?region=eu&scheme=http", "s3://bucket/x/a.tar?region=eu&scheme=http"),
        ("s3://bucket?ca=/etc/ca.pem", "s3://bucket/a.tar?ca=/etc/ca.pem"),
    ],
)
def test_a_name_is_joined_before_the_query_of_a_remote_address(folder, joined):
    assert storage.join(folder, "a.tar") == joined
    assert storage.base_name(joined) == "a.tar"


def test_a_local_path_is_told_from_a_remote_address():
    assert storage.local_path("file:///a/b") == "/a/b" and storage.local_path("a/b") == "a/b"
    assert storage.is_local("file:///a") and not storage.is_local("s3://a")
    with pytest.raises(ValueError, match="'s3://a/b' is a remote address"):
        storage.local_path("s3://a/b")


def test_a_store_that_nothing_here_serves_is_named():
    with pytest.raises(ValueError, match=r"nope://x/y: neither Arrow nor fsspec serves nope://"):
        storage.exists("nope://x/y")
    with pytest.raises(ValueError, match=r"s3://x/y\?colour=red cannot be used: Unexpected query parameter"):
        storage.read_bytes("s3://x/y?colour=red")
    if importlib.util.find_spec("smbprotocol") is None:
        with pytest.raises(ValueError, match=r"smb://host/x: neither.*smbprotocol.*install"):
            storage.list_names("smb://host/x")


def test_a_refused_connection_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ValueError, match=rf"ftp://127.0.0.1:{port}/x cannot be used: .*refused.*can be reached"):
        storage.exists(f"ftp://127.0.0.1:{port}/x")


def test_a_bucket_that_is_not_there_is_named(port):
    other = address(port, "x").replace(f"@{BUCKET}", "@nowhere")
    with pytest.raises(ValueError, match=r"@nowhere/x.*Bucket 'nowhere' not found"):
        storage.make_folder(other)


def test_the_endpoint_may_come_from_the_environment(port, monkeypatch):
    put(address(port, "env/x"), b"data")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    assert storage.read_bytes(f"s3://key:secret@{BUCKET}/env/x?region=us-east-1") == b"data"


# What goes over the wire


def test_arrow_alone_reads_what_was_put(port):
    data = os.urandom(100_000)
    put(address(port, "plain/x"), data)
    s3 = pyarrow.fs.S3FileSystem(
        access_key="k", secret_key="s", endpoint_override=f"127.0.0.1:{port}", scheme="http", region="us-east-1"
    )
    with s3.open_input_file(f"{BUCKET}/plain/x") as file:
        assert file.read() == data


def test_any_order_of_reads_gives_the_bytes_of_the_object(port, monkeypatch):
    monkeypatch.setattr(storage, "BLOCK_BYTES", 1000)
    data = os.urandom(3500)
    expected, rng = io.BytesIO(data), random.Random(0)
    with storage.open_read(put(address(port, "blocks/x"), data)) as file:
        for _ in range(60):
            start, length = rng.randrange(3600), rng.choice([0, 1, 512, 1500, -1])
            expected.seek(start), file.seek(start)
            assert file.read(length) == expected.read(length)
            assert file.tell() == expected.tell()


def tar_of(num_samples):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for number in range(num_samples):
            label = b'{"labels": [1], "width": 2, "height": 2}'
            for extension, data in (("jpg", os.urandom(5000)), ("json", label)):
                member = tarfile.TarInfo(f"key{number}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return content.getvalue()


def test_a_shard_is_fetched_in_whole_blocks_and_each_once(way, monkeypatch):
    data = tar_of(40)
    place = put(address(way.port, "shard.tar"), data)
    for block_bytes in (storage.BLOCK_BYTES, 40_000):
        monkeypatch.setattr(storage, "BLOCK_BYTES", block_bytes)
        way.requests.clear()
        raws = list(read_shard(place))
        assert [raw.key for raw in raws] == [f"key{number}" for number in range(40)]
        assert {raw.shard for raw in raws} == {"shard.tar"}
        gets = [line for line in way.requests if line.startswith("GET")]
        assert len(gets) == -(-len(data) // block_bytes)


def test_a_connection_that_drops_in_the_middle_of_a_read_is_repeated(way):
    data = os.urandom(2**20)
    place = put(address(way.port, "dropped"), data)
    way.cuts, way.cut_after = 1, 2**19
    assert storage.read_bytes(place) == data
    assert way.cuts == 0


def test_a_store_that_fails_once_is_asked_again(way, caplog):
    place = put(address(way.port, "once"), b"data")
    way.refuse, way.refusals = b"GET /bucket/once", 1
    way.requests.clear()
    assert storage.read_bytes(place) == b"data"
    assert [line.split()[0] for line in way.requests] == ["HEAD", "GET", "HEAD", "GET"]  # opened anew
    assert "once more in" in caplog.text
    way.refuse, way.refusals = b"GET /bucket/once", 3
    with pytest.raises(OSError, match=r"bucket/once\?.* cannot be used: .*ACCESS_DENIED"):
        storage.read_bytes(place)


def test_a_store_that_fails_in_the_middle_of_a_shard_breaks_the_shard_by_name(way, monkeypatch):
    monkeypatch.setattr(storage, "BLOCK_BYTES", 20_000)
    raws = read_shard(put(address(way.port, "middle.tar"), tar_of(20)))
    assert next(raws).key == "key0"
    way.refuse, way.refusals = b"GET /bucket/middle", 100
    with pytest.raises(BrokenShardError, match=r"middle\.tar.* cannot be read after key 'key\d+': .*ACCESS_DENIED"):
        list(raws)


def test_a_put_that_fails_in_the_middle_leaves_nothing_under_the_name(way, port):
    data = bytes(12 * 2**20)  # two parts of an upload
    way.refuse, way.refusals = b"partNumber=2", 3
    with pytest.raises(OSError, match=r"bucket/half\?.*UploadPart"):
        put(address(way.port, "half"), data)
    assert way.refusals == 0 and not storage.exists(address(port, "half"))
    way.refusals = 1
    put(address(way.port, "half"), data)
    assert storage.size_bytes(address(port, "half")) == len(data)


def test_a_stop_signal_during_a_put_leaves_no_half_object(way, port):
    class Stop(Exception):
        pass

    def stop(number, frame):
        raise Stop

    def send_signal(data):
        if b"POST /bucket/stopped?uploads" in data:
            os.kill(os.getpid(), signal.SIGUSR1)

    previous = signal.signal(signal.SIGUSR1, stop)
    try:
        way.on_request = send_signal
        with pytest.raises(Stop):
            put(address(way.port, "stopped"), b"whole")
    finally:
        signal.signal(signal.SIGUSR1, previous)
    stopped = address(port, "stopped")
    for _ in range(250):  # a signal between the thread's start and our waiting for it
        if not storage.exists(stopped):
            time.sleep(0.02)
    assert storage.read_bytes(stopped) == b"whole"


def test_a_remote_folder_that_renames_shows_no_temporary_name(monkeypatch):
    root = f"memory://{uuid.uuid4().hex}"
    storage.make_folder(root)
    place, seen = storage.join(root, "x"), []
    put(place, b"old")
    filesystem = type(storage.fsspec.core.url_to_fs(root)[0])
    move = filesystem.mv
    monkeypatch.setattr(filesystem, "mv", lambda *a, **k: (seen.append(storage.list_names(root)), move(*a, **k)))
    put(place, b"new")
    (names,) = seen
    assert [name for name in names if not name.endswith(storage.PARTIAL_SUFFIX)] == [] and len(names) == 1
    assert storage.read_bytes(place) == b"new" and storage.list_names(root) == ["x"]
