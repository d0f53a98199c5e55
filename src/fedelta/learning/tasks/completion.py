"""Completion of a prompt: supervised fine-tuning of a causal language model, with the loss on the completion only."""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import field_validator, model_validator

from fedelta.learning.data import Columns, DataSettings
from fedelta.learning.data.examples import IGNORED, Completions
from fedelta.learning.tasks import plain
from fedelta.learning.tasks.column_template import check_template, fields_of
from fedelta.learning.tasks.language import LanguageTask, without_template
from fedelta.learning.tasks.plain import CutWarning, fit
from fedelta.learning.tasks.turns import Turns


class Completion(LanguageTask):
    """Predict the completion of a prompt.

    Args:
        prompt, completion: templates with columns in braces, such as "Question: {question}\\nAnswer:". Without a chat
            template they are concatenated as they are, so a space between them must be part of one of them.
        chat: True turns prompt and completion into turns of the tokenizer's chat template, False does not. None does
            so if the tokenizer has a template.
    """

    kind: Literal["completion"] = "completion"
    prompt: str = "{prompt}"
    completion: str = "{completion}"
    chat: bool | None = None

    @model_validator(mode="after")
    def _template_is_used(self) -> "Completion":
        if self.chat is False and self.chat_template is not None:
            raise ValueError("chat: false uses no chat template, expected no task.chat_template")
        return self

    @field_validator("prompt", "completion")
    @classmethod
    def _template(cls, template: str) -> str:
        if not fields_of(template):
            raise ValueError("expected a column in braces, such as {question}")
        return check_template(template)

    def columns(self, data: DataSettings) -> Columns:  # noqa: ARG002
        # A template of several columns may have empty ones, such as the `input` of Alpaca, but not only empty ones.
        groups = (tuple(fields_of(self.prompt)), tuple(fields_of(self.completion)))
        required = (*groups, *((name,) for name in (self.group, self.by) if name))
        return Columns(dict.fromkeys((name for group in required for name in group), "cell"), required)

    def examples(self, rows: Any, data: DataSettings, classes: Sequence[str], tokenizer: Any) -> Completions:  # noqa: ARG002
        columns = {name: ["" if v is None else v for v in rows[name][:]] for name in self.columns(data).uses}
        lines = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        prompts = [self.prompt.format(**line) for line in lines]
        completions = [self.completion.format(**line) for line in lines]
        turns = self.turns(tokenizer)
        read = turns.read(prompts, completions) if turns else plain.read(prompts, completions, tokenizer)
        features, labels, prompt_tokens, answers, cut, longer = [], [], [], [], 0, 0
        for begin, before, after in read:
            tokens, known = fit(begin, before, after, data.max_length)
            cut += len(tokens) < len(begin) + len(before) + len(after)
            longer += self.generate is not None and len(after) > self.generate.max_new_tokens
            features.append({"input_ids": tokens})
            labels.append([*[IGNORED] * known, *tokens[known:]])
            # Truncated independently of the completion, whose length would otherwise leak into the prompt.
            prompt_tokens.append(fit(begin, before, [], data.max_length)[0])
            answers.append(after)
        if self.generate is not None and longer:
            limit = f"task.generate.max_new_tokens {self.generate.max_new_tokens}"
            warnings.warn(f"{longer} of {len(lines)} completions are longer than {limit}", CutWarning, stacklevel=2)
        if cut:
            warnings.warn(f"{cut} of {len(lines)} texts are longer than data.max_length", CutWarning, stacklevel=2)
        groups = [str(line[self.group]) for line in lines] if self.group else prompts
        kinds = [str(line[self.by]) for line in lines] if self.by else ()
        references = [text.strip() for text in completions]
        if self.generate is not None:
            # An answer is compared with what is taught, in the form in which the tokens of either become a text.
            taught = tokenizer.batch_decode(answers, skip_special_tokens=True)
            for row, (text, tokens) in enumerate(zip(taught, answers, strict=True)):
                if tokenizer.unk_token_id not in tokens:
                    references[row] = self.answer_text(text, turns)
        return Completions(features, labels, prompt_tokens, references, groups, kinds)

    @property
    def prompt_columns(self) -> list[str]:
        """Columns of the template of the prompts."""
        return list(dict.fromkeys(fields_of(self.prompt)))

    def turns(self, tokenizer: Any) -> Turns | None:
        """The chat whose turns prompt and completion become, or None for plain texts."""
        return Turns(tokenizer, self.date) if self._makes_turns(tokenizer) else None

    def _makes_turns(self, tokenizer: Any) -> bool:
        """Tell whether prompt and completion become turns of a chat.

        Raises:
            FedeltaError: if `chat` is true, but the tokenizer has no chat template.
        """
        if self.chat and tokenizer.chat_template is None:
            raise without_template(tokenizer, "task.chat: true")
        return tokenizer.chat_template is not None and self.chat is not False
