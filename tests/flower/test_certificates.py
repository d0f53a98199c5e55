"""Certificates and keys of a deployment, used in the way that OpenSSL and Flower use them."""

import socket
import ssl
import threading
from pathlib import Path

import pytest

pytest.importorskip("cryptography")
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedelta.cli import app as cli
from fedelta.errors import FedeltaError
from fedelta.flower.certificates import make_certificates


def handshake(server: Path, authority: Path, name: str) -> None:
    """Do a TLS handshake over a pair of sockets, with the host name that the client expects."""
    server_socket, client_socket = socket.socketpair()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server / "server.crt", server / "server.key")

    def serve() -> None:
        try:
            context.wrap_socket(server_socket, server_side=True).close()
        except OSError:
            server_socket.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        ssl.create_default_context(cafile=str(authority)).wrap_socket(client_socket, server_hostname=name).close()
    finally:
        client_socket.close()
        thread.join()


def test_a_site_that_trusts_the_authority_reaches_the_server(tmp_path: Path) -> None:
    server, *sites = make_certificates(tmp_path / "keys", ["north", "south"], ["10.1.2.3", "fed.example.org"])
    for name in ("10.1.2.3", "fed.example.org", "127.0.0.1", "localhost"):
        for site in sites:
            handshake(server, site / "ca.crt", name)
    with pytest.raises(ssl.SSLCertVerificationError, match="not valid for"):
        handshake(server, sites[0] / "ca.crt", "other.example.org")
    other, *_ = make_certificates(tmp_path / "other", ["north"], ["10.1.2.3"])
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, other / "ca.crt", "10.1.2.3")


def test_the_server_has_the_public_key_of_each_site(tmp_path: Path) -> None:
    server, *sites = make_certificates(tmp_path / "keys", ["north", "south"], [])
    for site in sites:
        private = load_ssh_private_key((site / "site.key").read_bytes(), None)
        public = load_ssh_public_key((server / "sites" / f"{site.name}.pub").read_bytes())
        assert private.public_key().public_numbers() == public.public_numbers()  # type: ignore[union-attr]
        assert public.curve.name == "secp384r1"  # type: ignore[union-attr]


def test_only_the_owner_can_read_private_keys(tmp_path: Path) -> None:
    make_certificates(tmp_path / "keys", ["north"], [])
    private = sorted((tmp_path / "keys").rglob("*.key"))
    assert [file.parent.name for file in private] == ["authority", "server", "north"]
    assert all(file.stat().st_mode & 0o077 == 0 for file in private)
    # The folder of a site holds no key of the authority or of another site.
    assert sorted(file.name for file in (tmp_path / "keys" / "sites" / "north").iterdir()) == [
        "ca.crt",
        "site.crt",
        "site.key",
    ]


@pytest.mark.parametrize(
    ("sites", "words"), [([], "at least one"), (["a", "a"], "each once"), (["../a"], "letters"), (["a b"], "letters")]
)
def test_bad_names_are_refused_and_nothing_is_written(sites: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(FedeltaError, match=words):
        make_certificates(tmp_path / "keys", sites, [])
    assert not list(tmp_path.iterdir())


def test_keys_are_never_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["fedelta", "keys", str(tmp_path / "keys"), "--sites", "north, south", "--hosts", "10.1.2.3"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "keys" / part) for part in ("server", "sites/north", "sites/south")
    ]
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "exists already" in capsys.readouterr().err
