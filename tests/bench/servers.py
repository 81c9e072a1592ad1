"""The servers that are compared, each in a process of its own: `python -m tests.bench.servers COLUMN HOME`.

A server prints one line of JSON when it listens, or is about to: `{"port": .., "user": .., ...}`, or
`{"cannot": why}` if it cannot do what is asked here. Then it serves until it is killed, which Linux does at
the latest when the process that started it ends. Nothing is imported or patched that a column does not need.

All are as alike as they can be: the log is off, as many sessions as come, no limit on bandwidth, sendfile
where the server has it, IDLE_TIMEOUT. vsftpd runs as the user that starts it, with one process for a session
(its leaner mode); pure-ftpd needs root, and its user is nobody.
"""

from __future__ import annotations

import argparse
import ctypes
import getpass
import importlib
import importlib.util
import json
import logging
import os
import pwd
import resource
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

#: Seconds without a command until a server ends a session: there is such a timer for each, and none is due.
IDLE_TIMEOUT = 3600
#: PR_SET_PDEATHSIG of <linux/prctl.h>.
DEATH_SIGNAL = 1
#: The password of pure-ftpd's user, p, for crypt(3): its own argon2 takes half a second of CPU time for each
#: login (measured), by intent; the other servers compare texts.
MD5_OF_P = "$1$bench$Jzw4ISf/p4xBdDvsH7JNa/"
#: Where Debian has daemons, which is not in every user's PATH.
DAEMONS = "/usr/sbin"
#: Of vsftpd.conf(5): one process for a session, its one user anonymous, who may write and delete.
VSFTPD_YES = (
    *("listen", "run_as_launching_user", "one_process_model", "anonymous_enable", "write_enable"),
    *("anon_upload_enable", "anon_other_write_enable"),
)
#: The sandboxes need root and are nothing that others have.
VSFTPD_NO = (
    *("background", "no_anon_password", "anon_world_readable_only", "xferlog_enable"),
    *("seccomp_sandbox", "isolate", "isolate_network"),
)


def say(**facts: Any) -> None:
    """Tell the process that started this one."""
    print(json.dumps(facts), flush=True)


def cannot(why: str) -> NoReturn:
    """End: the column cannot run, and the table shall say why."""
    say(cannot=why)
    raise SystemExit


# --- pyftpdlib and gevent


def _handler(options: argparse.Namespace, module: str = "pyftpdlib.handlers") -> Any:
    """The handler class of *module* for HOME."""
    from pyftpdlib.authorizers import DummyAuthorizer

    handlers = importlib.import_module(module)
    authorizer = DummyAuthorizer()
    authorizer.add_user("u", "p", options.home, perm="elradfmwMT")
    attributes = {"authorizer": authorizer, "timeout": IDLE_TIMEOUT}
    if options.tls:
        if importlib.util.find_spec("OpenSSL") is None:
            cannot("pyOpenSSL is not installed")
        return type("Handler", (handlers.TLS_FTPHandler,), {**attributes, "certfile": options.tls})
    return type("Handler", (handlers.FTPHandler,), attributes)


def _web(options: argparse.Namespace) -> int:
    """The port of a pywsgi application on the hub of this thread."""
    from gevent.pywsgi import WSGIServer

    def application(_: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"page"]

    server = WSGIServer((options.host, 0), application, log=None)
    server.start()
    return int(server.server_port)


def _serve(server: Any, options: argparse.Namespace) -> None:
    """Say where *server* listens, and serve."""
    server.max_cons = 0
    say(port=server.socket.getsockname()[1], user="u", web=_web(options) if options.web else None)
    server.serve_forever()


def _epoll(options: argparse.Namespace) -> None:
    from pyftpdlib.servers import FTPServer

    if options.web:
        cannot("no hub in its process")
    _serve(FTPServer((options.host, 0), _handler(options)), options)


def _drop_in(options: argparse.Namespace) -> None:
    from pyftpdlib.servers import FTPServer

    from bridge import GeventIOLoop

    _serve(FTPServer((options.host, 0), _handler(options), ioloop=GeventIOLoop()), options)


def _patch() -> None:
    from gevent import monkey

    monkey.patch_all()


def _drop_in_patched(options: argparse.Namespace) -> None:
    _patch()
    _drop_in(options)


def _gevent_server(options: argparse.Namespace) -> None:
    from bridge import GeventFTPServer

    _serve(GeventFTPServer((options.host, 0), _handler(options, "bridge.session.handlers")), options)


def _patched(options: argparse.Namespace) -> None:
    _patch()
    from pyftpdlib.servers import FTPServer

    _serve(FTPServer((options.host, 0), _handler(options)), options)


def _patched_threaded(options: argparse.Namespace) -> None:
    _patch()
    from pyftpdlib.servers import ThreadedFTPServer

    _serve(ThreadedFTPServer((options.host, 0), _handler(options)), options)


def _native_thread(options: argparse.Namespace) -> None:
    import threading

    from gevent.event import Event
    from pyftpdlib.servers import FTPServer

    server = FTPServer((options.host, 0), _handler(options))
    server.max_cons = 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # A web server, which accepts on the hub, also where nobody asks it: without one the hub would have no
    # reason to exist.
    say(port=server.socket.getsockname()[1], user="u", web=_web(options))
    Event().wait()


# --- other servers


def _aioftp(options: argparse.Namespace) -> None:
    import asyncio
    import ssl

    if options.web:
        cannot("no hub in its process")
    try:
        import aioftp  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        cannot("not installed")
    context = None
    if options.tls:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(options.tls)

    async def serve() -> None:
        users = [aioftp.User("u", "p", base_path=options.home)]
        server = aioftp.Server(users, idle_timeout=IDLE_TIMEOUT, ssl=context)
        await server.start(options.host, 0)
        # It has TLS from the first byte on, but no AUTH.
        say(port=server.server_port, user="u", implicit_tls=bool(context))
        await asyncio.Event().wait()

    asyncio.run(serve())


def _program(name: str, options: argparse.Namespace) -> str:
    """Where the daemon is."""
    if options.web:
        cannot("no hub in its process")
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), DAEMONS]))
    return found or cannot("not installed")


def _free_port(options: argparse.Namespace) -> int:
    with socket.socket() as sock:
        sock.bind((options.host, 0))
        return int(sock.getsockname()[1])


def _vsftpd(options: argparse.Namespace) -> None:
    program, port = _program("vsftpd", options), _free_port(options)
    settings: dict[str, object] = {"listen_address": options.host, "listen_port": port}
    settings |= {"anon_root": options.home, "ftp_username": getpass.getuser(), "anon_umask": "022"}
    settings |= {"max_clients": 0, "max_per_ip": 0, "idle_session_timeout": IDLE_TIMEOUT}
    settings |= dict.fromkeys(VSFTPD_YES, "YES") | dict.fromkeys(VSFTPD_NO, "NO")
    if options.tls:
        settings |= {"ssl_enable": "YES", "allow_anon_ssl": "YES", "require_ssl_reuse": "NO"}
        settings |= {"rsa_cert_file": options.tls, "ssl_ciphers": "HIGH"}
    path = Path(options.work, "vsftpd.conf")
    path.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
    say(port=port, user="anonymous")
    os.execv(program, [program, str(path)])


def _pure_ftpd(options: argparse.Namespace) -> None:
    program, port = _program("pure-ftpd", options), _free_port(options)
    pure_pw = shutil.which("pure-pw", path=os.pathsep.join([os.environ.get("PATH", os.defpath), DAEMONS]))
    if os.getuid() != 0:
        cannot("needs root")
    if pure_pw is None:
        cannot("without pure-pw no user can be made")
    users, database = Path(options.work, "users"), Path(options.work, "users.pdb")
    user = pwd.getpwnam("nobody")
    users.write_text(f"u:{MD5_OF_P}:{user.pw_uid}:{user.pw_gid}::{options.home}/./{':' * 12}\n")
    done = subprocess.run(
        [pure_pw, "mkdb", str(database), "-f", str(users)], text=True, capture_output=True, check=False
    )
    if done.returncode:
        cannot(f"pure-pw: {(done.stderr or done.stdout).strip()}")
    arguments = ["-S", f"{options.host},{port}", "-l", f"puredb:{database}", "-f", "none"]
    # Least uid 1, no anonymous users, in a chroot, no look-up of names.
    arguments += ["-u", "1", "-E", "-A", "-H"]
    # Defaults are 50 sessions at once (-c), 15 minutes (-I), and 10 000 entries in a listing (-L).
    arguments += ["-c", "100000", "-I", str(IDLE_TIMEOUT // 60), "-L", "100000:5"]
    arguments += ["-g", str(Path(options.work, "pure-ftpd.pid"))]
    if options.tls:
        arguments += ["-Y", "1", "-2", options.tls]
    say(port=port, user="u")
    os.execv(program, [program, *arguments])


#: What is compared, in the order of the table; ratios are to the first.
COLUMNS: dict[str, Callable[[argparse.Namespace], None]] = {
    "pyftpdlib epoll": _epoll,
    "GeventIOLoop": _drop_in,
    "GeventIOLoop, patched": _drop_in_patched,
    "GeventFTPServer": _gevent_server,
    "patch_all() + FTPServer": _patched,
    "patch_all() + ThreadedFTPServer": _patched_threaded,
    "native thread": _native_thread,
    "aioftp": _aioftp,
    "vsftpd": _vsftpd,
    "pure-ftpd": _pure_ftpd,
}


def main() -> None:
    """Be a server."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("column", choices=COLUMNS)
    parser.add_argument("home", help="what to share; clients may write in its directory up/")
    parser.add_argument("--host", default="127.0.0.1", help="default %(default)s")
    parser.add_argument("--work", required=True, help="directory for configuration files")
    parser.add_argument("--tls", metavar="FILE", help="certificate and key")
    parser.add_argument("--web", action="store_true", help="a pywsgi application in the same process")
    parser.add_argument("--core", type=int, help="where to run")
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGKILL)
    if options.core is not None:
        os.sched_setaffinity(0, {options.core})
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    logging.disable()
    COLUMNS[options.column](options)


if __name__ == "__main__":
    main()
