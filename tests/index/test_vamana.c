/* Tests of the in-memory graph: candidate list, visited set, prune, build, repair. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "index/candidates.h"
#include "index/vamana.h"
#include "index/vamana_prune.h"
#include "index/vamana_search.h"
#include "storage/base/random.h"

#define SEED 20231117u

/* ---- data ---- */

static uint8_t *random_bytes(uint32_t count, uint32_t dim, uint64_t stream)
{
    uint8_t *rows = malloc((size_t)count * dim);
    struct random random;

    assert_non_null(rows);
    random_init(&random, SEED, stream);
    for (size_t i = 0; i < (size_t)count * dim; i++)
        rows[i] = (uint8_t)random_below(&random, 256);
    return rows;
}

static struct vector_matrix matrix_of(const void *rows, uint32_t count, uint32_t dim,
                                      enum element_type type)
{
    return (struct vector_matrix){.data = rows,
                                  .row_bytes = element_bytes(type, dim),
                                  .count = count,
                                  .dim = dim,
                                  .type = type};
}

static struct vamana_params params_of(uint32_t max_degree, uint32_t build_list)
{
    return (struct vamana_params){
        .max_degree = max_degree, .build_list = build_list, .alpha = 1.2f, .seed = SEED};
}

static struct graph *build(const struct vector_matrix *vectors, const struct vamana_params *params,
                           uint32_t workers)
{
    struct error err = ERROR_INIT;
    struct pool *pool = NULL;
    struct graph *graph = NULL;

    if (workers > 0)
        assert_int_equal(pool_new(workers, &pool, &err), 0);
    if (vamana_build(vectors, params, pool, NULL, &graph, &err) < 0)
        fail_msg("seed %u: %s", SEED, err.message);
    pool_free(pool);
    return graph;
}

static uint32_t reached_from_entry(const struct graph *graph)
{
    uint8_t *seen = calloc(graph->count, 1);
    uint32_t *queue = malloc(graph->count * sizeof *queue);
    uint32_t head = 0, tail = 0;

    assert_non_null(seen);
    assert_non_null(queue);
    seen[graph->entry_point] = 1;
    queue[tail++] = graph->entry_point;
    while (head < tail) {
        uint32_t node = queue[head++];

        for (uint32_t i = 0; i < graph->degrees[node]; i++) {
            uint32_t to = graph->neighbours[(size_t)node * graph->max_degree + i];

            if (!seen[to]) {
                seen[to] = 1;
                queue[tail++] = to;
            }
        }
    }
    free(seen);
    free(queue);
    return tail;
}

/* Degrees in bounds, no edge to itself or twice, everything reachable. */
static void assert_sound(const struct graph *graph, uint32_t count, uint32_t max_degree)
{
    assert_int_equal(graph->count, count);
    assert_int_equal(graph->max_degree, max_degree);
    assert_true(graph->entry_point < count);
    for (uint32_t node = 0; node < count; node++) {
        const uint32_t *neighbours = graph->neighbours + (size_t)node * max_degree;

        assert_true(graph->degrees[node] <= max_degree);
        for (uint32_t i = 0; i < graph->degrees[node]; i++) {
            assert_true(neighbours[i] < count);
            assert_int_not_equal(neighbours[i], node);
            for (uint32_t j = 0; j < i; j++)
                assert_int_not_equal(neighbours[i], neighbours[j]);
        }
    }
    assert_int_equal(reached_from_entry(graph), count);
}

/* Share of the true 10 nearest (ties count) that a search with list_size finds. */
static double recall_at_10(const struct vector_matrix *vectors, const struct graph *graph,
                           const uint8_t *queries, uint32_t query_count, uint32_t list_size)
{
    struct error err = ERROR_INIT;
    struct search_scratch scratch;
    struct row_space space;
    struct candidates exact;
    uint32_t found = 0;

    assert_int_equal(row_space_init(&space, vectors, &err), 0);
    assert_int_equal(search_scratch_init(&scratch, list_size, graph->max_degree, &err), 0);
    assert_int_equal(candidates_init(&exact, 10, &err), 0);
    for (uint32_t q = 0; q < query_count; q++) {
        const uint8_t *query = queries + q * vectors->row_bytes;

        candidates_clear(&exact, 10);
        for (uint32_t row = 0; row < vectors->count; row++)
            candidates_insert(&exact, row_space_distance(&space, query, row_space_row(&space, row)),
                              row);
        vamana_search_run(&space, graph, query, list_size, &scratch);
        for (uint32_t i = 0; i < 10 && i < scratch.list.count; i++)
            found += scratch.list.items[i].distance <= exact.items[9].distance;
    }
    candidates_release(&exact);
    search_scratch_release(&scratch);
    return found / (10.0 * query_count);
}

/* ---- candidates ---- */

static void test_list_keeps_the_nearest_in_order_and_refuses_repeats(void **state)
{
    struct error err = ERROR_INIT;
    struct candidates list;
    struct random random;

    (void)state;
    assert_int_equal(candidates_init(&list, 20, &err), 0);
    candidates_clear(&list, 20);
    random_init(&random, SEED, 1);
    for (uint32_t i = 0; i < 500; i++) {
        uint32_t id = (uint32_t)random_below(&random, 200);
        float distance = (float)(id * 7919 % 101); /* a function of the id, with ties */

        candidates_insert(&list, distance, id);
        for (uint32_t j = 1; j < list.count; j++) {
            const struct candidate *a = &list.items[j - 1];
            const struct candidate *b = &list.items[j];

            assert_true(a->distance < b->distance || (a->distance == b->distance && a->id < b->id));
        }
    }
    assert_int_equal(list.count, 20);
    assert_false(candidates_admits(&list, list.items[19].distance + 1));
    assert_false(candidates_insert(&list, list.items[3].distance, list.items[3].id));
    candidates_release(&list);
}

static void test_nearest_open_goes_back_for_a_nearer_newcomer(void **state)
{
    struct error err = ERROR_INIT;
    struct candidates list;
    struct candidate *next;

    (void)state;
    assert_int_equal(candidates_init(&list, 4, &err), 0);
    candidates_clear(&list, 4);
    assert_null(candidates_nearest_open(&list));
    candidates_insert(&list, 2, 20);
    candidates_insert(&list, 3, 30);
    next = candidates_nearest_open(&list);
    assert_int_equal(next->id, 20);
    next->state = CANDIDATE_EXPANDED;
    assert_int_equal(candidates_nearest_open(&list)->id, 30);
    candidates_insert(&list, 1, 10);
    next = candidates_nearest_open(&list);
    assert_int_equal(next->id, 10);
    next->state = CANDIDATE_EXPANDED;
    assert_int_equal(candidates_nearest_open(&list)->id, 30);
    candidates_release(&list);
}

static void test_sort_orders_any_input(void **state)
{
    static const uint32_t counts[] = {0, 1, 2, 24, 25, 100, 3000};
    struct candidate *items = malloc(3000 * sizeof *items);
    struct random random;

    (void)state;
    assert_non_null(items);
    random_init(&random, SEED, 2);
    for (uint32_t shape = 0; shape < 4; shape++) {
        for (size_t c = 0; c < sizeof counts / sizeof counts[0]; c++) {
            uint64_t ids = 0;

            for (uint32_t i = 0; i < counts[c]; i++) {
                float d = shape == 0   ? (float)random_below(&random, 1000)
                          : shape == 1 ? (float)i
                          : shape == 2 ? (float)(counts[c] - i)
                                       : 5.0f;

                items[i] = (struct candidate){.distance = d, .id = i};
            }
            candidates_sort(items, counts[c]);
            for (uint32_t i = 0; i < counts[c]; i++) {
                ids += items[i].id;
                if (i == 0)
                    continue;
                assert_true(
                    items[i - 1].distance < items[i].distance ||
                    (items[i - 1].distance == items[i].distance && items[i - 1].id < items[i].id));
            }
            assert_int_equal(ids, (uint64_t)counts[c] * (counts[c] - (counts[c] > 0)) / 2);
        }
    }
    for (uint32_t i = 0; i < 3000; i++) /* no order is asked for, only to come back */
        items[i].distance = i % 3 == 0 ? NAN : (float)random_below(&random, 10);
    candidates_sort(items, 3000);
    free(items);
}

static void test_visited_set_reports_each_row_once_and_forgets_on_clear(void **state)
{
    struct error err = ERROR_INIT;
    struct visited visited;
    uint32_t again = 0;

    (void)state;
    assert_int_equal(visited_init(&visited, 4096, &err), 0);
    for (uint32_t round = 0; round < 3; round++) {
        visited_clear(&visited);
        for (uint32_t i = 0; i < 1000; i++) {
            assert_true(visited_add(&visited, i * 977));
            assert_false(visited_add(&visited, i * 977)); /* the newest is never forgotten */
        }
    }
    visited_clear(&visited);
    assert_true(visited_add(&visited, 0));
    assert_false(visited_add(&visited, 0));
    for (uint32_t i = 1; i < 4096; i++)
        visited_add(&visited, i * 31);
    for (uint32_t i = 1; i < 4096; i++)
        again += visited_add(&visited, i * 31);
    assert_true(again < 4096 / 3); /* as full as it is meant to get */
    visited_release(&visited);
}

/* ---- prune ---- */

/* DiskANN's order of computation, factor by factor, for comparison. */
static uint32_t prune_by_factors(const struct row_space *space, const struct candidate *pool,
                                 uint32_t count, uint32_t max_degree, float alpha, uint32_t *kept)
{
    float *factors = calloc(count, sizeof *factors);
    uint32_t kept_count = 0;
    float passes[2] = {1.0f, alpha};

    assert_non_null(factors);
    for (uint32_t pass = 0; pass < 2; pass++) {
        for (uint32_t i = 0; i < count && kept_count < max_degree; i++) {
            if (factors[i] > passes[pass])
                continue;
            factors[i] = INFINITY;
            kept[kept_count++] = pool[i].id;
            for (uint32_t j = i + 1; j < count; j++) {
                float d = row_space_distance(space, row_space_row(space, pool[i].id),
                                             row_space_row(space, pool[j].id));
                float factor = d == 0 ? INFINITY : pool[j].distance / d;

                if (factor > factors[j])
                    factors[j] = factor;
            }
        }
    }
    free(factors);
    return kept_count;
}

static void test_prune_keeps_what_the_eager_form_keeps(void **state)
{
    uint32_t count = 300, dim = 6;
    uint8_t *rows = random_bytes(count, dim, 3);
    struct vector_matrix vectors = matrix_of(rows, count, dim, ELEMENT_U8);
    struct error err = ERROR_INIT;
    struct prune_scratch scratch;
    struct row_space space;
    uint32_t kept[32], want[32];

    (void)state;
    memcpy(rows + 10 * dim, rows + 20 * dim, dim); /* twins */
    assert_int_equal(row_space_init(&space, &vectors, &err), 0);
    assert_int_equal(prune_scratch_init(&scratch, count, 32, &err), 0);
    for (uint32_t node = 0; node < 100; node++) {
        struct prune_params params = {.max_degree = 4 + node % 29, .alpha = 1.0f + node % 3 * 0.5f};
        uint32_t pool_count = 0, kept_count;

        for (uint32_t other = 0; other < count; other++) {
            if (other == node)
                continue;
            scratch.pool[pool_count++] = (struct candidate){
                .id = other,
                .distance = row_space_distance(&space, row_space_row(&space, node),
                                               row_space_row(&space, other))};
        }
        kept_count = vamana_prune_run(&space, &params, &scratch, pool_count, kept);
        assert_int_equal(kept_count, prune_by_factors(&space, scratch.pool, pool_count,
                                                      params.max_degree, params.alpha, want));
        assert_memory_equal(kept, want, kept_count * sizeof *kept);
    }
    prune_scratch_release(&scratch);
    free(rows);
}

static void test_saturated_prune_fills_up_with_the_nearest(void **state)
{
    /* On a line everything behind the first neighbour is occluded. */
    uint8_t rows[] = {0, 10, 20, 30, 40, 50};
    struct vector_matrix vectors = matrix_of(rows, 6, 1, ELEMENT_U8);
    struct prune_params params = {.max_degree = 4, .alpha = 1.2f, .saturate = true};
    struct error err = ERROR_INIT;
    struct prune_scratch scratch;
    struct row_space space;
    uint32_t kept[4];

    (void)state;
    assert_int_equal(row_space_init(&space, &vectors, &err), 0);
    assert_int_equal(prune_scratch_init(&scratch, 5, 4, &err), 0);
    for (uint32_t i = 0; i < 5; i++)
        scratch.pool[i] = (struct candidate){
            .id = 5 - i, .distance = row_space_distance(&space, rows, rows + 5 - i)};
    assert_int_equal(vamana_prune_run(&space, &params, &scratch, 5, kept), 4);
    for (uint32_t i = 0; i < 4; i++)
        assert_int_equal(kept[i], i + 1);
    prune_scratch_release(&scratch);
}

/* ---- build ---- */

static void test_search_on_the_built_graph_finds_the_nearest(void **state)
{
    uint32_t count = 5000, dim = 12;
    uint8_t *rows = random_bytes(count, dim, 4);
    uint8_t *queries = random_bytes(100, dim, 5);
    struct vector_matrix vectors = matrix_of(rows, count, dim, ELEMENT_U8);
    struct vamana_params params = params_of(32, 64);
    struct graph *graph = build(&vectors, &params, 2);
    double recall;

    (void)state;
    assert_sound(graph, count, 32);
    recall = recall_at_10(&vectors, graph, queries, 100, 50);
    if (recall < 0.97)
        fail_msg("seed %u: recall@10 with a list of 50 is %.4f", SEED, recall);
    graph_free(graph);
    free(rows);
    free(queries);
}

static void test_graph_is_the_same_for_any_pool(void **state)
{
    uint32_t count = 5000, dim = 8;
    uint8_t *rows = random_bytes(count, dim, 6);
    struct vector_matrix vectors = matrix_of(rows, count, dim, ELEMENT_U8);
    struct vamana_params params = params_of(16, 32);
    struct graph *alone = build(&vectors, &params, 0);
    struct graph *four = build(&vectors, &params, 4);

    (void)state;
    assert_int_equal(alone->entry_point, four->entry_point);
    assert_memory_equal(alone->degrees, four->degrees, count * sizeof *alone->degrees);
    assert_memory_equal(alone->neighbours, four->neighbours,
                        (size_t)count * 16 * sizeof *alone->neighbours);
    graph_free(alone);
    graph_free(four);
    free(rows);
}

static void test_small_and_odd_sets_build(void **state)
{
    static const uint32_t counts[] = {1, 2, 3, 4, 5, 17, 64, 65, 130, 300};
    uint8_t *rows = random_bytes(300, 3, 7);

    (void)state;
    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++) {
        struct vector_matrix vectors = matrix_of(rows, counts[i], 3, ELEMENT_U8);
        struct vamana_params params = params_of(4, 2);
        struct graph *graph = build(&vectors, &params, 2);

        assert_sound(graph, counts[i], 4);
        graph_free(graph);
    }
    free(rows);
}

static void test_every_element_type_gives_the_same_neighbourhoods(void **state)
{
    uint32_t count = 600, dim = 7;
    uint8_t *u8 = random_bytes(count, dim, 8);
    int8_t *i8 = malloc((size_t)count * dim);
    float *f32 = malloc((size_t)count * dim * sizeof *f32);
    uint16_t *f16 = malloc((size_t)count * dim * sizeof *f16);
    struct vamana_params params = params_of(12, 24);
    const void *rows[4] = {u8, i8, f32, f16};
    enum element_type types[4] = {ELEMENT_U8, ELEMENT_I8, ELEMENT_F32, ELEMENT_F16};
    struct graph *graphs[4];

    (void)state;
    assert_non_null(i8);
    assert_non_null(f32);
    assert_non_null(f16);
    for (size_t i = 0; i < (size_t)count * dim; i++) {
        u8[i] &= 15; /* small integers: distances are exact in every type */
        i8[i] = (int8_t)(u8[i] - 8);
        f32[i] = u8[i];
    }
    distance_kernels_for(ISA_SCALAR)->f16_from_f32(f32, f16, (uint64_t)count * dim);
    for (uint32_t i = 0; i < 4; i++) {
        struct vector_matrix vectors = matrix_of(rows[i], count, dim, types[i]);

        graphs[i] = build(&vectors, &params, 1);
        assert_sound(graphs[i], count, 12);
        if (graphs[i]->entry_point == graphs[0]->entry_point)
            assert_memory_equal(graphs[i]->neighbours, graphs[0]->neighbours,
                                (size_t)count * 12 * sizeof *graphs[i]->neighbours);
    }
    for (uint32_t i = 0; i < 4; i++)
        graph_free(graphs[i]);
    free(u8);
    free(i8);
    free(f32);
    free(f16);
}

static void test_entry_point_is_the_row_nearest_to_the_mean(void **state)
{
    uint32_t count = 700, dim = 5;
    uint8_t *rows = random_bytes(count, dim, 9);
    struct vector_matrix vectors = matrix_of(rows, count, dim, ELEMENT_U8);
    struct vamana_params params = params_of(8, 16);
    struct graph *graph = build(&vectors, &params, 3);
    double mean[5] = {0}, best = INFINITY, chosen = 0;

    (void)state;
    for (uint32_t row = 0; row < count; row++)
        for (uint32_t d = 0; d < dim; d++)
            mean[d] += rows[row * dim + d] / (double)count;
    for (uint32_t row = 0; row < count; row++) {
        double distance = 0;

        for (uint32_t d = 0; d < dim; d++)
            distance += (rows[row * dim + d] - mean[d]) * (rows[row * dim + d] - mean[d]);
        best = distance < best ? distance : best;
        chosen = row == graph->entry_point ? distance : chosen;
    }
    assert_true(chosen <= best * 1.0001);
    graph_free(graph);
    free(rows);
}

static void test_copies_of_few_vectors_stay_reachable(void **state)
{
    uint32_t count = 2000, dim = 4;
    uint8_t *rows = malloc((size_t)count * dim);
    struct vector_matrix vectors = matrix_of(rows, count, dim, ELEMENT_U8);
    struct vamana_params params = params_of(8, 16);
    struct graph *graph;

    (void)state;
    assert_non_null(rows);
    for (uint32_t i = 0; i < count * dim; i++)
        rows[i] = (uint8_t)(i / dim % 3 * 50);
    graph = build(&vectors, &params, 2);
    assert_sound(graph, count, 8);
    graph_free(graph);
    free(rows);
}

static void test_rows_may_stand_apart(void **state)
{
    uint32_t count = 400, dim = 9;
    uint8_t *tight = random_bytes(count, dim, 10);
    uint8_t *apart = malloc((size_t)count * 16);
    struct vector_matrix vectors = matrix_of(tight, count, dim, ELEMENT_U8);
    struct vamana_params params = params_of(8, 16);
    struct graph *a, *b;

    (void)state;
    assert_non_null(apart);
    memset(apart, 0xee, (size_t)count * 16);
    for (uint32_t row = 0; row < count; row++)
        memcpy(apart + (size_t)row * 16, tight + (size_t)row * dim, dim);
    a = build(&vectors, &params, 0);
    vectors.data = apart;
    vectors.row_bytes = 16;
    b = build(&vectors, &params, 0);
    assert_memory_equal(a->neighbours, b->neighbours, (size_t)count * 8 * sizeof *a->neighbours);
    graph_free(a);
    graph_free(b);
    free(tight);
    free(apart);
}

static void test_wrong_parameters_are_refused(void **state)
{
    uint8_t *rows = random_bytes(50, 4, 11);
    struct vector_matrix good = matrix_of(rows, 50, 4, ELEMENT_U8);
    struct vector_matrix matrices[4] = {good, good, good, good};
    struct vamana_params params[4] = {params_of(3, 16), params_of(257, 256), params_of(16, 7),
                                      params_of(16, 16)};
    struct graph *graph = NULL;

    (void)state;
    matrices[0].count = 0;
    matrices[1].type = ELEMENT_BINARY;
    matrices[2].row_bytes = 3;
    matrices[3].dim = DISTANCE_DIM_MAX + 1;
    params[3].alpha = NAN;
    for (uint32_t i = 0; i < 4; i++) {
        struct vamana_params fine = params_of(16, 16);
        struct error err = ERROR_INIT;

        assert_int_equal(vamana_build(&matrices[i], &fine, NULL, NULL, &graph, &err), -1);
        assert_int_equal(err.code, ERR_INVALID);
        error_clear(&err);
        assert_int_equal(vamana_build(&good, &params[i], NULL, NULL, &graph, &err), -1);
        assert_int_equal(err.code, ERR_INVALID);
        assert_null(graph);
    }
    free(rows);
}

static void cancel_at_insert(void *context, const struct job_progress *progress)
{
    struct job **job = context;

    if (strcmp(progress->phase, "graph insert") == 0)
        job_cancel(*job);
}

static void test_a_cancelled_build_returns_no_graph(void **state)
{
    uint8_t *rows = random_bytes(2000, 8, 12);
    struct vector_matrix vectors = matrix_of(rows, 2000, 8, ELEMENT_U8);
    struct vamana_params params = params_of(16, 32);
    struct error err = ERROR_INIT;
    struct graph *graph = NULL;
    struct job *job = NULL;

    (void)state;
    job = job_new(cancel_at_insert, &job);
    assert_non_null(job);
    assert_int_equal(vamana_build(&vectors, &params, NULL, job, &graph, &err), -1);
    assert_int_equal(err.code, ERR_CANCELLED);
    assert_null(graph);
    job_free(job);
    free(rows);
}

static void test_memory_plan_covers_the_graph_and_grows_with_it(void **state)
{
    struct vamana_params params = params_of(64, 100);
    uint64_t million = vamana_memory_bytes(1000000, &params, 4);

    (void)state;
    assert_true(million > 1000000ull * 64 * 4);
    assert_true(million < 1000000ull * 64 * 8);
    assert_true(vamana_memory_bytes(2000000, &params, 4) > million * 19 / 10);
    assert_true(vamana_memory_bytes(1000000, &params, 64) > million);
}

/* ---- repair ---- */

static struct graph *empty_graph(uint32_t count, uint32_t max_degree)
{
    struct graph *graph = calloc(1, sizeof *graph);

    assert_non_null(graph);
    graph->count = count;
    graph->max_degree = max_degree;
    graph->degrees = calloc(count, sizeof *graph->degrees);
    graph->neighbours = calloc((size_t)count * max_degree, sizeof *graph->neighbours);
    assert_non_null(graph->degrees);
    assert_non_null(graph->neighbours);
    return graph;
}

static void test_connect_links_every_node_of_an_empty_graph(void **state)
{
    uint32_t count = 300;
    uint8_t *rows = random_bytes(count, 4, 13);
    struct vector_matrix vectors = matrix_of(rows, count, 4, ELEMENT_U8);
    struct graph *graph = empty_graph(count, 1);
    struct error err = ERROR_INIT;
    uint64_t linked;

    (void)state;
    assert_int_equal(graph_connect(&vectors, graph, &linked, &err), 0);
    assert_int_equal(linked, count - 1);
    assert_sound(graph, count, 1);
    assert_int_equal(graph_connect(&vectors, graph, &linked, &err), 0);
    assert_int_equal(linked, 0);
    graph_free(graph);
    free(rows);
}

static void test_connect_replaces_an_edge_of_a_full_node_and_loses_nobody(void **state)
{
    /* 0 -> 1 -> 2 -> 0 full at degree 1; 3 -> 4 hang apart. Only 2's edge back is to spare. */
    uint8_t rows[] = {0, 10, 20, 12, 14};
    static const uint32_t edges[] = {1, 2, 0, 4};
    struct vector_matrix vectors = matrix_of(rows, 5, 1, ELEMENT_U8);
    struct graph *graph = empty_graph(5, 1);
    struct error err = ERROR_INIT;
    uint64_t linked;

    (void)state;
    for (uint32_t i = 0; i < 4; i++) {
        graph->neighbours[i] = edges[i];
        graph->degrees[i] = 1;
    }
    assert_int_equal(graph_connect(&vectors, graph, &linked, &err), 0);
    assert_int_equal(linked, 1);
    assert_int_equal(graph->neighbours[2], 3);
    assert_sound(graph, 5, 1);
    graph_free(graph);
}

static void test_connect_takes_the_nearest_reached_node(void **state)
{
    /* 0 -> 1 -> 2 with room; 3 is nearest to 1. */
    uint8_t rows[] = {0, 50, 100, 58};
    struct vector_matrix vectors = matrix_of(rows, 4, 1, ELEMENT_U8);
    struct graph *graph = empty_graph(4, 2);
    struct error err = ERROR_INIT;
    uint64_t linked;

    (void)state;
    graph->neighbours[0] = 1;
    graph->neighbours[2] = 2;
    graph->degrees[0] = 1;
    graph->degrees[1] = 1;
    assert_int_equal(graph_connect(&vectors, graph, &linked, &err), 0);
    assert_int_equal(linked, 1);
    assert_int_equal(graph->degrees[1], 2);
    assert_int_equal(graph->neighbours[3], 3);
    graph_free(graph);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_list_keeps_the_nearest_in_order_and_refuses_repeats),
        cmocka_unit_test(test_nearest_open_goes_back_for_a_nearer_newcomer),
        cmocka_unit_test(test_sort_orders_any_input),
        cmocka_unit_test(test_visited_set_reports_each_row_once_and_forgets_on_clear),
        cmocka_unit_test(test_prune_keeps_what_the_eager_form_keeps),
        cmocka_unit_test(test_saturated_prune_fills_up_with_the_nearest),
        cmocka_unit_test(test_search_on_the_built_graph_finds_the_nearest),
        cmocka_unit_test(test_graph_is_the_same_for_any_pool),
        cmocka_unit_test(test_small_and_odd_sets_build),
        cmocka_unit_test(test_every_element_type_gives_the_same_neighbourhoods),
        cmocka_unit_test(test_entry_point_is_the_row_nearest_to_the_mean),
        cmocka_unit_test(test_copies_of_few_vectors_stay_reachable),
        cmocka_unit_test(test_rows_may_stand_apart),
        cmocka_unit_test(test_wrong_parameters_are_refused),
        cmocka_unit_test(test_a_cancelled_build_returns_no_graph),
        cmocka_unit_test(test_memory_plan_covers_the_graph_and_grows_with_it),
        cmocka_unit_test(test_connect_links_every_node_of_an_empty_graph),
        cmocka_unit_test(test_connect_replaces_an_edge_of_a_full_node_and_loses_nobody),
        cmocka_unit_test(test_connect_takes_the_nearest_reached_node),
    };

    return cmocka_run_group_tests_name("vamana", tests, NULL, NULL);
}
