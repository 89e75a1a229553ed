/* flat: exact search by scanning everything: ground truth, small sets, the yardstick of recall. */
#ifndef ANND_INDEX_FLAT_H
#define ANND_INDEX_FLAT_H

#include "index/element.h"
#include "index/truth_file.h"
#include "index/vector_source.h"
#include "storage/base/job.h"
#include "storage/base/pool.h"

/* The k nearest rows of `base` for each of query_count queries (query_count x dim floats). The base
 * is streamed in blocks; memory is query_count x ((k + 64) x 8 bytes + a vector), a block of 8 MiB
 * and 256 KiB a worker. Rows are found by float products, where those are too coarse by kernels in
 * a second pass, and ranked by distances in double, ties by lower row. Distances: squared L2
 * ascending, 1 - cosine ascending, inner product descending. A zero vector's cosine is 0.
 * ERR_INVALID: k above the row count, NaN in the base. *out ends with truth_release(). */
int flat_truth(const struct vector_source *base, const float *queries, uint32_t query_count,
               uint32_t k, enum metric metric, struct pool *pool, struct job *job,
               struct truth *out, struct error *err);

#endif
