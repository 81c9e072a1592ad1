"""FTPS for the command: --tls and what belongs to it.

A part of the command (ftp/application.py). It reads the certificate (tls/certificates.py), gives it to the
contexts of which handshakes are made (tls/transport.py), and does so again on SIGHUP: sessions go on with
what they have, new handshakes get what is new, and what cannot be used leaves all as it was. Both modules are
imported when TLS is wanted, for they need pyOpenSSL.
"""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING, Any

from bridge.filesystems import THREADS
from bridge.ftp.application import Application
from bridge.ftp.options import DEFAULT_PORT, UsageError
from bridge.server import ConfigError

if TYPE_CHECKING:
    from bridge.tls.transport import Contexts

log = logging.getLogger(__name__)

EXPLICIT, IMPLICIT = "explicit", "implicit"

#: Options that mean nothing without --tls.
_NEED_TLS = (
    *("certfile", "keyfile", "tls_control_required", "tls_data_required", "tls_required"),
    *("require_session_reuse", "client_ca", "tls_max"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this module."""
    group = parser.add_argument_group("TLS options (need pyOpenSSL: pip install 'pyftpdlib-gevent[tls]')")
    group.add_argument(
        "--tls",
        nargs="?",
        const=EXPLICIT,
        choices=(EXPLICIT, IMPLICIT),
        help="offer FTPS: explicit (the default), where clients ask for TLS with AUTH, or implicit, TLS from "
        f"the first byte on, for which -p 990 is the standard port (its default stays {DEFAULT_PORT}). "
        "Without --certfile, a self-signed certificate is made once and kept",
    )
    group.add_argument(
        "--tls-max",
        choices=("1.2", "1.3"),
        help="the newest version of TLS to speak. With 1.3, rclone and Perl's and Ruby's Net::FTP lose "
        "uploads; with 1.2 they do not (default: OpenSSL's newest)",
    )
    group.add_argument(
        "--keyfile", metavar="PATH", help="private key, PEM (default: in the certificate's file)"
    )
    group.add_argument(
        "--certfile", metavar="PATH", help="certificate chain, PEM; SIGHUP reads it and the key again"
    )
    group.add_argument(
        "--tls-required",
        nargs="?",
        const="both",
        choices=("control", "data", "both"),
        help="refuse to log in without TLS, to transfer data without it, or both (the default)",
    )
    group.add_argument(
        "--tls-control-required",
        action="store_true",
        help="refuse to log in without TLS on the control connection",
    )
    group.add_argument("--tls-data-required", action="store_true", help="refuse data connections without TLS")
    group.add_argument(
        "--require-session-reuse",
        action="store_true",
        help="refuse data connections with TLS that do not resume the TLS session of their control "
        "connection, so that nobody else can take them over",
    )
    group.add_argument(
        "--client-ca",
        metavar="PATH",
        help="refuse clients without a certificate that one of these has signed, PEM",
    )


def configure(application: Application) -> None:
    """Serve FTPS if the options say so. Raises UsageError."""
    options = application.options
    if not options.tls:
        for name in _NEED_TLS:
            if getattr(options, name):
                raise UsageError(f"--{name.replace('_', '-')} needs --tls")
        return
    if options.keyfile and not options.certfile:
        raise UsageError("--keyfile needs --certfile")
    try:
        from pyftpdlib.handlers import TLS_FTPHandler

        from bridge.tls.transport import Contexts, ControlMixin, DataMixin
    except ImportError:
        raise UsageError("--tls needs pyOpenSSL: pip install 'pyftpdlib-gevent[tls]'") from None
    contexts = Contexts(require_reuse=options.require_session_reuse, tls_max=options.tls_max)
    application.base = TLS_FTPHandler
    application.mixins.append(ControlMixin)
    application.data_mixins.append(DataMixin)
    application.attributes |= {
        "contexts": contexts,
        "certfile": options.certfile,
        "keyfile": options.keyfile,
        "tls_implicit": options.tls == IMPLICIT,
        "tls_control_required": options.tls_control_required or options.tls_required in ("control", "both"),
        "tls_data_required": options.tls_data_required or options.tls_required in ("data", "both"),
    }
    application.scheme = "ftps" if options.tls == IMPLICIT else "ftp"
    application.client_options += "-k " if options.tls == IMPLICIT else "--ssl-reqd -k "
    if options.client_ca:
        application.client_options += "-E CERTIFICATE "
    application.before_bind.append(lambda: _begin(application, contexts))
    application.reload.append(lambda: _renew(options, contexts))


# --- runs before there is a hub


def _begin(application: Application, contexts: Contexts) -> None:
    """Raises ConfigError."""
    options = application.options
    identity, client_ca = _read(options)
    contexts.take(identity, client_ca)
    kind = "" if options.certfile else "self-signed "
    application.start_lines += [
        f"TLS:      {options.tls}, {kind}certificate {identity.path}",
        f"SHA-256:  {identity.fingerprint}",
    ]


# --- runs in a greenlet: may wait


def _renew(options: argparse.Namespace, contexts: Contexts) -> None:
    try:
        identity, client_ca = THREADS.call(_read, options)
        contexts.take(identity, client_ca)
    except ConfigError as error:
        log.error("%s; the certificate that was in force stays", error)
    except OSError as error:
        log.error("cannot read the certificate again: %s; the one that was in force stays", error)
    else:
        log.info("new TLS handshakes get the certificate with SHA-256 %s", identity.fingerprint)


# --- runs in a threadpool thread or before there is a hub: no gevent


def _read(options: argparse.Namespace) -> Any:
    from bridge.tls import certificates

    if options.certfile:
        identity = certificates.load(options.certfile, options.keyfile)
    else:
        identity = certificates.kept(options.interface)
    wrong = identity.out_of_date()
    if wrong:
        log.warning("--certfile: the certificate in %r %s; clients will refuse it", identity.path, wrong)
    ca = certificates.certificates("--client-ca", options.client_ca) if options.client_ca else []
    return identity, ca
