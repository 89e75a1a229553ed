/* Without VNNI, pairs of dimensions widened to 16 bits are multiplied and added by vpmaddwd, which
 * is exact for both kinds of bytes. A panel of 64 rows of b is widened and laid out with the same
 * two dimensions of eight rows in a register; six rows of a are widened beside it, and six times
 * two registers of sums are all that sixteen registers leave room for. */
#include "index/block_kernels.h"

#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))
#define LANES 8u
#define GROUP 6u
#define PAIRS 128u /* of dimensions, in one round: 32 KiB of panel */

/* The pairs of one row from byte `from` on, each in 32 bits, `step` words apart. */
INLINE void widen(const uint8_t *row, uint32_t pairs, bool is_signed, uint32_t *out, uint32_t step)
{
    for (uint32_t k = 0; k < pairs; k++) {
        uint32_t low = row[2 * k], high = row[2 * k + 1];

        if (is_signed) {
            low = (uint16_t)(int8_t)low;
            high = (uint16_t)(int8_t)high;
        }
        out[(uint64_t)k * step] = low | high << 16;
    }
}

/* The same side by side, sixteen bytes at a time: a multiple of eight pairs, which rows have. */
INLINE void widen_densely(const uint8_t *row, uint32_t pairs, bool is_signed, uint32_t *out)
{
    for (uint32_t k = 0; k < pairs; k += LANES) {
        __m128i bytes = _mm_load_si128((const __m128i *)(row + 2 * k));

        _mm256_store_si256((__m256i *)(out + k),
                           is_signed ? _mm256_cvtepi8_epi16(bytes) : _mm256_cvtepu8_epi16(bytes));
    }
}

INLINE __m256i lanes_left(uint32_t left)
{
    const __m256i steps = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);

    return _mm256_cmpgt_epi32(_mm256_set1_epi32(left < LANES ? (int)left : (int)LANES), steps);
}

/* Of unsigned numbers, rounded once. */
INLINE __m256 to_floats(__m256i v)
{
    /* Both halves are exact in a float, and so is the upper one times 65,536. */
    __m256 high = _mm256_cvtepi32_ps(_mm256_srli_epi32(v, 16));
    __m256 low = _mm256_cvtepi32_ps(_mm256_and_si256(v, _mm256_set1_epi32(0xffff)));

    return _mm256_add_ps(_mm256_mul_ps(high, _mm256_set1_ps(65536.0f)), low);
}

/* Six rows of a, of which the first `rows` count, by sixteen of b from `column` on. */
INLINE void group(const struct block_panel *p, uint32_t row, uint32_t rows, uint32_t column,
                  const uint32_t (*a)[PAIRS], const uint32_t (*b)[BLOCK_PANEL_ROWS], uint32_t pairs,
                  bool first, bool last)
{
    __m256i sums[GROUP][2];

    /* Written out by constants, or the sums would live in memory. */
#pragma GCC unroll 6
    for (uint32_t i = 0; i < GROUP; i++)
        sums[i][0] = sums[i][1] = _mm256_setzero_si256();
    for (uint32_t k = 0; k < pairs; k++) {
        __m256i b0 = _mm256_load_si256((const __m256i *)&b[k][column]);
        __m256i b1 = _mm256_load_si256((const __m256i *)&b[k][column + LANES]);

#pragma GCC unroll 6
        for (uint32_t i = 0; i < GROUP; i++) {
            __m256i pair = _mm256_set1_epi32((int)a[i][k]);

            sums[i][0] = _mm256_add_epi32(sums[i][0], _mm256_madd_epi16(pair, b0));
            sums[i][1] = _mm256_add_epi32(sums[i][1], _mm256_madd_epi16(pair, b1));
        }
    }
#pragma GCC unroll 6
    for (uint32_t i = 0; i < GROUP; i++) {
#pragma GCC unroll 2
        for (uint32_t v = 0; v < 2; v++) {
            uint32_t from = column + v * LANES;
            __m256i sum = sums[i][v], lanes, norms, distance;
            float *out;

            if (i >= rows || from >= p->count_b)
                continue;
            out = p->out + (uint64_t)(row + i) * p->out_stride + from;
            lanes = lanes_left(p->count_b - from);
            if (!first)
                sum = _mm256_add_epi32(sum, _mm256_maskload_epi32((const int *)out, lanes));
            norms = _mm256_maskload_epi32((const int *)p->norms_b + from, lanes);
            norms = _mm256_add_epi32(norms, _mm256_set1_epi32((int)p->bases[row + i]));
            distance = _mm256_sub_epi32(norms, _mm256_slli_epi32(sum, 1));
            if (last)
                _mm256_maskstore_ps(out, lanes, to_floats(distance));
            else
                _mm256_maskstore_epi32((int *)out, lanes, sum);
        }
    }
}

void block_panel_avx2(const struct block_panel *p)
{
    _Alignas(64) uint32_t b[PAIRS][BLOCK_PANEL_ROWS];
    _Alignas(64) uint32_t a[GROUP][PAIRS];
    uint32_t all = (p->dim + 1) / 2; /* a zero follows an odd row */

    __builtin_memset(a, 0, sizeof a);
    if (p->count_b < BLOCK_PANEL_ROWS)
        __builtin_memset(b, 0, sizeof b);
    for (uint32_t from = 0; from < all; from += PAIRS) {
        uint32_t pairs = all - from < PAIRS ? all - from : PAIRS;

        for (uint32_t j = 0; j < p->count_b; j++)
            widen(p->b + j * p->stride + 2 * from, pairs, p->is_signed, &b[0][j], BLOCK_PANEL_ROWS);
        for (uint32_t row = 0; row < p->count_a; row += GROUP) {
            uint32_t rows = p->count_a - row < GROUP ? p->count_a - row : GROUP;

            for (uint32_t i = 0; i < rows; i++)
                widen_densely(p->rows_a[row + i] + 2 * from, pairs, p->is_signed, a[i]);
            for (uint32_t column = 0; column < p->count_b; column += 2 * LANES)
                group(p, row, rows, column, a, b, pairs, from == 0, from + pairs == all);
        }
    }
}
