"""The data engine on this machine: reading packed rows, planning 2,000 buckets, tokenising against the bare tokenizer.

    python bench/data.py            # about 5 minutes
    python bench/data.py --small    # half a minute: does it work
    python bench/data.py --json

Reading and tokenising use one core. Contenders take turns; medians are printed. Rates by processor time (`of core`) say
what a core can do; rates by the clock are lower where others use the machine.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from bench import _data_loader, _data_mixture, _data_tokenize  # noqa: E402  (found through the line above)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contender")
    parser.add_argument("--tokenizer", type=Path, help="a Hugging Face directory; default: one trained on the spot")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    options = parser.parse_args()
    tokens, megabytes = (2_000_000, 0.5) if options.small else (200_000_000, 8)
    results = {
        "loader": _data_loader.measure(tokens=tokens, repeats=options.repeats),
        "tokenise": _data_tokenize.measure(megabytes=megabytes, repeats=options.repeats, tokenizer=options.tokenizer),
    }
    scales = ("300B",) if options.small else tuple(_data_mixture.SCALES)
    repeats = 1 if options.small else min(3, options.repeats)
    results["mixture"] = {
        "command_seconds": _data_mixture.measure_command(repeats=repeats),
        "scales": _data_mixture.measure(repeats=repeats, scales=scales),
    }
    if options.json:
        print(json.dumps(results))
        return
    print(f"load of the machine {os.getloadavg()[0]:.2f}")
    _print_loader(results["loader"])
    _print_mixture(results["mixture"])
    _print_tokenise(results["tokenise"])


def _print_loader(results: dict[str, Any]) -> None:
    print(f"reading rows of {_data_loader.LENGTH} tokens, crc32c checked, warm")
    for name, found in results.items():
        rates = f"{found['core_mtok_per_second']:.0f} Mtok/s of core, {found['wall_mtok_per_second']:.0f} by the clock"
        share = f"{_data_loader.HOST_TOKENS_PER_SECOND:,} tok/s take {found['share_of_a_core']:.3%} of a core"
        print(f"  {name}: {rates}; {share}")


def _print_mixture(results: dict[str, Any]) -> None:
    print(f"`mixture` for {_data_mixture.NUM_BUCKETS:,} declared buckets: {results['command_seconds']:.2f} s in all")
    for name, found in results["scales"].items():
        seconds = f"planned in {found['plan_seconds']:.2f} s, resumed in {found['first_batch_seconds']:.3f} s"
        print(f"  {name}: {seconds}, {found['rows_per_second']:,.0f} rows/s, {found['memory_bytes'] / 1e6:.0f} MB")


def _print_tokenise(results: dict[str, Any]) -> None:
    print("tokenising text")
    for name, found in results.items():
        if isinstance(found, dict):
            rates = f"{found['core_mb_per_second']:.2f} MB/s of core, {found['wall_mb_per_second']:.2f} by the clock"
            print(f"  {name}: {rates}")
    same = "the same ids" if results["tokens_equal"] else "OTHER IDS"
    print(f"  a whole shard runs at {results['ratio']:.1%} of bare encode_batch_fast, with {same}")


if __name__ == "__main__":
    main()
