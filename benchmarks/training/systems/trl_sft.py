"""TRL's SFTTrainer: padded or packed; as it is, with LoRA in bfloat16, or with LoRA in float32.

As it is: bfloat16 autocasting on, and the adapter of a quantised base cast to bfloat16. The other
variant undoes both, so its numbers can be compared. Packing is TRL's best fit, without padding.
"""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from benchmarks.training.gauge import Gauge
from benchmarks.training.systems.order import fulfil
from benchmarks.training.systems.trainer import OnTrainer, arguments, dataset
from benchmarks.training.workload import Workload


def train(workload: Workload, gauge: Gauge, folder: Path) -> None:
    """Train ``gauge``'s steps."""
    in_float32 = gauge.system.endswith("-float32")
    trainer = _trainer(workload, gauge, folder, in_float32)
    _start_alike(trainer.model, workload, in_float32)
    trainer.train()


def _trainer(workload: Workload, gauge: Gauge, folder: Path, in_float32: bool) -> SFTTrainer:
    settings = workload.settings
    is_packed = gauge.system.startswith("trl-packed")
    common = arguments(settings, gauge, folder)
    if is_packed:
        common["per_device_train_batch_size"] = settings.num_packs
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(workload.model, device_map={"": device}),
        args=SFTConfig(
            **common,
            bf16=False if in_float32 else None,
            packing=is_packed,
            max_length=settings.pack_length if is_packed else None,
            # best fit leaves packs sorted by their longest row, so the first would say little
            train_sampling_strategy="random" if is_packed else "sequential",
        ),
        train_dataset=dataset(workload).remove_columns("length"),
        processing_class=AutoTokenizer.from_pretrained(workload.model),
        peft_config=_adapter_config(workload),
        callbacks=[OnTrainer(gauge)],
    )


def _adapter_config(workload: Workload) -> LoraConfig:
    config = LoraConfig.from_pretrained(workload.adapter)
    config.inference_mode = False  # saved adapters are for inference; PEFT would freeze it
    return config


def _start_alike(model: PeftModel, workload: Workload, in_float32: bool) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad and in_float32:
            parameter.data = parameter.data.float()
    set_peft_model_state_dict(model, load_file(workload.adapter / "adapter_model.safetensors"))


if __name__ == "__main__":
    fulfil(train)
