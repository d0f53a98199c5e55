"""Certificates and keys for a deployment: an authority, the server's certificate, and a key and certificate per site.

Use them for a trial, or if you do not have a certificate authority. Only their owner can read the private keys.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedelta.errors import FedeltaError
from fedelta.files import new_folder, write_file
from fedelta.flower.authority import PEM, Authority, encode_public_key

SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
"""Pattern of a valid site name."""
LOOPBACK = ("127.0.0.1", "localhost")
SSH_KEYGEN = "ssh-keygen -t ecdsa -b 384"


def make_loopback_certificate(folder: Path) -> Path:
    """Write a certificate for 127.0.0.1 and the authority that signed it.

    The authority's key is discarded, so that it cannot sign anything else.

    Returns:
        The folder, which now holds `ca.crt`, `server.crt` and `server.key`.
    """
    write_server(folder, Authority.create(), LOOPBACK)
    return folder


def read_public_key(file: Path) -> bytes:
    """Read a site's public key, in the encoding that Flower's nodes send.

    Args:
        file: a public key written by `ssh-keygen -t ecdsa -b 384`.

    Raises:
        FedeltaError: if the file does not hold such a key.
    """
    return encode_public_key(load_public_key(file))


def load_public_key(file: Path) -> ec.EllipticCurvePublicKey:
    """Load a site's public key from a file written by `ssh-keygen -t ecdsa -b 384`.

    Raises:
        FedeltaError: if the file does not hold such a key.
    """
    try:
        key = serialization.load_ssh_public_key(file.read_bytes())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise FedeltaError(f"{file} is not a public key in the format of ssh-keygen") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise FedeltaError(f"{file} is not an ECDSA key of 384 bits; make one with: {SSH_KEYGEN}")
    return key


def derive_public_key(file: Path) -> bytes:
    """Derive the public key from a site's private key, in the encoding that Flower's nodes send.

    Args:
        file: a private key without a password, written by `ssh-keygen -t ecdsa -b 384`.

    Raises:
        FedeltaError: if the file does not hold such a key.
    """
    return encode_public_key(load_private_key(file).public_key())


def load_private_key(file: Path) -> ec.EllipticCurvePrivateKey:
    """Load a site's private key from a file written by `ssh-keygen -t ecdsa -b 384`, without a password.

    Raises:
        FedeltaError: if the file does not hold such a key.
    """
    try:
        key = serialization.load_ssh_private_key(file.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise FedeltaError(f"{file} is not a private key without a password in the format of ssh-keygen") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise FedeltaError(f"{file} is not an ECDSA key of 384 bits; make one with: {SSH_KEYGEN}")
    return key


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
    if not sites or len(set(sites)) < len(sites):
        raise FedeltaError(f"sites: {', '.join(sites) or 'none'}, expected at least one, each once")
    for site in sites:
        check_site_name(site)
    for host in hosts:
        if not host.isascii() or not host.replace("-", "").replace(".", "").replace(":", "").isalnum():
            raise FedeltaError(f"host {host!r}: expected a name such as fl.example.org, or an address")
    if folder.exists():
        raise FedeltaError(
            f"{folder} exists already; keys are never overwritten (--add NAME adds a site, --renew renews certificates)"
        )
    authority = Authority.create()
    with new_folder(folder) as scratch:
        write(scratch / "authority" / "ca.key", private_pem(authority.key))
        write(scratch / "authority" / "ca.crt", authority.certificate.public_bytes(PEM))
        write_server(scratch / "server", authority, [*dict.fromkeys((*hosts, *LOOPBACK))])
        for site in sites:
            make_site_key(scratch, authority, site)
    return [folder / "server", *(folder / "sites" / site for site in sites)]


def check_site_name(name: str) -> None:
    """Raise a FedeltaError if a site cannot have this name."""
    if not SITE_NAME.fullmatch(name):
        raise FedeltaError(f"site {name[:50]!r}: expected letters, digits, - and _")


def write_server(folder: Path, authority: Authority, hosts: Sequence[str]) -> None:
    """Write a new key for a server, its certificate, and the authority's certificate."""
    # Anyone can begin a handshake. With this curve it costs the server much less time than with the curve of sites.
    key = ec.generate_private_key(ec.SECP256R1())
    write(folder / "ca.crt", authority.certificate.public_bytes(PEM))
    write(folder / "server.crt", authority.sign_server(key.public_key(), hosts).public_bytes(PEM))
    write(folder / "server.key", private_pem(key))


def make_site_key(folder: Path, authority: Authority, site: str) -> None:
    """Write a new private key for a site, with its certificate, and admit the site."""
    key = ec.generate_private_key(ec.SECP384R1())
    write(folder / "sites" / site / "site.key", private_ssh(key))
    write_site(folder, authority, site, key.public_key())


def write_site(folder: Path, authority: Authority, site: str, key: ec.EllipticCurvePublicKey) -> None:
    """Write a certificate for a site's key, and admit the site. Existing certificates of the site are replaced."""
    write(folder / "sites" / site / "ca.crt", authority.certificate.public_bytes(PEM), replace=True)
    write(folder / "sites" / site / "site.crt", authority.sign_site(key, site).public_bytes(PEM), replace=True)
    # The server admits a site by its public key.
    public = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    write(folder / "server" / "sites" / f"{site}.pub", public + b"\n", replace=True)


def private_ssh(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Encode a private key as ssh-keygen does, which is the format that Flower's nodes read."""
    return key.private_bytes(PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Encode a private key in the format that TLS libraries read."""
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def write(path: Path, content: bytes, replace: bool = False) -> None:
    """Write a certificate or a key. Only the owner can read a private key, and it is never replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    secret = path.suffix == ".key"
    if secret:
        path.parent.chmod(0o700)
    if replace and not secret:
        write_file(path, content)
        return
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644), "wb") as stream:
        stream.write(content)
