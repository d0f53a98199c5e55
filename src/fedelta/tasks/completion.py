"""To complete a prompt: supervised fine-tuning of a causal language model, with the loss on the completion alone."""

import math
import string
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import field_validator, model_validator
from torch import Tensor

from fedelta.data import DataSettings
from fedelta.data.examples import IGNORED, Completions, Examples
from fedelta.errors import FedeltaError
from fedelta.model import LoraModel
from fedelta.prefix import Prefix
from fedelta.tasks.answers import ANSWERS, AnswerForm
from fedelta.tasks.generation import Generation, generate
from fedelta.tasks.task import Answer, Task, Unit
from fedelta.tasks.text_scores import TextScore, check_installed, text_scores

OF_LOSS = ("loss", "perplexity")


class Completion(Task):
    """A prompt and what is to follow it.

    Args:
        prompt, completion: templates with columns in braces, such as "Question: {question}\\nAnswer:". A model
            without a chat template sees just these one after the other, so a space between them is of one of them.
        chat: whether prompt and completion become turns of the tokenizer's chat template; None does so where it has
            one.
        group: column whose equal values share a prompt, so that an answer is compared with several completions; None
            takes equal prompts as such.
        generate: how the model is to answer prompts of the test split in the end, and in every evaluation if `metric`
            is of what it generates; None does not.
        scores: of what is generated, by the extra `generation`.
        answer: what of a generated text is compared for `exact`.
        metric: by which runs are judged.
    """

    kind: Literal["completion"] = "completion"
    metric: Literal["loss", "perplexity", "bleu", "nist", "meteor", "rouge_l", "cider", "exact"] = "loss"
    prompt: str = "{prompt}"
    completion: str = "{completion}"
    chat: bool | None = None
    group: str | None = None
    generate: Generation | None = None
    scores: tuple[TextScore, ...] = ()
    answer: AnswerForm | None = None

    @field_validator("prompt", "completion")
    @classmethod
    def _template(cls, template: str) -> str:
        if not _fields(template):
            raise ValueError("expected a column in braces, such as {question}")
        return template

    @model_validator(mode="after")
    def _what_is_judged(self) -> "Completion":
        if (self.scores or self.answer) and self.generate is None:
            raise ValueError("scores and answer are of what is generated: say how, as generate: {max_new_tokens: 64}")
        made = (*OF_LOSS, *self.scores, *(["exact"] if self.answer else []))
        if self.metric not in made:
            raise ValueError(f"metric {self.metric} is not computed, found {', '.join(made)}")
        return self

    def check_installed(self) -> None:
        check_installed(self.scores)

    def columns(self, data: DataSettings) -> dict[str, bool]:  # noqa: ARG002
        names = [*_fields(self.prompt), *_fields(self.completion), *([self.group] if self.group else [])]
        return dict.fromkeys(names, False)

    def examples(self, rows: Any, data: DataSettings, classes: Sequence[str], tokenizer: Any) -> Completions:  # noqa: ARG002
        columns = {name: rows[name][:] for name in self.columns(data)}
        lines = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        prompts = [self.prompt.format(**line) for line in lines]
        completions = [self.completion.format(**line) for line in lines]
        features, labels = [], []
        for before, after in zip(*self._tokens(prompts, completions, tokenizer), strict=True):
            tokens, asked = _fit(before, after, data.max_length)
            features.append({"input_ids": tokens})
            labels.append([*[IGNORED] * asked, *tokens[asked:]])
        groups = [line[self.group] for line in lines] if self.group else prompts
        return Completions(features, labels, [text.strip() for text in completions], groups)

    def _tokens(
        self, prompts: Sequence[str], completions: Sequence[str], tokenizer: Any
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Tokens of prompts, and of what follows with an end."""
        if tokenizer.chat_template is not None and self.chat is not False:
            return _chat(prompts, completions, tokenizer)
        if self.chat:
            raise FedeltaError("task.chat is true, but the tokenizer has no chat template")
        if tokenizer.eos_token_id is None:
            raise FedeltaError("the tokenizer has no end-of-text token, without which a completion has no end")
        begin = _beginning(tokenizer)
        plain = {"add_special_tokens": False, "return_attention_mask": False}
        before, after = (tokenizer(list(texts), **plain)["input_ids"] for texts in (prompts, completions))
        if not begin and not all(before):
            raise FedeltaError("an empty prompt, and the tokenizer has no token that begins a text")
        return [[*begin, *tokens] for tokens in before], [[*tokens, tokenizer.eos_token_id] for tokens in after]

    def units(self, examples: Examples, batch_size: int, final: bool) -> list[Unit]:
        found = super().units(examples, batch_size, final)
        if self.generate is None or (self.metric in OF_LOSS and not final):
            return found
        assert isinstance(examples, Completions)
        first = [rows[0] for rows in examples.by_group][: self.generate.limit]
        first.sort(key=lambda row: (len(examples.prompt(row)), row))
        size = self.generate.batch_size
        return [*found, *(Unit("generate", first[i : i + size]) for i in range(0, len(first), size))]

    def judge(
        self, model: LoraModel, tokenizer: Any, examples: Examples, unit: Unit, prefix: Prefix | None = None
    ) -> list[Answer]:
        if unit.what == "answer":
            return super().judge(model, tokenizer, examples, unit, prefix)
        assert isinstance(examples, Completions)
        assert self.generate is not None
        return [[text] for text in generate(model, tokenizer, [examples.prompt(r) for r in unit.rows], self.generate)]

    def answers(self, logits: Tensor) -> list[Any]:
        return [None] * len(logits)

    def own_scores(self, labels: Sequence[Any], answers: Sequence[Any]) -> dict[str, float]:  # noqa: ARG002
        return {}

    def score(self, examples: Examples, units: Sequence[Unit], found: Sequence[Sequence[Answer]]) -> dict[str, float]:
        assert isinstance(examples, Completions)
        scores = super().score(examples, units, found)
        # Past this the exponential is no number any more.
        scores["perplexity"] = math.exp(min(scores["loss"], 700.0))
        texts = {
            row: answer[0]
            for unit, answers in zip(units, found, strict=True)
            if unit.what == "generate"
            for row, answer in zip(unit.rows, answers, strict=True)
        }
        if texts:
            references = {group[0]: [examples.references[row] for row in group] for group in examples.by_group}
            pairs = [(texts[row], references[row]) for row in sorted(texts)]
            scores |= text_scores(pairs, self.scores)
            if self.answer:
                extract = ANSWERS[self.answer]
                right = [extract(text) in {extract(r) for r in wanted} - {None} for text, wanted in pairs]
                scores["exact"] = sum(right) / len(right)
        return scores


def _fields(template: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(template) if name]


def _beginning(tokenizer: Any) -> list[int]:
    """The tokens that this tokenizer puts before a text."""
    whole, plain = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    return whole[: next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)]


def _chat(
    prompts: Sequence[str], completions: Sequence[str], tokenizer: Any
) -> tuple[list[list[int]], list[list[int]]]:
    before, after = [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        asked = [{"role": "user", "content": prompt}]
        told = [*asked, {"role": "assistant", "content": completion}]
        head = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = tokenizer.apply_chat_template(told, return_dict=True)["input_ids"]
        if whole[: len(head)] != head:
            raise FedeltaError("the tokenizer's chat template puts something else before an answer than before none")
        before.append(head)
        after.append(whole[len(head) :])
    return before, after


def _fit(before: list[int], after: list[int], length: int) -> tuple[list[int], int]:
    """Both in so many tokens, and how many of them are prompt.

    A long prompt loses its beginning, down to half of the room; what is left over is cut from the end.
    """
    kept = min(len(before), max(length - len(after), length // 2))
    return [*before[len(before) - kept :], *after][:length], kept
