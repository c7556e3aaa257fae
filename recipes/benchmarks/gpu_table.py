"""What `gpu` found, as lines of text: rich may not be installed where it runs."""

from __future__ import annotations

from typing import Any

GIB = 2**30


def summary(part: str, cells: dict[str, dict[str, Any]]) -> list[str]:
    """One line for each measurement, and one for each method in it."""
    lines = []
    for name, row in cells.items():
        title = f"{part}, {name}"
        if row["status"] in ("skipped", "failed"):
            lines.append(f"{title}: {row['status']}: {row.get('reason') or row['error']}")
        elif "cases" in row:
            left = f", {row['left_out']} not reached in time" if row["left_out"] else ""
            lines.append(
                f"{title}: {len(row['cases']) - len(row['wrong'])} cases right, {len(row['wrong'])} wrong{left}"
            )
            lines += [f"    {case}" for case in row["wrong"]]
        elif "methods" in row:
            lines.append(f"{title}, tokens per second")
            lines += [
                f"    {method:<22}" + (found.get("error") or f"{found['tokens_per_second']:12,.0f}")
                for method, found in row["methods"].items()
            ]
        elif "measured_bytes" in row:
            sizes = (row["measured_bytes"] / GIB, row["predicted_bytes"] / GIB)
            lines.append(f"{title}: {sizes[0]:.4g} GiB at the peak, {sizes[1]:.4g} predicted")
        elif "launches" in row:
            told = row.get("reason")
            if told is None:
                told = (
                    f"{row['launches']} launches and {row['copies']} copies, the device waits {row['waits']:.0%} of it"
                )
            lines.append(f"{title}: {row['milliseconds']:.2f} ms, {told}")
            lines += [
                f"    {one['milliseconds']:.3f} ms on the device: {one['count']} x {one['name'][:60]}"
                for one in row.get("longest", [])[:3]
            ]
        else:
            lines += [f"{title}, {row['layers']} layers, ms", *_step_lines(row["milliseconds"])]
    return lines


def _step_lines(found: dict[str, dict[str, Any]]) -> list[str]:
    lines = [f"    {'':<22}{'ordinary':>10}{'refresh':>10}{'average':>10}{'/AdamW':>8}"]
    base = found.get("adamw", {}).get("ordinary")
    for name, row in found.items():
        if "error" in row:
            lines.append(f"    {name:<22}{row['error']}")
            continue
        cells = (f"{row[key]:10.2f}" if key in row else f"{'-':>10}" for key in ("ordinary", "refresh", "amortised"))
        lines.append(f"    {name:<22}{''.join(cells)}" + (f"{row['ordinary'] / base:8.2f}" if base else f"{'-':>8}"))
    return lines
