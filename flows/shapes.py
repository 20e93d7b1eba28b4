"""``qlora plan --shape 70b``: what a model of a published size needs, without downloading it."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from flows.planning import device_of
from flows.quantities import count
from flows.strategies import strategies_table
from qlora_core.config import RunConfig
from qlora_core.modeling.shape import published_config, shape_of
from qlora_core.plan import ShapePlan, plan_shape
from qlora_core.recipe import parse_config

_BARE = """
name: shape
model: {source: not/opened}
dataset: {source: not/opened, columns: {prompt: prompt, completion: completion}}
"""


def bare_config(overrides: Sequence[str]) -> RunConfig:
    """Return a recipe that leaves all to its default but what ``overrides`` say (``name=value``).

    Raises:
        ConfigError: As `load_config` does.
    """
    return parse_config(_BARE, "without a recipe", Path.cwd(), overrides)


def make_shape_plan(config: RunConfig, size: str, gpu_gb: float | None) -> ShapePlan:
    """Return what training a Llama 3.1 of this size as the recipe says needs of each device.

    Args:
        config: The recipe; its model and dataset are not opened.
        size: One of `modeling.shape.PUBLISHED`.
        gpu_gb: Memory of each worker's GPU [GB]; none: what this machine has.
    """
    shape = shape_of(published_config(size), config.quantization, config.adapter)
    device = device_of(config, gpu_gb)
    return plan_shape(config, model=f"Llama 3.1 {size.upper()}", shape=shape, device=device)


def show_shape_plan(console: Console, plan: ShapePlan) -> None:
    """Print the plan."""
    console.print(
        f"{plan.model}: {count(plan.shape.num_parameters)} parameters, "
        f"{plan.shape.num_layers} layers; rows of {plan.max_length} tokens",
        highlight=False,
    )
    console.print(strategies_table(plan.strategies, plan.device))
    console.print(f"cluster.strategy would be {plan.chosen}.", highlight=False)
    exact = (
        "Activations, logits and workspace are approximate; all other memory is exact. Of a "
        "sharded base, two blocks are whole on each worker at a time."
    )
    for note in (exact, *plan.notes):
        console.print(f"[dim]- {escape(note)}[/]", highlight=False)
