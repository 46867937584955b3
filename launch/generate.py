"""`python -m launch generate CHECKPOINT`."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tlite_jax.errors import UserError

if TYPE_CHECKING:
    from tlite_jax.checkpoint import Checkpoint
    from tlite_jax.evaluate.language_model import LanguageModel

STREAM_STEPS = 4  # tokens between looks at the text, where somebody watches
_DOCUMENT_END = "<|endoftext|>"  # ends documents of models whose eos ends a turn of a chat


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Run, RUN/checkpoints/STEP, HF directory or GGUF file.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; may be repeated.")] = None,
    prompt_file: Annotated[
        str | None, typer.Option(help='A text file, or .jsonl with {"prompt": ...} lines; - is standard input.')
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts are a user's messages; uses the chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message, with --chat.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "--max-new-tokens", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Only the k most likely tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: what was said is less likely.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be repeated.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    num_samples: Annotated[int, typer.Option(min=1, help="Answers to each prompt.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    step: Annotated[str | None, typer.Option(help="Step of the run, or best; default: the newest.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each answer.")] = False,
) -> None:
    """Continue texts, or answer messages.

    Example: python -m launch generate runs/quickstart/run --prompt "Чтобы установить пакет,"
    """
    from launch.language_model import open_language_model
    from tlite_jax.generate import Sampling

    prompts = [*(prompt or []), *_read_prompts(prompt_file)]
    if not prompts or not all(prompts):
        raise UserError("the prompt is empty; give --prompt some text, or --prompt-file a file (- is standard input)")
    if system is not None and not chat:
        raise UserError("--system is for --chat")
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    if num_samples > 1 and temperature == 0:
        raise UserError(f"--num-samples {num_samples} would give one answer many times; set --temperature above 0")
    model = open_language_model(checkpoint, step=step, dtype=dtype)
    tokens = [_encode(model, text, chat, system) for text in prompts for _ in range(num_samples)]
    asked = [text for text in prompts for _ in range(num_samples)]
    show = _Show("" if chat else prompts[0], streams=len(tokens) == 1 and not as_json)
    written = model.write(
        tokens,
        max_new_tokens=max_tokens,
        stops=[*(stop or []), _DOCUMENT_END],
        sampling=sampling,
        **show.options,
    )
    if show.streams:
        print(flush=True)
        return
    for text, answer in zip(asked, written, strict=True):
        if as_json:
            values = {"prompt": text, "text": answer.text, "tokens": len(answer.tokens), "ending": answer.ending}
            print(json.dumps(values, ensure_ascii=False))
        else:
            print(("" if chat else text) + answer.text + "\n---", flush=True)


class _Show:
    """Prints an answer as it comes, after the text that it continues."""

    def __init__(self, before: str, *, streams: bool):
        self.streams = streams
        self.options: dict[str, Any] = {"on_text": self.text, "steps": STREAM_STEPS} if streams else {}
        self._before = before

    def text(self, _: int, new: str) -> None:
        print(self._before + new, end="", flush=True)
        self._before = ""


def continue_text(checkpoint: "Checkpoint", prompt: str, *, max_new_tokens: int, sampling: Any) -> str:
    """The text that a checkpoint's model writes after a prompt, up to the end of the document."""
    from launch.language_model import open_language_model

    model = open_language_model(checkpoint.path)
    tokens = [_encode(model, prompt, chat=False, system=None)]
    (written,) = model.write(tokens, max_new_tokens=max_new_tokens, stops=[_DOCUMENT_END], sampling=sampling)
    return written.text


def _encode(model: "LanguageModel", text: str, chat: bool, system: str | None) -> list[int]:
    if not chat:
        return model.encode(text)
    messages = [{"role": "system", "content": system}] if system else []
    return model.encode(model.chat_text([*messages, {"role": "user", "content": text}]), add_special_tokens=False)


def _read_prompts(file: str | None) -> list[str]:
    if file is None:
        return []
    try:
        content = (sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()).decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read --prompt-file {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt-file {file} is not UTF-8 at byte {error.start}") from error
    if not file.endswith(".jsonl"):
        return [content]
    prompts = []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            value = json.loads(line)["prompt"]
            assert isinstance(value, str)
        except (ValueError, LookupError, TypeError, AssertionError) as error:
            raise UserError(f'{file}, line {number}: expected {{"prompt": "..."}}') from error
        prompts.append(value)
    return prompts
