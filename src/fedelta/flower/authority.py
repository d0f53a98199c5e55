"""The certificate authority of a federation: it signs the server's certificate and one for each site.

A site's certificate holds the public key with which its node signs requests. So the key in a verified certificate is
the identity of the site, and a site cannot send requests in the name of another.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedelta.errors import FedeltaError

VALIDITY = timedelta(days=365)
"""How long the certificates of the server and of a site are valid."""
AUTHORITY_VALIDITY = timedelta(days=3650)
CLOCK_TOLERANCE = timedelta(minutes=5)
"""Certificates are valid from a moment before they are made, for machines whose clocks are a little behind."""
AUTHORITY_NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedelta authority")])
PEM = serialization.Encoding.PEM
RENEWAL = "where the authority is, run `fedelta keys FOLDER --renew`"


class Authority:
    """An authority that signs certificates.

    Args:
        key: its private key.
        certificate: its own certificate.
    """

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self.key = key
        self.certificate = certificate

    @classmethod
    def create(cls, key: ec.EllipticCurvePrivateKey | None = None) -> "Authority":
        """Create an authority, or a new certificate for the authority with this key."""
        key = key or ec.generate_private_key(ec.SECP384R1())
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        builder = (
            _builder(AUTHORITY_NAME, key.public_key(), key.public_key(), AUTHORITY_VALIDITY)
            .issuer_name(AUTHORITY_NAME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
            .add_extension(usage, True)
        )
        return cls(key, builder.sign(key, hashes.SHA384()))

    @classmethod
    def load(cls, key_file: Path, certificate_file: Path) -> "Authority":
        """Load an authority from its files.

        Raises:
            FedeltaError: if a file is missing or damaged, or they do not belong together.
        """
        if not key_file.is_file():
            raise FedeltaError(f"{key_file}: no such file, expected the private key of the federation's authority")
        try:
            key = serialization.load_pem_private_key(key_file.read_bytes(), None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise FedeltaError(f"{key_file} is not a private key without a password") from error
        certificate = read_certificate(certificate_file)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise FedeltaError(f"{key_file} is not the key of the certificate {certificate_file}")
        return cls(key, certificate)

    def sign_server(self, key: ec.EllipticCurvePublicKey, hosts: Sequence[str]) -> x509.Certificate:
        """Sign a certificate with which a server identifies itself under the names or addresses `hosts`."""
        names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
        return self._sign("fedelta server", key, ExtendedKeyUsageOID.SERVER_AUTH, names)

    def sign_site(self, key: ec.EllipticCurvePublicKey, name: str) -> x509.Certificate:
        """Sign a certificate with which a site identifies itself to the server."""
        return self._sign(name, key, ExtendedKeyUsageOID.CLIENT_AUTH)

    def _sign(
        self,
        name: str,
        key: ec.EllipticCurvePublicKey,
        usage: x509.ObjectIdentifier,
        names: x509.SubjectAlternativeName | None = None,
    ) -> x509.Certificate:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = (
            _builder(subject, key, self.key.public_key(), VALIDITY)
            .issuer_name(self.certificate.subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
            .add_extension(x509.KeyUsage(True, False, False, False, False, False, False, False, False), True)
            .add_extension(x509.ExtendedKeyUsage([usage]), False)
        )
        if names is not None:
            builder = builder.add_extension(names, False)
        return builder.sign(self.key, hashes.SHA384())


def _builder(
    subject: x509.Name, key: ec.EllipticCurvePublicKey, issuer_key: ec.EllipticCurvePublicKey, validity: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_TOLERANCE)
        .not_valid_after(now + validity)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), False)
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def read_certificate(file: Path) -> x509.Certificate:
    """Read the first certificate of a file.

    Raises:
        FedeltaError: if the file is missing or does not hold a certificate.
    """
    if not file.is_file():
        raise FedeltaError(f"{file}: no such file, expected a certificate")
    try:
        return x509.load_pem_x509_certificate(file.read_bytes())
    except ValueError as error:
        raise FedeltaError(f"{file} is not a certificate in PEM format") from error


def check_validity(file: Path, certificate: x509.Certificate) -> None:
    """Check that a certificate is valid at the moment, by the clock of this machine.

    Args:
        file: the certificate's file, for the message.
        certificate: the certificate.

    Raises:
        FedeltaError: if it is not valid yet, or no longer.
    """
    now = datetime.now(UTC)
    if now < certificate.not_valid_before_utc:
        raise FedeltaError(
            f"{file} is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC, "
            f"and the clock of this machine says {now:%Y-%m-%d %H:%M} UTC: is it right?"
        )
    if now > certificate.not_valid_after_utc:
        raise FedeltaError(f"{file} expired on {certificate.not_valid_after_utc:%Y-%m-%d}; {RENEWAL}")


def encode_public_key(key: ec.EllipticCurvePublicKey) -> bytes:
    """Return a public key in the encoding that Flower's nodes send."""
    return key.public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
