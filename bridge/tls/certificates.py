"""Certificates: read and checked before they are used, and a self-signed one that is made once and kept.

A leaf beside ftp/options.py; ftp/parts/tls.py takes what comes out of here to OpenSSL. Everything in here
reads files and may block: it runs at start-up, before there is a hub, or on a native thread. Needs
cryptography, which is pyOpenSSL's own base.

What is wrong with a file is a ConfigError: one line that names the option, the file and the way out.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import ipaddress
import logging
import os
import shlex
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from bridge.filesystems.replace import replace
from bridge.server import ConfigError

log = logging.getLogger(__name__)

#: For how long a self-signed certificate is made. Clients know it by its fingerprint, so that a new one is
#: a nuisance to all of them; nobody but them decides how long they trust it.
VALID = datetime.timedelta(days=3650)

_NO_USAGE = (
    *("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
    *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)

#: A certificate is valid from so long ago on, for clients whose clocks are slow.
SLOW_CLOCKS = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Identity:
    """A certificate, those that lead from it to its root, and its private key."""

    chain: tuple[x509.Certificate, ...]
    key: Any
    #: Where it came from.
    path: str

    @property
    def fingerprint(self) -> str:
        """SHA-256 as `openssl x509 -fingerprint -sha256` writes it."""
        return self.chain[0].fingerprint(hashes.SHA256()).hex(":").upper()

    def out_of_date(self) -> str | None:
        """What is wrong with the time of today, if anything."""
        now = datetime.datetime.now(datetime.timezone.utc)
        first, last = self.chain[0].not_valid_before_utc, self.chain[0].not_valid_after_utc
        if now >= last:
            return f"expired on {last:%Y-%m-%d %H:%M} UTC"
        return f"is not valid before {first:%Y-%m-%d %H:%M} UTC" if now < first else None


# --- files


def load(certfile: str, keyfile: str | None = None) -> Identity:
    """The certificate chain in *certfile* and its key in *keyfile*, or in the same file; both PEM.

    Raises ConfigError. A certificate that has expired is none of its business (`out_of_date`).
    """
    chain = certificates("--certfile", certfile)
    option, path = ("--keyfile", keyfile) if keyfile else ("--certfile", certfile)
    content = _read(option, path)
    try:
        key: Any = serialization.load_pem_private_key(content, None)
    except TypeError:
        raise ConfigError(
            f"{option}: the key in {path!r} has a passphrase, which nobody can type here; "
            f"take it off: openssl pkey -in {shlex.quote(path)} -out NEW"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(
            f"{option}: no private key, PEM, in {path!r}" + ("" if keyfile else "; is it in a --keyfile?")
        ) from None
    if _public(key.public_key()) != _public(chain[0].public_key()):
        raise ConfigError(f"{option}: the key in {path!r} is not that of the certificate in {certfile!r}")
    with contextlib.suppress(OSError):
        if os.stat(path).st_mode & stat.S_IROTH:
            log.warning("%s: every user can read the private key: chmod o-r %s", option, path)
    return Identity(tuple(chain), key, certfile)


def certificates(option: str, path: str) -> list[x509.Certificate]:
    """Those in a PEM file, one at least. Raises ConfigError, which names *option*."""
    try:
        return x509.load_pem_x509_certificates(_read(option, path))
    except ValueError:
        raise ConfigError(f"{option}: no certificate, PEM, in {path!r}") from None


def _read(option: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{option}: cannot read {path!r}: {error.strerror}") from None


def _public(key: Any) -> bytes:
    encoded: bytes = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return encoded


# --- the one that is kept


def kept(interface: str | None = None) -> Identity:
    """The user's self-signed certificate; made if there is none, or none that can be used.

    - (str) interface: an address or host name that it is for too, if it is made now.

    It is in pyftpdlib-gevent/certificate.pem, in $XDG_DATA_HOME or ~/.local/share (XDG Base Directory
    Specification), with its key, for nobody else to read. Processes that start at once agree on one.
    Raises ConfigError.
    """
    home = os.environ.get("XDG_DATA_HOME", "")
    data = Path(home if os.path.isabs(home) else os.path.expanduser("~/.local/share"))
    directory = data / "pyftpdlib-gevent"
    path = directory / "certificate.pem"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(directory / "lock"):
            if path.exists():
                try:
                    identity = load(str(path))
                    reason = identity.out_of_date()
                    if reason is None:
                        return identity
                except ConfigError as error:
                    reason = f"cannot be used ({str(error).removeprefix('--certfile: ')})"
                log.warning("%s %s: a new certificate is made, with another fingerprint", path, reason)
            replace(str(path), _self_signed(_names(interface)))
            return load(str(path))
    except OSError as error:
        raise ConfigError(
            f"--tls: cannot keep a self-signed certificate in {str(directory)!r}: {error.strerror}; "
            "set XDG_DATA_HOME, or name a certificate with --certfile"
        ) from None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    # (open for writing: on NFS, flock() is a lock that needs it)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _names(interface: str | None) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = []
    for name in (socket.gethostname(), "localhost", "127.0.0.1", "::1", interface):
        if name and name not in ("0.0.0.0", "::"):
            with contextlib.suppress(ValueError):  # a host name that is not ASCII
                general = _general_name(name)
                if general not in names:
                    names.append(general)
    return names


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name.partition("%")[0]))
    except ValueError:
        return x509.DNSName(name)


def _self_signed(names: list[x509.GeneralName]) -> bytes:
    """A new key (ECDSA, P-256) and its certificate, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, str(names[0].value)[:64])])
    now = datetime.datetime.now(datetime.timezone.utc)
    usage = dict.fromkeys(_NO_USAGE, False)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SLOW_CLOCKS)
        .not_valid_after(now + VALID)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=True, **usage), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ) + certificate.public_bytes(serialization.Encoding.PEM)
