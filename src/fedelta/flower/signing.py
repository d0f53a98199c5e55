"""Certificates for sites that join later or make their own keys, and the renewal of certificates.

A site makes its key and a signing request; only the request travels. The holder of the authority signs
it.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedelta.errors import FedeltaError
from fedelta.files import write_file
from fedelta.flower.authority import (
    PEM,
    VALIDITY,
    Authority,
    check_validity,
    encode_public_key,
    read_certificate,
)
from fedelta.flower.certificates import (
    SSH_KEYGEN,
    check_site_name,
    load_private_key,
    load_public_key,
    make_site_key,
    private_ssh,
    read_public_key,
    write,
    write_site,
)


def request_certificate(folder: Path, name: str) -> list[Path]:
    """Write a private key for a site and a request for its certificate.

    Args:
        folder: the site's folder. An existing `site.key` is used and never replaced.
        name: the name of the site.

    Returns:
        The request, `NAME.csr`, which goes to the holder of the authority.

    Raises:
        FedeltaError: if the name is not valid, or `site.key` is not a key for a site.
    """
    check_site_name(name)
    key_file = folder / "site.key"
    if not key_file.exists():
        write(key_file, private_ssh(ec.generate_private_key(ec.SECP384R1())))
    key = load_private_key(key_file)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA384())
    file = folder / f"{name}.csr"
    write_file(file, request.public_bytes(PEM))
    return [file]


def sign_requests(folder: Path, files: Sequence[Path]) -> list[Path]:
    """Sign certificates for keys that sites have made, and admit the sites.

    Args:
        folder: a folder that `make_certificates` wrote, with the authority.
        files: signing requests, or public keys `NAME.pub` of ssh-keygen.

    Returns:
        For each site the folder that goes back to it, and the public key that admits it at the server.

    Raises:
        FedeltaError: if the authority or a request is missing or damaged, or a site has another key already.
    """
    authority = _load_authority(folder)
    requests = [_read_request(file) for file in files]
    for (name, key), file in zip(requests, files, strict=True):
        _check_key_is_free(folder, name, key, file)
    return [path for name, key in requests for path in _write_site(folder, authority, name, key)]


def add_sites(folder: Path, names: Sequence[str]) -> list[Path]:
    """Make keys and certificates for more sites, and admit them.

    Args:
        folder: a folder that `make_certificates` wrote, with the authority.
        names: names of the new sites.

    Returns:
        As `sign_requests`.

    Raises:
        FedeltaError: if the authority is missing, or a name is not valid or taken.
    """
    authority = _load_authority(folder)
    for name in names:
        check_site_name(name)
        if (folder / "sites" / name).exists() or _public_key_file(folder, name).exists():
            raise FedeltaError(f"site {name} has a key in {folder} already; keys are never overwritten")
    if len(set(names)) < len(names):
        raise FedeltaError(f"--add {','.join(names)}: expected each name once")
    for name in names:
        make_site_key(folder, authority, name)
    return [path for name in names for path in (folder / "sites" / name, _public_key_file(folder, name))]


def renew(folder: Path) -> list[Path]:
    """Sign new certificates for the server and all admitted sites. Their keys stay as they are.

    Args:
        folder: a folder that `make_certificates` wrote, with the authority.

    Returns:
        The new certificates: the server's, and those that go to the sites.

    Raises:
        FedeltaError: if a file is missing or damaged.
    """
    authority = _load_authority(folder, renew=True)
    server = folder / "server"
    sites = {file.stem: load_public_key(file) for file in sorted((server / "sites").glob("*.pub"))}
    for name in sites:
        check_site_name(name)
    old = read_certificate(server / "server.crt")
    written = []
    # A certificate of another authority is renewed by that authority.
    if old.issuer == authority.certificate.subject and isinstance(key := old.public_key(), ec.EllipticCurvePublicKey):
        names = old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        hosts = [str(name.value) for name in names]
        write_file(server / "server.crt", authority.sign_server(key, hosts).public_bytes(PEM))
        written.append(server / "server.crt")
    write_file(server / "ca.crt", authority.certificate.public_bytes(PEM))
    for name, public in sites.items():
        write_site(folder, authority, name, public)
        written.append(folder / "sites" / name / "site.crt")
    return written


def _public_key_file(folder: Path, name: str) -> Path:
    return folder / "server" / "sites" / f"{name}.pub"


def _write_site(folder: Path, authority: Authority, name: str, key: ec.EllipticCurvePublicKey) -> list[Path]:
    write_site(folder, authority, name, key)
    return [folder / "sites" / name, _public_key_file(folder, name)]


def _load_authority(folder: Path, renew: bool = False) -> Authority:
    """Load the authority, and renew its own certificate if it would expire before those that it signs."""
    certificate_file = folder / "authority" / "ca.crt"
    if not certificate_file.exists():
        # Folders of version 0.1.0 have it here only.
        certificate_file = folder / "server" / "ca.crt"
    authority = Authority.load(folder / "authority" / "ca.key", certificate_file)
    if renew and authority.certificate.not_valid_after_utc < datetime.now(UTC) + VALIDITY:
        authority = Authority.create(authority.key)
    if renew:
        write_file(folder / "authority" / "ca.crt", authority.certificate.public_bytes(PEM))
    check_validity(certificate_file, authority.certificate)
    return authority


def _read_request(file: Path) -> tuple[str, ec.EllipticCurvePublicKey]:
    """Return the name and the public key of a signing request, or of a file NAME.pub."""
    if not file.is_file():
        raise FedeltaError(f"--sign {file}: no such file")
    if file.suffix == ".pub":
        check_site_name(file.stem)
        return file.stem, load_public_key(file)
    try:
        request = x509.load_pem_x509_csr(file.read_bytes())
        names = request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        name, key, is_signed = str(names[0].value), request.public_key(), request.is_signature_valid
    except (ValueError, IndexError, UnsupportedAlgorithm) as error:
        raise FedeltaError(f"--sign {file}: not a signing request with a name, nor a public key NAME.pub") from error
    check_site_name(name)
    if not is_signed:
        raise FedeltaError(f"--sign {file}: its signature is not valid, so it may have been changed")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise FedeltaError(f"--sign {file}: not an ECDSA key of 384 bits; make one with: {SSH_KEYGEN}")
    return name, key


def _check_key_is_free(folder: Path, name: str, key: ec.EllipticCurvePublicKey, file: Path) -> None:
    """Raise if the site has another key, or another site has this key."""
    for other in sorted((folder / "server" / "sites").glob("*.pub")):
        same_key = read_public_key(other) == encode_public_key(key)
        if other.stem == name and not same_key:
            raise FedeltaError(f"--sign {file}: site {name} has another key; to replace it, remove {other} first")
        if other.stem != name and same_key:
            raise FedeltaError(f"--sign {file}: its key is that of site {other.stem}, expected one for each site")
