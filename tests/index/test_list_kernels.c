/* Every instruction set against the portable functions, and those against what is written in the
 * header, at all lengths around a register's. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "index/list_kernels.h"
#include "storage/base/random.h"

#define SEED 20261121u
#define COUNT_MAX 200u

/* On the heap at its exact size, so that a read or write past the end is seen. */
struct columns {
    struct candidate_columns at;
    uint32_t count;
};

static void *exactly(const void *from, size_t bytes)
{
    void *copy = malloc(bytes ? bytes : 1);

    assert_non_null(copy);
    if (from)
        memcpy(copy, from, bytes);
    return copy;
}

static struct columns columns_random(struct random *random, uint32_t count, uint32_t kinds)
{
    struct columns c = {.count = count};

    c.at.distance = exactly(NULL, count * sizeof(float));
    c.at.sharpness = exactly(NULL, count * sizeof(float));
    c.at.position = exactly(NULL, count * sizeof(uint32_t));
    c.at.page = exactly(NULL, count * sizeof(uint32_t));
    for (uint32_t i = 0; i < count; i++) {
        c.at.distance[i] = ((float)random_below(random, kinds) - (float)kinds / 3) / 4;
        if (random_below(random, 40) == 0)
            c.at.distance[i] = random_below(random, 2) ? INFINITY : -0.0f;
        c.at.sharpness[i] = random_below(random, 10) ? random_float(random) * 4 : 1e30f;
        c.at.position[i] = (uint32_t)random_below(random, 300);
        c.at.page[i] =
            (uint32_t)random_below(random, 12) * (random_below(random, 9) ? 1 : 357913941);
    }
    return c;
}

static struct columns columns_copy(const struct columns *from)
{
    struct columns c = {.count = from->count};

    c.at.distance = exactly(from->at.distance, c.count * sizeof(float));
    c.at.sharpness = exactly(from->at.sharpness, c.count * sizeof(float));
    c.at.position = exactly(from->at.position, c.count * sizeof(uint32_t));
    c.at.page = exactly(from->at.page, c.count * sizeof(uint32_t));
    return c;
}

static void columns_free(struct columns *c)
{
    free(c->at.distance);
    free(c->at.sharpness);
    free(c->at.position);
    free(c->at.page);
}

static void assert_same_rows(const struct columns *a, const struct columns *b, uint32_t count)
{
    assert_memory_equal(a->at.distance, b->at.distance, count * sizeof(float));
    assert_memory_equal(a->at.sharpness, b->at.sharpness, count * sizeof(float));
    assert_memory_equal(a->at.position, b->at.position, count * sizeof(uint32_t));
    assert_memory_equal(a->at.page, b->at.page, count * sizeof(uint32_t));
}

static void compare_all(const struct list_kernels *kernels, struct random *random, uint32_t count,
                        uint32_t kinds)
{
    const struct list_kernels *portable = list_kernels_for(ISA_SCALAR);
    uint32_t shares[SHARE_STEPS];
    struct columns c = columns_random(random, count, kinds);
    float bound = count ? c.at.distance[random_below(random, count)] : 0;
    uint32_t page = count ? c.at.page[random_below(random, count)] : 0;
    uint32_t wanted = (uint32_t)random_below(random, 300), ties = (uint32_t)random_below(random, 5);
    static const uint32_t ranges[][2] = {{0, UINT32_MAX}, {0, 5}, {5, UINT32_MAX},
                                         {3, 3},          {4, 5}, {UINT32_MAX - 1, UINT32_MAX}};

    for (uint32_t i = 0; i < SHARE_STEPS; i++)
        shares[i] = (uint32_t)random_below(random, UINT32_MAX);
    assert_int_equal(kernels->below(c.at.distance, count, bound),
                     portable->below(c.at.distance, count, bound));
    assert_int_equal(kernels->below(c.at.distance, count, INFINITY),
                     portable->below(c.at.distance, count, INFINITY));
    for (size_t r = 0; r < sizeof ranges / sizeof *ranges; r++)
        assert_int_equal(
            kernels->nearest(c.at.distance, c.at.page, count, ranges[r][0], ranges[r][1]),
            portable->nearest(c.at.distance, c.at.page, count, ranges[r][0], ranges[r][1]));
    assert_int_equal(kernels->find(c.at.position, count, wanted),
                     portable->find(c.at.position, count, wanted));
    assert_true(kernels->shares(c.at.distance, c.at.sharpness, count, bound, shares) ==
                portable->shares(c.at.distance, c.at.sharpness, count, bound, shares));

    for (uint32_t what = 0; what < 2; what++) {
        struct columns a = columns_copy(&c), b = columns_copy(&c);
        uint32_t kept_a = what ? kernels->drop_page(&a.at, count, page)
                               : kernels->drop_beyond(&a.at, count, bound, ties);
        uint32_t kept_b = what ? portable->drop_page(&b.at, count, page)
                               : portable->drop_beyond(&b.at, count, bound, ties);

        assert_int_equal(kept_a, kept_b);
        assert_same_rows(&a, &b, kept_b);
        columns_free(&a);
        columns_free(&b);
    }
    columns_free(&c);
}

static void test_every_instruction_set_does_what_the_portable_functions_do(void **state)
{
    static const uint32_t kinds[] = {1, 6, 100, 1u << 20};
    struct random random;

    (void)state;
    random_init(&random, SEED, 1);
    for (int isa = ISA_SCALAR; isa < ISA_COUNT; isa++) {
        const struct list_kernels *kernels = list_kernels_for((enum isa)isa);

        if (!kernels)
            continue;
        for (uint32_t count = 0; count <= COUNT_MAX; count++)
            for (uint32_t k = 0; k < 4; k++)
                compare_all(kernels, &random, count, kinds[k]);
    }
}

static void test_the_portable_functions_do_what_they_say(void **state)
{
    const struct list_kernels *k = list_kernels_for(ISA_SCALAR);
    float distance[] = {5, 1, 3, 1, 9}, sharpness[] = {1, 2, 3, 4, 5};
    uint32_t position[] = {50, 10, 30, 11, 90}, page[] = {2, 7, 2, 8, 9};
    struct candidate_columns columns = {distance, sharpness, position, page};
    uint32_t shares[SHARE_STEPS];

    (void)state;
    assert_int_equal(k->below(distance, 5, 3), 2);
    assert_int_equal(k->below(distance, 5, 1), 0);
    assert_int_equal(k->nearest(distance, page, 5, 0, UINT32_MAX), 1); /* the first of equals */
    assert_int_equal(k->nearest(distance, page, 5, 8, UINT32_MAX), 3);
    assert_int_equal(k->nearest(distance, page, 5, 0, 7), 2);
    assert_int_equal(k->nearest(distance, page, 5, 3, 7), LIST_NONE);
    assert_int_equal(k->find(position, 5, 11), 3);
    assert_int_equal(k->find(position, 5, 12), LIST_NONE);
    for (uint32_t i = 0; i < SHARE_STEPS; i++)
        shares[i] = i;
    /* At the bound: the middle; a quarter of an error beyond it: eight steps more. */
    assert_int_equal(k->shares(distance + 2, sharpness + 2, 1, 3, shares), SHARE_STEPS / 2);
    sharpness[2] = 0.25f;
    assert_int_equal(k->shares(distance + 2, sharpness + 2, 1, 2, shares), SHARE_STEPS / 2 + 8);
    assert_int_equal(k->shares(distance + 2, sharpness + 2, 1, -13, shares), 0);  /* 4 errors */
    assert_int_equal(k->shares(distance + 2, sharpness + 2, 1, 1000, shares), 0); /* first entry */
    assert_int_equal(k->drop_beyond(&columns, 5, 1, 1), 1); /* a tie stays, one does not */
    assert_int_equal(position[0], 10);
    page[1] = page[0];
    page[2] = 3;
    assert_int_equal(k->drop_page(&columns, 3, page[0]), 1);
    assert_int_equal(page[0], 3);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_the_portable_functions_do_what_they_say),
        cmocka_unit_test(test_every_instruction_set_does_what_the_portable_functions_do),
    };

    return cmocka_run_group_tests_name("list_kernels", tests, NULL, NULL);
}
