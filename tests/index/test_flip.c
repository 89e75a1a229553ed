/* Every byte of an index can be damaged: each flip is named by the check, and a search gives the
 * undamaged answer or an error, never another answer, a crash or a hang.
 *
 * In process, because thousands of flips are wanted: two small indexes (int64 keys; text keys with
 * records), each byte of their manifests and of the start of every file, every STRIDE-th byte of
 * the rest. The masks are seeded. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "index/record.h"
#include "index/search_engine.h"
#include "storage/base/random.h"
#include "storage/file.h"
#include "tests/support/small_index.h"

#define SEED 20260302u
#define K 5u
#define QUERIES 4u
#define LIST 30u
#define CELLS 4u
#define STRIDE 64u
#define WHOLE_BYTES 256u /* from the start of every file: each byte */
#define FLIPS_MIN 2000u
#define RECORDS_MAX (QUERIES * K)

/* What a reader of the index can see. */
struct view {
    struct search_hit hits[QUERIES * K];
    uint32_t hit_count[QUERIES];
    uint8_t records[16384]; /* of all hits, one after the other */
    size_t record_bytes;
    char schema[2048];
};

struct tally {
    uint32_t flips, errors_in_search;
};

static struct search_engine *engine_of(const struct disk_index *index)
{
    struct error err = ERROR_INIT;
    struct search_engine *engine = NULL;
    /* Larger than the index asks for: a damaged size must be refused by the file's checks. */
    struct search_engine_options options = {
        .threads = 1,
        .slots_per_thread = 4,
        .limits = {.search_list_max = LIST, .cells_max = CELLS, .k_max = K, .beam_width = 4},
        .backend = READER_PREAD};

    disk_search_limits_raise(&options.limits, index);
    options.limits.dim_max *= 2;
    options.limits.buffer_bytes_max *= 2;
    options.limits.table_entries_max *= 2;
    options.limits.scratch_floats_max *= 2;
    options.limits.cell_scratch_bytes_max *= 2;
    if (search_engine_open(&options, &engine, &err) < 0)
        fail_msg("%s", err.message);
    return engine;
}

static int look_at_records(const struct index_segment *segment, struct view *view,
                           struct error *err)
{
    uint32_t positions[RECORDS_MAX], count = 0;
    struct rows_record records[RECORDS_MAX];
    struct reader *reader = NULL;
    uint8_t *storage = NULL;
    int rc = -1;

    for (uint32_t q = 0; q < QUERIES; q++)
        for (uint32_t h = 0; h < view->hit_count[q]; h++)
            positions[count++] = view->hits[q * K + h].position;
    if (reader_open(READER_PREAD, 16, &reader, err) < 0 ||
        rows_fetch(segment->rows, reader, positions, count, records, &storage, err) < 0)
        goto done;
    for (uint32_t i = 0; i < count; i++) {
        assert_true(view->record_bytes + records[i].bytes <= sizeof view->records);
        memcpy(view->records + view->record_bytes, records[i].data, records[i].bytes);
        view->record_bytes += records[i].bytes;
    }
    rc = 0;
done:
    reader_close(reader);
    free(storage);
    return rc;
}

/* 0, or -1 with the first error that opening or searching met. */
static int look(const struct small_index *small, struct search_engine *engine, struct view *view,
                struct error *err)
{
    struct index_directory *directory = NULL;
    struct search_task tasks[QUERIES];
    char *schema = NULL;
    size_t schema_bytes;
    int rc = -1;

    memset(view, 0, sizeof *view);
    if (index_directory_open(vfs_posix(), small->path, 0, true, &directory, err) < 0)
        goto done;
    if (schema_print(directory->schema, &schema, &schema_bytes, err) < 0)
        goto done;
    assert_true(schema_bytes < sizeof view->schema);
    memcpy(view->schema, schema, schema_bytes);
    for (uint32_t q = 0; q < QUERIES; q++)
        tasks[q] =
            (struct search_task){.index = directory->segments[0].fields[0],
                                 .query = small->queries + (size_t)q * small->dim,
                                 .params = {.k = K, .rule = {.search_list = LIST, .cells = CELLS}},
                                 .hits = view->hits + (size_t)q * K};
    if (search_engine_run(engine, tasks, QUERIES, err) < 0)
        goto done;
    for (uint32_t q = 0; q < QUERIES; q++) {
        if (tasks[q].error.code) {
            *err = tasks[q].error;
            goto done;
        }
        view->hit_count[q] = tasks[q].hit_count;
    }
    if (directory->segments[0].rows && look_at_records(&directory->segments[0], view, err) < 0)
        goto done;
    rc = 0;
done:
    free(schema);
    index_directory_close(directory);
    return rc;
}

static bool same_view(const struct view *a, const struct view *b)
{
    if (memcmp(a->hit_count, b->hit_count, sizeof a->hit_count) ||
        a->record_bytes != b->record_bytes || strcmp(a->schema, b->schema) ||
        memcmp(a->records, b->records, a->record_bytes))
        return false;
    for (uint32_t i = 0; i < QUERIES * K; i++)
        if (a->hits[i].key != b->hits[i].key || a->hits[i].position != b->hits[i].position ||
            memcmp(&a->hits[i].distance, &b->hits[i].distance, sizeof(float)))
            return false;
    return true;
}

static void write_byte(int fd, uint64_t offset, uint8_t byte)
{
    assert_int_equal(pwrite(fd, &byte, 1, (off_t)offset), 1);
}

static void flip(const struct small_index *small, struct search_engine *engine,
                 const struct view *good, const char *name, int fd, uint64_t offset,
                 struct random *random, struct tally *tally)
{
    uint8_t byte, mask = (uint8_t)(1 + random_below(random, 255));
    struct error check_error = ERROR_INIT, search_error = ERROR_INIT;
    struct index_check found;
    struct view view;

    assert_int_equal(pread(fd, &byte, 1, (off_t)offset), 1);
    write_byte(fd, offset, byte ^ mask);
    if (index_directory_check(vfs_posix(), small->path, NULL, &found, &check_error) == 0)
        fail_msg("seed %u: %s byte %llu ^ %u: the check finds nothing", SEED, name,
                 (unsigned long long)offset, mask);
    if (check_error.code != ERR_CORRUPT && check_error.code != ERR_UNSUPPORTED)
        fail_msg("seed %u: %s byte %llu ^ %u: %s: %s", SEED, name, (unsigned long long)offset, mask,
                 error_code_name(check_error.code), check_error.message);
    if (!strstr(check_error.message, small->path))
        fail_msg("the message does not name the place: %s", check_error.message);
    if (look(small, engine, &view, &search_error) < 0) {
        tally->errors_in_search++;
        if (search_error.code != ERR_CORRUPT && search_error.code != ERR_UNSUPPORTED)
            fail_msg("seed %u: %s byte %llu ^ %u: search: %s: %s", SEED, name,
                     (unsigned long long)offset, mask, error_code_name(search_error.code),
                     search_error.message);
    } else if (!same_view(&view, good)) {
        fail_msg("seed %u: %s byte %llu ^ %u: a search gives another answer", SEED, name,
                 (unsigned long long)offset, mask);
    }
    write_byte(fd, offset, byte);
    tally->flips++;
}

static void flip_everything(const struct small_index *small)
{
    struct error err = ERROR_INIT;
    struct index_directory *directory = NULL;
    struct search_engine *engine;
    struct index_check found;
    struct view good, again;
    struct random random;
    struct tally tally = {0, 0};
    char **names = NULL, path[FILE_PATH_MAX];
    uint32_t count = 0;

    if (index_directory_open(vfs_posix(), small->path, 0, true, &directory, &err) < 0)
        fail_msg("%s", err.message);
    engine = engine_of(directory->segments[0].fields[0]);
    index_directory_close(directory);
    if (look(small, engine, &good, &err) < 0 ||
        index_directory_check(vfs_posix(), small->path, NULL, &found, &err) < 0 ||
        index_directory_files(vfs_posix(), small->path, &names, &count, &err) < 0)
        fail_msg("%s", err.message);
    assert_int_equal(good.hit_count[0], K);
    random_init(&random, SEED, 0);
    for (uint32_t i = 0; i < count; i++) {
        struct vfs_stat st;
        bool manifest = strstr(names[i], "MANIFEST") || strstr(names[i], "manifest") ||
                        strstr(names[i], "schema");

        if (file_path_join(path, small->path, names[i], &err) < 0 ||
            file_stat(vfs_posix(), path, &st, &err) < 0)
            fail_msg("%s", err.message);
        int fd = open(path, O_RDWR | O_CLOEXEC);

        assert_true(fd >= 0);
        for (uint64_t at = 0; at < st.bytes;
             at += manifest || at < WHOLE_BYTES ? 1 : 1 + random_below(&random, 2 * STRIDE - 1))
            flip(small, engine, &good, names[i], fd, at, &random, &tally);
        flip(small, engine, &good, names[i], fd, st.bytes - 1, &random, &tally);
        close(fd);
    }
    print_message("# %u flips, %u of them met by a search of %u queries\n", tally.flips,
                  tally.errors_in_search, QUERIES);
    assert_true(tally.flips >= FLIPS_MIN);
    /* All were undone. */
    if (look(small, engine, &again, &err) < 0 ||
        index_directory_check(vfs_posix(), small->path, NULL, &found, &err) < 0)
        fail_msg("%s", err.message);
    assert_true(same_view(&good, &again));
    file_names_free(names, count);
    search_engine_close(engine);
}

static void test_no_flip_of_an_index_with_integer_keys_goes_unseen(void **state)
{
    struct small_options options = small_options_default(400, 16);
    struct small_index small;
    float calibrate[3 * 16];

    (void)state;
    options.queries = QUERIES;
    for (uint32_t i = 0; i < 3 * 16; i++)
        calibrate[i] = sinf((float)i);
    options.params.calibrate_vectors = calibrate; /* so that there is a calibration to damage */
    options.params.calibrate_count = 3;
    options.params.max_degree = 16;
    options.params.build_list = 30;
    small_index_make(&options, &small);
    flip_everything(&small);
    small_index_remove(&small);
}

static int record_of_row(void *context, uint64_t row, struct record_buffer *out, struct error *err)
{
    char key[32], text[64];
    int key_bytes = snprintf(key, sizeof key, "photo/%llu", (unsigned long long)row);
    int bytes = snprintf(text, sizeof text, "{\"width\":%llu,\"label\":\"l%llu\"}",
                         (unsigned long long)row * 7, (unsigned long long)row % 13);

    return record_from_json(context, text, (size_t)bytes, key, (size_t)key_bytes, out, err);
}

/* As small_index_make, with text keys and records in place of the index it made. */
static void make_with_text_keys(const struct small_options *o, struct small_index *small)
{
    struct error err = ERROR_INIT;
    struct segment_build_rows rows = {.record = record_of_row};
    struct segment_build_result result;
    struct vector_source *source = NULL;
    struct schema *schema = NULL;
    struct pool *pool = NULL;
    char **keys = calloc(o->rows, sizeof *keys);

    small_index_make(o, small);
    for (uint32_t i = 0; i < o->rows; i++)
        assert_true(asprintf(&keys[i], "photo/%u", i) > 0);
    if (file_remove_all(vfs_posix(), small->path, &err) < 0 ||
        file_mkdir(vfs_posix(), small->path, &err) < 0 || pool_new(1, &pool, &err) < 0 ||
        vector_source_open_memory(small->rows, ELEMENT_F32, o->rows, o->dim, "memory", &source,
                                  &err) < 0 ||
        schema_default("photo", FIELD_VARCHAR, 64, "vector", FIELD_FLOAT_VECTOR, o->dim, &schema,
                       &err) < 0)
        fail_msg("%s", err.message);
    rows.schema = schema;
    rows.context = schema;
    rows.text_keys = (const char *const *)keys;
    if (segment_build(vfs_posix(), small->path, source, &rows, &o->params, NULL, pool, NULL,
                      &result, &err) < 0)
        fail_msg("%s", err.message);
    const char *name = result.name;

    if (index_directory_publish(vfs_posix(), small->path, schema, &name, 1, &err) < 0)
        fail_msg("%s", err.message);
    for (uint32_t i = 0; i < o->rows; i++)
        free(keys[i]);
    free(keys);
    schema_free(schema);
    vector_source_close(source);
    pool_free(pool);
}

static void test_no_flip_of_an_index_with_text_keys_and_records_goes_unseen(void **state)
{
    struct small_options options = small_options_default(400, 16);
    struct small_index small;
    float calibrate[3 * 16];

    (void)state;
    options.queries = QUERIES;
    for (uint32_t i = 0; i < 3 * 16; i++)
        calibrate[i] = sinf((float)i);
    options.params.calibrate_vectors = calibrate; /* so that there is a calibration to damage */
    options.params.calibrate_count = 3;
    options.params.max_degree = 16;
    options.params.build_list = 30;
    options.params.metric = METRIC_COSINE;
    options.params.code_bytes = 8;
    make_with_text_keys(&options, &small);
    flip_everything(&small);
    small_index_remove(&small);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_no_flip_of_an_index_with_integer_keys_goes_unseen),
        cmocka_unit_test(test_no_flip_of_an_index_with_text_keys_and_records_goes_unseen),
    };

    return cmocka_run_group_tests_name("flip", tests, NULL, NULL);
}
