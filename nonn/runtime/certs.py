"""A small certificate authority for a test bed: one certificate a node, one for the coordinator.

For a real deployment use the authority that the site already has: nodes and coordinators read
any PEM files whose common name is the node's or coordinator's name, also as an alternative name.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import ipaddress
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from nonn.core.errors import UserError
from nonn.core.files import regular, remove_orphans, replacing_all
from nonn.core.progress import log
from nonn.runtime.tls import CA, CERTIFICATE, COMMON_NAME, KEY_FILE, RESERVED, check_mode

CA_KEY = "ca.key"
DAYS = 365
#: Validity of the authority, so that it outlives the certificates that it signs.
AUTHORITY_DAYS = 7300
#: A node's clock may be behind that of the machine that signed.
CLOCK_SKEW = datetime.timedelta(hours=1)

Authority = tuple[ec.EllipticCurvePrivateKey, x509.Certificate]


def make_authority() -> Authority:
    """A new key (EC P-256) and its self-signed certificate, which may sign nodes but no further authority."""
    usage, constraints = _usage(key_cert_sign=True, crl_sign=True), x509.BasicConstraints(ca=True, path_length=0)
    return _issue("nonn test bed", AUTHORITY_DAYS, {constraints: True, usage: True}, None)


def make_certificate(name: str, authority: Authority, days: int) -> Authority:
    """A new key and a certificate for ``name``, which is also good for this machine's loopback addresses."""
    addresses = [x509.IPAddress(ipaddress.ip_address(address)) for address in ("127.0.0.1", "::1")]
    extensions = {
        x509.BasicConstraints(ca=False, path_length=None): True,
        _usage(digital_signature=True): True,
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]): False,
        x509.SubjectAlternativeName([x509.DNSName(name), x509.DNSName("localhost"), *addresses]): False,
        x509.AuthorityKeyIdentifier.from_issuer_public_key(authority[0].public_key()): False,
    }
    return _issue(name, days, extensions, authority)


def write_certificates(folder: Path, names: Sequence[str], days: int = DAYS) -> None:
    """Write ``<name>.pem`` and ``<name>.key`` for each name, signed by the folder's authority.

    The authority (``ca.pem``, ``ca.key``) is made if there is none. Certificates of the same names
    are replaced, which is how they are renewed. Keys are readable by their owner only.

    Raises
    ------
    UserError
        A name cannot stand in a certificate, or the authority is damaged or would expire first.
    """
    for name in names:
        if not re.fullmatch(COMMON_NAME, name) or name.lower() in RESERVED:
            reserved = " or ".join(RESERVED)
            raise UserError(f"{name!r} cannot name a certificate. Use letters, digits, - and _, but not {reserved}.")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _alone_in(folder):
        _make_all(folder, names, days)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process makes certificates there: two would make an authority each."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system that has no locks, or none of folders, as NFS
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _make_all(folder: Path, names: Sequence[str], days: int) -> None:
    remove_orphans(folder)  # keys of a process that was killed
    there = [name for name in (CA, CA_KEY) if os.path.lexists(folder / name)]
    if len(there) == 1:
        (gone,) = {CA, CA_KEY} - set(there)
        raise UserError(
            f"{folder / gone}: is not there, and {there[0]} is: a new authority would void the certificates of the "
            f"old one. Put {gone} back for as long as certificates are made, or use an empty folder."
        )
    if there:
        authority = _read_authority(folder)
        left = (authority[1].not_valid_after_utc - datetime.datetime.now(datetime.UTC)).days
        if left < days:
            raise UserError(f"{folder / CA}: is good for {max(left, 0)} more days, not {days}. Use an empty folder.")
    else:
        authority = make_authority()
        _write_pair(authority, folder / CA, folder / CA_KEY)
    for name in names:
        pair = make_certificate(name, authority, days)
        _write_pair(pair, folder / CERTIFICATE.format(name), folder / KEY_FILE.format(name))


def _read_authority(folder: Path) -> Authority:
    path = folder / CA_KEY
    try:
        check_mode(path)
        key = serialization.load_pem_private_key(regular(path).read_bytes(), password=None)
        path = folder / CA
        certificate = x509.load_pem_x509_certificate(regular(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Mend that, or use an empty folder.") from None
    except (ValueError, TypeError):
        raise UserError(f"{path}: is damaged. Put a copy of it back, or use an empty folder.") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise UserError(f"{folder}: {CA} and {CA_KEY} do not belong together. Use an empty folder.")
    return key, certificate


def _issue(name: str, days: int, extensions: dict[x509.ExtensionType, bool], authority: Authority | None) -> Authority:
    """A new key and its certificate with extensions, critical or not, signed by an authority or by itself."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    signer, issuer = (authority[0], authority[1].subject) if authority else (key, subject)
    builder = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - CLOCK_SKEW).not_valid_after(now + datetime.timedelta(days=days))
    extensions = {x509.SubjectKeyIdentifier.from_public_key(key.public_key()): False} | extensions
    for extension, critical in extensions.items():
        builder = builder.add_extension(extension, critical=critical)
    return key, builder.sign(signer, hashes.SHA256())


def _usage(**granted: bool) -> x509.KeyUsage:
    rights: tuple[str, ...] = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
    )
    rights += ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
    return x509.KeyUsage(**dict.fromkeys(rights, False) | granted)


def _write_pair(pair: Authority, certificate: Path, key: Path) -> None:
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    with replacing_all(key, certificate) as (new_key, new_certificate):
        _write(new_key, pair[0].private_bytes(*form), mode=0o600)
        _write(new_certificate, pair[1].public_bytes(serialization.Encoding.PEM), mode=0o644)


def _write(path: Path, content: bytes, mode: int) -> None:
    """Write with the right mode from the first byte on."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="folder for the certificates and keys")
    parser.add_argument("names", nargs="+", metavar="NAME", help="name of a node, or coordinator, or application")
    parser.add_argument("--days", type=int, default=DAYS, help="days until they expire (default: %(default)s)")
    parser.epilog = "example: nonn certs certs coordinator node-0 node-1"


def run(options: argparse.Namespace) -> None:
    """The command ``nonn certs``."""
    if not 1 <= options.days <= 3650:
        raise UserError("--days: give 1 to 3650")
    if not options.folder:
        raise UserError("the folder has no name; give one, such as certs")
    write_certificates(Path(options.folder), options.names, options.days)
    names = ", ".join(options.names)
    log(f"{options.folder}: certificates for {names}, good for {options.days} days; {CA_KEY} signs more: keep it apart")
