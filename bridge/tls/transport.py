"""FTPS sessions: handshakes, their contexts, and what a data connection must show. Needs pyOpenSSL.

Between ftp/parts/tls.py, which makes a `Contexts` of the options, and pyftpdlib's TLS handlers, before which
the mix-ins are put. What is added to pyftpdlib:

- **Implicit TLS.** The handshake begins at accept; the greeting, and a 421 instead of it, wait for its end.
- **A session keeps the context of its handshake**, new handshakes get the newest: a certificate is replaced
  while sessions go on, and their data connections can resume what their control connection began.
- **A handshake has a minute.** A plain client on the port for implicit TLS waits for the greeting, for ever.
- **A failed handshake, and a connection that breaks off, is one line** with OpenSSL's reason.
- **A TLS client on the port for explicit TLS** gets the end of the connection, the log the reason.

How `require_reuse` is enforced, for pyOpenSSL does not say whether a session was resumed: *the data
connection has no certificate to show*, so that OpenSSL itself refuses all but a resumption, in TLS 1.2 (by
session id or ticket) and 1.3 (by ticket) alike. What can be resumed is the session of this control connection
and no other: each has a context of its own, with random keys for its tickets and a cache of its own. vsftpd
asks SSL_session_reused() in a process of its own; proftpd compares session ids, in 1.3 tickets. The context
costs 0.8 ms and 22 kB a session (measured, OpenSSL 4.0), and is made only when required. One gap is left: a
client of TLS 1.2 without tickets, whose data connection breaks off without close_notify, can resume no more,
for OpenSSL drops a session id then.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from OpenSSL import SSL, crypto
from pyftpdlib.log import logger

from bridge.server import ConfigError
from bridge.session import LAST_REPLY_TIMEOUT, TRANSFERS, is_bare_eof
from bridge.tls.certificates import Identity

# --- private names of pyftpdlib this module stands on (tests/test_structure.py checks that they exist).
# Of AsyncChat: _closed; of FTPHandler: _in_buffer, _extra_feats; of TLS_FTPHandler: _pbsz, _prot; of
# SSLConnectionMixin: _error, _ssl_accepting, _ssl_requested.

if TYPE_CHECKING:
    from pyftpdlib.handlers import TLS_DTPHandler as _TLS_DTPHandler
    from pyftpdlib.handlers import TLS_FTPHandler as _TLS_FTPHandler
else:  # mix-ins: what they extend is the class they are put before
    _TLS_DTPHandler = _TLS_FTPHandler = object

#: Seconds that a session can be resumed: a week, the most that TLS 1.3 allows (RFC 8446, 4.6.1). OpenSSL's
#: default of 2 hours would end the transfers of longer control connections.
RESUMABLE = 7 * 24 * 3600

#: OpenSSL's reasons for the handshake of a data connection that is no resumption (TLS 1.2, 1.3).
_NOT_RESUMED = ("no shared cipher", "no suitable signature algorithm")

#: OpenSSL's reasons that need a word more for who runs the server.
_EXPLAINED = {
    "http request": "that was HTTP",
    "wrong version number": "the client does not speak TLS",
    "unknown protocol": "the client does not speak TLS",
    "packet length too long": "the client does not speak TLS",
    "record layer failure": "the client does not speak TLS",
    "unsupported protocol": "the client does not speak TLS 1.2 or later",
    "peer did not return a certificate": "the client has no certificate, see --client-ca",
    "certificate verify failed": "see --client-ca",
}

_VERIFY_ERRORS = {
    value: name.removeprefix("ERR_").replace("_", " ").lower()
    for name, value in vars(SSL.X509VerificationCodes).items()
    if name.startswith("ERR_")
}

#: Versions of TLS by their names.
VERSIONS = {"1.2": SSL.TLS1_2_VERSION, "1.3": SSL.TLS1_3_VERSION}

#: What begins a TLS connection, and no command: a record with a handshake in it, of version 3.x.
_CLIENT_HELLO = b"\x16\x03"

REUSE_REQUIRED = "TLS session reuse required: a data connection resumes that of its control connection"


class Contexts:
    """What handshakes are made with.

    - (bool) require_reuse: data connections must resume the TLS session of their control connection.
    - (str) tls_max: the newest version of TLS that is spoken, of VERSIONS; None for OpenSSL's newest.

    `take` comes first, and whenever the certificate has changed.
    """

    def __init__(self, *, require_reuse: bool = False, tls_max: str | None = None) -> None:
        self.require_reuse = require_reuse
        self._newest = VERSIONS[tls_max] if tls_max else 0
        #: For every control connection, unless each needs its own.
        self.context: Any = None
        #: Resumes sessions and does nothing else.
        self.resuming: Any = _context(None, [], self._newest) if require_reuse else None
        self._made_of: tuple[Identity, list[Any]] | None = None

    def take(self, identity: Identity, client_ca: list[Any]) -> None:
        """Use this certificate from now on, and let in only clients with one that *client_ca* has signed.

        An empty list lets in all. Raises ConfigError if OpenSSL does not like it, and goes on as before.
        """
        try:
            self.context = _context(identity, client_ca, self._newest)
        except (SSL.Error, crypto.Error) as error:
            raise ConfigError(f"--certfile: OpenSSL refuses {identity.path!r}: {_reason(error)}") from None
        self._made_of = identity, client_ca

    def of_session(self) -> Any:
        """The context for a new control connection."""
        if not self.require_reuse or self._made_of is None:
            return self.context
        return _context(*self._made_of, self._newest)


def _context(identity: Identity | None, client_ca: list[Any], newest: int) -> Any:
    context: Any = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_min_proto_version(SSL.TLS1_2_VERSION)
    context.set_max_proto_version(newest)
    context.set_options(SSL.OP_NO_COMPRESSION | SSL.OP_NO_RENEGOTIATION)
    # 26 kB for an idle TLS session instead of 48, at no cost that shows (measured, OpenSSL 4.0).
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)
    # OpenSSL resumes nothing without one if clients need certificates.
    context.set_session_id(b"bridge")
    context.set_timeout(RESUMABLE)
    # Without it OpenSSL thinks that a server without a certificate cannot do TLS 1.3.
    context.set_tlsext_servername_callback(_no_other_name)
    if identity is not None:
        first, *others = identity.chain
        context.use_certificate(first)
        for certificate in others:
            context.add_extra_chain_cert(certificate)
        context.use_privatekey(identity.key)
        context.check_privatekey()
    if client_ca:
        store = context.get_cert_store()
        for certificate in client_ca:
            store.add_cert(crypto.X509.from_cryptography(certificate))
            context.add_client_ca(certificate)
        context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, _on_verified)
    return context


# --- called by OpenSSL, in a handshake


def _no_other_name(_: Any) -> None:
    """Whatever name the client calls us: there is one certificate."""


def _on_verified(connection: Any, certificate: Any, code: int, _depth: int, ok: int) -> bool:
    """Note why a client's certificate is refused, for the log."""
    if not ok:
        subject = certificate.to_cryptography().subject.rfc4514_string()
        connection.set_app_data(f"{_VERIFY_ERRORS.get(code, code)}: {subject!r}")
    return bool(ok)


def _reason(error: BaseException | None) -> str:
    """OpenSSL's words for an error; the last of its queue, which is the most particular."""
    queue = error.args[0] if error is not None and error.args else ()
    if isinstance(queue, list) and queue:
        return str(queue[-1][-1])
    return str(error) or type(error).__name__


# --- runs in a worker greenlet


class ControlMixin(_TLS_FTPHandler):
    """For a handler class, before pyftpdlib's TLS_FTPHandler."""

    #: Where contexts come from. Must be set.
    contexts: Contexts
    #: TLS from the first byte on.
    tls_implicit = False
    #: Seconds for the handshake, 0 for as long as `timeout` lets it. nginx's ssl_handshake_timeout is 60.
    handshake_timeout = 60.0
    _handshake_limit: Any = None
    _extra_feats: list[str]
    #: The greeting waits for the end of the handshake.
    _to_be_greeted = False
    #: What the next transfer is told, for its data connection has failed already.
    _refused: str | None = None

    def __init__(self, conn: Any, server: Any, ioloop: Any = None) -> None:
        super().__init__(conn, server, ioloop)
        if self.tls_implicit and self.connected and not self._closed:
            self._extra_feats = [feat for feat in self._extra_feats if not feat.startswith("AUTH ")]
            self._pbsz = self._prot = True
            self.secure_connection(self.ssl_context)

    @classmethod
    def get_ssl_context(cls) -> Any:
        """The newest context (pyftpdlib: the one that is made once)."""
        return cls.contexts.context

    def secure_connection(self, ssl_context: Any) -> None:
        """As pyftpdlib, with the certificate of now, whenever the session has begun."""
        self.ssl_context = self.contexts.of_session()
        self.ac_in_buffer = b""  # came before, whoever sent it
        super().secure_connection(self.ssl_context)
        if self._ssl_accepting and self.handshake_timeout:
            self._handshake_limit = self.call_later(self.handshake_timeout, self._handshake_is_late)

    def _handshake_is_late(self) -> None:
        if self._ssl_accepting:
            self.log("TLS handshake failed: timed out.", logfun=logger.warning)
            self.close()

    def handle(self) -> None:
        """As pyftpdlib; once the handshake is over."""
        if self._ssl_accepting:
            self._to_be_greeted = True
        else:
            super().handle()

    def handle_ssl_established(self) -> None:
        """As pyftpdlib; then says what had to wait."""
        super().handle_ssl_established()
        if self._handshake_limit is not None:
            self._handshake_limit.cancel()
        if self._to_be_greeted:
            self._to_be_greeted = False
            if not self._closing:
                super().handle()
        if self.producer_fifo and not self._closed:
            self.initiate_send()

    def initiate_send(self) -> None:
        """As pyftpdlib; nothing is sent during the handshake."""
        if not self._ssl_accepting:
            super().initiate_send()

    def close_when_done(self) -> None:
        """As pyftpdlib; a client in its handshake has LAST_REPLY_TIMEOUT seconds to finish it."""
        if self._ssl_accepting and not self._closed:
            self.call_later(LAST_REPLY_TIMEOUT, self.close)
        super().close_when_done()

    def flush_account(self) -> None:
        """As pyftpdlib; with implicit TLS, data connections are encrypted again."""
        super().flush_account()
        self._pbsz = self._prot = self.tls_implicit

    def process_command(self, cmd: str, *args: Any, **kwargs: Any) -> None:
        """As pyftpdlib; a transfer whose data connection had no TLS to show is refused here."""
        if self._refused is not None and cmd in TRANSFERS:
            reply, self._refused = self._refused, None
            self.respond(reply, logger.warning)
            return
        if cmd in ("PASV", "EPSV", "PORT", "EPRT"):
            self._refused = None
        super().process_command(cmd, *args, **kwargs)

    def collect_incoming_data(self, data: bytes) -> None:
        """As pyftpdlib; tells TLS from commands."""
        if not self._ssl_requested and not self._in_buffer and data[:2] == _CLIENT_HELLO:
            self.log(
                "TLS without AUTH: the client wants implicit TLS, which is another port (--tls implicit).",
                logfun=logger.warning,
            )
            self.ac_in_buffer = b""
            self.close()
        else:
            super().collect_incoming_data(data)

    def found_terminator(self) -> None:
        """As pyftpdlib, unless that was TLS."""
        if not self._closed:
            super().found_terminator()

    def handle_failed_ssl_handshake(self) -> None:
        """As pyftpdlib, with the reason."""
        reason = _reason(sys.exc_info()[1])
        more = "; ".join(word for word in (self.socket.get_app_data(), _EXPLAINED.get(reason)) if word)
        self.log(f"TLS handshake failed: {reason}{f' ({more})' if more else ''}.", logfun=logger.warning)
        self.close()

    def handle_error(self) -> None:
        """As pyftpdlib; TLS that breaks off is no error of the program."""
        if not _broke_off(self):
            super().handle_error()


class DataMixin(_TLS_DTPHandler):
    """For a `dtp_handler` class, before pyftpdlib's TLS_DTPHandler, and behind a ControlMixin."""

    _error = False  # also in pyftpdlib's constructor, which closes a connection that was reset already

    def secure_connection(self, ssl_context: Any) -> None:
        """As pyftpdlib; if a resumption is required, nothing else is possible."""
        super().secure_connection(ssl_context)
        contexts = self.cmd_channel.contexts
        if contexts.require_reuse and self._ssl_accepting:
            self.socket.set_context(contexts.resuming)

    def handle_failed_ssl_handshake(self) -> None:
        """As pyftpdlib: 522 (RFC 4217, 10.2), with the reason; if no transfer was asked for yet, to that."""
        control = self.cmd_channel
        reason = _reason(sys.exc_info()[1])
        if control.contexts.require_reuse and reason in _NOT_RESUMED:
            reply = f"522 {REUSE_REQUIRED}."
        else:
            reply = f"522 TLS handshake failed: {reason}."
        if self.cmd is None:
            control._refused = reply
            self.log(reply, logfun=logger.warning)
        else:
            control.respond(reply, logger.warning)
        self.close()

    def handle_error(self) -> None:
        """As pyftpdlib; TLS that breaks off is no error of the program."""
        if not _broke_off(self):
            super().handle_error()

    def close(self) -> None:
        """As pyftpdlib; an aborted transfer does not end the session that the next one will resume."""
        if self._error and not self._closed and isinstance(self.socket, SSL.Connection):
            # OpenSSL forgets a session whose connection is freed without a goodbye.
            self.socket.set_shutdown(SSL.SENT_SHUTDOWN | SSL.RECEIVED_SHUTDOWN)
        super().close()


def _broke_off(channel: Any) -> bool:
    """If it is OpenSSL's error that is being handled: log it, close, and return True."""
    error = sys.exc_info()[1]
    if not isinstance(error, SSL.Error):
        return False
    if is_bare_eof(error) and isinstance(channel, ControlMixin):
        channel.handle_close()  # as most clients do
        return True
    channel._error = True  # no TLS shutdown
    channel.log(f"TLS connection broke off: {_reason(error)}.", logfun=logger.warning)
    channel.close()
    return True
