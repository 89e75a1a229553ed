/* store: scores from stored bytes against scores of the floats, within what each store promises. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "index/store.h"
#include "storage/base/random.h"

static double exact(enum metric metric, const float *q, const float *x, uint32_t dim)
{
    double ip = 0, qq = 0, xx = 0, l2 = 0;

    for (uint32_t i = 0; i < dim; i++) {
        ip += (double)q[i] * x[i];
        qq += (double)q[i] * q[i];
        xx += (double)x[i] * x[i];
        l2 += ((double)q[i] - x[i]) * ((double)q[i] - x[i]);
    }
    if (metric == METRIC_L2)
        return l2;
    if (metric == METRIC_IP)
        return -ip;
    return qq > 0 && xx > 0 ? 1 - ip / sqrt(qq * xx) : 1;
}

static void check(enum vector_store store, enum metric metric, uint32_t dim, bool integers,
                  bool zero, uint64_t seed, double tolerance)
{
    float *q = malloc(dim * sizeof *q), *x = malloc(dim * sizeof *x),
          *in = malloc(dim * sizeof *in);
    float *scratch = malloc(dim * sizeof *scratch);
    uint8_t *integer_scratch = malloc(dim);
    uint32_t bytes = store_vector_bytes(store, metric, dim);
    uint8_t *stored = malloc(bytes);
    struct store_query query = {.vector = scratch, .integers = integer_scratch};
    struct random random;
    double qq = 0, xx = 0;

    random_init(&random, seed, dim);
    for (uint32_t i = 0; i < dim; i++) {
        x[i] = integers ? (float)random_below(&random, 128) : random_normal(&random);
        q[i] = integers ? (float)random_below(&random, 128) + (seed % 2 ? 0.25f : 0)
                        : random_normal(&random);
        if (zero)
            x[i] = 0;
        qq += (double)q[i] * q[i];
        xx += (double)x[i] * x[i];
    }
    memcpy(in, x, dim * sizeof *x);
    if (metric == METRIC_COSINE && store != STORE_U8 && store != STORE_I8)
        vector_normalise(in, dim);
    store_encode(store, metric, in, dim, stored);
    store_query_prepare(&query, distance_kernels_best(), store, metric, dim, q);
    double scale = metric == METRIC_L2 ? qq + xx : metric == METRIC_IP ? sqrt(qq * xx) : 1;
    double found = store_distance(&query, stored), wanted = exact(metric, q, x, dim);

    if (fabs(found - wanted) > tolerance * scale)
        fail_msg("%s %s dim %u seed %llu: %g, wanted %g, tolerance %g", store_name(store),
                 metric_name(metric), dim, (unsigned long long)seed, found, wanted,
                 tolerance * scale);
    free(q);
    free(x);
    free(in);
    free(scratch);
    free(integer_scratch);
    free(stored);
}

static void test_scores_stay_within_each_stores_tolerance(void **state)
{
    static const enum metric metrics[] = {METRIC_L2, METRIC_IP, METRIC_COSINE};
    static const uint32_t dims[] = {1, 2, 7, 16, 33, 128, 511, 512, 1000, 2048};

    (void)state;
    for (size_t m = 0; m < 3; m++)
        for (size_t d = 0; d < sizeof dims / sizeof *dims; d++)
            for (uint64_t seed = 0; seed < 8; seed++) {
                check(STORE_F32, metrics[m], dims[d], false, false, seed, 1e-6);
                check(STORE_F16, metrics[m], dims[d], false, false, seed, 1.5e-3 / sqrt(dims[d]));
                if (dims[d] >= 16)
                    check(STORE_SQ8, metrics[m], dims[d], false, false, seed,
                          dims[d] < 128 ? 6e-3 : 2e-3);
                check(STORE_U8, metrics[m], dims[d], true, false, seed, 1e-6);
                check(STORE_I8, metrics[m], dims[d], true, false, seed, 1e-6);
            }
}

static void test_a_zero_vector_has_cosine_similarity_zero(void **state)
{
    (void)state;
    check(STORE_F32, METRIC_COSINE, 64, false, true, 1, 1e-7);
    check(STORE_F16, METRIC_COSINE, 64, false, true, 1, 1e-7);
    check(STORE_SQ8, METRIC_COSINE, 64, false, true, 1, 1e-7);
    check(STORE_U8, METRIC_COSINE, 64, true, true, 1, 1e-7);
    check(STORE_I8, METRIC_COSINE, 64, true, true, 1, 1e-7);
}

static void test_integers_and_floats_come_back_exactly(void **state)
{
    uint8_t stored[4 + 256 * 4];
    float in[256], out[256];

    (void)state;
    for (uint32_t i = 0; i < 256; i++)
        in[i] = (float)i;
    store_encode(STORE_U8, METRIC_COSINE, in, 256, stored);
    store_decode(STORE_U8, METRIC_COSINE, stored, 256, out);
    assert_memory_equal(in, out, sizeof in);
    for (uint32_t i = 0; i < 256; i++)
        in[i] = (float)i - 128;
    store_encode(STORE_I8, METRIC_L2, in, 256, stored);
    store_decode(STORE_I8, METRIC_L2, stored, 256, out);
    assert_memory_equal(in, out, sizeof in);
    for (uint32_t i = 0; i < 256; i++)
        in[i] = 1.0f / (float)(i + 1);
    store_encode(STORE_F32, METRIC_L2, in, 256, stored);
    store_decode(STORE_F32, METRIC_L2, stored, 256, out);
    assert_memory_equal(in, out, sizeof in);
}

/* Bytes over 512, normalised: what an embedding that was stored as bytes once looks like. */
static void test_8_bits_keep_what_had_8_bits(void **state)
{
    enum { DIM = 96 };
    static const uint32_t spans[] = {1, 2, 7, 100, 200, 254, 255};
    float vector[DIM], decoded[DIM];
    uint8_t stored[DIM + 16];
    struct random random;

    (void)state;
    random_init(&random, 20261121, 1);
    for (uint32_t round = 0; round < 200; round++) {
        uint32_t span = spans[round % 7], dim = round % 2 ? DIM : 3 + round % 90;

        for (uint32_t i = 0; i < dim; i++)
            vector[i] = ((float)random_below(&random, span + 1) - (float)(span / 2)) / 512;
        if (round % 3)
            vector_normalise(vector, dim);
        store_encode(STORE_SQ8, METRIC_L2, vector, dim, stored);
        store_decode(STORE_SQ8, METRIC_L2, stored, dim, decoded);
        for (uint32_t i = 0; i < dim; i++)
            assert_true(fabsf(decoded[i] - vector[i]) <= 1e-6f * (1 + fabsf(vector[i])));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_scores_stay_within_each_stores_tolerance),
        cmocka_unit_test(test_a_zero_vector_has_cosine_similarity_zero),
        cmocka_unit_test(test_integers_and_floats_come_back_exactly),
        cmocka_unit_test(test_8_bits_keep_what_had_8_bits),
    };

    return cmocka_run_group_tests_name("store", tests, NULL, NULL);
}
