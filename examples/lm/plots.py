"""The picture of a training run."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

from .training import History


def _style() -> None:
    plt.rcParams.update(
        {
            "figure.dpi": 150,
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "axes.titleweight": "bold",
            "legend.frameon": False,
        }
    )


def _smooth(values: list[float], decay: float) -> list[float]:
    """Exponential moving average without the pull towards zero at its start."""
    smoothed, average, weight = [], 0.0, 0.0
    for value in values:
        average = decay * average + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        smoothed.append(average / weight)
    return smoothed


def plot_loss(path: Path, history: History, bigram: float, final: float, title: str) -> None:
    """Draws the training curve, the held-out losses along it, the bigram model's loss and, below, the balance.

    Args:
        path: the PNG to write.
        history: what was noted at each step.
        bigram: the bigram model's held-out loss in nats per byte.
        final: the model's final held-out loss in nats per byte.
        title: the figure's title.
    """
    _style()
    figure, (loss_axes, balance_axes) = plt.subplots(
        2, 1, figsize=(8, 5.6), sharex=True, height_ratios=[4, 1], constrained_layout=True
    )
    steps = range(1, len(history.train_loss) + 1)
    decay = 1 - 1 / max(2, min(20, len(history.train_loss) // 20))
    loss_axes.plot(steps, history.train_loss, color="#4c78a8", alpha=0.25, linewidth=0.8)
    loss_axes.plot(steps, _smooth(history.train_loss, decay), color="#4c78a8", linewidth=1.8, label="training text")
    loss_axes.plot(
        history.held_out_step, history.held_out_loss, "o-", color="#e45756", ms=4, linewidth=1, label="held-out text"
    )
    loss_axes.axhline(bigram, color="#59504a", linestyle="--", linewidth=1.2)
    # The first steps, at the loss of a uniform guess, would flatten everything of interest.
    bottom = min([final, *history.held_out_loss, *_smooth(history.train_loss, decay)]) - 0.1
    top = max(bigram * 1.35, 1.15 * min(history.train_loss[-1], final))
    loss_axes.set_ylim(bottom - 0.08 * (top - bottom), top)
    loss_axes.annotate(
        f"byte-bigram model, held out: {bigram:.3f}",
        (0.99, bigram),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        color="#59504a",
    )
    last = len(history.train_loss)
    loss_axes.plot([last], [final], "*", color="#e45756", ms=13, label="held-out text, at the end", clip_on=False)
    loss_axes.annotate(
        f"{final:.3f}",
        (last, final),
        xytext=(0, -16),
        textcoords="offset points",
        ha="center",
        color="#e45756",
        weight="bold",
    )
    loss_axes.set_ylabel("nats per byte")
    bits = loss_axes.secondary_yaxis("right", functions=(lambda x: x / math.log(2), lambda x: x * math.log(2)))
    bits.set_ylabel("bits per byte")
    bits.spines["right"].set_visible(True)
    loss_axes.set_title(title)
    loss_axes.legend(loc="upper right", bbox_to_anchor=(1.0, 0.98))
    loss_axes.grid(axis="y", alpha=0.25)

    balance_axes.plot(steps, [100 * value for value in history.balance], color="#54a24b", linewidth=1.2)
    balance_axes.set_ylim(0, 105)
    balance_axes.set_yticks([0, 50, 100])
    balance_axes.set_ylabel("balance (%)")
    balance_axes.set_xlabel("step")
    balance_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    balance_axes.grid(axis="y", alpha=0.25)
    figure.savefig(path)
    plt.close(figure)
