"""A tokenizer of bytes, and small chat templates with the mechanisms of well-known ones."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<bos>", "<eos>", "<turn>", "<end>"]

CHATML = """{% for m in messages %}<turn>{{ m.role }}
{{ m.content }}<end>
{% endfor %}{% if add_generation_prompt %}<turn>assistant
{% endif %}"""
THINKS = """{%- for m in messages %}
{%- set text = m.content %}{%- set thoughts = '' %}
{%- if m.role == 'assistant' and '</think>' in text %}
{%- set thoughts = text.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set text = text.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{{- '<turn>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{{- '<think>\\n' + thoughts + '\\n</think>\\n\\n' }}{%- endif %}
{{- text + '<end>\\n' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<turn>assistant\\n' }}{%- endif %}"""
DATED = """{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}
{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}{%- endif %}
{{- "<turn>system\\nToday: " + date_string + "<end>" }}
{%- for m in messages %}{{- '<turn>' + m.role + '\\n\\n' + m.content | trim + '<end>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<turn>assistant\\n\\n' }}{%- endif %}"""
BRACKETS = """{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}{{ '[ASK] ' + m.content + ' [/ASK]' }}
{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"""
STRICT = """{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}
{%- for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}
{{- '<turn>' + role + '\n' + m.content | trim + '<end>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<turn>model\n' }}{% endif %}"""
ENDLESS_TURN = """{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""
OPEN_THOUGHT = CHATML.replace("<turn>assistant\n{% endif %}", "<turn>assistant\n<think>\n{% endif %}")

WORKING = {"chatml": CHATML, "thinks": THINKS, "dated": DATED, "brackets": BRACKETS, "strict": STRICT}


def byte_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer with a token per byte, and one each for two line breaks, a colon with a line break, and ` a`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), (":", "Ċ"), ("Ġ", "a")]
    vocabulary = [*SPECIAL, *alphabet, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    built = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens=["<turn>", "<end>"],
    )
    built.chat_template = template
    return built
