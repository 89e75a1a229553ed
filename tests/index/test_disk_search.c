/* Disk search against exact search, and against itself under other threads, backends and budgets.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "index/search_engine.h"
#include "tests/support/small_index.h"

#define K 10u

struct run {
    uint32_t threads, slots, beam, list;
    enum reader_backend backend;
    uint64_t memory_bytes;
    const bool *cancelled;
    uint64_t deadline_us;
};

struct outcome {
    struct search_task *tasks;
    struct search_hit *hits;
};

static const struct run plain = {1, 1, 2, 60, READER_PREAD, 0, NULL, 0};

static struct outcome search(const struct small_index *small, const struct run *run)
{
    struct error err = ERROR_INIT;
    struct index_directory *directory;
    struct search_engine *engine;
    struct outcome out;

    if (index_directory_open(vfs_posix(), small->path, run->memory_bytes, false, &directory, &err) <
        0)
        fail_msg("%s", err.message);
    const struct disk_index *index = directory->segments[0].fields[0];
    const struct search_engine_options options = {
        .threads = run->threads,
        .slots_per_thread = run->slots,
        .beam_width = run->beam,
        .search_list_max = run->list,
        .k_max = K,
        .dim_max = index->dim,
        .page_bytes_max = index->format.page_bytes,
        .table_floats_max = quantiser_table_floats(index->quantiser),
        .scratch_floats_max = quantiser_scratch_floats(index->quantiser),
        .backend = run->backend};

    if (search_engine_open(&options, &engine, &err) < 0)
        fail_msg("%s", err.message);
    out.tasks = calloc(small->query_count, sizeof *out.tasks);
    out.hits = calloc((size_t)small->query_count * K, sizeof *out.hits);
    for (uint32_t q = 0; q < small->query_count; q++)
        out.tasks[q] = (struct search_task){.index = index,
                                            .query = small->queries + (size_t)q * small->dim,
                                            .params = {.k = K,
                                                       .search_list = run->list,
                                                       .cancelled = run->cancelled,
                                                       .deadline_us = run->deadline_us},
                                            .hits = out.hits + (size_t)q * K};
    if (search_engine_run(engine, out.tasks, small->query_count, &err) < 0)
        fail_msg("%s", err.message);
    search_engine_close(engine);
    index_directory_close(directory);
    return out;
}

static void outcome_free(struct outcome *out)
{
    free(out->tasks);
    free(out->hits);
}

static double recall(const struct small_index *small, const struct outcome *out)
{
    uint32_t found = 0;

    for (uint32_t q = 0; q < small->query_count; q++)
        for (uint32_t h = 0; h < out->tasks[q].hit_count; h++)
            for (uint32_t t = 0; t < K; t++)
                found += out->tasks[q].hits[h].key == small->truth.ids[q * K + t];
    return (double)found / (small->query_count * K);
}

static void assert_same(const struct small_index *small, const struct outcome *a,
                        const struct outcome *b)
{
    for (uint32_t q = 0; q < small->query_count; q++) {
        assert_int_equal(a->tasks[q].error.code, ERR_NONE);
        assert_int_equal(b->tasks[q].error.code, ERR_NONE);
        assert_int_equal(a->tasks[q].hit_count, b->tasks[q].hit_count);
        for (uint32_t h = 0; h < a->tasks[q].hit_count; h++) {
            assert_int_equal(a->tasks[q].hits[h].key, b->tasks[q].hits[h].key);
            assert_memory_equal(&a->tasks[q].hits[h].distance, &b->tasks[q].hits[h].distance, 4);
        }
    }
}

static void recall_floor(enum element_type element, enum metric metric, enum vector_store store,
                         uint32_t dim)
{
    struct small_options options = small_options_default(3000, dim);
    struct small_index small;

    options.element = element;
    options.params.metric = metric;
    options.params.store = store;
    small_index_make(&options, &small);
    struct outcome out = search(&small, &plain);
    double reached = recall(&small, &out);

    if (reached < 0.95)
        fail_msg("%s %s %s dim %u: recall %.3f", element_name(element), metric_name(metric),
                 store_name(store), dim, reached);
    for (uint32_t q = 0; q < small.query_count; q++) {
        assert_int_equal(out.tasks[q].hit_count, K);
        for (uint32_t h = 1; h < K; h++)
            assert_true(out.tasks[q].hits[h].distance >= out.tasks[q].hits[h - 1].distance);
        assert_true(out.tasks[q].stats.reads > 0);
    }
    outcome_free(&out);
    small_index_remove(&small);
}

static void test_recall_floor_for_every_metric_and_store(void **state)
{
    static const enum metric metrics[] = {METRIC_L2, METRIC_IP, METRIC_COSINE};

    (void)state;
    for (size_t m = 0; m < 3; m++) {
        recall_floor(ELEMENT_F32, metrics[m], STORE_F16, 32);
        recall_floor(ELEMENT_F32, metrics[m], STORE_F32, 32);
        recall_floor(ELEMENT_F32, metrics[m], STORE_SQ8, 32);
        recall_floor(ELEMENT_U8, metrics[m], STORE_U8, 32);
        recall_floor(ELEMENT_I8, metrics[m], STORE_I8, 32);
    }
}

static void test_vectors_wider_than_a_page_are_found(void **state)
{
    struct small_options options = small_options_default(300, 2100);
    struct small_index small;

    (void)state;
    options.params.metric = METRIC_COSINE;
    small_index_make(&options, &small);
    struct outcome out = search(&small, &plain);

    assert_true(recall(&small, &out) >= 0.95);
    assert_int_equal(out.tasks[0].stats.reads % 2, 0); /* an 8 KiB read counts as two */
    outcome_free(&out);
    small_index_remove(&small);
}

static void test_answers_do_not_depend_on_threads_company_backend_or_memory(void **state)
{
    struct small_options options = small_options_default(4000, 24);
    struct small_index small;
    struct run other = plain;
    char reason[256];

    (void)state;
    small_index_make(&options, &small);
    struct outcome reference = search(&small, &plain);
    static const struct {
        uint32_t threads, slots;
    } shapes[] = {{1, 8}, {4, 1}, {3, 5}, {4, 16}};

    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        other = plain;
        other.threads = shapes[i].threads;
        other.slots = shapes[i].slots;
        struct outcome out = search(&small, &other);

        assert_same(&small, &reference, &out);
        for (uint32_t q = 0; q < small.query_count; q++)
            assert_int_equal(out.tasks[q].stats.reads, reference.tasks[q].stats.reads);
        outcome_free(&out);
    }
    if (reader_probe(reason) == READER_URING) {
        other = plain;
        other.backend = READER_URING;
        other.threads = 4;
        other.slots = 8;
        struct outcome out = search(&small, &other);

        assert_same(&small, &reference, &out);
        outcome_free(&out);
    } else {
        print_message("# io_uring is not available here: %s\n", reason);
    }
    other = plain;
    other.memory_bytes = 64u << 20; /* everything resident */
    struct outcome resident = search(&small, &other);

    for (uint32_t q = 0; q < small.query_count; q++) {
        assert_int_equal(resident.tasks[q].stats.reads, 0);
        assert_true(resident.tasks[q].stats.resident_hits > 0);
    }
    assert_true(recall(&small, &resident) >= 0.95);
    outcome_free(&resident);
    outcome_free(&reference);
    small_index_remove(&small);
}

static void test_a_damaged_page_fails_only_the_queries_that_need_it(void **state)
{
    struct small_options options = small_options_default(4000, 24);
    struct small_index small;
    char pages[192];
    uint8_t byte;
    uint32_t failed = 0, good = 0, capacity = 0;
    struct index_directory *directory;
    struct error err = ERROR_INIT;

    (void)state;
    small_index_make(&options, &small);
    struct outcome before = search(&small, &plain);

    snprintf(pages, sizeof pages, "%s/f0.pages", small.segment);
    int fd = open(pages, O_RDWR);

    assert_int_equal(index_directory_open(vfs_posix(), small.path, 0, false, &directory, &err), 0);
    capacity = directory->segments[0].fields[0]->format.capacity;
    index_directory_close(directory);
    /* The page of the first query's nearest row, which that query cannot do without. */
    off_t at = 4096 * (1 + (off_t)(before.tasks[0].hits[0].position / capacity)) + 100;

    assert_int_equal(pread(fd, &byte, 1, at), 1);
    byte ^= 0x10;
    assert_int_equal(pwrite(fd, &byte, 1, at), 1);
    close(fd);
    struct outcome after = search(&small, &plain);

    for (uint32_t q = 0; q < small.query_count; q++) {
        if (after.tasks[q].error.code) {
            assert_int_equal(after.tasks[q].error.code, ERR_CORRUPT);
            assert_non_null(strstr(after.tasks[q].error.message, "f0.pages"));
            assert_int_equal(after.tasks[q].hit_count, 0);
            failed++;
        } else {
            assert_memory_equal(after.tasks[q].hits, before.tasks[q].hits, sizeof *after.hits * K);
            good++;
        }
    }
    assert_true(failed > 0);
    assert_true(good > 0);
    outcome_free(&before);
    outcome_free(&after);
    small_index_remove(&small);
}

static void test_more_queries_than_the_queue_holds_are_all_answered(void **state)
{
    struct small_options options = small_options_default(300, 4);
    struct small_index small;
    struct run other = plain;

    (void)state;
    options.queries = 66000; /* the queue holds 65,536 */
    small_index_make(&options, &small);
    other.list = K;
    other.memory_bytes = 64u << 20;
    struct outcome out = search(&small, &other);

    for (uint32_t q = 0; q < small.query_count; q++) {
        assert_int_equal(out.tasks[q].error.code, ERR_NONE);
        assert_int_equal(out.tasks[q].hit_count, K);
    }
    outcome_free(&out);
    small_index_remove(&small);
}

static void test_cancelled_and_late_queries_end_with_their_own_error(void **state)
{
    struct small_options options = small_options_default(2000, 24);
    struct small_index small;
    struct run other = plain;
    bool cancelled = true;

    (void)state;
    small_index_make(&options, &small);
    other.cancelled = &cancelled;
    struct outcome out = search(&small, &other);

    for (uint32_t q = 0; q < small.query_count; q++)
        assert_int_equal(out.tasks[q].error.code, ERR_CANCELLED);
    outcome_free(&out);
    other = plain;
    other.deadline_us = 1;
    out = search(&small, &other);
    for (uint32_t q = 0; q < small.query_count; q++)
        assert_int_equal(out.tasks[q].error.code, ERR_TIMEOUT);
    outcome_free(&out);
    small_index_remove(&small);
}

static void test_original_vectors_and_keys_come_back_exactly(void **state)
{
    struct small_options options = small_options_default(1000, 40);
    int64_t *keys = malloc(1000 * sizeof *keys);
    uint32_t positions[1000];
    int64_t found[1000];
    float *vectors = malloc(1000 * 40 * sizeof *vectors);
    struct small_index small;
    struct index_directory *directory;
    struct reader *reader;
    struct error err = ERROR_INIT;

    (void)state;
    for (int64_t i = 0; i < 1000; i++)
        keys[i] = (i % 2 ? INT64_MAX : INT64_MIN) + (i % 2 ? -i : i);
    options.keys = keys;
    options.params.metric = METRIC_COSINE;
    small_index_make(&options, &small);
    assert_int_equal(index_directory_open(vfs_posix(), small.path, 0, true, &directory, &err), 0);
    assert_int_equal(reader_open(READER_PREAD, 64, &reader, &err), 0);
    for (uint32_t i = 0; i < 1000; i++)
        positions[i] = i;
    const struct disk_index *index = directory->segments[0].fields[0];

    assert_int_equal(disk_index_keys(index, reader, positions, 1000, found, &err), 0);
    assert_int_equal(disk_index_vectors(index, reader, positions, 1000, vectors, &err), 0);
    for (uint32_t i = 0; i < 1000; i++) {
        uint32_t row = 0, position, count;
        uint64_t ordinal = key_ordinal_int64(found[i]);

        while (row < 1000 && keys[row] != found[i])
            row++;
        assert_true(row < 1000);
        assert_memory_equal(vectors + i * 40, small.rows + row * 40, 40 * sizeof *vectors);
        assert_int_equal(
            keys_find(directory->segments[0].keys, reader, &ordinal, 1, 1, &position, &count, &err),
            0);
        assert_int_equal(count, 1);
        assert_int_equal(position, i);
    }
    reader_close(reader);
    index_directory_close(directory);
    small_index_remove(&small);
    free(keys);
    free(vectors);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_recall_floor_for_every_metric_and_store),
        cmocka_unit_test(test_vectors_wider_than_a_page_are_found),
        cmocka_unit_test(test_answers_do_not_depend_on_threads_company_backend_or_memory),
        cmocka_unit_test(test_a_damaged_page_fails_only_the_queries_that_need_it),
        cmocka_unit_test(test_more_queries_than_the_queue_holds_are_all_answered),
        cmocka_unit_test(test_cancelled_and_late_queries_end_with_their_own_error),
        cmocka_unit_test(test_original_vectors_and_keys_come_back_exactly),
    };

    return cmocka_run_group_tests_name("disk_search", tests, NULL, NULL);
}
