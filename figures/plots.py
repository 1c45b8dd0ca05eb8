"""Figures from numbers: the rate grid, partial fine-tuning, depth probes, training curves; and what
all figures share: size, colours, how they are written. Called by analyze.py.

Numbers are written as CSV first, then a PNG if matplotlib is there.
"""
import functools
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
    run.write_csv(path, [list(rows[0]), *(row.values() for row in rows)])
    print(f"wrote {path}", flush=True)


def write_npz(path, **arrays):
    with run.atomic(path) as temporary, open(temporary, "wb") as f:
        np.savez_compressed(f, **arrays)
    print(f"wrote {path}: {', '.join(arrays)}", flush=True)


def figure(rows, columns, width, height, **more):
    """(figure of width x height inches, its axes (rows, columns)). ImportError: no matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcParams.update(STYLE)
    drawn = Figure(figsize=(width, height), dpi=150)
    return drawn, drawn.subplots(rows, columns, squeeze=False, **more)


def panels(n, width, height, **more):
    """A figure of n panels of one kind, and their axes; the rest of the last row stays empty."""
    columns = 2 if n == 4 else min(n, 3)
    lines = -(-n // columns)
    drawn, axes = figure(lines, columns, width * columns, height * lines + 0.4, **more)
    for axis in axes.flat[n:]:
        axis.set_axis_off()
    return drawn, axes.flat[:n]


def saved(draw):
    """Turns draw(...) -> figure into a function (path, ...) that writes it, with matplotlib."""
    @functools.wraps(draw)
    def write(path, *args, **more):
        try:
            drawn = draw(*args, **more)
        except ImportError:
            print("no figure without matplotlib: pip install matplotlib", flush=True)
            return
        with run.atomic(path) as temporary:
            drawn.savefig(temporary, format="png")
        print(f"wrote {path}", flush=True)

    return write


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
    more_rows = -(-len(found) // columns) - 2               # than the panels' size allows for
    drawn.set_figheight(drawn.get_figheight() + 0.19 * max(more_rows, 0))
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


def by(rows, key):
    """{value of the key: the rows that have it}, in the order in which they first come."""
    return {value: [r for r in rows if r[key] == value] for value in unique(r[key] for r in rows)}


def column(rows, key):
    return [r[key] for r in rows]


# -------------------------------------------------------------------------- of analyze.py's numbers
@saved
def draw_gradients(rows, summary):
    """A box per block with the line through the medians, and below the share of negative ones."""
    systems, depth = by(summary, "system"), max(column(rows, "block"))
    drawn, axes = figure(2, len(systems), 0.5 + max(3.0, 0.32 * depth) * len(systems), 3.5,
                         height_ratios=[3, 1], sharey="row", sharex="col")
    for (boxes, bars), (system, own) in zip(axes.T, systems.items()):
        blocks = column(own, "block")
        cosines = [column(of, "cosine") for of in by(by(rows, "system")[system], "block").values()]
        boxes.boxplot(cosines, positions=blocks, widths=0.6, patch_artist=True,
                      flierprops=dict(markersize=2.5), boxprops=dict(facecolor="#cfe6f5"),
                      medianprops=dict(color=COLOURS[0], linewidth=1.8))
        boxes.plot(blocks, column(own, "line"), "--", color=COLOURS[1])
        boxes.axhline(0, color="black", linewidth=0.8)
        boxes.set_title(f"{system}\nmedians {own[0]['slope']:+.3f} per block")
        bars.bar(blocks, 100 * np.array(column(own, "negative_share")), 0.6, color=COLOURS[1])
        bars.set(ylim=(0, 100), xlabel="block", xticks=blocks, xticklabels=blocks)
    axes[0, 0].set_ylabel("cosine of the two gradients")
    axes[1, 0].set_ylabel("negative\n(%)")
    return drawn


@saved
def draw_lines(parts, x, xlabel, ylabel=""):
    """A panel for each (title, rows, key): rows[key] over rows[x], a line for each system, with its
    deviation over seeds if there is one. With ylabel they share the axis."""
    drawn, axes = panels(len(parts), 2.9, 2.6, sharey=bool(ylabel))
    systems = unique(system for _, rows, _ in parts for system in column(rows, "system"))
    for axis, (title, rows, key) in zip(axes, parts):
        for system, own in by(rows, "system").items():
            spread = [r["deviation"] or 0 for r in own] if "deviation" in own[0] else None
            axis.errorbar(column(own, x), column(own, key), spread, label=system, capsize=2,
                          **look(systems.index(system)))
        axis.set(title=title, xlabel=xlabel)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.ticklabel_format(axis="y", scilimits=(-3, 3), useMathText=True, useOffset=False)
    axes[0].set_ylabel(ylabel)
    legend(drawn, axes)
    return drawn


@saved
def draw_distances(rows):
    """Attention distance of each head, raw above and renormalised below, a column a system."""
    systems, depth = by(rows, "system"), max(column(rows, "block"))
    drawn, axes = figure(2, len(systems), 0.8 + max(2.3, 0.24 * depth) * len(systems), 4.8,
                         sharey=True, sharex="col")
    for line, kind in zip(axes, ("raw", "renormalised")):
        for axis, (system, own) in zip(line, systems.items()):
            blocks = by(own, "block")
            means = [np.mean(column(heads, kind)) for heads in blocks.values()]
            axis.plot(column(own, "block"), column(own, kind), "o", color=COLOURS[0],
                      markersize=4, alpha=0.6, markeredgewidth=0, label="one head")
            axis.plot(list(blocks), means, "-", color=COLOURS[1], label="mean of the heads")
            axis.axhline(own[0]["uniform"], color=GREY, linestyle=":", label="uniform")
            axis.set(xticks=list(blocks), xlabel="block", title=system if kind == "raw" else "")
            axis.label_outer()
        line[0].set_ylabel(f"mean distance (pixels),\n{kind}")
    legend(drawn, axes)
    return drawn


@saved
def draw_tsne(points, classes):
    """points: [(system, (N, 2), labels (N,))]."""
    drawn, axes = panels(len(points), 2.8, 2.9)
    for axis, (system, flat, labels) in zip(axes, points):
        for c, name in enumerate(classes):              # 7 colours and 6 markers: 40 classes differ
            axis.plot(*flat[labels == c].T, MARKERS[c % 6], color=COLOURS[c % 7], label=name,
                      markersize=3, markeredgewidth=0, alpha=0.8)
        axis.set(title=system, xticks=[], yticks=[])
        axis.spines[:].set_visible(True)
    legend(drawn, axes, markerscale=1.6)
    return drawn


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
        seed = (entry.get("pretraining") or {}).get("seed"), entry.get("seed", 0)
        groups.setdefault(key, {})[seed] = entry["top1"]
    rows = []
    for key, by_seed in groups.items():
        top1 = list(by_seed.values())
        deviation = round(statistics.stdev(top1), 3) if len(top1) > 1 else ""
        rows.append(dict(zip(keys, key), top1=round(statistics.mean(top1), 3), deviation=deviation,
                         seeds=len(top1)))
    return rows


def lr_grid(args):
    """Figure 4: accuracy by the base rates of three stages, of entries whose "lr" lists them."""
    entries = [e | dict(zip(("lr_1", "lr_2", "lr_3"), e["lr"])) for e in read_results(args.results)
               if isinstance(e.get("lr"), list) and len(e["lr"]) == 3]
    if not entries:
        raise UsageError(f"{' '.join(args.results)}: no entry with the rates of three stages as "
                         "its 'lr'")
    rows = averaged(entries, "protocol", "lr_1", "lr_2", "lr_3")
    protocols = unique(column(rows, "protocol"))
    rows.sort(key=lambda r: (protocols.index(r["protocol"]), -r["lr_3"], r["lr_1"], r["lr_2"]))
    write_csv(os.path.join(args.out, "lr-grid.csv"), rows)
    draw_grid(os.path.join(args.out, "lr-grid.png"), rows)
    return rows


@saved
def draw_grid(rows):
    """A heat map of the rates of stages 1 and 2 for each rate of stage 3, in one row for each
    protocol. The panels of a row share a colour scale; dots mark what was tested."""
    first, second, third = (sorted(set(column(rows, f"lr_{stage}"))) for stage in (1, 2, 3))
    protocols = by(rows, "protocol")
    drawn, axes = figure(len(protocols), len(third), 0.9 + 0.85 * max(len(first), 2) * len(third),
                         0.5 + (0.55 + 0.7 * max(len(second), 2)) * len(protocols))
    for line, (protocol, own) in zip(axes, protocols.items()):
        low = min(column(own, "top1"))
        high = max(*column(own, "top1"), low + 1e-6)
        for axis, rate in zip(line, reversed(third)):
            table = np.full((len(second), len(first)), np.nan)
            for r in by(own, "lr_3").get(rate, []):
                y, x = second.index(r["lr_2"]), first.index(r["lr_1"])
                table[y, x] = r["top1"]
                ink = "black" if (r["top1"] - low) / (high - low) > 0.47 else "white"
                axis.text(x, y + 0.12, f"{r['top1']:.1f}", ha="center", va="center", color=ink)
                axis.plot(x, y - 0.22, "o", color=ink, markersize=3)
            image = axis.imshow(table, cmap=MAP, vmin=low, vmax=high, origin="lower",
                                aspect="auto")
            axis.set(title=f"stage 3: {short(rate)}", xlabel="base rate of stage 1")
            axis.set_xticks(range(len(first)), map(short, first))
            axis.set_yticks(range(len(second)), map(short, second))
            axis.label_outer()
            axis.grid(False)
        line[0].set_ylabel("base rate of stage 2")
        drawn.colorbar(image, ax=list(line), label=f"{protocol},\ntop-1 (%)", pad=0.01)
    return drawn


def short(rate):
    """0.00015 -> 1.5e-4."""
    return np.format_float_scientific(rate, precision=2, trim="-", exp_digits=1)


def partial(args):
    """Figure 5: accuracy after fine-tuning with the first K blocks fixed; K 0 is fine-tuning."""
    return by_blocks(args, "partial", ["freeze_blocks"], r"fine-tune|partial fine-tune (\d+)",
                     "no partial fine-tuning in it (finetune.py --freeze-blocks K)",
                     "blocks kept fixed", "top-1 after fine-tuning (%)")


def depth(args):
    """Table 5 as curves: N new blocks on the frozen features of block K, one panel for each K."""
    return by_blocks(args, "depth", ["probe_block", "blocks"], r"probe block (\d+) \+ (\d+) blocks",
                     "no depth probe in it (finetune.py --probe-block K --blocks N)",
                     "new blocks on top", "top-1 (%)")


def by_blocks(args, name, keys, pattern, lacking, xlabel, ylabel):
    """Accuracy over the last of the keys, a panel for each value of the one before it.

    keys: numbers in a protocol that matches the pattern, in its order, or fields of the entry.
    Systems that have no entry but where the last one is 0 are left out.
    """
    entries = []
    for e in read_results(args.results):
        match = re.fullmatch(pattern, str(e.get("protocol")))
        if match or all(k in e for k in keys):
            numbers = [int(n or 0) for n in match.groups()] if match else []
            entries.append(dict(zip(keys, numbers)) | e)
    shown = {e["system"] for e in entries if e[keys[-1]]}
    entries = [e for e in entries if e["system"] in shown]
    if not entries:
        raise UsageError(f"{' '.join(args.results)}: {lacking}")
    rows = averaged(entries, "system", *keys)
    rows.sort(key=lambda r: (*(r[k] for k in keys[:-1]), r["system"], r[keys[-1]]))
    write_csv(os.path.join(args.out, f"{name}.csv"), rows)
    parts = [("", rows, "top1")]
    if len(keys) > 1:
        parts = [(f"features of block {k}", own, "top1") for k, own in by(rows, keys[0]).items()]
    draw_lines(os.path.join(args.out, f"{name}.png"), parts, keys[-1], xlabel, ylabel)
    return rows


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
    draw_curves(os.path.join(args.out, "curves.png"), rows)
    return rows


@saved
def draw_curves(rows):
    stages = [k for k in rows[0] if k.startswith("lr_")]
    shown = [k for k in PANELS if k == "lr" or any(v != "" for v in column(rows, k))]
    drawn, axes = panels(len(shown), 2.9, 2.2)
    for axis, key in zip(axes, shown):
        for i, (name, own) in enumerate(by(rows, "run").items()):
            for dash, k in zip(DASHES * len(stages), stages if key == "lr" else [key]):
                points = [(r["epoch"], r[k]) for r in own if r[k] != ""]
                # equal rates lie on each other: later runs are drawn thinner
                axis.plot(*np.reshape(points, (-1, 2)).T, color=look(i)["color"], linestyle=dash,
                          marker=look(i)["marker"] if len(points) <= 15 else None, markersize=4,
                          linewidth=max(3.6 - 0.8 * i, 1.0) if key == "lr" else 1.5,
                          label=name if key == "loss" else None)
        values = [v for v in column(rows, "loss") if v != ""]
        # losses of different methods
        apart = key == "loss" and values and 0 < 20 * min(values) < max(values)
        if key == "lr" or apart:
            axis.set_yscale("log", nonpositive="mask")
        axis.set(xlabel="epoch", title=PANELS[key])
        axis.xaxis.get_major_locator().set_params(integer=True)
    legend(drawn, axes)
    if len(stages) > 1:
        axis = axes[shown.index("lr")]
        for stage, dash in zip(range(1, len(stages) + 1), DASHES * len(stages)):
            axis.plot([], [], color=GREY, linestyle=dash, label=f"stage {stage}")
        axis.legend(fontsize=7, handlelength=2.4)
    return drawn
