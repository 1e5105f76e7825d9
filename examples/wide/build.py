"""Builds the wide example: the tiny one's task, tokenizer and recipe at width 512, for codecs whose ranks need room.

    make wide-model                          # or: python -m examples.wide.build --to runs/wide

It is too large to be shipped: three layers, one for each of three stages. Everything is as in examples/tiny/build.py,
but for the sizes below: the initial weights are narrower by the root of the width's ratio, the learning rate by the ratio itself.
"""

from __future__ import annotations

from pathlib import Path

from examples.tiny.build import Recipe, Shape, main

OUT = Path(__file__).resolve().parents[2] / "runs" / "wide"
SHAPE = Shape(hidden=512, intermediate=1024, layers=3, heads=8, kv_heads=4, initializer_range=0.04)
RECIPE = Recipe(clean_steps=600, noisy_steps=500, peak_lr=6e-4, final_lr=4e-5, wrong_share=0.33)

if __name__ == "__main__":
    main("Build the wide example model and its data.", OUT, SHAPE, RECIPE)
