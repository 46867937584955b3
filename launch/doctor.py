"""`python -m launch doctor`: what is installed, which devices, what would fail and how to mend it."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tlite_jax.errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from launch.doctor_parts.findings import Finding
    from tlite_jax.config import RunConfig
    from tlite_jax.plan.topology import Hardware

HARDWARE = Path(__file__).resolve().parent.parent / "configs" / "hardware"
PLATFORMS = {"nvidia": ("gpu", "cuda"), "tpu": ("tpu",), "cpu": ("cpu",)}


def main(
    config: Annotated[Path | None, typer.Argument(help="A run's YAML, to check it against this machine.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.field=value ...")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    hardware: Annotated[
        str | None, typer.Option(help="To compare with: a name in configs/hardware, or a file; default: by the device.")
    ] = None,
    coordinator: Annotated[str | None, typer.Option(help="host:port of process 0, without a scheduler.")] = None,
    num_processes: Annotated[int | None, typer.Option(help="Processes in the job.")] = None,
    process_id: Annotated[int | None, typer.Option(help="This process, from 0.")] = None,
) -> None:
    """Look at what is installed, the devices, disks, clocks and the network, and say what to mend.

    With CONFIG also at whether that run would start here. Started as `train` is (srun ...), it measures the exchange
    between nodes. Takes less than half a minute. Exits with status 1 if anything fails.

    Example: python -m launch doctor configs/tlite_8b_stage1.yaml --json
    """
    from launch.doctor_parts.machine import Network
    from launch.job.distributed import initialize
    from tlite_jax.config_files import load_config
    from tlite_jax.plan.topology import load_hardware

    run = load_config(config, overrides or ()) if config is not None else None
    described = load_hardware(hardware, HARDWARE) if hardware is not None else None
    network = Network()
    initialize(coordinator, num_processes, process_id)
    import jax

    findings = _look(run, described)
    findings += network.findings()
    if jax.process_index() == 0:
        print(
            json.dumps([asdict(each) for each in findings], ensure_ascii=False, indent=1)
            if as_json
            else _text(findings)
        )
    failed = any(each.status == "fail" for each in findings)
    if failed:
        raise typer.Exit(1)


def _look(run: "RunConfig | None", hardware: "Hardware | None") -> "list[Finding]":
    """All findings but the network's. Every process looks; what they measure together comes in the same order."""
    import jax

    from launch.doctor_parts import installed, interconnect, machine, run_checks

    gpus = len(installed.nvidia_smi("name"))
    findings = [*installed.check_versions(), *installed.check_extras(), *installed.check_driver()]
    findings += machine.check_devices(gpus)
    directory, needed, kept = Path.cwd(), None, 1
    if run is not None:
        of_run, resolved = run_checks.check_config(run)
        findings += of_run
        directory, needed = run.output, run_checks.checkpoint_bytes(resolved)
        kept = run.checkpoint.keep_latest + 1
    if jax.process_index() == 0:
        findings += machine.check_disk(directory, needed, kept)
    hardware = hardware or described(jax.local_devices()[0].device_kind)
    if hardware is not None and jax.local_devices()[0].platform not in PLATFORMS[hardware.kind]:
        hardware = None
    rates = interconnect.measure(_mesh(run))
    findings += interconnect.compare(rates, hardware, jax.local_device_count())
    findings += machine.check_clocks()
    proxies = sorted(name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy"))
    if proxies and jax.process_count() > 1:
        from launch.doctor_parts.findings import Finding

        message = f"{', '.join(proxies)} set: processes may look for each other there"
        findings.append(Finding("proxy", "warn", message, "unset them, or list the nodes in no_proxy"))
    return findings


def described(device_kind: str) -> "Hardware | None":
    """The hardware file of a GPU as its driver names it; None where there is none, or several differ in the network."""
    from tlite_jax.plan.topology import load_hardware

    files = [load_hardware(file.stem, HARDWARE) for file in sorted(HARDWARE.glob("*.yaml"))]
    found = [each for each in files if each.gpu is not None and each.gpu.description in device_kind]
    return found[0] if found else None


def _mesh(run: "RunConfig | None") -> "Mesh":
    """The run's mesh if the devices make it up, else one group of all of them in a node, replicated over nodes."""
    import jax

    from tlite_jax.config import MeshConfig
    from tlite_jax.sharding import make_mesh

    if run is not None:
        try:
            return make_mesh(run.mesh)
        except UserError:
            pass  # said already
    return make_mesh(MeshConfig(replica=jax.process_count()))


def _text(findings: "list[Finding]") -> str:
    lines = []
    for each in findings:
        lines.append(f"{each.status:<5} {each.name:<13} {each.message}")
        if each.mend and each.status != "ok":
            lines.append(f"{'':<19} mend: {each.mend}")
    counts = {status: sum(each.status == status for each in findings) for status in ("fail", "warn")}
    return "\n".join([*lines, f"{counts['fail']} to mend, {counts['warn']} to look at"])
