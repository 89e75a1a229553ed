/* neighbour_lists: approximate nearest neighbours of every row, a by-product of the graph.
 *
 * A row's neighbours in the graph and the neighbours of the nearest of them hold nearly all of its
 * nearest rows. Page order, hot rows and calibration are made of these lists: every row acts as a
 * query. Deterministic whatever the pool. */
#ifndef ANND_INDEX_NEIGHBOUR_LISTS_H
#define ANND_INDEX_NEIGHBOUR_LISTS_H

#include <stdint.h>

#include "index/vamana.h"
#include "storage/base/error.h"
#include "storage/base/job.h"
#include "storage/base/pool.h"

#define NEIGHBOUR_NONE UINT32_MAX

struct neighbour_lists {
    uint32_t count;
    uint32_t k;
    uint32_t
        *rows; /* count x k, nearest first, ties by row; NEIGHBOUR_NONE where there are fewer */
};

/* out->rows is owned by the caller, ends with neighbour_lists_release. ERR_INVALID for k 0 or a
 * graph of other rows, ERR_CANCELLED, ERR_NOMEM. */
int neighbour_lists_make(const struct vector_matrix *vectors, const struct graph *graph, uint32_t k,
                         struct pool *pool, struct job *job, struct neighbour_lists *out,
                         struct error *err);
void neighbour_lists_release(struct neighbour_lists *lists);
/* In how many of the first `k` places of other rows' lists each row stands: degrees[count]. */
void neighbour_lists_in_degrees(const struct neighbour_lists *lists, uint32_t k, uint32_t *degrees);
uint64_t neighbour_lists_memory_bytes(uint64_t count, uint32_t k);

#endif
