#!/usr/bin/env python3
"""Makes a wide set from a narrow one: vectors times one fixed Gaussian matrix, plus noise.

usage: bench/make_wide.py BASE.fbin QUERIES.fbin OUT_BASE.fbin OUT_QUERIES.fbin
           [--dim 2048] [--noise 0.05] [--seed 1]

Base and queries go through the same matrix (its numbers are N(0, 1 / input dimension), so lengths
stay about the same times sqrt(dim / input dimension)). The noise is Gaussian in all dimensions and
its expected length is `noise` times that of the vector it is added to. Same input and options: same
numbers. Needs numpy; works in blocks, so a set larger than memory will do.
"""
import argparse
import os

import numpy as np

BLOCK = 4096


def shape_of(path):
    count, dim = (int(v) for v in np.fromfile(path, "<u4", 2))
    wanted = 8 + 4 * count * dim
    if os.path.getsize(path) != wanted:
        raise SystemExit(f"{path}: {os.path.getsize(path)} bytes, wanted {wanted} for "
                         f"{count} x {dim} floats")
    return count, dim


def widen(source, target, matrix, noise, rng):
    count, dim = shape_of(source)
    wide = matrix.shape[1]
    rows = np.memmap(source, "<f4", "r", 8, (count, dim))
    part = target + ".part"
    with open(part, "wb") as out:
        np.array([count, wide], "<u4").tofile(out)
        for start in range(0, count, BLOCK):
            # In doubles, so that the order in which a BLAS adds does not reach the floats.
            block = np.asarray(rows[start:start + BLOCK], np.float64) @ matrix
            length = np.linalg.norm(block, axis=1, keepdims=True)
            block += rng.standard_normal(block.shape) * (noise / np.sqrt(wide)) * length
            block.astype("<f4").tofile(out)
    os.replace(part, target)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("base")
    p.add_argument("queries")
    p.add_argument("out_base")
    p.add_argument("out_queries")
    p.add_argument("--dim", type=int, default=2048)
    p.add_argument("--noise", type=float, default=.05)
    p.add_argument("--seed", type=int, default=1)
    a = p.parse_args()
    dim = shape_of(a.base)[1]
    if shape_of(a.queries)[1] != dim:
        raise SystemExit(f"{a.queries}: dimension {shape_of(a.queries)[1]}, wanted {dim}")
    # Three streams of one seed: the number of base rows does not move the queries' noise.
    matrix = np.random.Generator(np.random.PCG64([a.seed, 0])).standard_normal((dim, a.dim))
    matrix /= np.sqrt(dim)
    for stream, source, target in ((1, a.base, a.out_base), (2, a.queries, a.out_queries)):
        widen(source, target, matrix, a.noise,
              np.random.Generator(np.random.PCG64([a.seed, stream])))


if __name__ == "__main__":
    main()
