/* leaf_graph: a Vamana graph made leaf by leaf instead of by insertion.
 *
 * Every row is compared with all rows of the leaves whose centroids are nearest to it, block
 * against block (block_products.h), and keeps a bounded pool of the nearest. What follows is
 * Vamana's own: a robust prune of the pool at alpha 1, then at the given alpha; reverse edges;
 * a prune of both together, filled up to max_degree. So the result is a Vamana graph in the sense
 * of Subramanya et al. (vamana.h), only that its candidates come from matrix products over leaves
 * and not from searches, as in "PiPNN" (arXiv 2602.21247) and "HCNNG" before it; leaves overlap by
 * the rows that look into them. A few rows from groups farther and farther away join each pool, so
 * that there are long edges too.
 *
 * Nothing is held that grows with the rows but what leaf_graph_memory_bytes() counts; the rest goes
 * through the scratch folder in sequence: `lists` (nearest neighbours, a by-product), `draft`,
 * `edges` (edge_runs.h) and `graph`. The graph is a function of rows, parameters and seed: not of
 * memory, of the number of threads, or of where a run was interrupted. */
#ifndef ANND_INDEX_LEAF_GRAPH_H
#define ANND_INDEX_LEAF_GRAPH_H

#include "index/partition.h"
#include "index/row_store.h"
#include "storage/base/job.h"
#include "storage/journal.h"

#define LEAF_GRAPH_LIST_PLACES 24u /* nearest neighbours kept of each row */

struct leaf_graph_params {
    uint32_t max_degree; /* R, 4..256 */
    float alpha;
    uint64_t seed;
    uint32_t probes; /* leaves a row is compared with; 0: 64 */
    uint32_t pool;   /* candidates a row keeps; 0: 2 * max_degree within 96..192 */
};

/* Makes scratch files "lists" and "graph" (graph_store.h) for the rows of the store, in whose
 * order (places) everything is counted. Commits at least once a minute (state "graph.*") and goes
 * on where the state says. ERR_BUDGET: memory_bytes (0: no limit) are fewer than
 * leaf_graph_memory_bytes() for the pool's workers. ERR_CANCELLED, ERR_NO_SPACE, ERR_IO,
 * ERR_CORRUPT, ERR_NOMEM. */
int leaf_graph_make(struct vfs *vfs, const struct row_store *store,
                    const struct leaf_graph_params *params, uint64_t memory_bytes,
                    struct journal *journal, struct pool *pool, struct job *job, struct error *err);

/* Heap taken with so many workers, the held rows (row_store_hold) not counted where rows are held;
 * and scratch bytes. */
uint64_t leaf_graph_memory_bytes(const struct row_shape *shape, uint64_t count,
                                 const struct leaf_graph_params *params, uint32_t workers,
                                 bool held);
uint64_t leaf_graph_scratch_bytes(uint64_t count, const struct leaf_graph_params *params);

#endif
