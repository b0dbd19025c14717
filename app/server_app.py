"""The Flower ServerApp: one run over the Grid that Flower gives."""

from __future__ import annotations

import sys

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from app.derive import start
from app.errors import UserError
from app.run_config import from_run_config

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the settings that the run config holds."""
    if hasattr(grid, "pull_interval"):
        # A simulation's grid is in this process: looking for replies costs next to nothing.
        grid.pull_interval = 0.005
    try:
        start(from_run_config(context.run_config), grid)
    except UserError as error:
        print(f"error: {error}", flush=True)
        sys.exit(2)
