/* block_products: all pairs of two blocks of vectors, and the nearest of them: what a graph build
 * spends most of its time on.
 *
 * Integers are multiplied exactly in 32 bits by kernels of their own (AVX-512 VNNI, AVX2,
 * portable C); floats go through gemm.h. A distance is |a|^2 + |b|^2 - 2ab; for integers it is
 * exact up to its conversion to float. Same numbers for a type on one machine, whatever the number
 * of threads. Any thread; a pool is used by one at a time. */
#ifndef ANND_INDEX_BLOCK_PRODUCTS_H
#define ANND_INDEX_BLOCK_PRODUCTS_H

#include <stdint.h>

#include "index/element.h"

/* Bytes between rows of a block of `dim` elements of `type` (f32, u8, i8): rounded up to 64. Rows
 * are padded with zeros up to it and blocks aligned to 64 bytes. */
uint64_t block_row_stride(enum element_type type, uint32_t dim);

/* Squared norms as floats: out[count]. */
void block_norms(enum element_type type, const uint8_t *rows, uint32_t count, uint32_t dim,
                 float *out);

/* Squared L2 of every a (count_a rows) to every b: out[i * out_stride + j]; never below 0. Norms as
 * block_norms() gives them. out_stride >= count_b, in floats. `pick` lists which rows of the block
 * `a` are meant (count_a of them), NULL: the first count_a; the kernels gather them themselves.
 * norms_a is indexed as the block is: row pick[i] has norms_a[pick[i]]. dim: 1 to
 * DISTANCE_DIM_MAX. Takes up to 600 KiB of stack. */
void block_distances(enum element_type type, const uint8_t *a, const uint32_t *pick,
                     uint32_t count_a, const float *norms_a, const uint8_t *b, uint32_t count_b,
                     const float *norms_b, uint32_t dim, float *out, uint64_t out_stride);

/* A pool of the `limit` nearest of many candidates, gathered in any order: two columns of
 * 2 * limit places. It is a function of the set of what was offered: ties in distance fall to the
 * smaller id. Distances may be negative; one that is not a number is passed over. */
#define BLOCK_POOL_LIMIT_MAX 1024u
struct block_pool {
    float *distances; /* 2 * limit */
    uint32_t *ids;    /* 2 * limit */
    uint32_t count;
    uint32_t limit;
    float worst; /* offers beyond it are passed over; INFINITY until `limit` were taken */
};

void block_pool_init(struct block_pool *pool, float *distances, uint32_t *ids, uint32_t limit);
/* Offers first_id + j at distances[j] for j < count, but for first_id + j == skip (UINT32_MAX:
 * none). No id may be offered twice. */
void block_pool_offer(struct block_pool *pool, const float *distances, uint32_t count,
                      uint32_t first_id, uint32_t skip);
/* Leaves the `limit` nearest, ascending by distance, then id. Returns how many. */
uint32_t block_pool_finish(struct block_pool *pool);

/* The instruction set in use, for logs: "avx512vnni", "avx512", "avx2", "scalar". ANND_ISA chooses
 * a lesser one, as for distance.h. */
const char *block_products_isa(void);

#endif
