/* distance: the inner loops over vectors, one table of functions per instruction set.
 *
 * dim counts elements, 1..DISTANCE_DIM_MAX (0 is allowed and gives 0). Vectors need no alignment,
 * and no kernel reads a byte past its operands. Halves are IEEE binary16 as uint16_t.
 *
 * l2_* is the squared distance, ip_* the inner product, cosine_* the similarity
 * ip(a,b) / sqrt(norm2(a) * norm2(b)), which is 0 when a norm is zero (or so small that its square
 * vanishes in a float). f32_<type> takes a float query first and a stored vector second.
 *
 * The scalar table says what is right:
 * - l2, ip, norm2 and cosine of i8 and u8 are exact integers (cosine: one division of exact
 *   integers in double, rounded to float once): every table gives the same bits.
 * - conversions are exact or rounded to nearest even: every table gives the same bits.
 * - float sums: term i is added, in float, to partial sum i mod 16; then partial j takes up partial
 *   j + 8 for j < 8, j + 4 for j < 4, j + 2 for j < 2, and 1. The other tables use more partial
 *   sums and fused multiply-add: within 1e-5 of the sum of the terms' absolute values (cosine:
 *   within 1e-5).
 *
 * Pure functions without state: any thread. */
#ifndef ANND_INDEX_DISTANCE_H
#define ANND_INDEX_DISTANCE_H

#include <stdint.h>

/* So that 255 * 255 * dim fits 32 bits, signed too. */
#define DISTANCE_DIM_MAX 32768u

/* Every set contains the one before. ISA_AVX512 asks for F, BW, VL and DQ. */
enum isa { ISA_SCALAR, ISA_AVX2, ISA_AVX512, ISA_AVX512_VNNI, ISA_COUNT };

struct distance_kernels {
    const char *name; /* "scalar", "avx2", "avx512", "avx512vnni" */

    float (*l2_f32)(const float *a, const float *b, uint32_t dim);
    float (*ip_f32)(const float *a, const float *b, uint32_t dim);
    float (*cosine_f32)(const float *a, const float *b, uint32_t dim);
    float (*norm2_f32)(const float *a, uint32_t dim); /* ip(a,a) */

    float (*l2_f16)(const uint16_t *a, const uint16_t *b, uint32_t dim);
    float (*ip_f16)(const uint16_t *a, const uint16_t *b, uint32_t dim);
    float (*cosine_f16)(const uint16_t *a, const uint16_t *b, uint32_t dim);
    float (*norm2_f16)(const uint16_t *a, uint32_t dim);

    uint32_t (*l2_u8)(const uint8_t *a, const uint8_t *b, uint32_t dim);
    uint32_t (*ip_u8)(const uint8_t *a, const uint8_t *b, uint32_t dim);
    float (*cosine_u8)(const uint8_t *a, const uint8_t *b, uint32_t dim);
    uint32_t (*norm2_u8)(const uint8_t *a, uint32_t dim);

    uint32_t (*l2_i8)(const int8_t *a, const int8_t *b, uint32_t dim);
    int32_t (*ip_i8)(const int8_t *a, const int8_t *b, uint32_t dim);
    float (*cosine_i8)(const int8_t *a, const int8_t *b, uint32_t dim);
    uint32_t (*norm2_i8)(const int8_t *a, uint32_t dim);

    float (*l2_f32_f16)(const float *query, const uint16_t *stored, uint32_t dim);
    float (*ip_f32_f16)(const float *query, const uint16_t *stored, uint32_t dim);
    float (*l2_f32_u8)(const float *query, const uint8_t *stored, uint32_t dim);
    float (*ip_f32_u8)(const float *query, const uint8_t *stored, uint32_t dim);
    float (*l2_f32_i8)(const float *query, const int8_t *stored, uint32_t dim);
    float (*ip_f32_i8)(const float *query, const int8_t *stored, uint32_t dim);

    /* Exact. A signalling NaN comes out quiet. */
    void (*f32_from_f16)(const uint16_t *in, float *out, uint64_t count);
    /* To nearest even, denormals included; 65520 and above become infinity; a NaN comes out quiet
     * with the upper bits of its payload. */
    void (*f16_from_f32)(const float *in, uint16_t *out, uint64_t count);
};

/* The table for one instruction set; NULL when this CPU, operating system or build lacks it.
 * ISA_SCALAR is always there. */
const struct distance_kernels *distance_kernels_for(enum isa isa);

/* The table for this machine, chosen at the first call and the same ever after: the highest set
 * there is, or the one named by the environment variable ANND_ISA (scalar, avx2, avx512,
 * avx512vnni). A name that is unknown or that the machine lacks is ignored; ->name tells. */
const struct distance_kernels *distance_kernels_best(void);

/* The tables as built, for distance.c: calling one the CPU lacks ends in an illegal instruction.
 * The VNNI table holds the integer kernels only; distance.c lays it over the AVX-512 one. */
extern const struct distance_kernels distance_scalar_kernels;
extern const struct distance_kernels distance_avx2_kernels;
extern const struct distance_kernels distance_avx512_kernels;
extern const struct distance_kernels distance_avx512vnni_kernels;

#endif
