/* Tests of index/page_layout.c: the order is a permutation, the same for any pool, pages hold near
 * rows, refined pages more pairs of neighbours, groups stand where they belong, and windows keep to
 * the memory that was planned for them. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <malloc.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

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

/* Rows and lists as files would give them, and a read that fails. */
struct stored {
    const struct vector_matrix *vectors;
    const struct neighbour_lists *lists;
    uint32_t vectors_fail_at; /* row; UINT32_MAX: never */
    uint32_t lists_fail_at;
    _Atomic uint32_t vectors_read;
};

static int read_stored_vectors(void *context, uint32_t first, uint32_t count, uint8_t *rows,
                               struct error *err)
{
    struct stored *stored = context;
    uint64_t row_bytes = stored->vectors->row_bytes;

    assert_true((uint64_t)first + count <= stored->vectors->count);
    atomic_fetch_add(&stored->vectors_read, count);
    if (stored->vectors_fail_at - first < count)
        return error_set(err, ERR_IO, "row %u cannot be read", stored->vectors_fail_at);
    memcpy(rows, stored->vectors->data + first * row_bytes, count * row_bytes);
    return 0;
}

static int read_stored_lists(void *context, uint32_t first, uint32_t count, uint32_t *lists,
                             struct error *err)
{
    struct stored *stored = context;
    uint32_t k = stored->lists->k;

    assert_true((uint64_t)first + count <= stored->lists->count);
    if (stored->lists_fail_at - first < count)
        return error_set(err, ERR_IO, "list %u cannot be read", stored->lists_fail_at);
    memcpy(lists, stored->lists->rows + (size_t)first * k, (size_t)count * k * sizeof *lists);
    return 0;
}

static struct stored stored_of(const struct vector_matrix *vectors,
                               const struct neighbour_lists *lists)
{
    return (struct stored){.vectors = vectors,
                           .lists = lists,
                           .vectors_fail_at = UINT32_MAX,
                           .lists_fail_at = UINT32_MAX};
}

static int make_stored(struct stored *stored, const struct page_layout_params *params,
                       struct pool *pool, uint32_t *order, struct error *err)
{
    struct page_vectors vectors = {.count = stored->vectors->count,
                                   .dim = stored->vectors->dim,
                                   .type = stored->vectors->type,
                                   .row_bytes = stored->vectors->row_bytes,
                                   .read = read_stored_vectors,
                                   .context = stored};
    struct page_neighbours lists = {
        .k = stored->lists ? stored->lists->k : 0, .read = read_stored_lists, .context = stored};

    return page_layout_make(&vectors, stored->lists ? &lists : NULL, params, pool, NULL, order,
                            err);
}

static uint32_t *order_of_stored(const struct vector_matrix *vectors,
                                 const struct neighbour_lists *lists,
                                 const struct page_layout_params *params, uint32_t workers)
{
    struct stored stored = stored_of(vectors, lists);
    struct error err = ERROR_INIT;
    uint32_t *order = malloc((size_t)vectors->count * sizeof *order);
    struct pool *pool = NULL;

    assert_non_null(order);
    if (workers > 0)
        assert_int_equal(pool_new(workers, &pool, &err), 0);
    if (make_stored(&stored, params, pool, order, &err) < 0)
        fail_msg("seed %u: %s", SEED, err.message);
    /* Every row once, and those carried over: less than a page of each of four groups a window. */
    assert_true(stored.vectors_read >= vectors->count);
    if (params->window_rows == 0)
        assert_int_equal(stored.vectors_read, vectors->count);
    pool_free(pool);
    return order;
}

/* The same rows in space order, as row stores have them. */
static uint8_t *in_space_order(const struct vector_matrix *vectors)
{
    uint32_t *order = order_of(vectors, 16, 0);
    uint8_t *rows = malloc(vectors->count * vectors->row_bytes);

    assert_non_null(rows);
    for (uint32_t i = 0; i < vectors->count; i++)
        memcpy(rows + i * vectors->row_bytes, vectors->data + order[i] * vectors->row_bytes,
               vectors->row_bytes);
    free(order);
    return rows;
}

static void test_vectors_and_lists_that_are_read_give_the_same_order(void **state)
{
    uint32_t count = 3001, apart[] = {17};
    uint8_t *rows = clustered_rows(count, 8, 60);
    struct vector_matrix vectors = matrix_u8(rows, count, 8);
    struct neighbour_lists lists = exact_lists(&vectors, 14);
    struct page_layout_params params = {.capacity = 10,
                                        .seed = SEED,
                                        .refine_rounds = 3,
                                        .tier_ends = {140, 700},
                                        .tier_count = 2,
                                        .apart = apart,
                                        .apart_count = 1};
    uint32_t *read, *held;

    (void)state;
    for (params.window_rows = 0; params.window_rows < 3001; params.window_rows += 700) {
        params.neighbours = NULL;
        read = order_of_stored(&vectors, &lists, &params, 3);
        params.neighbours = &lists;
        held = order_with(&vectors, &params, 0);
        assert_permutation(read, count);
        assert_memory_equal(read, held, count * sizeof *read);
        free(read);
        free(held);
    }
    neighbour_lists_release(&lists);
    free(rows);
}

static void test_windows_follow_each_other_in_every_group(void **state)
{
    static const uint32_t windows[] = {1, 3, 9, 10, 11, 97, 500, 1002, 1003, 5000};
    uint32_t count = 1003, apart[] = {1002, 5, 400};
    uint32_t ends[] = {100, 300, 1000, 1003};
    uint8_t *rows = clustered_rows(count, 8, 30);
    struct vector_matrix vectors = matrix_u8(rows, count, 8);
    struct neighbour_lists lists = exact_lists(&vectors, 15);
    struct page_layout_params params = {.capacity = 10,
                                        .seed = SEED,
                                        .refine_rounds = 2,
                                        .tier_ends = {100, 300},
                                        .tier_count = 2,
                                        .apart = apart,
                                        .apart_count = 3};
    uint32_t *whole = order_of_stored(&vectors, &lists, &params, 0);

    (void)state;
    for (size_t i = 0; i < sizeof windows / sizeof windows[0]; i++) {
        uint32_t *order, window_count, *group_of = calloc(count, sizeof *group_of);

        assert_non_null(group_of);
        params.window_rows = windows[i];
        window_count = (count + windows[i] - 1) / windows[i];
        order = order_of_stored(&vectors, &lists, &params, 2);
        assert_permutation(order, count);
        /* The groups hold the same rows as those of one window. */
        for (uint32_t at = 0, group = 0; at < count; at++) {
            group += at == ends[group];
            group_of[whole[at]] = group;
        }
        for (uint32_t at = 0, group = 0; at < count; at++) {
            group += at == ends[group];
            assert_int_equal(group_of[order[at]], group);
        }
        /* A page begun in a window is filled from the next ones: pages' last rows ascend. */
        for (uint32_t group = 0; group < 4; group++) {
            uint32_t before = 0;

            for (uint32_t page = group ? ends[group - 1] : 0; page < ends[group]; page += 10) {
                uint32_t last = 0, window;

                for (uint32_t at = page; at < ends[group] && at < page + 10; at++)
                    last = order[at] > last ? order[at] : last;
                window = (uint32_t)(((uint64_t)(last + 1) * window_count - 1) / count);
                assert_true(window >= before);
                before = window;
            }
        }
        free(group_of);
        free(order);
    }
    free(whole);
    neighbour_lists_release(&lists);
    free(rows);
}

static void test_windows_of_rows_in_space_order_lose_few_pairs(void **state)
{
    uint32_t count = 4000, capacity = 10;
    uint8_t *input = clustered_rows(count, 16, 200);
    struct vector_matrix vectors = matrix_u8(input, count, 16);
    uint8_t *rows = in_space_order(&vectors);
    struct neighbour_lists lists;
    struct page_layout_params params = {.capacity = capacity, .seed = SEED, .refine_rounds = 6};
    uint32_t *one, *eight, *plain, pairs_one, pairs_eight, pairs_plain;

    (void)state;
    vectors.data = rows;
    lists = exact_lists(&vectors, 12);
    one = order_of_stored(&vectors, &lists, &params, 2);
    params.window_rows = count / 8;
    eight = order_of_stored(&vectors, &lists, &params, 2);
    params.refine_rounds = 0;
    plain = order_of_stored(&vectors, NULL, &params, 2);
    pairs_one = pairs_on_pages(&lists, one, capacity);
    pairs_eight = pairs_on_pages(&lists, eight, capacity);
    pairs_plain = pairs_on_pages(&lists, plain, capacity);
    assert_permutation(eight, count);
    assert_permutation(plain, count);
    if (pairs_eight < pairs_one / 10 * 9 || pairs_eight < pairs_plain + pairs_plain / 5)
        fail_msg("seed %u: %u pairs in one window, %u in eight, %u plain", SEED, pairs_one,
                 pairs_eight, pairs_plain);
    free(one);
    free(eight);
    free(plain);
    neighbour_lists_release(&lists);
    free(rows);
    free(input);
}

static void test_windows_are_the_same_for_any_pool(void **state)
{
    uint32_t count = 3001;
    uint8_t *rows = clustered_rows(count, 8, 60);
    struct vector_matrix vectors = matrix_u8(rows, count, 8);
    struct neighbour_lists lists = exact_lists(&vectors, 14);
    struct page_layout_params params = {.capacity = 7,
                                        .seed = SEED,
                                        .refine_rounds = 6,
                                        .tier_ends = {140, 700},
                                        .tier_count = 2,
                                        .window_rows = 800};
    uint32_t *alone = order_of_stored(&vectors, &lists, &params, 0);
    uint32_t *four = order_of_stored(&vectors, &lists, &params, 4);

    (void)state;
    assert_permutation(alone, count);
    assert_memory_equal(alone, four, count * sizeof *alone);
    free(alone);
    free(four);
    neighbour_lists_release(&lists);
    free(rows);
}

static void test_i8_rows_are_laid_out_as_the_same_rows_of_floats(void **state)
{
    /* Means of bytes are taken in another way. */
    uint32_t count = 5000, dim = 13;
    int8_t *bytes = (int8_t *)clustered_rows(count, dim, 50);
    float *floats = malloc((size_t)count * dim * sizeof *floats);
    struct vector_matrix vectors = matrix_u8((const uint8_t *)bytes, count, dim);
    uint32_t *of_bytes, *of_floats;

    (void)state;
    assert_non_null(floats);
    for (int type = 0; type < 2; type++) {
        for (uint32_t i = 0; i < count * dim; i++)
            floats[i] = type == 0 ? bytes[i] : ((const uint8_t *)bytes)[i];
        vectors = matrix_u8((const uint8_t *)bytes, count, dim);
        vectors.type = type == 0 ? ELEMENT_I8 : ELEMENT_U8;
        of_bytes = order_of(&vectors, 12, 2);
        vectors = (struct vector_matrix){.data = (const uint8_t *)floats,
                                         .row_bytes = dim * sizeof *floats,
                                         .count = count,
                                         .dim = dim,
                                         .type = ELEMENT_F32};
        of_floats = order_of(&vectors, 12, 2);
        uint32_t same = 0;
        for (uint32_t i = 0; i < count; i++)
            same += of_bytes[i] == of_floats[i];
        /* The kernels' sums may be rounded in different orders. */
        if (same < count / 10 * 9)
            fail_msg("seed %u: %u of %u rows stand in the same place", SEED, same, count);
        free(of_bytes);
        free(of_floats);
    }
    free(bytes);
    free(floats);
}

/* ---- memory ---- */

/* Twelve rows before and after in every list: as many links as there can be. */
static struct neighbour_lists nearby_lists(uint32_t count)
{
    struct neighbour_lists lists = {.count = count, .k = 24};

    lists.rows = malloc((size_t)count * lists.k * sizeof *lists.rows);
    assert_non_null(lists.rows);
    for (uint32_t row = 0; row < count; row++) {
        for (uint32_t i = 0; i < lists.k; i++)
            lists.rows[(size_t)row * lists.k + i] =
                (row + count + (i % 2 ? i / 2 + 1 : count - i / 2 - 1)) % count;
    }
    return lists;
}

static uint64_t heap_bytes(void)
{
    struct mallinfo2 info = mallinfo2();

    return info.uordblks + info.hblkhd;
}

struct heap_watch {
    _Atomic bool stop;
    uint64_t peak;
};

static void *watch_heap(void *context)
{
    struct heap_watch *watch = context;

    while (!atomic_load(&watch->stop)) {
        uint64_t bytes = heap_bytes();

        watch->peak = bytes > watch->peak ? bytes : watch->peak;
        usleep(100);
    }
    return NULL;
}

static void test_memory_is_what_was_planned(void **state)
{
    uint32_t count = 140000, dim = 16, workers = 2;
    uint8_t *rows = clustered_rows(count, dim, 1000);
    struct vector_matrix vectors = matrix_u8(rows, count, dim);
    struct neighbour_lists lists = nearby_lists(count);
    static const uint32_t window_rows[] = {0, 50000, 65536};
    uint32_t *order = malloc(count * sizeof *order);
    struct error err = ERROR_INIT;
    struct pool *pool = NULL;

    (void)state;
    assert_non_null(order);
    assert_int_equal(pool_new(workers, &pool, &err), 0);
    for (uint32_t i = 0; i < 4; i++) {
        struct page_layout_params params = {.capacity = 20,
                                            .seed = SEED,
                                            .refine_rounds = i < 3 ? 2 : 0,
                                            .window_rows = window_rows[i % 3]};
        struct stored stored = stored_of(&vectors, i < 3 ? &lists : NULL);
        struct heap_watch watch = {0};
        uint64_t before = heap_bytes();
        uint64_t planned = page_layout_memory_bytes(count, params.window_rows, dim, i < 3 ? 24 : 0,
                                                    params.capacity, workers);
        pthread_t thread;
        uint64_t used;

        assert_int_equal(pthread_create(&thread, NULL, watch_heap, &watch), 0);
        assert_int_equal(make_stored(&stored, &params, pool, order, &err), 0);
        atomic_store(&watch.stop, true);
        pthread_join(thread, NULL);
        if (watch.peak == 0 || watch.peak < before)
            continue; /* the heap of a sanitizer: it does not say */
        used = watch.peak - before;
        if (used > planned + planned / 20)
            fail_msg("window of %u: %llu bytes, %llu planned", params.window_rows,
                     (unsigned long long)used, (unsigned long long)planned);
        if (i < 3 && used < planned - planned / 8)
            fail_msg("window of %u: %llu bytes only, %llu planned", params.window_rows,
                     (unsigned long long)used, (unsigned long long)planned);
    }
    pool_free(pool);
    free(order);
    neighbour_lists_release(&lists);
    free(rows);
}

static void test_the_largest_window_that_fits_is_found(void **state)
{
    static const uint32_t counts[] = {1000, 65536, 100000, 131072, 1000000, 10000000, 1000000000};

    (void)state;
    /* What the plan is for: a million rows of 128 bytes beside much else in 256 MB. */
    assert_true(page_layout_memory_bytes(1000000, 0, 128, 24, 20, 4) < 231000000);
    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++) {
        for (uint64_t memory = 1 << 20; memory < 1ull << 40; memory *= 2) {
            uint32_t rows = page_layout_window_rows(counts[i], memory, 128, 24, 20, 4);
            uint32_t windows;

            if (rows == 0) {
                assert_true(page_layout_memory_bytes(counts[i], 65536, 128, 24, 20, 4) > memory);
                continue;
            }
            assert_true(rows <= counts[i]);
            assert_true(page_layout_memory_bytes(counts[i], rows, 128, 24, 20, 4) <= memory);
            if (rows < counts[i]) {
                assert_true(rows > 65536 / 2);
                assert_true(page_layout_memory_bytes(counts[i], 0, 128, 24, 20, 4) > memory ||
                            counts[i] > 1u << 26);
                windows = (counts[i] + rows - 1) / rows - 1;
                assert_true(windows < 2 ||
                            page_layout_memory_bytes(counts[i], (counts[i] + windows - 1) / windows,
                                                     128, 24, 20, 4) > memory);
            }
        }
        assert_int_equal(page_layout_window_rows(counts[i], UINT64_MAX, 128, 24, 20, 4), counts[i]);
    }
}

static void test_a_failed_read_ends_the_layout(void **state)
{
    uint32_t count = 2000, order[2000];
    uint8_t *rows = clustered_rows(count, 8, 30);
    struct vector_matrix vectors = matrix_u8(rows, count, 8);
    struct neighbour_lists lists = nearby_lists(count);
    struct page_layout_params params = {.capacity = 10,
                                        .seed = SEED,
                                        .refine_rounds = 2,
                                        .tier_ends = {100},
                                        .tier_count = 1,
                                        .window_rows = 700};
    struct error err = ERROR_INIT;
    struct pool *pool = NULL;

    (void)state;
    assert_int_equal(pool_new(2, &pool, &err), 0);
    for (uint32_t i = 0; i < 4; i++) {
        struct stored stored = stored_of(&vectors, &lists);

        *(i % 2 ? &stored.vectors_fail_at : &stored.lists_fail_at) = i < 2 ? 1999 : 0;
        params.tier_count = i < 2; /* else lists are read after the vectors only */
        assert_int_equal(make_stored(&stored, &params, pool, order, &err), -1);
        assert_int_equal(err.code, ERR_IO);
        assert_non_null(strstr(err.message, "cannot be read"));
        error_clear(&err);
    }
    pool_free(pool);
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
        cmocka_unit_test(test_vectors_and_lists_that_are_read_give_the_same_order),
        cmocka_unit_test(test_windows_follow_each_other_in_every_group),
        cmocka_unit_test(test_windows_of_rows_in_space_order_lose_few_pairs),
        cmocka_unit_test(test_windows_are_the_same_for_any_pool),
        cmocka_unit_test(test_i8_rows_are_laid_out_as_the_same_rows_of_floats),
        cmocka_unit_test(test_memory_is_what_was_planned),
        cmocka_unit_test(test_the_largest_window_that_fits_is_found),
        cmocka_unit_test(test_a_failed_read_ends_the_layout),
        cmocka_unit_test(test_wrong_input_is_refused),
        cmocka_unit_test(test_a_cancelled_job_ends_the_layout),
    };

    return cmocka_run_group_tests_name("page_layout", tests, NULL, NULL);
}
