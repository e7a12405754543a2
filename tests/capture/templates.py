"""Small chat templates in the shapes that real families have, and the text an answer becomes in each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.tiny import CHATML, make_tokenizer

_CHATML_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

# A system prompt goes into the first user turn; there is no generation prompt.
MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{{ '<s>' }}{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate:\nuser, assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
)

GEMMA = (
    "{{ '<bos>' }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

GENERATION = (
    "{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{%- if m['role'] == 'assistant' -%}"
    "{%- generation -%}{{ m['content'] + '<|im_end|>' }}{%- endgeneration -%}"
    "{%- else -%}{{ m['content'] + '<|im_end|>' }}{%- endif -%}{{ '\n' }}{% endfor %}" + _CHATML_PROMPT
)

STRIPPING = CHATML.replace("message['content']", "message['content'] | trim")

# Like templates that keep the reasoning of the last turn only.
# Qwen3's way: the last answer alone shows its (empty) thoughts.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}" + _CHATML_PROMPT
)

REWRITING = "[{{ messages | length }}]\n" + CHATML

# What stands behind an answer depends on what follows it: no prefix can say where the answer ends.
COUNTING = CHATML.replace("+ '<|im_end|>'", "+ ' (of ' + messages | length | string + ')<|im_end|>'")

SHOUTING = CHATML.replace("message['content']", "message['content'] | upper")

RAISING = CHATML.replace("{% for", "{{ raise_exception('never\nhappy') }}{% for", 1)


@dataclass(frozen=True)
class Dialect:
    """A template, its special tokens, and what goes around an answer that the assistant writes itself."""

    template: str
    extra: tuple[str, ...] = ()
    before: str = ""
    after: str = "<|im_end|>"
    strips: bool = False
    system: bool = True

    def tokenizer(self) -> Any:
        return make_tokenizer(self.template, self.extra)

    def turn(self, content: str) -> str:
        """What the model itself writes for an answer."""
        return self.before + (content.strip() if self.strips else content) + self.after


DIALECTS = {
    "chatml": Dialect(CHATML),
    "llama3": Dialect(
        LLAMA3,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        after="<|eot_id|>",
        strips=True,
    ),
    "mistral": Dialect(MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), before=" ", after="</s>"),
    "gemma": Dialect(
        GEMMA,
        ("<bos>", "<start_of_turn>", "<end_of_turn>"),
        after="<end_of_turn>",
        strips=True,
        system=False,
    ),
    "generation": Dialect(GENERATION),
    "stripping": Dialect(STRIPPING, strips=True),
}
