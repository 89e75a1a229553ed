#!/usr/bin/env python3
"""Moves a set off the grid of its values: seeded uniform noise of half a step each way.

usage: bench/make_perturbed.py BASE.fbin OUT.fbin [--step 0.001953125] [--seed 1]

emb-200k holds integers over 512, which 8-bit storage may keep better than it would a user's floats;
with noise of +-0.5/512 on every element it has no such help. Queries stay as they are. The copy has
other neighbours, so make its truth anew (bench/compare does both, for P3a-perturbed and
P3b-perturbed):

    annd truth OUT.fbin --queries QUERIES.fbin --metric cosine -k 100 --output TRUTH.bin

Same input and options: same numbers. Prints the largest change and the share of values that still
lie on the grid. Needs numpy; works in blocks, so a set larger than memory will do.
"""
import argparse

import numpy as np
from compare_data import rewrite


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("base")
    p.add_argument("output")
    p.add_argument("--step", type=float, default=1 / 512)
    p.add_argument("--seed", type=int, default=1)
    a = p.parse_args()
    rng = np.random.Generator(np.random.PCG64(a.seed))
    largest, on_grid, values = 0, 0, 0

    def change(block):
        nonlocal largest, on_grid, values
        moved = (block + rng.uniform(-.5, .5, block.shape) * a.step).astype(np.float32)
        largest = max(largest, float(np.abs(moved - block).max()))
        on_grid += int((np.fmod(moved, np.float32(a.step)) == 0).sum())
        values += moved.size
        return moved

    rewrite(a.base, a.output, change)
    print(f"{a.output}: moved by at most {largest:.6f}, {on_grid} of {values} values on the grid")


if __name__ == "__main__":
    main()
