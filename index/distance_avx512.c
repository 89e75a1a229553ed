/* How it works: sixteen floats or 64 small integers at a time, for CPUs with AVX-512 F, BW, VL and
 * DQ (VNNI is another file).
 *
 * Float kernels are one body per formula; load16() turns sixteen elements of any type into floats,
 * and its type is a constant at each call, so inlining leaves one loop per kernel. Four
 * accumulators hide the latency of fused multiply-add. A tail is a masked load: bytes outside the
 * mask are never touched and read as zero, which adds nothing in any of the formulas. Integers are
 * widened to 16 bits; vpmaddwd takes pairs into 32 bits, exact up to DISTANCE_DIM_MAX. */
#include "index/distance.h"

#include <immintrin.h>
#include <math.h>
#include <stddef.h>

#include "index/element.h"

#define INLINE static inline __attribute__((always_inline))

INLINE __m512 load16(enum element_type type, const void *base, size_t i)
{
    const uint8_t *bytes = base;

    switch (type) {
    case ELEMENT_F32:
        return _mm512_loadu_ps(bytes + 4 * i);
    case ELEMENT_F16:
        return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)(bytes + 2 * i)));
    case ELEMENT_I8:
        return _mm512_cvtepi32_ps(
            _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)(bytes + i))));
    default:
        return _mm512_cvtepi32_ps(
            _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)(bytes + i))));
    }
}

/* The elements i .. i + n - 1, n 1..15, and zeros. */
INLINE __m512 load_tail(enum element_type type, const void *base, size_t i, uint32_t n)
{
    const uint8_t *bytes = base;
    __mmask16 mask = (__mmask16)((1u << n) - 1);

    switch (type) {
    case ELEMENT_F32:
        return _mm512_maskz_loadu_ps(mask, bytes + 4 * i);
    case ELEMENT_F16:
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, bytes + 2 * i));
    case ELEMENT_I8:
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, bytes + i)));
    default:
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, bytes + i)));
    }
}

INLINE __m512 l2_step(__m512 a, __m512 b, __m512 sum)
{
    __m512 d = _mm512_sub_ps(a, b);

    return _mm512_fmadd_ps(d, d, sum);
}

INLINE float l2(enum element_type type_a, const void *a, enum element_type type_b, const void *b,
                uint32_t dim)
{
    __m512 s0 = _mm512_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
    uint32_t i = 0;

    for (; dim - i >= 64; i += 64) {
        s0 = l2_step(load16(type_a, a, i), load16(type_b, b, i), s0);
        s1 = l2_step(load16(type_a, a, i + 16), load16(type_b, b, i + 16), s1);
        s2 = l2_step(load16(type_a, a, i + 32), load16(type_b, b, i + 32), s2);
        s3 = l2_step(load16(type_a, a, i + 48), load16(type_b, b, i + 48), s3);
    }
    for (; dim - i >= 16; i += 16)
        s0 = l2_step(load16(type_a, a, i), load16(type_b, b, i), s0);
    if (dim - i > 0)
        s1 = l2_step(load_tail(type_a, a, i, dim - i), load_tail(type_b, b, i, dim - i), s1);
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(s0, s1), _mm512_add_ps(s2, s3)));
}

INLINE float ip(enum element_type type_a, const void *a, enum element_type type_b, const void *b,
                uint32_t dim)
{
    __m512 s0 = _mm512_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
    uint32_t i = 0;

    for (; dim - i >= 64; i += 64) {
        s0 = _mm512_fmadd_ps(load16(type_a, a, i), load16(type_b, b, i), s0);
        s1 = _mm512_fmadd_ps(load16(type_a, a, i + 16), load16(type_b, b, i + 16), s1);
        s2 = _mm512_fmadd_ps(load16(type_a, a, i + 32), load16(type_b, b, i + 32), s2);
        s3 = _mm512_fmadd_ps(load16(type_a, a, i + 48), load16(type_b, b, i + 48), s3);
    }
    for (; dim - i >= 16; i += 16)
        s0 = _mm512_fmadd_ps(load16(type_a, a, i), load16(type_b, b, i), s0);
    if (dim - i > 0)
        s1 =
            _mm512_fmadd_ps(load_tail(type_a, a, i, dim - i), load_tail(type_b, b, i, dim - i), s1);
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(s0, s1), _mm512_add_ps(s2, s3)));
}

INLINE float cosine_from(double dot, double norm2_a, double norm2_b)
{
    if (norm2_a == 0 || norm2_b == 0)
        return 0;
    return (float)(dot / sqrt(norm2_a * norm2_b));
}

INLINE float cosine(enum element_type type, const void *a, const void *b, uint32_t dim)
{
    __m512 ab0 = _mm512_setzero_ps(), aa0 = ab0, bb0 = ab0, ab1 = ab0, aa1 = ab0, bb1 = ab0;
    __m512 x, y;
    uint32_t i = 0;

    for (; dim - i >= 32; i += 32) {
        x = load16(type, a, i);
        y = load16(type, b, i);
        ab0 = _mm512_fmadd_ps(x, y, ab0);
        aa0 = _mm512_fmadd_ps(x, x, aa0);
        bb0 = _mm512_fmadd_ps(y, y, bb0);
        x = load16(type, a, i + 16);
        y = load16(type, b, i + 16);
        ab1 = _mm512_fmadd_ps(x, y, ab1);
        aa1 = _mm512_fmadd_ps(x, x, aa1);
        bb1 = _mm512_fmadd_ps(y, y, bb1);
    }
    if (dim - i >= 16) {
        x = load16(type, a, i);
        y = load16(type, b, i);
        ab0 = _mm512_fmadd_ps(x, y, ab0);
        aa0 = _mm512_fmadd_ps(x, x, aa0);
        bb0 = _mm512_fmadd_ps(y, y, bb0);
        i += 16;
    }
    if (dim - i > 0) {
        x = load_tail(type, a, i, dim - i);
        y = load_tail(type, b, i, dim - i);
        ab1 = _mm512_fmadd_ps(x, y, ab1);
        aa1 = _mm512_fmadd_ps(x, x, aa1);
        bb1 = _mm512_fmadd_ps(y, y, bb1);
    }
    return cosine_from(_mm512_reduce_add_ps(_mm512_add_ps(ab0, ab1)),
                       _mm512_reduce_add_ps(_mm512_add_ps(aa0, aa1)),
                       _mm512_reduce_add_ps(_mm512_add_ps(bb0, bb1)));
}

/* Products of 64 u8 or i8 pairs, summed in fours to sixteen 32-bit lanes. */
INLINE __m512i dot64(enum element_type type, __m512i a, __m512i b)
{
    const __m512i zero = _mm512_setzero_si512();
    __m512i a_low, a_high, b_low, b_high;

    if (type == ELEMENT_U8) {
        a_low = _mm512_unpacklo_epi8(a, zero);
        a_high = _mm512_unpackhi_epi8(a, zero);
        b_low = _mm512_unpacklo_epi8(b, zero);
        b_high = _mm512_unpackhi_epi8(b, zero);
    } else { /* each byte twice, then the upper copy brings its sign down */
        a_low = _mm512_srai_epi16(_mm512_unpacklo_epi8(a, a), 8);
        a_high = _mm512_srai_epi16(_mm512_unpackhi_epi8(a, a), 8);
        b_low = _mm512_srai_epi16(_mm512_unpacklo_epi8(b, b), 8);
        b_high = _mm512_srai_epi16(_mm512_unpackhi_epi8(b, b), 8);
    }
    return _mm512_add_epi32(_mm512_madd_epi16(a_low, b_low), _mm512_madd_epi16(a_high, b_high));
}

/* |a - b| fits a byte for both types: the larger minus the smaller, modulo 256. */
INLINE __m512i difference64(enum element_type type, __m512i a, __m512i b)
{
    if (type == ELEMENT_U8)
        return _mm512_sub_epi8(_mm512_max_epu8(a, b), _mm512_min_epu8(a, b));
    return _mm512_sub_epi8(_mm512_max_epi8(a, b), _mm512_min_epi8(a, b));
}

/* n 1..63. */
INLINE __m512i load64_tail(const uint8_t *p, uint32_t n)
{
    return _mm512_maskz_loadu_epi8(~0ull >> (64 - n), p);
}

INLINE uint32_t l2_small(enum element_type type, const void *left, const void *right, uint32_t dim)
{
    const uint8_t *a = left, *b = right;
    __m512i s0 = _mm512_setzero_si512(), s1 = s0, d;
    uint32_t i = 0;

    for (; dim - i >= 128; i += 128) {
        d = difference64(type, _mm512_loadu_si512(a + i), _mm512_loadu_si512(b + i));
        s0 = _mm512_add_epi32(s0, dot64(ELEMENT_U8, d, d));
        d = difference64(type, _mm512_loadu_si512(a + i + 64), _mm512_loadu_si512(b + i + 64));
        s1 = _mm512_add_epi32(s1, dot64(ELEMENT_U8, d, d));
    }
    if (dim - i >= 64) {
        d = difference64(type, _mm512_loadu_si512(a + i), _mm512_loadu_si512(b + i));
        s0 = _mm512_add_epi32(s0, dot64(ELEMENT_U8, d, d));
        i += 64;
    }
    if (dim - i > 0) {
        d = difference64(type, load64_tail(a + i, dim - i), load64_tail(b + i, dim - i));
        s1 = _mm512_add_epi32(s1, dot64(ELEMENT_U8, d, d));
    }
    return (uint32_t)_mm512_reduce_add_epi32(_mm512_add_epi32(s0, s1));
}

INLINE uint32_t ip_small(enum element_type type, const void *left, const void *right, uint32_t dim)
{
    const uint8_t *a = left, *b = right;
    __m512i s0 = _mm512_setzero_si512(), s1 = s0, d;
    uint32_t i = 0;

    for (; dim - i >= 128; i += 128) {
        d = dot64(type, _mm512_loadu_si512(a + i), _mm512_loadu_si512(b + i));
        s0 = _mm512_add_epi32(s0, d);
        d = dot64(type, _mm512_loadu_si512(a + i + 64), _mm512_loadu_si512(b + i + 64));
        s1 = _mm512_add_epi32(s1, d);
    }
    if (dim - i >= 64) {
        d = dot64(type, _mm512_loadu_si512(a + i), _mm512_loadu_si512(b + i));
        s0 = _mm512_add_epi32(s0, d);
        i += 64;
    }
    if (dim - i > 0) {
        d = dot64(type, load64_tail(a + i, dim - i), load64_tail(b + i, dim - i));
        s1 = _mm512_add_epi32(s1, d);
    }
    return (uint32_t)_mm512_reduce_add_epi32(_mm512_add_epi32(s0, s1));
}

static float l2_f32(const float *a, const float *b, uint32_t dim)
{
    return l2(ELEMENT_F32, a, ELEMENT_F32, b, dim);
}

static float ip_f32(const float *a, const float *b, uint32_t dim)
{
    return ip(ELEMENT_F32, a, ELEMENT_F32, b, dim);
}

static float cosine_f32(const float *a, const float *b, uint32_t dim)
{
    return cosine(ELEMENT_F32, a, b, dim);
}

static float norm2_f32(const float *a, uint32_t dim)
{
    return ip(ELEMENT_F32, a, ELEMENT_F32, a, dim);
}

static float l2_f16(const uint16_t *a, const uint16_t *b, uint32_t dim)
{
    return l2(ELEMENT_F16, a, ELEMENT_F16, b, dim);
}

static float ip_f16(const uint16_t *a, const uint16_t *b, uint32_t dim)
{
    return ip(ELEMENT_F16, a, ELEMENT_F16, b, dim);
}

static float cosine_f16(const uint16_t *a, const uint16_t *b, uint32_t dim)
{
    return cosine(ELEMENT_F16, a, b, dim);
}

static float norm2_f16(const uint16_t *a, uint32_t dim)
{
    return ip(ELEMENT_F16, a, ELEMENT_F16, a, dim);
}

static uint32_t l2_u8(const uint8_t *a, const uint8_t *b, uint32_t dim)
{
    return l2_small(ELEMENT_U8, a, b, dim);
}

static uint32_t ip_u8(const uint8_t *a, const uint8_t *b, uint32_t dim)
{
    return ip_small(ELEMENT_U8, a, b, dim);
}

static uint32_t norm2_u8(const uint8_t *a, uint32_t dim)
{
    return ip_small(ELEMENT_U8, a, a, dim);
}

static float cosine_u8(const uint8_t *a, const uint8_t *b, uint32_t dim)
{
    return cosine_from(ip_u8(a, b, dim), norm2_u8(a, dim), norm2_u8(b, dim));
}

static uint32_t l2_i8(const int8_t *a, const int8_t *b, uint32_t dim)
{
    return l2_small(ELEMENT_I8, a, b, dim);
}

static int32_t ip_i8(const int8_t *a, const int8_t *b, uint32_t dim)
{
    return (int32_t)ip_small(ELEMENT_I8, a, b, dim);
}

static uint32_t norm2_i8(const int8_t *a, uint32_t dim)
{
    return ip_small(ELEMENT_I8, a, a, dim);
}

static float cosine_i8(const int8_t *a, const int8_t *b, uint32_t dim)
{
    return cosine_from(ip_i8(a, b, dim), norm2_i8(a, dim), norm2_i8(b, dim));
}

static float l2_f32_f16(const float *query, const uint16_t *stored, uint32_t dim)
{
    return l2(ELEMENT_F32, query, ELEMENT_F16, stored, dim);
}

static float ip_f32_f16(const float *query, const uint16_t *stored, uint32_t dim)
{
    return ip(ELEMENT_F32, query, ELEMENT_F16, stored, dim);
}

static float l2_f32_u8(const float *query, const uint8_t *stored, uint32_t dim)
{
    return l2(ELEMENT_F32, query, ELEMENT_U8, stored, dim);
}

static float ip_f32_u8(const float *query, const uint8_t *stored, uint32_t dim)
{
    return ip(ELEMENT_F32, query, ELEMENT_U8, stored, dim);
}

static float l2_f32_i8(const float *query, const int8_t *stored, uint32_t dim)
{
    return l2(ELEMENT_F32, query, ELEMENT_I8, stored, dim);
}

static float ip_f32_i8(const float *query, const int8_t *stored, uint32_t dim)
{
    return ip(ELEMENT_F32, query, ELEMENT_I8, stored, dim);
}

static void f32_from_f16(const uint16_t *in, float *out, uint64_t count)
{
    uint8_t *to = (uint8_t *)out;
    uint64_t i = 0;

    for (; count - i >= 16; i += 16)
        _mm512_storeu_ps(to + 4 * i, load16(ELEMENT_F16, in, i));
    if (count - i > 0) {
        uint32_t n = (uint32_t)(count - i);

        _mm512_mask_storeu_ps(to + 4 * i, (__mmask16)((1u << n) - 1),
                              load_tail(ELEMENT_F16, in, i, n));
    }
}

static void f16_from_f32(const float *in, uint16_t *out, uint64_t count)
{
    uint8_t *to = (uint8_t *)out;
    uint64_t i = 0;
    __m256i halves;

    for (; count - i >= 16; i += 16) {
        halves = _mm512_cvtps_ph(load16(ELEMENT_F32, in, i), _MM_FROUND_TO_NEAREST_INT);
        _mm256_storeu_si256((__m256i *)(void *)(to + 2 * i), halves);
    }
    if (count - i > 0) {
        uint32_t n = (uint32_t)(count - i);

        halves = _mm512_cvtps_ph(load_tail(ELEMENT_F32, in, i, n), _MM_FROUND_TO_NEAREST_INT);
        _mm256_mask_storeu_epi16(to + 2 * i, (__mmask16)((1u << n) - 1), halves);
    }
}

const struct distance_kernels distance_avx512_kernels = {
    .name = "avx512",
    .l2_f32 = l2_f32,
    .ip_f32 = ip_f32,
    .cosine_f32 = cosine_f32,
    .norm2_f32 = norm2_f32,
    .l2_f16 = l2_f16,
    .ip_f16 = ip_f16,
    .cosine_f16 = cosine_f16,
    .norm2_f16 = norm2_f16,
    .l2_u8 = l2_u8,
    .ip_u8 = ip_u8,
    .cosine_u8 = cosine_u8,
    .norm2_u8 = norm2_u8,
    .l2_i8 = l2_i8,
    .ip_i8 = ip_i8,
    .cosine_i8 = cosine_i8,
    .norm2_i8 = norm2_i8,
    .l2_f32_f16 = l2_f32_f16,
    .ip_f32_f16 = ip_f32_f16,
    .l2_f32_u8 = l2_f32_u8,
    .ip_f32_u8 = ip_f32_u8,
    .l2_f32_i8 = l2_f32_i8,
    .ip_f32_i8 = ip_f32_i8,
    .f32_from_f16 = f32_from_f16,
    .f16_from_f32 = f16_from_f32,
};
