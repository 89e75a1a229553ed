/* Tests of index/quantiser and what stands behind it: gemm, kmeans, code_kernels, pq, opq, scalar.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "index/code_kernels.h"
#include "index/code_scan.h"
#include "index/gemm.h"
#include "index/kmeans.h"
#include "index/opq.h"
#include "index/pq.h"
#include "index/quantiser.h"
#include "storage/base/bytes.h"
#include "storage/base/random.h"

#define SEED 20240607u

static void *must_alloc(size_t bytes)
{
    void *p = malloc(bytes);

    assert_non_null(p);
    return p;
}

static float *normal_rows(uint32_t count, uint32_t dim, float offset, uint64_t stream)
{
    struct random random;
    float *rows = must_alloc((size_t)count * dim * sizeof *rows);

    random_init(&random, SEED, stream);
    for (size_t i = 0; i < (size_t)count * dim; i++)
        rows[i] = offset + random_normal(&random);
    return rows;
}

/* Few strong directions, mixed into all dimensions: neighbouring dimensions are correlated and the
 * first are stronger than the last. */
static float *correlated_rows(uint32_t count, uint32_t dim, uint64_t stream)
{
    struct random random;
    uint32_t sources = dim / 2;
    float *mix = must_alloc((size_t)sources * dim * sizeof *mix);
    float *rows = must_alloc((size_t)count * dim * sizeof *rows);

    random_init(&random, SEED, 1000);
    for (uint32_t s = 0; s < sources; s++) {
        for (uint32_t d = 0; d < dim; d++)
            mix[s * dim + d] = random_normal(&random) * expf(-0.25f * (float)s) +
                               (d < dim / 4 ? 0.3f * random_normal(&random) : 0);
    }
    random_init(&random, SEED, stream);
    for (uint32_t i = 0; i < count; i++) {
        float *row = rows + (size_t)i * dim;

        for (uint32_t d = 0; d < dim; d++)
            row[d] = 0.05f * random_normal(&random);
        for (uint32_t s = 0; s < sources; s++) {
            float strength = random_normal(&random);

            for (uint32_t d = 0; d < dim; d++)
                row[d] += strength * mix[s * dim + d];
        }
    }
    free(mix);
    return rows;
}

static float *clustered_rows(uint32_t count, uint32_t dim, uint32_t clusters, uint64_t stream)
{
    struct random random;
    float *centres = normal_rows(clusters, dim, 0, 77);
    float *rows = must_alloc((size_t)count * dim * sizeof *rows);

    random_init(&random, SEED, stream);
    for (uint32_t i = 0; i < count; i++) {
        const float *centre = centres + random_below(&random, clusters) * dim;

        for (uint32_t d = 0; d < dim; d++)
            rows[(size_t)i * dim + d] = 4 * centre[d] + random_normal(&random);
    }
    free(centres);
    return rows;
}

static struct quantiser *train_choice(enum code_kind kind, enum code_choice own,
                                      const float *sample, uint32_t count, uint32_t dim,
                                      uint32_t code_bytes, struct pool *pool,
                                      struct code_bake_off *bake_off)
{
    struct quantiser_params params = {kind, own, code_bytes, SEED};
    struct error err = ERROR_INIT;
    struct quantiser *quantiser = NULL;

    if (quantiser_train(&params, sample, count, dim, pool, NULL, &quantiser, bake_off, &err) < 0)
        fail_msg("quantiser_train(%s): %s", code_kind_name(kind), err.message);
    return quantiser;
}

static struct quantiser *train(enum code_kind kind, const float *sample, uint32_t count,
                               uint32_t dim, uint32_t code_bytes, struct pool *pool)
{
    return train_choice(kind, CHOICE_NO, sample, count, dim, code_bytes, pool, NULL);
}

/* A query's table and all it needs. */
struct lookup {
    struct code_table table;
    float *scratch;
};

static void lookup_init(struct lookup *lookup, const struct quantiser *quantiser)
{
    memset(lookup, 0, sizeof *lookup);
    lookup->table.entries = aligned_alloc(64, quantiser_table_entries(quantiser) * 2);
    lookup->scratch = must_alloc(quantiser_scratch_floats(quantiser) * sizeof(float));
    assert_non_null(lookup->table.entries);
}

static void lookup_release(struct lookup *lookup)
{
    free(lookup->table.entries);
    free(lookup->scratch);
}

static double true_distance(enum metric metric, const float *a, const float *b, uint32_t dim)
{
    double sum = 0;

    for (uint32_t d = 0; d < dim; d++)
        sum += metric == METRIC_L2 ? ((double)a[d] - b[d]) * ((double)a[d] - b[d])
                                   : -(double)a[d] * b[d];
    return sum;
}

struct shape {
    enum code_kind kind;
    enum code_choice own;
    uint32_t dim;
    uint32_t code_bytes;
    float offset;
};

/* Even and uneven chunks, one chunk, chunks past the GEMM threshold, one dimension a chunk, lengths
 * that are no multiple of a vector register, data far from the origin, each with and without own
 * distortion. */
static const struct shape shapes[] = {
    {CODE_PQ, CHOICE_NO, 32, 8, 0},      {CODE_PQ, CHOICE_YES, 37, 5, 0},
    {CODE_PQ, CHOICE_NO, 40, 1, 0},      {CODE_PQ, CHOICE_YES, 17, 18, 0},
    {CODE_PQ, CHOICE_NO, 17, 17, 0},     {CODE_PQ, CHOICE_NO, 1, 1, 0},
    {CODE_PQ, CHOICE_YES, 1, 2, 0},      {CODE_PQ, CHOICE_NO, 48, 3, 50},
    {CODE_PQ, CHOICE_YES, 48, 4, 50},    {CODE_OPQ, CHOICE_NO, 32, 8, 0},
    {CODE_OPQ, CHOICE_YES, 37, 5, 0},    {CODE_OPQ, CHOICE_NO, 19, 19, 0},
    {CODE_OPQ, CHOICE_NO, 1, 1, 0},      {CODE_OPQ, CHOICE_YES, 40, 3, 10},
    {CODE_OPQ, CHOICE_NO, 150, 30, 0},   {CODE_SCALAR, CHOICE_NO, 32, 16, 0},
    {CODE_SCALAR, CHOICE_NO, 37, 19, 0}, {CODE_SCALAR, CHOICE_YES, 37, 20, 0},
    {CODE_SCALAR, CHOICE_NO, 32, 32, 0}, {CODE_SCALAR, CHOICE_YES, 37, 38, 5},
    {CODE_SCALAR, CHOICE_NO, 1, 1, 0},   {CODE_SCALAR, CHOICE_NO, 3, 2, 0},
    {CODE_AUTO, CHOICE_AUTO, 24, 6, 0},  {CODE_AUTO, CHOICE_AUTO, 24, 15, 0},
    {CODE_AUTO, CHOICE_AUTO, 24, 25, 0}, {CODE_AUTO, CHOICE_AUTO, 24, 13, 0},
};
#define SHAPE_COUNT (sizeof shapes / sizeof shapes[0])

static void test_estimates_equal_decoded_distances_to_the_tables_steps_on_every_isa(void **state)
{
    const enum metric metrics[] = {METRIC_L2, METRIC_IP};
    enum { COUNT = 700, QUERIES = 4 };
    struct error err = ERROR_INIT;

    (void)state;
    for (size_t s = 0; s < SHAPE_COUNT; s++) {
        uint32_t dim = shapes[s].dim, code_bytes = shapes[s].code_bytes;
        float *rows = normal_rows(COUNT, dim, shapes[s].offset, s);
        float *queries = normal_rows(QUERIES, dim, shapes[s].offset, 100 + s);
        struct quantiser *q =
            train_choice(shapes[s].kind, shapes[s].own, rows, COUNT, dim, code_bytes, NULL, NULL);
        uint8_t *codes = must_alloc((size_t)COUNT * code_bytes);
        float *decoded = must_alloc(dim * sizeof *decoded);
        bool own = quantiser_has_own_distortion(q);
        /* A rotation of half floats is one to some 2^-12. */
        double rounding = quantiser_kind(q) == CODE_OPQ ? 1e-3 : 2e-5;
        struct lookup lookup;
        uint16_t sums[COUNT];

        lookup_init(&lookup, q);
        assert_int_equal(quantiser_dim(q), dim);
        assert_int_equal(quantiser_code_bytes(q), code_bytes);
        assert_true(shapes[s].own == CHOICE_AUTO || own == (shapes[s].own == CHOICE_YES));
        assert_int_equal(quantiser_encode(q, rows, COUNT, NULL, codes, &err), 0);
        for (size_t m = 0; m < 2 * QUERIES * (size_t)ISA_COUNT; m++) {
            const struct code_scan_kernels *kernels =
                code_scan_kernels_for((enum isa)(m / (2 * QUERIES)));
            enum metric metric = metrics[m % 2];
            const float *query = queries + m / 2 % QUERIES * dim;
            struct code_table *table = &lookup.table;

            if (!kernels)
                continue;
            quantiser_table(q, metric, query, lookup.scratch, table);
            assert_int_equal(table->chunk_count, code_bytes - (own && metric == METRIC_IP));
            assert_true(table->chunk_count * 256ull <= quantiser_table_entries(q));
            kernels->spans(table->entries, table->chunk_count, codes, code_bytes,
                           &(struct code_span){0, COUNT}, 1, sums);
            for (uint32_t i = 0; i < COUNT; i++) {
                const uint8_t *code = codes + (size_t)i * code_bytes;
                double estimate = (double)table->offset + (double)table->step * sums[i];
                double want, size = 1e-3;

                quantiser_decode(q, code, decoded);
                want = true_distance(metric, query, decoded, dim);
                if (metric == METRIC_L2)
                    want += (double)quantiser_code_distortion(q, code);
                /* What is added up on the way: an inner product is the mean's (or the lowest
                 * level's) share and the rest, each as large as the values, 4 + offset here. */
                for (uint32_t d = 0; d < dim; d++) {
                    double diff = (double)query[d] - decoded[d];

                    size += metric == METRIC_L2 ? (fabs(query[d]) + fabs(decoded[d])) * fabs(diff)
                                                : fabs(query[d]) * (4 + (double)shapes[s].offset);
                }
                if (fabs(estimate - want) >
                    0.5 * (double)table->step * table->chunk_count + rounding * size)
                    fail_msg("shape %zu (%s), metric %d, %s, row %u: estimate %g, want %g", s,
                             code_kind_name(quantiser_kind(q)), metric, kernels->name, i, estimate,
                             want);
            }
        }
        free(rows);
        free(queries);
        free(codes);
        free(decoded);
        lookup_release(&lookup);
        quantiser_free(q);
    }
}

static void test_own_distortion_is_the_vectors_error_to_a_few_percent(void **state)
{
    enum { COUNT = 4000, DIM = 24 };
    struct error err = ERROR_INIT;

    (void)state;
    for (enum code_kind kind = CODE_PQ; kind <= CODE_SCALAR; kind++) {
        uint32_t bytes = kind == CODE_SCALAR ? 13 : 7, clamped = 0;
        float *rows = correlated_rows(COUNT, DIM, 30);
        struct quantiser *q = train_choice(kind, CHOICE_YES, rows, COUNT, DIM, bytes, NULL, NULL);
        uint8_t code[16];
        float decoded[DIM];
        double sum = 0;

        for (uint32_t i = COUNT / 2; i < COUNT; i++) {
            double error, own;

            assert_int_equal(quantiser_encode(q, rows + (size_t)i * DIM, 1, NULL, code, &err), 0);
            quantiser_decode(q, code, decoded);
            error = true_distance(METRIC_L2, rows + (size_t)i * DIM, decoded, DIM);
            own = (double)quantiser_code_distortion(q, code);
            /* The scale leaves out a thousandth at both ends. */
            clamped += fabs(own - error) > 0.03 * error;
            sum += own;
        }
        assert_true(clamped <= COUNT / 2 / 250 + 2);
        assert_true(fabs(sum / (COUNT / 2) / (double)quantiser_distortion(q) - 1) < 0.02);
        free(rows);
        quantiser_free(q);
    }
}

/* Rows at very different distances from the same centres, in directions too many for a few bytes:
 * codes tell the centre, and only their own distortion how far from it a row is. */
static float *uneven_rows(uint32_t count, uint32_t dim, uint64_t stream)
{
    struct random random;
    float *centres = normal_rows(10, dim, 0, 34);
    float *rows = must_alloc((size_t)count * dim * sizeof *rows);

    random_init(&random, SEED, stream);
    for (uint32_t i = 0; i < count; i++) {
        const float *centre = centres + random_below(&random, 10) * dim;
        float spread = 0.3f * expf(random_normal(&random));

        for (uint32_t d = 0; d < dim; d++)
            rows[(size_t)i * dim + d] = 4 * centre[d] + spread * random_normal(&random);
    }
    free(centres);
    return rows;
}

static void test_own_distortion_needs_fewer_rows_on_unevenly_coded_data(void **state)
{
    enum { COUNT = 8000, DIM = 192 };
    float *rows = uneven_rows(COUNT, DIM, 31);
    struct code_bake_off bake_off;
    struct quantiser *q = train_choice(CODE_PQ, CHOICE_AUTO, rows, COUNT, DIM, 4, NULL, &bake_off);

    (void)state;
    assert_int_equal(bake_off.count, 2);
    assert_true(bake_off.queries > 100 && bake_off.base_rows > 3000);
    assert_false(bake_off.trials[0].own_distortion);
    assert_true(bake_off.trials[1].own_distortion && bake_off.trials[1].chosen);
    assert_true(bake_off.trials[0].verified_95 > 0);
    assert_true(bake_off.trials[1].verified_95 < 0.8f * bake_off.trials[0].verified_95);
    assert_true(bake_off.trials[1].verified_99 < 0.8f * bake_off.trials[0].verified_99);
    assert_true(quantiser_has_own_distortion(q));
    free(rows);
    quantiser_free(q);
}

/* Each chunk of four dimensions is one of a few hundred points: plain pq codes it almost without
 * loss, and a rotation mixes what it could tell apart. */
static float *block_rows(uint32_t count, uint32_t dim, uint64_t stream)
{
    struct random random;
    uint32_t blocks = dim / 4;
    float *points = normal_rows(blocks * 200, 4, 0, 33);
    float *rows = must_alloc((size_t)count * dim * sizeof *rows);

    random_init(&random, SEED, stream);
    for (uint32_t i = 0; i < count; i++) {
        for (uint32_t b = 0; b < blocks; b++) {
            const float *point = points + (b * 200 + random_below(&random, 200)) * 4;

            for (uint32_t d = 0; d < 4; d++)
                rows[(size_t)i * dim + b * 4 + d] = point[d] + 0.05f * random_normal(&random);
        }
    }
    free(points);
    return rows;
}

static void test_auto_takes_plain_pq_where_chunks_are_the_structure(void **state)
{
    enum { COUNT = 6000, DIM = 32 };
    float *rows = block_rows(COUNT, DIM, 32);
    struct code_bake_off bake_off;
    struct quantiser *q =
        train_choice(CODE_AUTO, CHOICE_AUTO, rows, COUNT, DIM, 8, NULL, &bake_off);
    uint32_t chosen = 0;

    (void)state;
    assert_int_equal(bake_off.count, 4); /* a scalar code of 8 or 7 bytes there is none */
    for (uint32_t i = 0; i < bake_off.count; i++) {
        const struct code_trial *trial = &bake_off.trials[i];

        assert_int_equal(trial->code_bytes, 8);
        assert_true(trial->verified_95 >= 9 && trial->verified_99 >= trial->verified_95);
        assert_true(trial->distortion > 0);
        chosen += trial->chosen;
    }
    assert_int_equal(chosen, 1);
    assert_true(bake_off.trials[0].chosen);
    assert_int_equal(quantiser_kind(q), CODE_PQ);
    assert_false(quantiser_has_own_distortion(q));
    free(rows);
    quantiser_free(q);
}

static void test_queries_too_large_for_their_squares_get_a_finite_table(void **state)
{
    enum { COUNT = 300, DIM = 8 };
    const float numbers[] = {3e38f, -3e38f, 1e25f, 0};
    float *rows = normal_rows(COUNT, DIM, 0, 40);

    (void)state;
    for (enum code_kind kind = CODE_PQ; kind <= CODE_SCALAR; kind++) {
        struct quantiser *q = train(kind, rows, COUNT, DIM, 4, NULL);
        struct lookup lookup;

        lookup_init(&lookup, q);
        for (size_t n = 0; n < 4; n++) {
            float query[DIM];

            for (uint32_t d = 0; d < DIM; d++)
                query[d] = d % 3 ? numbers[n] : 1;
            for (int metric = METRIC_L2; metric <= METRIC_IP; metric++) {
                quantiser_table(q, (enum metric)metric, query, lookup.scratch, &lookup.table);
                assert_true(isfinite(lookup.table.offset) && isfinite(lookup.table.step));
            }
        }
        lookup_release(&lookup);
        quantiser_free(q);
    }
    free(rows);
}

static void test_encoding_picks_the_nearest_centroid(void **state)
{
    const struct shape wanted[] = {{CODE_PQ, CHOICE_NO, 32, 8, 0},
                                   {CODE_PQ, CHOICE_NO, 40, 2, 0},
                                   {CODE_PQ, CHOICE_NO, 30, 4, 1000}};
    struct error err = ERROR_INIT;

    (void)state;
    for (size_t s = 0; s < 3; s++) {
        uint32_t dim = wanted[s].dim, bytes = wanted[s].code_bytes;
        float *rows = normal_rows(600, dim, wanted[s].offset, 200 + s);
        struct quantiser *q = train(CODE_PQ, rows, 600, dim, bytes, NULL);
        uint8_t codes[8], other[8];
        float decoded[64];

        for (uint32_t i = 0; i < 100; i++) {
            const float *row = rows + (size_t)i * dim;

            assert_int_equal(quantiser_encode(q, row, 1, NULL, codes, &err), 0);
            quantiser_decode(q, codes, decoded);
            double best = true_distance(METRIC_L2, row, decoded, dim);
            for (uint32_t c = 0; c < bytes; c++) {
                for (uint32_t v = 0; v < 256; v++) {
                    memcpy(other, codes, bytes);
                    other[c] = (uint8_t)v;
                    quantiser_decode(q, other, decoded);
                    assert_true(true_distance(METRIC_L2, row, decoded, dim) >=
                                best * (1 - 1e-4) - 1e-6 * (1 + wanted[s].offset));
                }
            }
        }
        free(rows);
        quantiser_free(q);
    }
}

static void test_distortion_is_the_error_of_the_second_half(void **state)
{
    struct error err = ERROR_INIT;
    enum { COUNT = 1500, DIM = 30 };

    (void)state;
    for (enum code_kind kind = CODE_PQ; kind <= CODE_SCALAR; kind++) {
        uint32_t bytes = kind == CODE_SCALAR ? 15 : 6;
        float *rows = correlated_rows(COUNT, DIM, 5);
        struct quantiser *q = train(kind, rows, COUNT, DIM, bytes, NULL);
        uint8_t code[16];
        float decoded[DIM];
        double sum = 0;

        for (uint32_t i = COUNT / 2; i < COUNT; i++) {
            assert_int_equal(quantiser_encode(q, rows + (size_t)i * DIM, 1, NULL, code, &err), 0);
            quantiser_decode(q, code, decoded);
            sum += true_distance(METRIC_L2, rows + (size_t)i * DIM, decoded, DIM);
        }
        sum /= COUNT - COUNT / 2;
        assert_true(fabs(quantiser_distortion(q) - sum) <= 1e-3 * sum);
        free(rows);
        quantiser_free(q);
    }
}

static void test_opq_loses_less_than_pq_on_correlated_data_and_auto_takes_it(void **state)
{
    enum { COUNT = 6000, DIM = 64 };
    float *rows = correlated_rows(COUNT, DIM, 6);
    struct quantiser *pq = train(CODE_PQ, rows, COUNT, DIM, 8, NULL);
    struct quantiser *opq = train(CODE_OPQ, rows, COUNT, DIM, 8, NULL);
    struct quantiser *chosen = train(CODE_AUTO, rows, COUNT, DIM, 8, NULL);

    (void)state;
    assert_true(quantiser_distortion(opq) < 0.8f * quantiser_distortion(pq));
    assert_int_equal(quantiser_kind(chosen), CODE_OPQ);
    assert_true(quantiser_distortion(chosen) == quantiser_distortion(opq));
    free(rows);
    quantiser_free(pq);
    quantiser_free(opq);
    quantiser_free(chosen);
}

static void test_a_single_code_is_not_compared(void **state)
{
    float *rows = normal_rows(400, 8, 0, 7);
    struct code_bake_off bake_off;
    struct quantiser *q = train_choice(CODE_OPQ, CHOICE_YES, rows, 400, 8, 9, NULL, &bake_off);

    (void)state;
    assert_int_equal(bake_off.count, 1);
    assert_true(bake_off.trials[0].chosen && bake_off.trials[0].own_distortion);
    assert_int_equal(bake_off.trials[0].kind, CODE_OPQ);
    assert_true(bake_off.trials[0].verified_95 == 0 && bake_off.queries == 0);
    free(rows);
    quantiser_free(q);
}

static void test_stored_bytes_and_codes_are_the_same_for_any_pool(void **state)
{
    const struct shape wanted[] = {{CODE_AUTO, CHOICE_AUTO, 30, 15, 0},
                                   {CODE_PQ, CHOICE_YES, 48, 2, 0},
                                   {CODE_OPQ, CHOICE_YES, 150, 20, 0},
                                   {CODE_SCALAR, CHOICE_NO, 30, 30, 0}};
    const uint32_t workers[] = {1, 3, 4, 7};
    enum { COUNT = 3001 };
    struct error err = ERROR_INIT;

    (void)state;
    for (size_t s = 0; s < 4; s++) {
        uint32_t dim = wanted[s].dim;
        float *rows = correlated_rows(COUNT, dim, 8 + s);
        uint8_t *first = NULL, *first_codes = NULL;
        size_t first_bytes = 0;

        for (size_t w = 0; w < 5; w++) {
            struct pool *pool = NULL;
            struct quantiser *q;
            uint8_t *data, *codes = must_alloc((size_t)COUNT * wanted[s].code_bytes);
            size_t bytes;

            if (w < 4) /* and once without a pool */
                assert_int_equal(pool_new(workers[w], &pool, &err), 0);
            q = train_choice(wanted[s].kind, wanted[s].own, rows, COUNT, dim, wanted[s].code_bytes,
                             pool, NULL);
            assert_int_equal(quantiser_encode(q, rows, COUNT, pool, codes, &err), 0);
            assert_int_equal(quantiser_encode_bytes(q, &data, &bytes, &err), 0);
            if (!first) {
                first = data;
                first_codes = codes;
                first_bytes = bytes;
            } else {
                assert_int_equal(bytes, first_bytes);
                assert_memory_equal(data, first, bytes);
                assert_memory_equal(codes, first_codes, (size_t)COUNT * wanted[s].code_bytes);
                free(data);
                free(codes);
            }
            quantiser_free(q);
            pool_free(pool);
        }
        free(first);
        free(first_codes);
        free(rows);
    }
}

static void test_another_seed_gives_other_bytes(void **state)
{
    struct error err = ERROR_INIT;
    float *rows = normal_rows(600, 8, 0, 9);
    struct quantiser_params first = {CODE_PQ, CHOICE_NO, 2, 1}, second = {CODE_PQ, CHOICE_NO, 2, 2};
    struct quantiser *a, *b;
    uint8_t *a_data, *b_data;
    size_t a_bytes, b_bytes;

    (void)state;
    assert_int_equal(quantiser_train(&first, rows, 600, 8, NULL, NULL, &a, NULL, &err), 0);
    assert_int_equal(quantiser_train(&second, rows, 600, 8, NULL, NULL, &b, NULL, &err), 0);
    assert_int_equal(quantiser_encode_bytes(a, &a_data, &a_bytes, &err), 0);
    assert_int_equal(quantiser_encode_bytes(b, &b_data, &b_bytes, &err), 0);
    assert_int_equal(a_bytes, b_bytes);
    assert_memory_not_equal(a_data, b_data, a_bytes);
    free(a_data);
    free(b_data);
    free(rows);
    quantiser_free(a);
    quantiser_free(b);
}

static void test_stored_bytes_read_back_to_the_same_quantiser(void **state)
{
    enum { COUNT = 600 };
    struct error err = ERROR_INIT;

    (void)state;
    for (size_t s = 0; s < SHAPE_COUNT; s++) {
        uint32_t dim = shapes[s].dim, code_bytes = shapes[s].code_bytes;
        float *rows = normal_rows(COUNT, dim, shapes[s].offset, 300 + s);
        struct quantiser *q =
            train_choice(shapes[s].kind, shapes[s].own, rows, COUNT, dim, code_bytes, NULL, NULL);
        struct quantiser *back = NULL;
        uint8_t *codes[2], *data[2];
        struct lookup lookups[2];
        size_t bytes[2];

        assert_int_equal(quantiser_encode_bytes(q, &data[0], &bytes[0], &err), 0);
        if (quantiser_decode_bytes(data[0], bytes[0], "test", &back, &err) < 0)
            fail_msg("%s", err.message);
        assert_int_equal(quantiser_kind(back), quantiser_kind(q));
        assert_int_equal(quantiser_dim(back), dim);
        assert_int_equal(quantiser_code_bytes(back), code_bytes);
        assert_true(quantiser_distortion(back) == quantiser_distortion(q));
        assert_int_equal(quantiser_memory_bytes(back), quantiser_memory_bytes(q));
        assert_int_equal(quantiser_table_entries(back), quantiser_table_entries(q));
        assert_int_equal(quantiser_scratch_floats(back), quantiser_scratch_floats(q));
        assert_int_equal(quantiser_has_own_distortion(back), quantiser_has_own_distortion(q));
        assert_int_equal(quantiser_encode_bytes(back, &data[1], &bytes[1], &err), 0);
        assert_int_equal(bytes[0], bytes[1]);
        assert_memory_equal(data[0], data[1], bytes[0]);
        for (int i = 0; i < 2; i++) {
            codes[i] = must_alloc((size_t)COUNT * code_bytes);
            lookup_init(&lookups[i], q);
            assert_int_equal(quantiser_encode(i ? back : q, rows, COUNT, NULL, codes[i], &err), 0);
            quantiser_table(i ? back : q, METRIC_L2, rows, lookups[i].scratch, &lookups[i].table);
        }
        assert_memory_equal(codes[0], codes[1], (size_t)COUNT * code_bytes);
        assert_true(quantiser_code_distortion(q, codes[0]) ==
                    quantiser_code_distortion(back, codes[0]));
        assert_int_equal(lookups[0].table.chunk_count, lookups[1].table.chunk_count);
        assert_true(lookups[0].table.offset == lookups[1].table.offset);
        assert_true(lookups[0].table.step == lookups[1].table.step);
        assert_memory_equal(lookups[0].table.entries, lookups[1].table.entries,
                            lookups[0].table.chunk_count * 512ull);
        for (int i = 0; i < 2; i++) {
            free(codes[i]);
            lookup_release(&lookups[i]);
            free(data[i]);
        }
        free(rows);
        quantiser_free(q);
        quantiser_free(back);
    }
}

static void expect_refusal(const uint8_t *data, size_t bytes, const char *what)
{
    struct error err = ERROR_INIT;
    struct quantiser *back = NULL;

    if (quantiser_decode_bytes(data, bytes, "test", &back, &err) == 0)
        fail_msg("%s was read", what);
    assert_null(back);
    assert_true(err.code == ERR_CORRUPT || err.code == ERR_UNSUPPORTED);
    assert_non_null(strstr(err.message, "test"));
}

static void test_every_damaged_byte_and_every_length_is_refused(void **state)
{
    const struct shape wanted[] = {{CODE_PQ, CHOICE_YES, 3, 2, 0},
                                   {CODE_OPQ, CHOICE_NO, 3, 1, 0},
                                   {CODE_SCALAR, CHOICE_YES, 9, 6, 0}};
    struct error err = ERROR_INIT;

    (void)state;
    for (size_t s = 0; s < 3; s++) {
        float *rows = normal_rows(300, wanted[s].dim, 0, 400 + s);
        struct quantiser *q = train_choice(wanted[s].kind, wanted[s].own, rows, 300, wanted[s].dim,
                                           wanted[s].code_bytes, NULL, NULL);
        uint8_t *data, *copy;
        size_t bytes;

        assert_int_equal(quantiser_encode_bytes(q, &data, &bytes, &err), 0);
        for (size_t i = 0; i < bytes; i++) {
            data[i] ^= (uint8_t)(1u << (i % 8));
            expect_refusal(data, bytes, "a flipped bit");
            data[i] ^= (uint8_t)(1u << (i % 8));
        }
        for (size_t i = 0; i < bytes; i++) {
            copy = must_alloc(i ? i : 1); /* the exact size, for the sanitizer */
            memcpy(copy, data, i);
            expect_refusal(copy, i, "a shortened file");
            free(copy);
        }
        copy = must_alloc(bytes + 4);
        memcpy(copy, data, bytes);
        memset(copy + bytes, 0, 4);
        expect_refusal(copy, bytes + 4, "a lengthened file");
        free(copy);
        free(data);
        free(rows);
        quantiser_free(q);
    }
}

/* Gives forged bytes a right checksum. */
static void sign(uint8_t *data, size_t bytes)
{
    store_u32(data + 12, 0);
    store_u32(data + 12, crc32c(0, data, bytes));
}

static void test_forged_headers_and_numbers_are_refused_despite_their_checksum(void **state)
{
    const struct {
        size_t offset;
        uint32_t value;
    } forged[] = {
        {8, 1},           {24, 0},          {24, 2},          {24, 9},          {28, 0},
        {28, 6},          {28, UINT32_MAX}, {28, 0x40000000}, {32, 0},          {32, 6},
        {32, UINT32_MAX}, {36, 0x7f800000}, {40, 3},          {60, 0x01000000}, {64, 0x7fc00000},
        {68, 0xff800000}, {16, 0xffffffff}, {20, 1},          {32, 2},          {32, 4},
        {40, 0},          {40, 2},          {44, 0xbf800000}, {44, 0x7fc00000}, {48, 0x3f000000},
        {48, 0x7f800000}, {48, 0x41200000}, {52, 1},          {36, 0xbf800000}, {84, 0},
        {84, 0xbf800000}, {84, 0x7f000000}, {84, 0x7fc00000}, {92, 0x00007c00}, {92, 0xfe000000}};
    struct error err = ERROR_INIT;
    float *rows = normal_rows(300, 5, 0, 500);
    /* Header, 5 means, 2 scales from byte 84, halves from byte 92. */
    struct quantiser *q = train_choice(CODE_PQ, CHOICE_YES, rows, 300, 5, 3, NULL, NULL);
    uint8_t *data, *copy;
    size_t bytes;

    (void)state;
    assert_int_equal(quantiser_encode_bytes(q, &data, &bytes, &err), 0);
    copy = must_alloc(bytes);
    for (size_t i = 0; i < sizeof forged / sizeof forged[0]; i++) {
        memcpy(copy, data, bytes);
        store_u32(copy + forged[i].offset, forged[i].value);
        sign(copy, bytes);
        expect_refusal(copy, bytes, "a forged header");
    }
    sign(data, bytes); /* the forger's checksum is the real one */
    struct quantiser *back = NULL;
    assert_int_equal(quantiser_decode_bytes(data, bytes, "test", &back, &err), 0);
    quantiser_free(back);
    free(copy);
    free(data);
    free(rows);
    quantiser_free(q);
}

static void test_bad_parameters_are_refused(void **state)
{
    const struct {
        enum code_kind kind;
        enum code_choice own;
        uint32_t count, dim, code_bytes;
    } bad[] = {{CODE_PQ, CHOICE_AUTO, 255, 8, 2},
               {CODE_PQ, CHOICE_AUTO, 300, 8, 0},
               {CODE_PQ, CHOICE_NO, 300, 8, 9},
               {CODE_PQ, CHOICE_YES, 300, 8, 1},
               {CODE_PQ, CHOICE_AUTO, 300, 8, 10},
               {CODE_AUTO, CHOICE_AUTO, 300, 8, 10},
               {CODE_AUTO, CHOICE_NO, 300, 8, 9},
               {CODE_AUTO, CHOICE_AUTO, 300, 0, 0},
               {CODE_AUTO, CHOICE_AUTO, 300, 0, 1},
               {CODE_AUTO, CHOICE_AUTO, 255, 8, 4},
               {CODE_SCALAR, CHOICE_AUTO, 300, 8, 3},
               {CODE_SCALAR, CHOICE_NO, 300, 8, 5},
               {CODE_SCALAR, CHOICE_YES, 300, 8, 8},
               {CODE_SCALAR, CHOICE_AUTO, 300, 9, 4},
               {CODE_PQ, CHOICE_AUTO, 300, 40000, 8},
               {CODE_OPQ, CHOICE_AUTO, 300, 5000, 8},
               {(enum code_kind)9, CHOICE_AUTO, 300, 8, 2},
               {CODE_PQ, (enum code_choice)3, 300, 8, 2}};
    float *rows = calloc(300 * 8, sizeof *rows);

    (void)state;
    assert_non_null(rows);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct quantiser_params params = {bad[i].kind, bad[i].own, bad[i].code_bytes, SEED};
        struct error err = ERROR_INIT;
        struct quantiser *q = NULL;

        assert_int_equal(
            quantiser_train(&params, rows, bad[i].count, bad[i].dim, NULL, NULL, &q, NULL, &err),
            -1);
        assert_int_equal(err.code, ERR_INVALID);
        assert_null(q);
    }
    free(rows);
}

static void test_a_cancelled_job_ends_training(void **state)
{
    struct job *job = job_new(NULL, NULL);
    float *rows = normal_rows(400, 8, 0, 600);

    (void)state;
    assert_non_null(job);
    job_cancel(job);
    for (enum code_kind kind = CODE_AUTO; kind <= CODE_SCALAR; kind++) {
        struct quantiser_params params = {kind, CHOICE_AUTO, 4, SEED};
        struct error err = ERROR_INIT;
        struct quantiser *q = NULL;

        assert_int_equal(quantiser_train(&params, rows, 400, 8, NULL, job, &q, NULL, &err), -1);
        assert_int_equal(err.code, ERR_CANCELLED);
        assert_null(q);
    }
    job_free(job);
    free(rows);
}

struct last_report {
    struct job_progress progress;
    uint32_t phases;
};

static void keep_report(void *context, const struct job_progress *progress)
{
    struct last_report *last = context;

    last->progress = *progress;
    if (progress->phase_end)
        last->phases++;
}

static void test_training_reports_as_much_work_as_it_announced(void **state)
{
    float *rows = normal_rows(400, 8, 0, 601);

    (void)state;
    for (enum code_kind kind = CODE_AUTO; kind <= CODE_SCALAR; kind++) {
        struct last_report last = {0};
        struct job *job = job_new(keep_report, &last);
        struct quantiser_params params = {kind, CHOICE_AUTO, 4, SEED};
        struct error err = ERROR_INIT;
        struct quantiser *q = NULL;

        assert_non_null(job);
        assert_int_equal(quantiser_train(&params, rows, 400, 8, NULL, job, &q, NULL, &err), 0);
        job_finish(job);
        assert_int_equal(last.phases, 1);
        assert_int_equal(last.progress.done, last.progress.total);
        job_free(job);
        quantiser_free(q);
    }
    free(rows);
}

/* So large a sample that the codes are compared on a part of it and the winner is trained again. */
static void test_a_large_sample_gives_its_winner_the_whole_for_any_pool(void **state)
{
    enum { COUNT = 17000, DIM = 8, BYTES = 4 };
    float *rows = clustered_rows(COUNT, DIM, 300, 602);
    struct error err = ERROR_INIT;
    struct quantiser *single;
    uint8_t *first = NULL, *alone;
    size_t first_size = 0, alone_size;
    enum code_kind kind = CODE_AUTO;
    bool own = false;

    (void)state;
    for (uint32_t workers = 1; workers <= 3; workers += 2) {
        struct quantiser_params params = {CODE_AUTO, CHOICE_AUTO, BYTES, SEED};
        struct last_report last = {0};
        struct job *job = job_new(keep_report, &last);
        struct quantiser *q = NULL;
        struct pool *pool;
        uint8_t *bytes;
        size_t size;

        assert_non_null(job);
        assert_int_equal(pool_new(workers, &pool, &err), 0);
        assert_int_equal(quantiser_train(&params, rows, COUNT, DIM, pool, job, &q, NULL, &err), 0);
        job_finish(job);
        assert_int_equal(last.phases, 1);
        assert_int_equal(last.progress.done, last.progress.total);
        assert_int_equal(quantiser_encode_bytes(q, &bytes, &size, &err), 0);
        if (first) {
            assert_int_equal(size, first_size);
            assert_memory_equal(bytes, first, size);
            free(bytes);
        } else {
            first = bytes;
            first_size = size;
            kind = quantiser_kind(q);
            own = quantiser_has_own_distortion(q);
        }
        quantiser_free(q);
        pool_free(pool);
        job_free(job);
    }
    /* Asked for by name it is the same code. */
    single = train_choice(kind, own ? CHOICE_YES : CHOICE_NO, rows, COUNT, DIM, BYTES, NULL, NULL);
    assert_int_equal(quantiser_encode_bytes(single, &alone, &alone_size, &err), 0);
    assert_int_equal(alone_size, first_size);
    assert_memory_equal(alone, first, first_size);
    quantiser_free(single);
    free(alone);
    free(first);
    free(rows);
}

static void test_samples_of_few_distinct_vectors_decode_to_their_rounding(void **state)
{
    struct error err = ERROR_INIT;
    enum { COUNT = 1000, DIM = 12 };
    float *some = normal_rows(20, DIM, 0, 700);
    float *rows = must_alloc(COUNT * DIM * sizeof *rows);

    (void)state;
    for (uint32_t distinct = 1; distinct <= 20; distinct += 19) {
        for (uint32_t i = 0; i < COUNT; i++)
            memcpy(rows + i * DIM, some + i % distinct * DIM, DIM * sizeof *rows);
        for (enum code_kind kind = CODE_PQ; kind <= CODE_OPQ; kind++) {
            struct quantiser *q = train_choice(kind, CHOICE_YES, rows, COUNT, DIM, 4, NULL, NULL);
            uint8_t code[4];
            float decoded[DIM];

            for (uint32_t i = 0; i < distinct; i++) {
                assert_int_equal(quantiser_encode(q, rows + i * DIM, 1, NULL, code, &err), 0);
                quantiser_decode(q, code, decoded);
                assert_true(true_distance(METRIC_L2, rows + i * DIM, decoded, DIM) < 1e-5);
                assert_true(quantiser_code_distortion(q, code) < 1e-5f);
            }
            quantiser_free(q);
        }
    }
    free(some);
    free(rows);
}

static void test_estimates_rank_true_neighbours_first_on_clustered_data(void **state)
{
    enum { COUNT = 6000, DIM = 32, QUERIES = 40, KEEP = 100 };
    const struct {
        enum code_kind kind;
        uint32_t code_bytes;
        double floor_share; /* of the true nearest found among the KEEP best estimates */
    } wanted[] = {
        {CODE_PQ, 8, 0.85}, {CODE_OPQ, 8, 0.85}, {CODE_SCALAR, 16, 0.98}, {CODE_SCALAR, 32, 1.0}};
    struct error err = ERROR_INIT;
    float *rows = clustered_rows(COUNT, DIM, 30, 800);
    float *queries = clustered_rows(QUERIES, DIM, 30, 801);
    static uint16_t sums[COUNT];

    (void)state;
    for (size_t k = 0; k < 4; k++) {
        struct quantiser *q = train(wanted[k].kind, rows, COUNT, DIM, wanted[k].code_bytes, NULL);
        uint8_t *codes = must_alloc((size_t)COUNT * wanted[k].code_bytes);
        struct lookup lookup;
        uint32_t found = 0;

        lookup_init(&lookup, q);
        assert_int_equal(quantiser_encode(q, rows, COUNT, NULL, codes, &err), 0);
        for (uint32_t i = 0; i < QUERIES; i++) {
            const float *query = queries + (size_t)i * DIM;
            uint32_t nearest = 0, better = 0;
            double least = INFINITY;

            for (uint32_t r = 0; r < COUNT; r++) {
                double distance = true_distance(METRIC_L2, query, rows + (size_t)r * DIM, DIM);

                if (distance < least) {
                    least = distance;
                    nearest = r;
                }
            }
            quantiser_table(q, METRIC_L2, query, lookup.scratch, &lookup.table);
            code_scan_kernels_best()->spans(lookup.table.entries, lookup.table.chunk_count, codes,
                                            wanted[k].code_bytes, &(struct code_span){0, COUNT}, 1,
                                            sums);
            for (uint32_t r = 0; r < COUNT; r++)
                better += sums[r] < sums[nearest];
            found += better < KEEP;
        }
        if (found < wanted[k].floor_share * QUERIES)
            fail_msg("%s with %u bytes: %u of %d", code_kind_name(wanted[k].kind),
                     wanted[k].code_bytes, found, QUERIES);
        free(codes);
        lookup_release(&lookup);
        quantiser_free(q);
    }
    free(rows);
    free(queries);
}

static void test_kind_names_parse_back(void **state)
{
    struct error err = ERROR_INIT;
    enum code_kind kind;

    (void)state;
    for (enum code_kind k = CODE_AUTO; k <= CODE_SCALAR; k++) {
        assert_int_equal(code_kind_parse(code_kind_name(k), &kind, &err), 0);
        assert_int_equal(kind, k);
    }
    assert_int_equal(code_kind_parse("OPQ", &kind, &err), 0);
    assert_int_equal(kind, CODE_OPQ);
    assert_int_equal(code_kind_parse("pq2", &kind, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
    assert_string_equal(code_kind_name((enum code_kind)77), "unknown");
}

static void test_chunks_cover_the_dimensions_the_first_ones_longer(void **state)
{
    (void)state;
    for (uint32_t dim = 1; dim < 70; dim++) {
        for (uint32_t chunks = 1; chunks <= dim; chunks++) {
            assert_int_equal(pq_chunk_begin(dim, chunks, 0), 0);
            assert_int_equal(pq_chunk_begin(dim, chunks, chunks), dim);
            for (uint32_t c = 0; c < chunks; c++)
                assert_int_equal(pq_chunk_begin(dim, chunks, c + 1) -
                                     pq_chunk_begin(dim, chunks, c),
                                 dim / chunks + (c < dim % chunks));
        }
    }
}

static void test_code_kernels_agree_with_plain_sums_on_every_isa(void **state)
{
    enum { COLUMNS = 272, POINTS = 7, DIM_MAX = 40 };
    float *columns = normal_rows(DIM_MAX, COLUMNS, 0, 900);
    float *points = normal_rows(POINTS, DIM_MAX, 0, 901);
    float *norms = normal_rows(1, COLUMNS, 9, 902);
    static uint16_t halves[DIM_MAX * COLUMNS];
    static float widened[DIM_MAX * COLUMNS];
    float products[POINTS * COLUMNS], out[COLUMNS];

    (void)state;
    /* Numbers too small for a normal half are among them. */
    for (uint32_t i = 0; i < DIM_MAX * COLUMNS; i++)
        widened[i] = i % 7 ? columns[i] : columns[i] * 1e-6f;
    distance_kernels_for(ISA_SCALAR)->f16_from_f32(widened, halves, DIM_MAX * COLUMNS);
    distance_kernels_for(ISA_SCALAR)->f32_from_f16(halves, widened, DIM_MAX * COLUMNS);
    for (enum isa isa = ISA_SCALAR; isa < ISA_COUNT; isa++) {
        const struct code_kernels *kernels = code_kernels_for(isa);

        for (uint32_t dim = 1; kernels && dim <= DIM_MAX; dim++) {
            uint32_t count = CODE_LANES * (1 + dim % (COLUMNS / CODE_LANES));
            uint32_t ids[POINTS], product_ids[POINTS];
            float scores[POINTS], product_scores[POINTS];

            kernels->l2_columns(points, dim, columns, COLUMNS, count, out);
            for (uint32_t j = 0; j < count; j++) {
                double want = 0;

                for (uint32_t d = 0; d < dim; d++)
                    want += pow((double)points[d] - columns[d * COLUMNS + j], 2);
                assert_true(fabs(out[j] - want) <= 1e-5 * want);
            }
            kernels->l2_halves(points, dim, halves, COLUMNS, count, 0.5f, out);
            for (uint32_t j = 0; j < count; j++) {
                double want = 0;

                for (uint32_t d = 0; d < dim; d++)
                    want += 0.5 * pow((double)points[d] - widened[d * COLUMNS + j], 2);
                assert_true(fabs(out[j] - want) <= 1e-5 * want);
            }
            kernels->dot_halves(points, dim, halves, COLUMNS, count, 3.0f, -2.0f, out);
            for (uint32_t j = 0; j < count; j++) {
                double want = 3;

                for (uint32_t d = 0; d < dim; d++)
                    want -= 2.0 * points[d] * widened[d * COLUMNS + j];
                assert_true(fabs(out[j] - want) <= 1e-5 * (10 + 4 * dim));
            }
            kernels->nearest(points, POINTS, dim, columns, COLUMNS, norms, count, ids, scores);
            for (uint32_t i = 0; i < POINTS; i++) {
                double best = INFINITY;

                for (uint32_t j = 0; j < count; j++) {
                    double score = norms[j];

                    for (uint32_t d = 0; d < dim; d++)
                        score -= (double)points[i * dim + d] * columns[d * COLUMNS + j];
                    products[i * count + j] = (float)(norms[j] - score);
                    if (score < best)
                        best = score;
                }
                assert_true(ids[i] < count);
                assert_true(fabs(scores[i] - best) <= 1e-5 * (10 + 4 * dim));
                product_ids[i] = UINT32_MAX;
                product_scores[i] = INFINITY;
            }
            kernels->nearest_of_products(products, POINTS, norms, count, 100, product_ids,
                                         product_scores);
            for (uint32_t i = 0; i < POINTS; i++) {
                assert_int_equal(product_ids[i], ids[i] + 100);
                assert_true(fabs(product_scores[i] - scores[i]) <= 1e-5 * (10 + 4 * dim));
            }
        }
    }
    free(columns);
    free(points);
    free(norms);
}

static void test_nearest_takes_the_first_of_equal_columns_on_every_isa(void **state)
{
    enum { COLUMNS = 64 };
    float columns[COLUMNS] = {0}, norms[COLUMNS], point = 1, score;
    float products[COLUMNS] = {0};
    uint32_t id;

    (void)state;
    for (enum isa isa = ISA_SCALAR; isa < ISA_COUNT; isa++) {
        const struct code_kernels *kernels = code_kernels_for(isa);

        for (uint32_t a = 0; kernels && a < COLUMNS; a++) {
            for (uint32_t b = a; b < COLUMNS; b++) {
                for (uint32_t j = 0; j < COLUMNS; j++)
                    norms[j] = j == a || j == b ? 1 : 2;
                kernels->nearest(&point, 1, 1, columns, COLUMNS, norms, COLUMNS, &id, &score);
                assert_int_equal(id, a);
                score = INFINITY;
                kernels->nearest_of_products(products, 1, norms, COLUMNS, 0, &id, &score);
                assert_int_equal(id, a);
            }
        }
    }
}

static void test_kmeans_finds_separate_clusters(void **state)
{
    enum { CLUSTERS = 20 };
    const uint32_t dims[] = {2, 5, 40};
    struct error err = ERROR_INIT;

    (void)state;
    for (size_t s = 0; s < 3; s++) {
        uint32_t dim = dims[s];
        float *points = must_alloc(2000ull * dim * sizeof *points);
        float *centroids = must_alloc((size_t)CLUSTERS * dim * sizeof *centroids);
        struct kmeans_params params = {points, dim, 2000, dim, CLUSTERS, 12, SEED, 0};
        struct centroid_table table;
        struct random random;
        uint32_t ids[CENTROID_BLOCK];
        float distances[CENTROID_BLOCK], *scratch;

        random_init(&random, SEED, 910 + s);
        for (uint32_t i = 0; i < 2000; i++) {
            for (uint32_t d = 0; d < dim; d++)
                points[(size_t)i * dim + d] = 100 + 0.01f * random_normal(&random) +
                                              (d == 0   ? (float)(i % 5) * 10
                                               : d == 1 ? (float)(i / 5 % 4) * 10
                                                        : 0);
        }
        assert_int_equal(kmeans_train(&params, NULL, NULL, centroids, &err), 0);
        assert_int_equal(centroid_table_init(&table, centroids, CLUSTERS, dim, &err), 0);
        scratch = must_alloc(centroid_scratch_floats(&table) * sizeof *scratch);
        for (uint32_t i = 0; i < 2000; i += 100) {
            centroid_nearest(&table, points + (size_t)i * dim, dim, 100, scratch, ids, distances);
            for (uint32_t j = 0; j < 100; j++) {
                assert_true(distances[j] < 0.01f * (float)dim);
                assert_int_equal(ids[j], ids[j % CLUSTERS]);
            }
        }
        centroid_table_release(&table);
        free(scratch);
        free(points);
        free(centroids);
    }
}

static void test_kmeans_with_many_clusters_is_the_same_for_any_pool(void **state)
{
    enum { COUNT = 5000, DIM = 33, CLUSTERS = 700 };
    struct error err = ERROR_INIT;
    float *points = clustered_rows(COUNT, DIM, 50, 920);
    float *centroids[3];
    struct kmeans_params params = {points, DIM, COUNT, DIM, CLUSTERS, 4, SEED, 3};

    (void)state;
    for (uint32_t i = 0; i < 3; i++) {
        struct pool *pool;

        centroids[i] = must_alloc((size_t)CLUSTERS * DIM * sizeof(float));
        assert_int_equal(pool_new(1 + 2 * i, &pool, &err), 0);
        assert_int_equal(kmeans_train(&params, pool, NULL, centroids[i], &err), 0);
        assert_memory_equal(centroids[i], centroids[0], (size_t)CLUSTERS * DIM * sizeof(float));
        pool_free(pool);
    }
    params.count = CLUSTERS - 1;
    assert_int_equal(kmeans_train(&params, NULL, NULL, centroids[0], &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
    for (uint32_t i = 0; i < 3; i++)
        free(centroids[i]);
    free(points);
}

static void test_gemm_multiplies_and_transposes(void **state)
{
    enum { M = 5, N = 7, K = 6 };
    float *a = normal_rows(8, 8, 0, 930);
    float *b = normal_rows(8, 8, 0, 931);

    (void)state;
    assert_non_null(gemm_core_name());
    for (int t = 0; t < 4; t++) {
        float c[M * N];

        for (int i = 0; i < M * N; i++)
            c[i] = (float)i;
        gemm_f32(t & 1, t & 2, M, N, K, 2.0f, a, 8, b, 8, 0.5f, c, N);
        for (int i = 0; i < M; i++) {
            for (int j = 0; j < N; j++) {
                double want = 0.5 * (i * N + j);

                for (int k = 0; k < K; k++)
                    want += 2.0 * (t & 1 ? a[k * 8 + i] : a[i * 8 + k]) *
                            (t & 2 ? b[j * 8 + k] : b[k * 8 + j]);
                assert_true(fabs(c[i * N + j] - want) < 1e-4);
            }
        }
    }
    free(a);
    free(b);
}

static void test_eigen_decomposition_gives_back_the_matrix(void **state)
{
    enum { N = 50 };
    static double matrix[N * N], axes[N * N], values[N];
    struct error err = ERROR_INIT;
    struct random random;

    (void)state;
    random_init(&random, SEED, 940);
    for (int i = 0; i < N; i++) {
        for (int j = i; j < N; j++)
            matrix[i * N + j] = matrix[j * N + i] = random_normal(&random);
    }
    memcpy(axes, matrix, sizeof axes);
    assert_int_equal(gemm_eigen_symmetric(axes, N, values, &err), 0);
    for (int i = 0; i < N; i++) {
        assert_true(i == 0 || values[i] >= values[i - 1]);
        for (int j = 0; j < N; j++) {
            double dot = 0, back = 0;

            for (int k = 0; k < N; k++) {
                dot += axes[i * N + k] * axes[j * N + k];
                back += axes[k * N + i] * values[k] * axes[k * N + j];
            }
            assert_true(fabs(dot - (i == j)) < 1e-10);
            assert_true(fabs(back - matrix[i * N + j]) < 1e-10);
        }
    }
    assert_int_equal(gemm_eigen_symmetric(axes, 0, values, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_estimates_equal_decoded_distances_to_the_tables_steps_on_every_isa),
        cmocka_unit_test(test_own_distortion_is_the_vectors_error_to_a_few_percent),
        cmocka_unit_test(test_own_distortion_needs_fewer_rows_on_unevenly_coded_data),
        cmocka_unit_test(test_auto_takes_plain_pq_where_chunks_are_the_structure),
        cmocka_unit_test(test_queries_too_large_for_their_squares_get_a_finite_table),
        cmocka_unit_test(test_encoding_picks_the_nearest_centroid),
        cmocka_unit_test(test_distortion_is_the_error_of_the_second_half),
        cmocka_unit_test(test_opq_loses_less_than_pq_on_correlated_data_and_auto_takes_it),
        cmocka_unit_test(test_a_single_code_is_not_compared),
        cmocka_unit_test(test_stored_bytes_and_codes_are_the_same_for_any_pool),
        cmocka_unit_test(test_another_seed_gives_other_bytes),
        cmocka_unit_test(test_stored_bytes_read_back_to_the_same_quantiser),
        cmocka_unit_test(test_every_damaged_byte_and_every_length_is_refused),
        cmocka_unit_test(test_forged_headers_and_numbers_are_refused_despite_their_checksum),
        cmocka_unit_test(test_bad_parameters_are_refused),
        cmocka_unit_test(test_a_cancelled_job_ends_training),
        cmocka_unit_test(test_training_reports_as_much_work_as_it_announced),
        cmocka_unit_test(test_a_large_sample_gives_its_winner_the_whole_for_any_pool),
        cmocka_unit_test(test_samples_of_few_distinct_vectors_decode_to_their_rounding),
        cmocka_unit_test(test_estimates_rank_true_neighbours_first_on_clustered_data),
        cmocka_unit_test(test_kind_names_parse_back),
        cmocka_unit_test(test_chunks_cover_the_dimensions_the_first_ones_longer),
        cmocka_unit_test(test_code_kernels_agree_with_plain_sums_on_every_isa),
        cmocka_unit_test(test_nearest_takes_the_first_of_equal_columns_on_every_isa),
        cmocka_unit_test(test_kmeans_finds_separate_clusters),
        cmocka_unit_test(test_kmeans_with_many_clusters_is_the_same_for_any_pool),
        cmocka_unit_test(test_gemm_multiplies_and_transposes),
        cmocka_unit_test(test_eigen_decomposition_gives_back_the_matrix),
    };

    (void)argc;
    gemm_pick_core(argv);
    gemm_init();
    return cmocka_run_group_tests_name("quantiser", tests, NULL, NULL);
}
