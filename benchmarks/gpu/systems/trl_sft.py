"""TRL's SFTTrainer with liger-kernel's fused kernels, on rows that are packed already.

All rows are full, so packing again would change nothing; TRL's own would need flash-attn. Kernels
are compiled when they are first used, which needs a C compiler; so a tiny one is tried before, and
where it fails TRL runs without, and says so. Else TRL is as it is: bfloat16, the adapter of a
quantised base in bfloat16, its own optimizer settings. It recomputes activations by default; here
only where the case says so, as that costs it a quarter.
"""

import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.gpu.building import num_multiplied, random_model
from benchmarks.gpu.cases import ALPHA, LEARNING_RATE, RANK, SEED, Case
from benchmarks.gpu.measuring import Measurement, Watch
from benchmarks.gpu.systems.plain import ids_of

_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def measure(case: Case) -> Measurement:
    """Train the steps of ``case``."""
    device, dtype = torch.device(case.device), getattr(torch, case.dtype)
    base = random_model(case.shape, device, dtype, SEED)
    watch = Watch(case, num_multiplied(base))
    unfused = why_unfused(device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(case, base, _Listener(watch), folder, is_fused=not unfused)
        watch.begin()
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    notes = [f"TRL ran without liger-kernel's fused kernels: {unfused}."] if unfused else []
    return watch.measurement("trl", losses, is_fused=not unfused, notes=notes)


def why_unfused(device: torch.device, dtype: torch.dtype) -> str:
    """Return why liger-kernel cannot be used on ``device``; nothing if a tiny kernel ran."""
    if device.type != "cuda":
        return "they need a GPU"
    try:
        from liger_kernel.transformers.rms_norm import LigerRMSNorm

        x_BD = torch.ones(2, 64, device=device, dtype=dtype, requires_grad=True)
        LigerRMSNorm(64).to(device, dtype)(x_BD).sum().backward()
        torch.cuda.synchronize(device)
    except Exception as error:  # whatever a compiler or a driver says
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
    return ""


class _Listener(TrainerCallback):  # type: ignore[misc]
    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Tell the watch."""
        self.watch.step_done()


def _trainer(case: Case, base: Any, listener: _Listener, folder: str, *, is_fused: bool) -> Any:
    ids_NT = ids_of(case, base.config.vocab_size).tolist()
    options: dict[str, Any] = {"use_cpu": True} if case.device == "cpu" else {}
    return SFTTrainer(
        model=base,
        args=SFTConfig(
            output_dir=folder,
            max_steps=case.num_warmup + case.num_steps,
            per_device_train_batch_size=case.micro_batch,
            gradient_accumulation_steps=case.global_batch // case.micro_batch,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_length=case.row_length,
            packing=False,
            bf16=case.dtype == "bfloat16",
            gradient_checkpointing=case.saves_memory,
            use_liger_kernel=is_fused,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
            **options,
        ),
        train_dataset=Dataset.from_dict({"input_ids": ids_NT, "labels": ids_NT}),
        processing_class=_no_tokenizer(),
        peft_config=LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=_TARGETS, task_type="CAUSAL_LM"
        ),
        callbacks=[listener],
    )


def _no_tokenizer() -> PreTrainedTokenizerFast:
    """Return what the trainer asks for; the rows are tokens already."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
