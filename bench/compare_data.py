"""A copy of a data set with every row at length 1 (DiskANN has no cosine on disk), in blocks.

  compare_data.py IN.fbin OUT.fbin     runs in the peers' environment (numpy)
"""
import os
import sys

import numpy as np

BLOCK = 16384


def rewrite(source, target, change):
    """OUT.fbin from IN.fbin: `change` is given blocks of rows as doubles and returns the same."""
    count, dim = (int(v) for v in np.fromfile(source, "<u4", 2))
    wanted = 8 + 4 * count * dim
    if os.path.getsize(source) != wanted:
        raise SystemExit(f"{source}: {os.path.getsize(source)} bytes, wanted {wanted} for "
                         f"{count} x {dim} floats")
    rows = np.memmap(source, "<f4", "r", 8, (count, dim))
    part = target + ".part"
    with open(part, "wb") as out:
        np.array([count, dim], "<u4").tofile(out)
        for start in range(0, count, BLOCK):
            change(np.asarray(rows[start:start + BLOCK], np.float64)).astype("<f4").tofile(out)
    os.replace(part, target)


def unit(block):
    length = np.linalg.norm(block, axis=1, keepdims=True)
    return block / np.where(length > 0, length, 1)


if __name__ == "__main__":
    rewrite(sys.argv[1], sys.argv[2], unit)
