"""Certificates and keys for a deployment: an authority, the server's certificate, and a key for each site.

Use them for a trial, or if you do not have a certificate authority. Only their owner can read the private keys.
"""

import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedelta.errors import FedeltaError
from fedelta.files import new_folder

SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
"""Pattern of a valid site name."""
VALIDITY = timedelta(days=365)
LOOPBACK = ("127.0.0.1", "localhost")
PEM = serialization.Encoding.PEM


def make_loopback_certificate(folder: Path) -> Path:
    """Write a certificate for 127.0.0.1 and the authority that signed it.

    The authority's key is discarded, so that it cannot sign anything else.

    Returns:
        The folder, which now holds `ca.crt`, `server.crt` and `server.key`.
    """
    authority_key, key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    authority = _certificate("fedelta loopback", authority_key, None, authority_key, [])
    server = _certificate("fedelta loopback", key, authority, authority_key, LOOPBACK)
    _write(folder / "ca.crt", authority.public_bytes(PEM))
    _write(folder / "server.crt", server.public_bytes(PEM))
    _write(folder / "server.key", _private_pem(key))
    return folder


def read_public_key(file: Path) -> bytes:
    """Read a site's public key, in the encoding that Flower's nodes send.

    Args:
        file: a public key written by `ssh-keygen -t ecdsa -b 384`.

    Raises:
        FedeltaError: if the file does not hold such a key.
    """
    try:
        key = serialization.load_ssh_public_key(file.read_bytes())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise FedeltaError(f"{file} is not a public key in the format of ssh-keygen") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise FedeltaError(f"{file} is not an ECDSA key of 384 bits; make one with: ssh-keygen -t ecdsa -b 384")
    return key.public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def derive_public_key(file: Path) -> bytes:
    """Derive the public key from a site's private key, in the encoding that Flower's nodes send.

    Args:
        file: a private key without a password, written by `ssh-keygen -t ecdsa -b 384`.

    Raises:
        FedeltaError: if the file does not hold such a key.
    """
    try:
        key = serialization.load_ssh_private_key(file.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise FedeltaError(f"{file} is not a private key without a password in the format of ssh-keygen") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise FedeltaError(f"{file} is not an ECDSA key of 384 bits; make one with: ssh-keygen -t ecdsa -b 384")
    return key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def make_certificates(folder: Path, sites: Sequence[str], hosts: Sequence[str]) -> list[Path]:
    """Write the certificates and keys that a server and its sites need.

    Args:
        folder: a folder that does not exist yet. `server/` stays on the server and `sites/NAME/` goes to that site.
            Store `authority/` on neither.
        sites: the names of the sites.
        hosts: the names and addresses under which sites reach the server.

    Returns:
        The folders written, the server's first.

    Raises:
        FedeltaError: if the folder exists, or a name is not valid.
    """
    for site in sites:
        if not SITE_NAME.fullmatch(site):
            raise FedeltaError(f"site {site!r}: expected letters, digits, - and _")
    if not sites or len(set(sites)) < len(sites):
        raise FedeltaError(f"sites: {', '.join(sites) or 'none'}, expected at least one, each once")
    for host in hosts:
        if not host.isascii() or not host.replace("-", "").replace(".", "").replace(":", "").isalnum():
            raise FedeltaError(f"host {host!r}: expected a name such as fl.example.org, or an address")
    if folder.exists():
        raise FedeltaError(f"{folder} exists already; keys are never overwritten")
    authority_key = ec.generate_private_key(ec.SECP384R1())
    authority = _certificate("fedelta authority", authority_key, None, authority_key, [])
    server_key = ec.generate_private_key(ec.SECP384R1())
    server = _certificate("fedelta server", server_key, authority, authority_key, [*dict.fromkeys((*hosts, *LOOPBACK))])
    with new_folder(folder) as scratch:
        _write(scratch / "authority" / "ca.key", _private_pem(authority_key))
        _write(scratch / "server" / "ca.crt", authority.public_bytes(PEM))
        _write(scratch / "server" / "server.crt", server.public_bytes(PEM))
        _write(scratch / "server" / "server.key", _private_pem(server_key))
        for site in sites:
            key = ec.generate_private_key(ec.SECP384R1())
            private = key.private_bytes(PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
            public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
            _write(scratch / "sites" / site / "site.key", private)
            _write(scratch / "sites" / site / "ca.crt", authority.public_bytes(PEM))
            # The server admits a site by its public key.
            _write(scratch / "server" / "sites" / f"{site}.pub", public + b"\n")
    return [folder / "server", *(folder / "sites" / site for site in sites)]


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Certificate | None,
    issuer_key: ec.EllipticCurvePrivateKey,
    hosts: Sequence[str],
) -> x509.Certificate:
    """Build a certificate signed by the issuer, or the authority's self-signed one if `issuer` is None."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + VALIDITY)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=0 if issuer is None else None), True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), False)
    )
    if issuer is None:
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        builder = builder.add_extension(usage, True)
    else:
        server = x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH])
        builder = builder.add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), False)
        builder = builder.add_extension(server, False)
    return builder.sign(issuer_key, hashes.SHA384())


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    secret = path.suffix == ".key"
    if secret:
        path.parent.chmod(0o700)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644), "wb") as stream:
        stream.write(content)
