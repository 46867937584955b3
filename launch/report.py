"""`python -m launch report RUN`."""

from pathlib import Path
from typing import Annotated

import typer

REFRESH_SECONDS = 30


def main(
    run: Annotated[Path, typer.Argument(help="A run's directory.")],
    out: Annotated[Path | None, typer.Option(help="Where to write the page; RUN/report.html if not given.")] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Serve the page, up to date, until Ctrl-C.")] = False,
    host: Annotated[str, typer.Option(help="Address to serve on; 0.0.0.0 shows it to the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to serve on.")] = 8008,
) -> None:
    """Write one self-contained HTML page about a run: learning, forgetting, data, speed and where the hours went.

    It needs nothing but the run's files, so it works while the run goes on, and on another machine.

    Example: python -m launch report runs/tlite_8b/stage1
    """
    from tlite_jax.errors import UserError
    from tlite_jax.report.page import render
    from tlite_jax.report.serve import make_server
    from tlite_jax.telemetry.metrics import replace_file

    if not serve:
        page = render(_read(run))
        path = out or run / "report.html"
        if path.is_dir():
            raise UserError(f"--out {path} is a directory; give a file, such as {path / 'report.html'}")
        try:
            replace_file(path, page.encode())
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; choose another --out") from error
        print(f"wrote {path} ({len(page) / 1024:.0f} KiB)")
        return
    _read(run)  # what is no run is refused now, not in the browser
    with make_server(lambda: render(_read(run), refresh_seconds=REFRESH_SECONDS), host, port) as server:
        print(f"http://{host}:{server.server_port}/  (Ctrl-C ends it)", flush=True)
        server.serve_forever()


def _read(directory: Path):
    from tlite_jax.report.read import read_run

    return read_run(directory)
