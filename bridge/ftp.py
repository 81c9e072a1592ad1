"""`python -m bridge.ftp`: a complete FTP and FTPS server in one command.

The top of the package, and the only file that reads argv, configures logging, installs signal handlers
or exits. Its options are those of `python -m pyftpdlib`, by name and meaning. They are set on subclasses
made for the run, never on pyftpdlib's own classes, and every error is one line that names the option,
with exit code 2. (Over 400 lines: most are the options and what they say.)

The first SIGINT or SIGTERM drains the server, and the process exits with 0; the second cuts what is left, and
ends the process with that signal if it is still there FORCE seconds later; the third ends it at once.
"""

from __future__ import annotations

import argparse
import codecs
import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import gevent
from pyftpdlib import servers
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import FTPHandler
from pyftpdlib.log import PREFIX, PREFIX_MPROC, config_logging
from pyftpdlib.prefork import cpu_count, fork_processes

import bridge
from bridge.drain import KILL_GRACE
from bridge.handlers import prepared
from bridge.hashing import HashMixin
from bridge.ioloop import GeventIOLoop
from bridge.listeners import systemd_sockets
from bridge.monitor import watch_hub
from bridge.servers import GeventFTPServer
from bridge.uploads import AtomicFS, remove_leftovers

DEFAULT_PORT = 2121  # python -m pyftpdlib
READ_ONLY = "elr"
WRITABLE = "elradfmwMT"
#: Seconds a server has to end after the second signal: what `stop(0)` may take, and as much again.
FORCE = 2 * KILL_GRACE
CONCURRENCY = ("async", "pre-fork", "multi-thread", "multi-proc")


class UsageError(Exception):
    """A wrong option or a wrong combination: one line for the user."""


# --- options


def _encoding(value: str) -> str:
    try:
        codecs.lookup(value)
    except LookupError:
        raise argparse.ArgumentTypeError(f"unknown encoding {value!r}; try utf-8 or latin-1") from None
    return value


def _port(value: str) -> int:
    try:
        port = int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is no port number") from None
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"port {port} is not between 0 (any free port) and 65535")
    return port


def _port_range(value: str) -> list[int]:
    first, _, last = value.partition("-")
    try:
        start, stop = int(first), int(last)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is no range of ports; write FROM-TO") from None
    if not 1 <= start <= stop <= 65535:
        raise argparse.ArgumentTypeError(f"{value!r} does not rise from a port (1 to 65535) to another")
    return list(range(start, stop + 1))


def _count(value: str) -> int:
    try:
        count = int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is no number") from None
    if count < 0:
        raise argparse.ArgumentTypeError(f"{count} is negative; 0 means no limit")
    return count


def _seconds(value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is no number of seconds") from None
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and any number of seconds")
    return seconds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bridge.ftp",
        description="Share a directory over FTP. Without options: the current directory, read-only, "
        f"to anonymous users, on port {DEFAULT_PORT}.",
    )
    parser.add_argument("--version", action="version", version=f"bridge {bridge.__version__}")

    main = parser.add_argument_group("main options")
    main.add_argument(
        "-i", "--interface", metavar="ADDRESS", help="address to listen on (default: all interfaces)"
    )
    main.add_argument(
        "-p",
        "--port",
        type=_port,
        default=DEFAULT_PORT,
        help="port to listen on, 0 for any free one (default: %(default)s)",
    )
    main.add_argument(
        "-w", "--write", action="store_true", help="let users change files (default: read-only)"
    )
    main.add_argument(
        "-d",
        "--directory",
        metavar="PATH",
        default=os.curdir,
        help="directory to share (default: the current one)",
    )
    main.add_argument(
        "-n", "--nat-address", metavar="ADDRESS", help="address to tell clients in passive mode, behind a NAT"
    )
    main.add_argument(
        "-r",
        "--range",
        type=_port_range,
        metavar="FROM-TO",
        help="ports for passive data connections (default: any free port)",
    )
    main.add_argument("-D", "--debug", action="store_true", help="log commands and replies too")
    main.add_argument("-u", "--username", help="user to log in as; anonymous may not then")
    main.add_argument("-P", "--password", help="the user's password")
    main.add_argument(
        "--concurrency",
        choices=CONCURRENCY,
        default="async",
        help="one process and one hub for all sessions, a process for each core, a native thread for each "
        "session, or a process for each session (default: %(default)s)",
    )

    tls = parser.add_argument_group("TLS options (need pyOpenSSL: pip install 'pyftpdlib-gevent[tls]')")
    tls.add_argument("--tls", action="store_true", help="offer FTPS (AUTH TLS); needs --certfile")
    tls.add_argument(
        "--keyfile", metavar="PATH", help="private key, PEM (default: in the certificate's file)"
    )
    tls.add_argument("--certfile", metavar="PATH", help="certificate chain, PEM")
    tls.add_argument(
        "--tls-control-required",
        action="store_true",
        help="refuse to log in without TLS on the control connection",
    )
    tls.add_argument("--tls-data-required", action="store_true", help="refuse data connections without TLS")

    other = parser.add_argument_group("other options")
    other.add_argument(
        "--timeout",
        type=_count,
        metavar="SECONDS",
        default=FTPHandler.timeout,
        help="end sessions and stalled transfers after this many seconds, 0 for never (default: %(default)s)",
    )
    other.add_argument("--banner", default=FTPHandler.banner, help="greeting (default: %(default)r)")
    other.add_argument(
        "--permit-foreign-addresses",
        action="store_true",
        help="let data connections come from or go to another address than the control connection's",
    )
    other.add_argument(
        "--permit-privileged-ports", action="store_true", help="let PORT name ports below 1024"
    )
    other.add_argument(
        "--encoding",
        type=_encoding,
        default="utf-8",
        help="of commands, replies and file names (default: %(default)s)",
    )
    other.add_argument(
        "--use-localtime", action="store_true", help="list files with local times (default: GMT)"
    )
    other.add_argument("--disable-sendfile", action="store_true", help="do not use sendfile(2) to send files")
    other.add_argument(
        "--max-cons",
        type=_count,
        metavar="COUNT",
        default=GeventFTPServer.max_cons,
        help="simultaneous sessions (in each process), 0 for no limit (default: %(default)s)",
    )
    other.add_argument(
        "--max-cons-per-ip",
        type=_count,
        metavar="COUNT",
        default=servers.FTPServer.max_cons_per_ip,
        help="simultaneous sessions from one address, 0 for no limit (default: %(default)s)",
    )
    other.add_argument(
        "--max-login-attempts",
        type=_count,
        metavar="COUNT",
        default=FTPHandler.max_login_attempts,
        help="failed logins before a session ends (default: %(default)s)",
    )
    other.add_argument(
        "--hash",
        action="store_true",
        help="compute checksums of files for clients (HASH, XCRC, XMD5, XSHA256)",
    )
    other.add_argument(
        "--stop-timeout",
        type=_seconds,
        metavar="SECONDS",
        default=GeventFTPServer.stop_timeout,
        help="let transfers finish for so long when told to stop (async, pre-fork; default: %(default)s)",
    )
    other.add_argument(
        "--long-wait",
        type=_seconds,
        metavar="SECONDS",
        default=GeventIOLoop.long_wait,
        help="log a session that has waited for so long in one command, 0 for never (default: %(default)s)",
    )
    other.add_argument(
        "--max-blocking-time",
        type=_seconds,
        metavar="SECONDS",
        default=gevent.config.max_blocking_time,
        help="log what stops all sessions for longer than this, 0 for never (default: %(default)s)",
    )
    other.add_argument(
        "--atomic-uploads",
        action="store_true",
        help="show uploaded files when they are complete, and remove the rest; also what a crash has left "
        "(needs --write)",
    )
    return parser


# --- from options to classes


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
    permissions = WRITABLE if options.write else READ_ONLY
    if options.username and not options.password:
        raise UsageError("--username needs --password")
    if options.password and not options.username:
        raise UsageError("--password needs --username")
    if options.username:
        authorizer.add_user(options.username, options.password, directory, perm=permissions)
    else:
        with warnings.catch_warnings():
            # that anonymous may write, which is what --write asked for
            warnings.simplefilter("ignore", RuntimeWarning)
            authorizer.add_anonymous(directory, perm=permissions)
    return authorizer


def _handler_class(options: argparse.Namespace, authorizer: DummyAuthorizer) -> type[FTPHandler]:
    base: Any = FTPHandler
    attributes: dict[str, Any] = {
        "authorizer": authorizer,
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
    if options.tls:
        base = _tls_handler()
        attributes |= _tls_attributes(options)
    else:
        for name in ("certfile", "keyfile", "tls_control_required", "tls_data_required"):
            if getattr(options, name):
                raise UsageError(f"--{name.replace('_', '-')} needs --tls")
    attributes["dtp_handler"] = type("DataHandler", (base.dtp_handler,), {"timeout": options.timeout})
    if options.atomic_uploads:
        if not options.write:
            raise UsageError("--atomic-uploads needs --write")
        attributes["abstracted_fs"] = AtomicFS
    bases = (HashMixin, base) if options.hash else (base,)
    handler: type[FTPHandler] = type("Handler", bases, attributes)
    # Whatever the server: pyftpdlib's handlers take a reset for the end of the file.
    return prepared(handler) if options.atomic_uploads else handler


def _nat_address(value: str | None) -> str | None:
    if value is None:
        return None
    try:
        return socket.gethostbyname(value)
    except OSError as error:
        raise UsageError(f"--nat-address: {value!r}: {error.strerror or error}") from None


def _tls_handler() -> Any:
    try:
        from pyftpdlib.handlers import TLS_FTPHandler
    except ImportError:
        raise UsageError("--tls needs pyOpenSSL: pip install 'pyftpdlib-gevent[tls]'") from None
    return TLS_FTPHandler


def _tls_attributes(options: argparse.Namespace) -> dict[str, Any]:
    if not options.certfile:
        raise UsageError("--tls needs --certfile")
    for name in ("certfile", "keyfile"):
        path = getattr(options, name)
        if path and not os.access(path, os.R_OK):
            raise UsageError(f"--{name}: cannot read {path!r}")
    return {
        "certfile": options.certfile,
        "keyfile": options.keyfile,
        "ssl_context": None,
        "tls_control_required": options.tls_control_required,
        "tls_data_required": options.tls_data_required,
    }


def _server(options: argparse.Namespace, handler: type[FTPHandler]) -> Any:
    base: Any = {
        "multi-thread": servers.ThreadedFTPServer,
        "multi-proc": servers.MultiprocessFTPServer,
    }.get(options.concurrency, GeventFTPServer)
    attributes = {"max_cons": options.max_cons, "max_cons_per_ip": options.max_cons_per_ip}
    if base is GeventFTPServer:
        attributes["stop_timeout"] = options.stop_timeout
    server_class = type("Server", (base,), attributes)
    if options.tls:
        try:
            handler.get_ssl_context()
        except Exception as error:
            raise UsageError(
                f"--certfile or --keyfile: not a certificate with its key, PEM: {error}"
            ) from None
    ioloop = GeventIOLoop()
    ioloop.long_wait = options.long_wait
    where: list[Any] = [*systemd_sockets()] or [(options.interface, options.port)]
    if len(where) > 1:
        raise UsageError(f"LISTEN_FDS: systemd passed {len(where)} sockets, and one is served")
    try:
        return server_class(where[0], handler, ioloop=ioloop)
    except OSError as error:
        # pyftpdlib wraps the last error of several addresses in another OSError.
        reason = error.args[0] if error.args and isinstance(error.args[0], OSError) else error
        raise UsageError(
            f"--interface/--port: cannot listen on {options.interface or 'all interfaces'}, "
            f"port {options.port}: {os.strerror(reason.errno) if reason.errno else reason}"
        ) from None


# --- running


def _announce(options: argparse.Namespace, server: Any, directory: str) -> None:
    """Say where it listens, how to connect and how to stop."""
    host, port = server.address
    shown = "localhost" if host in ("0.0.0.0", "::") else host
    url_host = f"[{shown}]" if ":" in shown else shown
    login = f"-u {options.username}:PASSWORD " if options.username else ""
    secure = "--ssl-reqd -k " if options.tls else ""
    print(
        f"Serving {directory} {'(writable)' if options.write else '(read-only)'} "
        f"to {options.username or 'anonymous'} on {host} port {port}\n"
        f"Connect:  curl {secure}{login}ftp://{url_host}:{port}/\n"
        f"Stop:     Ctrl-C",
        flush=True,
    )


def _on_signals(*reactions: Callable[[], object]) -> None:
    """Each SIGINT or SIGTERM calls the next of *reactions*; after them it ends the process, as by itself.

    Plain Python handlers, not watchers on the hub: they also run when a handler blocks the hub. A reaction
    must not raise: in the middle of a fork, Python drops exceptions.
    """
    pid = os.getpid()
    left = list(reactions)

    def on_signal(number: int, frame: Any) -> None:
        if os.getpid() != pid or not left:  # (a session's process inherits this handler)
            _end_by(number)
            return
        left.pop(0)()
        if not left and len(reactions) > 1:
            threading.Thread(target=_end_after, args=(FORCE, number), daemon=True).start()

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)


def _end_by(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


# --- runs in a native thread: no gevent


def _end_after(seconds: float, number: int) -> None:
    time.sleep(seconds)
    print(f"ends: signal {number} came twice, and something blocks", file=sys.stderr, flush=True)
    os.kill(os.getpid(), number)  # the third


# --- runs in the main greenlet


def _serve(server: Any, options: argparse.Namespace, announce: Callable[[], None]) -> None:
    hub = gevent.get_hub()

    def soon(function: Callable[..., object], *args: object) -> Callable[[], object]:
        return lambda: hub.loop.run_callback_threadsafe(gevent.spawn, function, *args)

    if isinstance(server, GeventFTPServer):
        _on_signals(soon(server.stop), soon(server.stop, 0))
    else:
        _on_signals(soon(server.close_all))
    end_watch = watch_hub(hub, options.max_blocking_time) if options.max_blocking_time else None
    announce()
    try:
        server.serve_forever()
    finally:
        if end_watch is not None:
            end_watch()


class _Pipe:
    """A word from the pre-fork parent to its children: they hold the reading end and see it close.

    Its death says everything at once.
    """

    def __init__(self) -> None:
        self.reader, self._writer = os.pipe()

    def close(self) -> None:
        """Close the writing end; more than once is no harm."""
        writer, self._writer = self._writer, -1
        if writer >= 0:
            os.close(writer)


def _prefork(server: Any, options: argparse.Namespace, announce: Callable[[], None]) -> None:
    """Serve in one child for each core; the parent waits for them in here and leaves by SystemExit.

    A signal closes the parent's end of a pipe, and each child stops its server: the first to drain, the
    second at once. They also stop when the parent is gone for another reason. The parent leaves when the
    last child has.
    """
    drain, force = _Pipe(), _Pipe()
    _on_signals(drain.close, force.close)
    announce()
    fork_processes(cpu_count())
    for pipe, timeout in ((drain, None), (force, 0)):
        pipe.close()
        gevent.spawn(_stop_after, pipe.reader, server, timeout)
    _serve(server, options, lambda: None)


def _stop_after(reader: int, server: Any, timeout: float | None) -> None:
    hub = gevent.get_hub()
    watcher = hub.loop.io(reader, 1)
    try:
        hub.wait(watcher)
    finally:
        watcher.close()
    server.stop(timeout)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server; return the exit code. Wrong options exit with 2 (SystemExit), as argparse does."""
    parser = _parser()
    options = parser.parse_args(argv)
    config_logging(
        level=logging.DEBUG if options.debug else logging.INFO,
        prefix=PREFIX_MPROC if options.concurrency in ("pre-fork", "multi-proc") else PREFIX,
        other_loggers=[logging.getLogger("bridge")],
    )
    try:
        directory = _directory(options)
        handler = _handler_class(options, _authorizer(options, directory))
        server = _server(options, handler)
        if options.atomic_uploads:
            remove_leftovers(directory)
    except UsageError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    serve = _prefork if options.concurrency == "pre-fork" else _serve
    try:
        serve(server, options, lambda: _announce(options, server, directory))
    finally:
        server.close_all()
    return 0


if __name__ == "__main__":
    sys.exit(main())
