"""What an iteration's optimizer steps say together."""

import numpy as np


def merge_updates(updates: list[dict[str, float]]) -> dict[str, float]:
    """Return an iteration's update metrics: means over its minibatches, extremes of the ratios, the
    last of a count of skipped steps, which runs on. One that is not finite makes the whole so."""
    first = updates[0]
    merged: dict[str, float] = {}
    for name in first:
        column = [values[name] for values in updates]
        if name == "ratio_min":
            merged[name] = float(np.min(column))
        elif name == "ratio_max":
            merged[name] = float(np.max(column))
        elif name.endswith("_skipped_steps"):
            merged[name] = column[-1]
        else:
            merged[name] = sum(column) / len(column)
    variance = merged.pop("return_variance"), merged.pop("error_variance")
    merged["explained_variance"] = 1.0 - variance[1] / variance[0] if variance[0] != 0 else 0.0
    merged["first_ratio_error"] = max(first["ratio_max"] - 1.0, 1.0 - first["ratio_min"])
    return {
        f"update/{name}": value
        for name, value in merged.items()
        if name not in ("return_mean", "error_mean")
    }
