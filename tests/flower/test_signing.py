"""Sites that make their own keys or join later, and certificates that are missing, expired or of another key."""

import shutil
import ssl
import subprocess
from datetime import timedelta
from pathlib import Path

import pytest

pytest.importorskip("cryptography")
from cryptography import x509

from fedelta.cli import app as cli
from fedelta.errors import FedeltaError
from fedelta.flower import authority as authority_module
from fedelta.flower.authority import PEM, Authority, read_certificate
from fedelta.flower.certificates import derive_public_key, load_public_key, make_certificates, read_public_key
from fedelta.flower.server.admission import Admission
from fedelta.flower.server.serve import read_admission
from fedelta.flower.signing import add_sites, renew, request_certificate, sign_requests
from fedelta.flower.site.tls import site_context


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    make_certificates(tmp_path / "keys", ["north", "south"], ["fl.example.org", "10.1.2.3"])
    return tmp_path / "keys"


def fedelta(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> list[str]:
    """Run a command, and return the lines that it prints; for an error, the line."""
    monkeypatch.setattr("sys.argv", ["fedelta", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    return (printed.err if ended.value.code else printed.out).splitlines()


def test_a_site_makes_its_key_and_only_the_request_travels(
    keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "west"
    request = site / "west.csr"
    assert fedelta(capsys, monkeypatch, "keys", site, "--request", "west") == [str(request)]
    assert (site / "site.key").stat().st_mode & 0o077 == 0
    private = (site / "site.key").read_bytes()
    signed = fedelta(capsys, monkeypatch, "keys", keys, "--sign", request)
    assert signed == [str(keys / "sites" / "west"), str(keys / "server" / "sites" / "west.pub")]
    assert sorted(file.name for file in (keys / "sites" / "west").iterdir()) == ["ca.crt", "site.crt"]
    for file in (keys / "sites" / "west").iterdir():
        shutil.copy(file, site)
    assert site_context(site).get_ca_certs()
    assert read_public_key(keys / "server" / "sites" / "west.pub") == derive_public_key(site / "site.key")
    # A new request of the same site has the same key, and may be signed again.
    request_certificate(site, "west")
    assert (site / "site.key").read_bytes() == private
    sign_requests(keys, [request])


def test_a_public_key_of_ssh_keygen_is_signed_too(keys: Path, tmp_path: Path) -> None:
    command = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(tmp_path / "west")]
    try:
        subprocess.run(command, check=True)
    except FileNotFoundError:
        pytest.skip("no ssh-keygen")
    folder, _ = sign_requests(keys, [tmp_path / "west.pub"])
    shutil.copy(tmp_path / "west", folder / "site.key")
    assert site_context(folder).get_ca_certs()


def test_a_later_site_gets_a_key_and_existing_keys_stay(keys: Path) -> None:
    before = (keys / "sites" / "north" / "site.key").read_bytes()
    assert add_sites(keys, ["west"]) == [keys / "sites" / "west", keys / "server" / "sites" / "west.pub"]
    assert site_context(keys / "sites" / "west").get_ca_certs()
    assert (keys / "sites" / "west" / "site.key").stat().st_mode & 0o077 == 0
    with pytest.raises(FedeltaError, match="site north has a key .* already; keys are never overwritten"):
        add_sites(keys, ["east", "north"])
    assert not (keys / "sites" / "east").exists()
    assert (keys / "sites" / "north" / "site.key").read_bytes() == before


def test_certificates_are_renewed_for_the_same_keys_and_names(keys: Path) -> None:
    # Version 0.1.0 wrote no certificates for sites, and the authority's only for the server and the sites.
    private = {file: file.read_bytes() for file in keys.rglob("*.key")}
    (keys / "authority" / "ca.crt").unlink()
    (keys / "sites" / "north" / "site.crt").unlink()
    old = read_certificate(keys / "server" / "server.crt")
    with pytest.raises(FedeltaError, match="no site.crt there.*`fedelta keys FOLDER --renew`"):
        site_context(keys / "sites" / "north")
    names = ["server/server.crt", "sites/north/site.crt", "sites/south/site.crt"]
    assert renew(keys) == [keys / name for name in names]
    assert site_context(keys / "sites" / "north").get_ca_certs()
    new = read_certificate(keys / "server" / "server.crt")
    assert (new.public_key(), new.serial_number == old.serial_number) == (old.public_key(), False)
    hosts = [each.extensions.get_extension_for_class(x509.SubjectAlternativeName).value for each in (old, new)]
    assert hosts[0] == hosts[1]
    assert {file: file.read_bytes() for file in keys.rglob("*.key")} == private
    assert set(read_admission(keys / "server").sites) == {"north", "south"}


def test_an_authority_that_would_expire_first_is_renewed_with_its_key(
    keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(authority_module, "AUTHORITY_VALIDITY", timedelta(days=100))
    soon = Authority.create(Authority.load(keys / "authority" / "ca.key", keys / "authority" / "ca.crt").key)
    monkeypatch.undo()
    (keys / "authority" / "ca.crt").write_bytes(soon.certificate.public_bytes(PEM))
    renew(keys)
    new = read_certificate(keys / "server" / "ca.crt")
    assert new.not_valid_after_utc > soon.certificate.not_valid_after_utc + timedelta(days=3000)
    # A site that still has the old certificate of the authority verifies the server with it.
    read_certificate(keys / "server" / "server.crt").verify_directly_issued_by(soon.certificate)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("no site.crt", "no site.crt there"),
        ("another key", "is not the certificate of .*site.key: it holds another key"),
        ("noise", "site.crt is not a certificate in PEM format"),
        ("expired", "site.crt expired on .*--renew"),
        ("from tomorrow", "site.crt is valid from .*the clock of this machine says .*is it right?"),
        ("no ca.crt", "no ca.crt there"),
    ],
)
def test_a_site_says_what_is_wrong_with_its_certificate(
    change: str, line: str, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = keys / "sites" / "north"
    authority = Authority.load(keys / "authority" / "ca.key", keys / "authority" / "ca.crt")
    key = load_public_key(keys / "server" / "sites" / "north.pub")
    if change.startswith("no "):
        (site / change.removeprefix("no ")).unlink()
    elif change == "another key":
        shutil.copy(keys / "sites" / "south" / "site.crt", site)
    elif change == "noise":
        (site / "site.crt").write_text("-----BEGIN CERTIFICATE-----\nnoise")
    else:
        days = -1 if change == "expired" else 2
        monkeypatch.setattr(authority_module, "VALIDITY", timedelta(days=days))
        monkeypatch.setattr(authority_module, "CLOCK_TOLERANCE", timedelta(days=2 if change == "expired" else -1))
        (site / "site.crt").write_bytes(authority.sign_site(key, "north").public_bytes(PEM))
    with pytest.raises(FedeltaError, match=line) as error:
        site_context(site)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("no ca.crt", "no ca.crt there, the authority that signs the certificates of sites"),
        ("expired", "server.crt expired on"),
        ("another key", "are not a certificate and its key"),
        ("odd name", "expected letters, digits"),
    ],
)
def test_a_server_says_what_is_wrong_with_its_folder(
    change: str, line: str, keys: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = keys / "server"
    if change == "no ca.crt":
        (server / "ca.crt").unlink()
    elif change == "odd name":
        (server / "sites" / "north.pub").rename(server / "sites" / "no rth.pub")
    elif change == "another key":
        make_certificates(tmp_path / "other", ["a"], [])
        shutil.copy(tmp_path / "other" / "server" / "server.key", server)
    else:
        monkeypatch.setattr(authority_module, "VALIDITY", timedelta(days=-1))
        monkeypatch.setattr(authority_module, "CLOCK_TOLERANCE", timedelta(days=2))
        renew(keys)
    with pytest.raises(FedeltaError, match=line) as error:
        read_admission(server)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--sign", "absent.csr"], "no such file"),
        (["--sign", "noise.csr"], "not a signing request with a name, nor a public key"),
        (["--sign", "north.pub"], "site north has another key; to replace it, remove"),
        (["--sign", "copy.pub"], "its key is that of site south"),
        (["--add", "a b"], "expected letters, digits"),
        (["--request", "../x"], "expected letters, digits"),
        (["--sites", "a", "--add", "b"], "pass one of --sites"),
        ([], "pass one of --sites"),
        (["--renew", "--hosts", "a"], "--hosts works with --sites only"),
    ],
)
def test_mistakes_with_keys_are_one_line(
    arguments: list[str],
    line: str,
    keys: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    make_certificates(tmp_path / "other", ["north"], [])
    (tmp_path / "noise.csr").write_text("noise")
    shutil.copy(tmp_path / "other" / "server" / "sites" / "north.pub", tmp_path)
    shutil.copy(keys / "server" / "sites" / "south.pub", tmp_path / "copy.pub")
    before = {file: file.read_bytes() for file in keys.rglob("*") if file.is_file()}
    monkeypatch.setenv("COLUMNS", "400")
    error = fedelta(capsys, monkeypatch, "keys", keys, *arguments)
    assert len(error) == 1
    assert line in error[0]
    assert len(error[0]) < 300 + len(str(keys)) * 2
    assert {file: file.read_bytes() for file in keys.rglob("*") if file.is_file()} == before


def test_a_half_written_key_file_keeps_the_known_site_and_is_reported(keys: Path) -> None:
    folder = keys / "server" / "sites"
    admission = Admission(folder)
    north = admission.sites["north"]
    assert not admission.reload()
    (folder / "north.pub").write_bytes((folder / "north.pub").read_bytes()[:50])
    (folder / "odd.pub").write_text("odd")
    assert admission.reload()
    assert admission.with_key(north.encoded) == north
    assert sorted(admission.sites) == ["north", "south"]
    assert len(admission.problems) == 2
    (folder / "north.pub").unlink()
    admission.reload()
    assert admission.with_key(north.encoded) is None
    shutil.rmtree(folder)
    admission.reload()
    assert not admission.sites


def test_the_certificate_of_a_site_is_not_that_of_a_server(keys: Path) -> None:
    site = keys / "sites" / "north"
    certificate = read_certificate(site / "site.crt")
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert site_context(site).verify_mode is ssl.CERT_REQUIRED
