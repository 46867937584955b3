"""Starting the processes of a job of tests."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
TIMEOUT = 300


def outcomes(module: str, directory: Path, *words: str) -> list[dict]:
    """What each of two processes of four devices has found; they get PORT COUNT PROCESS DIRECTORY and the words."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "4", "XLA_FLAGS": QUICK, "PYTHONPATH": str(REPOSITORY)}
    processes = []
    for number in range(2):
        command = [sys.executable, "-m", module, str(port), "2", str(number), str(directory), *words]
        with (directory / f"{number}.log").open("w") as log:
            processes.append(
                subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
    try:
        statuses = [process.wait(TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert statuses == [0, 0], "\n".join((directory / f"{number}.log").read_text()[-3000:] for number in range(2))
    return [json.loads((directory / f"{number}.json").read_text()) for number in range(2)]
