/* How it works: the integer kernels once more with VNNI, whose vpdpbusd multiplies 64 unsigned by
 * 64 signed bytes and adds the products in fours to 32 bits. Both our types have one sign only, so
 * one operand is moved by 128 (flipping its top bit) and the surplus is taken out at the end: u8:
 * sum a * b = sum a * (b - 128) + 128 * sum a i8:  sum a * b = sum (a + 128) * b - 128 * sum b 128
 * times a sum is itself a vpdpbusd with a constant. A masked-out tail reads as zero in the operand
 * that is not moved, so it adds nothing to either term. Lanes wrap modulo 2^32 and so does the
 * correction, hence the result is exact up to DISTANCE_DIM_MAX. */
#include "index/distance.h"

#include <immintrin.h>
#include <math.h>
#include <stddef.h>

#define INLINE static inline __attribute__((always_inline))

INLINE __m512i flip(__m512i v)
{
    return _mm512_xor_si512(v, _mm512_set1_epi8((char)0x80));
}

/* n 1..64: the whole register or a masked tail. */
INLINE __m512i load_bytes(const void *base, uint32_t i, uint32_t n)
{
    const uint8_t *p = (const uint8_t *)base + i;

    if (n >= 64)
        return _mm512_loadu_si512(p);
    return _mm512_maskz_loadu_epi8(~0ull >> (64 - n), p);
}

INLINE uint32_t reduce(__m512i v)
{
    return (uint32_t)_mm512_reduce_add_epi32(v);
}

/* |a - b| fits a byte for both types: the larger minus the smaller, modulo 256. */
INLINE __m512i difference_u8(__m512i a, __m512i b)
{
    return _mm512_sub_epi8(_mm512_max_epu8(a, b), _mm512_min_epu8(a, b));
}

INLINE __m512i difference_i8(__m512i a, __m512i b)
{
    return _mm512_sub_epi8(_mm512_max_epi8(a, b), _mm512_min_epi8(a, b));
}

/* Sum of a * b over unsigned bytes: moved products in *dot, plain sum of a in *sum. */
INLINE void dot_u8(__m512i a, __m512i b, __m512i *dot, __m512i *sum)
{
    *dot = _mm512_dpbusd_epi32(*dot, a, flip(b));
    *sum = _mm512_dpbusd_epi32(*sum, a, _mm512_set1_epi8(1));
}

/* The same over signed bytes: here *sum is that of b. */
INLINE void dot_i8(__m512i a, __m512i b, __m512i *dot, __m512i *sum)
{
    *dot = _mm512_dpbusd_epi32(*dot, flip(a), b);
    *sum = _mm512_dpbusd_epi32(*sum, _mm512_set1_epi8(1), b);
}

INLINE float cosine_from(double dot, double norm2_a, double norm2_b)
{
    if (norm2_a == 0 || norm2_b == 0)
        return 0;
    return (float)(dot / sqrt(norm2_a * norm2_b));
}

static uint32_t l2_u8(const uint8_t *a, const uint8_t *b, uint32_t dim)
{
    __m512i dot0 = _mm512_setzero_si512(), sum0 = dot0, dot1 = dot0, sum1 = dot0;
    __m512i d;
    uint32_t i = 0;

    for (; dim - i >= 128; i += 128) {
        d = difference_u8(load_bytes(a, i, 64), load_bytes(b, i, 64));
        dot_u8(d, d, &dot0, &sum0);
        d = difference_u8(load_bytes(a, i + 64, 64), load_bytes(b, i + 64, 64));
        dot_u8(d, d, &dot1, &sum1);
    }
    if (dim - i >= 64) {
        d = difference_u8(load_bytes(a, i, 64), load_bytes(b, i, 64));
        dot_u8(d, d, &dot0, &sum0);
        i += 64;
    }
    if (dim - i > 0) {
        d = difference_u8(load_bytes(a, i, dim - i), load_bytes(b, i, dim - i));
        dot_u8(d, d, &dot1, &sum1);
    }
    dot0 = _mm512_add_epi32(dot0, dot1);
    sum0 = _mm512_add_epi32(sum0, sum1);
    return reduce(dot0) + 128 * reduce(sum0);
}

static uint32_t ip_u8(const uint8_t *a, const uint8_t *b, uint32_t dim)
{
    __m512i dot0 = _mm512_setzero_si512(), sum0 = dot0, dot1 = dot0, sum1 = dot0;
    uint32_t i = 0;

    for (; dim - i >= 128; i += 128) {
        dot_u8(load_bytes(a, i, 64), load_bytes(b, i, 64), &dot0, &sum0);
        dot_u8(load_bytes(a, i + 64, 64), load_bytes(b, i + 64, 64), &dot1, &sum1);
    }
    if (dim - i >= 64) {
        dot_u8(load_bytes(a, i, 64), load_bytes(b, i, 64), &dot0, &sum0);
        i += 64;
    }
    if (dim - i > 0) {
        dot_u8(load_bytes(a, i, dim - i), load_bytes(b, i, dim - i), &dot1, &sum1);
    }
    dot0 = _mm512_add_epi32(dot0, dot1);
    sum0 = _mm512_add_epi32(sum0, sum1);
    return reduce(dot0) + 128 * reduce(sum0);
}

static uint32_t norm2_u8(const uint8_t *a, uint32_t dim)
{
    return ip_u8(a, a, dim);
}

static float cosine_u8(const uint8_t *a, const uint8_t *b, uint32_t dim)
{
    __m512i ab = _mm512_setzero_si512(), aa = ab, bb = ab, sum_a = ab, sum_b = ab;
    uint32_t surplus_a, surplus_b;

    for (uint32_t i = 0; i < dim; i += 64) {
        __m512i x = load_bytes(a, i, dim - i);
        __m512i y = load_bytes(b, i, dim - i);

        dot_u8(x, y, &ab, &sum_a);
        aa = _mm512_dpbusd_epi32(aa, x, flip(x));
        dot_u8(y, y, &bb, &sum_b);
    }
    surplus_a = 128 * reduce(sum_a);
    surplus_b = 128 * reduce(sum_b);
    return cosine_from((reduce(ab) + surplus_a), reduce(aa) + surplus_a, reduce(bb) + surplus_b);
}

static uint32_t l2_i8(const int8_t *a, const int8_t *b, uint32_t dim)
{
    __m512i dot0 = _mm512_setzero_si512(), sum0 = dot0, dot1 = dot0, sum1 = dot0;
    __m512i d;
    uint32_t i = 0;

    for (; dim - i >= 128; i += 128) {
        d = difference_i8(load_bytes(a, i, 64), load_bytes(b, i, 64));
        dot_u8(d, d, &dot0, &sum0);
        d = difference_i8(load_bytes(a, i + 64, 64), load_bytes(b, i + 64, 64));
        dot_u8(d, d, &dot1, &sum1);
    }
    if (dim - i >= 64) {
        d = difference_i8(load_bytes(a, i, 64), load_bytes(b, i, 64));
        dot_u8(d, d, &dot0, &sum0);
        i += 64;
    }
    if (dim - i > 0) {
        d = difference_i8(load_bytes(a, i, dim - i), load_bytes(b, i, dim - i));
        dot_u8(d, d, &dot1, &sum1);
    }
    dot0 = _mm512_add_epi32(dot0, dot1);
    sum0 = _mm512_add_epi32(sum0, sum1);
    return reduce(dot0) + 128 * reduce(sum0);
}

static int32_t ip_i8(const int8_t *a, const int8_t *b, uint32_t dim)
{
    __m512i dot0 = _mm512_setzero_si512(), sum0 = dot0, dot1 = dot0, sum1 = dot0;
    uint32_t i = 0;

    for (; dim - i >= 128; i += 128) {
        dot_i8(load_bytes(a, i, 64), load_bytes(b, i, 64), &dot0, &sum0);
        dot_i8(load_bytes(a, i + 64, 64), load_bytes(b, i + 64, 64), &dot1, &sum1);
    }
    if (dim - i >= 64) {
        dot_i8(load_bytes(a, i, 64), load_bytes(b, i, 64), &dot0, &sum0);
        i += 64;
    }
    if (dim - i > 0) {
        dot_i8(load_bytes(a, i, dim - i), load_bytes(b, i, dim - i), &dot1, &sum1);
    }
    dot0 = _mm512_add_epi32(dot0, dot1);
    sum0 = _mm512_add_epi32(sum0, sum1);
    return (int32_t)(reduce(dot0) - 128 * reduce(sum0));
}

static uint32_t norm2_i8(const int8_t *a, uint32_t dim)
{
    return (uint32_t)ip_i8(a, a, dim);
}

static float cosine_i8(const int8_t *a, const int8_t *b, uint32_t dim)
{
    __m512i ab = _mm512_setzero_si512(), aa = ab, bb = ab, sum_a = ab, sum_b = ab;
    uint32_t surplus_a, surplus_b;

    for (uint32_t i = 0; i < dim; i += 64) {
        __m512i x = load_bytes(a, i, dim - i);
        __m512i y = load_bytes(b, i, dim - i);

        dot_i8(x, y, &ab, &sum_b);
        dot_i8(x, x, &aa, &sum_a);
        bb = _mm512_dpbusd_epi32(bb, flip(y), y);
    }
    surplus_a = 128 * reduce(sum_a);
    surplus_b = 128 * reduce(sum_b);
    return cosine_from((int32_t)(reduce(ab) - surplus_b), reduce(aa) - surplus_a,
                       reduce(bb) - surplus_b);
}

/* The rest of the table is the AVX-512 one's: distance.c joins them. */
const struct distance_kernels distance_avx512vnni_kernels = {
    .name = "avx512vnni",
    .l2_u8 = l2_u8,
    .ip_u8 = ip_u8,
    .cosine_u8 = cosine_u8,
    .norm2_u8 = norm2_u8,
    .l2_i8 = l2_i8,
    .ip_i8 = ip_i8,
    .cosine_i8 = cosine_i8,
    .norm2_i8 = norm2_i8,
};
