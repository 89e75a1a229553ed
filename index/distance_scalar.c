/* How it works: the definition of every kernel in plain C. One body per formula reads its operands
 * through element(), whose type is a constant at each call, so that after inlining each kernel is a
 * tight loop of its own. Sums run over 16 partial sums (distance.h has the order): more exact than
 * one running sum at thousands of dimensions, and a shape any compiler can vectorise. */
#include "index/distance.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

#include "index/element.h"

#define LANES 16u

#define INLINE static inline __attribute__((always_inline))

INLINE float float_from_bits(uint32_t bits)
{
    float value;

    memcpy(&value, &bits, sizeof(value));
    return value;
}

INLINE uint32_t bits_from_float(float value)
{
    uint32_t bits;

    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

INLINE float float_from_half(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    uint32_t exponent = (half >> 10) & 0x1fu;
    uint32_t mantissa = half & 0x3ffu;

    if (exponent == 0x1f) {
        if (mantissa != 0)
            mantissa |= 0x200u; /* quiet, as the hardware does */
        return float_from_bits(sign | 0x7f800000u | mantissa << 13);
    }
    if (exponent == 0) /* zero or denormal: mantissa * 2^-24 is exact in a float */
        return float_from_bits(sign | bits_from_float((float)mantissa * 0x1p-24f));
    return float_from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

INLINE uint16_t half_from_float(float value)
{
    uint32_t bits = bits_from_float(value);
    uint16_t sign = (uint16_t)((bits >> 16) & 0x8000u);
    uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t kept, rest, halfway;

    if (magnitude > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
    if (magnitude >= 0x477ff000u) /* 65520: half way from the largest half to the next */
        return (uint16_t)(sign | 0x7c00u);
    if (magnitude >= 0x38800000u) { /* 2^-14: a normal half; a carry may move the exponent up */
        kept = (magnitude - 0x38000000u) >> 13;
        rest = magnitude & 0x1fffu;
        halfway = 0x1000u;
    } else if (magnitude >= 0x33000000u) {        /* 2^-25: rounds to a denormal half, or to zero */
        uint32_t shift = 126 - (magnitude >> 23); /* 14..24 */
        uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;

        kept = mantissa >> shift;
        rest = mantissa & ((1u << shift) - 1);
        halfway = 1u << (shift - 1);
    } else {
        return sign;
    }
    if (rest > halfway || (rest == halfway && (kept & 1)))
        kept++;
    return (uint16_t)(sign | kept);
}

/* Element i as a float. Pointers may be unaligned, hence memcpy. */
INLINE float element(enum element_type type, const void *base, size_t i)
{
    const uint8_t *bytes = base;
    uint16_t half;
    float value;

    switch (type) {
    case ELEMENT_F32:
        memcpy(&value, bytes + 4 * i, sizeof(value));
        return value;
    case ELEMENT_F16:
        memcpy(&half, bytes + 2 * i, sizeof(half));
        return float_from_half(half);
    case ELEMENT_I8:
        return (float)((const int8_t *)base)[i];
    default:
        return (float)bytes[i];
    }
}

/* Into a local array first: the sums' loop is then one that gcc vectorises at -O2. */
INLINE void load_lanes(enum element_type type, const void *base, size_t i, float *out)
{
    if (type == ELEMENT_F32) {
        memcpy(out, (const uint8_t *)base + 4 * i, LANES * sizeof(*out));
        return;
    }
    for (uint32_t j = 0; j < LANES; j++)
        out[j] = element(type, base, i + j);
}

INLINE float fold(float *sums)
{
    for (uint32_t width = LANES / 2; width > 0; width /= 2) {
        for (uint32_t j = 0; j < width; j++)
            sums[j] += sums[j + width];
    }
    return sums[0];
}

INLINE float l2(enum element_type type_a, const void *a, enum element_type type_b, const void *b,
                uint32_t dim)
{
    float sums[LANES] = {0};
    uint32_t i = 0;

    for (; dim - i >= LANES; i += LANES) {
        float x[LANES], y[LANES];

        load_lanes(type_a, a, i, x);
        load_lanes(type_b, b, i, y);
        for (uint32_t j = 0; j < LANES; j++)
            sums[j] += (x[j] - y[j]) * (x[j] - y[j]);
    }
    for (uint32_t j = 0; i + j < dim; j++) {
        float d = element(type_a, a, i + j) - element(type_b, b, i + j);
        sums[j] += d * d;
    }
    return fold(sums);
}

INLINE float ip(enum element_type type_a, const void *a, enum element_type type_b, const void *b,
                uint32_t dim)
{
    float sums[LANES] = {0};
    uint32_t i = 0;

    for (; dim - i >= LANES; i += LANES) {
        float x[LANES], y[LANES];

        load_lanes(type_a, a, i, x);
        load_lanes(type_b, b, i, y);
        for (uint32_t j = 0; j < LANES; j++)
            sums[j] += x[j] * y[j];
    }
    for (uint32_t j = 0; i + j < dim; j++)
        sums[j] += element(type_a, a, i + j) * element(type_b, b, i + j);
    return fold(sums);
}

/* In double, because the product of two norms leaves a float's range long before they do. */
INLINE float cosine_from(double dot, double norm2_a, double norm2_b)
{
    if (norm2_a == 0 || norm2_b == 0)
        return 0;
    return (float)(dot / sqrt(norm2_a * norm2_b));
}

INLINE float cosine(enum element_type type, const void *a, const void *b, uint32_t dim)
{
    return cosine_from(ip(type, a, type, b, dim), ip(type, a, type, a, dim),
                       ip(type, b, type, b, dim));
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
    uint32_t sum = 0;

    for (uint32_t i = 0; i < dim; i++) {
        int32_t d = (int32_t)a[i] - (int32_t)b[i];
        sum += (uint32_t)(d * d);
    }
    return sum;
}

static uint32_t ip_u8(const uint8_t *a, const uint8_t *b, uint32_t dim)
{
    uint32_t sum = 0;

    for (uint32_t i = 0; i < dim; i++)
        sum += (uint32_t)a[i] * b[i];
    return sum;
}

static uint32_t norm2_u8(const uint8_t *a, uint32_t dim)
{
    return ip_u8(a, a, dim);
}

static float cosine_u8(const uint8_t *a, const uint8_t *b, uint32_t dim)
{
    return cosine_from(ip_u8(a, b, dim), norm2_u8(a, dim), norm2_u8(b, dim));
}

static uint32_t l2_i8(const int8_t *a, const int8_t *b, uint32_t dim)
{
    uint32_t sum = 0;

    for (uint32_t i = 0; i < dim; i++) {
        int32_t d = (int32_t)a[i] - (int32_t)b[i];
        sum += (uint32_t)(d * d);
    }
    return sum;
}

static int32_t ip_i8(const int8_t *a, const int8_t *b, uint32_t dim)
{
    int32_t sum = 0;

    for (uint32_t i = 0; i < dim; i++)
        sum += (int32_t)a[i] * (int32_t)b[i];
    return sum;
}

static uint32_t norm2_i8(const int8_t *a, uint32_t dim)
{
    return (uint32_t)ip_i8(a, a, dim);
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
    for (uint64_t i = 0; i < count; i++) {
        float value = element(ELEMENT_F16, in, i);
        memcpy((uint8_t *)out + 4 * i, &value, sizeof(value));
    }
}

static void f16_from_f32(const float *in, uint16_t *out, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++) {
        uint16_t half = half_from_float(element(ELEMENT_F32, in, i));
        memcpy((uint8_t *)out + 2 * i, &half, sizeof(half));
    }
}

const struct distance_kernels distance_scalar_kernels = {
    .name = "scalar",
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
