"""The figures of the cache suite as Markdown: `python -m hf_pearl.benchmark.cache_table docs/results/cache.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def cache_table(saved: dict[str, Any]) -> str:
    """Decode steps in a table, all else in a list, of what `python -m hf_pearl bench --suite cache` has saved."""
    lines = ["| rows | context | `DynamicCache` | paged | ratio |", "|--:|--:|--:|--:|--:|"]
    for step in saved["decode_steps"]:
        times = f"{step['dynamic_ms']:.1f} ms | {step['paged_ms']:.1f} ms | {step['ratio']:.2f}"
        lines.append(f"| {step['batch']} | {step['context']} | {times} |")
    prefill, memory, fork = saved["prefill"], saved["memory"], saved["fork"]
    sizes = ", ".join(f"{each['block_size']}: {each['scattered_ms']:.1f}" for each in saved["block_sizes"])
    lines += [
        "",
        f"- Prefill of {prefill['prompt_tokens']} tokens, {prefill['cached_tokens']} of them cached: "
        f"{prefill['warm_ms']:.0f} ms instead of {prefill['cold_ms']:.0f} ms ({prefill['speedup']:.1f}x faster).",
        f"- Memory of {memory['requests']} requests with one prompt of {memory['prompt_tokens']} tokens: "
        f"{memory['ratio']:.2f}x of one; {memory['new_tokens']} tokens later {memory['ratio_later']:.2f}x "
        f"(their tokens: {memory['ratio_of_tokens_later']:.2f}x).",
        f"- To fork and drop a line of {fork['tokens']} tokens: {fork['fork_ms']:.2f} ms, "
        f"{fork['fork_and_write_ms']:.2f} ms if a token is written to it; "
        f"to copy one block of every layer: {fork['block_copy_ms']:.2f} ms.",
        f"- A decode step of 4 rows on scattered blocks, in ms by block size: {sizes}; "
        f"in runs: {saved['block_sizes'][0]['runs_ms']:.1f} with any.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(cache_table(json.loads(Path(sys.argv[1]).read_text("utf-8"))))
