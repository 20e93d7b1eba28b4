"""Chat templates of several families, each with a small real tokenizer that has its tokens."""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qlora_core.data.encoding import Encoded, Encoder
from qlora_core.data.formats import Turn
from tests.tiny import CHATML

TEXTS = [
    "system user assistant What is two plus two? It is four. Thanks! <think> okay </think>",
    "every weekday at half past nine, 30 9 * * 1-5, the answer is here\n\n and there ### Response:",
]

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim"
    " + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (  # the system message goes into the first user turn; no generation prompt
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (system + '\n\n' if loop.first and system else '') }}"
    "{{ m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REASONING = (  # like Qwen3: old reasoning is dropped, the last answer gets a reasoning block
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' and '</think>' in m['content'] and not loop.last %}"
    "{% set content = m['content'].split('</think>')[-1].lstrip('\n') %}"
    "{% else %}{% set content = m['content'] %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last and '</think>' not in content %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = (  # writes no special token at all
    "{% for m in messages %}"
    "{{ ('### Response: ' if m['role'] == 'assistant' else '### ') + m['content'] + '\n\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Response: ' }}{% endif %}"
)
HEADLESS = CHATML.split("{% if add_generation_prompt %}")[0]


def byte_tokenizer(
    template: str | None,
    special: Sequence[str] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    bos: str = "<|im_start|>",
    eos: str = "<|im_end|>",
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as in Llama 3, Qwen and SmolLM; its offsets leave out leading spaces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, chat_template=template
    )


def metaspace_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """BPE over words with their leading space as ▁, as in Llama 2 and Mistral; adds BOS itself."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    alphabet = [chr(code) for code in range(33, 127)] + ["▁", "\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=template,
    )


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    special = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
    return byte_tokenizer(LLAMA3, special, bos=special[0], eos=special[1])


def encode(tokenizer, turns: Sequence[Turn], *, escape: bool = True) -> Encoded:
    encoder = Encoder(tokenizer, [tokenizer.eos_token], escape=escape)
    [row] = encoder.encode([encoder.render(tuple(turns))], as_chat=True)
    assert row is not None
    return row


def prompt_ids(tokenizer, turns: Sequence[Turn]) -> tuple[int, ...]:
    encoder = Encoder(tokenizer, [tokenizer.eos_token], escape=True)
    [ids] = encoder.encode_prompts([encoder.render(tuple(turns))])
    return ids


def supervised_texts(tokenizer, row: Encoded) -> list[str]:
    """What each run of supervised tokens says."""
    texts, run = [], []
    for label in [*row.labels_L.tolist(), -100]:
        if label != -100:
            run.append(label)
        elif run:
            texts.append(tokenizer.decode(run))
            run = []
    return texts


def as_messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]
