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
 * kernel.
 *
 * Spans are taken as one sequence of rows, so only the last group of all is incomplete. The codes
 * of the next batch are prefetched during the look-ups of this one, a few lines at a time: asked
 * for at once, they hold up what comes after until all but the last dozen have arrived.
 *
 * The nth smallest sum is found by halving the range of values and counting the sums in its lower
 * half: a pass over them costs about two cycles for 32. */
#include "index/code_scan.h"

#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <string.h>

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
#define AHEAD BATCH /* rows between a prefetch and its use; 256 and 512 were no better */

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

/* A place among the rows of spans. */
struct place {
    const struct code_span *spans;
    uint32_t span_count; /* from spans on */
    uint32_t done;       /* rows of spans[0] */
};

/* How many rows follow one another from here, `most` at most, and moves past them; 0 at the end.
 * *row: the first. */
INLINE uint32_t place_next(struct place *place, uint32_t most, uint64_t *row)
{
    uint32_t count;

    while (place->span_count && place->done == place->spans->count) {
        place->spans++;
        place->span_count--;
        place->done = 0;
    }
    if (!place->span_count)
        return 0;
    count = place->spans->count - place->done;
    count = count < most ? count : most;
    *row = place->spans->first + place->done;
    place->done += count;
    return count;
}

/* Rows to prefetch, a line at a time. */
struct ahead {
    const uint8_t *at, *end; /* of rows that follow one another: what is left of them */
    struct place place;      /* of the rows after these */
    uint32_t rows;           /* how many more to ask for now */
    uint32_t chunk_count;
    const uint8_t *codes;
    uint64_t code_stride;
};

static __attribute__((noinline)) void ahead_next(struct ahead *ahead)
{
    uint64_t row = 0;
    uint32_t n = ahead->rows ? place_next(&ahead->place, ahead->rows, &row) : 0;

    ahead->rows = n ? ahead->rows - n : 0;
    if (n) {
        ahead->at = ahead->codes + row * ahead->code_stride;
        ahead->end = ahead->at + (n - (uint64_t)1) * ahead->code_stride + ahead->chunk_count;
        ahead->at -= (uintptr_t)ahead->at % CACHE_LINE;
    }
}

/* Prefetches one line, if any is to be. */
INLINE void ahead_step(struct ahead *ahead)
{
    if (ahead->at >= ahead->end && ahead->rows)
        ahead_next(ahead);
    if (ahead->at < ahead->end) {
        _mm_prefetch((const char *)ahead->at, _MM_HINT_T0);
        ahead->at += CACHE_LINE;
    }
}

INLINE void ahead_finish(struct ahead *ahead)
{
    while (ahead->at < ahead->end || ahead->rows)
        ahead_step(ahead);
}

/* Adds the entries of bytes from..to-1 of the block. entries: those of its first byte. */
INLINE void add_block(const uint16_t *entries, uint32_t from, uint32_t to,
                      const __m512i pairs[GROUPS][PAIRS], uint32_t groups, __m512i sum[GROUPS],
                      struct ahead *ahead)
{
    __m512i t[8];

    for (uint32_t b = from; b < to; b++) {
        load_entries(entries + b * ENTRIES, t);
        if (ahead) { /* two lines a chunk are what four groups of codes use up */
            ahead_step(ahead);
            ahead_step(ahead);
        }
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
                       uint32_t groups, __m512i sum[GROUPS], struct ahead *ahead)
{
    __m512i pairs[GROUPS][PAIRS];
    uint32_t c = 0;

    for (uint32_t g = 0; g < groups; g++)
        sum[g] = _mm512_setzero_si512();
    for (; c + BLOCK <= chunk_count; c += BLOCK) {
        for (uint32_t g = 0; g < groups; g++)
            transpose32(code + g * GROUP, c, 0xffffffffu, pairs[g]);
        add_block(entries + (size_t)c * ENTRIES, 0, BLOCK, pairs, groups, sum, ahead);
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
        add_block(entries + (size_t)at * ENTRIES, from, from + left, pairs, groups, sum, ahead);
    }
}

#define SUM_GROUPS(n, during)                                                                      \
    static __attribute__((noinline)) void sum_groups##n(                                           \
        const uint16_t *entries, uint32_t chunk_count, const uint8_t *const *code, uint32_t count, \
        uint16_t *sums, struct ahead *ahead)                                                       \
    {                                                                                              \
        __m512i sum[GROUPS];                                                                       \
        uint32_t last = count - ((n)-1) * GROUP;                                                   \
                                                                                                   \
        sum_groups(entries, chunk_count, code, n, sum, during);                                    \
        for (uint32_t g = 0; g + 1 < (n); g++)                                                     \
            _mm512_storeu_si512(sums + g * GROUP, sum[g]);                                         \
        _mm512_mask_storeu_epi16(sums + ((n)-1) * GROUP, 0xffffffffu >> (GROUP - last),            \
                                 sum[(n)-1]);                                                      \
        (void)ahead;                                                                               \
    }
SUM_GROUPS(1, NULL)
SUM_GROUPS(2, NULL)
SUM_GROUPS(3, NULL)
SUM_GROUPS(4, ahead)

/* count in 1..BATCH codes; code[] has room for a multiple of GROUP. A full batch prefetches. */
static void sum_batch(const uint16_t *entries, uint32_t chunk_count, const uint8_t **code,
                      uint32_t count, uint16_t *sums, struct ahead *ahead)
{
    uint32_t groups = (count + GROUP - 1) / GROUP;

    for (uint32_t i = count; i < groups * GROUP; i++)
        code[i] = code[count - 1];
    switch (groups) {
    case 1:
        sum_groups1(entries, chunk_count, code, count, sums, NULL);
        break;
    case 2:
        sum_groups2(entries, chunk_count, code, count, sums, NULL);
        break;
    case 3:
        sum_groups3(entries, chunk_count, code, count, sums, NULL);
        break;
    default:
        sum_groups4(entries, chunk_count, code, count, sums, ahead);
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
    struct ahead none = {0};

    for (uint32_t i = 0; i < wide; i += BATCH) {
        uint32_t n = wide - i < BATCH ? wide - i : BATCH;

        for (; ready < count && ready < i + 2 * BATCH; ready++)
            prefetch_code(codes + rows[ready] * code_stride, chunk_count);
        for (uint32_t j = 0; j < n; j++)
            code[j] = codes + rows[i + j] * code_stride;
        sum_batch(entries, chunk_count, code, n, sums + i, &none);
    }
    if (wide < count)
        code_scan_scalar_rows(entries, chunk_count, codes, code_stride, rows + wide, count - wide,
                              sums + wide);
}

static void avx512_spans(const uint16_t *entries, uint32_t chunk_count, const uint8_t *codes,
                         uint64_t code_stride, const struct code_span *spans, uint32_t span_count,
                         uint16_t *sums)
{
    const uint8_t *code[BATCH];
    struct place place = {spans, span_count, 0};
    struct ahead ahead = {.place = place,
                          .rows = AHEAD,
                          .chunk_count = chunk_count,
                          .codes = codes,
                          .code_stride = code_stride};
    uint32_t n, left;

    if (chunk_count)
        ahead_finish(&ahead);
    do {
        uint64_t row = 0;
        uint32_t run;

        for (n = 0; n < BATCH && (run = place_next(&place, BATCH - n, &row)); n += run) {
            const uint8_t *at = codes + row * code_stride;

            for (uint32_t i = 0; i < run; i++, at += code_stride)
                code[n + i] = at;
        }
        if (!chunk_count) {
            memset(sums, 0, n * sizeof *sums);
        } else {
            ahead.rows = n;
            left = n - wide_count(n);
            if (n > left)
                sum_batch(entries, chunk_count, code, n - left, sums, &ahead);
            ahead_finish(&ahead);
            for (uint32_t i = n - left; i < n; i++) {
                static const uint32_t row0 = 0;

                code_scan_scalar_rows(entries, chunk_count, code[i], code_stride, &row0, 1,
                                      sums + i);
            }
        }
        sums += n;
    } while (n == BATCH);
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

/* How many of the sums are at most `limit`. */
static uint32_t count_below(const uint16_t *sums, uint32_t count, uint16_t limit)
{
    __m512i limits = _mm512_set1_epi16((int16_t)limit);
    uint64_t below[4] = {0};
    uint32_t i = 0;

    for (; i + 4 * GROUP <= count; i += 4 * GROUP) {
        for (uint32_t v = 0; v < 4; v++)
            below[v] += (uint64_t)__builtin_popcountll(
                _mm512_cmple_epu16_mask(_mm512_loadu_si512(sums + i + v * GROUP), limits));
    }
    for (; i < count; i += GROUP) {
        __mmask32 valid = count - i < GROUP ? 0xffffffffu >> (GROUP - (count - i)) : 0xffffffffu;

        below[0] += (uint64_t)__builtin_popcountll(
            _mm512_mask_cmple_epu16_mask(valid, _mm512_maskz_loadu_epi16(valid, sums + i), limits));
    }
    return (uint32_t)(below[0] + below[1] + below[2] + below[3]);
}

/* The least and the greatest of count > 0 sums. */
static void bounds(const uint16_t *sums, uint32_t count, uint32_t *least, uint32_t *greatest)
{
    __m512i low[2] = {_mm512_set1_epi16(-1), _mm512_set1_epi16(-1)};
    __m512i high[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    uint16_t lanes[2][GROUP];
    uint32_t i = 0;

    for (; i + 2 * GROUP <= count; i += 2 * GROUP) {
        for (uint32_t v = 0; v < 2; v++) {
            __m512i x = _mm512_loadu_si512(sums + i + v * GROUP);

            low[v] = _mm512_min_epu16(low[v], x);
            high[v] = _mm512_max_epu16(high[v], x);
        }
    }
    for (; i < count; i += GROUP) {
        __mmask32 valid = count - i < GROUP ? 0xffffffffu >> (GROUP - (count - i)) : 0xffffffffu;
        __m512i x = _mm512_maskz_loadu_epi16(valid, sums + i);

        low[0] = _mm512_mask_min_epu16(low[0], valid, low[0], x);
        high[0] = _mm512_max_epu16(high[0], x);
    }
    _mm512_storeu_si512(lanes[0], _mm512_min_epu16(low[0], low[1]));
    _mm512_storeu_si512(lanes[1], _mm512_max_epu16(high[0], high[1]));
    *least = lanes[0][0];
    *greatest = lanes[1][0];
    for (uint32_t l = 1; l < GROUP; l++) {
        *least = lanes[0][l] < *least ? lanes[0][l] : *least;
        *greatest = lanes[1][l] > *greatest ? lanes[1][l] : *greatest;
    }
}

static uint16_t avx512_nth(const uint16_t *sums, uint32_t count, uint32_t nth)
{
    uint32_t low, high;

    bounds(sums, count, &low, &high);
    while (low < high) {
        uint32_t middle = (low + high) / 2;

        if (count_below(sums, count, (uint16_t)middle) >= nth)
            high = middle;
        else
            low = middle + 1;
    }
    return (uint16_t)low;
}

/* Passes over numbers alone, as those of the base table: (number, bound) in this order. */
static void fill_range(const float *shares, float *least, float *greatest)
{
    __m512 low[4], high[4];

    for (uint32_t v = 0; v < 4; v++) {
        low[v] = _mm512_set1_ps(INFINITY);
        high[v] = _mm512_set1_ps(-INFINITY);
    }
    for (uint32_t i = 0; i < ENTRIES; i += 64) {
        for (uint32_t v = 0; v < 4; v++) {
            __m512 x = _mm512_loadu_ps(shares + i + 16 * v);

            low[v] = _mm512_min_ps(x, low[v]);
            high[v] = _mm512_max_ps(x, high[v]);
        }
    }
    *least = _mm512_reduce_min_ps(
        _mm512_min_ps(_mm512_min_ps(low[0], low[1]), _mm512_min_ps(low[2], low[3])));
    *greatest = _mm512_reduce_max_ps(
        _mm512_max_ps(_mm512_max_ps(high[0], high[1]), _mm512_max_ps(high[2], high[3])));
}

static void fill_entries(const float *shares, float least, float scale, uint16_t *entries)
{
    __m512 leasts = _mm512_set1_ps(least), scales = _mm512_set1_ps(scale);
    __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7); /* packing is by 128-bit lanes */

    for (uint32_t i = 0; i < ENTRIES; i += 32) {
        __m512 a = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(shares + i), leasts), scales);
        __m512 b = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(shares + i + 16), leasts), scales);
        __m512i packed = _mm512_packus_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b));

        _mm512_storeu_si512(entries + i, _mm512_permutexvar_epi64(order, packed));
    }
}

static void avx512_fill(struct code_table *table, const float *shares, uint32_t chunk_count)
{
    static const struct code_fill_passes passes = {fill_range, fill_entries};

    code_scan_fill(table, shares, chunk_count, &passes);
}

const struct code_scan_kernels code_scan_avx512_kernels = {
    .name = "avx512",
    .spans = avx512_spans,
    .rows = avx512_rows,
    .below = avx512_below,
    .nth = avx512_nth,
    .fill = avx512_fill,
};

const struct code_scan_kernels code_scan_avx512vnni_kernels = {
    .name = "avx512vnni",
    .spans = avx512_spans,
    .rows = avx512_rows,
    .below = avx512_below,
    .nth = avx512_nth,
    .fill = avx512_fill,
};
