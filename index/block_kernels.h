/* Block kernels: the loops of block_products.h that have a version per instruction set.
 *
 * Every version gives the same integers, and the same pools up to the order of places. No
 * allocation, no state: any thread. */
#ifndef ANND_INDEX_BLOCK_KERNELS_H
#define ANND_INDEX_BLOCK_KERNELS_H

#include <stdbool.h>
#include <stdint.h>

#include "index/block_products.h"

#define BLOCK_PANEL_ROWS 64u /* rows of b that are multiplied together */

/* Rows of integers against a panel of others. Everything wraps modulo 2^32; a distance itself fits
 * up to DISTANCE_DIM_MAX. */
struct block_panel {
    const uint8_t *const *rows_a; /* count_a pointers, aligned to 64 */
    const uint32_t *bases;        /* count_a: what prepare() made of the squared norms */
    uint32_t count_a;
    const uint8_t *b; /* count_b rows one after the other */
    const uint32_t *norms_b;
    uint32_t count_b; /* 1..BLOCK_PANEL_ROWS */
    uint64_t stride;  /* bytes, a multiple of 64, zeros from dim on */
    uint32_t dim;
    bool is_signed;
    float *out; /* count_a x count_b */
    uint64_t out_stride;
};

struct block_kernels {
    const char *name;

    /* Moves the norms of rows by what the panel function needs to know of the rows; NULL: by
     * nothing. */
    void (*prepare)(const uint8_t *const *rows, uint32_t count, uint64_t stride, bool is_signed,
                    uint32_t *norms);
    void (*panel)(const struct block_panel *panel);
    /* out[j] = norm_a + norms_b[j] + out[j], at least 0 */
    void (*add_norms)(float *out, uint32_t count, float norm_a, const float *norms_b);
    /* block_pool_offer() without `skip` */
    void (*pool_offer)(struct block_pool *pool, const float *distances, uint32_t count,
                       uint32_t first_id);
    /* Closes the gaps left by all beyond the bound. */
    void (*pool_keep)(struct block_pool *pool, float bound);
    /* The least and the greatest distance; count > 0. */
    void (*pool_range)(const struct block_pool *pool, float *least, float *greatest);
    /* ranks[i]: how many places come before place i by distance, then by place. count at most
     * BLOCK_POOL_RANKED. NULL: there is nothing faster than sorting. */
    void (*pool_rank)(const struct block_pool *pool, uint32_t *ranks);
};

/* Makes room: leaves at least the `limit` nearest and at most `slack` more, lowers `worst` to what
 * may still matter. count > limit. For the kernels. */
void block_pool_shrink(struct block_pool *pool, uint32_t slack);

/* What a shrink in between leaves more than `limit`: finding a bound between two of many distances
 * takes a few steps, finding the very one takes many. */
static inline uint32_t block_pool_slack(const struct block_pool *pool)
{
    return pool->limit / 8;
}

#define BLOCK_POOL_RANKED 256u /* ranking takes the square of it */

/* For pools of less than BLOCK_POOL_SMALL, and for instruction sets without a version. */
#define BLOCK_POOL_SMALL 32u
void block_pool_offer_portable(struct block_pool *pool, const float *distances, uint32_t count,
                               uint32_t first_id);

#if defined(__x86_64__)
void block_add_norms_avx512(float *out, uint32_t count, float norm_a, const float *norms_b);
void block_pool_offer_avx512(struct block_pool *pool, const float *distances, uint32_t count,
                             uint32_t first_id);
void block_pool_keep_avx512(struct block_pool *pool, float bound);
void block_pool_range_avx512(const struct block_pool *pool, float *least, float *greatest);
void block_pool_rank_avx512(const struct block_pool *pool, uint32_t *ranks);
void block_prepare_vnni(const uint8_t *const *rows, uint32_t count, uint64_t stride, bool is_signed,
                        uint32_t *norms);
void block_panel_vnni(const struct block_panel *panel);
void block_panel_avx2(const struct block_panel *panel);
#endif

#endif
