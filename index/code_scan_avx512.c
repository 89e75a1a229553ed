/* How it works: 32 codes at a time, for CPUs with AVX-512 F, BW, VL and DQ.
 *
 * Two registers hold 64 entries of 16 bits, and one permutation looks 32 codes' bytes up in them by
 * their low six bits. A chunk's 256 entries take four permutations, and bits 6 and 7 choose among
 * their results through masks.
 *
 * Codes stand row by row, so they are first transposed as pairs of bytes: a lane per code, a
 * register per pair of chunks, in natural order. Groups of 32 codes are transposed one after the
 * other into a buffer, and then each chunk's entries are loaded once for all groups: a table of
 * more than 64 chunks does not stay in the first-level cache. What is left of the last block of
 * chunks is read from the end of the code, chunks seen before included and skipped, or under a
 * mask if the code is shorter than a block.
 *
 * The rows of an incomplete group repeat its last one; a very small group goes to the scalar
 * kernel. */
#include "index/code_scan.h"

#include <immintrin.h>
#include <stddef.h>

#define INLINE static inline __attribute__((always_inline))
#define ENTRIES 256u
#define GROUP 32u /* codes, the 16-bit lanes of a register */
#define GROUPS 4u /* at once */
#define BATCH (GROUPS * GROUP)
#define BLOCK 32u /* chunks transposed at a time */
#define PAIRS (BLOCK / 2)
/* Fewer codes than this in the last group are faster one by one: alone, and after other groups. */
#define SCALAR_ALONE 12u
#define SCALAR_AFTER 8u
#define CACHE_LINE 64u

INLINE __m256i load32(const uint8_t *p, __mmask32 mask)
{
    if (mask == 0xffffffffu)
        return _mm256_loadu_si256((const __m256i *)(const void *)p);
    return _mm256_maskz_loadu_epi8(mask, p);
}

INLINE __m128i load16(const uint8_t *p, __mmask16 mask)
{
    if (mask == 0xffffu)
        return _mm_loadu_si128((const __m128i *)(const void *)p);
    return _mm_maskz_loadu_epi8(mask, p);
}

/* In each 128-bit lane, an 8 x 8 matrix of 16-bit elements. */
INLINE void transpose_lanes(__m512i r[8])
{
    __m512i a[8], b[8];

    for (int i = 0; i < 4; i++) {
        a[2 * i] = _mm512_unpacklo_epi16(r[2 * i], r[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi16(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        b[4 * i] = _mm512_unpacklo_epi32(a[4 * i], a[4 * i + 2]);
        b[4 * i + 1] = _mm512_unpackhi_epi32(a[4 * i], a[4 * i + 2]);
        b[4 * i + 2] = _mm512_unpacklo_epi32(a[4 * i + 1], a[4 * i + 3]);
        b[4 * i + 3] = _mm512_unpackhi_epi32(a[4 * i + 1], a[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        r[2 * i] = _mm512_unpacklo_epi64(b[i], b[i + 4]);
        r[2 * i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 4]);
    }
}

/* pairs[p] gets bytes 2p and 2p + 1 from `at` of the 32 codes, for 32 bytes. */
INLINE void transpose32(const uint8_t *const *code, size_t at, __mmask32 mask, __m512i *pairs)
{
    __m512i x[8], y[8];

    for (int j = 0; j < 8; j++) {
        x[j] = _mm512_inserti64x4(_mm512_castsi256_si512(load32(code[j] + at, mask)),
                                  load32(code[8 + j] + at, mask), 1);
        y[j] = _mm512_inserti64x4(_mm512_castsi256_si512(load32(code[16 + j] + at, mask)),
                                  load32(code[24 + j] + at, mask), 1);
    }
    transpose_lanes(x);
    transpose_lanes(y);
    for (int p = 0; p < 8; p++) {
        pairs[p] = _mm512_shuffle_i64x2(x[p], y[p], _MM_SHUFFLE(2, 0, 2, 0));
        pairs[p + 8] = _mm512_shuffle_i64x2(x[p], y[p], _MM_SHUFFLE(3, 1, 3, 1));
    }
}

/* The same for 16 bytes. */
INLINE void transpose16(const uint8_t *const *code, size_t at, __mmask16 mask, __m512i *pairs)
{
    __m512i x[8];

    for (int j = 0; j < 8; j++) {
        __m512i r = _mm512_castsi128_si512(load16(code[j] + at, mask));

        r = _mm512_inserti32x4(r, load16(code[8 + j] + at, mask), 1);
        r = _mm512_inserti32x4(r, load16(code[16 + j] + at, mask), 2);
        x[j] = _mm512_inserti32x4(r, load16(code[24 + j] + at, mask), 3);
    }
    transpose_lanes(x);
    for (int p = 0; p < 8; p++)
        pairs[p] = x[p];
}

/* The entries of 32 codes. The low six bits of `index` are looked up; bits 7 and 6 of the code
 * stand in the two highest bits of `high`. */
INLINE __m512i look_up(const __m512i t[8], __m512i index, __m512i high)
{
    __mmask32 bit7 = _mm512_movepi16_mask(high);
    __mmask32 bit6 = _mm512_movepi16_mask(_mm512_add_epi16(high, high));
    __m512i quarter0 = _mm512_permutex2var_epi16(t[0], index, t[1]);
    __m512i quarter1 = _mm512_permutex2var_epi16(t[2], index, t[3]);
    __m512i quarter2 = _mm512_permutex2var_epi16(t[4], index, t[5]);
    __m512i quarter3 = _mm512_permutex2var_epi16(t[6], index, t[7]);

    return _mm512_mask_blend_epi16(bit7, _mm512_mask_blend_epi16(bit6, quarter0, quarter1),
                                   _mm512_mask_blend_epi16(bit6, quarter2, quarter3));
}

INLINE void load_entries(const uint16_t *entries, __m512i t[8])
{
    for (int i = 0; i < 8; i++)
        t[i] = _mm512_loadu_si512(entries + 32 * i);
}

/* Adds the entries of bytes from..to-1 of the block. entries: those of its first byte. */
INLINE void add_block(const uint16_t *entries, uint32_t from, uint32_t to,
                      const __m512i pairs[GROUPS][PAIRS], uint32_t groups, __m512i sum[GROUPS])
{
    __m512i t[8];

    for (uint32_t b = from; b < to; b++) {
        load_entries(entries + b * ENTRIES, t);
        if (b % 2 == 0) {
            for (uint32_t g = 0; g < groups; g++) {
                __m512i v = pairs[g][b / 2];

                sum[g] = _mm512_add_epi16(sum[g], look_up(t, v, _mm512_slli_epi16(v, 8)));
            }
        } else {
            for (uint32_t g = 0; g < groups; g++) {
                __m512i v = pairs[g][b / 2];

                sum[g] = _mm512_add_epi16(sum[g], look_up(t, _mm512_srli_epi16(v, 8), v));
            }
        }
    }
}

/* Sums of `groups` times 32 codes. */
INLINE void sum_groups(const uint16_t *entries, uint32_t chunk_count, const uint8_t *const *code,
                       uint32_t groups, __m512i sum[GROUPS])
{
    __m512i pairs[GROUPS][PAIRS];
    uint32_t c = 0;

    for (uint32_t g = 0; g < groups; g++)
        sum[g] = _mm512_setzero_si512();
    for (; c + BLOCK <= chunk_count; c += BLOCK) {
        for (uint32_t g = 0; g < groups; g++)
            transpose32(code + g * GROUP, c, 0xffffffffu, pairs[g]);
        add_block(entries + (size_t)c * ENTRIES, 0, BLOCK, pairs, groups, sum);
    }
    if (c < chunk_count) {
        uint32_t left = chunk_count - c;
        uint32_t at = c, from = 0;

        if (left <= 16) {
            __mmask16 mask = 0xffffu;

            if (chunk_count < 16) {
                mask = (__mmask16)((1u << left) - 1);
                for (uint32_t g = 0; g < groups; g++)
                    transpose16(code + g * GROUP, 0, mask, pairs[g]);
            } else {
                at = chunk_count - 16;
                from = 16 - left;
                for (uint32_t g = 0; g < groups; g++)
                    transpose16(code + g * GROUP, at, 0xffffu, pairs[g]);
            }
        } else if (chunk_count < BLOCK) {
            for (uint32_t g = 0; g < groups; g++)
                transpose32(code + g * GROUP, 0, (1u << left) - 1, pairs[g]);
        } else {
            at = chunk_count - BLOCK;
            from = BLOCK - left;
            for (uint32_t g = 0; g < groups; g++)
                transpose32(code + g * GROUP, at, 0xffffffffu, pairs[g]);
        }
        add_block(entries + (size_t)at * ENTRIES, from, from + left, pairs, groups, sum);
    }
}

#define SUM_GROUPS(n)                                                                              \
    static __attribute__((noinline)) void sum_groups##n(                                           \
        const uint16_t *entries, uint32_t chunk_count, const uint8_t *const *code, uint32_t count, \
        uint16_t *sums)                                                                            \
    {                                                                                              \
        __m512i sum[GROUPS];                                                                       \
        uint32_t last = count - ((n)-1) * GROUP;                                                   \
                                                                                                   \
        sum_groups(entries, chunk_count, code, n, sum);                                            \
        for (uint32_t g = 0; g + 1 < (n); g++)                                                     \
            _mm512_storeu_si512(sums + g * GROUP, sum[g]);                                         \
        _mm512_mask_storeu_epi16(sums + ((n)-1) * GROUP, 0xffffffffu >> (GROUP - last),            \
                                 sum[(n)-1]);                                                      \
    }
SUM_GROUPS(1)
SUM_GROUPS(2)
SUM_GROUPS(3)
SUM_GROUPS(4)

/* count in 1..BATCH codes; code[] has room for a multiple of GROUP. */
static void sum_batch(const uint16_t *entries, uint32_t chunk_count, const uint8_t **code,
                      uint32_t count, uint16_t *sums)
{
    uint32_t groups = (count + GROUP - 1) / GROUP;

    for (uint32_t i = count; i < groups * GROUP; i++)
        code[i] = code[count - 1];
    switch (groups) {
    case 1:
        sum_groups1(entries, chunk_count, code, count, sums);
        break;
    case 2:
        sum_groups2(entries, chunk_count, code, count, sums);
        break;
    case 3:
        sum_groups3(entries, chunk_count, code, count, sums);
        break;
    default:
        sum_groups4(entries, chunk_count, code, count, sums);
        break;
    }
}

INLINE void prefetch_code(const uint8_t *code, uint32_t chunk_count)
{
    for (uint32_t at = 0; at < chunk_count; at += CACHE_LINE)
        _mm_prefetch((const char *)code + at, _MM_HINT_T0);
    _mm_prefetch((const char *)code + chunk_count - 1, _MM_HINT_T0);
}

/* How many of `count` codes to sum 32 at a time; the rest one by one. */
INLINE uint32_t wide_count(uint32_t count)
{
    uint32_t few = count < GROUP ? SCALAR_ALONE : SCALAR_AFTER;

    return count % GROUP < few ? count - count % GROUP : count;
}

static void avx512_rows(const uint16_t *entries, uint32_t chunk_count, const uint8_t *codes,
                        uint64_t code_stride, const uint32_t *rows, uint32_t count, uint16_t *sums)
{
    const uint8_t *code[BATCH];
    uint32_t wide = chunk_count ? wide_count(count) : 0;
    uint32_t ready = 0; /* rows asked for so far */

    for (uint32_t i = 0; i < wide; i += BATCH) {
        uint32_t n = wide - i < BATCH ? wide - i : BATCH;

        for (; ready < count && ready < i + 2 * BATCH; ready++)
            prefetch_code(codes + rows[ready] * code_stride, chunk_count);
        for (uint32_t j = 0; j < n; j++)
            code[j] = codes + rows[i + j] * code_stride;
        sum_batch(entries, chunk_count, code, n, sums + i);
    }
    if (wide < count)
        code_scan_scalar_rows(entries, chunk_count, codes, code_stride, rows + wide, count - wide,
                              sums + wide);
}

static void avx512_run(const uint16_t *entries, uint32_t chunk_count, const uint8_t *codes,
                       uint64_t code_stride, uint64_t first, uint32_t count, uint16_t *sums)
{
    const uint8_t *code[BATCH];
    const uint8_t *at = codes + first * code_stride;
    uint32_t wide = chunk_count ? wide_count(count) : 0;
    uint64_t bytes = count * code_stride, ready = 0;

    for (uint32_t i = 0; i < wide; i += BATCH) {
        uint32_t n = wide - i < BATCH ? wide - i : BATCH;

        for (; ready < bytes && ready < (i + 2 * BATCH) * code_stride; ready += CACHE_LINE)
            _mm_prefetch((const char *)codes + first * code_stride + ready, _MM_HINT_T0);
        for (uint32_t j = 0; j < n; j++, at += code_stride)
            code[j] = at;
        sum_batch(entries, chunk_count, code, n, sums + i);
    }
    for (uint32_t i = wide; i < count; i++) {
        static const uint32_t row0 = 0;

        code_scan_scalar_rows(entries, chunk_count, at, code_stride, &row0, 1, sums + i);
        at += code_stride;
    }
}

static uint32_t avx512_below(const uint16_t *sums, uint32_t count, uint16_t limit, uint32_t *out)
{
    __m512i limits = _mm512_set1_epi16((int16_t)limit);
    __m512i sixteen = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    uint32_t found = 0;

    for (uint32_t i = 0; i < count; i += GROUP) {
        uint32_t n = count - i < GROUP ? count - i : GROUP;
        __mmask32 valid = 0xffffffffu >> (GROUP - n);
        __mmask32 hits =
            _mm512_mask_cmple_epu16_mask(valid, _mm512_maskz_loadu_epi16(valid, sums + i), limits);

        if (!hits)
            continue;
        for (uint32_t half = 0; half < 2; half++, hits >>= 16) {
            __m512i ids = _mm512_add_epi32(sixteen, _mm512_set1_epi32((int32_t)(i + 16 * half)));

            _mm512_mask_compressstoreu_epi32(out + found, (__mmask16)hits, ids);
            found += (uint32_t)__builtin_popcount(hits & 0xffffu);
        }
    }
    return found;
}

const struct code_scan_kernels code_scan_avx512_kernels = {
    .name = "avx512",
    .run = avx512_run,
    .rows = avx512_rows,
    .below = avx512_below,
};

const struct code_scan_kernels code_scan_avx512vnni_kernels = {
    .name = "avx512vnni",
    .run = avx512_run,
    .rows = avx512_rows,
    .below = avx512_below,
};
