"""
Results as tables and files, and their summary in docs/kernels.md: `python -m bench.report` rewrites it, and draws
the plots of kept results that have none.
"""

import json
import math
from pathlib import Path
from typing import Any

from bench import clocks
from bench.files import write_json, write_text
from bench.registry import OPERATIONS, TITLES
from bench.roofline import phase_of, plots
from gcpo.run.table import markdown

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
DOCUMENT = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- begin: python -m bench.report -->", "<!-- end -->"
FILE = "kernels.json"


def describe(environment: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {v}" for name, v in environment["packages"].items() if v)
    drivers = f", driver {environment['driver']}" if environment["driver"] else ""
    commit = (environment["commit"] or "unknown")[:10] + (" with changes" if environment["uncommitted_changes"] else "")
    return f"{environment['device']}{drivers}; {packages}; commit {commit}; {environment['date']}"


def table(result: dict[str, Any]) -> str:
    """Every case, as Markdown."""
    lines = [
        f"# {'CPU' if result['environment']['device_type'] == 'cpu' else 'GPU'}: kernels beside their peers",
        "",
        f"{describe(result['environment'])}.",
        "",
        f"`{result['command']}`, {result['seconds']:.0f} s.",
        "",
        "Times are medians over rounds in which implementations alternate; ± is half the distance of the quartiles. "
        "The floor was measured in the same rounds. Memory is " + result["memory_method"] + ". Errors are "
        "root-mean-square, relative, against float64: of the value, and of the worst gradient.",
    ]
    for op in OPERATIONS:
        entries = [entry for entry in result["cases"] if entry["op"] == op]
        if entries:
            lines += ["", f"## {TITLES[op]}"]
        for entry in entries:
            lines += ["", f"### {title(entry)}", "", *rows(entry)]
            if seen := clocks.describe(entry.get("clocks")):
                lines += ["", f"{seen}."]
    if result["left_out"]:
        lines += ["", "Not run, for want of time: " + ", ".join(f"`{key}`" for key in result["left_out"]) + "."]
    return "\n".join(lines)


def title(entry: dict[str, Any]) -> str:
    return f"`{entry['key']}`" + (f" ({entry['model']})" if entry["model"] else "")


def rows(entry: dict[str, Any]) -> list[str]:
    if "problem" in entry:
        return [entry["problem"]]
    floor, phase = entry["floor"], phase_of(entry)
    rate = "TFLOP/s" if "flops" in floor[phase] else "GB/s"
    cells = [["", "forward ms", "backward ms", "both ms", "to floor", rate, "extra memory", "error: value / gradient"]]
    times = [_time(floor.get(name)) for name in ("forward", "backward", "both")]
    times = times if phase == "both" else [times[0], "", ""]
    cells.append([f"*floor: {floor['kind']}*", *times, "1.00x", _rate(floor[phase], rate), "", ""])
    for row in entry["results"]:
        name = row["name"] + ("; computes less: mean cross-entropy only" if row["computes_less"] else "")
        name += "; drops small gradients" if row["approximate"] else ""
        if "times" not in row:
            reason = f": {row['reason']}" if row.get("reason") else ""
            cells.append([name, row["status"] + reason, *[""] * 5, _errors(row)])
            continue
        found = row["times"]
        times = [_time(found.get(part)) for part in ("forward", "backward", "both")]
        to_floor = f"{found[phase]['to_floor']:.2f}x"
        cells.append([name, *times, to_floor, _rate(found[phase], rate), _bytes(row["memory_bytes"]), _errors(row)])
    return markdown(cells)


def _time(found: dict[str, Any] | None) -> str:
    if not found:
        return ""
    digits = 3 if found["median"] < 10 else 1
    return f"{found['median']:.{digits}f} ± {(found['high'] - found['low']) / 2:.{digits}f}"


def _rate(found: dict[str, Any], unit: str) -> str:
    return f"{found['per_second'] / (1e12 if unit == 'TFLOP/s' else 1e9):.4g}"


def _bytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:,.1f} MiB"


def _errors(row: dict[str, Any]) -> str:
    errors = dict(row.get("errors") or {})
    if not errors:
        return ""
    value = errors.pop("value")
    return f"{value:.1e}" + (f" / {max(errors.values(), key=lambda e: (math.isnan(e), e)):.1e}" if errors else "")


def failures(result: dict[str, Any]) -> list[str]:
    """Where one of this project's functions is wrong or fails."""
    found = [f"{entry['key']}: {entry['problem']}" for entry in result["cases"] if "problem" in entry]
    return found + [
        f"{entry['key']}: {row['status']}{': ' + row['reason'] if row.get('reason') else ''}"
        for entry in result["cases"]
        for row in entry["results"]
        if row["ours"] and row["status"] != "ok"
    ]


def regressions(old: dict[str, Any], new: dict[str, Any], tolerance: float) -> list[str]:
    """Where this project's ratio to the floor has grown by more than the tolerance."""
    before = {entry["key"]: entry for entry in old["cases"]}
    found = []
    if old["environment"]["device"] != new["environment"]["device"]:
        print(f"comparing with {old['environment']['device']}: ratios to the floor of two devices")
    for entry in new["cases"]:
        phase = phase_of(entry)
        for row in entry["results"]:
            earlier = {r["name"]: r for r in before.get(entry["key"], {"results": []})["results"]}.get(row["name"], {})
            if not row["ours"] or "times" not in row or "times" not in earlier:
                continue
            was, now = earlier["times"][phase]["to_floor"], row["times"][phase]["to_floor"]
            if now > was * (1 + tolerance):
                found.append(f"{entry['key']}: {was:.2f}x of the floor then, {now:.2f}x now")
    return found


def write(result: dict[str, Any], folder: Path) -> None:
    """kernels.json and kernels.md."""
    write_json(result, folder / FILE)
    write_text(table(result) + "\n", folder / "kernels.md")


def draw(result: dict[str, Any], folder: Path) -> None:
    """The plots, where there is what draws them: the numbers are kept all the same."""
    try:
        plots(result, folder)
    except ImportError as error:
        print(f"no plots: {error}")


# ---------------------------------------------------------------------------------------------------------------------
# The summary in the documentation
# ---------------------------------------------------------------------------------------------------------------------


def summary(folder: Path = RESULTS) -> str:
    """Per device with results, GPUs first, one line per case and implementation that computes the same."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob(f"*/{FILE}"))]
    results.sort(key=lambda result: result["environment"]["device_type"] == "cpu")
    lines = []
    if not any(result["environment"]["device_type"] != "cpu" for result in results):
        lines += ["**There is no result from a GPU yet**, so nothing is said about one."]
    for result in results:
        lines += ["", f"{describe(result['environment'])}. From `{result['command']}`:", ""]
        lines += _summary_of(result)
    return "\n".join(lines).strip()


def _summary_of(result: dict[str, Any]) -> list[str]:
    timed = [row for entry in result["cases"] for row in entry["results"] if "times" in row]
    names = list(dict.fromkeys(row["name"] for row in timed))
    table = [["time to floor (extra memory, MiB)", *names]]
    for entry in result["cases"]:
        if "floor" not in entry:
            continue
        phase = phase_of(entry)
        found = {row["name"]: row for row in entry["results"] if "times" in row}
        cells = []
        for name in names:
            if name not in found:
                cells.append("")
                continue
            row, memory = found[name], found[name]["memory_bytes"]
            beside = "" if memory is None else f" ({memory / 2**20:,.0f})"
            cells.append(f"{row['times'][phase]['to_floor']:.2f}x{beside}{'*' if row['computes_less'] else ''}")
        table.append([f"`{entry['key']}`: {entry['floor'][phase]['median']:.3g} ms", *cells])
    less = ["", "\\* computes less: cross-entropy's mean only, from which no loss per token can be made."]
    return markdown(table) + (less if any(row["computes_less"] for row in timed) else [])


def with_block(text: str, block: str) -> str:
    """`text` with what is between the markers replaced."""
    if BEGIN not in text:
        raise ValueError(f"the text must have a line {BEGIN}, and {END} after it.")
    before, rest = text.split(BEGIN, 1)
    return before + BEGIN + "\n" + block + "\n" + END + rest.split(END, 1)[1]


def main() -> None:
    for path in RESULTS.glob(f"*/{FILE}"):
        if not list(path.parent.glob("kernels_*.png")):
            draw(json.loads(path.read_text()), path.parent)
    DOCUMENT.write_text(with_block(DOCUMENT.read_text(encoding="utf-8"), summary()), encoding="utf-8")


if __name__ == "__main__":
    main()
