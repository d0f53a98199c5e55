"""TLS settings of a site: it verifies the server, and identifies itself with its certificate."""

import ssl
import tempfile
from pathlib import Path

from fedelta.errors import FedeltaError
from fedelta.flower.authority import RENEWAL, check_validity, read_certificate
from fedelta.flower.certificates import load_private_key, private_pem


def site_context(keys: Path) -> ssl.SSLContext:
    """Return the TLS settings of a site: it verifies the server and identifies itself.

    Args:
        keys: the site's folder, with `site.key`, `site.crt` and `ca.crt`.

    Raises:
        FedeltaError: if a file is missing or damaged, or the certificate is not valid at the moment.
    """
    key_file, certificate_file, authority_file = keys / "site.key", keys / "site.crt", keys / "ca.crt"
    for file in (key_file, authority_file):
        if not file.is_file():
            raise FedeltaError(f"--keys {keys}: no {file.name} there")
    key = load_private_key(key_file)
    if not certificate_file.is_file():
        raise FedeltaError(f"--keys {keys}: no site.crt there, the certificate for site.key; {RENEWAL}")
    certificate = read_certificate(certificate_file)
    if certificate.public_key() != key.public_key():
        raise FedeltaError(f"{certificate_file} is not the certificate of {key_file}: it holds another key")
    check_validity(certificate_file, certificate)
    try:
        context = ssl.create_default_context(cafile=str(authority_file))
    except ssl.SSLError as error:
        raise FedeltaError(f"{authority_file} is not a certificate ({error.reason})") from error
    # The library reads a key only from a file, and not in the format of ssh-keygen.
    with tempfile.NamedTemporaryFile(prefix="fedelta-", suffix=".pem") as pem_file:
        pem_file.write(private_pem(key))
        pem_file.flush()
        context.load_cert_chain(certificate_file, pem_file.name)
    return context
