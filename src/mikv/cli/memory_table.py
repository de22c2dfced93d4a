"""A MemoryReport as a table."""

from rich.console import Group, RenderableType
from rich.table import Table

from mikv.integrations.transformers import MemoryReport


def memory_table(memory: MemoryReport) -> RenderableType:
    """Bytes by part with their share of fp16, tokens by tier, and the layers that are not compressed."""
    table = Table("part", show_footer=True)
    table.columns[0].footer = "total"
    table.add_column("bytes", f"{memory.bytes:,}", justify="right")
    table.add_column("of fp16", f"{memory.ratio:.3f}", justify="right")
    for part, size in memory.bytes_by_part.items():
        table.add_row(part, f"{size:,}", f"{size / memory.fp16_bytes:.3f}" if memory.fp16_bytes else "-")
    lines = [f"the same keys and values in fp16: {memory.fp16_bytes:,} bytes"]
    if compressed := [layer for layer in memory.layers if layer.skipped is None]:
        tiers = {name.replace("_", "-"): count for name, count in compressed[0].tokens_by_tier.items() if count}
        held = ", ".join(f"{count:,} {name}" for name, count in tiers.items()) or "none"
        lines.append(f"tokens in each of {len(compressed)} compressed layers: {held}")
    if memory.note:
        lines.append(memory.note)
    lines += [f"layer {layer} is not compressed: {reason}" for layer, reason in memory.skipped.items()]
    return Group(table, *lines)
