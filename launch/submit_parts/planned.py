"""Asking `plan` before a cluster is asked: does it fit, how fast will it be."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tlite_jax.errors import UserError


def plan(config_file: Path, hardware: str, nodes: int, gpus_per_node: int, hardware_directory: Path) -> str:
    """Compiles the run's step for the cluster, in a process of its own; one line that says what it will be.

    Raises:
      DoesNotFitError: it needs more memory than there is.
      UserError: it could not be planned.
    """
    with tempfile.TemporaryDirectory() as scratch:
        described = _with_gpus(hardware, gpus_per_node, hardware_directory, Path(scratch))
        command = [sys.executable, "-m", "launch", "plan", str(config_file), "--json"]
        command += ["--hardware", described, "--nodes", str(nodes)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    errors = [line.removeprefix("error: ") for line in ended.stderr.splitlines() if line.startswith("error: ")]
    said = errors[-1] if errors else f"plan ended with status {ended.returncode}"
    if ended.returncode == 1:
        raise DoesNotFitError(said)
    if ended.returncode:
        raise UserError(f"plan: {said}; mend it, or pass --no-plan")
    return _line(json.loads(ended.stdout))


class DoesNotFitError(Exception):
    """A run that a cluster cannot hold."""


def _line(planned: dict[str, Any]) -> str:
    memory = planned["memory"]
    needed, capacity = memory["needed_bytes"] / 2**30, memory["capacity_bytes"] / 2**30
    line = (
        f"plan for {planned['nodes']} nodes of {planned['hardware']}: {needed:.0f} of {capacity:.0f} GiB, at most "
        f"{planned['tokens_per_second_per_device']:,.0f} tokens/s/device"
    )
    days, dollars = planned["days"], planned["dollars"]
    line += f", {days:.2g} days" if days is not None else ""
    return line + (f", ${dollars:,.0f}" if dollars is not None else "")


def _with_gpus(hardware: str, gpus_per_node: int, directory: Path, scratch: Path) -> str:
    """The hardware, with as many devices in a node as are asked for."""
    from tlite_jax.plan.topology import load_hardware

    described = load_hardware(hardware, directory)
    if described.devices_per_node == gpus_per_node:
        return hardware
    path = scratch / "hardware.yaml"
    values = described.model_copy(update={"devices_per_node": gpus_per_node}).model_dump(mode="json")
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)
