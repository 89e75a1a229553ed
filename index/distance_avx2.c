/* How it works: eight floats or 32 small integers at a time, for CPUs with AVX2, FMA and F16C.
 *
 * Float kernels are one body per formula; load8() turns eight elements of any type into floats, and
 * its type is a constant at each call, so inlining leaves one loop per kernel. Four accumulators
 * hide the latency of fused multiply-add. A tail is read with a mask or in pieces that overlap,
 * never past its end; the lanes beyond it are zero in both operands and add nothing.
 * Integer kernels work on 32 bytes; the last block starts before the end, overlapping the one
 * before, with the bytes already counted masked to zero. vpmaddwd takes 16-bit pairs into 32 bits,
 * exact up to DISTANCE_DIM_MAX. */
#include "index/distance.h"

#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "index/element.h"

#define INLINE static inline __attribute__((always_inline))

/* Read from byte n on, it is a mask of 32 bytes that keeps the last n. */
static const uint8_t sliding_mask[64] = {
    0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,
    0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,
    255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255,
    255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255,
};

INLINE __m256 load8(enum element_type type, const void *base, size_t i)
{
    const uint8_t *bytes = base;

    switch (type) {
    case ELEMENT_F32:
        return _mm256_loadu_ps((const float *)(const void *)(bytes + 4 * i));
    case ELEMENT_F16:
        return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(bytes + 2 * i)));
    case ELEMENT_I8:
        return _mm256_cvtepi32_ps(
            _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(bytes + i))));
    default:
        return _mm256_cvtepi32_ps(
            _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(bytes + i))));
    }
}

/* n bytes, 1..7, zero beyond: two reads that may overlap in equal bytes. */
INLINE uint64_t bytes_tail(const uint8_t *p, uint32_t n)
{
    uint32_t low, high;

    if (n >= 4) {
        memcpy(&low, p, 4);
        memcpy(&high, p + n - 4, 4);
        return low | (uint64_t)high << (8 * (n - 4));
    }
    return p[0] | (uint64_t)p[n / 2] << (8 * (n / 2)) | (uint64_t)p[n - 1] << (8 * (n - 1));
}

/* n halves, 1..7, zero beyond. */
INLINE __m128i halves_tail(const uint8_t *p, uint32_t n)
{
    uint64_t low, high = 0;
    uint16_t first, middle, last;

    if (n >= 4) {
        memcpy(&low, p, 8);
        if (n > 4) {
            memcpy(&high, p + 2 * (n - 4), 8);
            high >>= 16 * (8 - n);
        }
    } else {
        memcpy(&first, p, 2);
        memcpy(&middle, p + 2 * (n / 2), 2);
        memcpy(&last, p + 2 * (n - 1), 2);
        low = first | (uint64_t)middle << (16 * (n / 2)) | (uint64_t)last << (16 * (n - 1));
    }
    return _mm_set_epi64x((long long)high, (long long)low);
}

/* The elements i .. i + n - 1, n 1..7, and zeros. */
INLINE __m256 load_tail(enum element_type type, const void *base, size_t i, uint32_t n)
{
    const uint8_t *bytes = base;
    __m256i mask;

    switch (type) {
    case ELEMENT_F32:
        mask = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n),
                                  _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
        return _mm256_maskload_ps((const float *)(const void *)(bytes + 4 * i), mask);
    case ELEMENT_F16:
        return _mm256_cvtph_ps(halves_tail(bytes + 2 * i, n));
    case ELEMENT_I8:
        return _mm256_cvtepi32_ps(
            _mm256_cvtepi8_epi32(_mm_cvtsi64_si128((long long)bytes_tail(bytes + i, n))));
    default:
        return _mm256_cvtepi32_ps(
            _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)bytes_tail(bytes + i, n))));
    }
}

INLINE float sum_f32(__m256 v)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));

    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    s = _mm_add_ss(s, _mm_movehdup_ps(s));
    return _mm_cvtss_f32(s);
}

INLINE uint32_t sum_u32(__m256i v)
{
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));

    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
    return (uint32_t)_mm_cvtsi128_si32(s);
}

INLINE __m256 l2_step(__m256 a, __m256 b, __m256 sum)
{
    __m256 d = _mm256_sub_ps(a, b);

    return _mm256_fmadd_ps(d, d, sum);
}

INLINE float l2(enum element_type type_a, const void *a, enum element_type type_b, const void *b,
                uint32_t dim)
{
    __m256 s0 = _mm256_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
    uint32_t i = 0;

    for (; dim - i >= 32; i += 32) {
        s0 = l2_step(load8(type_a, a, i), load8(type_b, b, i), s0);
        s1 = l2_step(load8(type_a, a, i + 8), load8(type_b, b, i + 8), s1);
        s2 = l2_step(load8(type_a, a, i + 16), load8(type_b, b, i + 16), s2);
        s3 = l2_step(load8(type_a, a, i + 24), load8(type_b, b, i + 24), s3);
    }
    for (; dim - i >= 8; i += 8)
        s0 = l2_step(load8(type_a, a, i), load8(type_b, b, i), s0);
    if (dim - i > 0)
        s1 = l2_step(load_tail(type_a, a, i, dim - i), load_tail(type_b, b, i, dim - i), s1);
    return sum_f32(_mm256_add_ps(_mm256_add_ps(s0, s1), _mm256_add_ps(s2, s3)));
}

INLINE float ip(enum element_type type_a, const void *a, enum element_type type_b, const void *b,
                uint32_t dim)
{
    __m256 s0 = _mm256_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
    uint32_t i = 0;

    for (; dim - i >= 32; i += 32) {
        s0 = _mm256_fmadd_ps(load8(type_a, a, i), load8(type_b, b, i), s0);
        s1 = _mm256_fmadd_ps(load8(type_a, a, i + 8), load8(type_b, b, i + 8), s1);
        s2 = _mm256_fmadd_ps(load8(type_a, a, i + 16), load8(type_b, b, i + 16), s2);
        s3 = _mm256_fmadd_ps(load8(type_a, a, i + 24), load8(type_b, b, i + 24), s3);
    }
    for (; dim - i >= 8; i += 8)
        s0 = _mm256_fmadd_ps(load8(type_a, a, i), load8(type_b, b, i), s0);
    if (dim - i > 0)
        s1 =
            _mm256_fmadd_ps(load_tail(type_a, a, i, dim - i), load_tail(type_b, b, i, dim - i), s1);
    return sum_f32(_mm256_add_ps(_mm256_add_ps(s0, s1), _mm256_add_ps(s2, s3)));
}

INLINE float cosine_from(double dot, double norm2_a, double norm2_b)
{
    if (norm2_a == 0 || norm2_b == 0)
        return 0;
    return (float)(dot / sqrt(norm2_a * norm2_b));
}

INLINE float cosine(enum element_type type, const void *a, const void *b, uint32_t dim)
{
    __m256 ab0 = _mm256_setzero_ps(), aa0 = ab0, bb0 = ab0, ab1 = ab0, aa1 = ab0, bb1 = ab0;
    __m256 x, y;
    uint32_t i = 0;

    for (; dim - i >= 16; i += 16) {
        x = load8(type, a, i);
        y = load8(type, b, i);
        ab0 = _mm256_fmadd_ps(x, y, ab0);
        aa0 = _mm256_fmadd_ps(x, x, aa0);
        bb0 = _mm256_fmadd_ps(y, y, bb0);
        x = load8(type, a, i + 8);
        y = load8(type, b, i + 8);
        ab1 = _mm256_fmadd_ps(x, y, ab1);
        aa1 = _mm256_fmadd_ps(x, x, aa1);
        bb1 = _mm256_fmadd_ps(y, y, bb1);
    }
    if (dim - i >= 8) {
        x = load8(type, a, i);
        y = load8(type, b, i);
        ab0 = _mm256_fmadd_ps(x, y, ab0);
        aa0 = _mm256_fmadd_ps(x, x, aa0);
        bb0 = _mm256_fmadd_ps(y, y, bb0);
        i += 8;
    }
    if (dim - i > 0) {
        x = load_tail(type, a, i, dim - i);
        y = load_tail(type, b, i, dim - i);
        ab1 = _mm256_fmadd_ps(x, y, ab1);
        aa1 = _mm256_fmadd_ps(x, x, aa1);
        bb1 = _mm256_fmadd_ps(y, y, bb1);
    }
    return cosine_from(sum_f32(_mm256_add_ps(ab0, ab1)), sum_f32(_mm256_add_ps(aa0, aa1)),
                       sum_f32(_mm256_add_ps(bb0, bb1)));
}

/* Products of 32 u8 or i8 pairs, summed in fours to eight 32-bit lanes. */
INLINE __m256i dot32(enum element_type type, __m256i a, __m256i b)
{
    const __m256i zero = _mm256_setzero_si256();
    __m256i a_low, a_high, b_low, b_high;

    if (type == ELEMENT_U8) {
        a_low = _mm256_unpacklo_epi8(a, zero);
        a_high = _mm256_unpackhi_epi8(a, zero);
        b_low = _mm256_unpacklo_epi8(b, zero);
        b_high = _mm256_unpackhi_epi8(b, zero);
    } else { /* each byte twice, then the upper copy brings its sign down */
        a_low = _mm256_srai_epi16(_mm256_unpacklo_epi8(a, a), 8);
        a_high = _mm256_srai_epi16(_mm256_unpackhi_epi8(a, a), 8);
        b_low = _mm256_srai_epi16(_mm256_unpacklo_epi8(b, b), 8);
        b_high = _mm256_srai_epi16(_mm256_unpackhi_epi8(b, b), 8);
    }
    return _mm256_add_epi32(_mm256_madd_epi16(a_low, b_low), _mm256_madd_epi16(a_high, b_high));
}

/* |a - b| fits a byte for both types: the larger minus the smaller, modulo 256. */
INLINE __m256i difference32(enum element_type type, __m256i a, __m256i b)
{
    if (type == ELEMENT_U8)
        return _mm256_sub_epi8(_mm256_max_epu8(a, b), _mm256_min_epu8(a, b));
    return _mm256_sub_epi8(_mm256_max_epi8(a, b), _mm256_min_epi8(a, b));
}

INLINE int32_t value_of(enum element_type type, uint8_t byte)
{
    return type == ELEMENT_U8 ? (int32_t)byte : (int32_t)(int8_t)byte;
}

INLINE __m256i load32(const uint8_t *p)
{
    return _mm256_loadu_si256((const __m256i *)(const void *)p);
}

/* Keeps the last n of 32 bytes, n 1..31. */
INLINE __m256i mask_last(uint32_t n)
{
    return load32(sliding_mask + n);
}

INLINE uint32_t l2_small(enum element_type type, const void *left, const void *right, uint32_t dim)
{
    const uint8_t *a = left, *b = right;
    __m256i s0 = _mm256_setzero_si256(), s1 = s0, d;
    uint32_t i = 0, sum = 0;

    if (dim < 32) {
        for (; i < dim; i++) {
            int32_t one = value_of(type, a[i]) - value_of(type, b[i]);
            sum += (uint32_t)(one * one);
        }
        return sum;
    }
    for (; dim - i >= 64; i += 64) {
        d = difference32(type, load32(a + i), load32(b + i));
        s0 = _mm256_add_epi32(s0, dot32(ELEMENT_U8, d, d));
        d = difference32(type, load32(a + i + 32), load32(b + i + 32));
        s1 = _mm256_add_epi32(s1, dot32(ELEMENT_U8, d, d));
    }
    if (dim - i >= 32) {
        d = difference32(type, load32(a + i), load32(b + i));
        s0 = _mm256_add_epi32(s0, dot32(ELEMENT_U8, d, d));
        i += 32;
    }
    if (dim - i > 0) {
        d = difference32(type, load32(a + dim - 32), load32(b + dim - 32));
        d = _mm256_and_si256(d, mask_last(dim - i));
        s1 = _mm256_add_epi32(s1, dot32(ELEMENT_U8, d, d));
    }
    return sum_u32(_mm256_add_epi32(s0, s1));
}

INLINE uint32_t ip_small(enum element_type type, const void *left, const void *right, uint32_t dim)
{
    const uint8_t *a = left, *b = right;
    __m256i s0 = _mm256_setzero_si256(), s1 = s0, last;
    uint32_t i = 0, sum = 0;

    if (dim < 32) {
        for (; i < dim; i++)
            sum += (uint32_t)(value_of(type, a[i]) * value_of(type, b[i]));
        return sum;
    }
    for (; dim - i >= 64; i += 64) {
        s0 = _mm256_add_epi32(s0, dot32(type, load32(a + i), load32(b + i)));
        s1 = _mm256_add_epi32(s1, dot32(type, load32(a + i + 32), load32(b + i + 32)));
    }
    if (dim - i >= 32) {
        s0 = _mm256_add_epi32(s0, dot32(type, load32(a + i), load32(b + i)));
        i += 32;
    }
    if (dim - i > 0) {
        last = _mm256_and_si256(load32(a + dim - 32), mask_last(dim - i));
        s1 = _mm256_add_epi32(s1, dot32(type, last, load32(b + dim - 32)));
    }
    return sum_u32(_mm256_add_epi32(s0, s1));
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

    for (; count - i >= 8; i += 8)
        _mm256_storeu_ps((float *)(void *)(to + 4 * i), load8(ELEMENT_F16, in, i));
    if (count - i > 0) {
        float tail[8];

        _mm256_storeu_ps(tail, load_tail(ELEMENT_F16, in, i, (uint32_t)(count - i)));
        memcpy(to + 4 * i, tail, 4 * (count - i));
    }
}

static void f16_from_f32(const float *in, uint16_t *out, uint64_t count)
{
    uint8_t *to = (uint8_t *)out;
    uint64_t i = 0;
    __m128i halves;

    for (; count - i >= 8; i += 8) {
        halves = _mm256_cvtps_ph(load8(ELEMENT_F32, in, i), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128((__m128i *)(void *)(to + 2 * i), halves);
    }
    if (count - i > 0) {
        halves = _mm256_cvtps_ph(load_tail(ELEMENT_F32, in, i, (uint32_t)(count - i)),
                                 _MM_FROUND_TO_NEAREST_INT);
        memcpy(to + 2 * i, &halves, 2 * (count - i));
    }
}

const struct distance_kernels distance_avx2_kernels = {
    .name = "avx2",
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
