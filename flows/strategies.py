"""The table of what each strategy asks of one device."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from flows.quantities import size, unit_of
from qlora_core.plan import Device
from qlora_core.training.strategies import StrategyNeed

_WHAT = {"ddp": "ddp: base whole", "fsdp": "fsdp: base in parts"}


def strategies_table(needs: Sequence[StrategyNeed], device: Device) -> Table:
    """Return a table with a column for each strategy."""
    unit, unit_bytes = unit_of(min(need.estimate.total for need in needs))
    num_workers = needs[0].num_workers
    of_whom = f"One of {num_workers} workers" if num_workers > 1 else "The worker"
    table = Table(
        title=f"{of_whom}, by cluster.strategy [{unit}]",
        caption=f"{size(device.memory_bytes)} on {device.name}; without weights kept dequantised",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("component")
    for need in needs:
        table.add_column(_WHAT[need.strategy], justify="right")
    columns = [dict(need.estimate.components()) for need in needs]
    for name in columns[0]:
        if any(column[name] for column in columns):
            table.add_row(name, *(f"{column[name] / unit_bytes:.3f}" for column in columns))
    totals = (f"{need.estimate.total / unit_bytes:.3f}" for need in needs)
    table.add_row("total", *totals, style="bold")
    if any(need.host_bytes for need in needs):
        pinned = (f"{need.host_bytes / unit_bytes:.3f}" for need in needs)
        table.add_row("host's memory", *pinned)
    table.add_row("rows of a pass", *(str(need.num_rows) for need in needs))
    table.add_row("recomputed", *(need.recompute for need in needs))
    table.add_row("fits", *("[green]yes[/]" if n.fits else "[red]no[/]" for n in needs))
    return table
