"""A tiny Llama with a real tokenizer, made on the spot in about a second.

Two layers, grouped heads, tied embeddings, sizes that are multiples of NF4's block of 64. The
tokenizer is byte-level BPE with ChatML's special tokens, so chat templates, stop tokens and special
tokens inside text behave as in real models.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["system user assistant every day at noon the answer is"], trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHATML,
        model_max_length=256,
    )


def make_tiny_llama(folder: Path, *, seed: int = 0, num_layers: int = 2) -> Path:
    """Write a random tiny Llama with its tokenizer to ``folder``, in float32, and return it."""
    tokenizer = make_tiny_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def bring_own_code(folder: Path) -> None:
    """Make the Llama in ``folder`` a model whose class comes with it, as a Python file."""
    (folder / "modeling_mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    code = {"AutoConfig": "MineConfig", "AutoModelForCausalLM": "MineForCausalLM"}
    auto_map = {name: f"modeling_mine.{cls}" for name, cls in code.items()}
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "architectures": [], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))


def small_model(kind: str, **settings: Any) -> PreTrainedModel:
    """A random two-layer causal model of an architecture of transformers, by its config's name."""
    sizes = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**(sizes | settings))
        suffix = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
        model: PreTrainedModel = getattr(transformers, kind.removesuffix("Text") + suffix)(config)
    return model
