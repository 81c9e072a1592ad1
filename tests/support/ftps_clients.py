"""Certificates and FTPS clients for the tests of TLS. No tests here.

A client's version of TLS, its certificate and the session its data connections offer are the test's choice.
"""

from __future__ import annotations

import datetime
import ftplib
import socket
import ssl
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from support.cli import LIMIT, Command

DAY = datetime.timedelta(days=1)
VERSIONS = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)


class Authority:
    """Signs certificates; its own is in `path`."""

    def __init__(self, directory: Path, name: str = "authority") -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        own = self._signed(self._name, self._key.public_key(), ca=True)
        self.path = directory / f"{name}.pem"
        self.path.write_bytes(own.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, *, days: int = 1) -> Path:
        """A file with a key and its certificate, which ends so many days from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        certificate = self._signed(subject, key.public_key(), days=days)
        path = self._directory / f"{name}.pem"
        path.touch(0o600)
        path.write_bytes(pem_of(key) + certificate.public_bytes(serialization.Encoding.PEM))
        return path

    def _signed(self, subject: x509.Name, key: Any, *, days: int = 1, ca: bool = False) -> x509.Certificate:
        now = datetime.datetime.now(datetime.timezone.utc)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 10 * DAY)
            .not_valid_after(now + days * DAY)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )


def pem_of(key: Any, passphrase: bytes = b"") -> bytes:
    encryption: Any = (
        serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    )
    pem: bytes = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    return pem


def client_context(
    version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3, certificate: Path | None = None, tickets: bool = True
) -> ssl.SSLContext:
    """Accepts any server, and speaks one version of TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version
    if not tickets:
        context.options |= ssl.OP_NO_TICKET
    if certificate is not None:
        context.load_cert_chain(certificate)
    return context


class FTPS(ftplib.FTP_TLS):
    """A session, logged in as anonymous, whose data connections are encrypted; `quit` or `close` ends it.

    `session`: what data connections offer to resume; "control" for the control connection's.
    """

    session: Any = "control"

    def __init__(self, server: Command, context: ssl.SSLContext | None = None, *, implicit: bool = False):
        super().__init__(timeout=LIMIT, context=context or client_context())
        self._implicit = implicit
        try:
            self.connect("127.0.0.1", server.port)
            self.login()
            if not implicit:
                self.prot_p()
        except BaseException:
            self.close()
            raise

    def connect(self, *args: Any, **kwargs: Any) -> str:
        if not self._implicit:
            return super().connect(*args, **kwargs)
        self.host, self.port = args
        plain = socket.create_connection((self.host, self.port), LIMIT)
        self.af = plain.family
        self.sock = self.context.wrap_socket(plain, server_hostname=self.host)
        self.file = self.sock.makefile("r", encoding=self.encoding)
        self.welcome = self.getresp()
        return self.welcome

    def ntransfercmd(self, cmd: str, rest: int | str | None = None) -> tuple[Any, int | None]:
        conn, size = ftplib.FTP.ntransfercmd(self, cmd, rest)
        assert isinstance(self.sock, ssl.SSLSocket)
        session = self.sock.session if self.session == "control" else self.session
        try:
            return self.context.wrap_socket(conn, server_hostname=self.host, session=session), size
        except BaseException:
            conn.close()
            raise

    def certificate(self) -> bytes:
        """The server's, DER."""
        assert isinstance(self.sock, ssl.SSLSocket)
        certificate = self.sock.getpeercert(binary_form=True)
        assert certificate is not None
        return certificate
