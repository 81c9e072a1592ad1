"""An ordinary user after port 21: --user and --chroot.

A part of the command (ftp/application.py). It acts when the server is bound, before anything is forked or
served:

    bound --> load what is needed later --> chroot --> setgroups, setgid, setuid --> try to become root again

All of it is for good. Real, effective and saved ids are set, so the kernel takes the effective and permitted
capabilities away; that root cannot be had again is tried, not assumed.

After a chroot the paths of outside are gone, and what lies at the same path inside may be anything, an upload
for instance. So

- no Python module is imported from a file any more; those that are used late are imported before,
- the user database, the time zone and the codecs are loaded before,
- log files, certificates and lists of users stay as they were opened or read. What a part reopens on
  SIGHUP or SIGUSR1 has to lie in the chroot, under its old name. /proc and DNS are gone: names of hosts are
  looked up at the start only, and gevent's monitor does not watch the memory.
"""

from __future__ import annotations

import argparse
import contextlib
import grp
import importlib
import os
import pwd
import sys
import time
from dataclasses import dataclass
from importlib.machinery import BuiltinImporter, FrozenImporter
from typing import Any

from bridge.ftp.application import Application
from bridge.ftp.options import UsageError

#: What gevent, pyftpdlib and the standard library import at their first use: for MFMT's dates, names of
#: hosts, a session's process, the hub's monitor and its reports. Found by comparing sys.modules at the start
#: and the end, and by looking for imports in functions.
LATE_MODULES = (
    *("_strptime", "encodings.idna"),
    *("multiprocessing.connection", "multiprocessing.popen_fork", "multiprocessing.resource_tracker"),
    *("gevent._monitor", "gevent._tracer", "gevent.local", "gevent.resolver.thread", "gevent.threadpool"),
    "gevent.util",
)
#: The same, of optional packages.
LATE_OPTIONAL = ("psutil",)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this module."""
    group = parser.add_argument_group("privileges (when started as root)")
    group.add_argument(
        "--user",
        metavar="NAME[:GROUP]",
        help="become this user once the port is bound, with the user's groups or with GROUP alone",
    )
    group.add_argument(
        "--chroot",
        metavar="DIR",
        help="see no files outside of DIR, which --directory must lie in; needs --user",
    )


def configure(application: Application) -> None:
    """Drop privileges after the bind, if the options say so. Raises UsageError."""
    options = application.options
    if options.chroot is not None and options.user is None:
        raise UsageError("--chroot needs --user: root can leave a chroot")
    if options.chroot is not None and options.users is not None:
        raise UsageError("--chroot: --users needs /proc; leave --chroot out: users stay in their homes")
    if options.user is None:
        return
    identity = _identity(options.user)
    if os.geteuid() != 0:
        raise UsageError("--user: only root can become another user; start as root or leave --user out")
    root = None if options.chroot is None else _root(options.chroot, application.directory)
    if root is not None:
        application.before_bind.append(lambda: _check_homes(application, root))
    application.after_bind.append(lambda: _drop(application, identity, root))
    where = "" if root is None else f", in {root}"
    application.start_lines.append(f"Runs as user {identity.user}{where}")


@dataclass(frozen=True)
class RunAs:
    """Who to become."""

    user: str
    uid: int
    gid: int
    groups: list[int]


def _identity(text: str) -> RunAs:
    name, colon, group = text.partition(":")
    try:
        user = pwd.getpwnam(name)
    except (KeyError, ValueError):
        raise UsageError(f"--user: there is no user {name!r} in the user database") from None
    if user.pw_uid == 0:
        raise UsageError(f"--user: {name} is root; name an ordinary user or leave --user out")
    if not colon:
        return RunAs(name, user.pw_uid, user.pw_gid, os.getgrouplist(name, user.pw_gid))
    try:
        gid = grp.getgrnam(group).gr_gid
    except (KeyError, ValueError):
        raise UsageError(f"--user: there is no group {group!r} in the group database") from None
    return RunAs(name, user.pw_uid, gid, [gid])


def _root(path: str, directory: str) -> str:
    root = os.path.realpath(path)
    if not os.path.isdir(root):
        raise UsageError(f"--chroot: {path!r} is not a directory")
    if os.path.commonpath([root, directory]) != root:
        raise UsageError(f"--chroot: --directory {directory!r} is not in {root!r}; choose one above it")
    return root


def _users(application: Application) -> list[dict[str, Any]]:
    """Each user's entry in pyftpdlib's DummyAuthorizer; other authorizers keep homes as they like."""
    return list(getattr(application.authorizer, "user_table", {}).values())


def _check_homes(application: Application, root: str) -> None:
    for user in _users(application):
        if os.path.commonpath([root, user["home"]]) != root:
            raise UsageError(f"--chroot: the home {user['home']!r} is not in {root!r}; choose one above it")


def _inside(path: str, root: str) -> str:
    """The name in the chroot of what is called *path* outside."""
    return os.path.normpath("/" + os.path.relpath(path, root))


# --- runs in the main process, when the server is bound


def _drop(application: Application, identity: RunAs, root: str | None) -> None:
    _load()
    try:
        if root is not None:
            _chroot(application, root)
        os.setgroups(identity.groups)
        os.setresgid(identity.gid, identity.gid, identity.gid)
        os.setresuid(identity.uid, identity.uid, identity.uid)
    except OSError as error:
        raise UsageError(
            f"--user/--chroot: {error.strerror}; root needs CAP_SETUID and CAP_SETGID, "
            "for --chroot CAP_SYS_CHROOT"
        ) from None
    _check_that_it_is_for_good(identity)
    _check_access(application, identity)


def _load() -> None:
    """Load what would be read later, from outside of a chroot or from files that only root may read."""
    for name in LATE_MODULES:
        importlib.import_module(name)
    for name in LATE_OPTIONAL:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    time.tzset()
    with contextlib.suppress(KeyError):  # libc's libraries that read the databases
        pwd.getpwuid(0)
        grp.getgrgid(0)


def _chroot(application: Application, root: str) -> None:
    application.directory = _inside(application.directory, root)
    for user in _users(application):
        user["home"] = _inside(user["home"], root)
    os.chroot(root)
    os.chdir("/")
    sys.meta_path[:] = [BuiltinImporter, FrozenImporter]
    if not os.path.exists("/proc/self"):
        sys.modules["psutil"] = None  # type: ignore[assignment]  # "not installed": gevent does without


def _check_that_it_is_for_good(identity: RunAs) -> None:
    """Raise RuntimeError if root can be had again."""
    ids = (os.getresuid(), os.getresgid(), sorted(os.getgroups()))
    if ids != ((identity.uid,) * 3, (identity.gid,) * 3, sorted(identity.groups)):
        raise RuntimeError(f"--user: the process is still {ids}")
    regain: Any
    for regain, argument in ((os.setuid, 0), (os.seteuid, 0), (os.setgroups, [0])):
        try:
            regain(argument)
        except PermissionError:
            continue
        raise RuntimeError(f"--user: {regain.__name__}({argument}) was allowed")


def _check_access(application: Application, identity: RunAs) -> None:
    """Raise UsageError if the directory, which root could use, is closed to the user."""
    what = f"--user: {identity.user} cannot %s {application.shown_directory!r}%s; change its owner or mode"
    try:
        os.listdir(application.directory)
    except OSError as error:
        raise UsageError(what % ("read", f": {error.strerror}")) from None
    if application.options.write and not os.access(application.directory, os.W_OK | os.X_OK):
        raise UsageError(what % ("write to", ""))
