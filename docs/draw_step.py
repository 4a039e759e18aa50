"""Draws docs/step.svg, the picture of the hooks in the README."""

from pathlib import Path


BOXES = {
    "prompts": (
        ["choose_prompts", "prompt_weights", "prompt_budgets", "edit_examples"],
        ["SPO, VADE, VAS", "Knapsack RL, GVM", "PUCT", "ReST-GRPO"],
    ),
    "rollouts": (["more_rollouts", "pick_rollouts"], ["dynamic sampling", "Scaf-GRPO"]),
    "rewards": (["shape_rewards"], ["GRPO-λ", "GDPO"]),
    "advantages": (
        ["compute_advantages"],
        ["BNPO, DCPO, NGRPO", "RiskPO, SPO, EMPG", "Stratified GRPO", "TTT-Discover"],
    ),
    "selection": (["select_rollouts", "token_mask"], ["D3S", "NGRPO"]),
    "loss": (
        ["kl_weight", "log_ratio", "clip_range", "policy_loss", "token_weights", "aggregate_loss"],
        ["Clip-Cov, KL-Cov", "GPPO, BAPO, DisCO", "GTPO, TW-GRPO", "CAPO, GRPO-D"],
    ),
    "extra terms": (["regularizers"], ["LLDS", "KDRL", "EPO"]),
}
TITLE = "One GRPO step. TRL generates, scores and optimises as before; a method overrides the joint its paper changes."
GENERATION = "once per generation, on Rollouts that are equal on every process (observe updates a method's state)"
MICRO_BATCH = "every micro-batch, on a TokenBatch"


def text(x, y, content, **style):
    attributes = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
    return f'<text x="{x}" y="{y}"{attributes}>{content}</text>'


def main():
    parts = [text(10, 20, TITLE, font_size=14, fill="#1d3c5c")]
    for i, (title, (hooks, methods)) in enumerate(BOXES.items()):
        left = 10 + 164 * i
        middle = {"text_anchor": "middle"}
        parts.append(
            f'<rect x="{left}" y="34" width="150" height="150" rx="8" fill="#f4f7fb" stroke="#3b6ea5" '
            'stroke-width="1.5"/>'
        )
        parts.append(text(left + 75, 56, title, font_weight="bold", font_size=15, fill="#1d3c5c", **middle))
        for j, hook in enumerate(hooks):
            parts.append(
                text(left + 75, 80 + 18 * j, hook, font_family="monospace", font_size=12.5, fill="#222", **middle)
            )
        for j, method in enumerate(methods):
            parts.append(text(left + 75, 204 + 16 * j, method, font_size=12.5, fill="#7a4b00", **middle))
        if i:
            parts.append(
                f'<path d="M{left - 13} 109 h9 l-4 -4 m4 4 l-4 4" stroke="#3b6ea5" fill="none" stroke-width="1.5"/>'
            )
    for left, right, label in ((10, 816, GENERATION), (830, 1144, MICRO_BATCH)):
        parts.append(f'<path d="M{left} 264 v8 H{right} v-8" stroke="#888" fill="none"/>')
        parts.append(text((left + right) / 2, 289, label, text_anchor="middle", font_size=12.5, fill="#444"))
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1154 300" width="1154" height="300" '
    head += 'font-family="Helvetica, Arial, sans-serif"><rect width="100%" height="100%" fill="white"/>'
    Path(__file__).with_name("step.svg").write_text(head + "".join(parts) + "</svg>\n", encoding="utf-8")


if __name__ == "__main__":
    main()
