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
#define ROWS 4u           /* codes estimated side by side: their additions overlap */
#define PREFETCH_ROWS 12u /* a row from memory takes about as long as this many estimates */
#define LINE_BYTES 64u

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

INLINE void prefetch_row(const uint8_t *row, uint64_t row_bytes)
{
    for (uint64_t at = 0; at < row_bytes; at += LINE_BYTES)
        __builtin_prefetch(row + at);
    __builtin_prefetch(row + row_bytes - 1); /* an unaligned row may end one line later */
}

INLINE float adc_one(const float *table, uint32_t chunk_count, const uint8_t *row)
{
    float s[4] = {0};
    uint32_t c = 0;

    for (; chunk_count - c >= 4; c += 4) {
        for (uint32_t j = 0; j < 4; j++)
            s[j] += table[(size_t)(c + j) * 256 + row[c + j]];
    }
    for (uint32_t j = 0; c + j < chunk_count; j++)
        s[j] += table[(size_t)(c + j) * 256 + row[c + j]];
    return (s[0] + s[1]) + (s[2] + s[3]);
}

/* Rows side by side walk the table together, so each stretch of it is fetched once for all. The
 * loops over rows are unrolled to keep the sums in registers, without which it is half as fast. */
INLINE void adc_group(const float *table, uint32_t chunk_count, const uint8_t *const *row,
                      float *out)
{
    float s[ROWS][4] = {{0}};
    uint32_t c = 0;

    for (; chunk_count - c >= 4; c += 4) {
        const float *part = table + (size_t)c * 256;

#pragma GCC unroll 4
        for (uint32_t r = 0; r < ROWS; r++) {
            uint32_t code;

            memcpy(&code, row[r] + c, sizeof(code));
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
            code = __builtin_bswap32(code);
#endif
            s[r][0] += part[code & 0xff];
            s[r][1] += part[256 + ((code >> 8) & 0xff)];
            s[r][2] += part[512 + ((code >> 16) & 0xff)];
            s[r][3] += part[768 + (code >> 24)];
        }
    }
    for (uint32_t j = 0; c + j < chunk_count; j++) {
#pragma GCC unroll 4
        for (uint32_t r = 0; r < ROWS; r++)
            s[r][j] += table[(size_t)(c + j) * 256 + row[r][c + j]];
    }
#pragma GCC unroll 4
    for (uint32_t r = 0; r < ROWS; r++)
        out[r] = (s[r][0] + s[r][1]) + (s[r][2] + s[r][3]);
}

/* Not static: gathers measured slower than these loads, so the other tables take it. */
void distance_scalar_adc_rows(const float *table, uint32_t chunk_count, const uint8_t *codes,
                              uint64_t code_stride, const uint32_t *rows, uint32_t count,
                              float *out)
{
    uint32_t i = 0;

    for (uint32_t p = 0; chunk_count > 0 && p < PREFETCH_ROWS && p < count; p++)
        prefetch_row(codes + rows[p] * code_stride, chunk_count);
    for (; count - i >= ROWS; i += ROWS) {
        const uint8_t *row[ROWS];

        for (uint32_t r = 0; r < ROWS; r++) {
            if (chunk_count > 0 && count - i > PREFETCH_ROWS + r)
                prefetch_row(codes + rows[i + PREFETCH_ROWS + r] * code_stride, chunk_count);
            row[r] = codes + rows[i + r] * code_stride;
        }
        adc_group(table, chunk_count, row, out + i);
    }
    for (; i < count; i++)
        out[i] = adc_one(table, chunk_count, codes + rows[i] * code_stride);
}

static void adc4_rows(const float *table, uint32_t dim, const uint8_t *codes, uint64_t code_stride,
                      const uint32_t *rows, uint32_t count, float *out)
{
    uint32_t row_bytes = dim / 2 + dim % 2;

    for (uint32_t i = 0; i < count; i++) {
        const uint8_t *row = codes + rows[i] * code_stride;
        float s[4] = {0};
        uint32_t d = 0;

        if (dim > 0 && count - i > PREFETCH_ROWS)
            prefetch_row(codes + rows[i + PREFETCH_ROWS] * code_stride, row_bytes);
        for (; dim - d >= 4; d += 4) {
            const float *part = table + (size_t)d * 16;
            uint32_t low = row[d / 2], high = row[d / 2 + 1];

            s[0] += part[low & 15];
            s[1] += part[16 + (low >> 4)];
            s[2] += part[32 + (high & 15)];
            s[3] += part[48 + (high >> 4)];
        }
        for (uint32_t j = 0; d + j < dim; j++) {
            uint32_t nibble = (uint32_t)row[(d + j) / 2] >> (4 * (j % 2)) & 15;
            s[j] += table[(size_t)(d + j) * 16 + nibble];
        }
        out[i] = (s[0] + s[1]) + (s[2] + s[3]);
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
    .adc_rows = distance_scalar_adc_rows,
    .adc4_rows = adc4_rows,
};
