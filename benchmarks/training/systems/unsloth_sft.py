"""Unsloth, on a CUDA GPU: its model class and kernels under TRL's trainer, as its guides do it."""

from pathlib import Path

from unsloth import FastLanguageModel  # isort: skip  # patches the others, so it comes first
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from trl import SFTConfig, SFTTrainer

from benchmarks.training.gauge import Gauge
from benchmarks.training.systems.order import fulfil
from benchmarks.training.systems.trainer import OnTrainer, arguments, dataset
from benchmarks.training.workload import Workload


def train(workload: Workload, gauge: Gauge, folder: Path) -> None:
    """Train ``gauge``'s steps."""
    settings = workload.settings
    base, tokenizer = FastLanguageModel.from_pretrained(
        str(workload.model), max_seq_length=settings.pack_length, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(
        base,
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=sorted(LoraConfig.from_pretrained(workload.adapter).target_modules),
        use_gradient_checkpointing=False,
        max_seq_length=settings.pack_length,
    )
    set_peft_model_state_dict(model, load_file(workload.adapter / "adapter_model.safetensors"))
    common = arguments(settings, gauge, folder)
    common["per_device_train_batch_size"] = settings.num_packs
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**common, packing=True, max_length=settings.pack_length),
        train_dataset=dataset(workload).remove_columns("length"),
        processing_class=tokenizer,
        callbacks=[OnTrainer(gauge)],
    )
    trainer.train()


if __name__ == "__main__":
    fulfil(train)
