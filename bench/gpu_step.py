"""Our training step against torch on one GPU, side by side, at Llama-3-8B's real width; see docs/gpu_step.md.

    python bench/gpu_step.py                                  # on one H200, under 9 minutes
    python bench/gpu_step.py --toy --device cpu               # the same program at toy size, on any machine
    python bench/gpu_step.py --compile-only h200              # our step's memory, compiled for a described GPU

Turns: ours, torch, ours, torch. Each is a process of its own, which has the whole GPU and gives everything back when
it ends; compiled programs are kept in --cache, so that only the first turn of each compiles.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench._gpu_problem import Problem
    from bench._gpu_report import Measured

ROOT = Path(__file__).resolve().parent.parent
WORKERS = {"ours": "bench._gpu_jax", "torch": "bench._gpu_torch"}
RESERVE_SECONDS = 10.0  # of the time budget, for ending a turn and printing


def main() -> None:
    """Runs the turns and prints what they found."""
    options = _options()
    sys.path.insert(0, str(ROOT))
    from bench import _gpu_report
    from tlite_jax.errors import UserError, require

    try:
        problem = _problem(options)
        if options.compile_only:
            _compile_only(problem, options.compile_only)
            return
        require("torch", extra="torch", purpose="the other contender")
    except UserError as error:
        raise SystemExit(str(error)) from None

    contenders = {name: _gpu_report.Measured() for name in WORKERS}
    try:
        _take_turns(problem, options.turns, contenders)
        agreement = _gpu_report.check_agreement(problem, contenders["ours"], contenders["torch"])
    except _gpu_report.DisagreementError as error:
        raise SystemExit(f"FAILED: {error}") from None
    _print_results(options, problem, contenders, agreement)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=_layers, help="depths, e.g. 4,8,12 (the default; 1,2,3 with --toy)")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of a depth in a turn")
    parser.add_argument("--turns", type=int, default=2, help="of each contender, at most")
    parser.add_argument("--minutes", type=float, default=9.0, help="time budget; turns that do not fit are left out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--toy", action="store_true", help="a tiny model; with --device cpu under a minute")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of products; default bfloat16, toy float32")
    parser.add_argument("--hardware", help="whose peak FLOP/s to use, e.g. 'H200'; default: the device's own name")
    parser.add_argument("--chunk-tokens", type=int, help="tokens whose logits exist at once, in both")
    parser.add_argument("--torch-backend", help="of torch.compile; default inductor, on a CPU without code generation")
    parser.add_argument(
        "--execution", nargs="*", default=[], metavar="NAME=VALUE", help="further fields of our execution section"
    )
    parser.add_argument("--cache", type=Path, default=ROOT / "runs/gpu_step_cache", help="compiled programs")
    parser.add_argument("--profile", type=Path, help="save a jax profiler trace of one step of the deepest model")
    parser.add_argument("--target", type=Path, help="save the device's target description and its memory")
    parser.add_argument("--compile-only", metavar="HARDWARE", help="a name of configs/hardware; needs no GPU")
    return parser.parse_args()


def _layers(text: str) -> tuple[int, ...]:
    layers = tuple(sorted({int(number) for number in text.split(",")}))
    if layers[0] < 1:
        raise argparse.ArgumentTypeError("a model has at least 1 layer")
    return layers


def _problem(options: argparse.Namespace) -> "Problem":
    import yaml

    from bench._gpu_problem import LLAMA_3_8B, TOY, Problem
    from tlite_jax.config import ExecutionConfig
    from tlite_jax.config_files import parse

    execution = {name: yaml.safe_load(value) for name, _, value in (pair.partition("=") for pair in options.execution)}
    parse(ExecutionConfig, execution, origin="--execution")
    toy = options.toy
    backend = "inductor" if options.device == "cuda" else "aot_eager_decomp_partition"
    return Problem(
        shape=TOY if toy else LLAMA_3_8B,
        layers=options.layers or ((1, 2, 3) if toy else (4, 8, 12)),
        sequence=128 if toy else 8192,
        microbatches=4 if toy else 8,
        chunk_tokens=options.chunk_tokens or (64 if toy else 2048),
        dtype=options.dtype or ("float32" if toy else "bfloat16"),
        device=options.device,
        repeats=options.repeats,
        deadline=time.time() + 60 * options.minutes - RESERVE_SECONDS,
        cache=str(options.cache.resolve()),
        torch_backend=options.torch_backend or backend,
        execution=execution,
        profile=str(options.profile.resolve()) if options.profile else None,
        target=str(options.target.resolve()) if options.target else None,
    )


def _take_turns(problem: "Problem", turns: int, contenders: dict[str, "Measured"]) -> None:
    """Fills `contenders`; after the first turn of both, the two must agree."""
    from bench import _gpu_report

    needed = dict.fromkeys(WORKERS, 0.0)
    for turn in range(turns):
        for name, measured in contenders.items():
            left = problem.deadline - time.time()
            if left < needed[name]:
                print(f"turn {turn + 1} of {name} left out: it takes {needed[name]:.0f} s, {left:.0f} s are left")
                return
            start = time.time()
            compiling = 0.0
            for message in _messages(problem, name, first=turn == 0):
                measured.add(message)
                compiling += message.get("first_seconds", 0.0)
                _say(turn, name, message)
            needed[name] = max(needed[name], 1.2 * (time.time() - start - compiling) + 10)
        if turn == 0:
            _gpu_report.check_agreement(problem, contenders["ours"], contenders["torch"])


def _say(turn: int, name: str, message: dict[str, Any]) -> None:
    match message["event"]:
        case "start":
            print(f"turn {turn + 1}, {name}: {message['version']} on {message['device_kind']}", flush=True)
        case "note":
            print(f"  {message['text']}", flush=True)
        case "depth":
            times = ", ".join(f"{second:.4g}" for second in message["seconds"])
            print(f"  {message['layers']} layers: first {message['first_seconds']:.1f} s, then {times} s", flush=True)


def _messages(problem: "Problem", name: str, *, first: bool, arguments: tuple[str, ...] = ()) -> Iterator[dict]:
    """Runs a contender's process and yields what it reports; it is ended when the time is over."""
    from dataclasses import replace

    told = problem if first else replace(problem, profile=None, target=None)
    command = [sys.executable, "-m", WORKERS[name], told.to_json(), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=_environment(problem))
    killer = threading.Timer(max(problem.deadline - time.time(), 0.0), process.kill)
    killer.start()
    assert process.stdout is not None
    with contextlib.ExitStack() as stack:
        stack.callback(killer.cancel)
        stack.callback(process.kill)
        for line in process.stdout:
            if line.startswith('{"event"'):
                yield json.loads(line)
        status = process.wait()
    if status and time.time() < problem.deadline:
        raise SystemExit(f"FAILED: the process of {name} ended with status {status}; its messages are above")
    if status:
        print(f"  {name} was ended: the time is over", flush=True)


def _environment(problem: "Problem") -> dict[str, str]:
    """A process has the whole GPU, so jax may take its memory at once, as in a run."""
    cache = Path(problem.cache)
    ours = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "JAX_PLATFORMS": problem.device,
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
    }
    # A CPU proves the program and times nothing: threads that wait for a busy core would make it take minutes.
    defaults = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"} if problem.device == "cuda" else {"OMP_NUM_THREADS": "1"}
    return {**defaults, **os.environ, **ours}


def _print_results(
    options: argparse.Namespace, problem: "Problem", contenders: dict[str, "Measured"], agreement: list[str]
) -> None:
    from bench import _gpu_report
    from tlite_jax.telemetry.throughput import peak_flops

    hardware = options.hardware or contenders["ours"].device_kind
    peak = peak_flops(hardware)
    ceilings = _gpu_report.best_ceilings(contenders)
    found = _gpu_report.rows(problem, contenders, ceilings, peak)
    rate = "unknown (give --hardware)" if peak is None else f"{peak / 1e12:.0f} TFLOP/s"
    print(f"\n{hardware}, peak {rate}; {problem.microbatches} x {problem.sequence} tokens a step, {problem.dtype}")
    print("\n".join(agreement), end="\n\n")
    print(_gpu_report.ceilings_table(problem, contenders), end="\n\n")
    print(_gpu_report.table(found), end="\n\n")
    _print_lines(found)
    if problem.device == "cuda":
        _print_memory(contenders["ours"])
    summary = {
        "versions": {name: measured.version for name, measured in contenders.items()},
        "device_kind": contenders["ours"].device_kind,
        "peak_flops": peak,
        "tokens_per_step": problem.tokens_per_step,
        "ceilings": ceilings._asdict(),
        "rows": found,
        "depths": {name: measured.depths for name, measured in contenders.items()},
    }
    print(json.dumps(summary))


def _print_lines(found: list[dict[str, Any]]) -> None:
    from bench._gpu_report import LARGEST_LINE_ERROR

    for row in (row for row in found if "line_error" in row):
        error = row["line_error"]
        miss = "not checked by a third depth" if error is None else f"a depth between misses it by {error:.1%}"
        if error is not None and error > LARGEST_LINE_ERROR:
            miss += ": TOO FAR, do not quote the fitted row"
        line = f"{row['fixed_seconds']:.4g} + {row['layer_seconds']:.4g} x layers s; {miss}"
        print(f"{row['contender']}: {line}")
    rates: dict[int, dict[str, float]] = {}
    for row in (row for row in found if "tokens_per_second" in row):
        rates.setdefault(row["layers"], {})[row["contender"]] = row["tokens_per_second"]
    ratios = [f"{layers} layers {pair['ours'] / pair['torch']:.3f}" for layers, pair in rates.items() if len(pair) == 2]
    print(f"tokens/s, ours / torch: {', '.join(ratios)}")


def _print_memory(ours: "Measured") -> None:
    """The compiler's figure beside the device's; the rest is the ceilings' remains and the allocator's rounding."""
    for layers, (depth, *_) in sorted(ours.depths.items()):
        planned, seen = depth["compiled_bytes"]["peak"], depth["peak_bytes"]
        print(f"memory of {layers} layers: compiler {planned / 1e9:.2f} GB, device {seen / 1e9:.2f} GB")


def _compile_only(problem: "Problem", hardware: str) -> None:
    """Prints the memory of every depth as compiled for a described device."""
    from dataclasses import replace

    from tlite_jax.plan.topology import load_hardware

    print(f"{load_hardware(hardware, ROOT / 'configs/hardware').title}, one device, nothing run:")
    problem = replace(problem, device="cpu")
    print("| layers | arguments GB | temporaries GB | peak GB | of the device | compiled in s |")
    print("|---|---|---|---|---|---|")
    for message in _messages(problem, "ours", first=True, arguments=(hardware,)):
        sizes = message["compiled_bytes"]
        columns = " | ".join(f"{sizes[key] / 1e9:.2f}" for key in ("arguments", "temporaries", "peak"))
        share = sizes["peak"] / message["capacity_bytes"]
        print(f"| {message['layers']} | {columns} | {share:.0%} | {message['seconds']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
