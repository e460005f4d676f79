"""A Hugging Face export read in an environment without this project: 100 prompts, same output.

    python benchmarks/export_clean.py runs/books ../shared/corpora/tinyshakespeare.txt

Exports the run, creates a virtual environment with only transformers and torch, and loads model
and tokenizer there through `AutoModelForCausalLM` and `AutoTokenizer`. Token ids, last logits and
greedy text must match this package's.
"""

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

PROMPTS, PROMPT_LETTERS, NEW_TOKENS = 100, 100, 12

READER = """
import importlib.util, json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert importlib.util.find_spec("sota_transformer") is None
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = greedy = worst = 0
cases = json.load(open(sys.argv[2]))
for case in cases:
    encoded = tokenizer(case["prompt"], return_tensors="pt")
    with torch.inference_mode():
        logits = model(**encoded).logits[0, -1]
        text = model.generate(**encoded, max_new_tokens=len(case["greedy"]), do_sample=False)
    ids += encoded["input_ids"][0].tolist() == case["ids"]
    greedy += text[0, len(case["ids"]):].tolist() == case["greedy"]
    worst = max(worst, float((logits - torch.tensor(case["logits"])).abs().max()))
print(json.dumps({"prompts": len(cases), "ids": ids, "greedy": greedy, "logit_difference": worst}))
"""


def cases(run: Path, text: str) -> list[dict[str, object]]:
    """Prompts from all over the text, with our ids, last logits and greedy continuation."""
    import torch

    from sota_transformer.commands.common import open_to_generate
    from sota_transformer.data.tokenizer import Tokenizer
    from sota_transformer.inference.generate import generate, make_sampler

    tokenizer, model = Tokenizer(), open_to_generate(run, "cpu", None, "float32").model.eval()
    found: list[dict[str, object]] = []
    for start in range(0, len(text) - PROMPT_LETTERS, len(text) // PROMPTS)[:PROMPTS]:
        prompt = text[start : start + PROMPT_LETTERS]
        ids = [int(token) for token in tokenizer.encode(prompt)]
        with torch.inference_mode():
            logits = model.logits(model(torch.tensor([ids])))[0, -1]
            greedy = list(generate(model, ids, make_sampler(temperature=0.0), NEW_TOKENS))
        found.append({"prompt": prompt, "ids": ids, "logits": logits.tolist(), "greedy": greedy})
    return found


def main(run: Path, text: Path) -> None:
    """Export, write the cases, and check them in the other environment."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export = [sys.executable, "-m", "sota_transformer", "export", str(run), "--format", "hf"]
        subprocess.run([*export, "--out", str(folder / "hf")], check=True)
        (folder / "cases.json").write_text(json.dumps(cases(run, text.read_text())))
        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv" / "bin" / "python"
        packages = ["torch>=2.11,<2.14", "transformers>=5,<6"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        reader = [python, "-c", READER, folder / "hf", folder / "cases.json"]
        subprocess.run(reader, check=True, cwd=folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
