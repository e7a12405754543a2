"""Small chat templates in the shapes that real families have, and the text an answer becomes in each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tests.tiny import CHATML, make_tokenizer

_CHATML_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

# In the templates of families, [[ and ]] stand where generation marks go: around what the assistant writes.
_CALLS = "{% for c in m['tool_calls'] or [] %}{{ c['function'] | tojson }}{% endfor %}"

FAMILY_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}[[{{ m['content'] }}" + _CALLS + "{{ '<|im_end|>' }}]]"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}" + _CHATML_PROMPT
)

LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{% if m['role'] == 'assistant' %}[[{{ m['content'] | trim }}" + _CALLS + "{{ '<|eot_id|>' }}]]"
    "{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

# A system prompt goes into the first user turn; there is no generation prompt.
MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{{ '<s>' }}{% for m in rest %}"
    "{% if not loop.first and loop.previtem['role'] == m['role'] %}"
    "{{ raise_exception('roles must alternate:\nuser, assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'tool' %}{{ '[TOOL_RESULTS] ' + m['content'] + ' [/TOOL_RESULTS]' }}"
    "{% else %}[[{{ ' ' + m['content'] }}" + _CALLS + "{{ '</s>' }}]]{% endif %}{% endfor %}"
)

# Mistral's later way: the system prompt moves on into the last user turn.
MISTRAL_MOVING = MISTRAL.replace("(system if loop.first else '')", "(system if loop.last else '')")

GEMMA = (
    "{{ '<bos>' }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{{ '<start_of_turn>model\n' }}"
    "[[{{ m['content'] | trim }}" + _CALLS + "{{ '<end_of_turn>' }}]]{{ '\n' }}"
    "{% else %}{{ '<start_of_turn>' + m['role'] + '\n' }}{{ m['content'] | trim }}{{ '<end_of_turn>\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

# Without a generation prompt it closes the conversation, so that no prefix is a prefix of the text.
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}"
    "{% if m['role'] == 'assistant' %}[[{{ m['content'] }}" + _CALLS + "{{ '<|end|>' }}]]"
    "{% else %}{{ m['content'] + '<|end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

# Thoughts are cut out of the text, and yet the generation prompt opens them.
DEEPSEEK = (
    "{{ '<bos>' }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}{% endif %}"
    "{% if m['role'] == 'tool' %}{{ '<|tool_output|>' + m['content'] }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{{ '<|Assistant|>' }}"
    "[[{{ m['content'].split('</think>')[-1] }}" + _CALLS + "{{ '<|end_of_sentence|>' }}]]{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
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

# Qwen3's way with tools: calls stand without content, thoughts are shown in the last turn only.
THINKING_TOOLS = THINKING.replace("{{ m['content'] + ", "{{ m['content'] }}" + _CALLS + "{{ ")

# gpt-oss's way: answers end in another token when nothing follows them, and header and channel are tokens.
HARMONY = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m['content'] }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% else %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
HARMONY_TOKENS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")

# SmolLM3's way: the marks hold the whole message, its header and its line feed too.
WIDE_MARKS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ '<|im_start|>assistant\n' + m['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}" + _CHATML_PROMPT
)

# Marks in a comment are none.
COMMENTED_MARKS = "{# {% generation %} would go here {% endgeneration %} #}" + CHATML

DATED = "{{ '<|im_start|>system\n' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + CHATML

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
    marked: bool = False

    @property
    def text(self) -> str:
        """The template, with generation marks or without."""
        marks = ("{% generation %}", "{% endgeneration %}") if self.marked else ("", "")
        return self.template.replace("[[", marks[0]).replace("]]", marks[1])

    def tokenizer(self) -> Any:
        return make_tokenizer(self.text, self.extra)

    def turn(self, content: str, calls: str = "") -> str:
        """What the model itself writes for an answer."""
        return self.before + (content.strip() if self.strips else content) + calls + self.after


_MISTRAL = (("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"), " ", "</s>")
FAMILIES = {
    "chatml": Dialect(FAMILY_CHATML),
    "llama3": Dialect(
        LLAMA3,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        after="<|eot_id|>",
        strips=True,
    ),
    "mistral": Dialect(MISTRAL, *_MISTRAL),
    "gemma": Dialect(
        GEMMA,
        ("<bos>", "<start_of_turn>", "<end_of_turn>"),
        after="<end_of_turn>",
        strips=True,
        system=False,
    ),
    "phi3": Dialect(
        PHI3, ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"), after="<|end|>"
    ),
    "deepseek": Dialect(
        DEEPSEEK,
        ("<bos>", "<|User|>", "<|Assistant|>", "<|tool_output|>", "<|end_of_sentence|>"),
        after="<|end_of_sentence|>",
    ),
}
FAMILIES |= {f"{name}-marked": replace(family, marked=True) for name, family in FAMILIES.items()}
FAMILIES["mistral-moving"] = Dialect(MISTRAL_MOVING, *_MISTRAL)
# The answer's leading space comes from the template there, and no prompt says that it is generated.
DIALECTS = {
    **{name: family for name, family in FAMILIES.items() if name != "mistral-moving"},
    "generation": Dialect(GENERATION),
    "stripping": Dialect(STRIPPING, strips=True),
}
