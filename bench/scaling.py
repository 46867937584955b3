"""Tokens a second and GPU from 8 to 12,288 GPUs, on paper: the step compiled for each cluster, priced by `plan`.

    python bench/scaling.py --plot docs/scaling.png       # every program is compiled; no GPU is needed

Sequences per GPU stay as many (`--sequences`, in microbatches of one), so the batch grows with the GPUs. Full shard
shards over all of them; hybrid shards over a node's eight and replicates over nodes. One compiled program is priced
with each network: one 200 Gb NIC a node, and eight of 400 Gb. docs/plan.md has the formulas.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tlite_jax.config import RunConfig
from tlite_jax.config_files import load_config, override
from tlite_jax.plan.cost import estimate
from tlite_jax.plan.topology import Hardware, load_hardware
from tlite_jax.plan.worker import Failure, Request, compile_variants

REPOSITORY = Path(__file__).resolve().parent.parent
NODES = (1, 2, 4, 12, 32, 128, 512, 1536)
NICS = {"1 x 200 Gb": (1, 200), "8 x 400 Gb": (8, 400)}
EFFICIENCY = 0.9  # of the line rate, as in configs/hardware
Speeds = dict[tuple[str, str], dict[int, float]]  # (mesh, NICs) -> GPUs -> tokens/s/GPU


def main() -> None:
    """Compiles, prices, prints a table and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=REPOSITORY / "configs" / "tlite_8b_stage1.yaml")
    parser.add_argument("--hardware", default="a100-80gb", help="a name in configs/hardware, or a YAML file")
    parser.add_argument("--sequences", type=int, default=8, help="of a GPU in a step")
    parser.add_argument("--nodes", type=int, nargs="+", default=NODES)
    parser.add_argument("--plot", type=Path, default=None, help="PNG to write")
    options = parser.parse_args()
    config = load_config(options.config)
    hardware = load_hardware(options.hardware, REPOSITORY / "configs" / "hardware")
    speeds: Speeds = {}
    for nodes in options.nodes:
        _measure(config, hardware, nodes, options.sequences, speeds)
    _print_table(hardware, options.sequences, speeds)
    if options.plot is not None:
        _draw(hardware, options.sequences, speeds, options.plot)


def _measure(config: RunConfig, hardware: Hardware, nodes: int, sequences: int, speeds: Speeds) -> None:
    """Adds the speeds of one cluster."""
    num_devices = nodes * hardware.devices_per_node
    shared = (f"train.batch_size={num_devices * sequences}", f"execution.num_microbatches={sequences}")
    meshes = {"hybrid": (nodes, hardware.devices_per_node), "full shard": (1, num_devices)}
    variants = {
        name: (*shared, f"mesh.replica={replica}", f"mesh.fsdp={fsdp}") for name, (replica, fsdp) in meshes.items()
    }
    request = Request(config=config, hardware=hardware, nodes=nodes, variants=tuple(variants.values()))
    for (name, words), program in zip(variants.items(), compile_variants(request), strict=True):
        if isinstance(program, Failure):
            print(f"{num_devices} GPUs, {name}: {program.message}", file=sys.stderr)
            continue
        print(f"{num_devices} GPUs, {name}: compiled in {program.compile_seconds:.0f} s", file=sys.stderr, flush=True)
        for network, nics in NICS.items():
            cost = estimate(program, _with_nics(hardware, *nics), override(config, words), nodes=nodes, headroom=0.05)
            speeds.setdefault((name, network), {})[num_devices] = cost.tokens_per_second_per_device


def _with_nics(hardware: Hardware, count: int, gigabits: int) -> Hardware:
    rate = hardware.rates.inter_node.model_copy(update={"value": count * gigabits / 8 * 1e9 * EFFICIENCY})
    return hardware.model_copy(update={"rates": hardware.rates.model_copy(update={"inter_node": rate})})


def _name(hardware: Hardware) -> str:
    return hardware.title.partition(",")[0]  # what follows tells of its own NICs


def _sizes(speeds: Speeds) -> list[int]:
    return sorted({size for by_size in speeds.values() for size in by_size})


def _print_table(hardware: Hardware, sequences: int, speeds: Speeds) -> None:
    columns = sorted(speeds, key=lambda key: (key[1], key[0]))
    print(f"{_name(hardware)}, {sequences} sequences a GPU and step: tokens/s/GPU")
    print("| GPUs | batch | " + " | ".join(f"{mesh}, {network}" for mesh, network in columns) + " |")
    print("|---" * (len(columns) + 2) + "|")
    for size in _sizes(speeds):
        cells = [f"{speeds[column][size]:,.0f}" if size in speeds[column] else "" for column in columns]
        print(f"| {size:,} | {size * sequences:,} | " + " | ".join(cells) + " |")


def _draw(hardware: Hardware, sequences: int, speeds: Speeds, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for mesh, network in sorted(speeds):
        by_size = speeds[mesh, network]
        style: Sequence[str] = ("C0" if mesh == "hybrid" else "C1", "-" if network == "8 x 400 Gb" else "--")
        axes.plot(
            list(by_size), list(by_size.values()), f"{style[0]}{style[1]}o", label=f"{mesh}, {network}", markersize=3
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(_sizes(speeds), [f"{size:,}" for size in _sizes(speeds)], rotation=45)
    axes.set_xticks([], minor=True)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("GPUs")
    axes.set_ylabel("tokens/s/GPU, roofline")
    axes.set_title(f"{_name(hardware)}, {sequences} sequences a GPU and step", fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
