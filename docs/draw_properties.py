"""
Writes `docs/properties.md` from `docs/properties.json`, which the tests fill:

```bash
python -m pytest -m "slow or not slow" --properties docs/properties.json && python docs/draw_properties.py
```
"""

import json
from pathlib import Path


HERE = Path(__file__).parent
# In this order; what each means.
PROPERTIES = {
    "neutral settings are TRL's GRPO": "with settings under which the method does nothing, parameters equal plain "
    "TRL's after several steps (bit for bit, or 1e-6 where the same sum is taken in another order)",
    "unscored rewards": "rewards that are None get no advantage and influence nobody",
    "hostile rewards": "rewards of any size (1e30) leave finite parameters, or are an error that says what to do",
    "any split of the batch": "parameters do not depend on how a generation is cut into micro-batches (1e-6)",
    "stop and resume inside a generation": "parameters and state of a stopped and resumed run are those of one that "
    "was not stopped, bit for bit",
    "two processes": "prompts, advantages, logs, state and parameters are those of one process (1e-6)",
    "four processes": "the same with four",
    "LoRA": "adapters train, on plain and conversational prompts",
    "QLoRA (nf4)": "adapters train on 4-bit weights",
    "bf16": "trains in bfloat16 mixed precision",
    "gradient checkpointing": "gives the same parameters (1e-6)",
    "KL term, also with LoRA": "`beta` above 0, with full weights and with adapters",
    "tokens of tools": "tokens that a tool wrote are no part of the loss or of the statistics",
    "images": "a vision-language model trains on images",
    "vLLM": "trains with the real vLLM engine in colocate mode, on a CPU",
}


def page(cells: dict[str, dict[str, str]]) -> str:
    """The page from the cells, property -> method -> 'passed' or the reason of a refusal."""
    titles = [title for title in PROPERTIES if title in cells]
    methods = sorted({method for title in titles for method in cells[title]})
    notes: list[str] = []

    def cell(title: str, method: str) -> str:
        text = cells[title].get(method, "")
        if text == "passed":
            return "yes"
        if text not in notes:
            notes.append(text)
        return f"[{notes.index(text) + 1}]"

    lines = ["# What holds for which method", ""]
    lines += [
        "Filled by the tests (`docs/draw_properties.py` says how). A number points to the reason why a cell is",
        "",
    ]
    lines[-2] += " not a plain yes."
    lines += [f"- **{title}**: {PROPERTIES[title]}." for title in titles] + [""]
    lines += ["| method | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    lines += [f"| `{method}` | " + " | ".join(cell(title, method) for title in titles) + " |" for method in methods]
    lines += ["", *(f"{i}. {note}" for i, note in enumerate(notes, 1)), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    content = page(json.loads((HERE / "properties.json").read_text()))
    (HERE / "properties.md").write_text(content, encoding="utf-8")
