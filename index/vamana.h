/* Vamana: builds the graph that disk search walks.
 *
 * Subramanya et al., "DiskANN: Fast Accurate Billion-point Nearest Neighbor Search on a Single
 * Node", NeurIPS 2019; parallel and deterministic as in Manohar et al., "ParlayANN", 2024: points
 * are inserted in batches that grow to a bound, each batch searches the graph as it stood before
 * the batch, reverse edges are gathered, sorted and applied per target. The result depends on the
 * input, the parameters and the seed, never on the number of threads. */
#ifndef ANND_INDEX_VAMANA_H
#define ANND_INDEX_VAMANA_H

#include <stdint.h>

#include "index/element.h"
#include "storage/base/error.h"
#include "storage/base/job.h"
#include "storage/base/pool.h"

/* Vectors in memory, borrowed. Distances of the build are squared L2 for ELEMENT_F32/F16/U8/I8;
 * callers prepare the space (cosine: normalised; inner product: augmented by one dimension)
 * beforehand. Rows are read at random: huge pages under them (madvise before filling) and rows that
 * already stand in space order both make a build faster. */
struct vector_matrix {
    const uint8_t *data; /* row-major, row_bytes apart */
    uint64_t row_bytes;
    uint32_t count;
    uint32_t dim;
    enum element_type type;
};

/* Out-edges, fixed stride. Neighbours are in prune order: those kept at alpha 1 first, so cutting a
 * list short prunes harder. */
struct graph {
    uint32_t count;
    uint32_t max_degree;
    uint32_t entry_point; /* the medoid: the row nearest to the mean */
    uint32_t *degrees;    /* count */
    uint32_t *neighbours; /* count x max_degree */
};

struct vamana_params {
    uint32_t max_degree; /* R, 4..256 */
    uint32_t build_list; /* L, >= max_degree / 2 */
    float alpha;         /* 1.2 by default */
    uint64_t seed;
};

/* *out owned by the caller, ends with graph_free. Every node is reachable from the entry point.
 * ERR_INVALID, ERR_CANCELLED, ERR_NOMEM. */
int vamana_build(const struct vector_matrix *vectors, const struct vamana_params *params,
                 struct pool *pool, struct job *job, struct graph **out, struct error *err);
void graph_free(struct graph *graph);

/* Peak heap bytes vamana_build and its result take besides the vectors, for the plan. Left out is
 * scratch of the first phases, under a KiB a dimension and worker: the graph is not there yet. */
uint64_t vamana_memory_bytes(uint64_t count, const struct vamana_params *params, uint32_t workers);

/* Links nodes that the entry point does not reach to their nearest reached node; *linked says how
 * many were. A link takes the place of a full node's last edge that nothing hangs on. Part of
 * vamana_build; public for graphs from elsewhere. ERR_INVALID, ERR_NOMEM. */
int graph_connect(const struct vector_matrix *vectors, struct graph *graph, uint64_t *linked,
                  struct error *err);

#endif
