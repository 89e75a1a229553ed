/* The lists against ones that sort everything anew, over random searches with many equal distances;
 * the sets against plain arrays. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "index/candidate_list.h"
#include "storage/base/random.h"

#define SEED 20241122u
#define LIMIT_MAX 300u
#define ADDED_MAX 3000u

static int by_value(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;

    return (x > y) - (x < y);
}

/* Distances of few values, negative ones too (inner products). */
static float some_distance(struct random *random, uint32_t kinds)
{
    return ((float)random_below(random, kinds) - (float)kinds / 4) / 8;
}

/* Every item carries what was said of its position. */
static void assert_columns_together(const struct candidate_list *list, const float *distances)
{
    for (uint32_t i = 0; i < list->count; i++) {
        uint32_t position = list->columns.position[i];

        assert_true(list->columns.distance[i] == distances[position]);
        assert_int_equal(list->columns.page[i], position / 7);
        assert_true(list->columns.sharpness[i] == (float)position);
        for (uint32_t j = 0; j < i; j++)
            assert_int_not_equal(list->columns.position[j], position);
    }
}

static void test_the_nearest_are_kept_whatever_the_order_they_come_in(void **state)
{
    static float distances[ADDED_MAX], sorted[ADDED_MAX], kept[ADDED_MAX];
    static const uint32_t limits[] = {1, 2, 15, 16, 17, 100, LIMIT_MAX};
    struct candidate_list list;
    struct scored_list scored;
    struct random random;
    struct error err;

    (void)state;
    random_init(&random, SEED, 1);
    assert_int_equal(candidate_list_init(&list, LIMIT_MAX, &err), 0);
    assert_int_equal(scored_list_init(&scored, LIMIT_MAX, &err), 0);
    for (uint32_t round = 0; round < 60; round++) {
        uint32_t limit = limits[round % 7], count = (uint32_t)random_below(&random, ADDED_MAX);
        uint32_t kinds = round % 3 == 0 ? 5 : round % 3 == 1 ? 200 : 1u << 30;

        candidate_list_clear(&list, limit);
        scored_list_clear(&scored, limit);
        for (uint32_t i = 0; i < count; i++) {
            distances[i] = some_distance(&random, kinds);
            candidate_list_add(&list, distances[i], (float)i, i, i / 7);
            scored_list_add(&scored, distances[i]);
            if (i % 5 == 0) { /* estimated a second time */
                uint32_t again = (uint32_t)random_below(&random, i + 1);

                candidate_list_add(&list, distances[again], (float)again, again, again / 7);
            }
            assert_true(list.count <= list.room && scored.count <= scored.room);
        }
        memcpy(sorted, distances, count * sizeof *sorted);
        qsort(sorted, count, sizeof *sorted, by_value);
        for (uint32_t cut = 0; cut < 2; cut++) {
            uint32_t wanted = count < limit ? count : limit;

            assert_true(list.count >= wanted && scored.count >= wanted);
            assert_columns_together(&list, distances);
            memcpy(kept, list.columns.distance, list.count * sizeof *kept);
            qsort(kept, list.count, sizeof *kept, by_value);
            for (uint32_t i = 0; i < wanted; i++)
                assert_true(kept[i] == sorted[i]);
            memcpy(kept, scored.distances, scored.count * sizeof *kept);
            qsort(kept, scored.count, sizeof *kept, by_value);
            for (uint32_t i = 0; i < wanted; i++)
                assert_true(kept[i] == sorted[i]);
            candidate_list_cut(&list);
            scored_list_cut(&scored);
        }
        if (count >= limit) {
            assert_int_equal(list.count, limit);
            assert_int_equal(scored.count, limit);
            assert_true(list.bound == sorted[limit - 1] && scored.bound == sorted[limit - 1]);
        }
    }
    candidate_list_release(&list);
    candidate_list_release(&list); /* twice is allowed */
    scored_list_release(&scored);
}

static void test_nothing_beyond_the_bound_enters(void **state)
{
    struct candidate_list list;
    struct scored_list scored;
    struct error err;

    (void)state;
    assert_int_equal(candidate_list_init(&list, 4, &err), 0);
    assert_int_equal(scored_list_init(&scored, 4, &err), 0);
    candidate_list_clear(&list, 4);
    scored_list_clear(&scored, 4);
    for (uint32_t i = 0; i < 4; i++) {
        candidate_list_add(&list, (float)i, 1, i, 0);
        scored_list_add(&scored, (float)i);
    }
    candidate_list_cut(&list);
    scored_list_cut(&scored);
    candidate_list_add(&list, 3.5f, 1, 10, 0);
    scored_list_add(&scored, INFINITY);
    assert_int_equal(list.count, 4);
    assert_int_equal(scored.count, 4);
    candidate_list_add(&list, 2.5f, 1, 11, 0);
    scored_list_add(&scored, 2.5f);
    assert_int_equal(list.count, 5);
    assert_int_equal(scored.count, 5);
    candidate_list_clear(&list, 1000); /* no longer than its columns */
    assert_int_equal(list.limit, 4);
    assert_int_equal(list.count, 0);
    assert_true(list.bound == INFINITY);
    candidate_list_release(&list);
    scored_list_release(&scored);
}

static void test_pages_are_found_until_the_set_is_cleared(void **state)
{
    enum { NUMBERS = 5000, EXPECTED = 2000 };
    static const uint32_t strides[] = {1, 3, 4096, 65536, 858993};
    static bool seen[NUMBERS];
    struct random random;
    struct page_set set;
    struct error err;

    (void)state;
    random_init(&random, SEED, 3);
    assert_int_equal(page_set_init(&set, EXPECTED, &err), 0);
    assert_true(page_set_memory_bytes(EXPECTED) >= 2ull * EXPECTED * sizeof(struct page_mark));
    for (uint32_t search = 0; search < 40; search++) {
        uint32_t stride = strides[search % 5], count = 0;

        if (search % 3 == 0) { /* a short search between long ones uses a part of the table */
            page_set_clear(&set);
            assert_true(page_set_add(&set, 17));
            assert_true(page_set_has(&set, 17));
        }
        page_set_clear(&set);
        memset(seen, 0, sizeof seen);
        for (uint32_t step = 0; step < 2 * EXPECTED; step++) {
            uint32_t i = (uint32_t)random_below(&random, NUMBERS);

            assert_int_equal(page_set_has(&set, i * stride), seen[i]);
            if (!seen[i] && count == EXPECTED)
                continue;
            count += !seen[i];
            seen[i] = true;
            assert_true(page_set_add(&set, i * stride));
            assert_int_equal(set.count, count);
        }
        for (uint32_t i = 0; i < NUMBERS; i++)
            assert_int_equal(page_set_has(&set, i * stride), seen[i]);
    }
    page_set_release(&set);
}

static void test_as_many_pages_as_expected_always_fit_and_a_full_set_says_so(void **state)
{
    static const uint32_t expected[] = {0, 1, 127, 128, 129, 1000, 1024, 5000};

    (void)state;
    for (size_t e = 0; e < sizeof expected / sizeof expected[0]; e++) {
        struct page_set set;
        struct error err;
        uint32_t put = 0;

        assert_int_equal(page_set_init(&set, expected[e], &err), 0);
        while (page_set_add(&set, put * 7)) {
            put++;
            assert_true(put <= set.mask); /* or finding would not end */
        }
        assert_true(put >= expected[e]);
        for (uint32_t i = 0; i <= put; i++)
            assert_int_equal(page_set_has(&set, i * 7), i < put);
        assert_true(page_set_add(&set, 0)); /* one that is there may come again */
        page_set_release(&set);
    }
}

static void test_old_pages_stay_forgotten_when_the_epochs_come_round(void **state)
{
    struct page_set set;
    struct error err;

    (void)state;
    assert_int_equal(page_set_init(&set, 100, &err), 0);
    for (uint32_t i = 0; i < 60; i++) /* marks of epoch 1, the one that comes after the last */
        assert_true(page_set_add(&set, i));
    set.epoch = UINT32_MAX - 1;
    for (uint32_t round = 0; round < 4; round++) {
        page_set_clear(&set);
        assert_int_equal(set.count, 0);
        for (uint32_t i = 0; i < 60; i++)
            assert_false(page_set_has(&set, i));
        for (uint32_t i = 0; i < 60; i++)
            assert_true(page_set_add(&set, i));
    }
    page_set_release(&set);
}

/* It may forget a cell, but seldom, and never invents one. */
static void test_cells_are_remembered_and_never_made_up(void **state)
{
    enum { CELLS = 20000, EXPECTED = 1000 };
    static bool in[CELLS];
    static const uint32_t wanted[] = {0, 1, 100, 400, EXPECTED, 3 * EXPECTED};
    uint32_t added = 0, found = 0;
    struct random random;
    struct cell_set set;
    struct error err;

    (void)state;
    random_init(&random, SEED, 4);
    assert_int_equal(cell_set_init(&set, EXPECTED, &err), 0);
    assert_true(cell_set_memory_bytes(EXPECTED) >= EXPECTED * sizeof(uint32_t));
    for (uint32_t round = 0; round < 60; round++) {
        uint32_t count = wanted[round % 6], top = round % 2 ? CELLS : count + 1;

        cell_set_clear(&set, count < EXPECTED ? count : EXPECTED);
        memset(in, 0, sizeof in);
        for (uint32_t i = 0; i < count; i++) {
            uint32_t cell = (uint32_t)random_below(&random, top);

            if (!in[cell] && count <= EXPECTED)
                added++;
            if (!in[cell])
                cell_set_add(&set, cell);
            in[cell] = true;
        }
        for (uint32_t cell = 0; cell < CELLS; cell++) {
            if (cell_set_has(&set, cell)) {
                assert_true(in[cell]);
                found += count <= EXPECTED;
            }
        }
    }
    assert_true(found <= added && found >= added - added / 50);
    cell_set_clear(&set, 0);
    assert_false(cell_set_has(&set, UINT32_MAX - 1));
    cell_set_release(&set);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_the_nearest_are_kept_whatever_the_order_they_come_in),
        cmocka_unit_test(test_nothing_beyond_the_bound_enters),
        cmocka_unit_test(test_pages_are_found_until_the_set_is_cleared),
        cmocka_unit_test(test_as_many_pages_as_expected_always_fit_and_a_full_set_says_so),
        cmocka_unit_test(test_old_pages_stay_forgotten_when_the_epochs_come_round),
        cmocka_unit_test(test_cells_are_remembered_and_never_made_up),
    };

    return cmocka_run_group_tests_name("candidate_list", tests, NULL, NULL);
}
