"""FTPS for the command: --tls and what belongs to it.

A feature of the command (site.py). It chooses pyftpdlib's TLS handler as the site's base and checks that the
certificate and its key can be used, before anything is bound.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from bridge.options import UsageError
from bridge.site import Site


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this module."""
    group = parser.add_argument_group("TLS options (need pyOpenSSL: pip install 'pyftpdlib-gevent[tls]')")
    group.add_argument("--tls", action="store_true", help="offer FTPS (AUTH TLS); needs --certfile")
    group.add_argument(
        "--keyfile", metavar="PATH", help="private key, PEM (default: in the certificate's file)"
    )
    group.add_argument("--certfile", metavar="PATH", help="certificate chain, PEM")
    group.add_argument(
        "--tls-control-required",
        action="store_true",
        help="refuse to log in without TLS on the control connection",
    )
    group.add_argument("--tls-data-required", action="store_true", help="refuse data connections without TLS")


def configure(site: Site) -> None:
    """Serve FTPS if the options say so. Raises UsageError."""
    options = site.options
    if not options.tls:
        for name in ("certfile", "keyfile", "tls_control_required", "tls_data_required"):
            if getattr(options, name):
                raise UsageError(f"--{name.replace('_', '-')} needs --tls")
        return
    site.base = _tls_handler()
    site.attributes |= _attributes(options)
    site.client_options += "--ssl-reqd -k "
    site.before.append(lambda: _check(site))


def _tls_handler() -> Any:
    try:
        from pyftpdlib.handlers import TLS_FTPHandler
    except ImportError:
        raise UsageError("--tls needs pyOpenSSL: pip install 'pyftpdlib-gevent[tls]'") from None
    return TLS_FTPHandler


def _attributes(options: argparse.Namespace) -> dict[str, Any]:
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


def _check(site: Site) -> None:
    try:
        site.handler.get_ssl_context()
    except Exception as error:
        raise UsageError(f"--certfile or --keyfile: not a certificate with its key, PEM: {error}") from None
