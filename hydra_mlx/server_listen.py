"""The socket: a thread for each connection, as many as are allowed."""

import socket
import sys
import threading
import time
from http.server import ThreadingHTTPServer
from typing import Any

from . import cli
from .server_http import Handler, Service
from .text import first_line


class Server(ThreadingHTTPServer):
    """Listens, and starts a Handler for each connection.

    Raises:
        OSError: The address cannot be had.
    """

    request_queue_size = 128
    daemon_threads = True

    def __init__(self, host: str, port: int, service: Service):
        found = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )  # fmt: skip
        self.address_family, _, _, _, address = found[0]
        self._free = threading.BoundedSemaphore(service.connections)
        self._answering: set = set()
        super().__init__(address, lambda *args: Handler(service, *args))

    def process_request(self, request: Any, client_address: Any):
        """A thread for the connection, if there are not too many."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any):
        """The thread."""
        self._answering.add(threading.current_thread())
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._answering.discard(threading.current_thread())
            self._free.release()

    def finish(self, seconds: float):
        """Wait so long at most for answers under way to be sent; their threads are daemons."""
        end = time.monotonic() + seconds
        for thread in list(self._answering):
            thread.join(max(0.0, end - time.monotonic()))

    def handle_error(self, request: Any, client_address: Any):
        """A connection that broke is no news; anything else is one line."""
        error = sys.exc_info()[1]
        if not isinstance(error, (ConnectionError, TimeoutError)):
            cli.say(f"error: {type(error).__name__}: {first_line(error)}")
