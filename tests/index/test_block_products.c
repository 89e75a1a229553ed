/* Block products against sums written out here, in 64-bit integers or double, and pools against a
 * full sort. The program runs itself once per instruction set, for the choice is made once. Blocks
 * end with their malloc block, so a sanitized build sees a read past the end. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "index/block_products.h"
#include "index/distance.h"
#include "index/element.h"
#include "storage/base/random.h"

#define SEED 20261121u
#define TOLERANCE 1e-5

static const enum element_type types[] = {ELEMENT_F32, ELEMENT_U8, ELEMENT_I8};

struct block {
    enum element_type type;
    uint32_t count, dim;
    uint64_t stride;
    uint8_t *rows;
    float *norms;
};

static void *aligned(size_t bytes)
{
    void *at = NULL;

    assert_int_equal(posix_memalign(&at, 64, bytes ? bytes : 64), 0);
    return at;
}

enum values { ANY, EXTREME, ALIKE };

static void block_init(struct block *block, struct random *random, enum element_type type,
                       uint32_t count, uint32_t dim, enum values values)
{
    *block = (struct block){.type = type, .count = count, .dim = dim};
    block->stride = block_row_stride(type, dim);
    block->rows = aligned(count * block->stride);
    block->norms = aligned(count * sizeof(float));
    memset(block->rows, 0, count * block->stride);
    for (uint32_t i = 0; i < count; i++) {
        uint8_t *row = block->rows + i * block->stride;

        for (uint32_t d = 0; d < dim; d++) {
            if (type == ELEMENT_F32) {
                float value = values == ALIKE ? 1 : random_normal(random);

                memcpy(row + d * sizeof value, &value, sizeof value);
                continue;
            }
            row[d] = (uint8_t)random_u64(random);
            if (values == EXTREME)
                row[d] = (row[d] & 1) ? (type == ELEMENT_I8 ? 0x80 : 0xff)
                                      : (type == ELEMENT_I8 ? 0x7f : 0x00);
            if (values == ALIKE)
                row[d] = type == ELEMENT_I8 ? 0x80 : 0xff;
        }
    }
    block_norms(type, block->rows, count, dim, block->norms);
}

static void block_release(struct block *block)
{
    free(block->rows);
    free(block->norms);
}

static double value_at(const struct block *block, uint32_t row, uint32_t d)
{
    const uint8_t *at = block->rows + row * block->stride;
    float f32;

    if (block->type == ELEMENT_I8)
        return (int8_t)at[d];
    if (block->type == ELEMENT_U8)
        return at[d];
    memcpy(&f32, at + d * sizeof f32, sizeof f32);
    return f32;
}

static void assert_distance(const struct block *a, uint32_t i, const struct block *b, uint32_t j,
                            float found)
{
    double sum = 0, norms = (double)a->norms[i] + (double)b->norms[j];
    int64_t exact = 0;

    for (uint32_t d = 0; d < a->dim; d++) {
        double difference = value_at(a, i, d) - value_at(b, j, d);

        sum += difference * difference;
        exact += (int64_t)difference * (int64_t)difference;
    }
    if (a->type != ELEMENT_F32 ? found != (float)exact
                               : !(found >= 0 && fabs(found - sum) <= TOLERANCE * norms))
        fail_msg("%s, dim %u, rows %u and %u: %.9g, not %.9g", element_name(a->type), a->dim, i, j,
                 (double)found, sum);
}

/* With and without a pick; what lies behind the end of a row of `out` is left alone. */
static void compare_blocks(struct random *random, const struct block *a, const struct block *b,
                           uint32_t picked)
{
    uint64_t out_stride = b->count + random_below(random, 3);
    uint32_t rows = picked ? picked : a->count;
    size_t cells = rows ? (rows - 1) * out_stride + b->count : 0;
    uint32_t *pick = picked ? aligned(picked * sizeof *pick) : NULL;
    float *out = malloc(cells ? cells * sizeof *out : 1);

    assert_non_null(out);
    for (uint32_t i = 0; i < picked; i++)
        pick[i] = (uint32_t)random_below(random, a->count);
    for (size_t i = 0; i < cells; i++)
        out[i] = -7;
    block_distances(a->type, a->rows, pick, rows, a->norms, b->rows, b->count, b->norms, a->dim,
                    out, out_stride);
    for (uint32_t i = 0; i < rows; i++) {
        for (uint32_t j = 0; j < b->count; j++)
            assert_distance(a, pick ? pick[i] : i, b, j, out[i * out_stride + j]);
        for (uint64_t j = b->count; j < out_stride && i + 1 < rows; j++)
            assert_true(out[i * out_stride + j] == -7);
    }
    free(out);
    free(pick);
}

static void compare(struct random *random, enum element_type type, uint32_t count_a,
                    uint32_t count_b, uint32_t dim, enum values values)
{
    struct block a, b;

    block_init(&a, random, type, count_a, dim, values);
    block_init(&b, random, type, count_b, dim, values);
    compare_blocks(random, &a, &b, 0);
    if (count_a)
        compare_blocks(random, &a, &b, 1 + (uint32_t)random_below(random, 2 * count_a));
    block_release(&a);
    block_release(&b);
}

static void test_distances_are_right_at_every_dimension(void **state)
{
    struct random random;

    (void)state;
    random_init(&random, SEED, 1);
    for (size_t t = 0; t < sizeof types / sizeof *types; t++) {
        for (uint32_t dim = 1; dim <= 1030; dim += dim < 140 ? 1 : 1 + dim % 31)
            compare(&random, types[t], 7, 19, dim, ANY);
        for (uint32_t dim = 1021; dim <= 1030; dim++)
            compare(&random, types[t], 7, 19, dim, ANY);
    }
}

static void test_distances_are_right_at_every_count(void **state)
{
    static const uint32_t greater[][2] = {{511, 64}, {512, 65}, {513, 63}, {1030, 3}, {3, 200}};
    struct random random;

    (void)state;
    random_init(&random, SEED, 2);
    for (size_t t = 0; t < sizeof types / sizeof *types; t++) {
        for (uint32_t count = 0; count <= 14; count++)
            compare(&random, types[t], count, 70 - count, 33, ANY);
        for (uint32_t count = 0; count <= 140; count++)
            compare(&random, types[t], 5, count, 10, ANY);
        for (size_t i = 0; i < sizeof greater / sizeof *greater; i++)
            compare(&random, types[t], greater[i][0], greater[i][1], 21, ANY);
    }
}

static void test_integers_are_exact_at_the_ends_of_their_range(void **state)
{
    static const uint32_t dims[] = {1, 64, 257, 511, 512, 513, 1024, 1025, 4099, DISTANCE_DIM_MAX};
    struct random random;

    (void)state;
    random_init(&random, SEED, 3);
    for (size_t t = 1; t < sizeof types / sizeof *types; t++) {
        for (size_t d = 0; d < sizeof dims / sizeof *dims; d++) {
            struct block ones, zeros, mixed;

            block_init(&ones, &random, types[t], 3, dims[d], ALIKE);
            block_init(&zeros, &random, types[t], 18, dims[d], ALIKE);
            block_init(&mixed, &random, types[t], 9, dims[d], EXTREME);
            for (uint32_t i = 0; i < zeros.count; i++)
                memset(zeros.rows + i * zeros.stride, types[t] == ELEMENT_I8 ? 0x7f : 0, dims[d]);
            block_norms(types[t], zeros.rows, zeros.count, dims[d], zeros.norms);
            compare_blocks(&random, &ones, &zeros, 0);
            compare_blocks(&random, &zeros, &ones, 0);
            compare_blocks(&random, &ones, &ones, 0);
            compare_blocks(&random, &mixed, &zeros, 4);
            compare_blocks(&random, &mixed, &mixed, 0);
            block_release(&ones);
            block_release(&zeros);
            block_release(&mixed);
        }
    }
}

static void test_floats_of_the_greatest_dimension_fit_the_gathered_chunk(void **state)
{
    struct random random;

    (void)state;
    random_init(&random, SEED, 4);
    compare(&random, ELEMENT_F32, 5, 3, DISTANCE_DIM_MAX, ANY);
    compare(&random, ELEMENT_F32, 300, 3, 700, ANY);
}

static void test_a_float_row_is_never_nearer_than_zero_to_itself(void **state)
{
    struct random random;
    struct block a;
    float out[40 * 40];

    (void)state;
    random_init(&random, SEED, 5);
    block_init(&a, &random, ELEMENT_F32, 40, 333, ANY);
    block_distances(a.type, a.rows, NULL, 40, a.norms, a.rows, 40, a.norms, a.dim, out, 40);
    for (uint32_t i = 0; i < 40; i++) {
        assert_true(out[i * 40 + i] >= 0);
        assert_true(out[i * 40 + i] <= 1e-4f * a.norms[i]);
    }
    block_release(&a);
}

struct offer {
    float distance;
    uint32_t id;
};

static int offer_compare(const void *left, const void *right)
{
    const struct offer *a = left, *b = right;

    if (a->distance != b->distance)
        return a->distance < b->distance ? -1 : 1;
    return a->id < b->id ? -1 : a->id > b->id;
}

enum spread { SMOOTH, FEW, ONE, SIGNED, FALLING, WITH_INFINITY };

static float spread_value(struct random *random, enum spread spread, uint32_t i)
{
    float value = random_normal(random);

    switch (spread) {
    case SMOOTH:
        return value * value;
    case FEW:
        return (float)random_below(random, 5);
    case ONE:
        return 3;
    case SIGNED:
        return random_below(random, 20) ? value : -0.0f * (float)random_below(random, 2);
    case FALLING:
        return 1e6f - (float)i;
    default:
        return random_below(random, 2) ? INFINITY : value * value * 1e30f;
    }
}

/* `count` offers in blocks of up to `block`, in any order of blocks. */
static void compare_pool(struct random *random, enum spread spread, uint32_t limit, uint32_t count,
                         uint32_t block)
{
    uint32_t block_count = (count + block - 1) / block, first_id = 1000, wanted = 0;
    uint32_t skip =
        random_below(random, 2) ? first_id + (uint32_t)random_below(random, count + 9) : UINT32_MAX;
    struct offer *sorted = aligned(count * sizeof *sorted);
    uint32_t *order = aligned(block_count * sizeof *order);
    float *distances = malloc(count ? count * sizeof *distances : 1);
    struct block_pool pool;
    float *places = malloc(2 * limit * sizeof *places);
    uint32_t *ids = malloc(2 * limit * sizeof *ids);

    assert_true(distances && places && ids);
    for (uint32_t i = 0; i < count; i++) {
        distances[i] = spread_value(random, spread, i);
        if (first_id + i != skip)
            sorted[wanted++] = (struct offer){distances[i], first_id + i};
    }
    qsort(sorted, wanted, sizeof *sorted, offer_compare);
    if (wanted > limit)
        wanted = limit;
    random_permutation(random, order, block_count);
    block_pool_init(&pool, places, ids, limit);
    for (uint32_t i = 0; i < block_count; i++) {
        uint32_t from = order[i] * block, size = count - from < block ? count - from : block;

        block_pool_offer(&pool, distances + from, size, first_id + from, skip);
        assert_true(pool.count <= 2 * limit);
    }
    assert_int_equal(block_pool_finish(&pool), wanted);
    for (uint32_t i = 0; i < wanted; i++) {
        if (places[i] != sorted[i].distance || ids[i] != sorted[i].id)
            fail_msg("limit %u of %u, spread %d: place %u holds %u at %g, not %u at %g", limit,
                     count, (int)spread, i, ids[i], (double)places[i], sorted[i].id,
                     (double)sorted[i].distance);
    }
    free(sorted);
    free(order);
    free(distances);
    free(places);
    free(ids);
}

static void test_a_pool_holds_what_a_full_sort_puts_first(void **state)
{
    static const uint32_t limits[] = {1, 2, 3, 15, 16, 31, 32, 33, 96, 128, 160, 1024};
    static const uint32_t counts[] = {0, 1, 2, 17, 63, 64, 65, 150, 321, 1000, 5000};
    static const uint32_t blocks[] = {1, 13, 64, 512};
    struct random random;

    (void)state;
    random_init(&random, SEED, 6);
    for (size_t l = 0; l < sizeof limits / sizeof *limits; l++)
        for (size_t c = 0; c < sizeof counts / sizeof *counts; c++)
            for (size_t b = 0; b < sizeof blocks / sizeof *blocks; b++)
                for (int spread = SMOOTH; spread <= WITH_INFINITY; spread++)
                    compare_pool(&random, (enum spread)spread, limits[l], counts[c], blocks[b]);
}

static void test_a_pool_passes_over_what_is_not_a_number(void **state)
{
    float offers[100], places[80];
    uint32_t ids[80];
    struct block_pool pool;

    (void)state;
    for (uint32_t i = 0; i < 100; i++)
        offers[i] = i % 2 ? NAN : (float)i;
    block_pool_init(&pool, places, ids, 40);
    block_pool_offer(&pool, offers, 100, 0, UINT32_MAX);
    assert_int_equal(block_pool_finish(&pool), 40);
    for (uint32_t i = 0; i < 40; i++)
        assert_int_equal(ids[i], 2 * i);
}

static void test_the_instruction_set_is_that_of_the_distances(void **state)
{
    (void)state;
    assert_string_equal(block_products_isa(), distance_kernels_best()->name);
}

static int run(const char *isa)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_the_instruction_set_is_that_of_the_distances),
        cmocka_unit_test(test_distances_are_right_at_every_dimension),
        cmocka_unit_test(test_distances_are_right_at_every_count),
        cmocka_unit_test(test_integers_are_exact_at_the_ends_of_their_range),
        cmocka_unit_test(test_floats_of_the_greatest_dimension_fit_the_gathered_chunk),
        cmocka_unit_test(test_a_float_row_is_never_nearer_than_zero_to_itself),
        cmocka_unit_test(test_a_pool_holds_what_a_full_sort_puts_first),
        cmocka_unit_test(test_a_pool_passes_over_what_is_not_a_number),
    };

    return cmocka_run_group_tests_name(isa, tests, NULL, NULL);
}

int main(void)
{
    static const char *const names[] = {"scalar", "avx2", "avx512", "avx512vnni"};
    int failed = 0;

    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        pid_t child;
        int status;

        fflush(NULL);
        child = fork();
        if (child == 0) {
            setenv("ANND_ISA", names[i], 1);
            exit(run(names[i]) ? 1 : 0);
        }
        if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status) ||
            WEXITSTATUS(status) != 0)
            failed++;
    }
    return failed;
}
