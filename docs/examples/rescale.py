"""Rescale the RoPE of a transformers model, so that it answers beyond its pre-trained window.

The bundled reference model has a window of 256 tokens. It is asked for a number that stands at the
start of 1,024 tokens, once with its original RoPE and once with YaRN's factors. Factors that a
search found work the same way: `factors = longrope2_ray.search(recipe).factors`.

python docs/examples/rescale.py
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import longrope2_ray
from longrope2_ray.storage.assets import ASSETS
from longrope2_ray.tasks.books import load_books
from longrope2_ray.tasks.needle import build_needle_set

LENGTH = 1024

model = AutoModelForCausalLM.from_pretrained(ASSETS / "reference")
tokenizer = AutoTokenizer.from_pretrained(ASSETS / "reference")
books = load_books(["bundled:report"], "report.text")
needle = build_needle_set(tokenizer, books, length=LENGTH, num_samples=1, seed=3)[0]
answer_start, answer_end = needle.answer_span
question = torch.from_numpy(needle.input_ids[:answer_start])[None]


def answer() -> str:
    """The model's answer to the question, as many tokens as the right one has."""
    length = answer_end - answer_start
    output = model.generate(question, max_new_tokens=length, do_sample=False)
    return repr(tokenizer.decode(output[0, answer_start:]).strip())


print(f"asked for      {needle.value!r}")
print(f"original RoPE  {answer()}")

geometry = longrope2_ray.RopeGeometry(
    head_dim=64, rotary_dim=64, base=10_000.0, original_length=256
)
factors = longrope2_ray.baseline("yarn", geometry, LENGTH)
longrope2_ray.rescale(model, factors)
print(f"rescaled       {answer()}")
