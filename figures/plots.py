"""Pictures from result files: the rate grid, partial fine-tuning, depth probes and training curves.

Called by analyze.py, which holds the command line. Each analysis writes its numbers as CSV first, then a picture if
matplotlib is there. This file also holds what all pictures share: size, colours, how they are written.
"""
import csv
import io
import json
import os
import re
import statistics

import numpy as np
from PIL import Image

import run
from data import RunError, UsageError

# Okabe & Ito (2008), told apart by colour-blind readers too; yellow, too pale for lines on white, is left out
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":", "-.")
GREY = "#777777"
MAP = "cividis"                                                             # even in lightness, for colour-blind too
DPI = 150
MOST_BYTES = 150_000                                                        # of a PNG, before it is cut to 256 colours
STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6, "axes.axisbelow": True,
         "legend.frameon": False, "lines.linewidth": 1.5, "lines.markersize": 5, "figure.constrained_layout.use": True}


# ------------------------------------------------------------------------------------------ numbers and pictures
def write_csv(path, rows):
    """rows: dicts with the same keys, which are the header."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "w", newline="") as f:
            table = csv.DictWriter(f, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    except OSError as error:
        raise RunError(f"cannot write {path} ({error.strerror})") from None
    print(f"wrote {path}", flush=True)


def write_npz(path, **arrays):
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        np.savez_compressed(path, **arrays)
    except OSError as error:
        raise RunError(f"cannot write {path} ({error.strerror})") from None
    print(f"wrote {path}: {', '.join(arrays)}", flush=True)


def figure(rows, columns, width, height, **more):
    """(figure of width x height inches, its axes (rows, columns)), or (None, None) where matplotlib is missing."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture without matplotlib: pip install matplotlib", flush=True)
        return None, None
    matplotlib.rcParams.update(STYLE)
    picture = Figure(figsize=(width, height), dpi=DPI)
    return picture, picture.subplots(rows, columns, squeeze=False, **more)


def save(picture, path):
    """Write a PNG; one above 150 KB, packed tighter, in 256 colours of its own: about a third of the bytes."""
    content = io.BytesIO()
    picture.savefig(content, format="png")
    if content.tell() > MOST_BYTES:
        image, content = Image.open(content).convert("RGB"), io.BytesIO()
        image.save(content, format="png", optimize=True)
        if content.tell() > MOST_BYTES:
            colours = image.quantize(256)
            # the page stays white: its colour is mixed with those near it
            colours.putpalette([255 if value > 247 else value for value in colours.getpalette()])
            image, content = image.quantize(palette=colours, dither=Image.Dither.FLOYDSTEINBERG), io.BytesIO()
            image.save(content, format="png", optimize=True)
    try:
        with open(path, "wb") as f:
            f.write(content.getvalue())
    except OSError as error:
        raise RunError(f"cannot write {path} ({error.strerror})") from None
    print(f"wrote {path}", flush=True)


def look(i):
    """Colour, marker and dash of series i: each tells it apart without the others."""
    return dict(color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)],
                linestyle=DASHES[i // len(COLOURS) % len(DASHES)])


def legend(picture, axes, **more):
    """One legend above all panels, from what the panels of `axes` name, in as many columns as fit the width."""
    found = {}
    for axis in axes.flat:
        for handle, name in zip(*axis.get_legend_handles_labels()):
            found.setdefault(name, handle)
    widest = 0.6 + 0.085 * max(len(name) for name in found)                 # inches of an entry at 9 points
    columns = min(max(int(picture.get_figwidth() / widest), 1), len(found))
    picture.legend(found.values(), found.keys(), loc="outside upper center", ncols=columns, **more)


def folder_name(path):
    """out/mae, out/mae/encoder.pt -> mae; vit_base.pth -> vit_base."""
    path = os.path.abspath(path)
    stem = os.path.splitext(os.path.basename(path))[0]
    ours = stem in ("encoder", "last", "previous", "classifier")
    return os.path.basename(os.path.dirname(path)) if ours and not os.path.isdir(path) else stem


def labelled(paths, names):
    """The systems' names; with the folder where several have the same, the folder alone where none is known."""
    folders = [folder_name(path) for path in paths]
    if len(set(zip(names, folders))) < len(paths):
        folders = [str(path) for path in paths]
    return [folder if name is None else f"{name} ({folder})" if names.count(name) > 1 else name
            for name, folder in zip(names, folders)]


def slug(name):
    """A label as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def panel_columns(n):
    """Columns of a figure with n panels of one kind."""
    return 2 if n == 4 else min(n, 3)


def unique(names):
    """In the order in which they first come."""
    return list(dict.fromkeys(names))


# -------------------------------------------------------------------------------------------------- results.jsonl
def read_results(paths):
    """The entries of several results.jsonl, or of those in the folders given, that hold an accuracy.

    reproduce.py gives each run a name: it tells apart systems that a checkpoint cannot.
    """
    entries = []
    for path in paths:
        path = os.path.join(path, "results.jsonl") if os.path.isdir(path) else path
        if not os.path.exists(path):
            raise UsageError(f"no results in {path}: `python reproduce.py` writes them, or give --results")
        entries += [entry for entry in run.read_results(path) if isinstance(entry.get("top1"), (int, float))]
    return [e | dict(system=e.get("name", e.get("system", "unnamed"))) for e in entries]


def rate(lr):
    """0.00015 -> 1.5e-4."""
    return np.format_float_scientific(lr, precision=2, trim="-", exp_digits=1)


def averaged(entries, *keys):
    """Rows with the given keys, mean of top1 over the entries that share them (seeds), deviation and their number.

    Of runs that were repeated with the same seed the last one counts.
    """
    sets = unique(entry.get("data") for entry in entries)
    if len(sets) > 1:
        raise UsageError(f"--results: accuracies on several data sets ({', '.join(map(str, sets))}), no mean of them")
    groups = {}
    for entry in entries:
        groups.setdefault(tuple(entry[k] for k in keys), {})[entry.get("seed", 0)] = entry["top1"]
    rows = []
    for key, by_seed in groups.items():
        values = list(by_seed.values())
        deviation = round(statistics.stdev(values), 3) if len(values) > 1 else ""
        rows.append(dict(zip(keys, key)) | dict(top1=round(statistics.mean(values), 3), deviation=deviation,
                                                seeds=len(values)))
    return rows


def lr_grid(args):
    """Figure 4: accuracy by the base rates of three stages, one heat map of stages 1 and 2 for each rate of stage 3.

    Entries whose "lr" lists three rates. The panels of one protocol share a colour scale; dots mark what was tested.
    """
    entries = [e | dict(zip(("lr_1", "lr_2", "lr_3"), e["lr"])) for e in read_results(args.results)
               if isinstance(e.get("lr"), list) and len(e["lr"]) == 3]
    if not entries:
        raise UsageError(f"{' '.join(args.results)}: no entry with the rates of three stages as its 'lr'")
    rows = averaged(entries, "protocol", "lr_1", "lr_2", "lr_3")
    protocols = unique(r["protocol"] for r in rows)
    rows.sort(key=lambda r: (protocols.index(r["protocol"]), -r["lr_3"], r["lr_1"], r["lr_2"]))
    write_csv(os.path.join(args.out, "lr-grid.csv"), rows)
    thirds = sorted({r["lr_3"] for r in rows}, reverse=True)
    first, second = sorted({r["lr_1"] for r in rows}), sorted({r["lr_2"] for r in rows})
    picture, axes = figure(len(protocols), len(thirds), 0.9 + 0.85 * max(len(first), 2) * len(thirds),
                           0.5 + (0.55 + 0.7 * len(second)) * len(protocols))
    if picture is None:
        return rows
    for line, protocol in zip(axes, protocols):
        values = [r["top1"] for r in rows if r["protocol"] == protocol]
        low, high = min(values), max(max(values), min(values) + 1e-6)
        for axis, third in zip(line, thirds):
            table = np.full((len(second), len(first)), np.nan)
            for r in rows:
                if r["protocol"] == protocol and r["lr_3"] == third:
                    table[second.index(r["lr_2"]), first.index(r["lr_1"])] = r["top1"]
            image = axis.imshow(table, cmap=MAP, vmin=low, vmax=high, origin="lower", aspect="auto")
            for (y, x), value in np.ndenumerate(table):
                if np.isfinite(value):
                    ink = "black" if (value - low) / (high - low) > 0.47 else "white"
                    axis.text(x, y + 0.12, f"{value:.1f}", ha="center", va="center", color=ink)
                    axis.plot(x, y - 0.22, "o", color=ink, markersize=3)
            axis.set_title(f"stage 3: {rate(third)}")
            axis.set_xticks(range(len(first)), [rate(lr) for lr in first])
            axis.set_yticks(range(len(second)), [rate(lr) for lr in second] if axis is line[0] else [])
            axis.grid(False)
            axis.set_xlabel("base rate of stage 1")
        line[0].set_ylabel("base rate of stage 2")
        picture.colorbar(image, ax=list(line), label=f"{protocol}, top-1 (%)", pad=0.01)
    save(picture, os.path.join(args.out, "lr-grid.png"))
    return rows


def partial(args):
    """Figure 5: accuracy after fine-tuning with the first K blocks fixed; K 0 is full fine-tuning."""
    entries = []
    for e in read_results(args.results):
        words = str(e.get("protocol", "")).split()
        if words == ["fine-tune"]:
            entries.append(dict(freeze_blocks=0) | e)
        elif words[:2] == ["partial", "fine-tune"] and len(words) == 3:     # "partial fine-tune 4"
            entries.append(dict(freeze_blocks=int(words[2])) | e)
        elif "freeze_blocks" in e:
            entries.append(e)
    partly = {e["system"] for e in entries if e["freeze_blocks"]}
    entries = [e for e in entries if e["system"] in partly]
    if not entries:
        raise UsageError(f"{' '.join(args.results)}: no partial fine-tuning in it (finetune.py --freeze-blocks K)")
    rows = sorted(averaged(entries, "system", "freeze_blocks"), key=lambda r: (r["system"], r["freeze_blocks"]))
    write_csv(os.path.join(args.out, "partial.csv"), rows)
    picture, axes = figure(1, 1, 4.2, 3.2)
    if picture is None:
        return rows
    draw_series(axes[0, 0], rows, "freeze_blocks", unique(e["system"] for e in entries))
    axes[0, 0].set_xticks(sorted({r["freeze_blocks"] for r in rows}))
    axes[0, 0].set(xlabel="blocks kept fixed", ylabel="top-1 after fine-tuning (%)")
    legend(picture, axes)
    save(picture, os.path.join(args.out, "partial.png"))
    return rows


def depth(args):
    """Table 5 as curves: N new blocks on the frozen features of block K, one panel for each K."""
    entries = []
    for e in read_results(args.results):
        words = str(e.get("protocol", "")).split()
        if words[:2] == ["probe", "block"] and len(words) == 6:             # "probe block 6 + 2 blocks"
            entries.append(dict(probe_block=int(words[2]), blocks=int(words[4])) | e)
        elif "probe_block" in e and "blocks" in e:
            entries.append(e)
    if not entries:
        raise UsageError(f"{' '.join(args.results)}: no depth probe in it (finetune.py --probe-block K --blocks N)")
    rows = averaged(entries, "system", "probe_block", "blocks")
    rows.sort(key=lambda r: (r["probe_block"], r["system"], r["blocks"]))
    write_csv(os.path.join(args.out, "depth.csv"), rows)
    features = unique(r["probe_block"] for r in rows)
    picture, axes = figure(1, len(features), 0.8 + 2.1 * len(features), 3.0, sharey=True)
    if picture is None:
        return rows
    for axis, k in zip(axes[0], features):
        draw_series(axis, [r for r in rows if r["probe_block"] == k], "blocks", unique(e["system"] for e in entries))
        axis.set_xticks(sorted({r["blocks"] for r in rows}))
        axis.set(title=f"features of block {k}", xlabel="new blocks on top")
    axes[0, 0].set_ylabel("top-1 (%)")
    legend(picture, axes)
    save(picture, os.path.join(args.out, "depth.png"))
    return rows


def draw_series(axis, rows, x, systems):
    """top1 over rows[x], a line for each system, with its deviation over seeds where there are several."""
    for i, system in enumerate(systems):
        own = [r for r in rows if r["system"] == system]
        if own:
            axis.errorbar([r[x] for r in own], [r["top1"] for r in own], [r["deviation"] or 0 for r in own],
                          label=system, capsize=2, **look(i))


# ------------------------------------------------------------------------------------------------------ log.jsonl
PANELS = {"loss": "loss", "knn": "k-NN accuracy (%)", "lr": "rate in force", "rank": "effective rank of features",
          "images_per_second": "images per second"}


def curves(args):
    """Loss, k-NN accuracy, rates, effective rank and speed of runs over epochs, from their log.jsonl."""
    rows = []
    logs = [os.path.join(path, "log.jsonl") if os.path.isdir(path) else path for path in args.runs]
    for log, name in zip(logs, labelled([os.path.dirname(log) or "." for log in logs], [None] * len(logs))):
        try:
            with open(log) as f:
                entries = [json.loads(line) for line in f if line.endswith("\n")]   # a run may be writing the last one
        except (OSError, ValueError) as error:
            raise UsageError(f"{log}: no readable log of a run ({error})") from None
        if not entries:
            raise UsageError(f"{log}: nothing in it yet")
        for e in entries:
            rates = {f"lr_{stage}": lr for stage, lr in enumerate(e["lr"], start=1)}
            kept = {k: "" if e.get(k) is None else e[k]                     # null: it was not a finite number
                    for k in ("step", "epoch", "loss", "knn", "rank", "images_per_second")}
            rows.append(dict(run=name, **kept, **rates))
    names = unique(k for row in rows for k in row)
    rows = [{k: row.get(k, "") for k in names} for row in rows]
    write_csv(os.path.join(args.out, "curves.csv"), rows)

    panels = [k for k in PANELS if k == "lr" or any(row[k] != "" for row in rows)]
    columns = 2 if len(panels) <= 4 else 3
    lines = -(-len(panels) // columns)
    picture, axes = figure(lines, columns, 2.9 * columns, 2.2 * lines + 0.3)
    if picture is None:
        return rows
    for axis in axes.flat[len(panels):]:
        axis.set_axis_off()
    for axis, key in zip(axes.flat, panels):
        for i, name in enumerate(unique(row["run"] for row in rows)):
            colour = look(i)["color"]
            keys = [k for k in names if k.startswith("lr_")] if key == "lr" else [key]
            for stage, k in enumerate(keys):
                points = [(row["epoch"], row[k]) for row in rows if row["run"] == name and row[k] != ""]
                if not points:
                    continue
                few = look(i)["marker"] if len(points) <= 15 else None
                # equal rates lie on each other: later runs are drawn thinner
                width = max(3.6 - 0.8 * i, 1.0) if key == "lr" else 1.5
                axis.plot(*zip(*points), color=colour, marker=few, markersize=4, linestyle=DASHES[stage % len(DASHES)],
                          linewidth=width, label=name if key == "loss" else None)
        values = [row[k] for row in rows for k in keys if row[k] != "" and row[k] > 0]
        # losses of different methods, and rates of different stages, differ by factors
        if key == "lr" or (key == "loss" and values and max(values) > 20 * min(values)):
            axis.set_yscale("log")
        if key == "lr" and values:
            axis.set_ylim(max(min(values), max(values) * 1e-4) / 1.5, max(values) * 1.5)
        if key == "images_per_second":
            axis.set_ylim(0, None)
        axis.set(xlabel="epoch", title=PANELS[key])
        axis.xaxis.get_major_locator().set_params(integer=True)
    legend(picture, axes)
    stages = sum(k.startswith("lr_") for k in names)
    if stages > 1:
        axis = axes.flat[panels.index("lr")]
        for stage in range(stages):
            axis.plot([], [], color=GREY, linestyle=DASHES[stage % len(DASHES)], label=f"stage {stage + 1}")
        axis.legend(fontsize=7, loc="lower left", handlelength=2.4)
    save(picture, os.path.join(args.out, "curves.png"))
    return rows
