"""Where shards, labels and runs lie: the few file operations that they need, all by address string.

A path or `file://` address is a local file. Any other scheme is a remote store: Arrow's own clients serve s3, gs, hdfs
and abfs, fsspec all it knows (memory, sftp, hf, ...; some schemes need their package). A remote address may end in
Arrow's query, which holds for every name inside it:

    s3://bucket/voc/train?endpoint_override=127.0.0.1:9000&scheme=http&region=us-east-1

Names are taken as they are, nothing is percent-decoded. Keys and secrets belong in the store's own environment variables
(AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, ...): an address appears in messages and logs.
"""

import errno
import functools
import io
import json
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, BinaryIO, TypeVar, cast

import fsspec.core
import pyarrow
import pyarrow.fs

PARTIAL_SUFFIX = ".partial"
RETRY_PAUSE_S = 1.0
BLOCK_BYTES = 16 * 2**20
_ATTEMPTS, _PAUSE_GROWS = 3, 4.0
_BLOCKS_KEPT = 2
_SPOOL_BYTES = 64 * 2**20  # a longer file waits for its upload in the folder of temporary files (TMPDIR)
_COPY_BYTES = 2**20
_ARROW_SCHEMES = ("s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss")
_ATOMIC_PUT = ("s3", "gcs", "abfs")  # an object appears when its upload is complete

logger = logging.getLogger(__name__)

T = TypeVar("T")


class StoreError(OSError, ValueError):
    """A remote store that cannot be used: unknown scheme, missing package, no connection, no permission.

    The message names the address. It is a ValueError because the address or its settings are at fault as a rule, and an
    OSError because a reader takes it for what a broken disk would be.
    """


def is_local(address: str) -> bool:
    """Tell whether an address is a local path."""
    return "://" not in address or address.startswith("file://")


def local_path(address: str) -> str:
    """Return the local path behind an address.

    Raises:
        ValueError: the address names a remote store.
    """
    if not is_local(address):
        raise ValueError(f"{address!r} is a remote address; a local path is needed here")
    return address.removeprefix("file://")


def absolute(address: str) -> str:
    """Return the address with its meaning in any working directory; a remote one as it is."""
    return os.path.realpath(local_path(address)) if is_local(address) else address


def join(root: str, name: str) -> str:
    """Return the address of `name` inside the folder `root`; the query of a remote address stays at the end."""
    if is_local(root):
        return root.rstrip("/") + "/" + name if root not in ("", "/") else root + name
    folder, mark, query = root.partition("?")
    return (folder if folder.endswith("://") else folder.rstrip("/") + "/") + name + mark + query


def beside(address: str, suffix: str) -> str:
    """Return the address whose last name is that of `address` with `suffix` behind it."""
    if is_local(address):
        return address.rstrip("/") + suffix
    folder, mark, query = address.partition("?")
    return folder.rstrip("/") + suffix + mark + query


def base_name(address: str) -> str:
    """Return the last part of an address, without a remote address's query."""
    return (address if is_local(address) else address.partition("?")[0]).rstrip("/").rsplit("/", 1)[-1]


def exists(address: str) -> bool:
    """Tell whether a file or folder is there."""
    if is_local(address):
        return os.path.exists(local_path(address))
    return _with_retry(address, lambda: _info(address)).type != pyarrow.fs.FileType.NotFound


def size_bytes(address: str) -> int:
    """Return the size of a file in bytes."""
    if is_local(address):
        return os.path.getsize(local_path(address))
    info = _info(address)
    if info.type != pyarrow.fs.FileType.File:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), address)
    return info.size


def list_names(folder: str) -> list[str]:
    """Return the sorted names of what a folder holds. A remote folder that is not there holds nothing."""
    if is_local(folder):
        return sorted(os.listdir(local_path(folder)))
    return _with_retry(folder, lambda: _list_remote(folder))


def make_folder(folder: str) -> None:
    """Create a folder and its parents; fine if it is there already. A bucket is not created."""
    if is_local(folder):
        os.makedirs(local_path(folder), exist_ok=True)
        return
    with _store(folder) as (filesystem, path):
        filesystem.create_dir(path, recursive=True)


def remove(address: str) -> None:
    """Delete a file if it is there."""
    if not exists(address):
        return
    if is_local(address):
        os.remove(local_path(address))
        return
    with _store(address) as (filesystem, path):
        filesystem.delete_file(path)


def remove_tree(folder: str) -> None:
    """Delete a file, or a folder with all that it holds, if it is there."""
    if not exists(folder):
        return
    if is_local(folder):
        path = local_path(folder)
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
        return
    with _store(folder) as (filesystem, path):
        is_folder = filesystem.get_file_info(path).type == pyarrow.fs.FileType.Directory
        filesystem.delete_dir(path) if is_folder else filesystem.delete_file(path)


def open_read(address: str) -> BinaryIO:
    """Open a file for reading bytes; it can seek. A remote one is fetched in blocks of 16 MiB as they are needed."""
    if is_local(address):
        return cast(BinaryIO, open(local_path(address), "rb"))
    return cast(BinaryIO, io.BufferedReader(_RemoteFile(address), 2**16))


def read_bytes(address: str) -> bytes:
    """Return the whole content of a file."""
    with open_read(address) as file:
        return file.read()


def read_json(address: str) -> Any:
    """Read a JSON file; a ValueError names it if it is broken."""
    data = read_bytes(address)
    try:
        return json.loads(data)
    except ValueError as error:
        raise ValueError(f"{address} is not valid JSON: {error}") from error


def write_json(address: str, document: dict[str, Any]) -> None:
    """Write a JSON file atomically; the same document gives the same bytes."""
    data = (json.dumps(document, sort_keys=True, indent=1) + "\n").encode()
    write_atomic(address, lambda file: file.write(data))


def write_atomic(address: str, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that it is either complete under its name or not there.

    Local: temporary name, fsync, rename. Remote: `write` fills a temporary file of this machine first, so that its
    failure reaches no store; then the whole is uploaded, to its name where a store shows objects only when they are
    complete (s3, gs, abfs), else to a temporary name that is moved.

    Temporary names are hidden and unique, so that two attempts at the same file cannot mix their bytes. A killed
    attempt leaves a `*.partial` file behind, which nobody reads.
    """
    if is_local(address):
        _write_local(local_path(address), write)
        return
    with ExitStack() as on_failure:
        spool = cast(BinaryIO, on_failure.enter_context(tempfile.SpooledTemporaryFile(_SPOOL_BYTES)))
        write(spool)
        on_failure.pop_all()
    # A stop signal raises in the main thread. There it would close the upload half way, and stores take a closed upload
    # for a complete one: so a thread uploads, owns the content, and is waited for.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(_put_and_close, address, spool).result()


def _partial_name(name: str) -> str:
    return f".{name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}"


def _write_local(path: str, write: Callable[[BinaryIO], object]) -> None:
    folder, name = os.path.split(path)
    partial = os.path.join(folder, _partial_name(name))
    try:
        with open(partial, "xb") as file:
            write(cast(BinaryIO, file))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        if os.path.exists(partial):
            os.remove(partial)
        raise
    sync_folder(folder or ".")


def sync_folder(folder: str) -> None:
    """Make the rename itself survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put_and_close(address: str, content: BinaryIO) -> None:
    with content:
        _with_retry(address, lambda: _put(address, content))


def _put(address: str, content: BinaryIO) -> None:
    with _store(address) as (filesystem, path):
        folder, _, name = path.rpartition("/")
        target = path if filesystem.type_name in _ATOMIC_PUT else f"{folder}/{_partial_name(name)}"
        try:
            _upload(filesystem, target, content)
            if target != path:
                if filesystem.get_file_info(path).type == pyarrow.fs.FileType.File:
                    filesystem.delete_file(path)  # hdfs moves onto no existing file
                filesystem.move(target, path)
        except OSError:
            if target != path:
                with suppress(OSError):
                    filesystem.delete_file(target)
            raise


def _upload(filesystem: pyarrow.fs.FileSystem, path: str, content: BinaryIO) -> None:
    num_bytes = content.seek(0, os.SEEK_END)
    content.seek(0)
    with filesystem.open_output_stream(path) as stream:
        shutil.copyfileobj(content, stream, _COPY_BYTES)
    stored = filesystem.get_file_info(path)
    if stored.type != pyarrow.fs.FileType.File or stored.size != num_bytes:
        raise OSError(f"{num_bytes} bytes were sent, the store holds {stored.size}")


class _RemoteFile(io.RawIOBase):
    """A remote file, fetched in whole blocks: tarfile's and parquet's many small reads become few requests.

    The last two blocks stay, because a tar reader walks over the headers of a sample and then goes back for its bytes.
    """

    def __init__(self, address: str) -> None:
        self._address, self._position = address, 0
        self._blocks: dict[int, bytes] = {}
        self._file = _with_retry(address, self._open)
        self._size = self._file.size()

    def _open(self) -> Any:
        with _store(self._address) as (filesystem, path):
            return filesystem.open_input_file(path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence])
        return self._position

    def readinto(self, buffer: Any) -> int:
        number, start = divmod(self._position, BLOCK_BYTES)
        if self._position >= self._size:
            return 0
        if number not in self._blocks:
            if len(self._blocks) == _BLOCKS_KEPT:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[number] = self._fetch(number * BLOCK_BYTES, BLOCK_BYTES)
        part = memoryview(self._blocks[number])[start : start + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def readall(self) -> bytes:
        """The rest, in one request."""
        data = self._fetch(self._position, self._size) if self._position < self._size else b""
        self._position += len(data)
        return data

    def close(self) -> None:
        if not self.closed:
            self._blocks.clear()
            with suppress(AttributeError):  # a file that could not be opened has none
                self._file.close()
        super().close()

    def _fetch(self, offset: int, num_bytes: int) -> bytes:
        return _with_retry(self._address, lambda: self._fetch_once(offset, min(num_bytes, self._size - offset)))

    def _fetch_once(self, offset: int, num_bytes: int) -> bytes:
        with _store(self._address):
            if self._file.closed:
                self._file = self._open()
            try:
                data = self._file.read_at(num_bytes, offset)
                if len(data) != num_bytes:
                    raise OSError(f"{len(data)} of {num_bytes} bytes came from offset {offset}")
            except OSError:
                self._file.close()
                raise
            return data


def _with_retry(address: str, action: Callable[[], T]) -> T:
    """Do it, and up to twice more, after a pause of 1 s and one of 4 s, if the store failed.

    The clients repeat single requests themselves (Arrow's s3 for about 6 s; see each fsspec package); this is for what
    broke down beyond that.
    """
    for attempt in range(_ATTEMPTS - 1):
        pause_s = RETRY_PAUSE_S * _PAUSE_GROWS**attempt
        try:
            return action()
        except OSError as error:
            if isinstance(error, FileNotFoundError) or not isinstance(error.__cause__, OSError):
                raise  # a wrong address or a missing package stays what it is
            logger.warning("%s; once more in %.0f s", error, pause_s)
        time.sleep(pause_s)
    return action()


def _info(address: str) -> pyarrow.fs.FileInfo:
    with _store(address) as (filesystem, path):
        return filesystem.get_file_info(path)


def _list_remote(folder: str) -> list[str]:
    with _store(folder) as (filesystem, path):
        found = filesystem.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in found)


@contextmanager
def _store(address: str) -> Iterator[tuple[pyarrow.fs.FileSystem, str]]:
    """The file system behind a remote address and the path in it; what goes wrong inside names the address."""
    try:
        yield _find(address)
    except StoreError:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), address) from error
    except (OSError, pyarrow.ArrowInvalid) as error:
        reason = str(error).partition("\n")[0]
        raise StoreError(
            f"{address} cannot be used: {reason}; check the address and its query (endpoint_override, scheme, region), "
            "that the store can be reached from this machine, and the credentials"
        ) from error


def _find(address: str) -> tuple[pyarrow.fs.FileSystem, str]:
    scheme, _, rest = address.partition("://")
    if scheme in _ARROW_SCHEMES:
        location, mark, query = rest.partition("?")
        authority, _, path = location.partition("/")
        with suppress(NotImplementedError):  # a build of Arrow without this store
            filesystem, root = _arrow_filesystem(f"{scheme}://{authority}/{mark}{query}", os.getpid())
            return filesystem, f"{root.rstrip('/')}/{path}".rstrip("/")
    try:
        found, path = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise StoreError(
            f"{address}: neither Arrow nor fsspec serves {scheme}:// here ({error}); install the fsspec package of this "
            "store, or use a local path or another store"
        ) from error
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(found)), path.rstrip("/") or path


@functools.lru_cache(maxsize=64)
def _arrow_filesystem(root: str, process: int) -> tuple[pyarrow.fs.FileSystem, str]:
    """One client for a bucket or host and its query; a forked process makes its own, connections do not survive."""
    return pyarrow.fs.FileSystem.from_uri(root)
