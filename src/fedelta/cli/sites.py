"""The commands of a deployment: a server, its sites, and keys for both."""

from pathlib import Path
from typing import Annotated

import typer

from fedelta.cli.terminal import Arguments, Resume, err, finish, flower_part, names, out, read_config
from fedelta.errors import FedeltaError


def serve(
    arguments: Arguments = None,
    keys: Annotated[
        Path | None, typer.Option(help="Folder with server.crt, server.key and sites/NAME.pub of each site.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int, typer.Option(help="Where sites reach this server.", min=1, max=65535)] = 9092,
    patience: Annotated[float, typer.Option(help="Seconds to wait for all sites.", min=1)] = 3600,
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS and no keys: on loopback alone.")] = False,
    sites: Annotated[str, typer.Option(help="With --insecure: the names of the sites, separated by commas.")] = "",
    resume: Resume = False,
) -> None:
    """Be the server of sites elsewhere: wait for all of them, train, and tell them when it is over."""
    from fedelta.cli.progress import TerminalProgress

    if insecure == (keys is not None):
        raise FedeltaError("serve: say --keys FOLDER, or --insecure for a trial on loopback")
    config = read_config(arguments)
    with TerminalProgress(err) as progress:
        finished = flower_part("server.serve").serve(
            config,
            keys=keys,
            sites=names(sites),
            host=host or ("127.0.0.1" if insecure else "0.0.0.0"),
            port=port,
            patience=patience,
            resume=resume,
            observer=progress,
        )
    finish([finished], config.folder)


def join(
    arguments: Arguments = None,
    server: Annotated[str, typer.Option(help="Of the server, as HOST:PORT.")] = "127.0.0.1:9092",
    data: Annotated[str, typer.Option(help="This site's rows: a file or a folder. They stay here.")] = "",
    rank: Annotated[int, typer.Option(help="That this site can afford.", min=1)] = 16,
    keys: Annotated[Path | None, typer.Option(help="Folder with site.key and the server's ca.crt.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS and no key: on loopback alone.")] = False,
    name: Annotated[str | None, typer.Option(help="With --insecure: of this site.")] = None,
    folder: Annotated[Path, typer.Option(help="For this site's logs.")] = Path("site"),
) -> None:
    """Be a site of a federation: train on rows of your own, until the server says that it is over."""
    from fedelta.cli.progress import Lines

    if not data:
        raise FedeltaError("join: say --data FILE, the rows of this site")
    if insecure == (keys is not None):
        raise FedeltaError("join: say --keys FOLDER, or --insecure for a trial on loopback")
    config = read_config(arguments)
    flower_part("site.join").join(
        config,
        server=server,
        data=data,
        rank=rank,
        keys=keys,
        name=name,
        folder=folder,
        observer=Lines(err),
    )


def keys(
    folder: Annotated[Path, typer.Argument(help="Must not exist.")],
    sites: Annotated[str, typer.Option(help="Their names, separated by commas.")],
    hosts: Annotated[str, typer.Option(help="Names or addresses of the server, separated by commas.")] = "",
) -> None:
    """Make certificates and keys for a deployment: a folder for the server, one for each site."""
    for written in flower_part("certificates").make_certificates(folder, names(sites), names(hosts)):
        out.print(written, highlight=False, soft_wrap=True)
