/* collection_search: one request over two segments of different sizes: merged rows, the rule of
 * each segment, and figures that add up. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "src/collection_search.h"
#include "storage/file.h"
#include "tests/support/small_index.h"

#define ROWS 1400u
#define FIRST 1000u /* rows of the first segment */
#define DIM 16u
#define K 10u

static struct small_index small; /* rows, queries, truth: positions are the keys below */
static char folder[80];
static struct index_directory *directory;
static struct search_engine *engine;

static void must(int rc, const struct error *err)
{
    if (rc < 0)
        fail_msg("%s", err->message);
}

static void make_directory(void)
{
    struct small_options options = small_options_default(ROWS, DIM);
    struct schema *schema = NULL;
    struct error err = ERROR_INIT;
    struct pool *pool = NULL;
    static int64_t keys[ROWS];
    char names[2][64];
    const char *published[2] = {names[0], names[1]};

    small_index_make(&options, &small);
    snprintf(folder, sizeof folder, "%s/two", small.folder);
    must(file_mkdir(vfs_posix(), folder, &err), &err);
    must(pool_new(1, &pool, &err), &err);
    must(schema_default("id", FIELD_INT64, 0, "vector", FIELD_FLOAT_VECTOR, DIM, &schema, &err),
         &err);
    for (uint32_t i = 0; i < ROWS; i++)
        keys[i] = i;
    for (uint32_t s = 0; s < 2; s++) {
        uint32_t begin = s ? FIRST : 0;
        uint32_t count = s ? ROWS - FIRST : FIRST;
        struct segment_build_rows rows = {.schema = schema, .int64_keys = keys + begin};
        struct segment_build_result result;
        struct vector_source *source = NULL;

        must(vector_source_open_memory(small.rows + (size_t)begin * DIM, ELEMENT_F32, count, DIM,
                                       "part", &source, &err),
             &err);
        must(segment_build(vfs_posix(), folder, source, &rows, &options.params, NULL, pool, NULL,
                           &result, &err),
             &err);
        snprintf(names[s], sizeof names[s], "%s", result.name);
        vector_source_close(source);
    }
    must(index_directory_publish(vfs_posix(), folder, schema, published, 2, &err), &err);
    must(index_directory_open(vfs_posix(), folder, 0, false, &directory, &err), &err);
    pool_free(pool);
    schema_free(schema);
}

static int group_make(void **state)
{
    struct search_engine_options options = {
        .threads = 2,
        .slots_per_thread = 4,
        .limits = {.search_list_max = 2000,
                   .cells_max = DISK_SEARCH_CELLS_MAX,
                   .k_max = ROWS,
                   .beam_width = REQUEST_BEAM_WIDTH_MAX},
        .backend = READER_PREAD,
    };
    struct error err = ERROR_INIT;

    (void)state;
    make_directory();
    for (uint32_t s = 0; s < directory->segment_count; s++)
        disk_search_limits_raise(&options.limits, directory->segments[s].fields[0]);
    must(search_engine_open(&options, &engine, &err), &err);
    return 0;
}

static int group_remove(void **state)
{
    (void)state;
    search_engine_close(engine);
    index_directory_close(directory);
    small_index_remove(&small);
    return 0;
}

struct answer {
    struct arena arena;
    struct collection_search *search;
    struct result_row *rows;
    uint32_t row_count;
    uint32_t *counts;
    struct search_totals totals;
    pthread_mutex_t mutex;
    pthread_cond_t ended;
    bool done;
};

static void answer_done(void *context)
{
    struct answer *answer = context;

    pthread_mutex_lock(&answer->mutex);
    answer->done = true;
    pthread_cond_signal(&answer->ended);
    pthread_mutex_unlock(&answer->mutex);
}

/* All queries of the set with this tuning and window; released with answer_release. */
static int ask(struct answer *answer, struct search_request *request, struct error *err)
{
    const float *queries[64];

    memset(answer, 0, sizeof *answer);
    arena_init(&answer->arena, (size_t)64 << 20);
    pthread_mutex_init(&answer->mutex, NULL);
    pthread_cond_init(&answer->ended, NULL);
    assert_true(small.query_count <= 64);
    for (uint32_t i = 0; i < small.query_count; i++)
        queries[i] = small.queries + (size_t)i * DIM;
    request->queries = queries;
    request->query_count = small.query_count;
    if (collection_search_start(engine, directory, 0, request, &answer->arena, answer_done, answer,
                                &answer->search, err) < 0)
        return -1;
    pthread_mutex_lock(&answer->mutex);
    while (!answer->done)
        pthread_cond_wait(&answer->ended, &answer->mutex);
    pthread_mutex_unlock(&answer->mutex);
    return collection_search_finish(answer->search, &answer->rows, &answer->row_count,
                                    &answer->counts, &answer->totals, err);
}

static void answer_release(struct answer *answer)
{
    arena_release(&answer->arena);
    pthread_mutex_destroy(&answer->mutex);
    pthread_cond_destroy(&answer->ended);
}

static struct search_request request_of(int32_t limit, int32_t offset, struct search_tuning tuning)
{
    struct search_request request;

    search_request_init(&request);
    request.limit = limit;
    request.offset = offset;
    request.tuning = tuning;
    return request;
}

static double recall_of(const struct answer *answer)
{
    uint32_t found = 0;

    for (uint32_t q = 0; q < small.query_count; q++) {
        assert_int_equal(answer->counts[q], K);
        for (uint32_t i = 0; i < K; i++) {
            const struct result_row *row = &answer->rows[q * K + i];

            assert_int_equal(row->segment, row->key >= FIRST);
            assert_true(i == 0 || row[-1].distance <= row->distance);
            for (uint32_t t = 0; t < K; t++)
                found += small.truth.ids[q * small.truth.k + t] == row->key;
        }
    }
    return (double)found / (K * small.query_count);
}

static void test_the_nearest_of_both_segments_are_merged(void **state)
{
    const struct search_tuning tunings[] = {
        {0}, {.search_list = 100}, {.recall_target = 0.95}, {.level = 5}, {.exact_scores = true}};
    struct error err = ERROR_INIT;

    (void)state;
    for (size_t i = 0; i < sizeof tunings / sizeof *tunings; i++) {
        struct search_request request = request_of(K, 0, tunings[i]);
        struct answer answer;

        must(ask(&answer, &request, &err), &err);
        if (recall_of(&answer) < 0.93)
            fail_msg("tuning %zu: recall %.3f", i, recall_of(&answer));
        answer_release(&answer);
    }
}

static void test_a_window_is_the_rest_of_the_same_answer(void **state)
{
    struct search_request whole = request_of(30, 0, (struct search_tuning){0});
    struct search_request part = request_of(10, 20, (struct search_tuning){0});
    struct answer a, b;
    struct error err = ERROR_INIT;

    (void)state;
    must(ask(&a, &whole, &err), &err);
    must(ask(&b, &part, &err), &err);
    for (uint32_t q = 0; q < small.query_count; q++)
        for (uint32_t i = 0; i < 10; i++)
            assert_int_equal(a.rows[q * 30 + 20 + i].key, b.rows[q * 10 + i].key);
    answer_release(&a);
    answer_release(&b);
}

static void test_more_rows_than_there_are_gives_all(void **state)
{
    struct search_request request = request_of(ROWS + 500, 0, (struct search_tuning){0});
    struct answer answer;
    struct error err = ERROR_INIT;

    (void)state;
    must(ask(&answer, &request, &err), &err);
    assert_true(answer.row_count > small.query_count * ROWS * 0.99);
    assert_true(answer.row_count <= small.query_count * ROWS);
    answer_release(&answer);
}

static void test_each_segment_has_its_rule(void **state)
{
    struct search_request request =
        request_of(600, 0, (struct search_tuning){.search_list = 50, .reads_max = 9});
    const struct search_part *parts;
    struct answer answer;
    struct error err = ERROR_INIT;

    (void)state;
    must(ask(&answer, &request, &err), &err);
    assert_int_equal(collection_search_parts(answer.search, &parts), 2);
    for (uint32_t s = 0; s < 2; s++) {
        uint32_t k = s ? ROWS - FIRST : 600;

        assert_int_equal(parts[s].segment, s);
        assert_ptr_equal(parts[s].index, directory->segments[s].fields[0]);
        assert_string_equal(parts[s].effort.given_by, "search_list");
        assert_int_equal(parts[s].params.k, k); /* no more than it has rows */
        assert_int_equal(parts[s].params.rule.search_list, k);
        assert_int_equal(parts[s].params.reads_max, 4); /* its half */
        assert_int_equal(parts[s].params.beam_width, REQUEST_BEAM_WIDTH_DEFAULT);
    }
    answer_release(&answer);
}

static void test_figures_of_a_query_add_up_to_the_totals(void **state)
{
    struct search_request request = request_of(K, 0, (struct search_tuning){.explain = true});
    struct search_totals sum = {0};
    struct answer answer;
    struct error err = ERROR_INIT;

    (void)state;
    must(ask(&answer, &request, &err), &err);
    for (uint32_t q = 0; q < small.query_count; q++) {
        struct search_stats stats;
        bool stopped[STOP_READS + 1];

        collection_search_query(answer.search, q, &stats, stopped);
        assert_true(stats.reads > 0 && stats.rounds > 0 && stats.rounds <= stats.reads);
        assert_int_equal(stats.read_bytes, 4096 * (uint64_t)stats.reads);
        assert_int_equal(stats.resident_hits, 0); /* only what must be is in memory */
        assert_true(stats.latency_us > 0 && stats.score_us > 0);
        assert_true(stopped[STOP_GAIN] || stopped[STOP_LIST]);
        assert_false(stopped[STOP_NONE]);
        assert_int_equal(stats.stop, stopped[STOP_GAIN] && stopped[STOP_LIST] ? STOP_NONE
                                     : stopped[STOP_GAIN]                     ? STOP_GAIN
                                                                              : STOP_LIST);
        sum.reads += stats.reads;
        sum.scanned += stats.scanned;
        sum.estimates += stats.estimates;
        sum.exact += stats.exact;
    }
    assert_int_equal(sum.reads, answer.totals.reads);
    assert_int_equal(sum.scanned, answer.totals.scanned);
    assert_int_equal(sum.estimates, answer.totals.estimates);
    assert_int_equal(sum.exact, answer.totals.exact);
    assert_int_equal(answer.totals.stops[STOP_GAIN] + answer.totals.stops[STOP_LIST],
                     2 * small.query_count);
    assert_true(answer.totals.rounds > 0 && answer.totals.resident_hits == 0);
    answer_release(&answer);
}

static void test_a_failure_of_one_task_is_the_searchs(void **state)
{
    struct search_request request = request_of(K, 0, (struct search_tuning){0});
    const bool cancelled = true;
    struct answer answer;
    struct error err = ERROR_INIT;

    (void)state;
    request.cancelled = &cancelled;
    assert_int_equal(ask(&answer, &request, &err), -1);
    assert_int_equal(err.code, ERR_CANCELLED);
    answer_release(&answer);
    err = (struct error)ERROR_INIT;
    request.cancelled = NULL;
    request.deadline_us = 1;
    assert_int_equal(ask(&answer, &request, &err), -1);
    assert_int_equal(err.code, ERR_TIMEOUT);
    answer_release(&answer);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_the_nearest_of_both_segments_are_merged),
        cmocka_unit_test(test_a_window_is_the_rest_of_the_same_answer),
        cmocka_unit_test(test_more_rows_than_there_are_gives_all),
        cmocka_unit_test(test_each_segment_has_its_rule),
        cmocka_unit_test(test_figures_of_a_query_add_up_to_the_totals),
        cmocka_unit_test(test_a_failure_of_one_task_is_the_searchs),
    };

    return cmocka_run_group_tests_name("collection_search", tests, group_make, group_remove);
}
