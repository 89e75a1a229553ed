/* The list against one that sorts everything anew, over random searches with many equal distances;
 * the mark set against a plain array. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "index/candidate_list.h"
#include "storage/base/random.h"

#define SEED 20241122u
#define LIMIT_MAX 300u
#define FRESH_MAX 100u

/* What the list is to hold, kept the slow way. */
struct model {
    struct listed items[LIMIT_MAX + FRESH_MAX];
    uint32_t count;
    uint32_t fresh_count; /* after the items */
    uint32_t limit, fresh_max;
};

static int by_distance_and_position(const void *a, const void *b)
{
    const struct listed *x = a, *y = b;

    if (x->distance != y->distance)
        return x->distance < y->distance ? -1 : 1;
    if (x->position != y->position)
        return x->position < y->position ? -1 : 1;
    /* An estimate that was there already stays: its state tells it from a new one. */
    return (int)y->state - (int)x->state;
}

static void model_merge(struct model *model)
{
    uint32_t total = model->count + model->fresh_count, kept = 0;

    for (uint32_t i = 0; i < total; i++) {
        if (model->items[i].state != LISTED_GONE)
            model->items[kept++] = model->items[i];
    }
    qsort(model->items, kept, sizeof model->items[0], by_distance_and_position);
    total = kept;
    kept = 0;
    for (uint32_t i = 0; i < total; i++) {
        if (kept == 0 || model->items[kept - 1].position != model->items[i].position ||
            model->items[kept - 1].distance != model->items[i].distance)
            model->items[kept++] = model->items[i];
    }
    model->count = kept < model->limit ? kept : model->limit;
    model->fresh_count = 0;
}

static void model_add(struct model *model, const struct listed *item)
{
    if (model->count == model->limit && item->distance > model->items[model->count - 1].distance)
        return;
    if (model->fresh_count == model->fresh_max)
        model_merge(model);
    model->items[model->count + model->fresh_count++] = *item;
}

static void assert_item_equal(const struct listed *got, const struct listed *want)
{
    assert_true(got->distance == want->distance);
    assert_int_equal(got->position, want->position);
    assert_int_equal(got->page, want->page);
    assert_true(got->spread == want->spread);
    assert_int_equal(got->state, want->state);
}

/* All but distance and state follow from the position. */
static struct listed item_of(float distance, uint32_t position)
{
    return (struct listed){.distance = distance,
                           .position = position,
                           .page = position / 5,
                           .spread = 0.5f + (float)(position % 3),
                           .state = LISTED_UNREAD};
}

static void add(struct candidate_list *list, const struct listed *item)
{
    candidate_list_add(list, item->distance, item->position, item->page, item->spread, item->state);
}

static void new_list(struct candidate_list *list, uint32_t capacity, uint32_t fresh_max)
{
    struct error err;

    assert_int_equal(candidate_list_init(list, capacity, fresh_max, &err), 0);
}

static void test_random_searches_hold_what_sorting_anew_would(void **state)
{
    struct model *model = malloc(sizeof *model);
    struct random random;

    (void)state;
    assert_non_null(model);
    random_init(&random, SEED, 0);
    for (uint32_t search = 0; search < 600; search++) {
        uint32_t distances = (uint32_t)random_below(&random, 3) ? 1000 : 12;
        struct candidate_list list;

        *model = (struct model){.limit = 1 + (uint32_t)random_below(&random, LIMIT_MAX),
                                .fresh_max = 1 + (uint32_t)random_below(&random, FRESH_MAX)};
        new_list(&list, LIMIT_MAX, model->fresh_max);
        candidate_list_clear(&list, model->limit);
        for (uint32_t step = 0; step < 40; step++) {
            uint32_t additions = (uint32_t)random_below(&random, 60);

            for (uint32_t i = 0; i < additions; i++) {
                struct listed item = item_of((float)random_below(&random, distances) - 5,
                                             (uint32_t)random_below(&random, 400));

                add(&list, &item);
                model_add(model, &item);
            }
            candidate_list_merge(&list);
            model_merge(model);
            assert_int_equal(list.count, model->count);
            assert_int_equal(list.fresh_count, 0);
            for (uint32_t i = 0; i < list.count; i++)
                assert_item_equal(&list.items[i], &model->items[i]);
            /* What a walk does to the items in place. */
            for (uint32_t i = 0; i < list.count; i++) {
                if (random_below(&random, 10) == 0)
                    list.items[i].state = model->items[i].state =
                        (enum listed_state)random_below(&random, LISTED_GONE + 1);
            }
            list.gone = true;
        }
        candidate_list_release(&list);
    }
    free(model);
}

static void test_bursts_in_any_order_come_out_sorted(void **state)
{
    enum { COUNT = 5000 };
    struct listed *items = malloc(COUNT * sizeof *items);
    struct candidate_list list;
    struct random random;

    (void)state;
    assert_non_null(items);
    random_init(&random, SEED, 1);
    new_list(&list, COUNT, COUNT);
    for (uint32_t order = 0; order < 7; order++) {
        for (uint32_t count = 0; count <= COUNT; count += count < 70 ? 1 : 493) {
            candidate_list_clear(&list, COUNT);
            for (uint32_t i = 0; i < count; i++) {
                uint32_t half = i < count / 2 ? i : count - i;
                float distance = order == 0   ? (float)i
                                 : order == 1 ? (float)(count - i)
                                 : order == 2 ? 1.0f
                                 : order == 3 ? (float)half
                                 : order == 4 ? (float)(count - half)
                                 : order == 5 ? (float)(i % 2)
                                              : random_float(&random);

                items[i] = item_of(distance, order % 2 ? i : count - i);
                add(&list, &items[i]);
            }
            candidate_list_merge(&list);
            qsort(items, count, sizeof *items, by_distance_and_position);
            assert_int_equal(list.count, count);
            for (uint32_t i = 0; i < count; i++)
                assert_item_equal(&list.items[i], &items[i]);
        }
    }
    candidate_list_release(&list);
    free(items);
}

static void test_the_nearest_are_kept_however_often_merges_are_forced(void **state)
{
    enum { COUNT = 3000, LIMIT = 64 };
    struct listed all[COUNT];
    struct random random;

    (void)state;
    random_init(&random, SEED, 2);
    for (uint32_t i = 0; i < COUNT; i++)
        all[i] = item_of((float)random_below(&random, 500), i);
    for (uint32_t fresh_max = 1; fresh_max < 200; fresh_max += 11) {
        struct candidate_list list;
        struct listed want[COUNT];

        new_list(&list, LIMIT, fresh_max);
        candidate_list_clear(&list, LIMIT);
        for (uint32_t i = 0; i < COUNT; i++)
            add(&list, &all[i]);
        candidate_list_merge(&list);
        memcpy(want, all, sizeof want);
        qsort(want, COUNT, sizeof want[0], by_distance_and_position);
        assert_int_equal(list.count, LIMIT);
        for (uint32_t i = 0; i < LIMIT; i++)
            assert_item_equal(&list.items[i], &want[i]);
        candidate_list_release(&list);
    }
}

static void test_an_estimate_made_again_does_not_replace_what_became_of_the_first(void **state)
{
    struct candidate_list list;
    struct listed item = item_of(2.0f, 7), nearer = item_of(1.0f, 7);

    (void)state;
    new_list(&list, 8, 8);
    candidate_list_clear(&list, 8);
    add(&list, &item);
    add(&list, &item);
    candidate_list_merge(&list);
    assert_int_equal(list.count, 1);
    list.items[0].state = LISTED_WANTED;
    add(&list, &item);
    candidate_list_merge(&list);
    assert_int_equal(list.count, 1);
    assert_int_equal(list.items[0].state, LISTED_WANTED);
    /* Another distance is another item: an exact score beside the estimate it replaces. */
    list.items[0].state = LISTED_GONE;
    list.gone = true;
    nearer.state = LISTED_LOADED;
    add(&list, &nearer);
    candidate_list_merge(&list);
    assert_int_equal(list.count, 1);
    assert_item_equal(&list.items[0], &nearer);
    candidate_list_release(&list);
}

static void test_what_is_gone_leaves_room_for_others(void **state)
{
    struct candidate_list list;

    (void)state;
    new_list(&list, 4, 16);
    candidate_list_clear(&list, 4);
    for (uint32_t i = 0; i < 4; i++) {
        struct listed item = item_of((float)i, i);

        add(&list, &item);
    }
    candidate_list_merge(&list);
    assert_true(candidate_list_admits(&list, 3.0f));
    assert_false(candidate_list_admits(&list, 3.5f));
    list.items[0].state = list.items[2].state = LISTED_GONE;
    list.gone = true;
    candidate_list_merge(&list);
    assert_int_equal(list.count, 2);
    assert_int_equal(list.items[0].position, 1);
    assert_int_equal(list.items[1].position, 3);
    assert_true(candidate_list_admits(&list, 1e30f));
    candidate_list_release(&list);
}

static void test_a_cleared_list_is_empty_and_no_longer_than_its_buffers(void **state)
{
    struct candidate_list list;
    struct listed item = item_of(1.0f, 1);

    (void)state;
    new_list(&list, 16, 4);
    assert_true(candidate_list_memory_bytes(16, 4) >= 36 * sizeof(struct listed));
    candidate_list_clear(&list, 3);
    assert_int_equal(list.limit, 3);
    add(&list, &item);
    candidate_list_merge(&list);
    add(&list, &item);
    candidate_list_clear(&list, 1000);
    assert_int_equal(list.limit, 16);
    assert_int_equal(list.count, 0);
    candidate_list_merge(&list);
    assert_int_equal(list.count, 0);
    candidate_list_release(&list);
    candidate_list_release(&list); /* twice is allowed */
}

static void test_marks_are_found_until_the_set_is_cleared(void **state)
{
    enum { NUMBERS = 5000, EXPECTED = 2000 };
    static const uint32_t strides[] = {1, 3, 4096, 65536, 858993};
    struct random random;
    struct mark_set set;
    struct error err;
    uint32_t *values = malloc(NUMBERS * sizeof *values);

    (void)state;
    assert_non_null(values);
    random_init(&random, SEED, 3);
    assert_int_equal(mark_set_init(&set, EXPECTED, &err), 0);
    assert_true(mark_set_memory_bytes(EXPECTED) >= 2ull * EXPECTED * sizeof(struct mark));
    for (uint32_t search = 0; search < 40; search++) {
        uint32_t stride = strides[search % 5], marked = 0;

        if (search % 3 == 0) { /* a short search between long ones uses a part of the table */
            mark_set_clear(&set);
            assert_true(mark_set_put(&set, mark_set_find(&set, 17), 17, 1));
            assert_true(mark_is_set(&set, mark_set_find(&set, 17)));
        }
        mark_set_clear(&set);
        memset(values, 0, NUMBERS * sizeof *values); /* 0: not marked */
        for (uint32_t step = 0; step < 2 * EXPECTED; step++) {
            uint32_t i = (uint32_t)random_below(&random, NUMBERS);
            struct mark *mark = mark_set_find(&set, i * stride);

            assert_int_equal(mark_is_set(&set, mark), values[i] != 0);
            if (values[i]) {
                assert_int_equal(mark->number, i * stride);
                assert_int_equal(mark->value, values[i]);
            } else if (marked == EXPECTED) {
                continue;
            }
            marked += !values[i];
            values[i] = step + 1;
            assert_true(mark_set_put(&set, mark, i * stride, values[i]));
            assert_int_equal(set.count, marked);
        }
        for (uint32_t i = 0; i < NUMBERS; i++) {
            const struct mark *mark = mark_set_find(&set, i * stride);

            assert_int_equal(mark_is_set(&set, mark), values[i] != 0);
            assert_true(!values[i] || mark->value == values[i]);
        }
    }
    mark_set_release(&set);
    free(values);
}

static void test_as_many_marks_as_expected_always_fit_and_a_full_set_says_so(void **state)
{
    static const uint32_t expected[] = {0, 1, 127, 128, 129, 1000, 1024, 5000};

    (void)state;
    for (size_t e = 0; e < sizeof expected / sizeof expected[0]; e++) {
        struct mark_set set;
        struct error err;
        uint32_t put = 0;

        assert_int_equal(mark_set_init(&set, expected[e], &err), 0);
        while (mark_set_put(&set, mark_set_find(&set, put * 7), put * 7, put)) {
            put++;
            assert_true(put <= set.mask); /* or finding would not end */
        }
        assert_true(put >= expected[e]);
        for (uint32_t i = 0; i <= put; i++)
            assert_int_equal(mark_is_set(&set, mark_set_find(&set, i * 7)), i < put);
        /* A mark that is there takes another value even now. */
        if (put > 0) {
            assert_true(mark_set_put(&set, mark_set_find(&set, 0), 0, 99));
            assert_int_equal(mark_set_find(&set, 0)->value, 99);
        }
        mark_set_release(&set);
    }
}

static void test_old_marks_stay_forgotten_when_the_epochs_come_round(void **state)
{
    struct mark_set set;
    struct error err;

    (void)state;
    assert_int_equal(mark_set_init(&set, 100, &err), 0);
    for (uint32_t i = 0; i < 100; i++) /* marks of epoch 1, the one that comes after the last */
        assert_true(mark_set_put(&set, mark_set_find(&set, i), i, i));
    set.epoch = UINT32_MAX - 1;
    for (uint32_t round = 0; round < 4; round++) {
        mark_set_clear(&set);
        assert_int_equal(set.count, 0);
        for (uint32_t i = 0; i < 100; i++)
            assert_false(mark_is_set(&set, mark_set_find(&set, i)));
        for (uint32_t i = 0; i < 100; i++)
            assert_true(mark_set_put(&set, mark_set_find(&set, i), i, i));
    }
    mark_set_release(&set);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random_searches_hold_what_sorting_anew_would),
        cmocka_unit_test(test_bursts_in_any_order_come_out_sorted),
        cmocka_unit_test(test_the_nearest_are_kept_however_often_merges_are_forced),
        cmocka_unit_test(test_an_estimate_made_again_does_not_replace_what_became_of_the_first),
        cmocka_unit_test(test_what_is_gone_leaves_room_for_others),
        cmocka_unit_test(test_a_cleared_list_is_empty_and_no_longer_than_its_buffers),
        cmocka_unit_test(test_marks_are_found_until_the_set_is_cleared),
        cmocka_unit_test(test_as_many_marks_as_expected_always_fit_and_a_full_set_says_so),
        cmocka_unit_test(test_old_marks_stay_forgotten_when_the_epochs_come_round),
    };

    return cmocka_run_group_tests_name("candidate_list", tests, NULL, NULL);
}
