/* A panel of 64 rows of b is laid out so that one register holds the same four dimensions of
 * sixteen rows; vpdpbusd with four dimensions of a row of a in every lane then adds to sixteen
 * products at once, and nothing is summed across lanes. Six rows of a against four registers of b
 * keep 24 sums in registers: 24 multiplications for ten loads.
 *
 * vpdpbusd takes unsigned by signed bytes. Laying out the panel flips the top bit of b, which moves
 * it by 128 into the other kind; the surplus of 128 times the sum of a row of a goes into the row's
 * norm beforehand (d = |a|^2 + |b|^2 - 2ab). Zeros behind a row of a cancel what a flip makes of
 * zeros behind one of b.
 *
 * Rows longer than a panel's depth take several rounds, and the sums wait in `out` as integers. */
#include "index/block_kernels.h"

#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))
#define LANES 16u
#define GROUP 6u     /* rows of a */
#define REGISTERS 4u /* of b */
#define DEPTH 512u   /* bytes of a row in one round: 32 KiB of panel */

/* Sixteen rows of 16 words become their columns. */
INLINE void transpose_16x16(__m512i r[LANES])
{
    __m512i t[LANES];

#pragma GCC unroll 16
    for (uint32_t i = 0; i < LANES; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    /* Now r[4g + c] holds column 4q + c of rows 4g..4g+3 in its quarter q. */
#pragma GCC unroll 4
    for (uint32_t g = 0; g < LANES; g += 4) {
        r[g] = _mm512_unpacklo_epi64(t[g], t[g + 2]);
        r[g + 1] = _mm512_unpackhi_epi64(t[g], t[g + 2]);
        r[g + 2] = _mm512_unpacklo_epi64(t[g + 1], t[g + 3]);
        r[g + 3] = _mm512_unpackhi_epi64(t[g + 1], t[g + 3]);
    }
#pragma GCC unroll 4
    for (uint32_t c = 0; c < 4; c++) {
        t[c] = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);     /* quarters 0, 2 */
        t[4 + c] = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd); /* quarters 1, 3 */
        t[8 + c] = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
        t[12 + c] = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
    }
#pragma GCC unroll 4
    for (uint32_t c = 0; c < 4; c++) {
        r[c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0x88);
        r[8 + c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0xdd);
        r[4 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0x88);
        r[12 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0xdd);
    }
}

/* `bytes` (a multiple of 64) of every row from `from` on; rows that are not there are left as they
 * are, for nobody reads their sums. */
static void lay_out(const struct block_panel *p, uint64_t from, uint32_t bytes, uint8_t *packed)
{
    const __m512i top = _mm512_set1_epi8((char)0x80);

    for (uint32_t v = 0; v * LANES < p->count_b; v++) {
        uint32_t rows = p->count_b - v * LANES < LANES ? p->count_b - v * LANES : LANES;
        const uint8_t *b = p->b + v * LANES * p->stride + from;

        for (uint32_t at = 0; at < bytes; at += 64) {
            __m512i r[LANES];

#pragma GCC unroll 16
            for (uint32_t i = 0; i < LANES; i++)
                r[i] = _mm512_load_si512(b + (i < rows ? i : rows - 1) * p->stride + at);
            transpose_16x16(r);
#pragma GCC unroll 16
            for (uint32_t i = 0; i < LANES; i++)
                _mm512_store_si512(packed + ((at / 4 + i) * REGISTERS + v) * 64,
                                   _mm512_xor_si512(r[i], top));
        }
    }
}

/* In assembly for gcc: version 12 gives the sums a second set of registers around the intrinsic,
 * runs out of them and keeps half of the sums in memory, which takes twice the time. */
INLINE void multiply_add(__m512i *sum, __m512i a, __m512i b, bool is_signed)
{
#if defined(__clang__)
    *sum = is_signed ? _mm512_dpbusd_epi32(*sum, b, a) : _mm512_dpbusd_epi32(*sum, a, b);
#else
    if (is_signed)
        __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(b), "v"(a));
    else
        __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(a), "v"(b));
#endif
}

INLINE __mmask16 lanes_of(const struct block_panel *p, uint32_t v)
{
    if (p->count_b >= (v + 1) * LANES)
        return 0xffff;
    return p->count_b > v * LANES ? (__mmask16)((1u << (p->count_b - v * LANES)) - 1) : 0;
}

INLINE __m512i four_bytes(const uint8_t *at)
{
    int32_t word;

    __builtin_memcpy(&word, at, sizeof word);
    return _mm512_set1_epi32(word);
}

/* `size` rows of a, a constant where this is expanded; `registers` likewise. */
INLINE void group(const struct block_panel *p, uint32_t row, uint32_t size, uint32_t registers,
                  uint64_t from, uint32_t bytes, const uint8_t *packed, bool first, bool last,
                  bool is_signed)
{
    const uint8_t *a[GROUP];
    __m512i sums[GROUP][REGISTERS];

#pragma GCC unroll 6
    for (uint32_t i = 0; i < size; i++) {
        a[i] = p->rows_a[row + i] + from;
#pragma GCC unroll 4
        for (uint32_t v = 0; v < registers; v++)
            sums[i][v] = first ? _mm512_setzero_si512()
                               : _mm512_maskz_loadu_epi32(
                                     lanes_of(p, v),
                                     p->out + (uint64_t)(row + i) * p->out_stride + v * LANES);
    }
    for (uint32_t k = 0; k < bytes; k += 4) {
        const uint8_t *step = packed + (uint64_t)k * LANES * REGISTERS;
        __m512i b[REGISTERS];

#pragma GCC unroll 4
        for (uint32_t v = 0; v < registers; v++)
            b[v] = _mm512_load_si512(step + v * 64);
#pragma GCC unroll 6
        for (uint32_t i = 0; i < size; i++) {
            __m512i word = four_bytes(a[i] + k);

#pragma GCC unroll 4
            for (uint32_t v = 0; v < registers; v++)
                multiply_add(&sums[i][v], word, b[v], is_signed);
        }
    }
#pragma GCC unroll 4
    for (uint32_t v = 0; v < registers; v++) {
        __mmask16 lanes = lanes_of(p, v);
        __m512i norms = _mm512_maskz_loadu_epi32(lanes, p->norms_b + v * LANES);

#pragma GCC unroll 6
        for (uint32_t i = 0; i < size; i++) {
            float *out = p->out + (uint64_t)(row + i) * p->out_stride + v * LANES;
            __m512i base = _mm512_set1_epi32((int)p->bases[row + i]);
            __m512i distance =
                _mm512_sub_epi32(_mm512_add_epi32(norms, base), _mm512_slli_epi32(sums[i][v], 1));

            if (last)
                _mm512_mask_storeu_ps(out, lanes, _mm512_cvtepu32_ps(distance));
            else
                _mm512_mask_storeu_epi32(out, lanes, sums[i][v]);
        }
    }
}

INLINE void groups(const struct block_panel *p, uint32_t registers, uint64_t from, uint32_t bytes,
                   const uint8_t *packed, bool first, bool last, bool is_signed)
{
    uint32_t row = 0;

    for (; p->count_a - row >= GROUP; row += GROUP)
        group(p, row, GROUP, registers, from, bytes, packed, first, last, is_signed);
    for (; p->count_a - row >= 2; row += 2)
        group(p, row, 2, registers, from, bytes, packed, first, last, is_signed);
    if (row < p->count_a)
        group(p, row, 1, registers, from, bytes, packed, first, last, is_signed);
}

static void groups_u8(const struct block_panel *p, uint64_t from, uint32_t bytes,
                      const uint8_t *packed, bool first, bool last)
{
    if (p->count_b > LANES)
        groups(p, REGISTERS, from, bytes, packed, first, last, false);
    else
        groups(p, 1, from, bytes, packed, first, last, false);
}

static void groups_i8(const struct block_panel *p, uint64_t from, uint32_t bytes,
                      const uint8_t *packed, bool first, bool last)
{
    if (p->count_b > LANES)
        groups(p, REGISTERS, from, bytes, packed, first, last, true);
    else
        groups(p, 1, from, bytes, packed, first, last, true);
}

void block_panel_vnni(const struct block_panel *p)
{
    _Alignas(64) uint8_t packed[DEPTH * BLOCK_PANEL_ROWS];

    if (p->count_b % BLOCK_PANEL_ROWS)
        __builtin_memset(packed, 0, sizeof packed); /* registers that are not laid out */
    for (uint64_t from = 0; from < p->stride; from += DEPTH) {
        uint32_t bytes = p->stride - from < DEPTH ? (uint32_t)(p->stride - from) : DEPTH;
        bool last = from + bytes == p->stride;

        lay_out(p, from, bytes, packed);
        if (last) /* the zeros at the end add nothing */
            bytes = (p->dim - (uint32_t)from + 3) & ~3u;
        if (p->is_signed)
            groups_i8(p, from, bytes, packed, from == 0, last);
        else
            groups_u8(p, from, bytes, packed, from == 0, last);
    }
}

/* u8: ab = a(b - 128) + 128 sum a, so d = |a|^2 - 256 sum a + ...; i8 the other way round. */
void block_prepare_vnni(const uint8_t *const *rows, uint32_t count, uint64_t stride, bool is_signed,
                        uint32_t *norms)
{
    const __m512i one = _mm512_set1_epi8(1);

    for (uint32_t i = 0; i < count; i++) {
        __m512i sums = _mm512_setzero_si512();
        uint32_t sum;

        for (uint64_t at = 0; at < stride; at += 64) {
            __m512i a = _mm512_load_si512(rows[i] + at);

            sums =
                is_signed ? _mm512_dpbusd_epi32(sums, one, a) : _mm512_dpbusd_epi32(sums, a, one);
        }
        sum = (uint32_t)_mm512_reduce_add_epi32(sums);
        norms[i] = is_signed ? norms[i] + 256u * sum : norms[i] - 256u * sum;
    }
}
