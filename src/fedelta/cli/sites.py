"""Commands of a deployment: serve, join and keys."""

from pathlib import Path
from typing import Annotated

import typer

from fedelta.cli.printing import MAX_PATH, print_text
from fedelta.cli.terminal import AcceptChangedData, Arguments, Resume, err, finish, flower_part, names, out, read_config
from fedelta.errors import FedeltaError


def serve(
    arguments: Arguments = None,
    keys: Annotated[
        Path | None, typer.Option(help="Folder with server.crt, server.key, ca.crt and sites/NAME.pub of each site.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int, typer.Option(help="Port on which sites reach this server.", min=1, max=65535)] = 9092,
    patience: Annotated[float, typer.Option(help="Seconds to wait until all sites have joined.", min=1)] = 3600,
    insecure: Annotated[bool, typer.Option("--insecure", help="Without TLS and keys; on loopback only.")] = False,
    sites: Annotated[str, typer.Option(help="With --insecure: names of the sites, separated by commas.")] = "",
    resume: Resume = False,
    accept_changed_data: AcceptChangedData = False,
) -> None:
    """Run the server of a deployment: wait for all sites, train, and tell them when training has ended."""
    if insecure == (keys is not None):
        raise FedeltaError("serve: pass --keys FOLDER, or --insecure for a trial on loopback")
    config = read_config(arguments)

    from fedelta.cli.progress import TerminalProgress

    with TerminalProgress(err, stamped=True) as progress:
        finished = flower_part("server.serve").serve(
            config,
            keys=keys,
            sites=names(sites),
            host=host or ("127.0.0.1" if insecure else "0.0.0.0"),
            port=port,
            patience=patience,
            resume=resume,
            observer=progress,
            accept_changed_data=accept_changed_data,
        )
    finish([finished], config.folder)


def join(
    arguments: Arguments = None,
    server: Annotated[str, typer.Option(help="Address of the server, as HOST:PORT.")] = "127.0.0.1:9092",
    data: Annotated[str, typer.Option(help="Rows of this site: a file or a folder. They stay on this machine.")] = "",
    rank: Annotated[int, typer.Option(help="Largest LoRA rank that this site can train.", min=1, max=10_000)] = 16,
    keys: Annotated[Path | None, typer.Option(help="Folder with site.key, site.crt and ca.crt.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Without TLS and key; on loopback only.")] = False,
    name: Annotated[str | None, typer.Option(help="With --insecure: name of this site.")] = None,
    folder: Annotated[Path, typer.Option(help="Folder for the logs of this site.")] = Path("site"),
    accept_changed_data: AcceptChangedData = False,
) -> None:
    """Run a site of a deployment: train on its own rows until the server ends the training."""
    if not data:
        raise FedeltaError("join: pass --data FILE, the rows of this site")
    if insecure == (keys is not None):
        raise FedeltaError("join: pass --keys FOLDER, or --insecure for a trial on loopback")
    config = read_config(arguments)

    from fedelta.cli.progress import MessagePrinter

    flower_part("site.join").join(
        config,
        server=server,
        data=data,
        rank=rank,
        keys=keys,
        name=name,
        folder=folder,
        observer=MessagePrinter(err, stamped=True),
        accept_changed_data=accept_changed_data,
    )


def keys(
    folder: Annotated[Path, typer.Argument(help="Folder to create, or with --add, --sign and --renew, to extend.")],
    sites: Annotated[str, typer.Option(help="Names of the sites, separated by commas.")] = "",
    hosts: Annotated[str, typer.Option(help="Names or addresses of the server, separated by commas.")] = "",
    request: Annotated[
        str, typer.Option(metavar="NAME", help="At a site: make its key, and a request for its certificate.")
    ] = "",
    sign: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Sign the request of a site; may be repeated.")
    ] = None,
    add: Annotated[str, typer.Option(help="Names of more sites, separated by commas.")] = "",
    renew: Annotated[bool, typer.Option("--renew", help="Make new certificates; the keys stay the same.")] = False,
) -> None:
    """Create certificates and keys for a deployment: one folder for the server, one for each site."""
    if sum(map(bool, (sites, request, sign, add, renew))) != 1:
        raise FedeltaError("keys: pass one of --sites NAMES, --add NAMES, --request NAME, --sign FILE and --renew")
    if hosts and not sites:
        raise FedeltaError("keys: --hosts works with --sites only; --renew keeps the names of the server")
    if sites:
        written = flower_part("certificates").make_certificates(folder, names(sites), names(hosts))
    else:
        signing = flower_part("signing")
        if request:
            written = signing.request_certificate(folder, request)
        elif sign:
            written = signing.sign_requests(folder, sign)
        elif add:
            written = signing.add_sites(folder, names(add))
        else:
            written = signing.renew(folder)
    for file in written:
        print_text(out, file, limit=MAX_PATH)
