/* Code kernels: the inner loops of training, encoding and lookup tables.
 *
 * All work on columns: a matrix of dim x stride numbers, one column a centroid (or an output of the
 * rotation), so that a vector register holds the same dimension of 16 centroids. Column counts and
 * strides are multiples of CODE_LANES; pointers need no alignment. What a query reads is kept as
 * half floats (IEEE binary16, finite), which the loops widen as they go: they are bound by the
 * second cache, and half the bytes take little more than half the time. No allocation; any thread.
 * Versions differ in the last bits (fused multiply-add or not), hence one is chosen per process. */
#ifndef ANND_INDEX_CODE_KERNELS_H
#define ANND_INDEX_CODE_KERNELS_H

#include <stdint.h>

#include "index/distance.h"

#define CODE_LANES 16u

struct code_kernels {
    const char *name;

    /* out[j] = sum over d of (query[d] - columns[d * stride + j])^2, for j < count */
    void (*l2_columns)(const float *query, uint32_t dim, const float *columns, uint64_t stride,
                       uint32_t count, float *out);
    /* out[j] = scale * sum over d of (query[d] - columns[d * stride + j])^2, for j < count */
    void (*l2_halves)(const float *query, uint32_t dim, const uint16_t *columns, uint64_t stride,
                      uint32_t count, float scale, float *out);
    /* out[j] = base + scale * sum over d of query[d] * columns[d * stride + j], for j < count */
    void (*dot_halves)(const float *query, uint32_t dim, const uint16_t *columns, uint64_t stride,
                       uint32_t count, float base, float scale, float *out);
    /* For each of point_count points (point_count x dim, dense): the column with the least
     * half_norms[j] - point . column[j], the first of equals, and that score. */
    void (*nearest)(const float *points, uint32_t point_count, uint32_t dim, const float *columns,
                    uint64_t stride, const float *half_norms, uint32_t column_count, uint32_t *ids,
                    float *scores);
    /* The same from products already made: products is point_count x column_count. Improves on the
     * ids and scores given; ids it writes are column + first_id. */
    void (*nearest_of_products)(const float *products, uint32_t point_count,
                                const float *half_norms, uint32_t column_count, uint32_t first_id,
                                uint32_t *ids, float *scores);
};

/* The version for the instruction set that distance_kernels_best chose, hence for ANND_ISA too. */
const struct code_kernels *code_kernels_best(void);
/* For tests. NULL when this machine lacks the set; ISA_SCALAR is always there. */
const struct code_kernels *code_kernels_for(enum isa isa);

#endif
