"""`python -m launch generate CHECKPOINT`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tlite_jax.errors import UserError

if TYPE_CHECKING:
    from tlite_jax.checkpoint import Checkpoint


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Run directory, or one RUN/checkpoints/STEP.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    step: Annotated[int | None, typer.Option(help="Step of the run; default: the newest.")] = None,
) -> None:
    """Continue a text.

    Example: python -m launch generate runs/quickstart/run --prompt "Чтобы установить пакет,"
    """
    from tlite_jax.checkpoint import find
    from tlite_jax.generate import Sampling

    sampling = Sampling(temperature, top_p, seed)
    print(prompt + continue_text(find(checkpoint, step), prompt, max_new_tokens=max_new_tokens, sampling=sampling))


def continue_text(checkpoint: "Checkpoint", prompt: str, *, max_new_tokens: int, sampling: object) -> str:
    """The text that a checkpoint's model writes after a prompt, up to the end of the document."""
    from transformers import AutoTokenizer

    from tlite_jax.checkpoint import load_params
    from tlite_jax.generate import Sampling, generate

    assert isinstance(sampling, Sampling)
    if not checkpoint.tokenizer_dir.is_dir():
        raise UserError(f"{checkpoint.run} has no tokenizer directory; import the model with its tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.tokenizer_dir, local_files_only=True)
    tokens = tokenizer(prompt)["input_ids"]
    if not tokens:
        raise UserError("the prompt is empty; give --prompt some text")
    stop_ids = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")} - {None}
    steps = generate(
        load_params(checkpoint),
        checkpoint.meta.model,
        [tokens],
        max_new_tokens=max_new_tokens,
        stop_ids=sorted(stop_ids),
        sampling=sampling,
    )
    written = [token for (token,) in steps if token is not None]
    return str(tokenizer.decode(written, skip_special_tokens=True))
