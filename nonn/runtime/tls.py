"""Who may talk to whom: mutual TLS with named peers, or plain text on loopback where it is asked for."""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from grpc import aio

from nonn.core.errors import UserError
from nonn.core.files import regular, stamp_of
from nonn.core.progress import log

#: Certificates of a test bed as `nonn certs` writes them.
CA, CERTIFICATE, KEY_FILE = "ca.pem", "{}.pem", "{}.key"
#: What a certificate may be called: X.509 allows 64 letters, and a label of a host's name has 63.
COMMON_NAME = r"[A-Za-z0-9_-]{1,63}"
#: Reserved names: the first is that of the authority's files, and the second stands in every certificate.
RESERVED = ("ca", "localhost")
#: How long before its end a certificate is spoken of.
SOON = timedelta(days=30)


#: What OpenSSL says of a handshake that failed, and what it means.
HANDSHAKE_PROBLEMS = {
    "HTTP_REQUEST": "it speaks plain HTTP, not TLS",
    "WRONG_VERSION_NUMBER": "it speaks no TLS",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it shows no certificate",
    "certificate has expired": "its certificate has expired; is the clock right, there and here?",
    "certificate is not yet valid": "its certificate is not valid yet; is the clock right, there and here?",
    "Hostname Verification Check failed": "its certificate bears another name",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not signed by the authority that is trusted here",
    "CERTIFICATE_EXPIRED": "it takes this side's certificate for expired; is the clock right, there and here?",
    "UNKNOWN_CA": "it does not trust the authority of this side's certificate",
    "timed out": "it did not say in time who it is",
}


def handshake_problem(text: str) -> str:
    """What an error of gRPC says about a failed handshake, in plain words; empty if nothing known."""
    return next((meaning for sign, meaning in HANDSHAKE_PROBLEMS.items() if sign in text), "")


@dataclass(frozen=True)
class Identity:
    """Files that prove who a process is, and the authority that it trusts: all PEM.

    What is made of them is checked first; a `UserError` names the file, what is wrong and what to do.
    """

    certificate: Path
    key: Path
    ca: Path

    @classmethod
    def of(cls, name: str, folder: Path) -> Identity:
        """The identity of a node or coordinator in a folder that `nonn certs` wrote."""
        return cls(folder / CERTIFICATE.format(name), folder / KEY_FILE.format(name), folder / CA)

    def for_server(self) -> grpc.ServerCredentials:
        """Credentials of a node; whoever calls it must show a certificate of the authority.

        Files that change are used from the next handshake on, unless something is wrong with them.
        """
        known = self.stamp()
        initial = self._server_configuration()

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal known
            if (stamp := self.stamp()) == known:
                return None
            try:
                configuration = self._server_configuration()
            except Exception as error:
                log_former(error)
                return None
            known = stamp
            log(f"{self.certificate}: renewed")
            return configuration

        return grpc.dynamic_ssl_server_credentials(initial, renewed, require_client_authentication=True)

    def for_client(self) -> grpc.ChannelCredentials:
        key, certificate, ca = self._checked()
        return grpc.ssl_channel_credentials(ca, key, certificate)

    def stamp(self) -> tuple:
        """Something else whenever a file has changed."""
        return tuple(stamp_of(path) for path in (self.certificate, self.key, self.ca))

    def warn(self) -> None:
        """Say which certificates end soon."""
        now = datetime.now(UTC)
        for path, certificates in self._certificates_by_file(_read_pem(self.certificate), _read_pem(self.ca)):
            if (end := max(certificate.not_valid_after_utc for certificate in certificates)) - now < SOON:
                log(f"{path}: ends on {end:%Y-%m-%d %H:%M} UTC. {self._renewal(path)}")

    def _server_configuration(self) -> grpc.ServerCertificateConfiguration:
        key, certificate, ca = self._checked()
        return grpc.ssl_server_certificate_configuration([(key, certificate)], ca)

    def _certificates_by_file(self, own: bytes, authorities: bytes) -> list[tuple[Path, list[x509.Certificate]]]:
        """Of the contents of both files: the own one, without those that have signed it, and the authorities."""
        own_ones = _certificates(self.certificate, own)[:1]
        return [(self.certificate, own_ones), (self.ca, _certificates(self.ca, authorities))]

    def _checked(self) -> tuple[bytes, bytes, bytes]:
        """Contents of key, certificate and authority."""
        contents = _read_pem(self.key), _read_pem(self.certificate), _read_pem(self.ca)
        certificates_by_file = self._certificates_by_file(*contents[1:])
        (_, own), (_, authorities) = certificates_by_file
        try:
            key = serialization.load_pem_private_key(contents[0], password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise UserError(f"{self.key}: is no private key without a password ({error}).") from None
        check_mode(self.key)
        if not any(map(_is_authority, authorities)):
            raise UserError(
                f"{self.ca}: is no certificate of an authority. Name the {CA} that `nonn certs` has written."
            )
        if key.public_key() != own[0].public_key():
            raise UserError(f"{self.certificate} and {self.key} do not belong together. Make both anew.")
        for path, certificates in certificates_by_file:
            now = datetime.now(UTC)
            if now < (start := min(certificate.not_valid_before_utc for certificate in certificates)):
                raise UserError(
                    f"{path}: is not valid before {start:%Y-%m-%d %H:%M} UTC, and this machine's clock says "
                    f"{now:%Y-%m-%d %H:%M}. Is the clock right?"
                )
            if now > (end := max(certificate.not_valid_after_utc for certificate in certificates)):
                raise UserError(
                    f"{path}: has expired on {end:%Y-%m-%d %H:%M} UTC, and this machine's clock says "
                    f"{now:%Y-%m-%d %H:%M}. Is the clock right? {self._renewal(path)}"
                )
        return contents

    def _renewal(self, path: Path) -> str:
        if path == self.ca:
            return "Make an authority and all certificates anew, in an empty folder: `nonn certs`."
        words = shlex.join(["nonn", "certs", str(path.parent), path.stem])
        return f"To renew it, where the authority's key is: {words}"


def log_former(error: Exception) -> None:
    """Say why new certificates are not used, perhaps since only some of the files have been replaced so far."""
    problem = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}."
    log(f"{problem} The certificates from before stay in use.")


def check_mode(key: Path) -> None:
    """Refuse a private key of this user that others may read, as ssh does."""
    try:
        status = key.stat()
    except OSError as error:
        raise UserError(f"{key}: cannot be read ({error.strerror}). Make certificates with `nonn certs`.") from None
    if os.name == "posix" and status.st_uid == os.getuid() and status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise UserError(
            f"{key}: others may read this private key (mode {mode:04o}). Run: chmod 600 {shlex.quote(str(key))}"
        )


def _certificates(path: Path, content: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError as error:
        raise UserError(f"{path}: is no certificate ({error}). Make certificates with `nonn certs`.") from None


def _is_authority(certificate: x509.Certificate) -> bool:
    """Whether a certificate may sign others; without extensions, as of version 1, one that is signed by itself may."""
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return certificate.issuer == certificate.subject


def _read_pem(path: Path) -> bytes:
    try:
        content = regular(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Make certificates with `nonn certs`.") from None
    if b"-----BEGIN " not in content:  # some programs write what it says in words above
        raise UserError(f"{path}: is not in PEM form. Make certificates with `nonn certs`.")
    return content


def may_call(context: aio.ServicerContext, names: Collection[bytes]) -> bool:
    """Whether a caller has shown a certificate, and every name in it is one of these."""
    callers = callers_of(context)
    return bool(callers) and callers <= set(names)


def callers_of(context: aio.ServicerContext) -> set[bytes]:
    """Common names of the certificate that a caller has shown; empty for plain text."""
    return set(context.auth_context().get("x509_common_name", []))
