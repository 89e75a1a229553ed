/* Checks index/partition.c, index/leaf_finder.c and index/row_store.c: every row stands once, in
 * the leaf it is nearest to, the files are the same whatever the threads, the memory and the
 * interruptions, and what a disk lost or damaged is found before it is believed.
 *
 * partition.c is included, with a commit whenever it looks at the clock, two buckets at a time and
 * small ones, so that a few thousand rows go all of the ways that hundreds of millions go. Syncs
 * are left out: nothing here cuts the power, and they would take most of the time. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#define ROUND_BLOCKS 4u
#define BUCKETS_MAX 2u
#define SPARE_MAX spare_max
static unsigned long spare_max = -1ul; /* of memory for buckets */
#include "index/partition.c"

#include <errno.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "index/block_products.h"
#include "index/store.h"
#include "tests/support/vfs_fault.h"

#define SEED 20261121u
#define CENTRES 50u

static char base[200], folder[256], scratch[300];
static struct vfs files; /* the real ones, that wait for no disk */

static int no_sync(struct vfs_file *file, bool data_only)
{
    (void)file;
    (void)data_only;
    return 0;
}

static int no_dirsync(struct vfs *vfs, const char *path)
{
    (void)vfs;
    (void)path;
    return 0;
}

/* File systems write a file out at once that takes another's name. */
static int rename_free(struct vfs *vfs, const char *from, const char *to)
{
    vfs->unlink(vfs, to);
    return vfs_posix()->rename(vfs, from, to);
}

static int make_folder(void **state)
{
    const char *root = getenv("TMPDIR");

    (void)state;
    files = *vfs_posix();
    files.sync = no_sync;
    files.dirsync = no_dirsync;
    files.rename = rename_free;
    snprintf(base, sizeof base, "%s/annd-partition-XXXXXX", root ? root : "/var/tmp");
    if (!mkdtemp(base))
        return -1;
    snprintf(folder, sizeof folder, "%s/job", base);
    snprintf(scratch, sizeof scratch, "%s/scratch", folder);
    return 0;
}

static int remove_folder(void **state)
{
    (void)state;
    return file_remove_all(&files, base, NULL);
}

/* Around tests that want many small buckets. */
static int spare_least(void **state)
{
    (void)state;
    spare_max = SPARE_MIN;
    return 0;
}

static int spare_all(void **state)
{
    (void)state;
    spare_max = UINT64_MAX;
    return 0;
}

/* ---- inputs ---- */

struct input {
    enum metric metric;
    enum element_type type;
    uint32_t rows, dim;
    uint8_t *data; /* packed */
    struct vector_source *source;
    struct row_shape shape;
};

/* Rows around a few centres; norms differ, so that cosine and inner product differ from L2. */
static void input_init(struct input *in, enum metric metric, enum element_type type, uint32_t rows,
                       uint32_t dim)
{
    uint64_t raw = element_bytes(type, dim);
    float *centres = malloc(CENTRES * dim * sizeof *centres);
    struct random random;

    *in = (struct input){.metric = metric, .type = type, .rows = rows, .dim = dim};
    in->data = malloc(rows * raw);
    assert_true(centres && in->data);
    random_init(&random, SEED, dim);
    for (uint32_t i = 0; i < CENTRES * dim; i++)
        centres[i] = 45 * random_normal(&random);
    for (uint32_t i = 0; i < rows; i++) {
        const float *centre = centres + random_below(&random, CENTRES) * dim;
        float size = 0.5f + 0.5f * random_float(&random);

        for (uint32_t d = 0; d < dim; d++) {
            float value = size * (centre[d] + 12 * random_normal(&random));
            float whole = fminf(fmaxf(roundf(value), -127), 127);

            if (type == ELEMENT_F32)
                store_f32(in->data + i * raw + 4ull * d, value);
            else
                in->data[i * raw + d] = (uint8_t)((int)whole + (type == ELEMENT_U8 ? 128 : 0));
        }
    }
    free(centres);
    assert_int_equal(
        vector_source_open_memory(in->data, type, rows, dim, "input", &in->source, NULL), 0);
    row_shape_init(&in->shape, metric, type, dim);
}

static void input_release(struct input *in)
{
    vector_source_close(in->source);
    free(in->data);
}

static struct pool *new_pool(uint32_t workers)
{
    struct pool *pool = NULL;

    assert_int_equal(pool_new(workers, &pool, NULL), 0);
    return pool;
}

static struct journal *new_journal(void)
{
    struct manifest *asked = manifest_new(MANIFEST_JOB);
    struct journal *journal = NULL;

    assert_non_null(asked);
    assert_int_equal(file_remove_all(&files, folder, NULL), 0);
    assert_int_equal(journal_create(&files, folder, asked, &journal, NULL), 0);
    manifest_free(asked);
    return journal;
}

/* One call of partition_make() in the journal that is there. */
static int make_on(struct vfs *vfs, const struct input *in, uint64_t memory, uint32_t workers,
                   struct error *err)
{
    struct pool *pool = new_pool(workers);
    struct journal *journal = NULL;
    int rc = journal_open(vfs, folder, &journal, err);

    if (rc == 0)
        rc = partition_make(vfs, in->source, &in->shape, SEED, memory, journal, pool, NULL, err);
    journal_close(journal);
    pool_free(pool);
    return rc;
}

/* The whole, from nothing. */
static void make(const struct input *in, uint64_t memory, uint32_t workers)
{
    struct error err = ERROR_INIT;

    journal_close(new_journal());
    if (make_on(&files, in, memory, workers, &err) < 0)
        fail_msg("%s", err.message);
}

static uint64_t least(const struct input *in, uint32_t workers)
{
    return partition_memory_min(&in->shape, in->rows, workers);
}

static uint64_t full(const struct input *in, uint32_t workers)
{
    return partition_memory_full(&in->shape, in->rows, workers);
}

static void inspect(struct input *in, uint32_t workers, struct partition_facts *facts)
{
    struct pool *pool = new_pool(workers);
    struct error err = ERROR_INIT;

    if (partition_inspect(in->source, &in->shape, pool, NULL, facts, &err) < 0)
        fail_msg("%s", err.message);
    in->shape.norm_max = facts->norm_max;
    pool_free(pool);
}

/* ---- outputs ---- */

static const char *const names[] = {"leaves", "numbers", "rows"};

struct outputs {
    uint8_t *data[3];
    size_t bytes[3];
};

static void read_outputs(struct outputs *out)
{
    char path[FILE_PATH_MAX];
    char **found = NULL;
    uint32_t count = 0;

    for (int i = 0; i < 3; i++) {
        assert_int_equal(file_path_join(path, scratch, names[i], NULL), 0);
        assert_int_equal(
            file_read_whole(&files, path, 1u << 30, &out->data[i], &out->bytes[i], NULL), 0);
    }
    assert_int_equal(file_list(&files, scratch, &found, &count, NULL), 0);
    for (uint32_t i = 0; i < count; i++)
        if (strcmp(found[i], names[i % 3]) != 0)
            fail_msg("%s is left", found[i]);
    assert_int_equal(count, 3);
    file_names_free(found, count);
}

static void free_outputs(struct outputs *out)
{
    for (int i = 0; i < 3; i++)
        free(out->data[i]);
}

static void check_same_outputs(const struct outputs *want)
{
    struct outputs got;

    read_outputs(&got);
    for (int i = 0; i < 3; i++) {
        if (got.bytes[i] != want->bytes[i] || memcmp(got.data[i], want->data[i], got.bytes[i]) != 0)
            fail_msg("%s differs", names[i]);
    }
    free_outputs(&got);
}

static double square_distance(const struct row_shape *shape, const uint8_t *row,
                              const float *centroid)
{
    double sum = 0;

    for (uint32_t d = 0; d < shape->space_dim; d++) {
        bool whole = shape->space_type != ELEMENT_F32;
        double a = shape->space_type == ELEMENT_F32  ? load_f32(row + 4ull * d)
                   : shape->space_type == ELEMENT_U8 ? row[d]
                                                     : (int8_t)row[d];
        double b = whole ? (double)rintf(centroid[d]) : (double)centroid[d];

        sum += (a - b) * (a - b);
    }
    return sum;
}

/* The store holds the input, each row once, in leaves, within them by row number. Returns the share
 * of rows (of every 29th) that stand in the leaf nearest to them. */
static double check_store(const struct input *in)
{
    uint64_t raw = in->shape.raw_bytes, stride = in->shape.stride;
    struct error err = ERROR_INIT;
    struct row_store *store = NULL;
    struct outputs out;
    uint8_t *seen = calloc(in->rows, 1), *rows = malloc(in->rows * raw);
    uint8_t *space = file_buffer_alloc(in->rows * stride), *want = file_buffer_alloc(stride);
    uint32_t right = 0, looked_at = 0;

    read_outputs(&out);
    assert_true(seen && rows && space && want);
    assert_int_equal(out.bytes[1], in->rows * 4ull + 4);
    if (row_store_open(&files, scratch, &in->shape, in->rows, &store, &err) < 0)
        fail_msg("%s", err.message);
    assert_int_equal(store->leaf_count, (in->rows + 127) / 128);
    assert_int_equal(store->group_count, (store->leaf_count + 63) / 64);
    assert_int_equal(row_store_read_raw(store, 0, in->rows, rows, &err), 0);
    assert_int_equal(row_store_read(store, 0, in->rows, space, &err), 0);
    for (uint32_t leaf = 0; leaf < store->leaf_count; leaf++) {
        for (uint32_t at = store->leaf_begins[leaf]; at < store->leaf_begins[leaf + 1]; at++) {
            uint32_t row = load_u32(out.data[1] + 4ull * at);
            double own;
            bool nearest = true;

            assert_true(row < in->rows && !seen[row]);
            seen[row] = 1;
            assert_true(at == store->leaf_begins[leaf] ||
                        row > load_u32(out.data[1] + 4ull * (at - 1)));
            assert_memory_equal(rows + at * raw, in->data + row * raw, raw);
            row_shape_convert(&in->shape, in->data + row * raw, 1, want);
            assert_memory_equal(space + at * stride, want, stride);
            if (row % 29 != 0)
                continue;
            own = square_distance(&in->shape, want,
                                  store->centroids + (uint64_t)leaf * in->shape.space_dim);
            for (uint32_t i = 0; i < store->leaf_count && nearest; i++)
                nearest = square_distance(&in->shape, want,
                                          store->centroids + (uint64_t)i * in->shape.space_dim) >=
                          own * (1 - 1e-5);
            right += nearest;
            looked_at++;
        }
    }
    row_store_close(store);
    free_outputs(&out);
    free(seen);
    free(rows);
    free(space);
    free(want);
    return (double)right / looked_at;
}

static void test_every_row_stands_once_in_the_leaf_nearest_to_it(void **state)
{
    static const struct {
        enum metric metric;
        enum element_type type;
        uint32_t rows, dim;
    } cases[] = {
        {METRIC_L2, ELEMENT_U8, 9000, 24},     {METRIC_L2, ELEMENT_I8, 5000, 65},
        {METRIC_L2, ELEMENT_F32, 5000, 20},    {METRIC_COSINE, ELEMENT_F32, 4000, 33},
        {METRIC_COSINE, ELEMENT_I8, 4000, 16}, {METRIC_IP, ELEMENT_F32, 4000, 15},
        {METRIC_IP, ELEMENT_U8, 3000, 16},     {METRIC_L2, ELEMENT_U8, 1, 1},
        {METRIC_L2, ELEMENT_F32, 17, 3},       {METRIC_IP, ELEMENT_I8, 129, 2},
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct partition_facts facts;
        struct input in;

        input_init(&in, cases[i].metric, cases[i].type, cases[i].rows, cases[i].dim);
        inspect(&in, 2, &facts);
        make(&in, full(&in, 2), 2);
        assert_true(check_store(&in) == 1); /* as many groups as are looked at */
        input_release(&in);
    }
}

static void test_with_many_leaves_nearly_all_rows_stand_in_the_nearest(void **state)
{
    struct input in;

    (void)state;
    input_init(&in, METRIC_L2, ELEMENT_U8, 200000, 12);
    make(&in, full(&in, 4), 4);
    assert_true(check_store(&in) > 0.97);
    input_release(&in);
}

static void test_threads_and_memory_change_no_byte(void **state)
{
    static const enum element_type types[] = {ELEMENT_U8, ELEMENT_F32};

    (void)state;
    for (int i = 0; i < 2; i++) {
        struct outputs want;
        struct input in;

        input_init(&in, i ? METRIC_COSINE : METRIC_L2, types[i], i ? 6000 : 20000, i ? 260 : 300);
        make(&in, full(&in, 1), 1);
        assert_true(check_store(&in) > 0.97);
        read_outputs(&want);
        make(&in, full(&in, 3), 3);
        check_same_outputs(&want);
        spare_max = SPARE_MIN; /* in two passes at least */
        make(&in, least(&in, 1), 1);
        check_same_outputs(&want);
        spare_max = SPARE_MIN + 777777;
        make(&in, least(&in, 3), 3);
        check_same_outputs(&want);
        spare_max = UINT64_MAX;
        free_outputs(&want);
        input_release(&in);
    }
}

static void test_too_little_memory_is_refused(void **state)
{
    struct error err = ERROR_INIT;
    struct input in;

    (void)state;
    input_init(&in, METRIC_L2, ELEMENT_U8, 500, 4);
    journal_close(new_journal());
    assert_int_equal(make_on(&files, &in, least(&in, 1) - 1, 1, &err), -1);
    assert_int_equal(err.code, ERR_BUDGET);
    input_release(&in);
}

static void test_a_cancelled_job_goes_on_where_it_was(void **state)
{
    struct journal *journal = NULL;
    struct error err = ERROR_INIT;
    struct job *job = job_new(NULL, NULL);
    struct outputs want;
    struct input in;

    (void)state;
    assert_non_null(job);
    input_init(&in, METRIC_L2, ELEMENT_U8, 3000, 16);
    make(&in, full(&in, 1), 1);
    read_outputs(&want);
    journal = new_journal();
    job_cancel(job);
    assert_int_equal(
        partition_make(&files, in.source, &in.shape, SEED, full(&in, 1), journal, NULL, job, &err),
        -1);
    assert_int_equal(err.code, ERR_CANCELLED);
    journal_close(journal);
    error_clear(&err);
    assert_int_equal(make_on(&files, &in, full(&in, 1), 1, &err), 0);
    check_same_outputs(&want);
    assert_int_equal(make_on(&files, &in, full(&in, 1), 1, &err), 0); /* all is done */
    check_same_outputs(&want);
    job_free(job);
    free_outputs(&want);
    input_release(&in);
}

/* ---- interruptions ---- */

static void test_whatever_call_fails_the_next_attempt_gives_the_same_bytes(void **state)
{
    struct vfs_fault fault;
    struct outputs want;
    struct input in;
    uint64_t calls, step;

    (void)state;
    input_init(&in, METRIC_L2, ELEMENT_U8, 10000, 300);
    make(&in, least(&in, 1), 1);
    read_outputs(&want);
    vfs_fault_init(&fault, &files);
    journal_close(new_journal());
    vfs_fault_plan(&fault, NULL);
    assert_int_equal(make_on(&fault.vfs, &in, least(&in, 1), 1, NULL), 0);
    calls = vfs_fault_calls(&fault, VFS_CALL_ANY);
    step = calls / 40;
    for (uint64_t nth = 1, i = 0; nth <= calls; nth += step + i % 3, i++) {
        struct error err = ERROR_INIT;
        struct vfs_fault_plan plan = {.nth = nth, .for_ever = true, .errno_value = EIO};

        journal_close(new_journal());
        vfs_fault_plan(&fault, &plan);
        assert_int_equal(make_on(&fault.vfs, &in, least(&in, 1), 1, &err), -1);
        assert_true(err.message[0] != 0);
        /* A second one, a while after where the first stopped. */
        error_clear(&err);
        plan.nth = 1 + calls / 7;
        vfs_fault_plan(&fault, &plan);
        spare_max = SPARE_MIN + (i % 4) * 200000;
        make_on(&fault.vfs, &in, least(&in, 1), 1, &err);
        vfs_fault_plan(&fault, NULL);
        error_clear(&err);
        spare_max = i % 3 ? SPARE_MIN : UINT64_MAX;
        if (make_on(&fault.vfs, &in, full(&in, 2), 2, &err) < 0)
            fail_msg("after call %lu failed: %s", (unsigned long)nth, err.message);
        spare_max = SPARE_MIN;
        check_same_outputs(&want);
    }
    assert_int_equal(vfs_fault_files_open(&fault), 0);
    vfs_fault_release(&fault);
    free_outputs(&want);
    input_release(&in);
}

static void test_killed_at_any_time_it_goes_on_to_the_same_bytes(void **state)
{
    struct outputs want;
    struct input in;
    struct random random;
    uint32_t killed = 0, finished = 0;

    (void)state;
    random_init(&random, SEED, 99);
    input_init(&in, METRIC_L2, ELEMENT_U8, 12000, 300);
    make(&in, least(&in, 1), 1);
    read_outputs(&want);
    journal_close(new_journal());
    while (finished < 3) {
        pid_t child = fork();
        int status;

        assert_true(child >= 0);
        if (child == 0) {
            struct error err = ERROR_INIT;

            files.rename = vfs_posix()->rename; /* there is no moment without a state */
            _exit(make_on(&files, &in, least(&in, 1), 1, &err) < 0);
        }
        /* Longer with every attempt, so that it comes to an end on any machine. */
        usleep((useconds_t)random_below(&random, 50000 + 20000 * killed));
        kill(child, SIGKILL);
        assert_int_equal(waitpid(child, &status, 0), child);
        if (WIFSIGNALED(status)) {
            killed++;
            continue;
        }
        assert_int_equal(WEXITSTATUS(status), 0);
        check_same_outputs(&want);
        journal_close(new_journal());
        finished++;
    }
    assert_true(killed > 0);
    free_outputs(&want);
    input_release(&in);
}

/* ---- damage ---- */

static enum error_code open_code(const struct input *in)
{
    struct row_store *store = NULL;
    struct error err = ERROR_INIT;

    row_store_open(&files, scratch, &in->shape, in->rows, &store, &err);
    row_store_close(store);
    return err.code;
}

static void test_a_store_that_does_not_fit_is_refused(void **state)
{
    char path[FILE_PATH_MAX];
    struct outputs out;
    struct input in;

    (void)state;
    input_init(&in, METRIC_L2, ELEMENT_U8, 700, 5);
    make(&in, full(&in, 1), 1);
    read_outputs(&out);
    assert_int_equal(open_code(&in), ERR_NONE);
    assert_int_equal(file_path_join(path, scratch, "leaves", NULL), 0);
    for (size_t i = 0; i < out.bytes[0]; i++) {
        out.data[0][i] ^= 0x10;
        assert_int_equal(file_publish(&files, path, out.data[0], out.bytes[0], NULL), 0);
        assert_int_equal(open_code(&in), ERR_CORRUPT);
        out.data[0][i] ^= 0x10;
    }
    assert_int_equal(file_publish(&files, path, out.data[0], out.bytes[0] - 1, NULL), 0);
    assert_int_equal(open_code(&in), ERR_CORRUPT);
    assert_int_equal(file_publish(&files, path, out.data[0], out.bytes[0], NULL), 0);
    in.shape.norm_max = 1;
    assert_int_equal(open_code(&in), ERR_CORRUPT);
    in.shape.norm_max = 0;
    in.rows--;
    assert_int_equal(open_code(&in), ERR_CORRUPT);
    in.rows++;
    assert_int_equal(file_path_join(path, scratch, "rows", NULL), 0);
    assert_int_equal(file_publish(&files, path, out.data[2], out.bytes[2] - 1, NULL), 0);
    assert_int_equal(open_code(&in), ERR_CORRUPT);
    assert_int_equal(file_remove_all(&files, path, NULL), 0);
    assert_int_equal(open_code(&in), ERR_CORRUPT);
    free_outputs(&out);
    input_release(&in);
}

/* 0 when all that is read back is what `want` has; else the error of a reader. Anything else is a
 * failed test. */
static int read_back(const struct input *in, const struct outputs *want, struct error *err)
{
    uint64_t raw = in->shape.raw_bytes;
    struct row_store *store = NULL;
    uint32_t *numbers = NULL;
    uint8_t *rows = malloc(in->rows * raw);
    int rc = -1;

    assert_non_null(rows);
    if (row_store_open(&files, scratch, &in->shape, in->rows, &store, err) < 0 ||
        row_store_read_raw(store, 0, in->rows, rows, err) < 0 ||
        row_store_read_numbers(&files, scratch, in->rows, &numbers, err) < 0)
        goto done;
    assert_memory_equal(numbers, want->data[1], in->rows * 4ull);
    for (uint32_t place = 0; place < in->rows; place++)
        assert_memory_equal(rows + place * raw, in->data + numbers[place] * raw, raw);
    rc = 0;
done:
    row_store_close(store);
    free(numbers);
    free(rows);
    return rc;
}

static void check_corrupt(const struct error *err, const char *name)
{
    if (err->code != ERR_CORRUPT || !strstr(err->message, name))
        fail_msg("%s is damaged: %s", name, err->message);
}

/* Writes `name` anew. */
static void put_scratch(const char *name, const void *data, size_t bytes)
{
    char path[FILE_PATH_MAX];

    assert_int_equal(file_path_join(path, scratch, name, NULL), 0);
    assert_int_equal(file_publish(&files, path, data, bytes, NULL), 0);
}

static void test_a_flipped_bit_of_what_is_left_is_found_and_placed(void **state)
{
    static const enum element_type types[] = {ELEMENT_U8, ELEMENT_F32};

    (void)state;
    for (int t = 0; t < 2; t++) {
        struct outputs out;
        struct input in;

        input_init(&in, t ? METRIC_COSINE : METRIC_L2, types[t], 60, 11);
        make(&in, full(&in, 1), 1);
        read_outputs(&out);
        for (int file = 0; file < 3; file++) {
            for (size_t i = 0; i < out.bytes[file]; i++) {
                struct error err = ERROR_INIT;
                char place[40];

                out.data[file][i] ^= (uint8_t)(1u << i % 8);
                put_scratch(names[file], out.data[file], out.bytes[file]);
                assert_int_equal(read_back(&in, &out, &err), -1);
                check_corrupt(&err, names[file]);
                snprintf(place, sizeof place, "place %zu ", i / row_store_record_bytes(&in.shape));
                assert_true(file != 2 || strstr(err.message, place));
                out.data[file][i] ^= (uint8_t)(1u << i % 8);
            }
            put_scratch(names[file], out.data[file], out.bytes[file]);
        }
        free_outputs(&out);
        input_release(&in);
    }
}

static void test_damaged_rows_are_found_by_every_way_of_reading(void **state)
{
    struct error err = ERROR_INIT;
    struct row_store *store = NULL;
    struct pool *pool = new_pool(2);
    struct outputs out;
    struct input in;
    uint64_t record, stride, raw;
    uint8_t *space, *row, *swapped;

    (void)state;
    input_init(&in, METRIC_L2, ELEMENT_U8, 9000, 90);
    record = row_store_record_bytes(&in.shape);
    stride = in.shape.stride;
    raw = in.shape.raw_bytes;
    make(&in, full(&in, 2), 2);
    read_outputs(&out);
    space = file_buffer_alloc(in.rows * stride);
    row = file_buffer_alloc(stride);
    swapped = malloc(out.bytes[2]);
    assert_true(space && row && swapped);
    /* Rows 4000 and 8000 at each other's places, whole: a misplaced write. */
    memcpy(swapped, out.data[2], out.bytes[2]);
    memcpy(swapped + 4000 * record, out.data[2] + 8000 * record, record);
    memcpy(swapped + 8000 * record, out.data[2] + 4000 * record, record);
    put_scratch("rows", swapped, out.bytes[2]);
    assert_int_equal(row_store_open(&files, scratch, &in.shape, in.rows, &store, &err), 0);
    for (uint32_t place = 3990; place < 4010; place++) {
        error_clear(&err);
        assert_int_equal(row_store_read(store, place, 1, space, &err), place == 4000 ? -1 : 0);
        assert_int_equal(row_store_read_raw(store, place, 1, row, NULL), place == 4000 ? -1 : 0);
        if (place == 4000)
            check_corrupt(&err, "place 4000 ");
        else
            assert_memory_equal(row, out.data[2] + place * record, raw);
    }
    for (int how = 0; how < 4; how++) {
        error_clear(&err);
        assert_int_equal(how == 0   ? row_store_read(store, 3999, 100, space, &err)
                         : how == 1 ? row_store_read_raw(store, 0, in.rows, space, &err)
                         : how == 2 ? row_store_read(store, 3000, 4001, space, &err)
                                    : row_store_hold(store, pool, &err),
                         -1);
        check_corrupt(&err, how == 3 ? "rows: row at place " : "place 4000 ");
        assert_null(store->resident);
    }
    assert_int_equal(row_store_read(store, 4001, 3999, space, NULL), 0);
    for (uint32_t i = 0; i < 3999; i++)
        assert_memory_equal(space + i * stride, out.data[2] + (4001 + i) * record, raw);
    row_store_close(store);
    pool_free(pool);
    free(space);
    free(row);
    free(swapped);
    free_outputs(&out);
    input_release(&in);
}

static void test_numbers_that_are_no_permutation_are_refused(void **state)
{
    uint32_t *numbers, *read = NULL;
    struct error err = ERROR_INIT;
    char path[FILE_PATH_MAX];
    struct outputs out;
    struct input in;

    (void)state;
    input_init(&in, METRIC_L2, ELEMENT_U8, 1000, 4);
    make(&in, full(&in, 1), 1);
    read_outputs(&out);
    numbers = (uint32_t *)(void *)out.data[1];
    for (uint32_t i = 0; i < 3; i++) {
        uint32_t before = numbers[700];

        numbers[700] = i == 0 ? before : i == 1 ? 1000 : numbers[20];
        numbers[1000] = crc32c(0, numbers, 4000); /* as by a program that errs */
        put_scratch("numbers", numbers, out.bytes[1]);
        error_clear(&err);
        assert_int_equal(row_store_read_numbers(&files, scratch, 1000, &read, &err), i ? -1 : 0);
        if (i == 0)
            free(read);
        else
            check_corrupt(&err, "numbers: place 700 ");
        numbers[700] = before;
    }
    numbers[1000] = crc32c(0, numbers, 4000);
    for (uint32_t bytes = 0; bytes < 4; bytes += 3) {
        put_scratch("numbers", numbers, 4000 + bytes);
        error_clear(&err);
        assert_int_equal(row_store_read_numbers(&files, scratch, 1000, &read, &err), -1);
        check_corrupt(&err, "numbers");
    }
    put_scratch("numbers", numbers, 4004);
    error_clear(&err);
    assert_int_equal(row_store_read_numbers(&files, scratch, 999, &read, &err), -1);
    check_corrupt(&err, "numbers");
    assert_int_equal(file_path_join(path, scratch, "numbers", NULL), 0);
    assert_int_equal(file_remove_all(&files, path, NULL), 0);
    error_clear(&err);
    assert_int_equal(row_store_read_numbers(&files, scratch, 1000, &read, &err), -1);
    check_corrupt(&err, "numbers");
    free_outputs(&out);
    input_release(&in);
}

enum damage { FLIPPED, ZEROED, SWAPPED, CUT, GONE, DAMAGES };

static void do_damage(const char *name, enum damage damage, struct random *random)
{
    char path[FILE_PATH_MAX];
    uint8_t *data, piece[512];
    size_t bytes, at, other;

    assert_int_equal(file_path_join(path, scratch, name, NULL), 0);
    if (damage == GONE) {
        assert_int_equal(file_remove_all(&files, path, NULL), 0);
        return;
    }
    assert_int_equal(file_read_whole(&files, path, 1u << 30, &data, &bytes, NULL), 0);
    assert_true(bytes > 2 * sizeof piece);
    at = random_below(random, bytes - 2 * sizeof piece + 1);
    other = at + sizeof piece + random_below(random, bytes - 2 * sizeof piece - at + 1);
    if (damage == FLIPPED)
        data[random_below(random, bytes)] ^= (uint8_t)(1u << random_below(random, 8));
    if (damage == ZEROED)
        memset(data + at, 0, sizeof piece);
    if (damage == SWAPPED) {
        memcpy(piece, data + at, sizeof piece);
        memcpy(data + at, data + other, sizeof piece);
        memcpy(data + other, piece, sizeof piece);
    }
    put_scratch(name, data, damage == CUT ? bytes - 1 : bytes);
    free(data);
}

/* Stops at every commit in turn, damages the file and goes on: the result is right, since the file
 * was not needed any more, or the damage is found. */
static void check_damage_is_found(const struct input *in, const struct outputs *want,
                                  const char *name, struct random *random)
{
    uint32_t found[DAMAGES] = {0};
    struct vfs_fault fault;
    bool finished = false;

    vfs_fault_init(&fault, &files);
    for (uint64_t nth = 1; !finished; nth++) {
        const struct vfs_fault_plan plan = {.call = VFS_CALL_RENAME,
                                            .nth = nth,
                                            .for_ever = true,
                                            .path = "build.state",
                                            .errno_value = EIO};
        for (int damage = 0; damage < DAMAGES && !finished; damage++) {
            struct error err = ERROR_INIT;
            char path[FILE_PATH_MAX];

            journal_close(new_journal());
            vfs_fault_plan(&fault, &plan);
            finished = make_on(&fault.vfs, in, least(in, 1), 1, &err) == 0;
            assert_int_equal(file_path_join(path, scratch, name, NULL), 0);
            if (finished || !file_exists(&files, path))
                break;
            do_damage(name, (enum damage)damage, random);
            error_clear(&err);
            if (make_on(&files, in, least(in, 1), 1, &err) == 0) {
                check_same_outputs(want);
            } else {
                check_corrupt(&err, name);
                found[damage]++;
            }
        }
    }
    vfs_fault_release(&fault);
    for (int damage = 0; damage < DAMAGES; damage++)
        if (found[damage] == 0)
            fail_msg("%s: damage of kind %d is of no consequence", name, damage);
}

static void test_damage_to_what_an_interrupted_call_left_is_found(void **state)
{
    struct random random;
    struct outputs want;
    struct input in;

    (void)state;
    random_init(&random, SEED, 7);
    input_init(&in, METRIC_L2, ELEMENT_U8, 5000, 300);
    make(&in, full(&in, 1), 1);
    read_outputs(&want);
    check_damage_is_found(&in, &want, "centroids", &random);
    check_damage_is_found(&in, &want, "assigned", &random);
    check_damage_is_found(&in, &want, "bucket-0", &random);
    free_outputs(&want);
    input_release(&in);
}

static void test_a_disk_that_lies_is_found_out(void **state)
{
    static const enum vfs_effect effects[] = {VFS_EFFECT_TEAR, VFS_EFFECT_FORGET, VFS_EFFECT_FLIP};
    struct vfs_fault lies, stops; /* calls go through the second to the first */
    struct outputs want;
    struct input in;
    uint64_t writes, commits;
    uint32_t found = 0, harmless = 0;

    (void)state;
    input_init(&in, METRIC_L2, ELEMENT_U8, 5000, 300);
    make(&in, full(&in, 1), 1);
    read_outputs(&want);
    vfs_fault_init(&lies, &files);
    vfs_fault_init(&stops, &lies.vfs);
    vfs_fault_plan(&lies, &(struct vfs_fault_plan){.call = VFS_CALL_WRITE, .path = "scratch"});
    vfs_fault_plan(&stops,
                   &(struct vfs_fault_plan){.call = VFS_CALL_RENAME, .path = "build.state"});
    journal_close(new_journal());
    assert_int_equal(make_on(&stops.vfs, &in, least(&in, 1), 1, NULL), 0);
    writes = lies.matched;
    commits = stops.matched;
    assert_true(writes > 20 && commits > 8);
    for (uint64_t nth = 1; nth <= writes; nth++) {
        for (int e = 0; e < 3; e++) {
            /* At the end, or stopped at one commit of all after the lie. */
            for (uint64_t stop = 1 + (nth + (uint64_t)e) % 5; stop <= commits + 1; stop += 5) {
                struct vfs_fault_plan lie = {.call = VFS_CALL_WRITE,
                                             .nth = nth,
                                             .effect = effects[e],
                                             .bit = nth * 12345,
                                             .path = "scratch"};
                struct vfs_fault_plan halt = {.call = VFS_CALL_RENAME,
                                              .nth = stop,
                                              .for_ever = true,
                                              .path = "build.state",
                                              .errno_value = EIO};
                struct error err = ERROR_INIT;
                int rc;

                journal_close(new_journal());
                vfs_fault_plan(&lies, &lie);
                vfs_fault_plan(&stops, &halt);
                rc = make_on(&stops.vfs, &in, least(&in, 1), 1, &err);
                if (vfs_fault_fired(&lies) == 0)
                    continue;
                if (rc < 0 && vfs_fault_fired(&stops) > 0) {
                    error_clear(&err);
                    rc = make_on(&files, &in, least(&in, 1), 1, &err);
                }
                if (rc == 0)
                    rc = read_back(&in, &want, &err);
                if (rc == 0) {
                    harmless++; /* nothing needed what was lost */
                    continue;
                }
                check_corrupt(&err, scratch);
                found++;
            }
        }
    }
    assert_true(found > harmless);
    assert_int_equal(vfs_fault_files_open(&lies), 0);
    vfs_fault_release(&stops);
    vfs_fault_release(&lies);
    free_outputs(&want);
    input_release(&in);
}

/* ---- inspect ---- */

static void test_an_input_is_inspected_the_same_by_any_number_of_threads(void **state)
{
    struct partition_facts one, four;
    struct input in;
    double most = 0;

    (void)state;
    input_init(&in, METRIC_IP, ELEMENT_F32, 40000, 7);
    memset(in.data + 28 * 5, 0, 28);
    memset(in.data + 28 * 39999ull, 0, 28);
    store_f32(in.data + 28 * 39999ull, -0.0f);
    inspect(&in, 1, &one);
    inspect(&in, 4, &four);
    assert_int_equal(one.zero_vectors, 2);
    for (uint32_t i = 0; i < in.rows; i++)
        most = fmax(most, norm_of(in.data + i * 28ull, &in.shape));
    assert_true(one.norm_max == (float)most);
    assert_int_equal(four.zero_vectors, 2);
    assert_true(four.norm_max == one.norm_max);
    assert_memory_equal(one.digest, four.digest, DIGEST_BYTES);
    in.data[28 * 20000] ^= 1;
    inspect(&in, 4, &four);
    assert_memory_not_equal(one.digest, four.digest, DIGEST_BYTES);
    input_release(&in);
}

static void test_the_first_row_that_is_no_vector_is_named(void **state)
{
    struct partition_facts facts;
    struct error err = ERROR_INIT;
    struct pool *pool = new_pool(4);
    struct input in;

    (void)state;
    input_init(&in, METRIC_L2, ELEMENT_F32, 60000, 4);
    store_f32(in.data + 16 * 50000ull, NAN);
    store_f32(in.data + 16 * 17000ull + 8, INFINITY);
    store_f32(in.data + 16 * 33000ull, NAN);
    assert_int_equal(partition_inspect(in.source, &in.shape, pool, NULL, &facts, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
    assert_non_null(strstr(err.message, "row 17000"));
    assert_non_null(strstr(err.message, "dimension 2"));
    pool_free(pool);
    input_release(&in);
}

/* ---- space rows ---- */

static void test_space_rows_rank_as_the_metric_does(void **state)
{
    static const enum element_type types[] = {ELEMENT_F32, ELEMENT_U8, ELEMENT_I8};

    (void)state;
    for (int t = 0; t < 3; t++) {
        for (enum metric metric = METRIC_L2; metric <= METRIC_COSINE; metric++) {
            struct partition_facts facts;
            struct input in;
            uint8_t *space;

            input_init(&in, metric, types[t], 50, 9);
            inspect(&in, 1, &facts);
            space = file_buffer_alloc(50 * in.shape.stride);
            assert_non_null(space);
            row_shape_convert(&in.shape, in.data, 50, space);
            for (uint32_t i = 0; i < 50; i++) {
                const uint8_t *row = space + i * in.shape.stride;
                uint64_t bytes = element_bytes(in.shape.space_type, in.shape.space_dim);
                float floats[9], raw[9];
                double norm = 0, space_norm = 0;

                row_shape_floats(&in.shape, row, floats);
                assert_int_equal(vector_source_read_f32(in.source, i, 1, raw, NULL), 0);
                for (uint32_t d = 0; d < 9; d++)
                    norm += (double)raw[d] * raw[d];
                if (metric == METRIC_COSINE)
                    for (uint32_t d = 0; d < 9; d++)
                        assert_true(fabs(floats[d] - raw[d] / sqrt(norm)) < 1e-6);
                else
                    assert_memory_equal(floats, raw, sizeof raw);
                if (metric == METRIC_IP) {
                    space_norm = norm + pow(load_f32(row + 36), 2);
                    assert_true(fabs(sqrt(space_norm) / facts.norm_max - 1) < 1e-5);
                }
                for (uint64_t b = bytes; b < in.shape.stride; b++)
                    assert_int_equal(row[b], 0);
            }
            free(space);
            input_release(&in);
        }
    }
}

static void test_held_rows_are_those_of_the_file(void **state)
{
    struct row_store *store = NULL;
    struct error err = ERROR_INIT;
    struct pool *pool = new_pool(3);
    struct partition_facts facts;
    struct vector_matrix matrix;
    struct input in;
    uint8_t *file, *held;

    (void)state;
    input_init(&in, METRIC_IP, ELEMENT_I8, 9000, 200);
    inspect(&in, 3, &facts);
    make(&in, full(&in, 3), 3);
    assert_int_equal(row_store_open(&files, scratch, &in.shape, in.rows, &store, &err), 0);
    file = file_buffer_alloc(in.rows * in.shape.stride);
    held = file_buffer_alloc(100 * in.shape.stride);
    assert_true(file && held);
    assert_int_equal(row_store_read(store, 0, in.rows, file, &err), 0);
    assert_int_equal(row_store_hold(store, pool, &err), 0);
    matrix = row_store_matrix(store);
    assert_int_equal(matrix.count, in.rows);
    assert_int_equal(matrix.dim, 201);
    assert_memory_equal(matrix.data, file, in.rows * in.shape.stride);
    assert_int_equal(row_store_read(store, 8900, 100, held, &err), 0);
    assert_memory_equal(held, file + 8900 * in.shape.stride, 100 * in.shape.stride);
    assert_int_equal(row_store_read(store, 8901, 100, held, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
    row_store_drop(store);
    assert_null(store->resident);
    error_clear(&err);
    assert_int_equal(row_store_read(store, 8900, 100, held, &err), 0);
    assert_memory_equal(held, file + 8900 * in.shape.stride, 100 * in.shape.stride);
    row_store_close(store);
    free(file);
    free(held);
    pool_free(pool);
    input_release(&in);
}

/* ---- finding ---- */

/* Finds 24 leaves of each row, and compares with all distances. Returns the share that is right. */
static double share_found(enum element_type type, uint32_t leaf_count, uint32_t dim)
{
    struct leaf_finder_scratch *s = NULL;
    struct leaf_finder *finder = NULL;
    struct input rows, centres;
    float *centroids = malloc((uint64_t)leaf_count * dim * sizeof *centroids);
    uint32_t *found = malloc(3000 * 24 * sizeof *found), *one = malloc(3000 * sizeof *one);
    uint32_t *order = malloc(leaf_count * sizeof *order);
    uint8_t *space, *matrix_rows;
    uint64_t right = 0;
    uint32_t expected = leaf_count < 24 ? leaf_count : 24;

    input_init(&rows, METRIC_L2, type, 3000, dim);
    input_init(&centres, METRIC_L2, type, leaf_count, dim);
    space = file_buffer_alloc(3000 * rows.shape.stride);
    matrix_rows = file_buffer_alloc(leaf_count * rows.shape.stride);
    assert_true(space && matrix_rows && centroids && found && one && order);
    row_shape_convert(&rows.shape, rows.data, 3000, space);
    row_shape_convert(&rows.shape, centres.data, leaf_count, matrix_rows);
    /* Leaves stand in space order. */
    const struct vector_matrix matrix = {matrix_rows, rows.shape.stride, leaf_count, dim, type};
    const struct page_layout_params params = {.capacity = 1, .seed = SEED};

    assert_int_equal(page_layout_order(&matrix, &params, NULL, NULL, order, NULL), 0);
    for (uint32_t i = 0; i < leaf_count; i++)
        row_shape_floats(&rows.shape, matrix_rows + order[i] * rows.shape.stride,
                         centroids + (uint64_t)i * dim);
    assert_int_equal(leaf_finder_new(&rows.shape, centroids, leaf_count, &finder, NULL), 0);
    assert_int_equal(leaf_finder_scratch_new(finder, 3000, 24, &s, NULL), 0);
    leaf_finder_find(finder, s, space, 3000, 1, one);
    leaf_finder_find(finder, s, space, 3000, 24, found);
    for (uint32_t i = 0; i < 3000; i += 5) {
        float distances[128];
        uint32_t ids[128], alone[24];
        struct block_pool pool;

        block_pool_init(&pool, distances, ids, 64);
        for (uint32_t leaf = 0; leaf < leaf_count; leaf++) {
            float distance = (float)square_distance(&rows.shape, space + i * rows.shape.stride,
                                                    centroids + (uint64_t)leaf * dim);

            block_pool_offer(&pool, &distance, 1, leaf, UINT32_MAX);
        }
        block_pool_finish(&pool);
        for (uint32_t j = 0; j < 24; j++) {
            if (j >= expected)
                assert_int_equal(found[i * 24 + j], LEAF_NONE);
            else
                assert_true(found[i * 24 + j] < leaf_count);
            for (uint32_t k = 0; k < expected; k++)
                right += j < expected && found[i * 24 + j] == ids[k];
        }
        if (type == ELEMENT_F32)
            continue;
        leaf_finder_find(finder, s, space + i * rows.shape.stride, 1, 24, alone);
        assert_memory_equal(alone, found + i * 24, sizeof alone);
        if (leaf_count <= 16 * 32) {
            assert_memory_equal(alone, ids, expected * sizeof *ids);
            assert_int_equal(one[i], ids[0]);
        }
    }
    leaf_finder_scratch_free(s);
    leaf_finder_free(finder);
    input_release(&rows);
    input_release(&centres);
    free(centroids);
    free(found);
    free(one);
    free(order);
    free(space);
    free(matrix_rows);
    return (double)right / (600.0 * expected);
}

static void test_few_leaves_are_all_looked_at(void **state)
{
    (void)state;
    assert_true(share_found(ELEMENT_U8, 1, 5) == 1);
    assert_true(share_found(ELEMENT_I8, 23, 70) == 1);
    assert_true(share_found(ELEMENT_U8, 512, 16) == 1);
    assert_true(share_found(ELEMENT_F32, 300, 17) > 0.999);
}

static void test_of_many_leaves_nearly_all_nearest_are_found(void **state)
{
    (void)state;
    assert_true(share_found(ELEMENT_U8, 5000, 16) > 0.97);
    assert_true(share_found(ELEMENT_I8, 4097, 16) > 0.97);
    assert_true(share_found(ELEMENT_F32, 5000, 16) > 0.97);
}

int main(void)
{
    setenv("ANND_COMMIT_SECONDS", "0", 1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_few_leaves_are_all_looked_at),
        cmocka_unit_test(test_of_many_leaves_nearly_all_nearest_are_found),
        cmocka_unit_test(test_space_rows_rank_as_the_metric_does),
        cmocka_unit_test(test_an_input_is_inspected_the_same_by_any_number_of_threads),
        cmocka_unit_test(test_the_first_row_that_is_no_vector_is_named),
        cmocka_unit_test(test_every_row_stands_once_in_the_leaf_nearest_to_it),
        cmocka_unit_test(test_with_many_leaves_nearly_all_rows_stand_in_the_nearest),
        cmocka_unit_test(test_held_rows_are_those_of_the_file),
        cmocka_unit_test_setup_teardown(test_threads_and_memory_change_no_byte, NULL, spare_all),
        cmocka_unit_test(test_too_little_memory_is_refused),
        cmocka_unit_test(test_a_cancelled_job_goes_on_where_it_was),
        cmocka_unit_test_setup_teardown(
            test_whatever_call_fails_the_next_attempt_gives_the_same_bytes, spare_least, spare_all),
        cmocka_unit_test_setup_teardown(test_killed_at_any_time_it_goes_on_to_the_same_bytes,
                                        spare_least, spare_all),
        cmocka_unit_test(test_a_store_that_does_not_fit_is_refused),
        cmocka_unit_test(test_a_flipped_bit_of_what_is_left_is_found_and_placed),
        cmocka_unit_test(test_damaged_rows_are_found_by_every_way_of_reading),
        cmocka_unit_test(test_numbers_that_are_no_permutation_are_refused),
        cmocka_unit_test_setup_teardown(test_a_disk_that_lies_is_found_out, spare_least, spare_all),
        cmocka_unit_test_setup_teardown(test_damage_to_what_an_interrupted_call_left_is_found,
                                        spare_least, spare_all),
    };

    return cmocka_run_group_tests_name("partition", tests, make_folder, remove_folder);
}
