/* Sixteen candidates a register, the last ones under a mask; what stays is compressed in place,
 * which is safe because it is never written beyond what was read. AVX-512 F alone. */
#include "index/list_kernels.h"

#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))
#define LANES 16u

INLINE __mmask16 lanes_left(uint32_t left)
{
    return left < LANES ? (__mmask16)((1u << left) - 1) : (__mmask16)0xffff;
}

/* The lanes below the bound of 64 values. */
INLINE uint64_t below64(const float *values, __m512 bounds)
{
    uint64_t lanes = 0;

    for (uint32_t r = 0; r < 4; r++)
        lanes |=
            (uint64_t)_mm512_cmp_ps_mask(_mm512_loadu_ps(values + r * LANES), bounds, _CMP_LT_OQ)
            << (r * LANES);
    return lanes;
}

static uint32_t avx512_below(const float *values, uint32_t count, float bound)
{
    const __m512 bounds = _mm512_set1_ps(bound);
    uint32_t found = 0, i = 0;

    for (; count - i >= 4 * LANES; i += 4 * LANES)
        found += (uint32_t)__builtin_popcountll(below64(values + i, bounds));
    for (; i < count; i += LANES) {
        __mmask16 lanes = lanes_left(count - i);

        found += (uint32_t)__builtin_popcount(_mm512_mask_cmp_ps_mask(
            lanes, _mm512_maskz_loadu_ps(lanes, values + i), bounds, _CMP_LT_OQ));
    }
    return found;
}

static uint32_t avx512_nearest(const float *distance, const uint32_t *page, uint32_t count,
                               uint32_t from, uint32_t to)
{
    const __m512i froms = _mm512_set1_epi32((int)from), spans = _mm512_set1_epi32((int)(to - from));
    const __m512i sixteen = _mm512_set1_epi32((int)LANES);
    __m512i place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i places = _mm512_set1_epi32(-1);
    __m512 least = _mm512_set1_ps(__builtin_inff());

    for (uint32_t i = 0; i < count; i += LANES) {
        __mmask16 lanes = lanes_left(count - i);
        __m512i pages = _mm512_maskz_loadu_epi32(lanes, page + i);
        __m512 values = _mm512_maskz_loadu_ps(lanes, distance + i);
        __mmask16 inside =
            _mm512_mask_cmplt_epu32_mask(lanes, _mm512_sub_epi32(pages, froms), spans);
        /* A lane without a place yet takes any distance, an infinite one too. */
        __mmask16 fresh = _mm512_cmpeq_epi32_mask(places, _mm512_set1_epi32(-1));
        __mmask16 better = inside & (_mm512_cmp_ps_mask(values, least, _CMP_LT_OQ) | fresh);

        least = _mm512_mask_mov_ps(least, better, values);
        places = _mm512_mask_mov_epi32(places, better, place);
        place = _mm512_add_epi32(place, sixteen);
    }
    __mmask16 some = _mm512_cmpneq_epi32_mask(places, _mm512_set1_epi32(-1));

    if (!some)
        return LIST_NONE;
    float best = _mm512_mask_reduce_min_ps(some, least);

    return _mm512_mask_reduce_min_epu32(
        _mm512_mask_cmp_ps_mask(some, least, _mm512_set1_ps(best), _CMP_EQ_OQ), places);
}

static uint32_t avx512_find(const uint32_t *values, uint32_t count, uint32_t value)
{
    const __m512i wanted = _mm512_set1_epi32((int)value);
    uint32_t i = 0;

    /* Mostly it is not there: four registers a branch. */
    for (; count - i >= 4 * LANES; i += 4 * LANES) {
        uint64_t same = 0;

        for (uint32_t r = 0; r < 4; r++)
            same |= (uint64_t)_mm512_cmpeq_epi32_mask(_mm512_loadu_si512(values + i + r * LANES),
                                                      wanted)
                    << (r * LANES);
        if (same)
            return i + (uint32_t)__builtin_ctzll(same);
    }
    for (; i < count; i += LANES) {
        __mmask16 lanes = lanes_left(count - i);
        __mmask16 same = _mm512_mask_cmpeq_epi32_mask(
            lanes, _mm512_maskz_loadu_epi32(lanes, values + i), wanted);

        if (same)
            return i + (uint32_t)__builtin_ctz(same);
    }
    return LIST_NONE;
}

/* Moves the lanes `stay` of the rows from i on to row `to`. */
INLINE uint32_t compress(const struct candidate_columns *columns, uint32_t i, __mmask16 lanes,
                         __mmask16 stay, uint32_t to)
{
    __m512 distance = _mm512_maskz_loadu_ps(lanes, columns->distance + i);
    __m512 sharpness = _mm512_maskz_loadu_ps(lanes, columns->sharpness + i);
    __m512i position = _mm512_maskz_loadu_epi32(lanes, columns->position + i);
    __m512i page = _mm512_maskz_loadu_epi32(lanes, columns->page + i);
    uint32_t count = (uint32_t)__builtin_popcount(stay);
    __mmask16 out = lanes_left(count);

    _mm512_mask_storeu_ps(columns->distance + to, out, _mm512_maskz_compress_ps(stay, distance));
    _mm512_mask_storeu_ps(columns->sharpness + to, out, _mm512_maskz_compress_ps(stay, sharpness));
    _mm512_mask_storeu_epi32(columns->position + to, out,
                             _mm512_maskz_compress_epi32(stay, position));
    _mm512_mask_storeu_epi32(columns->page + to, out, _mm512_maskz_compress_epi32(stay, page));
    return count;
}

static uint32_t avx512_drop_page(const struct candidate_columns *columns, uint32_t count,
                                 uint32_t page)
{
    const __m512i gone = _mm512_set1_epi32((int)page);
    uint32_t kept = 0;

    for (uint32_t i = 0; i < count; i += LANES) {
        __mmask16 lanes = lanes_left(count - i);
        __mmask16 stay = _mm512_mask_cmpneq_epi32_mask(
            lanes, _mm512_maskz_loadu_epi32(lanes, columns->page + i), gone);

        if (stay == 0xffff && kept == i)
            kept += LANES; /* in place already */
        else
            kept += compress(columns, i, lanes, stay, kept);
    }
    return kept;
}

static uint32_t avx512_drop_beyond(const struct candidate_columns *columns, uint32_t count,
                                   float bound, uint32_t ties)
{
    const __m512 bounds = _mm512_set1_ps(bound);
    uint32_t kept = 0;

    for (uint32_t i = 0; i < count; i += LANES) {
        __mmask16 lanes = lanes_left(count - i);
        __m512 distance = _mm512_maskz_loadu_ps(lanes, columns->distance + i);
        __mmask16 stay = _mm512_mask_cmp_ps_mask(lanes, distance, bounds, _CMP_LT_OQ);
        uint32_t equal = _mm512_mask_cmp_ps_mask(lanes, distance, bounds, _CMP_EQ_OQ);

        for (; equal && ties; equal &= equal - 1, ties--)
            stay |= (__mmask16)(equal & (0 - equal));
        kept += compress(columns, i, lanes, stay, kept);
    }
    return kept;
}

static uint64_t avx512_shares(const float *distance, const float *sharpness, uint32_t count,
                              float bound, const uint32_t shares[SHARE_STEPS])
{
    const __m512 bounds = _mm512_set1_ps(bound), unit = _mm512_set1_ps(SHARE_STEPS_A_UNIT);
    const __m512 middle = _mm512_set1_ps(SHARE_STEPS / 2), end = _mm512_set1_ps(SHARE_STEPS);
    __m512i sum = _mm512_setzero_si512();

    for (uint32_t i = 0; i < count; i += LANES) {
        __mmask16 lanes = lanes_left(count - i);
        __m512 over = _mm512_sub_ps(_mm512_maskz_loadu_ps(lanes, distance + i), bounds);
        __m512 step = _mm512_add_ps(
            _mm512_mul_ps(_mm512_mul_ps(over, _mm512_maskz_loadu_ps(lanes, sharpness + i)), unit),
            middle);
        __mmask16 near = _mm512_mask_cmp_ps_mask(lanes, step, end, _CMP_LT_OQ);

        if (!near)
            continue;
        __m512i entry = _mm512_cvttps_epi32(_mm512_max_ps(step, _mm512_setzero_ps()));
        __m512i share = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), near, entry, shares, 4);

        sum = _mm512_add_epi64(
            sum, _mm512_add_epi64(_mm512_srli_epi64(share, 32),
                                  _mm512_and_si512(share, _mm512_set1_epi64(0xffffffff))));
    }
    return (uint64_t)_mm512_reduce_add_epi64(sum);
}

const struct list_kernels list_kernels_avx512 = {
    .name = "avx512",
    .below = avx512_below,
    .nearest = avx512_nearest,
    .find = avx512_find,
    .drop_page = avx512_drop_page,
    .drop_beyond = avx512_drop_beyond,
    .shares = avx512_shares,
};
