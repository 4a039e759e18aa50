"""How difficult the prompts look over training, as a picture."""

import os

import torch
from transformers import TrainerCallback


BINS = 20


class DifficultyCallback(TrainerCallback):
    """
    Keeps, at every log, how the success rates that a method estimates are spread over the prompts, and draws them as
    `prompt_difficulty.png` in `output_dir` at every checkpoint and at the end. The numbers are part of the trainer's
    `log_history` (`<method>/rates`, prompts in 20 equal bins from 0 to 1), so a resumed run goes on with them.

    Args:
        trainer ([`MethodTrainer`]):
            A trainer whose method keeps success rates (SPO, VADE, Knapsack RL, ...); with any other this does nothing.

    Example:
    ```python
    trainer = VADETrainer(...)
    trainer.add_callback(DifficultyCallback(trainer))
    ```
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "loss" not in (logs or {}):  # a training step, not an evaluation
            return
        for name, column in self.trainer.prompt_table().items():
            if name.endswith("/rate"):
                rates = torch.as_tensor(column)
                counts = torch.histc(rates[~rates.isnan()].float(), BINS, 0, 1)
                state.log_history[-1][f"{name}s"] = counts.int().tolist()

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            draw_difficulty(state.log_history, os.path.join(args.output_dir, "prompt_difficulty.png"))

    on_train_end = on_save


def draw_difficulty(log_history: list[dict], path: str) -> bool:
    """
    Draw the spread of the estimated success rates over training.

    Args:
        log_history (`list[dict]`):
            Of a trainer with a [`DifficultyCallback`].
        path (`str`):
            Where to write the picture.

    Returns:
        `bool`: whether there was anything to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for entry in log_history for name in entry if name.endswith("/rates")))
    if not names:
        return False
    figure = Figure(figsize=(6, 2.8 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
        points = [(entry["step"], entry[name]) for entry in log_history if name in entry]
        counts = torch.tensor([counts for _, counts in points], dtype=torch.float)
        shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
        first, last = points[0][0], points[-1][0]
        picture = axes.imshow(
            shares.T, origin="lower", aspect="auto", extent=(first, max(last, first + 1), 0, 1), cmap="magma_r", vmin=0
        )
        axes.set_ylabel(f"estimated success ({name.removesuffix('/rates')})")
        figure.colorbar(picture, label="share of prompts")
    axes.set_xlabel("optimizer steps")
    figure.savefig(path, dpi=120)
    return True
