"""lm-evaluation-harness's model over ours: its requests answered as its HFLM answers them.

Needs the extra `eval`; import this module only where it is wanted.
"""

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tlite_jax.errors import UserError, require
from tlite_jax.evaluate.language_model import LanguageModel, rolling_windows
from tlite_jax.evaluate.scoring import NonFiniteError, Scored
from tlite_jax.generate import GREEDY, Sampling

require("lm_eval", extra="eval", purpose="lm-evaluation-harness")

from lm_eval.api.model import TemplateLM  # noqa: E402  (found by the line above)

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

MAX_NEW_TOKENS = 256  # HFLM's
_DEFAULT_TOP_K = 50  # transformers', where tokens are drawn and a task does not say
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is given
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
Progress = Callable[[str, int, int], None]
TokenRequest = tuple[tuple[str, str], list[int], list[int]]


class HarnessModel(TemplateLM):
    """A LanguageModel for lm-evaluation-harness: `lm_eval.simple_evaluate(HarnessModel(model), tasks=[...])`.

    Follows HFLM with logits_cache=False and softmax_dtype=float32. In a job of several processes every one of them must
    call it with the same requests; the work is shared out underneath.

    Args:
      model: scores and writes.
      progress: called with (what is done, requests done, requests in all).
      seed: of draws, where a task draws.
    """

    def __init__(self, model: LanguageModel, *, progress: Progress | None = None, seed: int = 0):
        super().__init__()
        self.model, self.tokenizer = model, model.tokenizer
        self._progress, self._seed = progress, seed
        self._drawn = 0

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's eos."""
        return self.model.end_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context becomes: bos, or eos."""
        return self.model.prefix_id

    @property
    def max_length(self) -> int:
        """Most tokens that are read at once."""
        return self.model.max_length

    @property
    def max_gen_toks(self) -> int:
        """Tokens to write where a task does not say."""
        return MAX_NEW_TOKENS

    @property
    def batch_size(self) -> int:
        """Batches are made by tokens; tasks are told 1."""
        return 1

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's own caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with the special tokens that the tokenizer adds."""
        return self.model.encode(string, add_special_tokens)

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text."""
        return self.model.decode(tokens, skip_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the tokenizer's chat template writes it."""
        return self.model.chat_text(chat_history, add_generation_prompt)

    def loglikelihood(self, requests: "list[Instance]", disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations, and whether each is the most likely one; without the harness's own bar."""
        return list(super().loglikelihood(requests, disable_tqdm=disable_tqdm))

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        for (context, continuation), _context_ids, ids in requests:
            if not ids:
                raise UserError(
                    f"no tokens to score: {continuation!r} after {context[-40:]!r} adds none to the context"
                )
        scores = self._score([(context, rest) for _, context, rest in requests], lambda number: requests[number][0])
        answers = [(scored.logprob, scored.is_greedy) for scored in scores]
        for (texts, _context_ids, _ids), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows that do not overlap."""
        texts = [str(request.args[0]) for request in requests]
        windows, owners = [], []
        for number, text in enumerate(texts):
            for window in rolling_windows(self.tok_encode(text), self.prefix_token_id, self.max_length):
                windows.append(window)
                owners.append(number)
        totals = [0.0] * len(texts)
        for owner, scored in zip(owners, self._score(windows, lambda window: texts[owners[window]]), strict=True):
            totals[owner] += scored.logprob
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[str]:
        """Continues contexts up to a stop string, the end of text or a number of tokens."""
        answers: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        for numbers in groups.values():
            options = requests[numbers[0]].args[1]
            texts = [str(requests[number].args[0]) for number in numbers]
            for number, text in zip(numbers, self._write(texts, options), strict=True):
                answers[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
            self._report("texts", len(answers), len(requests))
        return [answers[number] for number in range(len(requests))]

    def get_model_info(self) -> dict[str, Any]:
        """What the harness's results say of the model."""
        return {"model_dtype": self.model.dtype, "model_num_devices": self.model.mesh.size}

    def _score(self, requests: Sequence[tuple[list[int], list[int]]], name: Callable[[int], Any]) -> list[Scored]:
        try:
            return self.model.score_tokens(requests, lambda done, total: self._report("requests", done, total))
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}: {name(error.request)!r:.200}", error.request) from error

    def _write(self, texts: Sequence[str], options: dict[str, Any]) -> list[str]:
        stops, max_new_tokens, sampling = generation_options(options, self._seed)
        if max_new_tokens >= self.max_length:
            raise UserError(
                f"a task wants {max_new_tokens} new tokens, the model's context is {self.max_length}; "
                "give --gen-kwargs max_gen_toks=..."
            )
        first = self._drawn
        if sampling.temperature > 0:
            self._drawn += len(texts)  # repeats of a request draw anew
        written = self.model.write(
            [self.tok_encode(text) for text in texts],
            max_new_tokens=max_new_tokens,
            stops=stops,
            sampling=sampling,
            streams=range(first, first + len(texts)),
            truncate=True,
        )
        return [answer.text for answer in written]

    def _report(self, what: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(what, done, total)


def generation_options(options: dict[str, Any], seed: int = 0) -> tuple[list[str], int, Sampling]:
    """A task's generation_kwargs as HFLM understands them: stop strings, most new tokens, how tokens are chosen.

    Raises:
      UserError: an option that we do not have.
    """
    if not isinstance(options, dict):
        raise UserError(f"generation_kwargs are {options!r}, not a mapping; mend the task")
    until = options.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    lengths = [options[name] for name in _LENGTHS if options.get(name) is not None]
    known = {"until", *_LENGTHS, *_SAMPLING}
    harmless = {"num_beams": 1, "use_cache": True, "num_return_sequences": 1}
    unknown = [
        name
        for name, value in options.items()
        if name not in known and value is not None and harmless.get(name) != value
    ]
    if unknown:
        raise UserError(
            f"generation option {unknown[0]}={options[unknown[0]]!r} is not supported; supported: "
            f"{', '.join(sorted(known))}"
        )
    temperature = float(options.get("temperature") or 0.0)
    draws = options.get("do_sample")
    draws = temperature > 0 if draws is None else bool(draws)
    penalty = float(options.get("repetition_penalty") or 1.0)
    most = int(lengths[0]) if lengths else MAX_NEW_TOKENS
    if not draws:
        return stops, most, Sampling(repetition_penalty=penalty) if penalty != 1 else GREEDY
    if temperature == 0:
        raise UserError("do_sample=True with temperature 0: give a temperature above 0, or leave do_sample out")
    top_k = options.get("top_k")
    return (
        stops,
        most,
        Sampling(
            temperature=temperature,
            top_k=_DEFAULT_TOP_K if top_k is None else int(top_k),
            top_p=float(options.get("top_p") or 1.0),
            repetition_penalty=penalty,
            seed=int(options.get("seed") or seed),
        ),
    )
