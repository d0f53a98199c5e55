"""Answers of a result to new prompts."""

import datetime
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fedelta.errors import FedeltaError
from fedelta.learning.device import device_errors
from fedelta.learning.model.padding import longest_text
from fedelta.learning.tasks import Completion, Conversation, LanguageTask, plain
from fedelta.learning.tasks.chat_cells import read_asked
from fedelta.learning.tasks.chat_message import read_tools
from fedelta.learning.tasks.chat_template import ChatTemplate, Message
from fedelta.learning.tasks.generation import end_tokens, padded_prompts
from fedelta.learning.tasks.turns import Turns
from fedelta.runs.finished import Run
from fedelta.runs.prompts import Prompt, Question, checked_text, read_prompts
from fedelta.runs.result_model import ResultModel, check_result, load_result
from fedelta.seeds import derive_seed, torch_seed

NEW_TOKENS = 256
"""Maximum number of tokens in an answer if neither the caller nor the run says it."""
BATCH = 8
MIN_TEMPERATURE = 1e-3
"""Logits that are divided by much less are infinite."""


class Decoding(NamedTuple):
    """How an answer is chosen.

    Args:
        max_new_tokens: maximum number of tokens in an answer. None takes the run's `task.generate.max_new_tokens`, or
            256.
        sample: draw tokens at random. Otherwise each is the most probable one.
        temperature, top_p: temperature, and share of the probability that is drawn from. They are for sampling.
        seed: seed of the draws.
    """

    max_new_tokens: int | None = None
    sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raise a FedeltaError if a value is not valid."""
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise FedeltaError(f"max_new_tokens is {self.max_new_tokens}, expected at least 1")
        if not MIN_TEMPERATURE <= self.temperature < float("inf"):
            raise FedeltaError(f"temperature is {self.temperature}, expected a number of at least {MIN_TEMPERATURE}")
        if not 0 < self.top_p <= 1:
            raise FedeltaError(f"top_p is {self.top_p}, expected a number above 0 and at most 1")
        if self.seed < 0:
            raise FedeltaError(f"seed is {self.seed}, expected at least 0")
        if not self.sample and (self.temperature, self.top_p) != (1.0, 1.0):
            raise FedeltaError("temperature and top_p are for sampling: add --sample")


class Writer:
    """Writes answers to prompts and chats with a loaded result.

    Args:
        result: a loaded language model.
        decoding: how answers are chosen.
        chat: True makes each prompt a user's turn, False does not. None does what the run has trained.
        system: text of a system turn before the user's, for chats; empty for none. None takes the one that the run
            has trained with, if all of its conversations had the same.

    Attributes:
        tokenizer: the model's tokenizer.
        limit: maximum number of tokens in an answer.
        cut: number of answers so far that have reached this limit without an end.

    Raises:
        FedeltaError: if a chat is asked for and the tokenizer has no chat template, or a value is not valid.
    """

    def __init__(
        self, result: ResultModel, decoding: Decoding, chat: bool | None = None, system: str | None = None
    ) -> None:
        decoding.check()
        self._model, self.tokenizer, self._task = result.model, result.tokenizer, result.task
        self._decoding, self._place = decoding, result.place
        self._turns: Turns | None = None
        task = self._task if isinstance(self._task, LanguageTask) else None
        date = task.date if task else datetime.date.today().isoformat()
        if chat is None:
            self._turns = task.turns(self.tokenizer) if task else None
        elif chat:
            if self.tokenizer.chat_template is None:
                raise FedeltaError(f"{result.place}: --chat needs a chat template, which this tokenizer does not have")
            self._turns = Turns(self.tokenizer, date)
        self._system = task.constant_system if system is None and isinstance(task, Conversation) else system
        if system is not None and self._turns is None:
            raise FedeltaError(f"{result.place}: --system is for chats, but this model completes plain prompts")
        self._template = ChatTemplate(self.tokenizer, date) if self._turns else None
        generate = task.generate if task else None
        self.cut = 0
        self.limit = decoding.max_new_tokens or (generate.max_new_tokens if generate else NEW_TOKENS)

    @property
    def chats(self) -> bool:
        """Whether prompts are turns of a chat."""
        return self._turns is not None

    def tokens(self, prompt: str) -> list[int]:
        """Tokens of a prompt, as in training.

        Raises:
            FedeltaError: if the prompt is empty or not valid Unicode, or longer than the model takes.
        """
        checked_text(prompt)
        if self._template is not None:
            return self.chat_tokens([{"role": "user", "content": prompt}])
        begin, before, _ = next(plain.read([prompt], [self._begin_of_answer()], self.tokenizer))
        return self._checked([*begin, *before])

    def question_tokens(self, question: Question) -> list[int]:
        """Tokens of a prompt that `read_prompts` has returned.

        Raises:
            FedeltaError: naming the prompt: as for `tokens`, or if the model does not take chats.
        """
        try:
            if question.text is not None:
                return self.tokens(question.text)
            if self._template is None:
                raise FedeltaError(f"{self._place}: messages are for chats, but this model completes plain prompts")
            tools = question.row.get("tools")
            messages = read_asked(question.row["messages"])
            return self.chat_tokens(messages, None if tools is None else read_tools(tools))
        except FedeltaError as error:
            raise FedeltaError(f"{question.place}: {error}") from error

    def _begin_of_answer(self) -> str:
        """A text that stands for the answer: it decides whether white space at the end of a prompt belongs to it."""
        template = self._task.completion if isinstance(self._task, Completion) else "{a}"
        return template.format_map(defaultdict(lambda: "a"))

    def chat_tokens(self, messages: Sequence[Message], tools: Any = None) -> list[int]:
        """Tokens of a chat, up to where its next answer begins. Messages with a system turn of their own keep it."""
        assert self._template is not None
        own = messages[0]["role"] == "system"
        system = [{"role": "system", "content": self._system}] if self._system and not own else []
        text = checked_text(self._template.render([*system, *messages], True, tools))
        return self._checked(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _checked(self, tokens: list[int]) -> list[int]:
        longest = longest_text(self._model, self.tokenizer)
        if len(tokens) + self.limit > longest:
            raise FedeltaError(
                f"a prompt of {len(tokens)} tokens and an answer of {self.limit} are more than the {longest} tokens "
                "that the model takes; shorten the prompt, or lower --max-new-tokens"
            )
        return tokens

    def answers(self, prompts: Sequence[Sequence[int]]) -> Iterator[str]:
        """Yield the answer to each prompt, in order."""
        # Draws of one prompt must not depend on the others.
        size = 1 if self._decoding.sample else BATCH
        for start in range(0, len(prompts), size):
            for tokens in self._generate(prompts[start : start + size], start):
                yield self._text(tokens)

    def stream(self, prompt: Sequence[int], streamer: Any, number: int = 0) -> str:
        """Generate one answer, pass its text to a transformers streamer as it grows, and return it.

        Args:
            prompt: its tokens.
            streamer: a `transformers.TextStreamer`.
            number: number of earlier prompts, on which the draws of a sample depend.
        """
        return self._text(self._generate([prompt], number, streamer)[0])

    def _text(self, tokens: list[int]) -> str:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return LanguageTask.answer_text(text, self._turns)

    @torch.no_grad()
    def _generate(self, prompts: Sequence[Sequence[int]], number: int, streamer: Any = None) -> list[list[int]]:
        from transformers import GenerationConfig

        device, pad = self._model.device, self.tokenizer.pad_token_id
        inputs = padded_prompts(prompts, pad, device)
        own = self._model.get_base_model().generation_config
        ends = end_tokens(own, self.tokenizer, self._turns.end if self._turns else None)
        sampling: dict[str, Any] = {"do_sample": False}
        if self._decoding.sample:
            # transformers keeps the 50 most probable tokens unless it is told otherwise.
            sampling = {"do_sample": True, "temperature": self._decoding.temperature, "top_k": 0}
            sampling["top_p"] = self._decoding.top_p
        config = GenerationConfig(max_new_tokens=self.limit, pad_token_id=pad, eos_token_id=ends or None, **sampling)
        seed = derive_seed(self._decoding.seed, "answer", number)
        with device_errors("answers are generated", ["lower --max-new-tokens"]), torch_seed(seed, device):
            generated = self._model.generate(**inputs, generation_config=config, streamer=streamer)
        answers: list[list[int]] = generated[:, inputs["input_ids"].shape[1] :].tolist()
        self.cut += sum(len(answer) >= self.limit and not set(ends) & set(answer) for answer in answers)
        return answers


def generate(
    result: Run | str | Path,
    prompts: str | Sequence[str] | Sequence[Mapping[str, Any]],
    *,
    chat: bool | None = None,
    system: str | None = None,
    max_new_tokens: int | None = None,
    sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    client: str | None = None,
    base: str | Path | None = None,
    device: str = "auto",
    dtype: str | None = None,
) -> list[str]:
    """Return a result's answer to each prompt.

    Args:
        result: a run, its folder, or an adapter folder.
        prompts: whole prompts, or mappings: `messages` of a chat (perhaps with `tools`), or the columns that fill the
            template of the run's prompts.
        chat: True makes each prompt a user's turn, False does not. None does what the run has trained.
        system: text of a system turn, for chats; empty for none. None takes the run's, if it has trained with one.
        max_new_tokens: maximum number of tokens in an answer. None takes that of the run, or 256.
        sample: draw tokens at random, with `temperature` and `top_p`. Otherwise each is the most probable one.
        temperature, top_p: temperature, and share of the probability that is drawn from.
        seed: seed of the draws.
        client: client whose adapter answers, if the method has no global model.
        base: folder or name of the base model, if it is not where the result says.
        device: `auto`, `cpu` or `cuda`.
        dtype: `float32` or `bfloat16`; None takes that of the run.

    Raises:
        FedeltaError: if the result is not a language model, its base is missing, or a prompt is not valid.

    Example:
        >>> fedelta.generate("runs/my", ["Describe abs(x)."])  # doctest: +SKIP
        >>> fedelta.generate("runs/my", [{"signature": "abs(x, /)"}])  # doctest: +SKIP
    """
    place = result.folder.path if isinstance(result, Run) else result
    own_base = None if base is None else str(base)
    decoding = Decoding(max_new_tokens, sample, temperature, top_p, seed)
    decoding.check()
    given: Sequence[str | Mapping[str, Any]] = [prompts] if isinstance(prompts, str) else prompts
    asked = [
        Prompt(f"prompt {i}", {"prompt": row}, True) if isinstance(row, str) else Prompt(f"prompt {i}", row)
        for i, row in enumerate(given, 1)
    ]
    # What can be checked without the model is checked before it is loaded, which may take minutes.
    questions = read_prompts(asked, check_result(place, "generate", client).task, str(place))
    loaded = load_result(place, "generate", client=client, base=own_base, device=device, dtype=dtype)
    writer = Writer(loaded, decoding, chat, system)
    return list(writer.answers([writer.question_tokens(question) for question in questions]))
