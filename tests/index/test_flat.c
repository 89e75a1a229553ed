/* flat_truth against the definition, computed in double and sorted whole. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "index/flat.h"
#include "storage/base/random.h"

#define SEED 20260304u

static const enum metric metrics[] = {METRIC_L2, METRIC_IP, METRIC_COSINE};

struct candidate {
    double distance;
    uint32_t row;
};

static int compare_candidates(const void *a, const void *b)
{
    const struct candidate *x = a, *y = b;

    if (x->distance != y->distance)
        return x->distance < y->distance ? -1 : 1;
    return (x->row > y->row) - (x->row < y->row);
}

static double naive_distance(enum metric metric, const float *q, const float *x, uint32_t dim)
{
    double ip = 0, qq = 0, xx = 0, l2 = 0;

    for (uint32_t d = 0; d < dim; d++) {
        ip += (double)q[d] * x[d];
        qq += (double)q[d] * q[d];
        xx += (double)x[d] * x[d];
        l2 += ((double)q[d] - x[d]) * ((double)q[d] - x[d]);
    }
    if (metric == METRIC_L2)
        return l2;
    if (metric == METRIC_IP)
        return -ip;
    return qq > 0 && xx > 0 ? 1 - ip / sqrt(qq * xx) : 1;
}

struct set {
    float *rows;
    uint8_t *bytes; /* the rows as stored, for integer types */
    float *queries;
    enum element_type element;
    uint32_t row_count, query_count, dim;
};

/* step: values are multiples of it, which makes ties; 0: normal deviates. */
static struct set set_make(enum element_type element, uint32_t rows, uint32_t queries, uint32_t dim,
                           float step, uint64_t stream)
{
    struct set s = {.element = element, .row_count = rows, .query_count = queries, .dim = dim};
    uint64_t values = (uint64_t)rows * dim, query_values = (uint64_t)queries * dim;
    struct random random;

    s.rows = malloc(values * sizeof *s.rows);
    s.bytes = malloc(values);
    s.queries = malloc(query_values * sizeof *s.queries);
    random_init(&random, SEED, stream);
    for (uint64_t i = 0; i < values + query_values; i++) {
        float value = random_normal(&random);

        if (element == ELEMENT_U8)
            value = (float)random_below(&random, 256);
        else if (element == ELEMENT_I8)
            value = (float)random_below(&random, 256) - 128;
        else if (step > 0)
            value = rintf(value / step) * step;
        if (i >= values) {
            s.queries[i - values] = value;
            continue;
        }
        s.rows[i] = value;
        s.bytes[i] = element == ELEMENT_U8   ? (uint8_t)value
                     : element == ELEMENT_I8 ? (uint8_t)(int8_t)value
                                             : 0;
    }
    return s;
}

static void set_free(struct set *s)
{
    free(s->rows);
    free(s->bytes);
    free(s->queries);
}

static struct vector_source *set_open(const struct set *s)
{
    struct error err = ERROR_INIT;
    struct vector_source *source = NULL;

    if (vector_source_open_memory(s->element == ELEMENT_F32 ? (const void *)s->rows : s->bytes,
                                  s->element, s->row_count, s->dim, "base", &source, &err) < 0)
        fail_msg("%s", err.message);
    return source;
}

static void check(const struct set *s, uint32_t k, enum metric metric, uint32_t workers)
{
    struct vector_source *source = set_open(s);
    struct candidate *all = malloc(s->row_count * sizeof *all);
    struct error err = ERROR_INIT;
    struct pool *pool = NULL;
    struct truth truth;

    if (pool_new(workers, &pool, &err) < 0 ||
        flat_truth(source, s->queries, s->query_count, k, metric, pool, NULL, &truth, &err) < 0)
        fail_msg("%s", err.message);
    assert_int_equal(truth.query_count, s->query_count);
    assert_int_equal(truth.k, k);
    for (uint32_t q = 0; q < s->query_count; q++) {
        for (uint32_t i = 0; i < s->row_count; i++)
            all[i] = (struct candidate){naive_distance(metric, s->queries + (size_t)q * s->dim,
                                                       s->rows + (size_t)i * s->dim, s->dim),
                                        i};
        qsort(all, s->row_count, sizeof *all, compare_candidates);
        for (uint32_t i = 0; i < k; i++) {
            double wanted = metric == METRIC_IP ? -all[i].distance : all[i].distance;
            uint32_t row = truth.ids[q * k + i];

            if (row != all[i].row)
                fail_msg("%s %s dim %u query %u rank %u: row %u, wanted %u",
                         element_name(s->element), metric_name(metric), s->dim, q, i, row,
                         all[i].row);
            if (truth.distances[q * k + i] != (float)wanted)
                fail_msg("%s %s dim %u query %u rank %u: %.9g, wanted %.9g",
                         element_name(s->element), metric_name(metric), s->dim, q, i,
                         (double)truth.distances[q * k + i], wanted);
        }
    }
    truth_release(&truth);
    vector_source_close(source);
    pool_free(pool);
    free(all);
}

static void test_floats_of_every_metric_rank_as_defined(void **state)
{
    static const uint32_t dims[] = {1, 3, 16, 100, 513};

    (void)state;
    for (size_t m = 0; m < 3; m++)
        for (size_t d = 0; d < sizeof dims / sizeof *dims; d++) {
            struct set s = set_make(ELEMENT_F32, 700, 9, dims[d], 0, dims[d]);

            /* In one dimension every cosine is 1 or -1: all ties. */
            check(&s, 10, metrics[m], 1);
            check(&s, 10, metrics[m], 3);
            set_free(&s);
        }
}

static void test_ties_go_to_the_lower_row(void **state)
{
    (void)state;
    for (size_t m = 0; m < 3; m++) {
        struct set s = set_make(ELEMENT_F32, 900, 7, 3, 1, 77);

        check(&s, 50, metrics[m], 2);
        for (uint32_t i = 0; i < s.row_count * s.dim; i++) /* all rows the same */
            s.rows[i] = s.rows[i % s.dim];
        check(&s, 50, metrics[m], 2);
        set_free(&s);
    }
}

static void test_integers_are_ranked_exactly(void **state)
{
    static const enum element_type elements[] = {ELEMENT_U8, ELEMENT_I8};

    (void)state;
    for (size_t e = 0; e < 2; e++)
        for (size_t m = 0; m < 3; m++) {
            struct set s = set_make(elements[e], 800, 8, 96, 0, 5 + e);

            check(&s, 20, metrics[m], 2);
            /* Queries that are no whole numbers take another kernel. */
            for (uint32_t i = 0; i < s.query_count * s.dim; i++)
                s.queries[i] += 0.37f;
            check(&s, 20, metrics[m], 2);
            set_free(&s);
        }
}

static void test_a_zero_vector_has_cosine_similarity_zero(void **state)
{
    struct set s = set_make(ELEMENT_F32, 300, 5, 8, 0, 9);

    (void)state;
    memset(s.rows + 40 * 8, 0, 8 * sizeof *s.rows);
    memset(s.rows + 41 * 8, 0, 8 * sizeof *s.rows);
    memset(s.queries + 8, 0, 8 * sizeof *s.queries); /* then every row is a tie */
    for (size_t m = 0; m < 3; m++)
        check(&s, 300, metrics[m], 1);
    set_free(&s);
}

static void test_k_may_be_the_row_count_and_no_more(void **state)
{
    struct set s = set_make(ELEMENT_F32, 37, 4, 5, 0, 11);
    struct vector_source *source = set_open(&s);
    static const uint32_t wrong[] = {0, 38, 1000};

    (void)state;
    check(&s, 37, METRIC_L2, 1);
    check(&s, 1, METRIC_L2, 1);
    for (size_t i = 0; i < 3; i++) {
        struct error err = ERROR_INIT;
        struct truth truth;

        assert_int_equal(
            flat_truth(source, s.queries, 4, wrong[i], METRIC_L2, NULL, NULL, &truth, &err), -1);
        assert_int_equal(err.code, ERR_INVALID);
        assert_non_null(strstr(err.message, "37 rows"));
        assert_null(truth.ids);
    }
    vector_source_close(source);
    set_free(&s);
}

static void test_more_rows_than_a_block_holds_are_all_seen(void **state)
{
    /* 8 MiB blocks: two of them and a bit. */
    struct set s = set_make(ELEMENT_F32, 4500, 3, 1024, 0, 12);

    (void)state;
    memcpy(s.queries, s.rows + 4499 * 1024, 1024 * sizeof *s.queries);
    memcpy(s.queries + 1024, s.rows + 2048 * 1024, 1024 * sizeof *s.queries);
    for (size_t m = 0; m < 3; m++)
        check(&s, 10, metrics[m], 2);
    set_free(&s);
}

static void test_more_queries_and_rows_than_are_multiplied_at_once_are_all_seen(void **state)
{
    struct set s = set_make(ELEMENT_U8, 1300, 300, 24, 0, 13);

    (void)state;
    for (size_t m = 0; m < 3; m++)
        check(&s, 7, metrics[m], 3);
    set_free(&s);
}

/* Their products differ by less than one rounding. */
static void test_neighbours_far_from_the_origin_are_told_apart(void **state)
{
    struct set s = set_make(ELEMENT_F32, 3000, 140, 16, 0.0625f, 14);

    (void)state;
    for (uint32_t i = 0; i < s.row_count * s.dim; i++)
        s.rows[i] += 16384;
    for (uint32_t i = 0; i < s.query_count / 2 * s.dim; i++) /* of the others no row is near */
        s.queries[i] += 16384;
    check(&s, 10, METRIC_L2, 3);
    set_free(&s);
}

static void test_nan_in_the_base_is_refused_by_row_and_dimension(void **state)
{
    struct set s = set_make(ELEMENT_F32, 500, 2, 6, 0, 13);
    struct vector_source *source;

    (void)state;
    for (int i = 0; i < 2; i++) {
        struct error err = ERROR_INIT;
        struct truth truth;

        s.rows[321 * 6 + 4] = i ? INFINITY : NAN;
        source = set_open(&s);
        assert_int_equal(
            flat_truth(source, s.queries, 2, 5, METRIC_COSINE, NULL, NULL, &truth, &err), -1);
        assert_int_equal(err.code, ERR_INVALID);
        assert_non_null(strstr(err.message, "row 321"));
        assert_non_null(strstr(err.message, "dimension 4"));
        assert_null(truth.ids);
        vector_source_close(source);
    }
    set_free(&s);
}

static void test_a_cancelled_scan_says_so(void **state)
{
    struct set s = set_make(ELEMENT_F32, 500, 2, 6, 0, 14);
    struct vector_source *source = set_open(&s);
    struct job *job = job_new(NULL, NULL);
    struct error err = ERROR_INIT;
    struct truth truth;

    (void)state;
    job_cancel(job);
    assert_int_equal(flat_truth(source, s.queries, 2, 5, METRIC_L2, NULL, job, &truth, &err), -1);
    assert_int_equal(err.code, ERR_CANCELLED);
    assert_null(truth.ids);
    job_free(job);
    vector_source_close(source);
    set_free(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_floats_of_every_metric_rank_as_defined),
        cmocka_unit_test(test_ties_go_to_the_lower_row),
        cmocka_unit_test(test_integers_are_ranked_exactly),
        cmocka_unit_test(test_a_zero_vector_has_cosine_similarity_zero),
        cmocka_unit_test(test_k_may_be_the_row_count_and_no_more),
        cmocka_unit_test(test_more_rows_than_a_block_holds_are_all_seen),
        cmocka_unit_test(test_more_queries_and_rows_than_are_multiplied_at_once_are_all_seen),
        cmocka_unit_test(test_neighbours_far_from_the_origin_are_told_apart),
        cmocka_unit_test(test_nan_in_the_base_is_refused_by_row_and_dimension),
        cmocka_unit_test(test_a_cancelled_scan_says_so),
    };

    return cmocka_run_group_tests_name("flat", tests, NULL, NULL);
}
