/* Every kernel of every instruction set against the scalar table, and the scalar table against
 * sums in double or 64-bit integers written out here. Each operand ends with its malloc block, so a
 * sanitized build sees a read past the end; the offsets before it give every alignment. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "index/distance.h"
#include "index/element.h"
#include "storage/base/random.h"

#define SEED 20240611u
#define DIM_MAX 2100u
#define TOLERANCE 1e-5

/* One vector of elements of a type, at an offset from a 64-byte boundary and ending with its block.
 */
struct operand {
    uint8_t *block;
    uint8_t *data;
};

static void operand_init(struct operand *operand, size_t bytes, uint32_t misalignment)
{
    void *block = NULL;

    assert_int_equal(
        posix_memalign(&block, 64, misalignment + bytes > 0 ? misalignment + bytes : 1), 0);
    operand->block = block;
    operand->data = operand->block + misalignment;
}

static void operand_release(struct operand *operand)
{
    free(operand->block);
}

static float half_value(uint16_t half)
{
    int exponent = (half >> 10) & 31;
    float mantissa = (float)(half & 1023);
    float value;

    if (exponent == 31)
        value = (half & 1023) ? NAN : INFINITY;
    else if (exponent == 0)
        value = ldexpf(mantissa, -24);
    else
        value = ldexpf(mantissa + 1024, exponent - 25);
    return half & 0x8000 ? -value : value;
}

static double value_at(enum element_type type, const uint8_t *data, size_t i)
{
    float f32;
    uint16_t f16;

    switch (type) {
    case ELEMENT_F32:
        memcpy(&f32, data + 4 * i, 4);
        return f32;
    case ELEMENT_F16:
        memcpy(&f16, data + 2 * i, 2);
        return half_value(f16);
    case ELEMENT_I8:
        return (int8_t)data[i];
    default:
        return data[i];
    }
}

static void fill(struct random *random, enum element_type type, uint8_t *data, uint32_t dim)
{
    bool extreme = random_below(random, 8) == 0; /* only the ends of an integer's range */

    for (uint32_t i = 0; i < dim; i++) {
        float f32 = (random_float(random) * 2 - 1) * (random_below(random, 16) ? 1.0f : 100.0f);
        uint16_t f16;

        switch (type) {
        case ELEMENT_F32:
            memcpy(data + 4 * (size_t)i, &f32, 4);
            break;
        case ELEMENT_F16:
            f16 = (uint16_t)random_below(random, 0x10000);
            f16 &= 0xdfff; /* magnitudes below 2, denormals among them */
            memcpy(data + 2 * (size_t)i, &f16, 2);
            break;
        default:
            data[i] = (uint8_t)random_u64(random);
            if (extreme)
                data[i] = (data[i] & 1) ? (type == ELEMENT_I8 ? 0x80 : 0xff)
                                        : (type == ELEMENT_I8 ? 0x7f : 0x00);
        }
    }
}

enum formula { FORMULA_L2, FORMULA_IP, FORMULA_COSINE, FORMULA_NORM2 };

struct kernel {
    const char *name;
    enum formula formula;
    enum element_type type_a, type_b;
    bool exact; /* integers in, the same bits out */
};

static const struct kernel kernels[] = {
    {"l2_f32", FORMULA_L2, ELEMENT_F32, ELEMENT_F32, false},
    {"ip_f32", FORMULA_IP, ELEMENT_F32, ELEMENT_F32, false},
    {"cosine_f32", FORMULA_COSINE, ELEMENT_F32, ELEMENT_F32, false},
    {"norm2_f32", FORMULA_NORM2, ELEMENT_F32, ELEMENT_F32, false},
    {"l2_f16", FORMULA_L2, ELEMENT_F16, ELEMENT_F16, false},
    {"ip_f16", FORMULA_IP, ELEMENT_F16, ELEMENT_F16, false},
    {"cosine_f16", FORMULA_COSINE, ELEMENT_F16, ELEMENT_F16, false},
    {"norm2_f16", FORMULA_NORM2, ELEMENT_F16, ELEMENT_F16, false},
    {"l2_u8", FORMULA_L2, ELEMENT_U8, ELEMENT_U8, true},
    {"ip_u8", FORMULA_IP, ELEMENT_U8, ELEMENT_U8, true},
    {"cosine_u8", FORMULA_COSINE, ELEMENT_U8, ELEMENT_U8, true},
    {"norm2_u8", FORMULA_NORM2, ELEMENT_U8, ELEMENT_U8, true},
    {"l2_i8", FORMULA_L2, ELEMENT_I8, ELEMENT_I8, true},
    {"ip_i8", FORMULA_IP, ELEMENT_I8, ELEMENT_I8, true},
    {"cosine_i8", FORMULA_COSINE, ELEMENT_I8, ELEMENT_I8, true},
    {"norm2_i8", FORMULA_NORM2, ELEMENT_I8, ELEMENT_I8, true},
    {"l2_f32_f16", FORMULA_L2, ELEMENT_F32, ELEMENT_F16, false},
    {"ip_f32_f16", FORMULA_IP, ELEMENT_F32, ELEMENT_F16, false},
    {"l2_f32_u8", FORMULA_L2, ELEMENT_F32, ELEMENT_U8, false},
    {"ip_f32_u8", FORMULA_IP, ELEMENT_F32, ELEMENT_U8, false},
    {"l2_f32_i8", FORMULA_L2, ELEMENT_F32, ELEMENT_I8, false},
    {"ip_f32_i8", FORMULA_IP, ELEMENT_F32, ELEMENT_I8, false},
};
#define KERNEL_COUNT (sizeof(kernels) / sizeof(kernels[0]))

static double kernel_call(const struct distance_kernels *table, size_t kernel, const void *a,
                          const void *b, uint32_t dim)
{
    switch (kernel) {
    case 0:
        return table->l2_f32(a, b, dim);
    case 1:
        return table->ip_f32(a, b, dim);
    case 2:
        return table->cosine_f32(a, b, dim);
    case 3:
        return table->norm2_f32(a, dim);
    case 4:
        return table->l2_f16(a, b, dim);
    case 5:
        return table->ip_f16(a, b, dim);
    case 6:
        return table->cosine_f16(a, b, dim);
    case 7:
        return table->norm2_f16(a, dim);
    case 8:
        return table->l2_u8(a, b, dim);
    case 9:
        return table->ip_u8(a, b, dim);
    case 10:
        return table->cosine_u8(a, b, dim);
    case 11:
        return table->norm2_u8(a, dim);
    case 12:
        return table->l2_i8(a, b, dim);
    case 13:
        return table->ip_i8(a, b, dim);
    case 14:
        return table->cosine_i8(a, b, dim);
    case 15:
        return table->norm2_i8(a, dim);
    case 16:
        return table->l2_f32_f16(a, b, dim);
    case 17:
        return table->ip_f32_f16(a, b, dim);
    case 18:
        return table->l2_f32_u8(a, b, dim);
    case 19:
        return table->ip_f32_u8(a, b, dim);
    case 20:
        return table->l2_f32_i8(a, b, dim);
    default:
        return table->ip_f32_i8(a, b, dim);
    }
}

/* The formula in double, exact for integers; *scale is what the tolerance is relative to. */
static double reference(const struct kernel *kernel, const uint8_t *a, const uint8_t *b,
                        uint32_t dim, double *scale)
{
    double l2 = 0, ab = 0, aa = 0, bb = 0, magnitude = 0;

    for (uint32_t i = 0; i < dim; i++) {
        double x = value_at(kernel->type_a, a, i), y = value_at(kernel->type_b, b, i);

        l2 += (x - y) * (x - y);
        ab += x * y;
        aa += x * x;
        bb += y * y;
        magnitude += fabs(x * y);
    }
    switch (kernel->formula) {
    case FORMULA_L2:
        *scale = l2;
        return l2;
    case FORMULA_IP:
        *scale = magnitude;
        return ab;
    case FORMULA_NORM2:
        *scale = aa;
        return aa;
    default:
        *scale = 1;
        if (aa == 0 || bb == 0)
            return 0;
        return kernel->exact ? (float)(ab / sqrt(aa * bb)) : ab / sqrt(aa * bb);
    }
}

static void check_kernel(struct random *random, size_t k, uint32_t dim, uint32_t misalign_a,
                         uint32_t misalign_b)
{
    const struct kernel *kernel = &kernels[k];
    struct operand a, b;
    double want, scale, scalar = 0;

    operand_init(&a, element_bytes(kernel->type_a, dim), misalign_a);
    operand_init(&b, element_bytes(kernel->type_b, dim), misalign_b);
    fill(random, kernel->type_a, a.data, dim);
    fill(random, kernel->type_b, b.data, dim);
    want = reference(kernel, a.data, b.data, dim, &scale);
    for (int isa = ISA_SCALAR; isa < ISA_COUNT; isa++) {
        const struct distance_kernels *table = distance_kernels_for((enum isa)isa);
        double got, off;

        if (!table)
            continue; /* not on this CPU */
        got = kernel_call(table, k, a.data, b.data, dim);
        if (isa == ISA_SCALAR)
            scalar = got;
        off = fabs(got - want) > fabs(got - scalar) ? fabs(got - want) : fabs(got - scalar);
        if (kernel->exact ? off == 0 : off <= TOLERANCE * scale)
            continue;
        fail_msg("%s of %s, dim %u, alignments %u and %u, seed %u: got %.9g, scalar %.9g, "
                 "reference %.9g",
                 kernel->name, table->name, dim, misalign_a, misalign_b, SEED, got, scalar, want);
    }
    operand_release(&a);
    operand_release(&b);
}

static void test_override_picks_the_named_table_and_ignores_an_unknown_name(void **state)
{
    static const char *const names[] = {"scalar", "AVX2", "avx512", "avx512vnni", "mmx"};

    (void)state;
    /* In children, because the choice is made once a process; this test runs before any other. */
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        int status;
        pid_t child = fork();

        assert_true(child >= 0);
        if (child == 0) {
            const struct distance_kernels *best, *want = NULL;

            setenv("ANND_ISA", names[i], 1);
            best = distance_kernels_best();
            for (int isa = 0; isa < ISA_COUNT; isa++) {
                const struct distance_kernels *table = distance_kernels_for((enum isa)isa);
                if (table)
                    want = table;
            }
            if (i < ISA_COUNT && distance_kernels_for((enum isa)i))
                want = distance_kernels_for((enum isa)i);
            _exit(best == want ? 0 : 1);
        }
        assert_int_equal(waitpid(child, &status, 0), child);
        if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
            fail_msg("ANND_ISA=%s chose another table", names[i]);
    }
}

static void test_kernels_agree_with_scalar_at_every_length(void **state)
{
    struct random random;

    (void)state;
    random_init(&random, SEED, 1);
    for (uint32_t dim = 0; dim <= DIM_MAX; dim++) {
        for (size_t k = 0; k < KERNEL_COUNT; k++)
            check_kernel(&random, k, dim, (uint32_t)random_below(&random, 64),
                         (uint32_t)random_below(&random, 64));
    }
}

static void test_kernels_agree_with_scalar_at_every_alignment(void **state)
{
    struct random random;

    (void)state;
    random_init(&random, SEED, 2);
    for (uint32_t misalign = 0; misalign < 64; misalign++) {
        for (uint32_t pick = 0; pick < 12; pick++) {
            uint32_t dim = 1 + (uint32_t)random_below(&random, pick < 9 ? 200 : DIM_MAX);

            for (size_t k = 0; k < KERNEL_COUNT; k++) {
                check_kernel(&random, k, dim, misalign, (uint32_t)random_below(&random, 64));
                check_kernel(&random, k, dim, (uint32_t)random_below(&random, 64), misalign);
            }
        }
    }
}

static void test_integer_kernels_are_exact_at_the_greatest_dimension(void **state)
{
    static const uint8_t values[] = {0, 1, 127, 128, 129, 255};
    const size_t value_count = sizeof(values);
    uint8_t *a = malloc(DISTANCE_DIM_MAX), *b = malloc(DISTANCE_DIM_MAX);

    (void)state;
    assert_non_null(a);
    assert_non_null(b);
    for (size_t pair = 0; pair < value_count * value_count; pair++) {
        memset(a, values[pair / value_count], DISTANCE_DIM_MAX);
        memset(b, values[pair % value_count], DISTANCE_DIM_MAX);
        for (size_t k = 0; k < KERNEL_COUNT; k++) {
            double scale, want;

            if (!kernels[k].exact)
                continue;
            want = reference(&kernels[k], a, b, DISTANCE_DIM_MAX, &scale);
            for (int isa = ISA_SCALAR; isa < ISA_COUNT; isa++) {
                const struct distance_kernels *table = distance_kernels_for((enum isa)isa);

                if (table && kernel_call(table, k, a, b, DISTANCE_DIM_MAX) != want)
                    fail_msg("%s of %s is off for %u against %u", kernels[k].name, table->name,
                             a[0], b[0]);
            }
        }
    }
    free(a);
    free(b);
}

static void test_float_kernels_hold_their_tolerance_at_the_greatest_dimension(void **state)
{
    struct random random;

    (void)state;
    random_init(&random, SEED, 3);
    for (uint32_t dim = DISTANCE_DIM_MAX - 5; dim <= DISTANCE_DIM_MAX; dim++) {
        for (size_t k = 0; k < KERNEL_COUNT; k++)
            check_kernel(&random, k, dim, 0, dim % 64);
    }
}

static void test_cosine_of_a_zero_vector_is_zero(void **state)
{
    static const uint8_t zero[4 * 100];
    uint8_t other[4 * 100];
    struct random random;

    (void)state;
    random_init(&random, SEED, 4);
    for (size_t k = 0; k < KERNEL_COUNT; k++) {
        if (kernels[k].formula != FORMULA_COSINE)
            continue;
        fill(&random, kernels[k].type_a, other, 100);
        for (int isa = ISA_SCALAR; isa < ISA_COUNT; isa++) {
            const struct distance_kernels *table = distance_kernels_for((enum isa)isa);

            if (!table)
                continue;
            assert_true(kernel_call(table, k, zero, other, 100) == 0);
            assert_true(kernel_call(table, k, other, zero, 100) == 0);
            assert_true(kernel_call(table, k, zero, zero, 100) == 0);
            assert_true(fabs(kernel_call(table, k, other, other, 100) - 1) < 1e-6);
        }
    }
}

static void test_cosine_of_large_and_small_vectors_keeps_its_range(void **state)
{
    (void)state;
    for (int isa = ISA_SCALAR; isa < ISA_COUNT; isa++) {
        const struct distance_kernels *table = distance_kernels_for((enum isa)isa);
        float large[40], small[40];

        if (!table)
            continue;
        for (uint32_t i = 0; i < 40; i++) {
            large[i] = 1e17f;
            small[i] = -1e-17f;
        }
        assert_true(fabsf(table->cosine_f32(large, large, 40) - 1) < 1e-6f);
        assert_true(fabsf(table->cosine_f32(small, small, 40) - 1) < 1e-6f);
        assert_true(fabsf(table->cosine_f32(large, small, 40) + 1) < 1e-6f);
    }
}

static uint32_t float_bits(float value)
{
    uint32_t bits;

    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

static void test_every_half_becomes_its_float_and_comes_back(void **state)
{
    uint16_t *halves = malloc(65536 * sizeof(*halves)), *back = malloc(65536 * sizeof(*back));
    float *floats = malloc(65536 * sizeof(*floats)), *scalar = malloc(65536 * sizeof(*scalar));

    (void)state;
    for (uint32_t h = 0; h < 65536; h++)
        halves[h] = (uint16_t)h;
    distance_kernels_for(ISA_SCALAR)->f32_from_f16(halves, scalar, 65536);
    for (int isa = ISA_SCALAR; isa < ISA_COUNT; isa++) {
        const struct distance_kernels *table = distance_kernels_for((enum isa)isa);

        if (!table)
            continue;
        table->f32_from_f16(halves, floats, 65536);
        assert_memory_equal(floats, scalar, 65536 * sizeof(*floats));
        table->f16_from_f32(floats, back, 65536);
        for (uint32_t h = 0; h < 65536; h++) {
            if ((h & 0x7fff) > 0x7c00) { /* a NaN stays one, made quiet */
                assert_true(isnan(floats[h]));
                assert_int_equal(back[h], h | 0x200);
            } else {
                assert_int_equal(float_bits(floats[h]), float_bits(half_value((uint16_t)h)));
                assert_int_equal(back[h], h);
            }
        }
    }
    free(halves);
    free(back);
    free(floats);
    free(scalar);
}

static uint16_t to_half(const struct distance_kernels *table, float value)
{
    uint16_t half;

    table->f16_from_f32(&value, &half, 1);
    return half;
}

/* Between each two neighbours: the middle goes to the even one, a hair beside it to the nearer. */
static void test_floats_round_to_the_nearest_half_and_ties_to_even(void **state)
{
    (void)state;
    for (int isa = ISA_SCALAR; isa < ISA_COUNT; isa++) {
        const struct distance_kernels *table = distance_kernels_for((enum isa)isa);

        for (uint32_t h = 0; table && h < 0x7c00; h++) {
            uint32_t even = h & 1 ? h + 1 : h;
            /* Above the largest half comes 65536 in rounding, which is infinity in name. */
            double next = h + 1 == 0x7c00 ? 65536.0 : half_value((uint16_t)(h + 1));
            float middle = (float)((half_value((uint16_t)h) + next) / 2);

            assert_int_equal(to_half(table, middle), even);
            assert_int_equal(to_half(table, -middle), even | 0x8000);
            assert_int_equal(to_half(table, nextafterf(middle, 0)), h);
            assert_int_equal(to_half(table, nextafterf(middle, INFINITY)), h + 1);
        }
        if (table) {
            assert_int_equal(to_half(table, 3e38f), 0x7c00);
            assert_int_equal(to_half(table, -INFINITY), 0xfc00);
            assert_int_equal(to_half(table, 1e-40f), 0);
            assert_int_equal(to_half(table, -1e-40f), 0x8000);
        }
    }
}

static void test_conversions_agree_with_scalar_at_every_length_and_alignment(void **state)
{
    const struct distance_kernels *scalar = distance_kernels_for(ISA_SCALAR);
    struct random random;

    (void)state;
    random_init(&random, SEED, 5);
    for (uint32_t count = 0; count <= 1100; count++) {
        struct operand floats, halves, want_floats, want_halves;

        operand_init(&floats, 4 * (size_t)count, (uint32_t)random_below(&random, 64));
        operand_init(&halves, 2 * (size_t)count, (uint32_t)random_below(&random, 64));
        operand_init(&want_floats, 4 * (size_t)count, 0);
        operand_init(&want_halves, 2 * (size_t)count, 0);
        for (int isa = ISA_SCALAR + 1; isa < ISA_COUNT; isa++) {
            const struct distance_kernels *table = distance_kernels_for((enum isa)isa);

            if (!table)
                continue;
            for (size_t i = 0; i < 2 * (size_t)count; i++)
                halves.data[i] = (uint8_t)random_u64(&random);
            scalar->f32_from_f16((void *)halves.data, (void *)want_floats.data, count);
            table->f32_from_f16((void *)halves.data, (void *)floats.data, count);
            assert_memory_equal(floats.data, want_floats.data, 4 * (size_t)count);
            for (size_t i = 0; i < 4 * (size_t)count; i++)
                floats.data[i] = (uint8_t)random_u64(&random);
            for (size_t i = 0; i < count; i += 2) { /* every other one in a half's range */
                float value =
                    ldexpf(random_float(&random) - 0.5f, (int)random_below(&random, 46) - 28);
                memcpy(floats.data + 4 * i, &value, 4);
            }
            scalar->f16_from_f32((void *)floats.data, (void *)want_halves.data, count);
            table->f16_from_f32((void *)floats.data, (void *)halves.data, count);
            assert_memory_equal(halves.data, want_halves.data, 2 * (size_t)count);
        }
        operand_release(&floats);
        operand_release(&halves);
        operand_release(&want_floats);
        operand_release(&want_halves);
    }
}

static void test_element_bytes_counts_started_bytes_of_binary_vectors(void **state)
{
    (void)state;
    assert_int_equal(element_bytes(ELEMENT_F32, 3), 12);
    assert_int_equal(element_bytes(ELEMENT_F16, 3), 6);
    assert_int_equal(element_bytes(ELEMENT_BF16, 3), 6);
    assert_int_equal(element_bytes(ELEMENT_I8, 3), 3);
    assert_int_equal(element_bytes(ELEMENT_U8, 3), 3);
    assert_int_equal(element_bytes(ELEMENT_BINARY, 8), 1);
    assert_int_equal(element_bytes(ELEMENT_BINARY, 9), 2);
    assert_int_equal(element_bytes(ELEMENT_F32, UINT32_MAX), 4 * (uint64_t)UINT32_MAX);
    assert_int_equal(element_bytes((enum element_type)0, 8), 0);
    assert_int_equal(element_bytes((enum element_type)7, 8), 0);
    assert_string_equal(element_name(ELEMENT_BF16), "bf16");
    assert_string_equal(element_name((enum element_type)7), "unknown");
}

static void test_metric_parse_takes_any_case_and_names_the_choices(void **state)
{
    struct error err = ERROR_INIT;
    enum metric metric = METRIC_L2;

    (void)state;
    assert_int_equal(metric_parse("cosine", &metric, &err), 0);
    assert_int_equal(metric, METRIC_COSINE);
    assert_int_equal(metric_parse("Ip", &metric, &err), 0);
    assert_int_equal(metric, METRIC_IP);
    assert_int_equal(metric_parse("L2", &metric, &err), 0);
    assert_int_equal(metric, METRIC_L2);
    metric = METRIC_IP;
    assert_int_equal(metric_parse("hamming", &metric, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
    assert_non_null(strstr(err.message, "L2, IP or COSINE"));
    assert_int_equal(metric, METRIC_IP);
    assert_string_equal(metric_name(METRIC_COSINE), "COSINE");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_override_picks_the_named_table_and_ignores_an_unknown_name),
        cmocka_unit_test(test_kernels_agree_with_scalar_at_every_length),
        cmocka_unit_test(test_kernels_agree_with_scalar_at_every_alignment),
        cmocka_unit_test(test_integer_kernels_are_exact_at_the_greatest_dimension),
        cmocka_unit_test(test_float_kernels_hold_their_tolerance_at_the_greatest_dimension),
        cmocka_unit_test(test_cosine_of_a_zero_vector_is_zero),
        cmocka_unit_test(test_cosine_of_large_and_small_vectors_keeps_its_range),
        cmocka_unit_test(test_every_half_becomes_its_float_and_comes_back),
        cmocka_unit_test(test_floats_round_to_the_nearest_half_and_ties_to_even),
        cmocka_unit_test(test_conversions_agree_with_scalar_at_every_length_and_alignment),
        cmocka_unit_test(test_element_bytes_counts_started_bytes_of_binary_vectors),
        cmocka_unit_test(test_metric_parse_takes_any_case_and_names_the_choices),
    };

    return cmocka_run_group_tests_name("distance", tests, NULL, NULL);
}
