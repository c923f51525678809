"""Certificates of a test bed: who they name, who signed them, and who can read the keys."""

import errno
import ipaddress
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from cryptography.x509.verification import PolicyBuilder, Store

from nonn.cli import main
from nonn.core import files
from nonn.core.errors import UserError
from nonn.core.files import TEMPORARY
from nonn.runtime import certs
from nonn.runtime.certs import write_certificates
from nonn.runtime.tls import Identity


def read(path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_a_certificate_is_good_for_its_name_and_this_machine(certificates):
    store = Store([read(certificates / "ca.pem")])
    certificate = read(certificates / "node-0.pem")
    subjects = [x509.DNSName("node-0"), x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    for subject in subjects:
        PolicyBuilder().store(store).build_server_verifier(subject).verify(certificate, [])
    with pytest.raises(x509.verification.VerificationError):
        PolicyBuilder().store(store).build_server_verifier(x509.DNSName("node-1")).verify(certificate, [])
    PolicyBuilder().store(store).build_client_verifier().verify(certificate, [])
    (name,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    assert name.value == "node-0"
    assert isinstance(certificate.public_key().curve, ec.SECP256R1)


def test_nodes_cannot_sign(certificates):
    constraints = read(certificates / "node-0.pem").extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert not constraints.value.ca
    assert (
        read(certificates / "ca.pem").extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0
    )


def test_keys_are_private_and_fit(certificates):
    keys = list(certificates.glob("*.key"))
    assert len(keys) == 6
    for path in keys:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        assert key.public_key() == read(path.with_suffix(".pem")).public_key()
    assert {path.suffix for path in certificates.iterdir()} == {".key", ".pem"}


def test_an_authority_is_kept_and_names_are_renewed(tmp_path):
    main(["certs", str(tmp_path / "certs"), "node-0", "--days", "7"])
    folder = tmp_path / "certs"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    lifetime = read(folder / "node-0.pem").not_valid_after_utc - read(folder / "node-0.pem").not_valid_before_utc
    assert lifetime.days == 7
    main(["certs", str(folder), "node-0", "node-1"])
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name for name in before if before[name] == after[name]} == {"ca.pem", "ca.key"}
    assert set(after) - set(before) == {"node-1.pem", "node-1.key"}


def test_an_authority_outlives_what_it_renews(tmp_path, monkeypatch):
    write_certificates(tmp_path / "certs", ["node-0"], days=1)
    write_certificates(tmp_path / "certs", ["node-0"], days=3650)
    authority, node = (read(tmp_path / "certs" / name) for name in ("ca.pem", "node-0.pem"))
    assert authority.not_valid_after_utc > node.not_valid_after_utc
    monkeypatch.setattr(certs, "AUTHORITY_DAYS", 30)
    write_certificates(tmp_path / "old", ["node-0"], days=20)
    with pytest.raises(UserError, match=r"ca\.pem: is good for (29|30) more days, not 365\. Use an empty folder"):
        write_certificates(tmp_path / "old", ["node-0"])


@pytest.mark.parametrize("name", ["../node", "", "a b", "ca", "localhost", "a" * 64, ".hidden"])
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="cannot name a certificate"):
        write_certificates(tmp_path, ["node-0", name])
    assert not list(tmp_path.iterdir())


def test_a_damaged_authority_is_refused(certificates, tmp_path):
    key = tmp_path / "ca.key"
    key.write_bytes((certificates / "ca.key").read_bytes())
    (tmp_path / "ca.pem").write_text("no certificate")
    key.chmod(0o644)
    with pytest.raises(UserError, match=r"ca\.key: others may read this private key"):
        write_certificates(tmp_path, ["node-0"])
    key.chmod(0o600)
    with pytest.raises(UserError, match=r"ca\.pem: is damaged\. Put a copy of it back"):
        write_certificates(tmp_path, ["node-0"])
    (tmp_path / "ca.pem").write_bytes((certificates / "node-0.pem").read_bytes())
    with pytest.raises(UserError, match="do not belong together"):
        write_certificates(tmp_path, ["node-0"])


@pytest.mark.parametrize("kept", ["ca.pem", "ca.key"])
def test_half_an_authority_is_refused_and_nothing_is_touched(kept, certificates, tmp_path):
    (tmp_path / kept).write_bytes((certificates / kept).read_bytes())
    with pytest.raises(UserError, match=r"ca\.(pem|key): is not there, and .* Put ca\.(pem|key) back"):
        write_certificates(tmp_path, ["node-2"])
    assert [path.name for path in tmp_path.iterdir()] == [kept]
    assert (tmp_path / kept).read_bytes() == (certificates / kept).read_bytes()


def test_what_a_full_disk_stops_can_be_done_again(tmp_path, monkeypatch):
    """At the first certificate, that of the authority, and at one that takes the place of another."""
    write, folder = certs._write, tmp_path / "certs"

    def fail(path, content, mode):
        if b"CERTIFICATE" in content:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content, mode)

    for _ in range(2):
        before = {path.name: path.read_bytes() for path in folder.glob("*")}
        monkeypatch.setattr(certs, "_write", fail)
        with pytest.raises(UserError, match="no space left on device"):
            write_certificates(folder, ["node-0"])
        assert {path.name: path.read_bytes() for path in folder.glob("*")} == before
        monkeypatch.setattr(certs, "_write", write)
        write_certificates(folder, ["node-0"])


def test_keys_that_a_killed_process_left_are_removed(tmp_path):
    write_certificates(tmp_path, ["node-0"])
    above_all = 2**22 + 1  # no process has that number
    left = tmp_path / f"{TEMPORARY}{files._HOST}-{above_all}-1-0.key"
    left.write_text("secret")
    write_certificates(tmp_path, ["node-1"])
    assert not left.exists()


def test_what_a_certificate_says_in_words_may_stand_above_it(certificates, tmp_path):
    for name in ("node-0.pem", "node-0.key", "ca.pem"):
        (tmp_path / name).write_bytes(b"Certificate:\n    Data: ...\n" + (certificates / name).read_bytes())
        (tmp_path / name).chmod(0o600)
    Identity(*(tmp_path / name for name in ("node-0.pem", "node-0.key", "ca.pem"))).for_server()


def test_two_that_make_certificates_at_once_share_an_authority(tmp_path):
    names = [f"node-{i}" for i in range(6)]
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(lambda name: write_certificates(tmp_path, [name]), names))
    for name in names:
        Identity.of(name, tmp_path).for_server()
        certificate = x509.load_pem_x509_certificate((tmp_path / f"{name}.pem").read_bytes())
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate((tmp_path / "ca.pem").read_bytes()))


def test_a_folder_without_a_name_is_refused():
    with pytest.raises(SystemExit, match="nonn certs: the folder has no name"):
        main(["certs", "", "node-0"])
