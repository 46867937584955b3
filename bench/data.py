"""The data engine on this machine: reading packed rows, planning a mixture of 2,000 buckets, tokenising.

    python bench/data.py            # about 2 minutes
    python bench/data.py --small    # seconds: does it work
    python bench/data.py --json

Reading and tokenising use one core each. Contenders take turns; medians are printed. Rates by processor time (`core`)
say what a core can do; rates by the clock are lower where others use the machine.
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

from bench import _data_loader  # noqa: E402  (found through the line above)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contender")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    tokens = 2_000_000 if options.small else 200_000_000
    results["loader"] = _data_loader.measure(tokens=tokens, repeats=options.repeats)
    if options.json:
        print(json.dumps(results))
        return
    print(f"load {os.getloadavg()[0]:.2f}; rows of {_data_loader.LENGTH} tokens, crc32c checked, one core, warm")
    for name, found in results["loader"].items():
        rates = f"{found['core_mtok_per_second']:.0f} Mtok/s of core, {found['wall_mtok_per_second']:.0f} by the clock"
        share = f"{_data_loader.HOST_TOKENS_PER_SECOND:,} tok/s take {found['share_of_a_core']:.3%} of a core"
        print(f"  {name}: {rates}; {share}")


if __name__ == "__main__":
    main()
