/* Each loop is written once, in code_kernels_body.inc, on vectors of as many floats as the
 * instruction set has in a register, and compiled here for each set. Wider vectors than registers
 * would do in clang, but gcc takes them apart through memory. The compiler's own loop vectoriser is
 * not relied on: at -O2 it leaves half of these loops alone. Nor on its fusing of products and
 * sums, which the build may forbid: the wide versions ask for it by name.
 *
 * The nearest-centroid loop holds four points at a time, so one load of a column serves four
 * products, and keeps per lane the least score and its column; the lanes meet once per point. */
#include "index/code_kernels.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "index/distance.h"

#define POINTS 4u
#define LINE_HALVES 32u /* a cache line */
#define ROWS_AHEAD 4u   /* of a matrix, fetched before they are needed */

#define VECTORS(lanes)                                                                             \
    typedef float f32x##lanes __attribute__((vector_size(lanes * 4)));                             \
    typedef int32_t i32x##lanes __attribute__((vector_size(lanes * 4)));                           \
    typedef float f32x##lanes##_loose                                                              \
        __attribute__((vector_size(lanes * 4), aligned(4), may_alias));                            \
    typedef uint16_t u16x##lanes##_loose                                                           \
        __attribute__((vector_size(lanes * 2), aligned(2), may_alias));

VECTORS(4)
VECTORS(8)
VECTORS(16)

static inline f32x4 halves_portable(const uint16_t *p)
{
    i32x4 bits = __builtin_convertvector(*(const u16x4_loose *)p, i32x4);
    f32x4 size = (f32x4)((bits & 0x7fff) << 13) * 0x1p112f;

    return (f32x4)((i32x4)size | (i32x4)((bits & 0x8000) << 16));
}

/* The portable version: SSE2 on x86-64, NEON on AArch64, whatever the compiler makes elsewhere. */
#define VERSION(function) function##_portable
#define VERSION_NAME "portable"
#define ATTRIBUTE
#define LANES 4u
#define f32v f32x4
#define i32v i32x4
#define f32v_loose f32x4_loose
/* Exponent and fraction moved into their places in a float, and the exponents' bases made equal by
 * a power of two: exact, numbers below the least normal half included. */
#define LOAD_HALVES(p) halves_portable(p)
#define BETTER(s, best, id, best_id)                                                               \
    do {                                                                                           \
        i32x4 less_ = (s) < (best);                                                                \
        (best) = (f32x4)((less_ & (i32x4)(s)) | (~less_ & (i32x4)(best)));                         \
        (best_id) = (less_ & (id)) | (~less_ & (best_id));                                         \
    } while (0)
#define ADD_PRODUCT(sum, v, w) ((sum) += (v) * (w))
#define ADD_SCALED(sum, x, v) ((sum) += (x) * (v))
#define SUBTRACT_SCALED(sum, x, v) ((sum) -= (x) * (v))
#include "index/code_kernels_body.inc"

#if defined(__x86_64__)

#define VERSION(function) function##_avx2
#define VERSION_NAME "avx2"
#define ATTRIBUTE __attribute__((target("avx2,fma,f16c")))
#define LANES 8u
#define f32v f32x8
#define i32v i32x8
#define f32v_loose f32x8_loose
#define LOAD_HALVES(p) ((f32x8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p))))
#define BETTER(s, best, id, best_id)                                                               \
    do {                                                                                           \
        __m256 less_ = _mm256_cmp_ps((__m256)(s), (__m256)(best), _CMP_LT_OQ);                     \
        (best) = (f32x8)_mm256_blendv_ps((__m256)(best), (__m256)(s), less_);                      \
        (best_id) = (i32x8)_mm256_blendv_ps((__m256)(best_id), (__m256)(id), less_);               \
    } while (0)
#define ADD_PRODUCT(sum, v, w)                                                                     \
    ((sum) = (f32x8)_mm256_fmadd_ps((__m256)(v), (__m256)(w), (__m256)(sum)))
#define ADD_SCALED(sum, x, v)                                                                      \
    ((sum) = (f32x8)_mm256_fmadd_ps(_mm256_set1_ps(x), (__m256)(v), (__m256)(sum)))
#define SUBTRACT_SCALED(sum, x, v)                                                                 \
    ((sum) = (f32x8)_mm256_fnmadd_ps(_mm256_set1_ps(x), (__m256)(v), (__m256)(sum)))
#include "index/code_kernels_body.inc"

#define VERSION(function) function##_avx512
#define VERSION_NAME "avx512"
#define ATTRIBUTE __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")))
#define LANES 16u
#define f32v f32x16
#define i32v i32x16
#define f32v_loose f32x16_loose
#define LOAD_HALVES(p) ((f32x16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p))))
#define BETTER(s, best, id, best_id)                                                               \
    do {                                                                                           \
        __mmask16 less_ = _mm512_cmp_ps_mask((__m512)(s), (__m512)(best), _CMP_LT_OQ);             \
        (best) = (f32x16)_mm512_mask_blend_ps(less_, (__m512)(best), (__m512)(s));                 \
        (best_id) = (i32x16)_mm512_mask_blend_epi32(less_, (__m512i)(best_id), (__m512i)(id));     \
    } while (0)
#define ADD_PRODUCT(sum, v, w)                                                                     \
    ((sum) = (f32x16)_mm512_fmadd_ps((__m512)(v), (__m512)(w), (__m512)(sum)))
#define ADD_SCALED(sum, x, v)                                                                      \
    ((sum) = (f32x16)_mm512_fmadd_ps(_mm512_set1_ps(x), (__m512)(v), (__m512)(sum)))
#define SUBTRACT_SCALED(sum, x, v)                                                                 \
    ((sum) = (f32x16)_mm512_fnmadd_ps(_mm512_set1_ps(x), (__m512)(v), (__m512)(sum)))
#include "index/code_kernels_body.inc"

#endif

const struct code_kernels *code_kernels_for(enum isa isa)
{
    if (!distance_kernels_for(isa))
        return NULL;
#if defined(__x86_64__)
    if (isa >= ISA_AVX512)
        return &kernels_avx512;
    if (isa >= ISA_AVX2)
        return &kernels_avx2;
#endif
    return &kernels_portable;
}

const struct code_kernels *code_kernels_best(void)
{
    const struct distance_kernels *chosen = distance_kernels_best();

    for (enum isa isa = ISA_COUNT; isa-- > ISA_SCALAR;) {
        if (distance_kernels_for(isa) == chosen)
            return code_kernels_for(isa);
    }
    return &kernels_portable;
}
