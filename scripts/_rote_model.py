"""A model that knows one tool call by rote, for the real llama-server.

No small model of the lab was ever taught tools; this one is written by hand. Its layer adds nothing, so the
next word depends on the last one alone, and the weights of the output hold two sentences: after a question
the call, after a tool's answer a few words. The words are SmolLM2's and a few more; the template speaks the
JSON of Hermes. Rendering, grammar, parsing and both protocols are llama-server's own.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

VOCABULARY = "smollm2-*.gguf"  # of the lab's models
CONTEXT, WIDTH, LOUDNESS = 131_072, 64, 8.0
ANSWER = "The tool has been used."
AFTER_QUESTION, AFTER_TOOL = "\n", "\n\n"  # the last word of a prompt; each is one token
END = "<|im_end|>"
TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% if messages[0].role == "system" %}{{ messages[0].content }}

{% endif %}You may call a function. These there are:
<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools>
A call is a JSON object with its name and arguments within tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{% elif messages[0].role == "system" %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == "assistant" and message.tool_calls %}<|im_start|>assistant
{%- if message.content %}
{{ message.content }}
{%- endif %}
{%- for call in message.tool_calls %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% elif message.role == "tool" %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% elif message.role != "system" or not loop.first %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if messages[-1].role == "tool" %}{{ "\\n" }}{% endif %}
{%- endif %}"""


def write(path: Path, vocabulary: Path, name: str, arguments: dict[str, Any]) -> None:
    """Write the model that calls `name` with these arguments, in the words of the GGUF `vocabulary`."""
    said = f'\n{{"name": {json.dumps(name)}, "arguments": {json.dumps(arguments)}}}\n'
    half = len(said) // 2  # a word that comes twice would have two successors
    call = ["<tool_call>", said[:half], said[half:], "</tool_call>", END]
    answer = [ANSWER, END]
    writer = gguf.GGUFWriter(path, "llama")
    words = _copy_vocabulary(writer, vocabulary, [*call[:-1], *answer[:-1]])
    number = {word: index for index, word in reversed(list(enumerate(words)))}
    number |= {
        AFTER_QUESTION: number["Ċ"],
        AFTER_TOOL: number["ĊĊ"],
    }  # written as GPT-2 does
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_chat_template(TEMPLATE)

    signs = np.random.default_rng(1).integers(0, 2, size=(len(words), WIDTH)).astype(np.float16) * 2 - 1
    output = np.zeros_like(signs)
    for sentence in ([AFTER_QUESTION, *call], [AFTER_TOOL, *answer]):
        for word, successor in itertools.pairwise(sentence):
            output[number[successor]] += signs[number[word]] * np.float16(LOUDNESS)
    nothing, ones = np.zeros((WIDTH, WIDTH), np.float32), np.ones(WIDTH, np.float32)
    writer.add_tensor("token_embd.weight", signs)
    writer.add_tensor("output.weight", output)
    for norm in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{norm}.weight", ones)
    for weights in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{weights}.weight", nothing)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _copy_vocabulary(writer: gguf.GGUFWriter, vocabulary: Path, more: Sequence[str]) -> list[str]:
    """Give the model the words of another, and `more`. Returns all, in the order of their numbers."""
    fields = gguf.GGUFReader(vocabulary).fields
    words = list(fields["tokenizer.ggml.tokens"].contents()) + list(more)
    kinds = list(fields["tokenizer.ggml.token_type"].contents()) + [gguf.TokenType.USER_DEFINED] * len(more)
    writer.add_tokenizer_model(fields["tokenizer.ggml.model"].contents())
    writer.add_tokenizer_pre(fields["tokenizer.ggml.pre"].contents())
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    writer.add_token_merges(fields["tokenizer.ggml.merges"].contents())
    writer.add_bos_token_id(words.index(END))
    writer.add_eos_token_id(words.index(END))
    writer.add_add_bos_token(False)
    return words
