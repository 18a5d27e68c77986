"""Medians, ratios, and the tables in docs/."""

import json
import platform
import statistics
import subprocess
import time


class Results:
    """Figures of all rounds: row -> case -> contender -> list of measurements."""

    def __init__(self):
        self.rows = {}
        self.goals = {}
        self.commands = {}

    def add(self, row, case, contender, value, unit, server=None, gib=None, command=None):
        cell = self.rows.setdefault(row, {}).setdefault(case, {})
        entry = cell.setdefault(contender, {"unit": unit, "values": [], "cpu": [], "rss": []})
        entry["values"].append(value)
        if server is not None:
            entry["rss"].append(server.peak_rss())
            if gib:
                entry["cpu"].append(server.cpu() / gib)
            self.commands.setdefault(contender, shown(server.arguments))
        if command:
            self.commands.setdefault(contender, command)
        print(f"  {row} | {case} | {contender}: {value:.4g} {unit}", flush=True)

    def summary(self):
        def median(values):
            return round(statistics.median(values), 4) if values else None

        return {
            row: {
                case: {
                    name: {
                        "median": median(e["values"]),
                        "least": min(e["values"]),
                        "most": max(e["values"]),
                        "rounds": len(e["values"]),
                        "unit": e["unit"],
                        "cpu_seconds_per_gib": median(e["cpu"]),
                        "peak_rss_mib": median(e["rss"]),
                    }
                    for name, e in contenders.items()
                }
                for case, contenders in cases.items()
            }
            for row, cases in self.rows.items()
        }


def shown(arguments):
    """A command line without the places where it ran."""
    return " ".join(a if a.startswith("-") else a.rsplit("/", 1)[-1] for a in arguments)


def output(*command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return (done.stdout + done.stderr).strip().splitlines()[0]
    except (OSError, IndexError):
        return "missing"


def machine():
    cpu = next(l for l in open("/proc/cpuinfo") if l.startswith("model name"))
    return {
        "date": time.strftime("%Y-%m-%d"),
        "kernel": platform.release(),
        "cpu": cpu.split(":")[1].strip(),
        "cores": len([l for l in open("/proc/cpuinfo") if l.startswith("processor")]),
        "qemu": output("qemu-nbd", "--version"),
        "nbdkit": output("nbdkit", "--version"),
        "nbdcopy": output("nbdcopy", "--version"),
        "fio": output("fio", "--version"),
        "rustc": output("rustc", "--version"),
    }


def number(value):
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def markdown(about, summary, goals):
    lines = [
        "# Benchmarks",
        "",
        "Made by `benches/peers/run --write`; all contenders of a row took turns in one run on one",
        "machine. Values are medians; *ratio* is ours against the contender (above 1 is better for",
        "us, whatever the unit). CPU is that of the server. `benchmarks.json` has the extremes and",
        "the command lines.",
        "",
        "; ".join(f"{key}: {value}" for key, value in about.items()) + ".",
    ]
    for row, cases in summary.items():
        lines += ["", f"## {row}", "", goals.get(row, ""), ""]
        lines += [
            "| case | contender | median | ratio | spread | CPU s/GiB | peak RSS MiB |",
            "|---|---|---|---|---|---|---|",
        ]
        for case, contenders in cases.items():
            base = contenders.get("ours", {}).get("median")
            for name, e in contenders.items():
                ratio = ""
                if base and e["median"] and name != "ours":
                    smaller = e["unit"] in ("s", "ms", "MiB", "%")
                    ratio = f"{e['median'] / base if smaller else base / e['median']:.2f}"
                lines.append(
                    f"| {case} | {name} | {number(e['median'])} {e['unit']} | {ratio} "
                    f"| {number(e['least'])} - {number(e['most'])} "
                    f"| {number(e['cpu_seconds_per_gib'])} | {number(e['peak_rss_mib'])} |"
                )
    return "\n".join(lines) + "\n"


def write(results, rows, directory):
    """Writes the tables; rows that were not measured now stay as they are."""
    file = directory / "benchmarks.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    about = machine()
    measured = {**before.get("rows", {}), **results.summary()}
    order = [title for title, _, _ in rows.values()]
    summary = {title: measured[title] for title in order if title in measured}
    commands = {**before.get("commands", {}), **results.commands}
    file.write_text(json.dumps({"machine": about, "commands": commands, "rows": summary}, indent=1)
                    + "\n")
    goals = {title: goal for title, _, goal in rows.values()}
    (directory / "benchmarks.md").write_text(markdown(about, summary, goals))
