"""Certificates and keys for a deployment: an authority, the server's certificate, a key for each site.

For a trial, or for whoever has no authority of their own. Private keys can be read by their owner alone.
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

SITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
"""The names that a site may have."""
VALID = timedelta(days=365)
LOOPBACK = ("127.0.0.1", "localhost")
PEM = serialization.Encoding.PEM


def make_loopback_certificate(folder: Path) -> Path:
    """A certificate for 127.0.0.1 and the authority behind it, whose key nobody keeps.

    Returns:
        The folder, with `ca.crt`, `server.crt` and `server.key`.
    """
    authority_key, key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    authority = _certificate("fedelta loopback", authority_key, None, authority_key, [])
    server = _certificate("fedelta loopback", key, authority, authority_key, LOOPBACK)
    _write(folder / "ca.crt", authority.public_bytes(PEM))
    _write(folder / "server.crt", server.public_bytes(PEM))
    _write(folder / "server.key", _private(key))
    return folder


def public_key(file: Path) -> bytes:
    """A site's public key as Flower's nodes send it.

    Args:
        file: as `ssh-keygen -t ecdsa -b 384` writes it.

    Raises:
        FedeltaError: if it is not such a key.
    """
    try:
        key = serialization.load_ssh_public_key(file.read_bytes())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise FedeltaError(f"{file} is no public key as ssh-keygen writes it") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise FedeltaError(f"{file} is no ECDSA key of 384 bits; make one by: ssh-keygen -t ecdsa -b 384")
    return key.public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def public_half(file: Path) -> bytes:
    """The public key of a site's private one, as Flower's nodes send it.

    Raises:
        FedeltaError: if the file is not such a key.
    """
    try:
        key = serialization.load_ssh_private_key(file.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise FedeltaError(f"{file} is no private key without a password as ssh-keygen writes it") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise FedeltaError(f"{file} is no ECDSA key of 384 bits; make one by: ssh-keygen -t ecdsa -b 384")
    return key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def make_certificates(folder: Path, sites: Sequence[str], hosts: Sequence[str]) -> list[Path]:
    """Write what a server and its sites need.

    Args:
        folder: must not exist. `server/` stays with the server, `sites/NAME/` goes to that site, `authority/` is kept
            where neither is.
        sites: their names.
        hosts: names and addresses under which sites reach the server.

    Returns:
        The folders written, the server's first.

    Raises:
        FedeltaError: if the folder exists, or a name can't be a folder's.
    """
    for site in sites:
        if not SITE.fullmatch(site):
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
        _write(scratch / "authority" / "ca.key", _private(authority_key))
        _write(scratch / "server" / "ca.crt", authority.public_bytes(PEM))
        _write(scratch / "server" / "server.crt", server.public_bytes(PEM))
        _write(scratch / "server" / "server.key", _private(server_key))
        for site in sites:
            key = ec.generate_private_key(ec.SECP384R1())
            private = key.private_bytes(PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
            public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
            _write(scratch / "sites" / site / "site.key", private)
            _write(scratch / "sites" / site / "ca.crt", authority.public_bytes(PEM))
            # What the server has to know of a site.
            _write(scratch / "server" / "sites" / f"{site}.pub", public + b"\n")
    return [folder / "server", *(folder / "sites" / site for site in sites)]


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Certificate | None,
    issuer_key: ec.EllipticCurvePrivateKey,
    hosts: Sequence[str],
) -> x509.Certificate:
    """A certificate by this issuer; without one, the authority's own."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + VALID)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=0 if issuer is None else None), True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), False)
    )
    if issuer is None:
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        builder = builder.add_extension(usage, True)
    else:
        server = x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH])
        builder = builder.add_extension(x509.SubjectAlternativeName([_name(host) for host in hosts]), False)
        builder = builder.add_extension(server, False)
    return builder.sign(issuer_key, hashes.SHA384())


def _name(host: str) -> x509.GeneralName:
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
