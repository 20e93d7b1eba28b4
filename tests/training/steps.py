"""A step of some training, for tests of what is done with it."""

from qlora_core.ports import StepMetrics


def step_metrics(step: int, num_steps: int = 9) -> StepMetrics:
    """What a step may have measured."""
    return StepMetrics(
        step=step,
        num_steps=num_steps,
        epoch=0.1,
        loss=1 / step,
        learning_rate=1e-3,
        grad_norm=2.0,
        num_tokens=5,
        num_supervised_tokens=4,
        num_computed_tokens=6,
        seconds=0.1,
        tokens_per_s=50.0,
        supervised_tokens_per_s=40.0,
        memory_bytes=1,
    )
