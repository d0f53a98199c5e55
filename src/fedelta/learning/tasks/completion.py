"""To complete a prompt: supervised fine-tuning of a causal language model, with the loss on the completion alone."""

import math
import string
import warnings
from collections.abc import Sequence
from statistics import fmean as mean
from typing import Any, Literal

from pydantic import field_validator, model_validator
from torch import Tensor

from fedelta.errors import FedeltaError
from fedelta.learning.data import DataSettings
from fedelta.learning.data.examples import IGNORED, Completions, Examples
from fedelta.learning.model.activation_cache import ActivationCache
from fedelta.learning.model.lora_model import LoraModel
from fedelta.learning.tasks import plain, turns
from fedelta.learning.tasks.answers import ANSWERS, AnswerForm
from fedelta.learning.tasks.generation import Generation, generate
from fedelta.learning.tasks.plain import fit
from fedelta.learning.tasks.task import Answer, Task, Unit
from fedelta.learning.tasks.text_scores import TextScore, check_installed, text_scores

OF_LOSS = ("loss", "perplexity")


class CutWarning(UserWarning):
    """Texts do not fit into the configured length."""


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
        by: column for whose values `exact` is counted apart besides, as `exact/VALUE`, with `exact_macro`, the mean of
            these: each value counts alike there, in `exact` each prompt.
        metric: by which runs are judged.
    """

    kind: Literal["completion"] = "completion"
    metric: Literal["loss", "perplexity", "bleu", "nist", "meteor", "rouge_l", "cider", "exact", "exact_macro"] = "loss"
    prompt: str = "{prompt}"
    completion: str = "{completion}"
    chat: bool | None = None
    group: str | None = None
    generate: Generation | None = None
    scores: tuple[TextScore, ...] = ()
    answer: AnswerForm | None = None
    by: str | None = None

    @field_validator("prompt", "completion")
    @classmethod
    def _template(cls, template: str) -> str:
        names = _fields(template)
        if not names:
            raise ValueError("expected a column in braces, such as {question}")
        if not all(name.isidentifier() for name in names):
            raise ValueError("expected names of columns alone in braces, such as {question}; {{ and }} are braces")
        return template

    @model_validator(mode="after")
    def _what_is_judged(self) -> "Completion":
        if (self.scores or self.answer) and self.generate is None:
            raise ValueError("scores and answer are of what is generated: say how, as generate: {max_new_tokens: 64}")
        if self.by and not self.answer:
            raise ValueError("by counts exact answers: say which form they have, as answer: number")
        made = (*OF_LOSS, *self.scores, *(["exact"] if self.answer else []), *(["exact_macro"] if self.by else []))
        if self.metric not in made:
            raise ValueError(f"metric {self.metric} is not computed, found {', '.join(made)}")
        return self

    @property
    def together(self) -> str | None:
        return self.group

    def check_installed(self) -> None:
        check_installed(self.scores)

    def columns(self, data: DataSettings) -> dict[str, bool]:  # noqa: ARG002
        names = [*_fields(self.prompt), *_fields(self.completion), *(name for name in (self.group, self.by) if name)]
        return dict.fromkeys(names, False)

    def examples(self, rows: Any, data: DataSettings, classes: Sequence[str], tokenizer: Any) -> Completions:  # noqa: ARG002
        columns = {name: rows[name][:] for name in self.columns(data)}
        lines = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        prompts = [_fill(self.prompt, line) for line in lines]
        completions = [_fill(self.completion, line) for line in lines]
        read = turns.read if self.makes_turns(tokenizer) else plain.read
        features, labels, asked, cut, longer = [], [], [], 0, 0
        for begin, before, after in read(prompts, completions, tokenizer):
            tokens, known = fit(begin, before, after, data.max_length)
            cut += len(tokens) < len(begin) + len(before) + len(after)
            longer += self.generate is not None and len(after) > self.generate.max_new_tokens
            features.append({"input_ids": tokens})
            labels.append([*[IGNORED] * known, *tokens[known:]])
            # Cut whatever the answer is: an answer's length must not tell what it is.
            asked.append(fit(begin, before, [], data.max_length)[0])
        if self.generate is not None and longer:
            what = f"completions are longer than task.generate.max_new_tokens {self.generate.max_new_tokens}"
            warnings.warn(f"{longer} of {len(lines)} {what}", CutWarning, stacklevel=2)
        if cut:
            warnings.warn(f"{cut} of {len(lines)} texts are longer than data.max_length", CutWarning, stacklevel=2)
        groups = [str(line[self.group]) for line in lines] if self.group else prompts
        kinds = [str(line[self.by]) for line in lines] if self.by else ()
        return Completions(features, labels, asked, [text.strip() for text in completions], groups, kinds)

    def makes_turns(self, tokenizer: Any) -> bool:
        """Whether prompt and completion become turns of a chat.

        Raises:
            FedeltaError: if they are to, and the tokenizer has no template.
        """
        if self.chat and tokenizer.chat_template is None:
            raise FedeltaError("task.chat is true, but the tokenizer has no chat template")
        return tokenizer.chat_template is not None and self.chat is not False

    def units(self, examples: Examples, batch_size: int, final: bool) -> list[Unit]:
        found = super().units(examples, batch_size, final)
        if self.generate is None or (self.metric in OF_LOSS and not final):
            return found
        assert isinstance(examples, Completions)
        first = [rows[0] for rows in examples.by_group][: self.generate.limit]
        first.sort(key=lambda row: (len(examples.prompts[row]), row))
        size = self.generate.batch_size
        return [*found, *(Unit("generate", first[i : i + size]) for i in range(0, len(first), size))]

    def judge(
        self, model: LoraModel, tokenizer: Any, examples: Examples, unit: Unit, cache: ActivationCache | None = None
    ) -> list[Answer]:
        if unit.what == "answer":
            return super().judge(model, tokenizer, examples, unit, cache)
        assert isinstance(examples, Completions)
        assert self.generate is not None
        end = turns.end_of_answer(tokenizer) if self.makes_turns(tokenizer) else None
        prompts = [examples.prompts[row] for row in unit.rows]
        return [[text] for text in generate(model, tokenizer, prompts, self.generate, end)]

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
                scores["exact"] = mean(right)
                kinds = [examples.kinds[row] for row in sorted(texts)] if self.by else []
                by_kind = {
                    kind: mean(r for r, own in zip(right, kinds, strict=True) if own == kind)
                    for kind in sorted(set(kinds))
                }
                if by_kind:
                    scores["exact_macro"] = mean(by_kind.values())
                    scores |= {f"exact/{kind}": share for kind, share in by_kind.items()}
        return scores


def _fields(template: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]


def _fill(template: str, line: dict[str, Any]) -> str:
    try:
        return template.format(**line)
    except (ValueError, TypeError) as error:
        raise FedeltaError(f"task: template {template!r} does not take {line!r:.200}: {error}") from error
