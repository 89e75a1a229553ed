/* What needs AVX-512 F alone: the last step of float distances, and pools. Offers are compared 64
 * at a time; once a pool is full most of them end there. Those that stay are compressed in a
 * register and stored whole, which is why places are kept free behind the last one. */
#include "index/block_kernels.h"

#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))
#define LANES 16u

INLINE __mmask16 lanes_left(uint32_t left)
{
    return left < LANES ? (__mmask16)((1u << left) - 1) : (__mmask16)0xffff;
}

void block_add_norms_avx512(float *out, uint32_t count, float norm_a, const float *norms_b)
{
    const __m512 norm = _mm512_set1_ps(norm_a), zero = _mm512_setzero_ps();

    for (uint32_t i = 0; i < count; i += LANES) {
        __mmask16 lanes = lanes_left(count - i);
        __m512 norms = _mm512_add_ps(norm, _mm512_maskz_loadu_ps(lanes, norms_b + i));
        __m512 sum = _mm512_add_ps(norms, _mm512_maskz_loadu_ps(lanes, out + i));

        _mm512_mask_storeu_ps(out + i, lanes, _mm512_max_ps(sum, zero));
    }
}

/* The lanes of sixteen offers that stay; needs LANES free places. */
INLINE void take(struct block_pool *pool, __m512 distances, uint32_t first_id, __mmask16 lanes)
{
    const __m512i steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i ids = _mm512_add_epi32(_mm512_set1_epi32((int)first_id), steps);

    _mm512_storeu_ps(pool->distances + pool->count, _mm512_maskz_compress_ps(lanes, distances));
    _mm512_storeu_si512(pool->ids + pool->count, _mm512_maskz_compress_epi32(lanes, ids));
    pool->count += (uint32_t)__builtin_popcount(lanes);
}

/* Up to sixteen, `within` naming those there are. */
INLINE void offer16(struct block_pool *pool, __m512 distances, uint32_t first_id, __mmask16 within)
{
    __mmask16 lanes =
        _mm512_mask_cmp_ps_mask(within, distances, _mm512_set1_ps(pool->worst), _CMP_LE_OQ);

    if (!lanes)
        return;
    if (pool->count > 2 * pool->limit - LANES) {
        block_pool_shrink(pool, block_pool_slack(pool));
        lanes = _mm512_mask_cmp_ps_mask(lanes, distances, _mm512_set1_ps(pool->worst), _CMP_LE_OQ);
    }
    take(pool, distances, first_id, lanes);
}

void block_pool_offer_avx512(struct block_pool *pool, const float *distances, uint32_t count,
                             uint32_t first_id)
{
    uint32_t i = 0;

    if (pool->limit < BLOCK_POOL_SMALL) {
        block_pool_offer_portable(pool, distances, count, first_id);
        return;
    }
    for (; count - i >= 4 * LANES; i += 4 * LANES) {
        __m512 worst = _mm512_set1_ps(pool->worst);
        __m512 d[4];
        uint32_t near[4];

#pragma GCC unroll 4
        for (uint32_t r = 0; r < 4; r++) {
            d[r] = _mm512_loadu_ps(distances + i + r * LANES);
            near[r] = _mm512_cmp_ps_mask(d[r], worst, _CMP_LE_OQ);
        }
        if (!(near[0] | near[1] | near[2] | near[3]))
            continue;
        /* With room for all, four stores that may be empty cost less than a wrong guess. */
        if (pool->count + 4 * LANES <= 2 * pool->limit) {
#pragma GCC unroll 4
            for (uint32_t r = 0; r < 4; r++)
                take(pool, d[r], first_id + i + r * LANES, (__mmask16)near[r]);
            continue;
        }
#pragma GCC unroll 4
        for (uint32_t r = 0; r < 4; r++)
            offer16(pool, d[r], first_id + i + r * LANES, (__mmask16)near[r]);
    }
    for (; i < count; i += LANES) {
        __mmask16 lanes = lanes_left(count - i);

        offer16(pool, _mm512_maskz_loadu_ps(lanes, distances + i), first_id + i, lanes);
    }
}

void block_pool_keep_avx512(struct block_pool *pool, float bound)
{
    const __m512 bounds = _mm512_set1_ps(bound);
    uint32_t count = pool->count, kept = 0;

    /* In place: never written beyond what was read. */
    for (uint32_t i = 0; i < count; i += LANES) {
        __mmask16 lanes = lanes_left(count - i);
        __m512 distances = _mm512_maskz_loadu_ps(lanes, pool->distances + i);
        __m512i ids = _mm512_maskz_loadu_epi32(lanes, pool->ids + i);
        __mmask16 near = _mm512_mask_cmp_ps_mask(lanes, distances, bounds, _CMP_LE_OQ);
        uint32_t found = (uint32_t)__builtin_popcount(near);
        __mmask16 places = lanes_left(found);

        _mm512_mask_storeu_ps(pool->distances + kept, places,
                              _mm512_maskz_compress_ps(near, distances));
        _mm512_mask_storeu_epi32(pool->ids + kept, places, _mm512_maskz_compress_epi32(near, ids));
        kept += found;
    }
    pool->count = kept;
}

void block_pool_range_avx512(const struct block_pool *pool, float *least, float *greatest)
{
    __m512 low = _mm512_set1_ps(__builtin_inff()), high = _mm512_set1_ps(-__builtin_inff());

    for (uint32_t i = 0; i < pool->count; i += LANES) {
        __mmask16 lanes = lanes_left(pool->count - i);
        __m512 distances = _mm512_maskz_loadu_ps(lanes, pool->distances + i);

        low = _mm512_mask_min_ps(low, lanes, low, distances);
        high = _mm512_mask_max_ps(high, lanes, high, distances);
    }
    *least = _mm512_reduce_min_ps(low);
    *greatest = _mm512_reduce_max_ps(high);
}

/* Every place's rank is the number of distances before its own, equals among them when they stand
 * before it: comparisons of all with all, sixteen at a time and without a branch to guess, are done
 * before a merge sort has got over its wrong guesses. */
void block_pool_rank_avx512(const struct block_pool *pool, uint32_t *ranks)
{
    const __m512i one = _mm512_set1_epi32(1);
    const float *distances = pool->distances;

    for (uint32_t i = 0; i < pool->count; i += LANES) {
        uint32_t end = pool->count - i < LANES ? pool->count : i + LANES;
        __mmask16 lanes = lanes_left(pool->count - i);
        __m512 own = _mm512_maskz_loadu_ps(lanes, distances + i);
        __m512i rank = _mm512_setzero_si512();

        for (uint32_t j = 0; j < i; j++)
            rank = _mm512_mask_add_epi32(
                rank, _mm512_cmp_ps_mask(_mm512_set1_ps(distances[j]), own, _CMP_LE_OQ), rank, one);
        for (uint32_t j = i; j < end; j++) {
            __m512 other = _mm512_set1_ps(distances[j]);
            __mmask16 behind = (__mmask16)(0xfffeu << (j - i));
            __mmask16 before = _mm512_cmp_ps_mask(other, own, _CMP_LT_OQ) |
                               _mm512_mask_cmp_ps_mask(behind, other, own, _CMP_EQ_OQ);

            rank = _mm512_mask_add_epi32(rank, before, rank, one);
        }
        for (uint32_t j = end; j < pool->count; j++)
            rank = _mm512_mask_add_epi32(
                rank, _mm512_cmp_ps_mask(_mm512_set1_ps(distances[j]), own, _CMP_LT_OQ), rank, one);
        _mm512_mask_storeu_epi32(ranks + i, lanes, rank);
    }
}
