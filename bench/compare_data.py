"""Copies of a data set for bench/compare, in blocks; runs in the peers' environment (numpy).

  normalise IN.fbin OUT.fbin         every row to length 1: DiskANN has no cosine on disk
  perturb IN.fbin OUT.fbin STEP SEED uniform noise of +-STEP/2 on every value
"""
import os
import sys

import numpy as np

BLOCK = 16384


def rewrite(source, target, change):
    count, dim = (int(v) for v in np.fromfile(source, "<u4", 2))
    rows = np.memmap(source, "<f4", "r", 8, (count, dim))
    part = target + ".part"
    with open(part, "wb") as out:
        np.array([count, dim], "<u4").tofile(out)
        for start in range(0, count, BLOCK):
            change(np.asarray(rows[start:start + BLOCK], np.float64)).astype("<f4").tofile(out)
    os.replace(part, target)


def normalise(source, target):
    def change(block):
        length = np.linalg.norm(block, axis=1, keepdims=True)
        return block / np.where(length > 0, length, 1)
    rewrite(source, target, change)


def perturb(source, target, step, seed):
    rng = np.random.Generator(np.random.PCG64(int(seed)))
    rewrite(source, target, lambda b: b + rng.uniform(-.5, .5, b.shape) * float(step))


if __name__ == "__main__":
    {"normalise": normalise, "perturb": perturb}[sys.argv[1]](*sys.argv[2:])
