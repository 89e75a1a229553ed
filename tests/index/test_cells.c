/* Clustered vectors stand in space order as pages do: cluster after cluster, each with its own
 * centre near the one before. What a ranking should find is told by plain loops here. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "index/cells.h"
#include "storage/base/bytes.h"
#include "storage/base/random.h"

#define QUERIES 40u
#define CELL_ROWS 4u
/* Of the header of the stored form, as in cells.c. */
#define CRC_AT 12u
#define ROWS_AT 16u
#define COUNT_AT 24u
#define CELL_ROWS_AT 28u
#define DIM_AT 32u
#define LOW_AT 36u
#define STEP_AT 40u
#define RESERVED_AT 44u
#define HEADER_BYTES 64u

struct data {
    uint32_t rows;
    uint32_t dim;
    float *vectors; /* rows x dim */
    float *means;   /* cells x dim, of CELL_ROWS rows each */
    uint32_t count;
};

static void *must(void *memory)
{
    assert_non_null(memory);
    return memory;
}

/* A walk through space, so that neighbouring cells are near each other. bytes: whole numbers from 0
 * to 255. */
static struct data make_data(uint32_t rows, uint32_t dim, uint64_t seed, bool bytes)
{
    struct data data = {.rows = rows, .dim = dim, .count = (rows + CELL_ROWS - 1) / CELL_ROWS};
    float *centre = must(calloc(dim, sizeof *centre)), *wide = must(calloc(dim, sizeof *wide));
    struct random random;

    data.vectors = must(calloc((size_t)rows * dim, sizeof(float)));
    data.means = must(calloc((size_t)data.count * dim, sizeof(float)));
    random_init(&random, seed, 0);
    for (uint32_t i = 0; i < rows; i++) {
        if (i % (CELL_ROWS * 32) == 0) {
            for (uint32_t d = 0; d < dim; d++)
                wide[d] = random_normal(&random);
        }
        if (i % CELL_ROWS == 0) {
            for (uint32_t d = 0; d < dim; d++)
                centre[d] = wide[d] + 0.6f * random_normal(&random);
        }
        for (uint32_t d = 0; d < dim; d++) {
            float x = centre[d] + 0.3f * random_normal(&random);

            if (bytes) {
                x = roundf(128 + 30 * x);
                x = x < 0 ? 0 : x > 255 ? 255 : x;
            }
            data.vectors[(size_t)i * dim + d] = x;
        }
    }
    for (uint32_t c = 0; c < data.count; c++) {
        uint32_t first = c * CELL_ROWS, n = rows - first < CELL_ROWS ? rows - first : CELL_ROWS;

        for (uint32_t d = 0; d < dim; d++) {
            double sum = 0;

            for (uint32_t i = first; i < first + n; i++)
                sum += data.vectors[(size_t)i * dim + d];
            data.means[(size_t)c * dim + d] = (float)(sum / n);
        }
    }
    free(centre);
    free(wide);
    return data;
}

static void drop_data(struct data *data)
{
    free(data->vectors);
    free(data->means);
}

static struct cells *make_cells(const struct data *data)
{
    struct cells_builder *builder = NULL;
    struct cells *cells = NULL;
    struct error err = ERROR_INIT;

    assert_int_equal(cells_builder_new(data->rows, CELL_ROWS, data->dim, &builder, &err), 0);
    for (uint32_t i = 0; i < data->rows;) { /* pieces that do not end where cells do */
        uint32_t n = data->rows - i < 7 ? data->rows - i : 7;

        cells_builder_add(builder, data->vectors + (size_t)i * data->dim, n);
        i += n;
    }
    assert_int_equal(cells_builder_finish(builder, &cells, &err), 0);
    cells_builder_free(builder);
    assert_int_equal(cells_count(cells), data->count);
    assert_int_equal(cells_rows(cells), CELL_ROWS);
    assert_int_equal(cells_dim(cells), data->dim);
    assert_true(cells_memory_bytes(cells) == cells_memory_plan(data->rows, CELL_ROWS, data->dim));
    return cells;
}

static uint32_t nearest(const struct cells *cells, const struct distance_kernels *kernels,
                        enum metric metric, const float *query, uint32_t want, uint32_t *out)
{
    size_t bytes = cells_scratch_bytes(cells, want);
    uint8_t *scratch = must(aligned_alloc(64, align_up(bytes + 64, 64)));
    uint32_t found;

    memset(scratch, 0xa5, align_up(bytes + 64, 64)); /* what was there before plays no part */
    found = cells_nearest(cells, kernels, metric, query, want, scratch, out);
    for (uint32_t i = 0; i < 64; i++)
        assert_int_equal(scratch[bytes + i], 0xa5);
    free(scratch);
    for (uint32_t i = 0; i < found; i++)
        assert_true(out[i] < cells_count(cells) && (i == 0 || out[i] > out[i - 1]));
    return found;
}

struct ranked {
    double key;
    uint32_t cell;
};

static int compare_ranked(const void *a, const void *b)
{
    const struct ranked *x = a, *y = b;

    if (x->key != y->key)
        return x->key < y->key ? -1 : 1;
    return (x->cell > y->cell) - (x->cell < y->cell);
}

/* Cells by distance to rows x dim centroids, nearest first. */
static struct ranked *rank_all(const float *centroids, uint32_t count, uint32_t dim,
                               enum metric metric, const float *query)
{
    struct ranked *all = must(malloc(count * sizeof *all));

    for (uint32_t c = 0; c < count; c++) {
        double key = 0;

        for (uint32_t d = 0; d < dim; d++) {
            double x = centroids[(size_t)c * dim + d], q = query[d];

            key += metric == METRIC_IP ? -x * q : (x - q) * (x - q);
        }
        all[c] = (struct ranked){key, c};
    }
    qsort(all, count, sizeof *all, compare_ranked);
    return all;
}

static bool holds(const uint32_t *cells, uint32_t count, uint32_t cell)
{
    for (uint32_t i = 0; i < count; i++) {
        if (cells[i] == cell)
            return true;
    }
    return false;
}

/* Centroids as the stored form has them: floats of bytes. */
static float *stored_bytes(const struct cells *cells)
{
    size_t values = (size_t)cells_count(cells) * cells_dim(cells), bytes;
    float *out = must(malloc((values ? values : 1) * sizeof *out));
    struct error err = ERROR_INIT;
    uint8_t *data;

    assert_int_equal(cells_encode_bytes(cells, &data, &bytes, &err), 0);
    assert_int_equal(bytes, HEADER_BYTES + values);
    for (size_t i = 0; i < values; i++)
        out[i] = data[HEADER_BYTES + i];
    free(data);
    return out;
}

static double share_found(const struct data *data, const struct cells *cells, enum metric metric,
                          uint32_t want, uint64_t seed)
{
    float *query = must(malloc(data->dim * sizeof *query));
    uint32_t *out = must(malloc(want * sizeof *out)), hits = 0;
    struct random random;

    random_init(&random, seed, 1);
    for (uint32_t i = 0; i < QUERIES; i++) {
        size_t row = random_below(&random, data->rows);
        struct ranked *all;

        for (uint32_t d = 0; d < data->dim; d++)
            query[d] = data->vectors[row * data->dim + d] + 0.1f * random_normal(&random);
        all = rank_all(data->means, data->count, data->dim, metric, query);
        assert_int_equal(nearest(cells, distance_kernels_best(), metric, query, want, out), want);
        for (uint32_t j = 0; j < want; j++)
            hits += holds(out, want, all[j].cell);
        free(all);
    }
    free(query);
    free(out);
    return (double)hits / QUERIES / want;
}

/* Bytes on a step of 1, and a query of bytes: the ranking is exact, ties included. */
static void test_one_level_equals_brute_force(void **state)
{
    static const uint32_t rows[] = {9, 63, 64, 65, 1021}, dims[] = {1, 3, 16, 37, 128};

    (void)state;
    for (uint32_t i = 0; i < 5; i++) {
        struct data data = make_data(rows[i], dims[i], 100 + i, true);
        size_t cell_values = (size_t)CELL_ROWS * dims[i];

        /* However narrow the rest is, the scale is that of bytes. */
        for (size_t j = 0; j < 2 * cell_values; j++)
            data.vectors[j] = j < cell_values ? 0 : 255;

        struct cells *cells = make_cells(&data);
        float *centroids = stored_bytes(cells);
        uint32_t *out = must(malloc(data.count * sizeof *out));

        for (uint32_t want = 1; want < data.count; want += 1 + want / 3) {
            const float *query = data.vectors + (size_t)(want * 5 % data.rows) * data.dim;
            struct ranked *all = rank_all(centroids, data.count, data.dim, METRIC_L2, query);

            assert_int_equal(nearest(cells, distance_kernels_best(), METRIC_L2, query, want, out),
                             want);
            for (uint32_t j = 0; j < want; j++)
                assert_true(holds(out, want, all[j].cell));
            free(all);
        }
        free(out);
        free(centroids);
        cells_free(cells);
        drop_data(&data);
    }
}

/* So many are wanted that all groups would be looked into. */
static void test_many_wanted_of_many_cells_equal_brute_force(void **state)
{
    struct data data = make_data(1500 * CELL_ROWS - 1, 20, 7, true);
    struct cells *cells = make_cells(&data);
    float *centroids = stored_bytes(cells);
    uint32_t *out = must(malloc(data.count * sizeof *out)), want = 1200;

    (void)state;
    for (uint32_t i = 0; i < 5; i++) {
        const float *query = data.vectors + (size_t)i * 700 * data.dim;
        struct ranked *all = rank_all(centroids, data.count, data.dim, METRIC_L2, query);

        assert_int_equal(nearest(cells, distance_kernels_best(), METRIC_L2, query, want, out),
                         want);
        for (uint32_t j = 0; j < want; j++)
            assert_true(holds(out, want, all[j].cell));
        free(all);
    }
    free(out);
    free(centroids);
    cells_free(cells);
    drop_data(&data);
}

static void test_two_levels_find_nearly_all_of_the_nearest(void **state)
{
    struct data data = make_data(5003 * CELL_ROWS, 48, 3, false);
    struct cells *cells = make_cells(&data);

    (void)state;
    assert_true(share_found(&data, cells, METRIC_L2, 100, 5) >= 0.98);
    assert_true(share_found(&data, cells, METRIC_IP, 100, 6) >= 0.98);
    cells_free(cells);
    drop_data(&data);

    data = make_data(5003 * CELL_ROWS, 48, 4, true);
    cells = make_cells(&data);
    assert_true(share_found(&data, cells, METRIC_L2, 100, 7) >= 0.98);
    cells_free(cells);
    drop_data(&data);
}

/* Far from zero the bytes' offset outweighs what they say; the order must not feel it. */
static void test_inner_products_are_ranked_whatever_the_offset(void **state)
{
    struct data data = make_data(300 * CELL_ROWS, 24, 9, false);
    struct cells *cells;

    (void)state;
    for (uint32_t shift = 0; shift < 3; shift++) {
        static const float by[] = {0, 40, -90};

        for (size_t i = 0; i < (size_t)data.rows * data.dim; i++)
            data.vectors[i] += by[shift];
        for (size_t i = 0; i < (size_t)data.count * data.dim; i++)
            data.means[i] += by[shift];
        cells = make_cells(&data);
        assert_true(share_found(&data, cells, METRIC_IP, 30, 8) >= 0.95);
        cells_free(cells);
    }
    drop_data(&data);
}

/* The last cell has one row: its centroid is that row, not a quarter of it. */
static void test_the_last_cell_may_hold_fewer_rows(void **state)
{
    struct data data = make_data(10 * CELL_ROWS + 1, 6, 12, true);
    struct cells *cells = make_cells(&data);
    float *centroids = stored_bytes(cells);
    uint32_t out[1];

    (void)state;
    assert_int_equal(cells_count(cells), 11);
    assert_memory_equal(centroids + (size_t)10 * 6, data.vectors + (size_t)40 * 6,
                        6 * sizeof(float));
    assert_int_equal(
        nearest(cells, distance_kernels_best(), METRIC_L2, data.vectors + (size_t)40 * 6, 1, out),
        1);
    assert_int_equal(out[0], 10);
    free(centroids);
    cells_free(cells);
    drop_data(&data);
}

static void test_every_instruction_set_gives_the_same_cells(void **state)
{
    static const uint32_t dims[] = {1, 4, 15, 30, 64, 133};

    (void)state;
    for (uint32_t i = 0; i < 6; i++) {
        struct data data = make_data(2100 * CELL_ROWS, dims[i], 40 + i, i % 2 == 0);
        struct cells *cells = make_cells(&data);

        for (uint32_t q = 0; q < 12; q++) {
            const float *query = data.vectors + (size_t)q * 500 * data.dim;
            enum metric metric = q % 2 ? METRIC_IP : METRIC_L2;
            uint32_t want = 1 + q * 13, *first = must(malloc(want * sizeof *first)),
                     *out = must(malloc(want * sizeof *out));

            assert_int_equal(
                nearest(cells, distance_kernels_for(ISA_SCALAR), metric, query, want, first), want);
            for (enum isa isa = ISA_SCALAR; isa < ISA_COUNT; isa++) {
                const struct distance_kernels *kernels = distance_kernels_for(isa);

                if (!kernels)
                    continue;
                assert_int_equal(nearest(cells, kernels, metric, query, want, out), want);
                assert_memory_equal(out, first, want * sizeof *out);
            }
            free(first);
            free(out);
        }
        cells_free(cells);
        drop_data(&data);
    }
}

/* Values of 0 to 2 in two dimensions: nine keys at most, so nearly every limit is a tie, among more
 * keys than a register holds or fewer; the last block is not whole. */
static void test_ties_are_taken_in_order_on_every_instruction_set(void **state)
{
    static const uint32_t counts[] = {2, 15, 16, 17, 31, 301, 1500};

    (void)state;
    for (uint32_t i = 0; i < sizeof counts / sizeof counts[0]; i++) {
        struct data data = make_data(counts[i] * CELL_ROWS, 2, 60 + i, true);

        for (uint32_t row = 0; row < data.rows; row++) {
            uint32_t cell = row / CELL_ROWS * 2654435761u;

            for (uint32_t d = 0; d < 2; d++) /* the first two stretch the scale to bytes */
                data.vectors[row * 2 + d] = row < 2 * CELL_ROWS
                                                ? (row < CELL_ROWS ? 0 : 255.0f)
                                                : (float)((cell >> (16 + 8 * d)) % 3);
        }
        struct cells *cells = make_cells(&data);
        float *centroids = stored_bytes(cells), query[2] = {1, 0};
        uint32_t *out = must(malloc(data.count * sizeof *out));

        for (uint32_t want = 1; want < data.count; want += 1 + want / 8) {
            struct ranked *all = rank_all(centroids, data.count, 2, METRIC_L2, query);

            if (counts[i] == 1500 && want < 1200) { /* one level: no cell is missed */
                free(all);
                continue;
            }
            for (enum isa isa = ISA_SCALAR; isa < ISA_COUNT; isa++) {
                const struct distance_kernels *kernels = distance_kernels_for(isa);

                if (!kernels)
                    continue;
                assert_int_equal(nearest(cells, kernels, METRIC_L2, query, want, out), want);
                for (uint32_t j = 0; j < want; j++)
                    assert_true(holds(out, want, all[j].cell));
            }
            free(all);
        }
        free(out);
        free(centroids);
        cells_free(cells);
        drop_data(&data);
    }
}

/* Sums of products near 2^31 on both sides: the widest vectors, all ends of the scale. */
static uint32_t nearest_in_stages(const struct cells *cells, const struct distance_kernels *kernels,
                                  const float *query, const uint32_t *ends, uint32_t stages,
                                  uint32_t *out)
{
    size_t bytes = cells_scratch_bytes(cells, ends[stages - 1]);
    void *scratch = must(aligned_alloc(64, align_up(bytes, 64)));
    uint32_t found =
        cells_nearest_in_stages(cells, kernels, METRIC_L2, query, ends, stages, scratch, out);

    free(scratch);
    return found;
}

/* Few distinct centroids, so that stages end among equals; one level of cells, and two. */
static void test_stages_hold_the_nearest_in_their_order(void **state)
{
    static const uint32_t counts[] = {300, 5000};
    static const uint32_t ends[][4] = {{1, 2, 4, 8}, {25, 50, 100, 200}, {7, 8, 100, 299}};

    (void)state;
    for (uint32_t c = 0; c < 2; c++) {
        struct data data = make_data(counts[c] * CELL_ROWS, 6, 80 + c, true);

        for (uint32_t i = 0; i < data.rows * 6; i++)
            data.vectors[i] = (float)((uint32_t)data.vectors[i] / 64 * 64);
        struct cells *cells = make_cells(&data);
        uint32_t all[300], out[300], first[300];

        for (uint32_t round = 0; round < 12; round++) {
            const uint32_t *end = ends[round % 3];
            const float *query = data.vectors + (size_t)round * 97 % data.rows * 6;

            for (enum isa isa = ISA_SCALAR; isa < ISA_COUNT; isa++) {
                const struct distance_kernels *kernels = distance_kernels_for(isa);

                if (!kernels)
                    continue;
                assert_int_equal(nearest_in_stages(cells, kernels, query, end, 4, out), end[3]);
                assert_int_equal(nearest(cells, kernels, METRIC_L2, query, end[3], all), end[3]);
                for (uint32_t i = 0; i < end[3]; i++)
                    assert_true(holds(out, end[3], all[i]));
                for (uint32_t s = 0; s < 4; s++) {
                    for (uint32_t i = s ? end[s - 1] + 1 : 1; i < end[s]; i++)
                        assert_true(out[i] > out[i - 1]);
                    if (c == 0) { /* one level is exact: a stage's end is as good as its own call */
                        nearest(cells, kernels, METRIC_L2, query, end[s], all);
                        for (uint32_t i = 0; i < end[s]; i++)
                            assert_true(holds(out, end[s], all[i]));
                    }
                }
                if (isa == ISA_SCALAR)
                    memcpy(first, out, sizeof out);
                assert_memory_equal(first, out, end[3] * sizeof *out);
            }
        }
        cells_free(cells);
        drop_data(&data);
    }
}

static void test_the_widest_vectors_do_not_overflow(void **state)
{
    uint32_t dim = DISTANCE_DIM_MAX, out[2];
    struct data data = {.rows = 4 * CELL_ROWS, .dim = dim, .count = 4};

    (void)state;
    data.vectors = must(calloc((size_t)data.rows * dim, sizeof(float)));
    for (uint32_t i = 0; i < data.rows; i++) {
        for (uint32_t d = 0; d < dim; d++) /* cells: all 0, half 255, other half 255, all 255 */
            data.vectors[(size_t)i * dim + d] =
                (i / CELL_ROWS & (d < dim / 2 ? 1u : 2u)) ? 255.0f : 0.0f;
    }
    struct cells *cells = make_cells(&data);
    float *query = must(malloc(dim * sizeof *query));

    for (enum isa isa = ISA_SCALAR; isa < ISA_COUNT; isa++) {
        const struct distance_kernels *kernels = distance_kernels_for(isa);

        if (!kernels)
            continue;
        for (int sign = -1; sign <= 1; sign += 2) {
            for (uint32_t d = 0; d < dim; d++)
                query[d] = (float)sign;
            assert_int_equal(nearest(cells, kernels, METRIC_IP, query, 1, out), 1);
            assert_int_equal(out[0], sign > 0 ? 3 : 0);
            for (uint32_t d = 0; d < dim; d++)
                query[d] = sign > 0 ? 255 : 0;
            assert_int_equal(nearest(cells, kernels, METRIC_L2, query, 1, out), 1);
            assert_int_equal(out[0], sign > 0 ? 3 : 0);
        }
        for (uint32_t d = 0; d < dim; d++)
            query[d] = d < dim / 2 ? 1 : -1;
        assert_int_equal(nearest(cells, kernels, METRIC_IP, query, 1, out), 1);
        assert_int_equal(out[0], 1);
    }
    free(query);
    cells_free(cells);
    drop_data(&data);
}

/* All keys are equal: the first cells are taken. A query that is no number is served too. */
static void test_ties_go_to_the_lower_cells(void **state)
{
    struct data data = make_data(3000 * CELL_ROWS, 8, 21, false);
    struct cells *cells = make_cells(&data);
    float query[8] = {0};
    uint32_t out[50];

    (void)state;
    assert_int_equal(nearest(cells, distance_kernels_best(), METRIC_IP, query, 50, out), 50);
    for (uint32_t i = 0; i < 50; i++)
        assert_int_equal(out[i], i);
    for (uint32_t d = 0; d < 8; d++)
        query[d] = d % 2 ? NAN : INFINITY;
    assert_int_equal(nearest(cells, distance_kernels_best(), METRIC_IP, query, 50, out), 50);
    assert_int_equal(nearest(cells, distance_kernels_best(), METRIC_L2, query, 50, out), 50);
    cells_free(cells);

    for (size_t i = 0; i < (size_t)data.rows * data.dim; i++)
        data.vectors[i] = 3.5f;
    cells = make_cells(&data);
    assert_int_equal(nearest(cells, distance_kernels_best(), METRIC_L2, data.vectors, 50, out), 50);
    for (uint32_t i = 0; i < 50; i++)
        assert_int_equal(out[i], i);
    cells_free(cells);
    drop_data(&data);
}

static void test_no_more_cells_than_there_are(void **state)
{
    struct data data = make_data(5 * CELL_ROWS, 10, 1, false);
    struct cells *cells = make_cells(&data);
    uint32_t out[9];

    (void)state;
    for (uint32_t want = 5; want <= 9; want++) {
        assert_int_equal(
            nearest(cells, distance_kernels_best(), METRIC_L2, data.vectors, want, out), 5);
        for (uint32_t i = 0; i < 5; i++)
            assert_int_equal(out[i], i);
    }
    assert_int_equal(nearest(cells, distance_kernels_best(), METRIC_L2, data.vectors, 0, out), 0);
    cells_free(cells);
    drop_data(&data);
}

static void test_bytes_keep_a_step_of_one_and_outliers_do_not_take_the_scale(void **state)
{
    struct data data = make_data(400 * CELL_ROWS, 32, 31, true);
    struct cells *cells = make_cells(&data);
    struct error err = ERROR_INIT;
    uint8_t *stored;
    size_t bytes;

    (void)state;
    assert_int_equal(cells_encode_bytes(cells, &stored, &bytes, &err), 0);
    assert_true(load_f32(stored + LOW_AT) == 0 && load_f32(stored + STEP_AT) == 1);
    free(stored);
    cells_free(cells);

    for (size_t i = 0; i < (size_t)data.rows * data.dim; i++)
        data.vectors[i] -= 128;
    cells = make_cells(&data);
    assert_int_equal(cells_encode_bytes(cells, &stored, &bytes, &err), 0);
    assert_true(load_f32(stored + LOW_AT) == -128 && load_f32(stored + STEP_AT) == 1);
    free(stored);
    cells_free(cells);
    drop_data(&data);

    /* One cell far out. Left in, the step would be 4; the others are within 8. */
    data = make_data(400 * CELL_ROWS, 32, 32, false);
    for (uint32_t i = 0; i < CELL_ROWS; i++)
        data.vectors[(size_t)i * 32] = 6;
    cells = make_cells(&data);
    assert_int_equal(cells_encode_bytes(cells, &stored, &bytes, &err), 0);
    assert_true(load_f32(stored + STEP_AT) < 12.0f / 255);
    free(stored);
    cells_free(cells);
    drop_data(&data);
}

static void test_cells_read_back_are_the_same(void **state)
{
    static const uint32_t rows[] = {0, 1, 5, 1024 * CELL_ROWS, 1500 * CELL_ROWS + 3};

    (void)state;
    for (uint32_t i = 0; i < 5; i++) {
        struct data data = make_data(rows[i], 19, 60 + i, i % 2);
        struct cells *cells = make_cells(&data), *again = NULL;
        struct error err = ERROR_INIT;
        uint8_t *first, *second;
        size_t first_bytes, second_bytes;
        uint32_t ours[40], theirs[40];

        assert_int_equal(cells_encode_bytes(cells, &first, &first_bytes, &err), 0);
        assert_int_equal(cells_decode_bytes(first, first_bytes, "test", &again, &err), 0);
        assert_int_equal(cells_encode_bytes(again, &second, &second_bytes, &err), 0);
        assert_int_equal(first_bytes, second_bytes);
        assert_memory_equal(first, second, first_bytes);
        assert_int_equal(cells_count(again), data.count);
        assert_int_equal(cells_rows(again), CELL_ROWS);
        assert_true(cells_memory_bytes(again) == cells_memory_bytes(cells));
        for (uint32_t q = 0; q < 10 && rows[i]; q++) {
            const float *query = data.vectors + (size_t)(q * 611 % rows[i]) * 19;
            enum metric metric = q % 2 ? METRIC_IP : METRIC_L2;
            uint32_t n = nearest(cells, distance_kernels_best(), metric, query, 40, ours);

            assert_int_equal(nearest(again, distance_kernels_best(), metric, query, 40, theirs), n);
            assert_memory_equal(ours, theirs, n * sizeof *ours);
        }
        free(first);
        free(second);
        cells_free(cells);
        cells_free(again);
        drop_data(&data);
    }
}

static void refused(const uint8_t *data, size_t bytes, enum error_code code)
{
    struct cells *cells = NULL;
    struct error err = ERROR_INIT;
    uint8_t *copy = must(malloc(bytes ? bytes : 1)); /* of this size: a step outside is seen */

    memcpy(copy, data, bytes);
    assert_int_equal(cells_decode_bytes(copy, bytes, "the test", &cells, &err), -1);
    assert_int_equal(err.code, code);
    assert_null(cells);
    assert_non_null(strstr(err.message, "the test"));
    free(copy);
}

/* With a checksum that is right: the writer of a file may be hostile. */
static void refused_signed(uint8_t *data, size_t bytes)
{
    store_u32(data + CRC_AT, 0);
    store_u32(data + CRC_AT, crc32c(0, data, bytes));
    refused(data, bytes, ERR_CORRUPT);
}

static void test_damaged_bytes_are_refused(void **state)
{
    struct data data = make_data(9 * CELL_ROWS - 2, 5, 70, false);
    struct cells *cells = make_cells(&data);
    struct error err = ERROR_INIT;
    uint8_t *good, *bad;
    size_t bytes;

    (void)state;
    assert_int_equal(cells_encode_bytes(cells, &good, &bytes, &err), 0);
    bad = must(malloc(bytes + 5));
    for (size_t cut = 0; cut < bytes; cut++)
        refused(good, cut, ERR_CORRUPT);
    for (size_t i = 0; i < bytes; i++) {
        memcpy(bad, good, bytes);
        bad[i] ^= 0x10;
        /* A version from the future cannot be told from damage. */
        refused(bad, bytes, i >= 8 && i < 12 ? ERR_UNSUPPORTED : ERR_CORRUPT);
    }
    struct {
        uint32_t at;
        uint32_t value;
    } lies[] = {{ROWS_AT, 0},
                {ROWS_AT, 9 * CELL_ROWS + 1},
                {ROWS_AT + 4, 1},
                {COUNT_AT, 8},
                {COUNT_AT, UINT32_MAX},
                {CELL_ROWS_AT, 0},
                {CELL_ROWS_AT, 3},
                {DIM_AT, 0},
                {DIM_AT, 4},
                {DIM_AT, DISTANCE_DIM_MAX + 1},
                {DIM_AT, UINT32_MAX},
                {LOW_AT, 0x7f800000u},
                {LOW_AT, 0x7fc00000u},
                {STEP_AT, 0},
                {STEP_AT, 1},
                {STEP_AT, 0xbf800000u},
                {STEP_AT, 0x7f800000u},
                {STEP_AT, 0x7fc00000u},
                {RESERVED_AT, 1},
                {HEADER_BYTES - 4, 0x80000000u}};

    for (size_t i = 0; i < sizeof lies / sizeof lies[0]; i++) {
        memcpy(bad, good, bytes);
        store_u32(bad + lies[i].at, lies[i].value);
        refused_signed(bad, bytes);
    }
    memcpy(bad, good, bytes);
    memset(bad + bytes, 0, 5);
    refused_signed(bad, bytes + 5); /* one cell more than the rows make */
    free(good);
    free(bad);
    cells_free(cells);
    drop_data(&data);
}

static void test_a_builder_refuses_what_cannot_be(void **state)
{
    struct cells_builder *builder = NULL;
    struct cells *cells = NULL;
    struct error err = ERROR_INIT;
    float vector[3] = {1, 2, 3};

    (void)state;
    assert_int_equal(cells_builder_new(10, 0, 3, &builder, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
    error_clear(&err);
    assert_int_equal(cells_builder_new(10, 4, 0, &builder, &err), -1);
    error_clear(&err);
    assert_int_equal(cells_builder_new(10, 4, DISTANCE_DIM_MAX + 1, &builder, &err), -1);
    error_clear(&err);
    assert_int_equal(cells_builder_new((uint64_t)UINT32_MAX + 1, 4, 3, &builder, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
    assert_null(builder);
    error_clear(&err);

    for (uint32_t added = 1; added <= 3; added += 2) { /* two were announced */
        assert_int_equal(cells_builder_new(2, 4, 3, &builder, &err), 0);
        for (uint32_t i = 0; i < added; i++)
            cells_builder_add(builder, vector, 1);
        assert_int_equal(cells_builder_finish(builder, &cells, &err), -1);
        assert_int_equal(err.code, ERR_INTERNAL);
        error_clear(&err);
        cells_builder_free(builder);
    }
    vector[1] = INFINITY;
    assert_int_equal(cells_builder_new(1, 4, 3, &builder, &err), 0);
    cells_builder_add(builder, vector, 1);
    assert_int_equal(cells_builder_finish(builder, &cells, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
    assert_null(cells);
    cells_builder_free(builder);
    cells_builder_free(NULL);
    cells_free(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_one_level_equals_brute_force),
        cmocka_unit_test(test_many_wanted_of_many_cells_equal_brute_force),
        cmocka_unit_test(test_two_levels_find_nearly_all_of_the_nearest),
        cmocka_unit_test(test_inner_products_are_ranked_whatever_the_offset),
        cmocka_unit_test(test_the_last_cell_may_hold_fewer_rows),
        cmocka_unit_test(test_every_instruction_set_gives_the_same_cells),
        cmocka_unit_test(test_ties_are_taken_in_order_on_every_instruction_set),
        cmocka_unit_test(test_stages_hold_the_nearest_in_their_order),
        cmocka_unit_test(test_the_widest_vectors_do_not_overflow),
        cmocka_unit_test(test_ties_go_to_the_lower_cells),
        cmocka_unit_test(test_no_more_cells_than_there_are),
        cmocka_unit_test(test_bytes_keep_a_step_of_one_and_outliers_do_not_take_the_scale),
        cmocka_unit_test(test_cells_read_back_are_the_same),
        cmocka_unit_test(test_damaged_bytes_are_refused),
        cmocka_unit_test(test_a_builder_refuses_what_cannot_be),
    };

    return cmocka_run_group_tests_name("cells", tests, NULL, NULL);
}
