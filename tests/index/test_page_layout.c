/* Tests of index/page_layout.c: the order is a permutation, the same for any pool, and pages hold
 * near rows. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "index/page_layout.h"
#include "storage/base/random.h"

#define SEED 20240229u

/* Rows around `clusters` centres, as bytes. */
static uint8_t *clustered_rows(uint32_t count, uint32_t dim, uint32_t clusters)
{
    uint8_t *rows = malloc((size_t)count * dim);
    uint8_t *centres = malloc((size_t)clusters * dim);
    struct random random;

    assert_non_null(rows);
    assert_non_null(centres);
    random_init(&random, SEED, 7);
    for (uint32_t i = 0; i < clusters * dim; i++)
        centres[i] = (uint8_t)(20 + random_below(&random, 216));
    for (uint32_t row = 0; row < count; row++) {
        const uint8_t *centre = centres + random_below(&random, clusters) * dim;

        for (uint32_t d = 0; d < dim; d++)
            rows[(size_t)row * dim + d] = (uint8_t)(centre[d] - 10 + random_below(&random, 21));
    }
    free(centres);
    return rows;
}

static struct vector_matrix matrix_u8(const uint8_t *rows, uint32_t count, uint32_t dim)
{
    return (struct vector_matrix){
        .data = rows, .row_bytes = dim, .count = count, .dim = dim, .type = ELEMENT_U8};
}

static uint32_t *order_of(const struct vector_matrix *vectors, uint32_t capacity, uint32_t workers)
{
    struct error err = ERROR_INIT;
    uint32_t *order = malloc((size_t)vectors->count * sizeof *order);
    struct pool *pool = NULL;

    assert_non_null(order);
    if (workers > 0)
        assert_int_equal(pool_new(workers, &pool, &err), 0);
    memset(order, 0xff, (size_t)vectors->count * sizeof *order);
    if (page_layout_order(vectors, capacity, SEED, pool, NULL, order, &err) < 0)
        fail_msg("seed %u: %s", SEED, err.message);
    pool_free(pool);
    return order;
}

static void assert_permutation(const uint32_t *order, uint32_t count)
{
    uint8_t *seen = calloc(count, 1);

    assert_non_null(seen);
    for (uint32_t i = 0; i < count; i++) {
        assert_true(order[i] < count);
        assert_int_equal(seen[order[i]], 0);
        seen[order[i]] = 1;
    }
    free(seen);
}

static void test_every_row_gets_one_place_at_awkward_sizes(void **state)
{
    static const uint32_t counts[] = {1, 2, 3, 7, 26, 27, 28, 54, 55, 1000, 3000};
    static const uint32_t capacities[] = {1, 2, 27, 4000};
    uint8_t *rows = clustered_rows(3000, 16, 40);

    (void)state;
    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++) {
        for (size_t j = 0; j < sizeof capacities / sizeof capacities[0]; j++) {
            struct vector_matrix vectors = matrix_u8(rows, counts[i], 16);
            uint32_t *order = order_of(&vectors, capacities[j], 0);

            assert_permutation(order, counts[i]);
            free(order);
        }
    }
    free(rows);
}

static void test_order_is_the_same_for_any_pool(void **state)
{
    /* Above the size at which the top of the tree is projected by the whole pool. */
    uint32_t count = 20000;
    uint8_t *rows = clustered_rows(count, 8, 300);
    struct vector_matrix vectors = matrix_u8(rows, count, 8);
    uint32_t *alone = order_of(&vectors, 16, 0);
    uint32_t *four = order_of(&vectors, 16, 4);

    (void)state;
    assert_permutation(alone, count);
    assert_memory_equal(alone, four, count * sizeof *alone);
    free(alone);
    free(four);
    free(rows);
}

static void test_equal_rows_stand_in_row_order(void **state)
{
    uint32_t count = 1000;
    uint8_t *rows = calloc(count, 8);
    struct vector_matrix vectors = matrix_u8(rows, count, 8);
    uint32_t *order;

    (void)state;
    assert_non_null(rows);
    order = order_of(&vectors, 10, 0);
    for (uint32_t i = 0; i < count; i++)
        assert_int_equal(order[i], i);
    free(order);
    free(rows);
}

static void test_rows_of_a_page_are_near_each_other(void **state)
{
    uint32_t count = 4000, dim = 16, capacity = 20;
    uint8_t *rows = clustered_rows(count, dim, 100);
    struct vector_matrix vectors = matrix_u8(rows, count, dim);
    uint32_t *order = order_of(&vectors, capacity, 2);
    double near = 0, far = 0;

    (void)state;
    for (uint32_t i = 0; i + 1 < count; i++) {
        const uint8_t *a = rows + (size_t)order[i] * dim;
        const uint8_t *b = rows + (size_t)order[i + 1] * dim;
        const uint8_t *c = rows + (size_t)order[(i + count / 2) % count] * dim;

        for (uint32_t d = 0; d < dim; d++) {
            near += (double)(a[d] - b[d]) * (a[d] - b[d]);
            far += (double)(a[d] - c[d]) * (a[d] - c[d]);
        }
    }
    if (near > far / 8)
        fail_msg("seed %u: neighbours in the order are %.3f as far as strangers", SEED, near / far);
    free(order);
    free(rows);
}

static void test_floats_with_nan_and_infinity_still_give_a_permutation(void **state)
{
    uint32_t count = 500, dim = 5;
    float *rows = malloc((size_t)count * dim * sizeof *rows);
    struct vector_matrix vectors = {.data = (const uint8_t *)rows,
                                    .row_bytes = dim * sizeof *rows,
                                    .count = count,
                                    .dim = dim,
                                    .type = ELEMENT_F32};
    struct random random;
    uint32_t *order;

    (void)state;
    assert_non_null(rows);
    random_init(&random, SEED, 8);
    for (uint32_t i = 0; i < count * dim; i++)
        rows[i] = i % 31 == 0 ? NAN : i % 37 == 0 ? INFINITY : random_normal(&random);
    order = order_of(&vectors, 9, 2);
    assert_permutation(order, count);
    free(order);
    free(rows);
}

static void test_wrong_input_is_refused(void **state)
{
    uint8_t rows[32] = {0};
    uint32_t order[4];
    struct vector_matrix vectors = matrix_u8(rows, 4, 8);
    struct error err = ERROR_INIT;

    (void)state;
    assert_int_equal(page_layout_order(&vectors, 0, 1, NULL, NULL, order, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
    error_clear(&err);
    vectors.type = ELEMENT_BINARY;
    assert_int_equal(page_layout_order(&vectors, 2, 1, NULL, NULL, order, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
}

static void test_a_cancelled_job_ends_the_layout(void **state)
{
    uint8_t *rows = clustered_rows(500, 8, 10);
    struct vector_matrix vectors = matrix_u8(rows, 500, 8);
    struct error err = ERROR_INIT;
    struct job *job = job_new(NULL, NULL);
    uint32_t order[500];

    (void)state;
    assert_non_null(job);
    job_cancel(job);
    assert_int_equal(page_layout_order(&vectors, 10, 1, NULL, job, order, &err), -1);
    assert_int_equal(err.code, ERR_CANCELLED);
    job_free(job);
    free(rows);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_row_gets_one_place_at_awkward_sizes),
        cmocka_unit_test(test_order_is_the_same_for_any_pool),
        cmocka_unit_test(test_equal_rows_stand_in_row_order),
        cmocka_unit_test(test_rows_of_a_page_are_near_each_other),
        cmocka_unit_test(test_floats_with_nan_and_infinity_still_give_a_permutation),
        cmocka_unit_test(test_wrong_input_is_refused),
        cmocka_unit_test(test_a_cancelled_job_ends_the_layout),
    };

    return cmocka_run_group_tests_name("page_layout", tests, NULL, NULL);
}
