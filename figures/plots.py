"""Figures from numbers: the rate grid, partial fine-tuning, depth probes, training curves; and what
all figures share: size, colours, how they are written. Called by analyze.py.

Numbers are written as CSV first, then a PNG if matplotlib is there.
"""
import csv
import json
import os
import re
import statistics

import numpy as np

import run
from run import UsageError

# Okabe & Ito (2008), told apart by colour-blind readers too; without yellow, too pale on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":", "-.")
GREY = "#777777"
MAP = "cividis"                     # even in lightness, for colour-blind readers too
STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False,
         "axes.spines.right": False, "axes.grid": True, "grid.color": "#dddddd",
         "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.frameon": False,
         "lines.linewidth": 1.5, "lines.markersize": 5, "figure.constrained_layout.use": True}


# ------------------------------------------------------------------------------ numbers and figures
def write_csv(path, rows):
    """rows: dicts with the same keys, which are the header."""
    with run.atomic(path) as temporary, open(temporary, "w", newline="") as f:
        table = csv.DictWriter(f, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    print(f"wrote {path}", flush=True)


def write_npz(path, **arrays):
    with run.atomic(path) as temporary, open(temporary, "wb") as f:
        np.savez_compressed(f, **arrays)
    print(f"wrote {path}: {', '.join(arrays)}", flush=True)


def figure(rows, columns, width, height, **more):
    """(figure of width x height inches, its axes (rows, columns)); (None, None) without
    matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        print("no figure without matplotlib: pip install matplotlib", flush=True)
        return None, None
    matplotlib.rcParams.update(STYLE)
    drawn = Figure(figsize=(width, height), dpi=150)
    return drawn, drawn.subplots(rows, columns, squeeze=False, **more)


def panels(n, width, height, **more):
    """A figure of n panels of one kind, and their axes; the rest of the last row stays empty."""
    columns = 2 if n == 4 else min(n, 3)
    lines = -(-n // columns)
    drawn, axes = figure(lines, columns, width * columns, height * lines + 0.4, **more)
    if drawn is None:
        return None, None
    for axis in axes.flat[n:]:
        axis.set_axis_off()
    return drawn, axes.flat[:n]


def save(drawn, path):
    with run.atomic(path) as temporary:
        drawn.savefig(temporary, format="png")
    print(f"wrote {path}", flush=True)


def look(i):
    """Colour, marker and dash of series i: each tells it apart without the others."""
    return dict(color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)],
                linestyle=DASHES[i // len(COLOURS) % len(DASHES)])


def legend(drawn, axes, **more):
    """One legend above all panels, in as many columns as fit the width."""
    found = {}
    for axis in np.ravel(axes):
        for handle, name in zip(*axis.get_legend_handles_labels()):
            found.setdefault(name, handle)
    widest = 0.6 + 0.085 * max(len(name) for name in found)     # inches of an entry at 9 points
    columns = min(max(int(drawn.get_figwidth() / widest), 1), len(found))
    drawn.legend(found.values(), found.keys(), loc="outside upper center", ncols=columns, **more)


def folder_name(path):
    """out/mae, out/mae/encoder.pt -> mae; vit_base.pth -> vit_base."""
    path = os.path.abspath(path)
    stem = os.path.splitext(os.path.basename(path))[0]
    ours = stem in ("encoder", "last", "previous", "classifier", "log")
    return os.path.basename(os.path.dirname(path)) if ours and not os.path.isdir(path) else stem


def labelled(paths, names):
    """The systems' names; with the folder where several have the same, the folder alone where none
    is known."""
    folders = [folder_name(path) for path in paths]
    if len(set(zip(names, folders))) < len(paths):
        folders = [str(path) for path in paths]
    return [folder if name is None else f"{name} ({folder})" if names.count(name) > 1 else name
            for name, folder in zip(names, folders)]


def slug(name):
    """A label as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def unique(names):
    """In the order in which they first come."""
    return list(dict.fromkeys(names))


# -------------------------------------------------------------------------- of analyze.py's numbers
def draw_gradients(path, rows, summary):
    """A box per block with the line through the medians, and below the share of negative ones."""
    systems = unique(r["system"] for r in rows)
    depth = max(r["block"] for r in rows)
    drawn, axes = figure(2, len(systems), 0.5 + max(3.0, 0.32 * depth) * len(systems), 3.5,
                         height_ratios=[3, 1], sharey="row", sharex="col")
    if drawn is None:
        return
    for (boxes, bars), system in zip(axes.T, systems):
        own = [s for s in summary if s["system"] == system]
        blocks = [s["block"] for s in own]
        values = [[r["cosine"] for r in rows if r["system"] == system and r["block"] == block]
                  for block in blocks]
        boxes.boxplot(values, positions=blocks, widths=0.6, patch_artist=True,
                      flierprops=dict(markersize=2.5), boxprops=dict(facecolor="#cfe6f5"),
                      medianprops=dict(color=COLOURS[0], linewidth=1.8))
        boxes.plot(blocks, [s["line"] for s in own], "--", color=COLOURS[1])
        boxes.axhline(0, color="black", linewidth=0.8)
        boxes.set_title(f"{system}\nmedians {own[0]['slope']:+.3f} per block")
        bars.bar(blocks, [100 * s["negative_share"] for s in own], width=0.6, color=COLOURS[1])
        bars.set(ylim=(0, 100), xlabel="block", xticks=blocks, xticklabels=blocks)
    axes[0, 0].set_ylabel("cosine of the two gradients")
    axes[1, 0].set_ylabel("negative\n(%)")
    save(drawn, path)


def draw_vic(path, rows):
    drawn, axes = panels(3, 2.5, 2.4)
    if drawn is None:
        return
    for axis, term in zip(axes, ("variance", "invariance", "covariance")):
        for i, system in enumerate(unique(r["system"] for r in rows)):
            own = [r for r in rows if r["system"] == system]
            axis.plot([r["block"] for r in own], [r[term] for r in own], label=system, **look(i))
        axis.set(title=term, xlabel="block")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.ticklabel_format(axis="y", scilimits=(-3, 3), useMathText=True, useOffset=False)
    legend(drawn, axes)
    save(drawn, path)


def draw_distances(path, rows):
    """Attention distance of each head, raw above and renormalised below, a column a system."""
    systems = unique(r["system"] for r in rows)
    depth = max(r["block"] for r in rows)
    drawn, axes = figure(2, len(systems), 0.8 + max(2.3, 0.24 * depth) * len(systems), 4.8,
                         sharey=True, sharex="col")
    if drawn is None:
        return
    for line, kind in zip(axes, ("raw", "renormalised")):
        for axis, system in zip(line, systems):
            own = [r for r in rows if r["system"] == system]
            blocks = sorted({r["block"] for r in own})
            means = [np.mean([r[kind] for r in own if r["block"] == block]) for block in blocks]
            axis.plot([r["block"] for r in own], [r[kind] for r in own], "o", color=COLOURS[0],
                      markersize=4, alpha=0.6, markeredgewidth=0, label="one head")
            axis.plot(blocks, means, "-", color=COLOURS[1], label="mean of the heads")
            axis.axhline(own[0]["uniform"], color=GREY, linestyle=":", label="uniform")
            axis.set(xticks=blocks, xlabel="block", title=system if kind == "raw" else "")
            axis.label_outer()
        line[0].set_ylabel(f"mean distance (pixels),\n{kind}")
    legend(drawn, axes)
    save(drawn, path)


def draw_tsne(path, points, classes):
    """points: [(system, (N, 2), labels (N,))]."""
    drawn, axes = panels(len(points), 2.8, 2.9)
    if drawn is None:
        return
    for axis, (system, flat, labels) in zip(axes, points):
        for c, name in enumerate(classes):              # 7 colours and 6 markers: 40 classes differ
            axis.plot(*flat[labels == c].T, MARKERS[c % 6], color=COLOURS[c % 7], label=name,
                      markersize=3, markeredgewidth=0, alpha=0.8)
        axis.set(title=system, xticks=[], yticks=[])
        axis.spines[:].set_visible(True)
    legend(drawn, axes, markerscale=1.6)
    save(drawn, path)


# ------------------------------------------------------------------------------------ results.jsonl
def read_results(paths):
    """The entries with an accuracy of several results.jsonl, or of those in the folders given.

    reproduce.py gives each run a name: it tells apart systems that a checkpoint cannot.
    """
    entries = []
    for path in paths:
        path = os.path.join(path, "results.jsonl") if os.path.isdir(path) else path
        if not os.path.exists(path):
            raise UsageError(f"no results in {path}: `python reproduce.py` writes them, or give "
                             "--results")
        entries += [e for e in run.read_results(path) if isinstance(e.get("top1"), (int, float))]
    return [e | dict(system=e.get("name", e.get("system", "unnamed"))) for e in entries]


def averaged(entries, *keys):
    """Rows with the given keys, mean and deviation of top1 over the entries that share them
    (seeds), and their number. Of runs repeated with one seed the last one counts."""
    sets = unique(entry.get("data") for entry in entries)
    if len(sets) > 1:
        raise UsageError("--results: accuracies on several datasets "
                         f"({', '.join(map(str, sets))}), no mean of them")
    groups = {}
    for entry in entries:
        key = tuple(entry[k] for k in keys)
        groups.setdefault(key, {})[entry.get("seed", 0)] = entry["top1"]
    rows = []
    for key, by_seed in groups.items():
        values = list(by_seed.values())
        deviation = round(statistics.stdev(values), 3) if len(values) > 1 else ""
        rows.append(dict(zip(keys, key)) | dict(top1=round(statistics.mean(values), 3),
                                                deviation=deviation, seeds=len(values)))
    return rows


def short(rate):
    """0.00015 -> 1.5e-4."""
    return np.format_float_scientific(rate, precision=2, trim="-", exp_digits=1)


def lr_grid(args):
    """Figure 4: accuracy by the base rates of three stages, one heat map of stages 1 and 2 for each
    rate of stage 3, in one row for each protocol.

    Entries whose "lr" lists three rates. The panels of a row share a colour scale; dots mark what
    was tested.
    """
    entries = [e | dict(zip(("lr_1", "lr_2", "lr_3"), e["lr"])) for e in read_results(args.results)
               if isinstance(e.get("lr"), list) and len(e["lr"]) == 3]
    if not entries:
        raise UsageError(f"{' '.join(args.results)}: no entry with the rates of three stages as "
                         "its 'lr'")
    rows = averaged(entries, "protocol", "lr_1", "lr_2", "lr_3")
    protocols = unique(r["protocol"] for r in rows)
    rows.sort(key=lambda r: (protocols.index(r["protocol"]), -r["lr_3"], r["lr_1"], r["lr_2"]))
    write_csv(os.path.join(args.out, "lr-grid.csv"), rows)
    first, second, third = (sorted({r[f"lr_{stage}"] for r in rows}) for stage in (1, 2, 3))
    drawn, axes = figure(len(protocols), len(third), 0.9 + 0.85 * max(len(first), 2) * len(third),
                         0.5 + (0.55 + 0.7 * len(second)) * len(protocols))
    if drawn is None:
        return rows
    for line, protocol in zip(axes, protocols):
        values = [r["top1"] for r in rows if r["protocol"] == protocol]
        low, high = min(values), max(max(values), min(values) + 1e-6)
        for axis, rate in zip(line, reversed(third)):
            table = np.full((len(second), len(first)), np.nan)
            for r in rows:
                if r["protocol"] == protocol and r["lr_3"] == rate:
                    table[second.index(r["lr_2"]), first.index(r["lr_1"])] = r["top1"]
            image = axis.imshow(table, cmap=MAP, vmin=low, vmax=high, origin="lower",
                                aspect="auto")
            for (y, x), value in np.ndenumerate(table):
                if np.isfinite(value):
                    ink = "black" if (value - low) / (high - low) > 0.47 else "white"
                    axis.text(x, y + 0.12, f"{value:.1f}", ha="center", va="center", color=ink)
                    axis.plot(x, y - 0.22, "o", color=ink, markersize=3)
            axis.set(title=f"stage 3: {short(rate)}", xlabel="base rate of stage 1")
            axis.set_xticks(range(len(first)), map(short, first))
            axis.set_yticks(range(len(second)), map(short, second))
            axis.label_outer()
            axis.grid(False)
        line[0].set_ylabel("base rate of stage 2")
        drawn.colorbar(image, ax=list(line), label=f"{protocol}, top-1 (%)", pad=0.01)
    save(drawn, os.path.join(args.out, "lr-grid.png"))
    return rows


def numbered(entries, patterns, *keys):
    """Entries whose protocol matches one of the patterns, with its numbers as those keys, or that
    have these keys themselves."""
    found = []
    for e in entries:
        matches = [re.fullmatch(pattern, str(e.get("protocol"))) for pattern in patterns]
        groups = [int(n or 0) for match in matches if match for n in match.groups()]
        if groups or all(k in e for k in keys):
            found.append(dict(zip(keys, groups)) | e)
    return found


def partial(args):
    """Figure 5: accuracy after fine-tuning with the first K blocks fixed; K 0 is fine-tuning."""
    entries = numbered(read_results(args.results), [r"fine-tune()", r"partial fine-tune (\d+)"],
                       "freeze_blocks")
    partly = {e["system"] for e in entries if e["freeze_blocks"]}
    entries = [e for e in entries if e["system"] in partly]
    if not entries:
        raise UsageError(f"{' '.join(args.results)}: no partial fine-tuning in it "
                         "(finetune.py --freeze-blocks K)")
    rows = averaged(entries, "system", "freeze_blocks")
    rows.sort(key=lambda r: (r["system"], r["freeze_blocks"]))
    write_csv(os.path.join(args.out, "partial.csv"), rows)
    drawn, axes = figure(1, 1, 4.2, 3.2)
    if drawn is not None:
        draw_series(axes[0, 0], rows, "freeze_blocks", unique(e["system"] for e in entries))
        axes[0, 0].set(xlabel="blocks kept fixed", ylabel="top-1 after fine-tuning (%)")
        legend(drawn, axes)
        save(drawn, os.path.join(args.out, "partial.png"))
    return rows


def depth(args):
    """Table 5 as curves: N new blocks on the frozen features of block K, one panel for each K."""
    entries = numbered(read_results(args.results), [r"probe block (\d+) \+ (\d+) blocks"],
                       "probe_block", "blocks")
    probed = {e["system"] for e in entries if e["blocks"]}      # 0 is linear evaluation
    entries = [e for e in entries if e["system"] in probed]
    if not entries:
        raise UsageError(f"{' '.join(args.results)}: no depth probe in it "
                         "(finetune.py --probe-block K --blocks N)")
    rows = averaged(entries, "system", "probe_block", "blocks")
    rows.sort(key=lambda r: (r["probe_block"], r["system"], r["blocks"]))
    write_csv(os.path.join(args.out, "depth.csv"), rows)
    features = unique(r["probe_block"] for r in rows)
    drawn, axes = figure(1, len(features), 0.8 + 2.1 * len(features), 3.0, sharey=True)
    if drawn is not None:
        for axis, k in zip(axes[0], features):
            own = [r for r in rows if r["probe_block"] == k]
            draw_series(axis, own, "blocks", unique(e["system"] for e in entries))
            axis.set(title=f"features of block {k}", xlabel="new blocks on top")
        axes[0, 0].set_ylabel("top-1 (%)")
        legend(drawn, axes)
        save(drawn, os.path.join(args.out, "depth.png"))
    return rows


def draw_series(axis, rows, x, systems):
    """top1 over rows[x], a line for each system, with its deviation over seeds if there is one."""
    for i, system in enumerate(systems):
        own = [r for r in rows if r["system"] == system]
        if own:
            axis.errorbar([r[x] for r in own], [r["top1"] for r in own],
                          [r["deviation"] or 0 for r in own], label=system, capsize=2, **look(i))
    axis.set_xticks(sorted({r[x] for r in rows}))


# ---------------------------------------------------------------------------------------- log.jsonl
PANELS = {"loss": "loss", "knn": "k-NN accuracy (%)", "lr": "rate in force",
          "rank": "effective rank of features", "images_per_second": "images per second"}


def read_logs(paths):
    """A row for each line of the log.jsonl of several runs, the rates of stages as lr_1, lr_2."""
    rows = []
    logs = [os.path.join(path, "log.jsonl") if os.path.isdir(path) else path for path in paths]
    for log, name in zip(logs, labelled(logs, [None] * len(logs))):
        try:
            with open(log) as f:            # the last line of a run that goes on may be half there
                entries = [json.loads(line) for line in f if line.endswith("\n")]
        except (OSError, ValueError) as error:
            raise UsageError(f"{log}: no readable log of a run ({error})") from None
        if not entries:
            raise UsageError(f"{log}: nothing in it yet")
        for e in entries:
            rates = {f"lr_{stage}": lr for stage, lr in enumerate(e["lr"], start=1)}
            kept = {k: e.get(k) for k in ("step", "epoch", *PANELS) if k != "lr"}
            rows.append(dict(run=name) | kept | rates)
    names = unique(k for row in rows for k in row)
    # null: it was not a finite number, or not measured
    return [{k: "" if row.get(k) is None else row[k] for k in names} for row in rows]


def curves(args):
    """Loss, k-NN accuracy, rates, effective rank and speed of runs over epochs."""
    rows = read_logs(args.checkpoint)
    write_csv(os.path.join(args.out, "curves.csv"), rows)
    stages = [k for k in rows[0] if k.startswith("lr_")]
    shown = [k for k in PANELS if k == "lr" or any(row[k] != "" for row in rows)]
    drawn, axes = panels(len(shown), 2.9, 2.2)
    if drawn is None:
        return rows
    for axis, key in zip(axes, shown):
        for i, name in enumerate(unique(row["run"] for row in rows)):
            for stage, k in enumerate(stages if key == "lr" else [key]):
                points = [(r["epoch"], r[k]) for r in rows if r["run"] == name and r[k] != ""]
                # equal rates lie on each other: later runs are drawn thinner
                axis.plot(*np.reshape(points, (-1, 2)).T, color=look(i)["color"],
                          linestyle=DASHES[stage % len(DASHES)], markersize=4,
                          marker=look(i)["marker"] if len(points) <= 15 else None,
                          linewidth=max(3.6 - 0.8 * i, 1.0) if key == "lr" else 1.5,
                          label=name if key == "loss" else None)
        if key == "lr":
            axis.set_yscale("log", nonpositive="mask")
        values = [row[key] for row in rows if key == "loss" and row[key] != ""]
        if values and 0 < 20 * min(values) < max(values):   # losses of different methods
            axis.set_yscale("log")
        axis.set(xlabel="epoch", title=PANELS[key])
        axis.xaxis.get_major_locator().set_params(integer=True)
    legend(drawn, axes)
    if len(stages) > 1:
        axis = axes[shown.index("lr")]
        for stage, dash in zip(range(len(stages)), DASHES * len(stages)):
            axis.plot([], [], color=GREY, linestyle=dash, label=f"stage {stage + 1}")
        axis.legend(fontsize=7, handlelength=2.4)
    save(drawn, os.path.join(args.out, "curves.png"))
    return rows
