"""Axolotl, on a CUDA GPU: sample packing with torch's own attention and its LoRA kernels.

flash-attn is not installed, as it has to be built for each torch; axolotl keeps packed rows apart
in torch's attention as well, by their lengths (`varlen_attn`). Rows come tokenised; a plugin puts
the gauge on its trainer.
"""

import json
from pathlib import Path
from typing import Any

import yaml
from axolotl.cli.train import do_cli
from axolotl.integrations.base import BasePlugin

from benchmarks.training.gauge import Gauge
from benchmarks.training.systems.order import fulfil
from benchmarks.training.systems.trainer import OnTrainer
from benchmarks.training.workload import Workload

_GAUGES: list[Gauge] = []
_NAME = "benchmarks.training.systems.axolotl_sft"


class GaugePlugin(BasePlugin):  # type: ignore[misc]
    """Found by axolotl under this module's name."""

    def add_callbacks_pre_trainer(self, *_: Any, **__: Any) -> list[OnTrainer]:
        """Return what is to watch the trainer."""
        return [OnTrainer(_GAUGES[0])]


def train(workload: Workload, gauge: Gauge, folder: Path) -> None:
    """Train ``gauge``'s steps."""
    _GAUGES.append(gauge)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for row in workload.rows():
            mask = [1] * len(row.input_ids)
            columns = {"input_ids": row.input_ids, "attention_mask": mask, "labels": row.labels}
            file.write(json.dumps(columns) + "\n")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(_config(workload, gauge, folder)), "utf-8")
    do_cli(config)


def _config(workload: Workload, gauge: Gauge, folder: Path) -> dict[str, Any]:
    settings = workload.settings
    return {
        "base_model": str(workload.model),
        "load_in_4bit": True,
        "adapter": "qlora",
        "lora_model_dir": str(workload.adapter),
        "lora_r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "lora_target_linear": True,
        "lora_mlp_kernel": True,
        "lora_qkv_kernel": True,
        "lora_o_kernel": True,
        "datasets": [{"path": str(folder / "rows.jsonl"), "ds_type": "json"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "sequence_len": settings.pack_length,
        "sample_packing": True,
        "attn_implementation": "sdpa",
        "bf16": "auto",
        "micro_batch_size": settings.num_packs,
        "gradient_accumulation_steps": settings.num_accumulated,
        "max_steps": gauge.num_all_steps,
        "learning_rate": settings.learning_rate,
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_grad_norm": settings.max_grad_norm,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "val_set_size": 0,
        "seed": settings.seed,
        "plugins": [f"{_NAME}.GaugePlugin"],
    }


if __name__ == "__main__":
    from benchmarks.training.systems import axolotl_sft  # by the name under which axolotl finds it

    fulfil(axolotl_sft.train)
