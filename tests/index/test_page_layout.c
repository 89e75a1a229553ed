/* Tests of index/page_layout.c: the order is a permutation, the same for any pool, pages hold near
 * rows, refined pages more pairs of neighbours, and groups stand where they belong. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "index/page_layout.h"
#include "index/vamana_search.h"
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

static uint32_t *order_with(const struct vector_matrix *vectors,
                            const struct page_layout_params *params, uint32_t workers)
{
    struct error err = ERROR_INIT;
    uint32_t *order = malloc((size_t)vectors->count * sizeof *order);
    struct pool *pool = NULL;

    assert_non_null(order);
    if (workers > 0)
        assert_int_equal(pool_new(workers, &pool, &err), 0);
    memset(order, 0xff, (size_t)vectors->count * sizeof *order);
    if (page_layout_order(vectors, params, pool, NULL, order, &err) < 0)
        fail_msg("seed %u: %s", SEED, err.message);
    pool_free(pool);
    return order;
}

static uint32_t *order_of(const struct vector_matrix *vectors, uint32_t capacity, uint32_t workers)
{
    struct page_layout_params params = {.capacity = capacity, .seed = SEED};

    return order_with(vectors, &params, workers);
}

/* The true nearest rows of every row. */
static struct neighbour_lists exact_lists(const struct vector_matrix *vectors, uint32_t k)
{
    struct neighbour_lists lists = {.count = vectors->count, .k = k};
    struct error err = ERROR_INIT;
    struct row_space space;
    float *nearest = malloc(k * sizeof *nearest);

    lists.rows = malloc((size_t)lists.count * k * sizeof *lists.rows);
    assert_non_null(nearest);
    assert_non_null(lists.rows);
    assert_int_equal(row_space_init(&space, vectors, &err), 0);
    for (uint32_t row = 0; row < lists.count; row++) {
        uint32_t *list = lists.rows + (size_t)row * k;
        uint32_t count = 0;

        for (uint32_t other = 0; other < lists.count; other++) {
            float d = row_space_distance(&space, row_space_row(&space, row),
                                         row_space_row(&space, other));
            uint32_t at = count < k ? count : k;

            if (other == row || (count == k && d >= nearest[k - 1]))
                continue;
            if (count < k)
                count++;
            else
                at--;
            for (; at > 0 && nearest[at - 1] > d; at--) {
                nearest[at] = nearest[at - 1];
                list[at] = list[at - 1];
            }
            nearest[at] = d;
            list[at] = other;
        }
        while (count < k)
            list[count++] = NEIGHBOUR_NONE;
    }
    free(nearest);
    return lists;
}

/* Places of lists whose row stands on the same page. */
static uint32_t pairs_on_pages(const struct neighbour_lists *lists, const uint32_t *order,
                               uint32_t capacity)
{
    uint32_t *page_of = malloc(lists->count * sizeof *page_of);
    uint32_t pairs = 0;

    assert_non_null(page_of);
    for (uint32_t at = 0; at < lists->count; at++)
        page_of[order[at]] = at / capacity;
    for (uint32_t row = 0; row < lists->count; row++) {
        for (uint32_t i = 0; i < lists->k; i++) {
            uint32_t other = lists->rows[(size_t)row * lists->k + i];

            pairs += other != NEIGHBOUR_NONE && page_of[other] == page_of[row];
        }
    }
    free(page_of);
    return pairs;
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

static void test_every_refinement_round_brings_more_neighbours_together(void **state)
{
    uint32_t count = 4007, capacity = 10;
    uint8_t *rows = clustered_rows(count, 16, 150);
    struct vector_matrix vectors = matrix_u8(rows, count, 16);
    struct neighbour_lists lists = exact_lists(&vectors, 12);
    uint32_t before = 0, plain = 0;

    (void)state;
    for (uint32_t rounds = 0; rounds <= 4; rounds++) {
        struct page_layout_params params = {
            .capacity = capacity, .seed = SEED, .neighbours = &lists, .refine_rounds = rounds};
        uint32_t *order = order_with(&vectors, &params, 2);
        uint32_t pairs = pairs_on_pages(&lists, order, capacity);

        assert_permutation(order, count);
        for (uint32_t at = 1; at < count; at++)
            assert_true(at % capacity == 0 || order[at - 1] < order[at]);
        if (pairs < before)
            fail_msg("seed %u: %u pairs after round %u, %u before", SEED, pairs, rounds, before);
        before = pairs;
        if (rounds == 0)
            plain = pairs;
        free(order);
    }
    if (before < plain + plain / 4)
        fail_msg("seed %u: %u pairs refined, %u plain", SEED, before, plain);
    neighbour_lists_release(&lists);
    free(rows);
}

static void test_refined_order_with_tiers_is_the_same_for_any_pool(void **state)
{
    uint32_t count = 3001;
    uint8_t *rows = clustered_rows(count, 8, 60);
    struct vector_matrix vectors = matrix_u8(rows, count, 8);
    struct neighbour_lists lists = exact_lists(&vectors, 14);
    struct page_layout_params params = {.capacity = 7,
                                        .seed = SEED,
                                        .neighbours = &lists,
                                        .refine_rounds = 6,
                                        .tier_ends = {140, 700},
                                        .tier_count = 2};
    uint32_t *alone = order_with(&vectors, &params, 0);
    uint32_t *four = order_with(&vectors, &params, 4);

    (void)state;
    assert_permutation(alone, count);
    assert_memory_equal(alone, four, count * sizeof *alone);
    free(alone);
    free(four);
    neighbour_lists_release(&lists);
    free(rows);
}

static void test_hot_rows_stand_first_and_rows_apart_last(void **state)
{
    uint32_t count = 1003, apart[] = {1002, 5, 400};
    uint32_t ends[] = {100, 300, 1000, 1003};
    uint8_t *rows = clustered_rows(count, 8, 30);
    struct vector_matrix vectors = matrix_u8(rows, count, 8);
    struct neighbour_lists lists = exact_lists(&vectors, 15);
    struct page_layout_params params = {.capacity = 10,
                                        .seed = SEED,
                                        .neighbours = &lists,
                                        .tier_ends = {100, 300},
                                        .tier_count = 2,
                                        .apart = apart,
                                        .apart_count = 3};
    uint32_t *degrees = calloc(count, sizeof *degrees);

    (void)state;
    assert_non_null(degrees);
    for (uint32_t row = 0; row < count; row++) {
        for (uint32_t i = 0; row != 5 && row != 400 && row != 1002 && i < 12; i++)
            degrees[lists.rows[(size_t)row * lists.k + i]]++;
    }
    for (params.refine_rounds = 0; params.refine_rounds <= 3; params.refine_rounds += 3) {
        uint32_t *order = order_with(&vectors, &params, 2);

        assert_permutation(order, count);
        for (uint32_t i = 1000; i < count; i++)
            assert_true(order[i] == 5 || order[i] == 400 || order[i] == 1002);
        /* Nobody behind a tier is hotter than anybody in it: by in-degree, then by row. */
        for (uint32_t tier = 0; tier < 2; tier++) {
            for (uint32_t i = 0; i < ends[tier]; i++) {
                for (uint32_t j = ends[tier]; j < 1000; j++) {
                    uint32_t in = order[i], out = order[j];

                    assert_true(degrees[in] > degrees[out] ||
                                (degrees[in] == degrees[out] && in < out));
                }
            }
        }
        free(order);
    }
    free(degrees);
    neighbour_lists_release(&lists);
    free(rows);
}

static void test_lists_with_gaps_and_links_to_oneself_do_no_harm(void **state)
{
    uint32_t count = 95, k = 3;
    uint8_t *rows = clustered_rows(count, 8, 4);
    struct vector_matrix vectors = matrix_u8(rows, count, 8);
    struct neighbour_lists lists = {.count = count, .k = k};
    struct page_layout_params params = {
        .capacity = 10, .seed = SEED, .neighbours = &lists, .refine_rounds = 9};
    uint32_t *order;

    (void)state;
    lists.rows = malloc(count * k * sizeof *lists.rows);
    assert_non_null(lists.rows);
    for (uint32_t row = 0; row < count; row++) {
        lists.rows[row * k] = row % 3 ? row : NEIGHBOUR_NONE;
        lists.rows[row * k + 1] = row % 3 ? (row * 7) % count : NEIGHBOUR_NONE;
        lists.rows[row * k + 2] = NEIGHBOUR_NONE;
    }
    order = order_with(&vectors, &params, 2);
    assert_permutation(order, count);
    free(order);
    neighbour_lists_release(&lists);
    free(rows);
}

static void test_wrong_input_is_refused(void **state)
{
    uint8_t rows[32] = {0};
    uint32_t list[4] = {1, 0, 3, 2}, order[4], apart[] = {1, 1}, outside[] = {1, 4};
    struct vector_matrix vectors = matrix_u8(rows, 4, 8);
    struct neighbour_lists lists = {.count = 4, .k = 1, .rows = list};
    struct neighbour_lists others = {.count = 3, .k = 1, .rows = list};
    const struct page_layout_params wrong[] = {
        {.capacity = 0},
        {.capacity = 2, .neighbours = &others},
        {.capacity = 2, .tier_ends = {2}, .tier_count = 1},
        {.capacity = 2, .neighbours = &lists, .tier_ends = {3}, .tier_count = 1},
        {.capacity = 2, .neighbours = &lists, .tier_ends = {2, 2}, .tier_count = 2},
        {.capacity = 2, .neighbours = &lists, .tier_ends = {0}, .tier_count = 1},
        {.capacity = 2, .neighbours = &lists, .tier_ends = {6}, .tier_count = 1},
        {.capacity = 2, .neighbours = &lists, .tier_count = PAGE_LAYOUT_TIERS_MAX + 1},
        {.capacity = 2, .apart = apart, .apart_count = 1},
        {.capacity = 2, .apart = apart, .apart_count = 2},
        {.capacity = 2, .apart = outside, .apart_count = 2},
        {.capacity = 2, .apart = apart, .apart_count = 5},
    };
    const struct page_layout_params right = {.capacity = 2};
    struct error err = ERROR_INIT;

    (void)state;
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        assert_int_equal(page_layout_order(&vectors, &wrong[i], NULL, NULL, order, &err), -1);
        assert_int_equal(err.code, ERR_INVALID);
        error_clear(&err);
    }
    vectors.type = ELEMENT_BINARY;
    assert_int_equal(page_layout_order(&vectors, &right, NULL, NULL, order, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
}

static void test_a_cancelled_job_ends_the_layout(void **state)
{
    uint8_t *rows = clustered_rows(500, 8, 10);
    struct vector_matrix vectors = matrix_u8(rows, 500, 8);
    struct error err = ERROR_INIT;
    struct job *job = job_new(NULL, NULL);
    struct page_layout_params params = {.capacity = 10, .seed = 1};
    uint32_t order[500];

    (void)state;
    assert_non_null(job);
    job_cancel(job);
    assert_int_equal(page_layout_order(&vectors, &params, NULL, job, order, &err), -1);
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
        cmocka_unit_test(test_every_refinement_round_brings_more_neighbours_together),
        cmocka_unit_test(test_refined_order_with_tiers_is_the_same_for_any_pool),
        cmocka_unit_test(test_hot_rows_stand_first_and_rows_apart_last),
        cmocka_unit_test(test_lists_with_gaps_and_links_to_oneself_do_no_harm),
        cmocka_unit_test(test_wrong_input_is_refused),
        cmocka_unit_test(test_a_cancelled_job_ends_the_layout),
    };

    return cmocka_run_group_tests_name("page_layout", tests, NULL, NULL);
}
