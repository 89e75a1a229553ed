/* k-means: seeding, Lloyd steps and nearest-centroid search, shared by the codes and by partitions.
 *
 * Seeds are k-means++ on an even sample of the points (Arthur, Vassilvitskii, "k-means++: The
 * Advantages of Careful Seeding", 2007), plain sampling where that would cost more than the steps.
 * A cluster that ran empty restarts at the point farthest from its centroid. The bytes depend on
 * the points, the parameters and the seed, never on the number of workers. */
#ifndef ANND_INDEX_KMEANS_H
#define ANND_INDEX_KMEANS_H

#include <stddef.h>
#include <stdint.h>

#include "storage/base/error.h"
#include "storage/base/job.h"
#include "storage/base/pool.h"

/* Centroids laid out for searching: one column each, the mean of all taken off so that products of
 * far-off data keep their digits. Immutable; any thread. */
struct centroid_table {
    uint32_t count;
    uint32_t dim;
    uint32_t stride;   /* count rounded up to CODE_LANES; columns past count are zero */
    float *mean;       /* dim */
    float *columns;    /* dim x stride */
    float *half_norms; /* stride: half the squared length of a column, infinity past count */
};

/* Points borrowed: row i at points + i * stride floats. Finite values. */
struct kmeans_params {
    const float *points;
    uint64_t stride; /* >= dim */
    uint64_t count;  /* >= cluster_count, < 2^32 */
    uint32_t dim;
    uint32_t cluster_count;
    uint32_t iterations;
    uint64_t seed;
    uint64_t stream; /* which of the seed's random sequences */
};

/* centroids: cluster_count x dim floats. Advances the job by 1 an iteration. Fewer distinct points
 * than clusters give repeated centroids. ERR_INVALID; ERR_CANCELLED; ERR_NOMEM. */
int kmeans_train(const struct kmeans_params *params, struct pool *pool, struct job *job,
                 float *centroids, struct error *err);

/* A table from count x dim centroids; ends with centroid_table_release, which accepts a zeroed one.
 * ERR_NOMEM, and the table is then zeroed. */
int centroid_table_init(struct centroid_table *table, const float *centroids, uint32_t count,
                        uint32_t dim, struct error *err);
void centroid_table_release(struct centroid_table *table);
/* Recomputes half_norms from columns, for tables filled from a file. */
void centroid_table_norms(struct centroid_table *table);

/* Points centroid_nearest takes at once, and the scratch floats it needs for them. */
#define CENTROID_BLOCK 128u
size_t centroid_scratch_floats(const struct centroid_table *table);
/* Nearest centroid, the first of equals, of point_count <= CENTROID_BLOCK points, `stride` floats
 * apart; distances (squared) may be NULL. GEMM where the dimension makes it worth while. */
void centroid_nearest(const struct centroid_table *table, const float *points, uint64_t stride,
                      uint32_t point_count, float *scratch, uint32_t *ids, float *distances);

#endif
