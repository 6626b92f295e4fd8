"""The Markdown of docs/benchmarks.md, section "On a GPU", from a result of scripts/gpu_check.sh.

python scripts/gpu_table.py OUT.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

_SIZES = (
    "against",
    "dtype",
    "arch",
    "encoder",
    "model",
    "latents",
    "tokens",
    "images",
    "epochs",
    "expansion",
    "blocks",
    "density",
    "precision",
)
"""Entries of a benchmark's line that say what was measured, in the order of the table."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, metavar="OUT.json")
    print(make_table(json.loads(parser.parse_args().result.read_text())))


def make_table(result: dict[str, Any]) -> str:
    """The section's text: the machine, a row for each line, the tests, and what was left out."""
    driver = f"driver {result['driver']}, " if result.get("driver") else ""
    triton = f"Triton {result['triton']}, " if result.get("triton") else ""
    text = [
        f"{result['device']}, {driver}torch {result.get('torch')} with CUDA {result.get('cuda')}, {triton}Python "
        f"{result['python']}, {result['cores']} cores.{describe_kernels(result)}",
        "",
        "| what | of | ratio | best | rounds | baseline | ours |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    text += [make_row(line) for part in result["parts"] for line in part["lines"]]
    text.append("")
    for part in result["parts"]:
        if part["name"] == "tests":
            text.append(f"- Tests: {part['summary']}.")
            text += [f"  - {failed}" for failed in part["failed"]]
        elif part["ended"] == "failed":
            text.append(f"- `{part['command']}` failed: {(part.get('tail') or ['it printed nothing'])[-1]}")
    text += [f"- Left out: {one['name']}: {one['why']}." for one in result["left_out"]]
    return "\n".join(text)


def describe_kernels(result: dict[str, Any]) -> str:
    """A sentence on whether the steps' sparse products ran as kernels of our own; empty if there were no steps."""
    used = {line["kernels"] for part in result["parts"] for line in part["lines"] if "kernels" in line}
    answer = {(True,): "as our kernels", (False,): "as torch's own"}.get(tuple(used), "partly as our kernels")
    return f" Sparse products ran {answer}." if used else ""


def make_row(line: dict[str, Any]) -> str:
    """A row of the table: absolute values with their units, ratios as in the other tables."""
    sizes = ", ".join(f"{name} {line[name]:,}" if isinstance(line[name], int) else f"{name} {line[name]}"
                      for name in _SIZES if name in line)  # fmt: skip
    ratio, best = line.get("ratio", line.get("limit_share", "")), line.get("ratio_best", "")
    rounds = f"{line['ratio_min']} to {line['ratio_max']}" if "ratio_min" in line else ""
    if "baseline_bytes" in line:
        values = [f"{line[name] / 1e6:,.0f} MB" for name in ("baseline_bytes", "ours_bytes")]
    else:
        values = [format_seconds(line.get("baseline_s", line.get("limit_s"))), format_seconds(line.get("ours_s"))]
    return "| " + " | ".join([f"`{line['name']}`", sizes, str(ratio), str(best), rounds, *values]) + " |"


def format_seconds(value: float | None) -> str:
    """A duration with its unit."""
    if value is None:
        return ""
    return f"{value:,.2f} s" if value >= 1 else f"{1000 * value:,.1f} ms"


if __name__ == "__main__":
    main()
