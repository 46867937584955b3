"""Eight emulated CPU devices for every test, unless TLITE_TEST_GPU=1 asks for this machine's GPUs (`make test-gpu`).

Set before anything imports jax.
"""

import os

if os.environ.get("TLITE_TEST_GPU") == "1":
    os.environ["JAX_PLATFORMS"] = "cuda"
else:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
