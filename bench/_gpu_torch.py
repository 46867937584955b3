"""The step of `gpu_step.py` in torch, as well as we could set it up on one GPU; run as a process of its own.

What it does, so that it can be judged: one `torch.compile` of a block, which serves every layer and depth; selective
checkpointing that keeps the results of matrix products and of attention and recomputes the elementwise rest; cuDNN or
flash attention, whichever is the faster on this device; bf16 copies of the weights made once a step (autocast would
make them in every microbatch and again in the backward pass) with float32 masters; a microbatch's gradients added to
float32 sums as soon as they exist; the loss's gradients computed with the loss in chunks, the head's summed in float32
inside the product where torch can; fused AdamW, which takes the mean over tokens and the clipping as its grad_scale.

Shapes: B batch, T tokens, D embed, N heads, K kv heads, H head_dim, F mlp, V vocab, C tokens of a chunk.
"""

import gc
import math
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from bench import _gpu_problem as given
from bench._ceilings import measure_torch
from bench._gpu_problem import Problem, report
from tlite_jax.config import ModelConfig

BLOCK_NAMES = (*given.BLOCK_MATRICES, *given.BLOCK_NORMS)
ELEMENTS_AT_ONCE = 1 << 24  # of a weight while it is made: int64 temporaries stay small

_aten = torch.ops.aten
KEPT = {  # of a block's forward pass; everything else is computed again
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}


class Attention(NamedTuple):
    """A way to call scaled_dot_product_attention: a kernel, and whether keys and values are repeated for it."""

    backend: SDPBackend
    repeat: bool

    def __call__(self, q_BNTH: torch.Tensor, k_BKTH: torch.Tensor, v_BKTH: torch.Tensor) -> torch.Tensor:
        """Causal attention, [B, N, T, H], by this kernel or RuntimeError."""
        with sdpa_kernel(self.backend):
            return attend(q_BNTH, k_BKTH, v_BKTH, self.repeat)


ATTENTION: dict[str, dict[str, Attention]] = {
    "cuda": {
        "cudnn": Attention(SDPBackend.CUDNN_ATTENTION, repeat=False),
        "cudnn, kv repeated": Attention(SDPBackend.CUDNN_ATTENTION, repeat=True),
        "flash": Attention(SDPBackend.FLASH_ATTENTION, repeat=False),
        "flash, kv repeated": Attention(SDPBackend.FLASH_ATTENTION, repeat=True),
    },
    "cpu": {"flash for cpu": Attention(SDPBackend.FLASH_ATTENTION, repeat=False)},
}


def attend(q_BNTH: torch.Tensor, k_BKTH: torch.Tensor, v_BKTH: torch.Tensor, repeat: bool) -> torch.Tensor:
    """Causal grouped-query attention by whichever kernel is enabled."""
    if repeat:
        group = q_BNTH.shape[1] // k_BKTH.shape[1]
        k_BKTH, v_BKTH = k_BKTH.repeat_interleave(group, 1), v_BKTH.repeat_interleave(group, 1)
    return functional.scaled_dot_product_attention(q_BNTH, k_BKTH, v_BKTH, is_causal=True, enable_gqa=not repeat)


def make_weight(shape: tuple[int, ...], name: str, layer: int, device: str) -> torch.Tensor:
    """The float32 weight that `_gpu_problem` defines, made on the device."""
    mask = 0xFFFFFFFF
    size = math.prod(shape)
    weight = torch.empty(size, device=device)
    for start in range(0, size, ELEMENTS_AT_ONCE):
        stop = min(start + ELEMENTS_AT_ONCE, size)
        x = torch.arange(start, stop, device=device, dtype=torch.int64)
        x = (x * given.MULTIPLIERS[0] + given.salt(name, layer)) & mask
        for shift, multiplier in zip(given.SHIFTS[:2], given.MULTIPLIERS[1:], strict=True):
            x = ((x ^ (x >> shift)) * multiplier) & mask
        uniform = ((x ^ (x >> given.SHIFTS[2])) >> 8).float() * 2.0**-24 - 0.5
        width = given.NORM_WIDTH if given.is_norm(name) else given.MATRIX_WIDTH
        weight[start:stop] = uniform * float(width) + float(given.is_norm(name))
    return weight.view(shape)


def rms_norm(x_BTD: torch.Tensor, scale_D: torch.Tensor, eps: float) -> torch.Tensor:
    """In float32; [B, T, D] in x's dtype."""
    x32_BTD = x_BTD.float()
    inverse_BT1 = torch.rsqrt(x32_BTD.square().mean(-1, keepdim=True) + eps)
    return (x32_BTD * inverse_BT1).to(x_BTD.dtype) * scale_D


def rotate(x_BTNH: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of the pairs (i, i + H/2), in float32."""
    first, second = x_BTNH.float().chunk(2, -1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1).to(x_BTNH.dtype)


def make_block(model: ModelConfig, repeat: bool, compiled: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    """(x [B, T, D], cosine, sine, a layer's weights by BLOCK_NAMES) -> [B, T, D], checkpointed and `compiled`."""

    def block(x_BTD: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        query, key, value, output, gate, up, down, attention_norm, mlp_norm = weights
        B, T, _ = x_BTD.shape
        normed_BTD = rms_norm(x_BTD, attention_norm, model.rms_norm_eps)
        projected = (functional.linear(normed_BTD, weight) for weight in (query, key, value))
        q, k, v = (x.view(B, T, -1, model.head_dim) for x in projected)
        q, k = rotate(q, cosine, sine), rotate(k, cosine, sine)
        attended_BNTH = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), repeat)
        x_BTD = x_BTD + functional.linear(attended_BNTH.transpose(1, 2).reshape(B, T, -1), output)
        normed_BTD = rms_norm(x_BTD, mlp_norm, model.rms_norm_eps)
        gated_BTF = functional.silu(functional.linear(normed_BTD, gate))
        return x_BTD + functional.linear(gated_BTF * functional.linear(normed_BTD, up), down)

    def policy(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE

    def checkpointed(*operands: torch.Tensor) -> torch.Tensor:
        contexts = partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(block, *operands, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    return compiled(checkpointed)


def chunk_loss(
    hidden_CD: torch.Tensor, head_VD: torch.Tensor, targets_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A chunk's summed loss, and its gradient by the logits [C, V] and the hidden states [C, D]."""
    logits_CV = functional.linear(hidden_CD, head_VD).float()
    total_C = torch.logsumexp(logits_CV, -1)
    scored_C = targets_C >= 0
    chosen_C = logits_CV.gather(-1, torch.where(scored_C, targets_C, 0)[:, None])[:, 0]
    loss = torch.where(scored_C, total_C - chosen_C, 0.0).sum()
    wanted_CV = torch.arange(head_VD.shape[0], device=head_VD.device) == targets_C[:, None]
    dlogits_CV = torch.where(scored_C[:, None], (logits_CV - total_C[:, None]).exp() - wanted_CV.float(), 0.0)
    dlogits_CV = dlogits_CV.to(head_VD.dtype)
    return loss, dlogits_CV, dlogits_CV @ head_VD


def accumulation(device: str) -> tuple[Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any], str]:
    """How to add a bf16 product to a float32 sum: inside the product where this torch can, else after it."""

    def inside(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        _aten.addmm.dtype_out(total, left, right, torch.float32, out=total)

    def after(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        total.add_(left @ right)

    ones = torch.ones(64, 64, device=device, dtype=torch.bfloat16)
    total = torch.full((64, 64), 0.125, device=device)
    try:
        inside(total, ones, ones)
        inside(total, ones, ones)
    except (RuntimeError, AttributeError, TypeError):
        return after, "after it"
    return (inside, "inside it") if bool((total == 128.125).all()) else (after, "after it")


class Functions(NamedTuple):
    """What a step is made of: `make_block`'s, `rms_norm` and `chunk_loss` compiled, and `accumulation`'s."""

    block: Callable[..., torch.Tensor]
    norm: Callable[..., torch.Tensor]
    chunk: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    accumulate: Callable[..., Any]


class Step:
    """The model at a depth, its optimizer, and one step of both."""

    def __init__(self, problem: Problem, layers: int, functions: Functions):
        self._problem, self._functions = problem, functions
        model = problem.model(layers)
        self._eps = model.rms_norm_eps
        self.masters = _masters(model, problem.device)
        self.gradients = {name: torch.zeros_like(master) for name, master in self.masters.items()}
        dtype = getattr(torch, problem.dtype)
        self._copies = {name: master.to(dtype, copy=True) for name, master in self.masters.items()}
        self._first = True
        self._blocks = [tuple(self._leaf(name, layer) for name in BLOCK_NAMES) for layer in range(layers)]
        self._final_norm = self._leaf("final_norm", None)
        self._cosine, self._sine = _rope_tables(model, problem.sequence, problem.device)
        for name, master in self.masters.items():
            master.grad = self.gradients[name]
        self._optimizer = torch.optim.AdamW(
            list(self.masters.values()),
            lr=problem.learning_rate,
            betas=(problem.beta1, problem.beta2),
            eps=problem.eps,
            weight_decay=problem.weight_decay,
            fused=True,
        )

    def _leaf(self, name: str, layer: int | None) -> torch.Tensor:
        """A compute copy whose gradient goes to the float32 sums as soon as autograd has it."""
        copy, total = self._copies[name], self.gradients[name]
        if layer is not None:
            copy, total = copy[layer], total[layer]

        def add(leaf: torch.Tensor) -> None:
            assert leaf.grad is not None
            if self._first:
                total.copy_(leaf.grad)
            else:
                total.add_(leaf.grad)
            leaf.grad = None

        leaf = copy.detach().requires_grad_()
        leaf.register_post_accumulate_grad_hook(add)
        return leaf

    def __call__(self, tokens_MT: torch.Tensor, targets_MT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One step. Returns the mean loss and the gradient's norm, both before the update, without waiting for them."""
        losses = []
        for index, (tokens_T, targets_T) in enumerate(zip(tokens_MT, targets_MT, strict=True)):
            self._first = index == 0
            losses.append(self._microbatch(tokens_T, targets_T))
        count = (targets_MT >= 0).sum().float()
        return torch.stack(losses).sum() / count, self.update(count)

    def _microbatch(self, tokens_T: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
        if self._first:
            self.gradients["embedding"].zero_()
            self.gradients["head"].zero_()
        embedded_BTD = functional.embedding(tokens_T[None], self._copies["embedding"]).requires_grad_()
        x_BTD = embedded_BTD
        for weights in self._blocks:
            x_BTD = self._functions.block(x_BTD, self._cosine, self._sine, *weights)
        hidden_BTD = self._functions.norm(x_BTD, self._final_norm, self._eps)
        loss, dhidden_TD = self._loss(hidden_BTD.detach()[0], targets_T)
        hidden_BTD.backward(dhidden_TD[None])
        assert embedded_BTD.grad is not None
        self.gradients["embedding"].index_add_(0, tokens_T, embedded_BTD.grad[0].float())
        return loss

    @torch.no_grad()
    def _loss(self, hidden_TD: torch.Tensor, targets_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The summed loss and its gradient by the hidden states; the head's gradient is added to its sum."""
        losses, gradients = [], []
        size = self._problem.chunk_tokens
        for hidden_CD, targets_C in zip(hidden_TD.split(size), targets_T.split(size), strict=True):
            loss, dlogits_CV, dhidden_CD = self._functions.chunk(hidden_CD, self._copies["head"], targets_C)
            self._functions.accumulate(self.gradients["head"], dlogits_CV.T, hidden_CD)
            losses.append(loss)
            gradients.append(dhidden_CD)
        return torch.stack(losses).sum(), torch.cat(gradients)

    @torch.no_grad()
    def update(self, count: torch.Tensor) -> torch.Tensor:
        """Norm, clipping, AdamW and the new compute copies. Returns the norm of the mean gradient."""
        norm = torch.nn.utils.get_total_norm(list(self.gradients.values()), foreach=True) / count
        clip = (self._problem.max_norm / (norm + 1e-6)).clamp(max=1.0)
        # The fused kernel divides gradients by this as it reads them, as it does for GradScaler.
        self._optimizer.grad_scale = count / clip  # type: ignore[attr-defined]
        self._optimizer.found_inf = torch.zeros_like(norm)  # type: ignore[attr-defined]
        self._optimizer.step()
        torch._foreach_copy_(list(self._copies.values()), list(self.masters.values()))
        return norm


def _masters(model: ModelConfig, device: str) -> dict[str, torch.Tensor]:
    """Float32 weights; those of blocks are stacked over layers."""
    masters = {}
    for name, shape in given.parameter_shapes(model).items():
        if name not in BLOCK_NAMES:
            masters[name] = make_weight(shape, name, 0, device)
            continue
        masters[name] = torch.empty((model.num_hidden_layers, *shape), device=device)
        for layer in range(model.num_hidden_layers):
            masters[name][layer] = make_weight(shape, name, layer, device)
    return masters


def _rope_tables(model: ModelConfig, length: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, [T, 1, H / 2] float32."""
    exponents = torch.arange(0, model.head_dim, 2, dtype=torch.float64) / model.head_dim
    frequencies = (model.rope_theta**-exponents).float()
    angles = (torch.arange(length).float()[:, None] * frequencies)[:, None].to(device)
    return angles.cos(), angles.sin()


def measure(problem: Problem, layers: int, step: Step) -> dict[str, Any]:
    """Takes the first step, which compiles, then timed ones, then times the update alone."""
    wait = torch.cuda.synchronize if problem.device == "cuda" else lambda: None
    tokens, targets = (torch.from_numpy(array).long().to(problem.device) for array in problem.batch())
    losses, seconds, norm = [], [], math.nan
    for index in range(problem.repeats + 1):
        start = time.perf_counter()
        loss, gradient_norm = step(tokens, targets)
        wait()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
        norm = gradient_norm.item() if index == 0 else norm
    peak = torch.cuda.max_memory_allocated() if problem.device == "cuda" else given.peak_host_bytes()
    updates = []
    for _ in range(4):
        start = time.perf_counter()
        step.update((targets >= 0).sum().float())
        wait()
        updates.append(time.perf_counter() - start)
    return {
        "layers": layers,
        "first_seconds": seconds[0],
        "seconds": seconds[1:],
        "losses": losses,
        "gradient_norm": norm,
        "update_seconds": sorted(updates[1:])[1],
        "peak_bytes": peak,
    }


def fastest_attention(seconds: Mapping[str, float], device: str) -> tuple[str, Attention]:
    """Of the measured ways to attend, `{"torch NAME": seconds}`, the one to use."""
    name = min(seconds, key=lambda choice: seconds[choice]).removeprefix("torch ")
    return name, ATTENTION[device][name]


def main() -> None:
    """Measures ceilings, then every depth, and reports each on standard output."""
    problem = Problem.from_json(sys.argv[1])
    name = torch.cuda.get_device_name() if problem.device == "cuda" else "cpu"
    report(event="start", version=f"torch {torch.__version__}", device_kind=name)
    ceilings = measure_torch(problem, ATTENTION[problem.device])
    report(event="ceilings", **ceilings)
    choice, attention = fastest_attention(ceilings["attention"], problem.device)
    accumulate, where = accumulation(problem.device)
    report(event="note", text=f"torch: attention by {choice}; the head's product is added to its sum {where}")
    compiled = partial(torch.compile, dynamic=False, fullgraph=True, backend=problem.torch_backend)
    block = make_block(problem.model(1), attention.repeat, compiled)
    functions = Functions(block, compiled(rms_norm), compiled(chunk_loss), accumulate)
    with sdpa_kernel(attention.backend):
        for layers in given.depths_in_time(problem, "torch"):
            if problem.device == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            report(event="depth", **measure(problem, layers, Step(problem, layers, functions)))


if __name__ == "__main__":
    main()
