/* segment_build: the same bytes for any number of workers, refusals that name their cause, and an
 * empty folder after every failure: bad input, every file call failing in turn, cancellation. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "index/build_plan.h"
#include "index/index_directory.h"
#include "index/search_engine.h"
#include "index/segment_build.h"
#include "storage/base/random.h"
#include "storage/file.h"
#include "tests/support/vfs_fault.h"

#define SEED 20260303u
#define ROWS_MAX 1500u
#define DIM_MAX 24u
#define FILE_BYTES_MAX (8u << 20)
#define SWEEP_POINTS 150u

/* One input and where it is built. */
struct fixture {
    char folder[64];
    struct schema *schema;
    struct pool *pool;
    struct vector_source *source;
    struct segment_build_rows rows;
    struct segment_build_params params;
    struct segment_build_result result;
    void *data;
    enum element_type element;
    uint32_t row_count;
    uint32_t dim;
};

static void source_open(struct fixture *f)
{
    struct error err = ERROR_INIT;

    vector_source_close(f->source);
    f->source = NULL;
    if (vector_source_open_memory(f->data, f->element, f->row_count, f->dim, "input.fvecs",
                                  &f->source, &err) < 0)
        fail_msg("%s", err.message);
}

static void workers_set(struct fixture *f, uint32_t workers)
{
    struct error err = ERROR_INIT;

    pool_free(f->pool);
    f->pool = NULL;
    if (pool_new(workers, &f->pool, &err) < 0)
        fail_msg("%s", err.message);
}

static void fixture_make(struct fixture *f, enum element_type element, enum metric metric,
                         uint32_t row_count, uint32_t dim)
{
    uint64_t values = (uint64_t)row_count * dim;
    const char *tmp = getenv("TMPDIR");
    struct error err = ERROR_INIT;
    struct random random;

    *f = (struct fixture){.element = element,
                          .row_count = row_count,
                          .dim = dim,
                          .params = {.metric = metric,
                                     .code = CODE_PQ,
                                     .code_bytes = dim < 8 ? dim : 8,
                                     .max_degree = 12,
                                     .build_list = 24,
                                     .alpha = 1.2f,
                                     .seed = 1,
                                     .keep_originals = true}};
    snprintf(f->folder, sizeof f->folder, "%.40s/annd-test-XXXXXX", tmp ? tmp : "/var/tmp");
    assert_non_null(mkdtemp(f->folder));
    f->data = malloc(values * sizeof(float));
    assert_non_null(f->data);
    random_init(&random, SEED, 0);
    for (uint64_t i = 0; i < values; i++) {
        if (element == ELEMENT_F32)
            ((float *)f->data)[i] = random_normal(&random);
        else
            ((uint8_t *)f->data)[i] = (uint8_t)random_below(&random, 128);
    }
    if (schema_default("id", FIELD_INT64, 0, "vector", FIELD_FLOAT_VECTOR, dim, &f->schema, &err) <
        0)
        fail_msg("%s", err.message);
    f->rows.schema = f->schema;
    source_open(f);
    workers_set(f, 1);
}

static void fixture_remove(struct fixture *f)
{
    file_remove_all(vfs_posix(), f->folder, NULL);
    vector_source_close(f->source);
    pool_free(f->pool);
    schema_free(f->schema);
    free(f->data);
}

static int record_of_row(void *context, uint64_t row, struct record_buffer *out, struct error *err)
{
    char text[64];
    int bytes = snprintf(text, sizeof text, "{\"width\":%llu,\"label\":\"l%llu\"}",
                         (unsigned long long)row * 7, (unsigned long long)row % 13);

    return record_from_json(context, text, (size_t)bytes, NULL, 0, out, err);
}

static int build(struct fixture *f, struct vfs *vfs, const char *folder, struct job *job,
                 struct error *err)
{
    *err = (struct error)ERROR_INIT;
    return segment_build(vfs, folder, f->source, &f->rows, &f->params, NULL, f->pool, job,
                         &f->result, err);
}

static void assert_folder_is_empty(const char *folder, const char *after)
{
    struct error err = ERROR_INIT;
    char **names;
    uint32_t count;

    if (file_list(vfs_posix(), folder, &names, &count, &err) < 0)
        fail_msg("%s", err.message);
    if (count)
        fail_msg("after %s: %s is left in the folder", after, names[0]);
    file_names_free(names, count);
}

/* The build fails with this code, says each of the words and leaves nothing. */
static void assert_refused(struct fixture *f, enum error_code code, const char *first,
                           const char *second)
{
    struct error err;

    if (build(f, vfs_posix(), f->folder, NULL, &err) == 0)
        fail_msg("built what should be refused: %s", first);
    if (err.code != code || !strstr(err.message, first) || !strstr(err.message, second))
        fail_msg("wanted %s with '%s' and '%s', got %s: %s", error_code_name(code), first, second,
                 error_code_name(err.code), err.message);
    assert_folder_is_empty(f->folder, err.message);
}

static void assert_sound(struct fixture *f)
{
    const char *name = f->result.name;
    struct error err = ERROR_INIT;
    struct index_check found;

    if (index_directory_publish(vfs_posix(), f->folder, f->schema, &name, 1, &err) < 0 ||
        index_directory_check(vfs_posix(), f->folder, NULL, &found, &err) < 0)
        fail_msg("%s", err.message);
    assert_int_equal(found.nodes, f->row_count);
    assert_int_equal(found.unreachable, 0);
}

static void empty_folder(struct fixture *f)
{
    struct error err = ERROR_INIT;

    if (file_remove_all(vfs_posix(), f->folder, &err) < 0 ||
        file_mkdir(vfs_posix(), f->folder, &err) < 0)
        fail_msg("%s", err.message);
}

/* ---- the same bytes ---- */

static void assert_folders_equal(const char *a, const char *b)
{
    struct error err = ERROR_INIT;
    char **names, **others, path_a[FILE_PATH_MAX], path_b[FILE_PATH_MAX];
    uint32_t count = 0, other_count = 0;

    if (file_list(vfs_posix(), a, &names, &count, &err) < 0 ||
        file_list(vfs_posix(), b, &others, &other_count, &err) < 0)
        fail_msg("%s", err.message);
    assert_int_equal(count, other_count);
    assert_true(count >= 4);
    for (uint32_t i = 0; i < count; i++) {
        uint8_t *bytes_a = NULL, *bytes_b = NULL;
        size_t size_a = 0, size_b = 0;

        assert_string_equal(names[i], others[i]);
        if (file_path_join(path_a, a, names[i], &err) < 0 ||
            file_path_join(path_b, b, names[i], &err) < 0 ||
            file_read_whole(vfs_posix(), path_a, FILE_BYTES_MAX, &bytes_a, &size_a, &err) < 0 ||
            file_read_whole(vfs_posix(), path_b, FILE_BYTES_MAX, &bytes_b, &size_b, &err) < 0)
            fail_msg("%s", err.message);
        if (size_a != size_b || memcmp(bytes_a, bytes_b, size_a))
            fail_msg("%s and %s differ", path_a, path_b);
        free(bytes_a);
        free(bytes_b);
    }
    file_names_free(names, count);
    file_names_free(others, other_count);
}

/* queries: of the user's, to calibrate with; 0 with rows to spare calibrates with rows. */
static void same_bytes(enum element_type element, enum metric metric, enum code_kind code,
                       uint32_t row_count, uint32_t dim, uint32_t queries)
{
    static const uint32_t workers[] = {1, 2, 4};
    char folders[3][128], segment[256], first[256];
    char name[64];
    struct error err;
    struct fixture f;

    float *calibrate = malloc((queries + 1ull) * dim * sizeof *calibrate);
    struct random random;

    random_init(&random, SEED, 7);
    for (uint32_t i = 0; i < queries * dim; i++)
        calibrate[i] = random_normal(&random);
    fixture_make(&f, element, metric, row_count, dim);
    f.params.calibrate_vectors = queries ? calibrate : NULL;
    f.params.calibrate_count = queries;
    f.rows.record = record_of_row;
    f.rows.context = f.schema;
    f.params.code = code;
    for (uint32_t i = 0; i < 3; i++) {
        struct error mkdir_err = ERROR_INIT;

        snprintf(folders[i], sizeof folders[i], "%s/workers-%u", f.folder, workers[i]);
        if (file_mkdir(vfs_posix(), folders[i], &mkdir_err) < 0)
            fail_msg("%s", mkdir_err.message);
        workers_set(&f, workers[i]);
        if (build(&f, vfs_posix(), folders[i], NULL, &err) < 0)
            fail_msg("%s", err.message);
        if (i == 0)
            snprintf(name, sizeof name, "%s", f.result.name);
        assert_string_equal(f.result.name, name);
        snprintf(first, sizeof first, "%s/%s", folders[0], name);
        snprintf(segment, sizeof segment, "%s/%s", folders[i], name);
        assert_folders_equal(first, segment);
        snprintf(segment, sizeof segment, "%s/%s/f0.calibration", folders[i], name);
        assert_int_equal(access(segment, F_OK) == 0, queries > 0 || row_count >= 5000);
    }
    fixture_remove(&f);
    free(calibrate);
}

static void test_one_two_and_four_workers_make_the_same_bytes(void **state)
{
    (void)state;
    same_bytes(ELEMENT_F32, METRIC_COSINE, CODE_PQ, ROWS_MAX, DIM_MAX, 0);
    same_bytes(ELEMENT_U8, METRIC_L2, CODE_PQ, ROWS_MAX, DIM_MAX, 0);
    same_bytes(ELEMENT_F32, METRIC_IP, CODE_AUTO, ROWS_MAX, DIM_MAX, 0);
}

static void test_the_calibration_is_the_same_for_any_workers(void **state)
{
    (void)state;
    same_bytes(ELEMENT_F32, METRIC_L2, CODE_PQ, 5300, 8, 0);
    same_bytes(ELEMENT_U8, METRIC_COSINE, CODE_PQ, 5300, 8, 0);
    same_bytes(ELEMENT_F32, METRIC_COSINE, CODE_PQ, ROWS_MAX, DIM_MAX, 40);
}

/* ---- tiers, rows left out, memory to serve from ---- */

static struct segment *must_open(const struct fixture *f, const char *folder)
{
    struct segment *segment = NULL;
    struct error err = ERROR_INIT;
    char path[256];

    snprintf(path, sizeof path, "%s/%s", folder, f->result.name);
    if (segment_open(vfs_posix(), path, &segment, &err) < 0)
        fail_msg("%s", err.message);
    return segment;
}

static uint64_t number_of(const struct segment *segment, const char *name)
{
    struct error err = ERROR_INIT;
    uint64_t value = 0;

    if (manifest_get_u64(segment_manifest(segment), name, &value, &err) < 0)
        fail_msg("%s", err.message);
    return value;
}

static int compare_keys(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;

    return (x > y) - (x < y);
}

static void test_hot_tiers_and_rows_left_out_stand_in_the_manifest(void **state)
{
    struct disk_index *index;
    struct segment *segment;
    struct reader *reader;
    struct fixture f;
    struct error err;

    (void)state;
    fixture_make(&f, ELEMENT_F32, METRIC_L2, 6000, 16);
    workers_set(&f, 2);
    if (build(&f, vfs_posix(), f.folder, NULL, &err) < 0)
        fail_msg("%s", err.message);
    assert_sound(&f);
    segment = must_open(&f, f.folder);
    uint64_t left_out = number_of(segment, "field.0.left_out_rows");
    uint64_t capacity = number_of(segment, "field.0.page_capacity");

    /* One row in fifty, and what makes the rest whole pages. */
    assert_true(left_out >= 120 && left_out < 120 + capacity);
    assert_int_equal((6000 - left_out) % capacity, 0);
    /* Of 5, 10, 20 and 40 % those that are 1,000 rows apart. */
    assert_int_equal(number_of(segment, "field.0.tier.0"), 1200 - 1200 % capacity);
    assert_int_equal(number_of(segment, "field.0.tier.1"), 2400 - 2400 % capacity);
    assert_false(manifest_has(segment_manifest(segment), "field.0.tier.2"));
    /* The last positions are theirs, each row once. */
    uint32_t positions[300];
    int64_t keys[300];

    for (uint32_t i = 0; i < left_out; i++)
        positions[i] = (uint32_t)(6000 - left_out + i);
    if (disk_index_open(segment, 0, 0, &index, &err) < 0 ||
        reader_open(READER_PREAD, 64, &reader, &err) < 0 ||
        disk_index_keys(index, reader, positions, (uint32_t)left_out, keys, &err) < 0)
        fail_msg("%s", err.message);
    qsort(keys, left_out, sizeof *keys, compare_keys);
    for (uint64_t i = 0; i < left_out; i++) {
        assert_in_range(keys[i], i ? keys[i - 1] + 1 : 0, 5999);
    }
    assert_non_null(index->calibration);
    assert_false(index->calibration->own_queries);
    assert_int_equal(index->calibration->query_count, left_out);
    reader_close(reader);
    disk_index_close(index);
    segment_close(segment);

    /* With the user's queries there is no need for any. */
    empty_folder(&f);
    f.params.calibrate_vectors = f.data;
    f.params.calibrate_count = 64;
    if (build(&f, vfs_posix(), f.folder, NULL, &err) < 0)
        fail_msg("%s", err.message);
    segment = must_open(&f, f.folder);
    assert_int_equal(number_of(segment, "field.0.left_out_rows"), 0);
    if (disk_index_open(segment, 0, 0, &index, &err) < 0)
        fail_msg("%s", err.message);
    assert_non_null(index->calibration);
    assert_true(index->calibration->own_queries);
    assert_int_equal(index->calibration->query_count, 64);
    disk_index_close(index);
    segment_close(segment);
    fixture_remove(&f);
}

static void test_too_few_rows_to_spare_are_not_calibrated_with(void **state)
{
    struct disk_index *index;
    struct segment *segment;
    struct fixture f;
    struct error err;

    (void)state;
    fixture_make(&f, ELEMENT_F32, METRIC_L2, 1500, 8);
    if (build(&f, vfs_posix(), f.folder, NULL, &err) < 0)
        fail_msg("%s", err.message);
    segment = must_open(&f, f.folder);
    assert_int_equal(number_of(segment, "field.0.left_out_rows"), 0);
    assert_false(manifest_has(segment_manifest(segment), "field.0.tier.0"));
    assert_null(segment_find(segment, "f0.calibration"));
    if (disk_index_open(segment, 0, 0, &index, &err) < 0)
        fail_msg("%s", err.message);
    assert_null(index->calibration);
    disk_index_close(index);
    segment_close(segment);
    fixture_remove(&f);
}

static void test_memory_to_serve_from_holds_the_tier_made_for_it(void **state)
{
    struct disk_index *index;
    struct segment *segment;
    struct fixture f;
    struct error err;
    uint64_t least;

    (void)state;
    fixture_make(&f, ELEMENT_F32, METRIC_L2, 6000, 16);
    workers_set(&f, 2);
    if (build(&f, vfs_posix(), f.folder, NULL, &err) < 0)
        fail_msg("%s", err.message);
    segment = must_open(&f, f.folder);
    if (disk_index_memory_min(segment, 0, &least, &err) < 0)
        fail_msg("%s", err.message);
    uint64_t page_bytes = number_of(segment, "field.0.page_bytes");
    uint64_t capacity = number_of(segment, "field.0.page_capacity");
    uint64_t pages = (6000 + capacity - 1) / capacity;

    segment_close(segment);
    for (uint32_t percent = 20; percent <= 60; percent += 20) {
        uint64_t wanted = pages * percent / 100;
        bool measured = false;

        empty_folder(&f);
        f.params.serve_memory_bytes = least + wanted * page_bytes + 17;
        if (build(&f, vfs_posix(), f.folder, NULL, &err) < 0)
            fail_msg("%s", err.message);
        segment = must_open(&f, f.folder);
        if (disk_index_open(segment, 0, f.params.serve_memory_bytes, &index, &err) < 0)
            fail_msg("%s", err.message);
        assert_true(index->memory_bytes <= f.params.serve_memory_bytes);
        assert_int_equal(index->resident_page_count, wanted);
        assert_int_equal(number_of(segment, "field.0.tier.0"), wanted * capacity);
        assert_false(manifest_has(segment_manifest(segment), "field.0.tier.1"));
        /* And this share is one that was measured. */
        for (uint32_t c = 0; c < index->calibration->curve_count; c++)
            measured |= fabs((double)index->calibration->curves[c].resident_share -
                             disk_index_resident_share(index)) < 0.005;
        assert_true(measured);
        disk_index_close(index);
        segment_close(segment);
    }
    /* Less than the codes take: no tier fits, and the open says what is missing. */
    empty_folder(&f);
    f.params.serve_memory_bytes = least - 1;
    if (build(&f, vfs_posix(), f.folder, NULL, &err) < 0)
        fail_msg("%s", err.message);
    segment = must_open(&f, f.folder);
    assert_false(manifest_has(segment_manifest(segment), "field.0.tier.0"));
    assert_int_equal(disk_index_open(segment, 0, f.params.serve_memory_bytes, &index, &err), -1);
    assert_int_equal(err.code, ERR_BUDGET);
    segment_close(segment);
    fixture_remove(&f);
}

static void test_seed_and_parameters_are_in_the_name(void **state)
{
    struct fixture f;
    struct error err;
    char name[64];

    (void)state;
    fixture_make(&f, ELEMENT_F32, METRIC_L2, 256, 8);
    assert_int_equal(build(&f, vfs_posix(), f.folder, NULL, &err), 0);
    snprintf(name, sizeof name, "%s", f.result.name);
    f.params.seed = 2;
    assert_int_equal(build(&f, vfs_posix(), f.folder, NULL, &err), 0);
    assert_string_not_equal(name, f.result.name);
    f.params.seed = 1;
    if (build(&f, vfs_posix(), f.folder, NULL, &err) == 0 || err.code != ERR_EXISTS)
        fail_msg("a segment that is there: %s", err.message);
    fixture_remove(&f);
}

/* ---- refused ---- */

static void test_too_few_rows_are_refused(void **state)
{
    struct fixture f;

    (void)state;
    fixture_make(&f, ELEMENT_F32, METRIC_L2, 255, 8);
    assert_refused(&f, ERR_INVALID, "255 rows", "256");
    fixture_remove(&f);
}

static void test_nan_and_infinity_are_refused_by_row_and_dimension(void **state)
{
    static const enum metric metrics[] = {METRIC_L2, METRIC_IP, METRIC_COSINE};
    struct fixture f;

    (void)state;
    for (size_t m = 0; m < 3; m++) {
        fixture_make(&f, ELEMENT_F32, metrics[m], 300, 8);
        ((float *)f.data)[217 * 8 + 5] = NAN;
        assert_refused(&f, ERR_INVALID, "row 217", "dimension 5");
        ((float *)f.data)[217 * 8 + 5] = -INFINITY;
        assert_refused(&f, ERR_INVALID, "row 217", "dimension 5");
        fixture_remove(&f);
    }
}

static void test_a_key_that_stands_twice_is_refused_with_both_rows(void **state)
{
    int64_t keys[300];
    const char *texts[300];
    char storage[300][16];
    struct fixture f;

    (void)state;
    fixture_make(&f, ELEMENT_F32, METRIC_L2, 300, 8);
    for (int64_t i = 0; i < 300; i++) {
        keys[i] = INT64_MAX - i;
        snprintf(storage[i], sizeof storage[i], "photo/%d", (int)i);
        texts[i] = storage[i];
    }
    keys[291] = -77;
    keys[13] = -77;
    f.rows.int64_keys = keys;
    assert_refused(&f, ERR_INVALID, "-77", "rows 13 and 291");
    f.rows.int64_keys = NULL;
    texts[299] = "photo/4";
    f.rows.text_keys = texts;
    assert_refused(&f, ERR_INVALID, "'photo/4'", "rows 4 and 299");
    fixture_remove(&f);
}

static void test_too_little_memory_is_refused_with_the_sum(void **state)
{
    struct segment_build_params params;
    struct error err = ERROR_INIT;
    struct build_plan plan;
    struct row_shape shape;
    struct fixture f;

    (void)state;
    fixture_make(&f, ELEMENT_F32, METRIC_L2, 300, 8);
    params = f.params;
    assert_int_equal(segment_build_params_check(f.source, &params, &err), 0);
    row_shape_init(&shape, METRIC_L2, ELEMENT_F32, 8);
    build_plan_make(&shape, 300, &params, pool_workers(f.pool), &plan);
    f.params.memory_bytes = plan.memory_bytes - 1;
    assert_refused(&f, ERR_BUDGET, plan.phases[plan.greatest].what, "--memory");
    f.params.memory_bytes = 1;
    assert_refused(&f, ERR_BUDGET, "of memory in phase", "--memory");
    f.params.memory_bytes = plan.memory_bytes;
    if (build(&f, vfs_posix(), f.folder, NULL, &err) < 0)
        fail_msg("what the plan asks for is not enough: %s", err.message);
    fixture_remove(&f);
}

static void test_parameters_out_of_range_are_refused(void **state)
{
    struct segment_build_params good;
    struct fixture f;

    (void)state;
    fixture_make(&f, ELEMENT_F32, METRIC_L2, 300, 8);
    good = f.params;
    f.params.code_bytes = 10; /* 9 are a byte a dimension and the distortion's */
    assert_refused(&f, ERR_INVALID, "--code-bytes 10", "dimension 8");
    f.params = good;
    f.params.max_degree = 3;
    assert_refused(&f, ERR_INVALID, "--max-degree 3", "4..");
    f.params.max_degree = 257;
    assert_refused(&f, ERR_INVALID, "--max-degree 257", "256");
    f.params = good;
    f.params.build_list = 5;
    assert_refused(&f, ERR_INVALID, "--build-list 5", "6");
    f.params.build_list = 4097;
    assert_refused(&f, ERR_INVALID, "--build-list 4097", "4096");
    f.params = good;
    f.params.alpha = 0.5f;
    assert_refused(&f, ERR_INVALID, "alpha", "0.5");
    f.params.alpha = NAN;
    assert_refused(&f, ERR_INVALID, "alpha", "nan");
    f.params = good;
    f.params.store = STORE_U8; /* would cut floats down to whole numbers */
    assert_refused(&f, ERR_INVALID, "--store u8", "f32");
    f.params.store = 77;
    assert_refused(&f, ERR_INVALID, "--store", "f32");
    fixture_remove(&f);

    fixture_make(&f, ELEMENT_U8, METRIC_L2, 300, 8);
    f.params.store = STORE_F16;
    assert_refused(&f, ERR_INVALID, "--store f16", "u8");
    f.params.store = STORE_I8;
    assert_refused(&f, ERR_INVALID, "--store i8", "u8");
    fixture_remove(&f);
}

static int record_that_fails(void *context, uint64_t row, struct record_buffer *out,
                             struct error *err)
{
    if (row == 123)
        return error_set(err, ERR_INVALID, "attributes.jsonl line 124 is no object");
    return record_of_row(context, row, out, err);
}

static void test_a_record_that_fails_ends_the_build(void **state)
{
    struct fixture f;

    (void)state;
    fixture_make(&f, ELEMENT_F32, METRIC_L2, 300, 8);
    f.rows.record = record_that_fails;
    f.rows.context = f.schema;
    assert_refused(&f, ERR_INVALID, "line 124", "object");
    fixture_remove(&f);
}

/* ---- failing files ---- */

/* Builds under the plan. The folder must be empty after an error and hold a sound segment after
 * success; `deaf` says that the plan lets a call claim what it has not done, which then must be
 * found by the check, or have done no harm: the segment is byte for byte the one at `deaf`. */
static void build_under(struct fixture *f, struct vfs_fault *fault,
                        const struct vfs_fault_plan *plan, const char *deaf)
{
    char what[128];
    struct error err;

    empty_folder(f);
    snprintf(what, sizeof what, "call %llu of kind %d with effect %d",
             (unsigned long long)plan->nth, (int)plan->call, (int)plan->effect);
    vfs_fault_plan(fault, plan);
    int rc = build(f, &fault->vfs, f->folder, NULL, &err);

    assert_int_equal(vfs_fault_files_open(fault), 0);
    if (rc < 0) {
        if (err.code == ERR_NONE || err.code == ERR_INTERNAL || !err.message[0])
            fail_msg("%s: %s: %s", what, error_code_name(err.code), err.message);
        assert_folder_is_empty(f->folder, what);
    } else if (!deaf) {
        assert_sound(f);
    } else {
        const char *name = f->result.name;
        struct index_check found;

        if (index_directory_publish(vfs_posix(), f->folder, f->schema, &name, 1, &err) < 0)
            return;
        if (index_directory_check(vfs_posix(), f->folder, NULL, &found, &err) == 0) {
            char path[FILE_PATH_MAX];

            assert_int_equal(file_path_join(path, f->folder, name, &err), 0);
            assert_folders_equal(deaf, path);
            return;
        }
        assert_int_equal(err.code, ERR_CORRUPT);
    }
}

static void fixture_make_for_faults(struct fixture *f)
{
    fixture_make(f, ELEMENT_F32, METRIC_COSINE, 260, 4);
    f->params.max_degree = 6;
    f->params.build_list = 8;
    f->rows.record = record_of_row;
    f->rows.context = f->schema;
    f->params.calibrate_vectors = f->data;
    f->params.calibrate_count = 4;
}

static void test_any_call_that_fails_leaves_nothing_or_a_sound_segment(void **state)
{
    static const int errors[] = {EIO, ENOSPC};
    struct vfs_fault fault;
    struct error err;
    struct fixture f;
    uint64_t calls, points;
    uint32_t failed = 0;

    (void)state;
    fixture_make_for_faults(&f);
    vfs_fault_init(&fault, vfs_posix());
    vfs_fault_plan(&fault, NULL);
    assert_int_equal(build(&f, &fault.vfs, f.folder, NULL, &err), 0);
    calls = vfs_fault_calls(&fault, VFS_CALL_ANY);
    assert_true(calls > 20);
    points = calls < SWEEP_POINTS ? calls : SWEEP_POINTS;
    for (uint64_t i = 0; i < points; i++)
        for (size_t e = 0; e < sizeof errors / sizeof *errors; e++) {
            const struct vfs_fault_plan plan = {.nth = 1 + i * calls / points,
                                                .effect = VFS_EFFECT_ERRNO,
                                                .errno_value = errors[e]};

            build_under(&f, &fault, &plan, NULL);
            failed += vfs_fault_fired(&fault) > 0;
        }
    print_message("# %llu calls, %u builds with one that failed\n", (unsigned long long)calls,
                  failed);
    assert_true(failed >= points);
    vfs_fault_release(&fault);
    fixture_remove(&f);
}

static void test_short_writes_are_taken_up_where_they_ended(void **state)
{
    struct vfs_fault fault;
    struct error err;
    struct fixture f;
    uint64_t writes;

    (void)state;
    fixture_make_for_faults(&f);
    vfs_fault_init(&fault, vfs_posix());
    vfs_fault_plan(&fault, NULL);
    assert_int_equal(build(&f, &fault.vfs, f.folder, NULL, &err), 0);
    writes = vfs_fault_calls(&fault, VFS_CALL_WRITE);
    for (uint64_t nth = 1; nth <= writes; nth++) {
        const struct vfs_fault_plan plan = {
            .call = VFS_CALL_WRITE, .nth = nth, .effect = VFS_EFFECT_SHORT};

        build_under(&f, &fault, &plan, NULL);
    }
    vfs_fault_release(&fault);
    fixture_remove(&f);
}

static void test_a_disk_that_lies_about_a_write_is_found_out(void **state)
{
    static const enum vfs_effect effects[] = {VFS_EFFECT_FLIP, VFS_EFFECT_FORGET};
    char whole[FILE_PATH_MAX], reference[FILE_PATH_MAX];
    struct vfs_fault fault;
    struct error err;
    struct fixture f;
    uint64_t writes;

    (void)state;
    fixture_make_for_faults(&f);
    vfs_fault_init(&fault, vfs_posix());
    vfs_fault_plan(&fault, NULL);
    assert_int_equal(build(&f, &fault.vfs, f.folder, NULL, &err), 0);
    snprintf(whole, sizeof whole, "%.2000s/%.60s", f.folder, f.result.name);
    snprintf(reference, sizeof reference, "%.2000s-reference", f.folder);
    assert_int_equal(file_rename(vfs_posix(), whole, reference, &err), 0);
    writes = vfs_fault_calls(&fault, VFS_CALL_WRITE);
    for (uint64_t nth = 1; nth <= writes; nth++)
        for (size_t e = 0; e < sizeof effects / sizeof *effects; e++) {
            const struct vfs_fault_plan plan = {
                .call = VFS_CALL_WRITE, .nth = nth, .effect = effects[e], .bit = 12345 + nth * 77};

            build_under(&f, &fault, &plan, reference);
        }
    file_remove_all(vfs_posix(), reference, NULL);
    vfs_fault_release(&fault);
    fixture_remove(&f);
}

/* ---- cancelled ---- */

struct canceller {
    struct job *job;
    uint32_t at; /* cancel at this report */
    uint32_t reports;
};

static void cancel_on_report(void *context, const struct job_progress *progress)
{
    struct canceller *c = context;

    (void)progress;
    if (++c->reports == c->at)
        job_cancel(c->job);
}

static void test_a_cancelled_build_leaves_nothing(void **state)
{
    uint32_t cancelled = 0, at;
    struct fixture f;

    (void)state;
    fixture_make(&f, ELEMENT_F32, METRIC_L2, 600, 8);
    f.rows.record = record_of_row;
    f.rows.context = f.schema;
    f.params.calibrate_vectors = f.data;
    f.params.calibrate_count = 4;
    for (at = 1; at < 1000; at++) {
        struct canceller c = {.at = at};
        struct error err;

        c.job = job_new(cancel_on_report, &c);
        assert_non_null(c.job);
        int rc = build(&f, vfs_posix(), f.folder, c.job, &err);

        job_free(c.job);
        if (rc == 0) {
            /* Too late to be heard: what is there must be whole. */
            assert_sound(&f);
            empty_folder(&f);
            if (c.reports < at)
                break;
            continue;
        }
        assert_int_equal(err.code, ERR_CANCELLED);
        assert_folder_is_empty(f.folder, err.message);
        cancelled++;
    }
    assert_true(at < 1000);
    assert_true(cancelled >= 5);
    fixture_remove(&f);
}

/* ---- strange data ---- */

static void search_all(struct fixture *f, uint32_t k, struct search_hit *hits)
{
    struct index_directory *directory;
    struct search_engine *engine;
    struct error err = ERROR_INIT;
    float query[DIM_MAX];

    for (uint32_t d = 0; d < f->dim; d++)
        query[d] = 0.25f * (float)d - 0.5f;
    if (index_directory_open(vfs_posix(), f->folder, 0, false, &directory, &err) < 0)
        fail_msg("%s", err.message);
    const struct disk_index *index = directory->segments[0].fields[0];
    struct search_engine_options options = {
        .threads = 1,
        .slots_per_thread = 1,
        .limits = {.search_list_max = 64, .cells_max = 8, .k_max = k, .beam_width = 4},
        .backend = READER_PREAD};
    struct search_task task = {.index = index,
                               .query = query,
                               .params = {.k = k, .rule = {.search_list = 64, .cells = 8}},
                               .hits = hits};

    disk_search_limits_raise(&options.limits, index);
    if (search_engine_open(&options, &engine, &err) < 0 ||
        search_engine_run(engine, &task, 1, &err) < 0)
        fail_msg("%s", err.message);
    if (task.error.code)
        fail_msg("%s", task.error.message);
    assert_int_equal(task.hit_count, k);
    for (uint32_t i = 0; i < k; i++)
        for (uint32_t j = 0; j < i; j++)
            assert_int_not_equal(hits[i].key, hits[j].key);
    search_engine_close(engine);
    index_directory_close(directory);
}

static void test_rows_that_are_all_equal_build_and_are_found(void **state)
{
    static const enum metric metrics[] = {METRIC_L2, METRIC_IP, METRIC_COSINE};
    static const enum element_type elements[] = {ELEMENT_F32, ELEMENT_U8};

    (void)state;
    for (size_t m = 0; m < 3; m++)
        for (size_t e = 0; e < 2; e++) {
            struct search_hit hits[10];
            struct error err;
            struct fixture f;

            fixture_make(&f, elements[e], metrics[m], 1000, 8);
            for (uint64_t i = 8; i < 8000; i++) {
                if (elements[e] == ELEMENT_F32)
                    ((float *)f.data)[i] = ((float *)f.data)[i % 8];
                else
                    ((uint8_t *)f.data)[i] = ((uint8_t *)f.data)[i % 8];
            }
            if (build(&f, vfs_posix(), f.folder, NULL, &err) < 0)
                fail_msg("%s", err.message);
            assert_sound(&f);
            search_all(&f, 10, hits);
            for (uint32_t i = 1; i < 10; i++)
                assert_memory_equal(&hits[i].distance, &hits[0].distance, sizeof(float));
            fixture_remove(&f);
        }
}

static void test_zero_vectors_are_counted(void **state)
{
    static const enum metric metrics[] = {METRIC_L2, METRIC_IP, METRIC_COSINE};
    static const enum element_type elements[] = {ELEMENT_F32, ELEMENT_U8};

    (void)state;
    for (size_t m = 0; m < 3; m++)
        for (size_t e = 0; e < 2; e++) {
            struct search_hit hits[10];
            struct error err;
            struct fixture f;

            fixture_make(&f, elements[e], metrics[m], 400, 8);
            for (uint32_t row = 0; row < 400; row += 100) {
                if (elements[e] == ELEMENT_F32)
                    for (uint32_t d = 0; d < 8; d++) /* a negative zero is one too */
                        ((float *)f.data)[row * 8 + d] = d % 2 ? -0.0f : 0.0f;
                else
                    memset((uint8_t *)f.data + row * 8, 0, 8);
            }
            if (build(&f, vfs_posix(), f.folder, NULL, &err) < 0)
                fail_msg("%s", err.message);
            assert_int_equal(f.result.zero_vectors, 4);
            assert_int_equal(f.result.row_count, 400);
            assert_true(f.result.edges_kept <= f.result.edges_given);
            assert_sound(&f);
            search_all(&f, 10, hits);
            fixture_remove(&f);
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_one_two_and_four_workers_make_the_same_bytes),
        cmocka_unit_test(test_the_calibration_is_the_same_for_any_workers),
        cmocka_unit_test(test_hot_tiers_and_rows_left_out_stand_in_the_manifest),
        cmocka_unit_test(test_too_few_rows_to_spare_are_not_calibrated_with),
        cmocka_unit_test(test_memory_to_serve_from_holds_the_tier_made_for_it),
        cmocka_unit_test(test_seed_and_parameters_are_in_the_name),
        cmocka_unit_test(test_too_few_rows_are_refused),
        cmocka_unit_test(test_nan_and_infinity_are_refused_by_row_and_dimension),
        cmocka_unit_test(test_a_key_that_stands_twice_is_refused_with_both_rows),
        cmocka_unit_test(test_too_little_memory_is_refused_with_the_sum),
        cmocka_unit_test(test_parameters_out_of_range_are_refused),
        cmocka_unit_test(test_a_record_that_fails_ends_the_build),
        cmocka_unit_test(test_any_call_that_fails_leaves_nothing_or_a_sound_segment),
        cmocka_unit_test(test_short_writes_are_taken_up_where_they_ended),
        cmocka_unit_test(test_a_disk_that_lies_about_a_write_is_found_out),
        cmocka_unit_test(test_a_cancelled_build_leaves_nothing),
        cmocka_unit_test(test_rows_that_are_all_equal_build_and_are_found),
        cmocka_unit_test(test_zero_vectors_are_counted),
    };

    return cmocka_run_group_tests_name("segment_build", tests, NULL, NULL);
}
