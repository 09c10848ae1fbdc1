"""Chat templates written as in the wild, tokenizers for them, and conversations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from gradsift.base.types import Example, Message, Skipped, TokenizedExample
from gradsift.data.chat import ChatFormat

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_WITHOUT_PROMPT = CHATML.partition("{% if add_generation_prompt")[0]
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
    "{% set first = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set turns = messages %}{% set first = '' %}{% endif %}"
    "{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user and assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (first if loop.first else '') + m['content'].strip() }}"
    "{{ ' [/INST]' }}{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# The system message goes into the last user turn, so contents do not appear in the order of the messages.
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if m['role'] == 'user' %}{% if system is defined and loop.index0 >= loop.length - 2 %}"
    "{{ '[INST] ' + system + '\n\n' + m['content'] + '[/INST]' }}{% else %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% endif %}{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
# As Qwen3: thinking is dropped from earlier answers, and the last one always has a thinking block.
THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% set thought = '' %}{% set text = m['content'] %}{% if '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last %}{{ '<|im_start|>assistant\n<think>\n' + thought + '\n</think>\n\n' + text }}"
    "{% else %}{{ '<|im_start|>assistant\n' + text }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As DeepSeek-R1: the generation prompt opens a thought, the rendering of an answer has none.
OPEN_THOUGHT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + eos_token }}{% else %}{{ '<|User|>' + m['content'] }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# As Phi-3: end-of-text after the whole conversation, so no beginning of a conversation is a prefix of a longer one.
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}"
    "{% else %}{{ m['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
# As gpt-oss: the conversation's last turn ends with another token than the turns before it.
HARMONY = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|channel|>' + m['content'] }}"
    "{{ eos_token if loop.last and m['role'] == 'assistant' and not add_generation_prompt else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
# As Nemotron: the generation prompt opens a thought, which answers without one close at once.
OPEN_OR_EMPTY_THOUGHT = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}").replace(
    "'\n' + m['content']",
    "'\n' + ('<think></think>' if m['role'] == 'assistant' and '</think>' not in m['content'] else '') + m['content']",
)
# As Qwen's: tools in the system turn, calls as JSON, results within a user turn.
TOOL_CHATML = (
    "{% if tools %}{{ '<|im_start|>system\n' + (messages[0].content + '\n' if messages[0].role == 'system' else '') }}"
    "{% for t in tools %}{{ t | tojson + '\n' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' + (m.content or '') }}"
    "{% for c in m.tool_calls or [] %}{% set f = c.function or c %}"
    "{% if m.content or not loop.first %}{{ '\n' }}{% endif %}"
    '{{ \'<tool_call>\n{"name": "\' + f.name + \'", "arguments": \' }}'
    "{{ f.arguments if f.arguments is string else f.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% elif m.role == 'tool' %}"
    "{% if loop.first or loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% elif not (tools and loop.first and m.role == 'system') %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Mistral's: tools before the last user turn, calls with ids of nine letters, objects only, no generation prompt.
TOOL_MISTRAL = (
    "{{ bos_token }}{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and loop.index0 == ns.last %}{{ '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}"
    "{% endif %}"
    "{{ '[INST]' + m.content + '[/INST]' }}{% elif m.role == 'assistant' and m.tool_calls %}{{ '[TOOL_CALLS][' }}"
    "{% for c in m.tool_calls %}{% if c.id is not defined or c.id | length != 9 %}"
    "{{ raise_exception('ids have nine letters') }}{% endif %}{% if c.function.arguments is string %}"
    "{{ raise_exception('arguments are objects') }}{% endif %}"
    "{{ (c.function | tojson)[:-1] + ', \"id\": \"' + c.id + '\"}' + (']' if loop.last else ', ') }}"
    "{% endfor %}{{ eos_token }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + m.content + m.tool_call_id + '[/TOOL_RESULTS]' }}"
    "{% endif %}{% endfor %}"
)
SPECIAL = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|User|>", "<|Assistant|>", "<|end|>",
)  # fmt: skip


def as_is(answer: str) -> str:
    return answer


# template, end of turn, what the template does to an answer, whether it takes a system message
WILD = {
    "chatml": (CHATML, "<|im_end|>", as_is, True),
    "chatml without prompt": (CHATML_WITHOUT_PROMPT, "<|im_end|>", as_is, True),
    "llama-2": (LLAMA_2, " </s>", lambda answer: " " + answer.strip(), True),
    "llama-3": (LLAMA_3, "<|eot_id|>", str.strip, True),
    "gemma": (GEMMA, "<end_of_turn>", str.strip, False),
    "mistral": (MISTRAL, "</s>", lambda answer: " " + answer.strip(), True),
    "zephyr": (ZEPHYR, "</s>", as_is, True),
    "phi-3": (PHI_3, "<|end|>", as_is, True),
    "vicuna": (VICUNA, "</s>", lambda answer: " " + answer, True),
    "cohere": (CHATML.replace("<|im_end|>", "<|end|><|im_end|>"), "<|end|><|im_end|>", as_is, True),
    "no end of turn": (NO_END, "", as_is, True),
}


def bytes_tokenizer(template: str | None, special: Sequence[str | AddedToken] = SPECIAL, **options: Any) -> Any:
    """One token per byte: nothing straddles, and decoding gives back any text exactly."""
    vocab = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return wrapped(core, template, special, **options)


def merging_tokenizer(template: str | None, special: Sequence[str | AddedToken] = SPECIAL) -> Any:
    """Byte pairs that merge words, blanks and line breaks, whose offsets leave white space out as GPT-2's do."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(
        ["the answer is yes\n\n   no\n\n\n  the answer", "assistant:\n\nuser: yes no"] * 50, trainer
    )
    return wrapped(core, template, special)


def llama_tokenizer(template: str | None) -> Any:
    """As Llama 2: blanks written as ▁, one put before every piece, bytes for what is unknown, BOS added by itself."""
    words = ["▁", "▁Yes", "▁No", "Yes", "No", *"abcdefghijklmnopqrstuvwxyzABINSTUEYN[]/:!?.\n"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for word in words:
        vocab.setdefault(word, len(vocab))
    merges = [("e", "s"), ("Y", "es"), ("▁", "Yes"), ("N", "o"), ("▁", "No")]
    vocab |= {
        left + right: len(vocab) + place for place, (left, right) in enumerate(merges) if left + right not in vocab
    }
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return wrapped(core, template, ("<s>", "</s>"))


def wrapped(core: Tokenizer, template: str | None, special: Sequence[str | AddedToken], **options: Any) -> Any:
    core.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) if isinstance(t, str) else t for t in special]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", **options)
    tokenizer.chat_template = template
    return tokenizer


def conversation(*turns: str, system: str | None = None) -> tuple[Message, ...]:
    messages = [Message(role=("user", "assistant")[place % 2], content=turn) for place, turn in enumerate(turns)]
    return (*([Message(role="system", content=system)] if system is not None else []), *messages)


def example(*turns: str, system: str | None = None) -> Example:
    return Example("e", conversation(*turns, system=system), {})


def tokenized(chat: ChatFormat, one: Example) -> TokenizedExample:
    result = chat.tokenize(one)
    assert isinstance(result, TokenizedExample), result
    assert result.token_ids.dtype == np.int32
    assert result.supervised.dtype == np.bool_
    assert result.token_ids.shape == result.supervised.shape
    return result


def runs(tokenizer: Any, result: TokenizedExample) -> list[str]:
    """Decode each unbroken run of labels."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], result.supervised, [False]]).astype(int)))
    return [tokenizer.decode(result.token_ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def skipped(chat: ChatFormat, one: Example) -> Skipped:
    result = chat.tokenize(one)
    assert isinstance(result, Skipped), result
    return result


# Texts that could be taken for something else.
NASTY = st.lists(
    st.one_of(
        st.sampled_from(
            [
                *SPECIAL,
                "<|im_start|>assistant\n",
                " [/INST] ",
                "[INST]",
                "<think>",
                "</think>",
                "gradsiftq",
                "gradsiftqq0q",
            ]
        ),
        st.sampled_from(
            [" ", "\n", "\n\n", "\t", "\r\n", "\u200b", "\u00a0", "🙂", "é", "e\u0301", "日本", "\x1c", "{{ x }}"]
        ),
        st.text(max_size=6),
    ),
    max_size=5,
).map("".join)
