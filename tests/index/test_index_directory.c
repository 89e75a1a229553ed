/* index_directory: what a grant of memory buys, what is no index, several segments in one. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "index/search_engine.h"
#include "storage/file.h"
#include "tests/support/small_index.h"
#include "tests/support/vfs_fault.h"

#define K 10u
#define SWEEP_POINTS 150u

static struct small_index one; /* shared: 2,000 rows x 16, read only */

static struct index_directory *must_open(const char *path, uint64_t memory_bytes, bool with_rows)
{
    struct index_directory *directory = NULL;
    struct error err = ERROR_INIT;

    if (index_directory_open(vfs_posix(), path, memory_bytes, with_rows, &directory, &err) < 0)
        fail_msg("%s", err.message);
    return directory;
}

/* The k nearest of all segments, best first; hits[i].key is the key. */
static void search(const struct index_directory *directory, const float *query,
                   struct search_hit hits[K], uint32_t from[K], uint32_t *resident_hits)
{
    struct search_engine_options options = {
        .threads = 1,
        .slots_per_thread = 1,
        .limits = {.search_list_max = 80, .cells_max = 8, .k_max = K, .beam_width = 4},
        .backend = READER_PREAD};
    struct search_engine *engine;
    struct error err = ERROR_INIT;
    uint32_t count = 0;

    *resident_hits = 0;
    for (uint32_t s = 0; s < directory->segment_count; s++)
        disk_search_limits_raise(&options.limits, directory->segments[s].fields[0]);
    if (search_engine_open(&options, &engine, &err) < 0)
        fail_msg("%s", err.message);
    for (uint32_t s = 0; s < directory->segment_count; s++) {
        struct search_hit found[K];
        struct search_task task = {.index = directory->segments[s].fields[0],
                                   .query = query,
                                   .params = {.k = K, .rule = {.search_list = 80, .cells = 8}},
                                   .hits = found};

        if (search_engine_run(engine, &task, 1, &err) < 0)
            fail_msg("%s", err.message);
        if (task.error.code)
            fail_msg("%s", task.error.message);
        *resident_hits += task.stats.resident_hits;
        for (uint32_t i = 0; i < task.hit_count; i++) {
            uint32_t at = count;

            while (at > 0 && hits[at - 1].distance > found[i].distance)
                at--;
            if (at == K)
                continue;
            count += count < K;
            memmove(hits + at + 1, hits + at, (count - 1 - at) * sizeof *hits);
            memmove(from + at + 1, from + at, (count - 1 - at) * sizeof *from);
            hits[at] = found[i];
            from[at] = s;
        }
    }
    assert_int_equal(count, K);
    search_engine_close(engine);
}

static void test_memory_stays_within_the_grant(void **state)
{
    struct index_directory *directory = must_open(one.path, 0, true);
    uint64_t least = directory->memory_bytes;
    uint64_t page = directory->segments[0].fields[0]->format.page_bytes;
    uint64_t pages = directory->segments[0].fields[0]->format.page_count;

    (void)state;
    assert_int_equal(directory->segments[0].fields[0]->resident_page_count, 0);
    index_directory_close(directory);
    /* One byte short of the next page buys no more than the page before. */
    for (uint64_t n = 0; n <= pages + 2; n++)
        for (uint64_t more = 0; more <= 1; more++) {
            uint64_t grant = least + n * page + more * (page - 1);
            uint64_t wanted = n < pages ? n : pages;

            directory = must_open(one.path, grant, true);
            assert_true(directory->memory_bytes <= grant);
            assert_int_equal(directory->segments[0].fields[0]->resident_page_count, wanted);
            assert_int_equal(directory->memory_bytes, least + wanted * page);
            index_directory_close(directory);
        }
}

static void test_a_grant_below_the_minimum_is_refused(void **state)
{
    struct index_directory *directory = must_open(one.path, 0, true);
    uint64_t least = directory->memory_bytes;
    const uint64_t grants[] = {1, 4096, least / 2, least - 1};

    (void)state;
    index_directory_close(directory);
    for (size_t i = 0; i < sizeof grants / sizeof *grants; i++) {
        struct error err = ERROR_INIT;
        char number[32];

        directory = NULL;
        assert_int_equal(
            index_directory_open(vfs_posix(), one.path, grants[i], true, &directory, &err), -1);
        assert_null(directory);
        assert_int_equal(err.code, ERR_BUDGET);
        snprintf(number, sizeof number, "%llu", (unsigned long long)least);
        assert_non_null(strstr(err.message, number));
        snprintf(number, sizeof number, "%llu", (unsigned long long)grants[i]);
        assert_non_null(strstr(err.message, number));
        assert_non_null(strstr(err.message, "to mend"));
    }
    /* Without keys and rows it takes less. */
    directory = must_open(one.path, least - 1, false);
    assert_null(directory->segments[0].keys);
    assert_true(directory->memory_bytes < least);
    index_directory_close(directory);
}

static void test_answers_are_the_same_whatever_is_resident(void **state)
{
    struct index_directory *bare = must_open(one.path, 0, false);
    struct index_directory *full = must_open(one.path, 64u << 20, false);

    (void)state;
    for (uint32_t q = 0; q < one.query_count; q++) {
        struct search_hit a[K], b[K];
        uint32_t from[K], resident, found = 0;

        search(bare, one.queries + (size_t)q * one.dim, a, from, &resident);
        assert_int_equal(resident, 0);
        search(full, one.queries + (size_t)q * one.dim, b, from, &resident);
        assert_true(resident > 0);
        for (uint32_t i = 0; i < K; i++)
            for (uint32_t j = 0; j < K; j++)
                found += a[i].key == b[j].key;
        assert_true(found >= K - 1);
    }
    index_directory_close(bare);
    index_directory_close(full);
}

static void test_what_is_no_index_directory_is_said_with_a_remedy(void **state)
{
    const char *paths[3] = {one.folder, one.segment, "/nonexistent/index"};

    (void)state;
    for (size_t i = 0; i < 3; i++) {
        struct index_directory *directory = NULL;
        struct error err = ERROR_INIT;
        struct index_check found;
        char **names = NULL;
        uint32_t count;

        assert_int_equal(index_directory_open(vfs_posix(), paths[i], 0, true, &directory, &err),
                         -1);
        assert_null(directory);
        assert_int_equal(err.code, ERR_NOT_FOUND);
        assert_non_null(strstr(err.message, paths[i]));
        assert_non_null(strstr(err.message, "MANIFEST"));
        assert_non_null(strstr(err.message, "to mend"));
        assert_non_null(strstr(err.message, "annd build"));
        error_clear(&err);
        assert_int_equal(index_directory_check(vfs_posix(), paths[i], NULL, &found, &err), -1);
        assert_int_equal(err.code, ERR_NOT_FOUND);
        error_clear(&err);
        assert_int_equal(index_directory_files(vfs_posix(), paths[i], &names, &count, &err), -1);
        assert_int_equal(err.code, ERR_NOT_FOUND);
    }
}

/* ---- two segments ---- */

#define HALF 600u
#define DIM 12u

struct two {
    char folder[64];
    struct schema *schema;
    float *rows;
    char names[2][64];
};

static void two_make(struct two *two)
{
    struct small_options options = small_options_default(2 * HALF, DIM);
    const char *names[2] = {two->names[0], two->names[1]};
    struct error err = ERROR_INIT;
    struct small_index small;
    struct pool *pool = NULL;
    int64_t keys[HALF];

    *two = (struct two){.schema = NULL};
    small_index_make(&options, &small);
    snprintf(two->folder, sizeof two->folder, "%.50s.two", small.folder);
    two->rows = small.rows;
    small.rows = NULL;
    small_index_remove(&small);
    if (file_mkdir(vfs_posix(), two->folder, &err) < 0 || pool_new(1, &pool, &err) < 0 ||
        schema_default("id", FIELD_INT64, 0, "vector", FIELD_FLOAT_VECTOR, DIM, &two->schema,
                       &err) < 0)
        fail_msg("%s", err.message);
    for (uint32_t s = 0; s < 2; s++) {
        struct segment_build_rows rows = {.schema = two->schema, .int64_keys = keys};
        struct segment_build_result result;
        struct vector_source *source = NULL;

        for (uint32_t i = 0; i < HALF; i++)
            keys[i] = 1000000 * (int64_t)(s + 1) + i;
        if (vector_source_open_memory(two->rows + (size_t)s * HALF * DIM, ELEMENT_F32, HALF, DIM,
                                      "half", &source, &err) < 0 ||
            segment_build(vfs_posix(), two->folder, source, &rows, &options.params, NULL, pool,
                          NULL, &result, &err) < 0)
            fail_msg("%s", err.message);
        snprintf(two->names[s], sizeof two->names[s], "%s", result.name);
        vector_source_close(source);
    }
    if (index_directory_publish(vfs_posix(), two->folder, two->schema, names, 2, &err) < 0)
        fail_msg("%s", err.message);
    pool_free(pool);
}

static void two_remove(struct two *two)
{
    file_remove_all(vfs_posix(), two->folder, NULL);
    schema_free(two->schema);
    free(two->rows);
}

static void test_two_segments_are_both_searched(void **state)
{
    struct error err = ERROR_INIT;
    struct index_directory *directory;
    struct index_check found;
    struct two two;

    (void)state;
    two_make(&two);
    if (index_directory_check(vfs_posix(), two.folder, NULL, &found, &err) < 0)
        fail_msg("%s", err.message);
    assert_int_equal(found.nodes, 2 * HALF);
    directory = must_open(two.folder, 0, true);
    assert_int_equal(directory->segment_count, 2);
    assert_int_equal(directory->row_count, 2 * HALF);
    /* A row's own vector is found under its own key, in its own segment. */
    for (uint32_t row = 0; row < 2 * HALF; row += 37) {
        struct search_hit hits[K];
        uint32_t from[K], resident;

        search(directory, two.rows + (size_t)row * DIM, hits, from, &resident);
        assert_int_equal(hits[0].key, 1000000 * (int64_t)(row / HALF + 1) + row % HALF);
        assert_int_equal(from[0], row / HALF);
    }
    index_directory_close(directory);
    two_remove(&two);
}

static void test_two_segments_share_the_grant(void **state)
{
    struct index_directory *directory;
    struct error err = ERROR_INIT;
    struct two two;

    (void)state;
    two_make(&two);
    directory = must_open(two.folder, 0, true);
    uint64_t least = directory->memory_bytes;
    uint64_t page = directory->segments[0].fields[0]->format.page_bytes;

    index_directory_close(directory);
    assert_int_equal(
        index_directory_open(vfs_posix(), two.folder, least - 1, true, &directory, &err), -1);
    assert_int_equal(err.code, ERR_BUDGET);
    for (uint64_t spare = 0; spare < 40 * page; spare += page / 2 + 13) {
        directory = must_open(two.folder, least + spare, true);
        assert_true(directory->memory_bytes <= least + spare);
        /* Equal segments get equal shares. */
        assert_int_equal(directory->segments[0].fields[0]->resident_page_count,
                         directory->segments[1].fields[0]->resident_page_count);
        index_directory_close(directory);
    }
    directory = must_open(two.folder, least + 400 * page, true);
    for (uint32_t s = 0; s < 2; s++)
        assert_int_equal(directory->segments[s].fields[0]->resident_page_count,
                         directory->segments[s].fields[0]->format.page_count);
    index_directory_close(directory);
    two_remove(&two);
}

static void test_the_list_of_files_is_complete(void **state)
{
    char **names, **listed, path[FILE_PATH_MAX];
    uint32_t count, listed_count, there = 0;
    struct error err = ERROR_INIT;
    struct two two;

    (void)state;
    two_make(&two);
    if (index_directory_files(vfs_posix(), two.folder, &names, &count, &err) < 0)
        fail_msg("%s", err.message);
    for (uint32_t i = 0; i < count; i++) {
        struct vfs_stat stat;

        if (i > 0 && strcmp(names[i - 1], names[i]) >= 0)
            fail_msg("'%s' comes before '%s'", names[i - 1], names[i]);
        if (file_path_join(path, two.folder, names[i], &err) < 0 ||
            file_stat(vfs_posix(), path, &stat, &err) < 0)
            fail_msg("%s", err.message);
        assert_int_equal(stat.kind, VFS_FILE);
    }
    /* Nothing else is in the folders. */
    if (file_list(vfs_posix(), two.folder, &listed, &listed_count, &err) < 0)
        fail_msg("%s", err.message);
    assert_int_equal(listed_count, 4); /* MANIFEST, schema.json, two segments */
    file_names_free(listed, listed_count);
    for (uint32_t s = 0; s < 2; s++) {
        if (file_path_join(path, two.folder, two.names[s], &err) < 0 ||
            file_list(vfs_posix(), path, &listed, &listed_count, &err) < 0)
            fail_msg("%s", err.message);
        there += listed_count;
        file_names_free(listed, listed_count);
    }
    assert_int_equal(count, 2 + there);
    file_names_free(names, count);
    two_remove(&two);
}

static void test_a_directory_is_published_once(void **state)
{
    struct schema *other = NULL;
    struct error err = ERROR_INIT;
    struct index_directory *directory;
    struct two two;

    (void)state;
    two_make(&two);
    const char *name = two.names[0];

    if (schema_default("other", FIELD_INT64, 0, "vector", FIELD_FLOAT_VECTOR, DIM, &other, &err) <
        0)
        fail_msg("%s", err.message);
    assert_int_equal(index_directory_publish(vfs_posix(), two.folder, other, &name, 1, &err), -1);
    assert_int_equal(err.code, ERR_EXISTS);
    schema_free(other);
    /* And what was there is as it was. */
    directory = must_open(two.folder, 0, true);
    assert_int_equal(directory->segment_count, 2);
    assert_non_null(schema_find(directory->schema, "id"));
    index_directory_close(directory);
    two_remove(&two);
}

static void test_a_segment_that_is_gone_is_damage(void **state)
{
    char path[FILE_PATH_MAX], moved[FILE_PATH_MAX + 8];
    struct index_directory *directory;
    struct error err = ERROR_INIT;
    struct index_check found;
    struct two two;

    (void)state;
    two_make(&two);
    assert_int_equal(file_path_join(path, two.folder, two.names[1], &err), 0);
    snprintf(moved, sizeof moved, "%s.away", path);
    assert_int_equal(file_rename(vfs_posix(), path, moved, &err), 0);
    assert_int_equal(index_directory_open(vfs_posix(), two.folder, 0, true, &directory, &err), -1);
    assert_int_equal(err.code, ERR_CORRUPT);
    assert_non_null(strstr(err.message, two.names[1]));
    error_clear(&err);
    assert_int_equal(index_directory_check(vfs_posix(), two.folder, NULL, &found, &err), -1);
    assert_int_equal(err.code, ERR_CORRUPT);
    two_remove(&two);
}

/* ---- failing files ---- */

static void test_any_read_that_fails_or_lies_is_an_error_or_makes_no_difference(void **state)
{
    static const struct vfs_fault_plan plans[] = {
        {.effect = VFS_EFFECT_ERRNO, .errno_value = EIO},
        {.effect = VFS_EFFECT_ERRNO, .errno_value = EMFILE},
        {.call = VFS_CALL_READ, .effect = VFS_EFFECT_SHORT},
        {.call = VFS_CALL_READ, .effect = VFS_EFFECT_FLIP, .bit = 4321},
        {.call = VFS_CALL_READ, .effect = VFS_EFFECT_TEAR},
    };
    struct vfs_fault fault;
    uint32_t refused = 0;

    (void)state;
    vfs_fault_init(&fault, vfs_posix());
    for (int check = 0; check < 2; check++)
        for (size_t p = 0; p < sizeof plans / sizeof *plans; p++) {
            struct vfs_fault_plan plan = plans[p];
            uint64_t calls = 1, points = 1;

            for (uint64_t i = 0; i <= points; i++) {
                struct index_directory *directory = NULL;
                struct error err = ERROR_INIT;
                struct index_check found;
                int rc;

                /* The first run has no fault and counts. */
                plan.nth = i ? 1 + (i - 1) * calls / points : 0;
                vfs_fault_plan(&fault, &plan);
                if (check)
                    rc = index_directory_check(&fault.vfs, one.path, NULL, &found, &err);
                else
                    rc = index_directory_open(&fault.vfs, one.path, 8u << 20, true, &directory,
                                              &err);
                if (i == 0) {
                    assert_int_equal(rc, 0);
                    calls = vfs_fault_calls(&fault, plan.call);
                    points = calls < SWEEP_POINTS ? calls : SWEEP_POINTS;
                }
                if (rc < 0) {
                    refused++;
                    assert_null(directory);
                    assert_true(err.code != ERR_NONE && err.message[0]);
                    if (plan.effect != VFS_EFFECT_ERRNO)
                        assert_int_equal(err.code, ERR_CORRUPT);
                } else if (!check) {
                    assert_int_equal(directory->row_count, one.row_count);
                    index_directory_close(directory);
                } else {
                    assert_int_equal(found.nodes, one.row_count);
                }
                if (rc == 0 && plan.effect == VFS_EFFECT_FLIP && i)
                    fail_msg("a flipped bit in read %llu is not seen",
                             (unsigned long long)plan.nth);
                assert_int_equal(vfs_fault_files_open(&fault), 0);
            }
        }
    assert_true(refused > 20);
    vfs_fault_release(&fault);
}

static void test_a_publication_that_fails_leaves_no_index_or_a_sound_one(void **state)
{
    struct vfs_fault fault;
    struct two two;
    uint64_t calls = 1;

    (void)state;
    two_make(&two);
    const char *names[2] = {two.names[0], two.names[1]};

    vfs_fault_init(&fault, vfs_posix());
    for (uint64_t nth = 0; nth <= calls; nth++) {
        const struct vfs_fault_plan plan = {.nth = nth, .errno_value = nth % 2 ? EIO : ENOSPC};
        struct index_directory *directory = NULL;
        struct error err = ERROR_INIT, open_err = ERROR_INIT;
        char path[FILE_PATH_MAX];

        assert_int_equal(file_path_join(path, two.folder, "MANIFEST", &err), 0);
        assert_int_equal(file_remove_all(vfs_posix(), path, &err), 0);
        vfs_fault_plan(&fault, &plan);
        int rc = index_directory_publish(&fault.vfs, two.folder, two.schema, names, 2, &err);

        if (nth == 0)
            calls = vfs_fault_calls(&fault, VFS_CALL_ANY);
        assert_int_equal(vfs_fault_files_open(&fault), 0);
        assert_true((rc < 0) == (err.code != ERR_NONE));
        /* After an unknown outcome it may be there; if so, it is whole. */
        if (index_directory_open(vfs_posix(), two.folder, 0, true, &directory, &open_err) == 0)
            assert_int_equal(directory->row_count, 2 * HALF);
        else
            assert_true(rc < 0 && open_err.code == ERR_NOT_FOUND);
        index_directory_close(directory);
    }
    vfs_fault_release(&fault);
    two_remove(&two);
}

static int group_setup(void **state)
{
    struct small_options options = small_options_default(2000, 16);

    (void)state;
    options.queries = 10;
    small_index_make(&options, &one);
    return 0;
}

static int group_teardown(void **state)
{
    (void)state;
    small_index_remove(&one);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_memory_stays_within_the_grant),
        cmocka_unit_test(test_a_grant_below_the_minimum_is_refused),
        cmocka_unit_test(test_answers_are_the_same_whatever_is_resident),
        cmocka_unit_test(test_what_is_no_index_directory_is_said_with_a_remedy),
        cmocka_unit_test(test_two_segments_are_both_searched),
        cmocka_unit_test(test_two_segments_share_the_grant),
        cmocka_unit_test(test_the_list_of_files_is_complete),
        cmocka_unit_test(test_a_directory_is_published_once),
        cmocka_unit_test(test_a_segment_that_is_gone_is_damage),
        cmocka_unit_test(test_any_read_that_fails_or_lies_is_an_error_or_makes_no_difference),
        cmocka_unit_test(test_a_publication_that_fails_leaves_no_index_or_a_sound_one),
    };

    return cmocka_run_group_tests_name("index_directory", tests, group_setup, group_teardown);
}
