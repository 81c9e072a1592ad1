"""The application: what one run of the command serves, put together from its options.

Between command.py, which runs it, and the parts (modules with `add_options(parser)` and
`configure(application)`), which take part by changing it before it is bound:

    options --> Application --> each part's configure(application) --> application.bind() -->
    application.server, bound, not started

Options are set on subclasses made for the run, never on pyftpdlib's own classes. Nothing here runs the hub.
"""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import socket
import warnings
from collections.abc import Callable
from typing import Any

from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import FTPHandler

from bridge.filesystems import AtomicFS, HomeFS, remove_leftovers
from bridge.ftp.options import UsageError
from bridge.loop import GeventIOLoop
from bridge.server import GeventFTPServer, SharedTable, systemd_sockets
from bridge.session import HashMixin
from bridge.users import READ_ONLY, WRITABLE


class Application:
    """What the options ask for. Features change its attributes in `configure`; `bind` makes the server.

    Raises UsageError for what cannot be, here and in `bind`.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        #: The directory that is shared, absolute.
        self.directory = _directory(options)
        self.authorizer: Any = _authorizer(options, self.directory)
        #: Who may log in, for the line at start-up.
        self.users: str = options.username or "anonymous"
        #: What they may do, for the same line.
        self.access = "writable" if options.write else "read-only"
        #: pyftpdlib's handler class, the mix-ins put before it, and class attributes.
        self.base: Any = FTPHandler
        self.mixins: list[Any] = [HashMixin] if options.hash else []
        self.attributes: dict[str, Any] = _attributes(options)
        #: The same for its data connections, and for the server.
        self.data_mixins: list[Any] = []
        self.data_attributes: dict[str, Any] = {"timeout": options.timeout}
        self.server_mixins: list[Any] = []
        self.server_attributes: dict[str, Any] = {
            "max_cons": options.max_cons,
            "max_cons_per_ip": options.max_cons_per_ip,
            "stop_timeout": options.stop_timeout,
        }
        #: The directory's name for the line at start-up; `directory` changes with a chroot.
        self.shown_directory = self.directory
        #: Called once before the server is bound, when `handler` exists; and once when it is bound, before
        #: processes are forked.
        self.before_bind: list[Callable[[], object]] = []
        self.after_bind: list[Callable[[], object]] = []
        #: Called in each serving process, on its hub, before it serves; each returns what ends it again.
        self.services: list[Callable[[], Callable[[], object]]] = []
        #: Called in a greenlet on SIGHUP (reload the files that the options name), on SIGUSR1 (reopen logs).
        #: (`rotate` also in the parent of workers, which has no hub.)
        self.reload: list[Callable[[], object]] = []
        self.rotate: list[Callable[[], object]] = []
        #: Called by `tell`.
        self.state_observers: list[Callable[[str], object]] = []
        #: Lines to print at start-up, and what curl needs: the URL's scheme, and options (it asks for the
        #: password).
        self.start_lines: list[str] = []
        self.scheme = "ftp"
        self.client_options = f"-u {shlex.quote(options.username)} " if options.username else ""
        #: Worker processes; a directory for their sockets, readable by nobody else (None without workers).
        self.workers = 1
        self.listeners: list[Any] = []  # one for each worker, the server's among them
        self.runtime_dir: str | None = None
        #: Processes that serve at once have a column each in every one of the tables of `shared`.
        self.slots = 1
        self.slot = 0
        self.shared: dict[str, SharedTable] = {}
        #: Where log lines go, from `bind` on (bridge.logs.output.Logs).
        self.logs: Any = None
        self.handler: Any = None
        self.server: Any = None

    def prepare(self) -> None:
        """Make `handler` and check all that can be checked without listening."""
        self.handler = self._handler_class()
        for step in self.before_bind:
            step()

    def bind(self) -> None:
        """Make `handler` and `server`, which listens but accepts nothing yet."""
        self.prepare()
        self.server = self._server()
        try:
            if self.options.atomic_uploads:
                remove_leftovers(self.directory)
            for step in self.after_bind:
                step()
        except BaseException:
            self.server.close_all()
            raise

    def close(self) -> None:
        """Close the server, if there is one, and the tables."""
        if self.server is not None:
            self.server.close_all()
        for table in self.shared.values():
            table.close()

    def serve_on(self, listener: socket.socket) -> None:
        """Make another `server`, for a worker, on a bound socket, which becomes the server's."""
        self.server = self._server(listener)

    def report_state(self, state: str) -> None:
        """Tell the program that started this one that it is now `ready`, `reloading` or `stopping`.

        For the main process, the one that was started; also in signal handlers.
        """
        for step in self.state_observers:
            step(state)

    def _handler_class(self) -> Any:
        base = self.base
        attributes = {"authorizer": self.authorizer, **self.attributes}
        attributes["dtp_handler"] = type(
            "DataHandler", (*self.data_mixins, base.dtp_handler), self.data_attributes
        )
        if self.options.atomic_uploads:
            if not self.options.write and not self.options.users:
                raise UsageError("--atomic-uploads needs --write or --users")
            attributes["abstracted_fs"] = type("FileSystem", (AtomicFS, attributes["abstracted_fs"]), {})
        return type("Handler", (*self.mixins, base), attributes)

    def _server(self, listener: socket.socket | None = None) -> Any:
        options = self.options
        server_class: Any = type("Server", (*self.server_mixins, GeventFTPServer), self.server_attributes)
        ioloop = GeventIOLoop()
        ioloop.long_wait = options.long_wait
        where: list[Any] = [listener] if listener else [*systemd_sockets()]
        where = where or [(options.interface, options.port)]
        if len(where) > 1:
            raise UsageError(f"LISTEN_FDS: systemd passed {len(where)} sockets, and one is served")
        try:
            return server_class(where[0], self.handler, ioloop=ioloop)
        except OSError as error:
            raise UsageError(
                f"--interface/--port: cannot listen on {options.interface or 'all interfaces'}, "
                f"port {options.port}: {os.strerror(error.errno or errno.EADDRNOTAVAIL)}"
            ) from None


def _directory(options: argparse.Namespace) -> str:
    path: str = os.path.realpath(options.directory)
    if not os.path.isdir(path):
        raise UsageError(f"--directory: {options.directory!r} is not a directory")
    try:
        os.listdir(path)
    except OSError as error:
        raise UsageError(f"--directory: cannot read {options.directory!r}: {error.strerror}") from None
    if options.write and not os.access(path, os.W_OK):
        raise UsageError(f"--write: cannot write to {options.directory!r}")
    return path


def _authorizer(options: argparse.Namespace, directory: str) -> DummyAuthorizer:
    authorizer = DummyAuthorizer()
    if options.username and not options.password:
        raise UsageError("--username needs --password")
    if options.password and not options.username:
        raise UsageError("--password needs --username")
    if options.username:
        authorizer.add_user(
            options.username, options.password, directory, perm=WRITABLE if options.write else READ_ONLY
        )
    else:
        add_anonymous(authorizer, directory, options.write)
    return authorizer


def add_anonymous(authorizer: DummyAuthorizer, directory: str, write: bool) -> None:
    """Let anonymous in to *directory*; pyftpdlib warns if they may write, which is what --write asks for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        authorizer.add_anonymous(directory, perm=WRITABLE if write else READ_ONLY)


def _attributes(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "abstracted_fs": HomeFS,
        "masquerade_address": _nat_address(options.nat_address),
        "passive_ports": options.range,
        "timeout": options.timeout,
        "banner": options.banner,
        "max_login_attempts": options.max_login_attempts,
        "permit_foreign_addresses": options.permit_foreign_addresses,
        "permit_privileged_ports": options.permit_privileged_ports,
        "encoding": options.encoding,
        "use_gmt_times": not options.use_localtime,
        "use_sendfile": FTPHandler.use_sendfile and not options.disable_sendfile,
    }


def _nat_address(value: str | None) -> str | None:
    if value is None:
        return None
    try:
        return socket.gethostbyname(value)
    except OSError as error:
        raise UsageError(f"--nat-address: {value!r}: {error.strerror or error}") from None
