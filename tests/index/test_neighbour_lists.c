/* Tests of index/neighbour_lists.c: lists hold nearly all true neighbours, in order, the same for
 * any pool. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "index/neighbour_lists.h"
#include "index/vamana_search.h"
#include "storage/base/random.h"

#define SEED 20261121u
#define COUNT 3000u
#define DIM 12u
#define DEGREE 24u
#define K 10u

struct key {
    float distance;
    uint32_t row;
};

static uint8_t rows[COUNT * DIM];
static struct vector_matrix vectors = {
    .data = rows, .row_bytes = DIM, .count = COUNT, .dim = DIM, .type = ELEMENT_U8};
static struct graph *graph;

static int set_up(void **state)
{
    struct vamana_params params = {
        .max_degree = DEGREE, .build_list = 50, .alpha = 1.2f, .seed = 3};
    struct error err = ERROR_INIT;
    struct random random;

    (void)state;
    random_init(&random, SEED, 1);
    for (uint32_t i = 0; i < COUNT * DIM; i++)
        rows[i] = (uint8_t)random_below(&random, 256);
    return vamana_build(&vectors, &params, NULL, NULL, &graph, &err);
}

static int tear_down(void **state)
{
    (void)state;
    graph_free(graph);
    return 0;
}

static struct neighbour_lists lists_of(uint32_t k, uint32_t workers)
{
    struct error err = ERROR_INIT;
    struct neighbour_lists lists;
    struct pool *pool = NULL;

    if (workers > 0)
        assert_int_equal(pool_new(workers, &pool, &err), 0);
    if (neighbour_lists_make(&vectors, graph, k, pool, NULL, &lists, &err) < 0)
        fail_msg("seed %u: %s", SEED, err.message);
    pool_free(pool);
    return lists;
}

static int compare_keys(const void *a, const void *b)
{
    const struct key *x = a, *y = b;

    if (x->distance != y->distance)
        return x->distance < y->distance ? -1 : 1;
    return (x->row > y->row) - (x->row < y->row);
}

static float distance(const struct row_space *space, uint32_t a, uint32_t b)
{
    return row_space_distance(space, row_space_row(space, a), row_space_row(space, b));
}

static void test_lists_hold_nearly_all_true_neighbours(void **state)
{
    struct neighbour_lists lists = lists_of(K, 2);
    struct key *keys = malloc(COUNT * sizeof *keys);
    struct error err = ERROR_INIT;
    struct row_space space;
    uint32_t found = 0, wanted = 0;

    (void)state;
    assert_non_null(keys);
    assert_int_equal(row_space_init(&space, &vectors, &err), 0);
    for (uint32_t row = 0; row < COUNT; row += 10) {
        for (uint32_t i = 0; i < COUNT; i++)
            keys[i] = (struct key){i == row ? INFINITY : distance(&space, row, i), i};
        qsort(keys, COUNT, sizeof *keys, compare_keys);
        for (uint32_t i = 0; i < K; i++, wanted++) {
            for (uint32_t j = 0; j < K; j++)
                found += lists.rows[row * K + j] == keys[i].row;
        }
    }
    if (found < wanted * 85 / 100)
        fail_msg("seed %u: %u of %u", SEED, found, wanted);
    free(keys);
    neighbour_lists_release(&lists);
}

static void test_a_list_ascends_without_its_own_row_and_names_none_twice(void **state)
{
    struct neighbour_lists lists = lists_of(40, 0);
    struct error err = ERROR_INIT;
    struct row_space space;

    (void)state;
    assert_int_equal(lists.count, COUNT);
    assert_int_equal(lists.k, 40);
    assert_int_equal(row_space_init(&space, &vectors, &err), 0);
    for (uint32_t row = 0; row < COUNT; row++) {
        const uint32_t *list = lists.rows + row * 40;

        for (uint32_t i = 0; i < 40; i++) {
            assert_true(list[i] < COUNT && list[i] != row);
            if (i > 0) {
                struct key before = {distance(&space, row, list[i - 1]), list[i - 1]};
                struct key at = {distance(&space, row, list[i]), list[i]};

                assert_true(compare_keys(&before, &at) < 0);
            }
        }
    }
    neighbour_lists_release(&lists);
}

static void test_lists_are_the_same_for_any_pool(void **state)
{
    struct neighbour_lists alone = lists_of(K, 0), four = lists_of(K, 4);

    (void)state;
    assert_memory_equal(alone.rows, four.rows, neighbour_lists_memory_bytes(COUNT, K));
    neighbour_lists_release(&alone);
    neighbour_lists_release(&four);
}

static void test_a_small_graph_leaves_places_empty(void **state)
{
    uint32_t degrees[3] = {1, 2, 0}, neighbours[6] = {1, 0, 0, 2, 0, 0};
    struct graph small = {
        .count = 3, .max_degree = 2, .degrees = degrees, .neighbours = neighbours};
    uint8_t data[3] = {10, 14, 11};
    struct vector_matrix three = {
        .data = data, .row_bytes = 1, .count = 3, .dim = 1, .type = ELEMENT_U8};
    const uint32_t want[] = {2,
                             1,
                             NEIGHBOUR_NONE,
                             NEIGHBOUR_NONE,
                             2,
                             0,
                             NEIGHBOUR_NONE,
                             NEIGHBOUR_NONE,
                             NEIGHBOUR_NONE,
                             NEIGHBOUR_NONE,
                             NEIGHBOUR_NONE,
                             NEIGHBOUR_NONE};
    uint32_t counts[3];
    struct neighbour_lists lists;
    struct error err = ERROR_INIT;

    (void)state;
    assert_int_equal(neighbour_lists_make(&three, &small, 4, NULL, NULL, &lists, &err), 0);
    assert_memory_equal(lists.rows, want, sizeof want);
    neighbour_lists_in_degrees(&lists, 9, counts);
    assert_int_equal(counts[0], 1);
    assert_int_equal(counts[1], 1);
    assert_int_equal(counts[2], 2);
    neighbour_lists_in_degrees(&lists, 1, counts);
    assert_int_equal(counts[0], 0);
    assert_int_equal(counts[1], 0);
    assert_int_equal(counts[2], 2);
    neighbour_lists_release(&lists);
    neighbour_lists_release(&lists);
}

static void test_wrong_input_is_refused(void **state)
{
    struct vector_matrix fewer = vectors;
    struct neighbour_lists lists;
    struct error err = ERROR_INIT;

    (void)state;
    assert_int_equal(neighbour_lists_make(&vectors, graph, 0, NULL, NULL, &lists, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
    error_clear(&err);
    fewer.count--;
    assert_int_equal(neighbour_lists_make(&fewer, graph, K, NULL, NULL, &lists, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
    assert_null(lists.rows);
}

static void test_a_cancelled_job_ends_the_lists(void **state)
{
    struct job *job = job_new(NULL, NULL);
    struct neighbour_lists lists;
    struct error err = ERROR_INIT;

    (void)state;
    assert_non_null(job);
    job_cancel(job);
    assert_int_equal(neighbour_lists_make(&vectors, graph, K, NULL, job, &lists, &err), -1);
    assert_int_equal(err.code, ERR_CANCELLED);
    assert_null(lists.rows);
    job_free(job);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_lists_hold_nearly_all_true_neighbours),
        cmocka_unit_test(test_a_list_ascends_without_its_own_row_and_names_none_twice),
        cmocka_unit_test(test_lists_are_the_same_for_any_pool),
        cmocka_unit_test(test_a_small_graph_leaves_places_empty),
        cmocka_unit_test(test_wrong_input_is_refused),
        cmocka_unit_test(test_a_cancelled_job_ends_the_lists),
    };

    return cmocka_run_group_tests_name("neighbour_lists", tests, set_up, tear_down);
}
