/* vamana_prune: which of many candidates become a node's neighbours (the paper's algorithm 2).
 *
 * A candidate c of node p is occluded by a kept neighbour s when alpha * d(s, c) < d(p, c): a walk
 * gets there by s. As in DiskANN's code, distances are the squared ones, and a first pass at alpha
 * 1 is followed by one at the given alpha, so the kept list starts with the sparsest graph. */
#ifndef ANND_INDEX_VAMANA_PRUNE_H
#define ANND_INDEX_VAMANA_PRUNE_H

#include <stdbool.h>
#include <stdint.h>

#include "index/candidates.h"
#include "index/vamana_search.h"

/* One thread's scratch. */
struct prune_scratch {
    struct candidate *pool; /* the caller fills it with distances to the node, any order */
    uint32_t pool_limit;
    uint32_t *kept_seen;       /* per candidate: kept neighbours there were when pass one met it */
    uint32_t *kept_checked;    /* per candidate: how many of these are known not to occlude it */
    const uint8_t **kept_rows; /* pass one's, then pass two's */
};

/* For pools up to pool_limit and degrees up to max_degree. ERR_NOMEM. */
int prune_scratch_init(struct prune_scratch *scratch, uint32_t pool_limit, uint32_t max_degree,
                       struct error *err);
void prune_scratch_release(struct prune_scratch *scratch);
/* Bytes prune_scratch_init() takes. */
uint64_t prune_scratch_memory_bytes(uint32_t pool_limit, uint32_t max_degree);

struct prune_params {
    uint32_t max_degree;
    float alpha;   /* >= 1 */
    bool saturate; /* fill up to max_degree with the nearest of the occluded */
};

/* Picks from scratch->pool[0..pool_count), which must not hold the node itself nor an id twice;
 * sorts the pool. Writes at most max_degree ids to `kept`, in the order of keeping, and returns
 * how many. */
uint32_t vamana_prune_run(const struct row_space *space, const struct prune_params *params,
                          struct prune_scratch *scratch, uint32_t pool_count, uint32_t *kept);

#endif
