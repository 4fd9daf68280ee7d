"""An S3-speaking server on this machine, and a way to it that can be disturbed."""

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pyarrow.fs
import pytest

BUCKET = "bucket"


def address(port: int, folder: str) -> str:
    """The folder's s3 address behind a port of this machine; the keys are any that are not empty."""
    return f"s3://key:secret@{BUCKET}/{folder}?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"


@contextmanager
def object_store() -> Iterator[int]:
    """Serve one empty bucket; gives the port."""
    moto = pytest.importorskip("moto.server", reason="moto is not installed: no S3 server to test with")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    filesystem, _ = pyarrow.fs.FileSystem.from_uri(address(port, "") + "&allow_bucket_creation=true")
    filesystem.create_dir(BUCKET)
    yield port
    server.stop()


class DisturbedWay:
    """Forwards connections to a port, and goes wrong on request.

    Attributes:
        port: where it listens.
        requests: the first line of each request so far.
        cuts: connections that are dropped when `cut_after` bytes of answers went through, counted down.
        refuse: requests with these bytes are answered with 403, `refusals` times.
        on_request: called with each piece of a request before it is passed on.
    """

    def __init__(self, target: int) -> None:
        self._target, self._listener = target, socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.requests: list[str] = []
        self.cuts, self.cut_after = 0, 0
        self.refuse, self.refusals = b"", 0
        self.on_request: Callable[[bytes], None] = lambda data: None
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                for serve in (self._requests, self._answers):
                    threading.Thread(target=serve, args=(client, server), daemon=True).start()

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(2**16):
                if data.startswith((b"GET ", b"HEAD ", b"PUT ", b"POST ", b"DELETE ")):
                    self.requests.append(data.partition(b"\r\n")[0].decode())
                self.on_request(data)
                if self.refusals and self.refuse in data:
                    self.refusals -= 1
                    client.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                    break
                server.sendall(data)
        self._drop(client, server)

    def _answers(self, client: socket.socket, server: socket.socket) -> None:
        num_bytes = 0
        with suppress(OSError):
            while data := server.recv(2**16):
                num_bytes += len(data)
                if self.cuts and num_bytes > self.cut_after:
                    self.cuts -= 1
                    break
                client.sendall(data)
        self._drop(client, server)

    @staticmethod
    def _drop(*connections: socket.socket) -> None:
        for connection in connections:
            with suppress(OSError):  # the other direction was first
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def close(self) -> None:
        """Listen no more."""
        self._listener.close()
