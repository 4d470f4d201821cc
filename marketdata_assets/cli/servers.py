"""`marketdata sandbox`, `dev`, `serve` and `demo`: servers that run until they are ended."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from marketdata_assets.cli.options import ListFormat
from marketdata_assets.cli.output import print_line, show
from marketdata_assets.errors import BadInput

if TYPE_CHECKING:
    from marketdata_assets.settings.universe import Settings

Port = Annotated[int, typer.Option(min=0, max=65535, help="The TCP port to listen on.")]

commands = typer.Typer()


@commands.command()
def sandbox(port: Port = 18081) -> None:
    """Run the sandbox exchange on 127.0.0.1: synthetic markets in Binance's wire format."""
    from marketdata_assets.sources.sandbox.server import SandboxExchange, serve_until_interrupted

    def on_ready(url: str) -> None:
        print_line(f"sandbox exchange at {url}  (base_url: {url})")

    serve_until_interrupted(SandboxExchange(), port, on_ready=on_ready)


@commands.command()
def dev(port: Port = 3000) -> None:
    """Serve the Dagster UI on 127.0.0.1 and run its daemon on your universe, until Ctrl-C."""
    from marketdata_assets.cli.serve import serve_ui
    from marketdata_assets.flows.operate.universe import load_universe
    from marketdata_assets.notify import open_channels

    settings = load_universe()
    urls = [url.get_secret_value() for url in settings.alerts]
    open_channels(settings.state, urls)  # finds a wrong URL before an alert needs it
    serve_ui(settings, port, report=print_line)


@commands.command()
def serve(
    role: Annotated[str, typer.Argument(metavar="ROLE", help="One of web, daemon and worker.")],
    *,
    host: Annotated[str, typer.Option(help="The address on which `web` listens.")] = "127.0.0.1",
    port: Port = 3000,
    processes: Annotated[
        int, typer.Option(min=1, help="How many runs a `worker` executes at once.")
    ] = 2,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Start nothing; exit with 0 when the role is alive on this machine."
        ),
    ] = False,
) -> None:
    """Serve one role of an instance that many machines share, until the process is ended.

    It needs `database:` of the universe, and a worker needs `broker:` as well.
    """
    from marketdata_assets.cli.serve import Role, RoleOptions, is_role_alive, serve_role
    from marketdata_assets.flows.operate.universe import load_universe

    if role not in list(Role):
        raise BadInput(f"{role} is not one of {', '.join(Role)}")
    settings, options = load_universe(), RoleOptions(host, port, processes)
    if check:
        raise typer.Exit(0 if is_role_alive(settings, Role(role), options) else 1)
    serve_role(settings, Role(role), options, report=print_line)


@commands.command()
def demo(
    ui: Annotated[
        bool, typer.Option("--ui/--no-ui", help="Serve the UI afterwards, until Ctrl-C.")
    ] = True,
    port: Port = 3000,
    folder: Annotated[
        Path, typer.Option(help="Keep the demo's universe, lake and state in this folder.")
    ] = Path("data/demo"),
) -> None:
    """Fetch, check and roll up two markets of the sandbox exchange, then serve the UI."""
    from marketdata_assets.cli.demo import run_sandbox, write_demo_universe
    from marketdata_assets.cli.serve import serve_ui

    with run_sandbox() as url:
        settings = write_demo_universe(folder, url)
        print_line(f"sandbox exchange at {url}, universe in {settings.source}")
        code = _run_demo(settings)
        if ui:
            serve_ui(settings, port, report=print_line)
    raise typer.Exit(code)


def _run_demo(settings: Settings) -> int:
    """Backfill the demo's universe and print what is stored; return the exit code."""
    from marketdata_assets.cli.backfill import run_backfill
    from marketdata_assets.cli.selection import select_window
    from marketdata_assets.context import open_context
    from marketdata_assets.flows.fetch.plan import BackfillPlanner
    from marketdata_assets.flows.read.coverage import CoverageReporter

    with open_context(settings) as context:
        window = select_window(settings, None, None)
        partitions = settings.partitions(settings.markets, window)
        code = run_backfill(settings, context.bind(BackfillPlanner).plan(partitions))
        found = context.bind(CoverageReporter).report(settings.markets)
        rejected = len(context.ledger.quarantine.rows(None, window))
    show(
        [each.as_dict() for each in found],
        ListFormat.TABLE,
        closing=f"{rejected} rows in quarantine; the UI has the result of every check",
    )
    return code
