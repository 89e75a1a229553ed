/* Checks index/leaf_graph.c: graph and lists are the same bytes whatever the threads, the memory
 * and the interruptions; they are sound on sets that are hostile, and as good as those of an
 * insertion on sets that are not.
 *
 * leaf_graph.c and edge_runs.c are included with a commit whenever it looks at the clock, small
 * batches, ranges and blocks, so that a few thousand rows go all of the ways that millions go. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#define BATCH_TASKS 2u
#define GATHER_BYTES (1u << 18)
#define LEAF_ROWS_MAX 2048u
#define EDGE_RUNS_RANGE 2000u
#define BLOCK_EDGES 512u
#include "index/edge_runs.c"

#include "index/leaf_graph.c"

#include <errno.h>
#include <malloc.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "index/store.h"
#include "storage/base/bytes.h"
#include "tests/support/vfs_fault.h"

#define SEED 20261121u
#define DEGREE 32u

static char base[200], folder[256], scratch[300];
static const struct leaf_graph_params params = {.max_degree = DEGREE, .alpha = 1.2f, .seed = SEED};

static int make_folder(void **state)
{
    const char *root = getenv("TMPDIR");

    (void)state;
    snprintf(base, sizeof base, "%s/annd-leaves-XXXXXX", root ? root : "/var/tmp");
    if (!mkdtemp(base))
        return -1;
    snprintf(folder, sizeof folder, "%s/job", base);
    snprintf(scratch, sizeof scratch, "%s/scratch", folder);
    return 0;
}

static int remove_folder(void **state)
{
    (void)state;
    return file_remove_all(vfs_posix(), base, NULL);
}

/* ---- sets ---- */

enum kind {
    KIND_CLUSTERS,
    KIND_EQUAL,      /* one vector */
    KIND_TWO,        /* two clusters, far from each other */
    KIND_DUPLICATES, /* of ten rows nine are copies of a few */
    KIND_ZEROS,      /* most are the zero vector */
};

struct set {
    enum kind kind;
    struct row_shape shape;
    uint32_t rows;
    uint8_t *data; /* packed, in the order of the input */
};

static void put_value(struct set *set, uint64_t at, float value)
{
    float whole = fminf(fmaxf(roundf(value), -127), 127);

    if (set->shape.element == ELEMENT_F32)
        store_f32(set->data + 4 * at, value);
    else
        set->data[at] = (uint8_t)((int)whole + (set->shape.element == ELEMENT_U8 ? 128 : 0));
}

static void set_init(struct set *set, enum kind kind, enum metric metric, enum element_type element,
                     uint32_t rows, uint32_t dim)
{
    uint32_t centres_count = kind == KIND_TWO ? 2 : kind == KIND_EQUAL ? 1 : 40;
    float *centres = malloc(centres_count * dim * sizeof *centres);
    float norm_max = 0;
    struct random random;

    *set = (struct set){.kind = kind, .rows = rows};
    row_shape_init(&set->shape, metric, element, dim);
    set->data = malloc(rows * set->shape.raw_bytes);
    assert_true(centres && set->data);
    random_init(&random, SEED, dim);
    for (uint32_t i = 0; i < centres_count * dim; i++)
        centres[i] = kind == KIND_TWO ? (i < dim ? -100.0f : 100.0f) : 25 * random_normal(&random);
    for (uint32_t i = 0; i < rows; i++) {
        const float *centre = centres + random_below(&random, centres_count) * dim;
        bool copy = kind == KIND_EQUAL || (kind == KIND_DUPLICATES && random_below(&random, 10));
        bool zero = kind == KIND_ZEROS && random_below(&random, 10) > 1;
        double norm = 0;

        for (uint32_t d = 0; d < dim; d++) {
            float noise = random_normal(&random);
            float value = zero ? 0 : centre[d] + (copy ? 0 : 12 * noise);

            put_value(set, (uint64_t)i * dim + d, value);
            norm += (double)value * value;
        }
        norm_max = norm > (double)norm_max ? (float)norm : norm_max;
    }
    set->shape.norm_max =
        metric == METRIC_IP ? 1.01f * sqrtf(norm_max) + 130 * sqrtf((float)dim) : 0;
    free(centres);
}

static void set_release(struct set *set)
{
    free(set->data);
}

static struct pool *new_pool(uint32_t workers)
{
    struct pool *pool = NULL;

    assert_int_equal(pool_new(workers, &pool, NULL), 0);
    return pool;
}

static void must(int rc, const struct error *err)
{
    if (rc < 0)
        fail_msg("%s", err->message);
}

static void new_folder(void)
{
    struct manifest *asked = manifest_new(MANIFEST_JOB);
    struct journal *journal = NULL;
    struct error err = ERROR_INIT;
    char path[FILE_PATH_MAX];

    assert_non_null(asked);
    must(file_remove_all(vfs_posix(), folder, &err), &err);
    must(journal_create(vfs_posix(), folder, asked, &journal, &err), &err);
    must(journal_scratch_path(journal, "x", path, &err), &err);
    journal_close(journal);
    manifest_free(asked);
}

/* A folder with the rows in it, as the partition leaves them. */
static void set_partition(const struct set *set)
{
    struct vector_source *source = NULL;
    struct journal *journal = NULL;
    struct error err = ERROR_INIT;
    struct pool *pool = new_pool(2);

    new_folder();
    must(journal_open(vfs_posix(), folder, &journal, &err), &err);
    must(vector_source_open_memory(set->data, set->shape.element, set->rows, set->shape.dim, "rows",
                                   &source, &err),
         &err);
    must(partition_make(vfs_posix(), source, &set->shape, SEED,
                        partition_memory_full(&set->shape, set->rows, 2), journal, pool, NULL,
                        &err),
         &err);
    vector_source_close(source);
    journal_close(journal);
    pool_free(pool);
}

/* The rows in the order of the input, in leaves that begin where `begins` says. */
static void set_lay_out(const struct set *set, uint32_t leaves, const uint32_t *begins)
{
    uint32_t dim = set->shape.space_dim;
    float *centroids = calloc(leaves * dim, sizeof *centroids);
    float *floats = malloc((dim + 1) * sizeof *floats);
    uint8_t *row = file_buffer_alloc(set->shape.stride);
    uint64_t bytes = row_store_record_bytes(&set->shape);
    uint8_t *rows = malloc(set->rows * bytes);
    struct error err = ERROR_INIT;
    char path[FILE_PATH_MAX];

    assert_true(centroids && row && floats && rows);
    for (uint32_t leaf = 0; leaf < leaves; leaf++) {
        float share = 1.0f / (float)(begins[leaf + 1] - begins[leaf]);

        for (uint32_t i = begins[leaf]; i < begins[leaf + 1]; i++) {
            row_shape_convert(&set->shape, set->data + i * set->shape.raw_bytes, 1, row);
            row_shape_floats(&set->shape, row, floats);
            for (uint32_t d = 0; d < set->shape.dim; d++)
                centroids[leaf * dim + d] += share * floats[d];
        }
    }
    new_folder();
    must(row_store_write_leaves(vfs_posix(), scratch, &set->shape, set->rows, leaves, begins,
                                centroids, &err),
         &err);
    must(file_path_join(path, scratch, "rows", &err), &err);
    for (uint32_t i = 0; i < set->rows; i++) {
        memcpy(rows + i * bytes, set->data + i * set->shape.raw_bytes, set->shape.raw_bytes);
        store_u32(rows + i * bytes + set->shape.raw_bytes,
                  row_store_crc(&set->shape, i, rows + i * bytes));
    }
    must(file_publish(vfs_posix(), path, rows, set->rows * bytes, &err), &err);
    free(rows);
    free(centroids);
    free(floats);
    free(row);
}

/* ---- making ---- */

static int make_on(struct vfs *vfs, const struct set *set, const struct leaf_graph_params *with,
                   uint32_t workers, bool hold, struct job *job, struct error *err)
{
    struct row_store *store = NULL;
    struct journal *journal = NULL;
    struct pool *pool = new_pool(workers);
    int rc = -1;

    if (journal_open(vfs, folder, &journal, err) == 0 &&
        row_store_open(vfs, scratch, &set->shape, set->rows, &store, err) == 0 &&
        (!hold || row_store_hold(store, pool, err) == 0))
        rc = leaf_graph_make(vfs, store, with, 0, journal, pool, job, err);
    row_store_close(store);
    journal_close(journal);
    pool_free(pool);
    return rc;
}

static const char *const made[] = {"graph", "lists", "draft", "edges", "edges.table", "patches"};

/* Throws away what was made, but for the rows. */
static void unmake(void)
{
    struct journal *journal = NULL;
    char path[FILE_PATH_MAX];

    for (size_t i = 0; i < sizeof made / sizeof made[0]; i++) {
        assert_int_equal(file_path_join(path, scratch, made[i], NULL), 0);
        assert_int_equal(file_remove_all(vfs_posix(), path, NULL), 0);
    }
    assert_int_equal(journal_open(vfs_posix(), folder, &journal, NULL), 0);
    manifest_remove(journal_state(journal), "graph.drafted");
    manifest_remove(journal_state(journal), "graph.edge_blocks");
    manifest_remove(journal_state(journal), "graph.finished");
    assert_int_equal(journal_commit(journal, NULL), 0);
    journal_close(journal);
}

static void make(const struct set *set, const struct leaf_graph_params *with, uint32_t workers,
                 bool hold)
{
    struct error err = ERROR_INIT;

    must(make_on(vfs_posix(), set, with, workers, hold, NULL, &err), &err);
}

struct outputs {
    uint32_t *graph;
    uint32_t *lists;
};

static uint64_t graph_bytes(const struct set *set, uint32_t degree)
{
    return set->rows * (uint64_t)graph_record_words(degree) * sizeof(uint32_t);
}

static uint32_t *record_at(uint32_t *records, uint32_t place, uint32_t degree)
{
    return records + (uint64_t)place * graph_record_words(degree);
}

static uint8_t *read_scratch(const char *name, size_t *bytes)
{
    struct error err = ERROR_INIT;
    char path[FILE_PATH_MAX];
    uint8_t *data = NULL;

    assert_int_equal(file_path_join(path, scratch, name, NULL), 0);
    must(file_read_whole(vfs_posix(), path, 1u << 30, &data, bytes, &err), &err);
    return data;
}

static void read_outputs(const struct set *set, uint32_t degree, struct outputs *out)
{
    size_t bytes;

    out->graph = (uint32_t *)(void *)read_scratch("graph", &bytes);
    assert_int_equal(bytes, graph_bytes(set, degree));
    out->lists = (uint32_t *)(void *)read_scratch("lists", &bytes);
    assert_int_equal(bytes, graph_bytes(set, LEAF_GRAPH_LIST_PLACES));
}

static void free_outputs(struct outputs *out)
{
    free(out->graph);
    free(out->lists);
}

static void check_same_outputs(const struct set *set, uint32_t degree, const struct outputs *want)
{
    struct outputs got;

    read_outputs(set, degree, &got);
    assert_memory_equal(got.graph, want->graph, graph_bytes(set, degree));
    assert_memory_equal(got.lists, want->lists, graph_bytes(set, LEAF_GRAPH_LIST_PLACES));
    free_outputs(&got);
}

static void check_same_after(const struct set *set, uint32_t workers, bool hold,
                             const struct outputs *want)
{
    unmake();
    make(set, &params, workers, hold);
    check_same_outputs(set, DEGREE, want);
}

/* Degrees, no row its own neighbour, none twice; lists in ascending order; and every row reached
 * after graph_store_connect(). Returns how many rows that had to link. */
static uint64_t check_sound(const struct set *set, uint32_t degree)
{
    struct row_store *store = NULL;
    struct journal *journal = NULL;
    struct graph_store *graph = NULL;
    struct error err = ERROR_INIT;
    struct row_space space;
    struct outputs out;
    uint32_t *mark = malloc(set->rows * sizeof *mark), *queue = malloc(set->rows * sizeof *queue);
    uint32_t *record = malloc(graph_record_words(degree) * sizeof *record), head = 0, reached = 0,
             entry;
    struct pool *pool = new_pool(2);
    uint64_t linked;

    assert_true(mark && queue && record);
    must(journal_open(vfs_posix(), folder, &journal, &err), &err);
    must(row_store_open(vfs_posix(), scratch, &set->shape, set->rows, &store, &err), &err);
    must(row_store_hold(store, pool, &err), &err);
    must(graph_store_open(vfs_posix(), journal, "graph", set->rows, degree, false, &graph, &err),
         &err);
    for (int pass = 0; pass < 2; pass++) {
        memset(mark, 0xff, set->rows * sizeof *mark);
        for (uint32_t i = 0; i < set->rows; i++) {
            must(graph_store_read(graph, i, 1, record, &err), &err);
            for (uint32_t e = 1; e <= degree; e++) {
                if (e > record[0]) {
                    assert_int_equal(record[e], 0);
                    continue;
                }
                assert_int_not_equal(record[e], i);
                assert_int_not_equal(mark[record[e]], i);
                mark[record[e]] = i;
            }
        }
        if (pass == 0)
            must(graph_store_connect(graph, store, journal, pool, NULL, &linked, &err), &err);
    }
    entry = graph->entry_point;
    graph_store_close(graph);
    read_outputs(set, degree, &out);
    memset(mark, 0, set->rows * sizeof *mark);
    mark[entry] = 1;
    queue[reached++] = entry;
    while (head < reached) {
        const uint32_t *edges = record_at(out.graph, queue[head++], degree);

        for (uint32_t e = 1; e <= edges[0]; e++) {
            if (!mark[edges[e]]) {
                mark[edges[e]] = 1;
                queue[reached++] = edges[e];
            }
        }
    }
    assert_int_equal(reached, set->rows);

    const struct vector_matrix matrix = row_store_matrix(store);

    must(row_space_init(&space, &matrix, &err), &err);
    memset(mark, 0xff, set->rows * sizeof *mark);
    for (uint32_t i = 0; i < set->rows; i++) {
        const uint32_t *list = record_at(out.lists, i, LEAF_GRAPH_LIST_PLACES);
        float before = 0;

        assert_true(list[0] <= LEAF_GRAPH_LIST_PLACES);
        for (uint32_t k = 1; k <= list[0]; k++) {
            float distance;

            assert_true(list[k] < set->rows && list[k] != i && mark[list[k]] != i);
            mark[list[k]] = i;
            distance = row_space_distance(&space, row_space_row(&space, i),
                                          row_space_row(&space, list[k]));
            /* Integers are compared exactly. */
            if (space.type != ELEMENT_F32)
                assert_true(distance >= before);
            before = distance;
        }
        if (set->rows > LEAF_GRAPH_LIST_PLACES && space.type != ELEMENT_F32)
            assert_int_equal(list[0], LEAF_GRAPH_LIST_PLACES);
    }
    free_outputs(&out);
    row_store_close(store);
    journal_close(journal);
    pool_free(pool);
    free(mark);
    free(queue);
    free(record);
    return linked;
}

/* ---- the same bytes ---- */

static const struct {
    enum metric metric;
    enum element_type element;
    uint32_t rows, dim;
} shapes[] = {
    {METRIC_L2, ELEMENT_U8, 5000, 24},     {METRIC_L2, ELEMENT_I8, 2500, 65},
    {METRIC_L2, ELEMENT_F32, 2500, 20},    {METRIC_COSINE, ELEMENT_F32, 2500, 33},
    {METRIC_COSINE, ELEMENT_I8, 2100, 16}, {METRIC_IP, ELEMENT_F32, 2100, 15},
    {METRIC_IP, ELEMENT_U8, 2100, 16},
};

static void test_threads_and_memory_change_no_byte(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        struct outputs want;
        struct set set;

        set_init(&set, KIND_CLUSTERS, shapes[i].metric, shapes[i].element, shapes[i].rows,
                 shapes[i].dim);
        set_partition(&set);
        make(&set, &params, 1, true);
        read_outputs(&set, DEGREE, &want);
        make(&set, &params, 1, true); /* all is done */
        check_same_outputs(&set, DEGREE, &want);
        check_same_after(&set, 2, true, &want);
        check_same_after(&set, 4, true, &want);
        check_same_after(&set, 1, false, &want);
        check_same_after(&set, 4, false, &want);
        assert_true(check_sound(&set, DEGREE) <= set.rows / 50);
        free_outputs(&want);
        set_release(&set);
    }
}

/* ---- hostile sets ---- */

static void test_hostile_sets_make_sound_graphs(void **state)
{
    static const struct {
        enum kind kind;
        enum metric metric;
        enum element_type element;
        uint32_t rows, dim;
    } cases[] = {
        {KIND_EQUAL, METRIC_L2, ELEMENT_U8, 2500, 8},
        {KIND_EQUAL, METRIC_COSINE, ELEMENT_F32, 2500, 8},
        {KIND_TWO, METRIC_L2, ELEMENT_U8, 2500, 12},
        {KIND_TWO, METRIC_L2, ELEMENT_F32, 2500, 12},
        {KIND_DUPLICATES, METRIC_L2, ELEMENT_I8, 2500, 16},
        {KIND_DUPLICATES, METRIC_IP, ELEMENT_F32, 2500, 16},
        {KIND_ZEROS, METRIC_COSINE, ELEMENT_U8, 2100, 16},
        {KIND_ZEROS, METRIC_L2, ELEMENT_U8, 4000, 8},
        {KIND_CLUSTERS, METRIC_L2, ELEMENT_F32, 1, 3},
        {KIND_CLUSTERS, METRIC_L2, ELEMENT_U8, 2, 3},
        {KIND_CLUSTERS, METRIC_IP, ELEMENT_I8, 17, 3},
        {KIND_CLUSTERS, METRIC_L2, ELEMENT_U8, 500, 20},
        {KIND_CLUSTERS, METRIC_L2, ELEMENT_U8, 2500, 1},
        {KIND_CLUSTERS, METRIC_L2, ELEMENT_F32, 2500, 1},
        {KIND_CLUSTERS, METRIC_L2, ELEMENT_F32, 600, 2048},
        {KIND_CLUSTERS, METRIC_L2, ELEMENT_I8, 1100, 2048},
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct outputs want;
        struct set set;

        set_init(&set, cases[i].kind, cases[i].metric, cases[i].element, cases[i].rows,
                 cases[i].dim);
        set_partition(&set);
        make(&set, &params, 3, false);
        read_outputs(&set, DEGREE, &want);
        check_same_after(&set, 2, true, &want);
        check_sound(&set, DEGREE);
        free_outputs(&want);
        set_release(&set);
    }
}

static void test_leaves_may_be_empty_or_hold_nearly_all(void **state)
{
    /* The first leaf and its neighbours are empty, one holds all but a few; then all empty but
     * one; the middle one so great that not all of its rows are compared. */
    static const uint32_t begins[][9] = {{0, 0, 0, 50, 2450, 2450, 2500, 2500, 2500},
                                         {0, 0, 0, 0, 0, 0, 2500, 2500, 2500},
                                         {0, 300, 600, 700, 4300, 4350, 4400, 4400, 4400}};
    static const struct leaf_graph_params greatest = {
        .max_degree = 256, .alpha = 1.2f, .seed = SEED, .probes = 1, .pool = 1024};
    static const struct leaf_graph_params least = {
        .max_degree = 4, .alpha = 1, .seed = SEED, .probes = 64, .pool = 8};

    (void)state;
    for (int i = 0; i < 3; i++) {
        struct outputs want;
        struct set set;

        set_init(&set, i == 1 ? KIND_DUPLICATES : KIND_CLUSTERS, METRIC_L2,
                 i == 2 ? ELEMENT_U8 : ELEMENT_F32, begins[i][8], 12);
        set_lay_out(&set, 8, begins[i]);
        make(&set, &params, 3, false);
        read_outputs(&set, DEGREE, &want);
        check_same_after(&set, 2, true, &want);
        check_sound(&set, DEGREE);
        free_outputs(&want);
        if (i == 0) {
            unmake();
            make(&set, &greatest, 2, false);
            read_outputs(&set, 256, &want);
            unmake();
            make(&set, &greatest, 1, true);
            check_same_outputs(&set, 256, &want);
            free_outputs(&want);
            check_sound(&set, 256);
        } else if (i == 1) {
            unmake();
            make(&set, &least, 2, false);
            free(read_scratch("graph", &(size_t){0}));
        }
        set_release(&set);
    }
}

/* ---- interruptions ---- */

static void test_whatever_call_fails_the_next_attempt_gives_the_same_bytes(void **state)
{
    static const enum vfs_effect effects[] = {VFS_EFFECT_ERRNO, VFS_EFFECT_TEAR_ERRNO,
                                              VFS_EFFECT_ERRNO};
    struct vfs_fault fault;
    struct outputs want;
    struct set set;

    (void)state;
    set_init(&set, KIND_CLUSTERS, METRIC_L2, ELEMENT_U8, 5000, 8);
    set_partition(&set);
    make(&set, &params, 2, true);
    read_outputs(&set, DEGREE, &want);
    vfs_fault_init(&fault, vfs_posix());
    /* All calls, writes, and reads of rows that are not held. */
    for (int kind = 0; kind < 3; kind++) {
        const enum vfs_call call = kind == 0   ? VFS_CALL_ANY
                                   : kind == 1 ? VFS_CALL_WRITE
                                               : VFS_CALL_READ;
        uint64_t calls, steps = kind == 0 ? 8 : 2;

        unmake();
        vfs_fault_plan(&fault, NULL);
        assert_int_equal(make_on(&fault.vfs, &set, &params, 1, kind != 2, NULL, NULL), 0);
        calls = vfs_fault_calls(&fault, call);
        for (uint64_t i = 0; i < steps; i++) {
            struct vfs_fault_plan plan = {.call = call,
                                          .nth = 1 + i * (calls - 1) / steps,
                                          .for_ever = true,
                                          .effect = effects[kind],
                                          .errno_value = i % 2 ? EIO : ENOSPC};
            struct error err = ERROR_INIT;

            unmake();
            vfs_fault_plan(&fault, &plan);
            assert_int_equal(make_on(&fault.vfs, &set, &params, 1, kind != 2, NULL, &err), -1);
            assert_true(err.message[0] != 0);
            /* A second one, a while after where the first stopped. */
            error_clear(&err);
            plan.nth = 1 + calls / 5;
            vfs_fault_plan(&fault, &plan);
            make_on(&fault.vfs, &set, &params, 3, kind != 2, NULL, &err);
            vfs_fault_plan(&fault, NULL);
            error_clear(&err);
            must(make_on(&fault.vfs, &set, &params, 2, i % 2, NULL, &err), &err);
            check_same_outputs(&set, DEGREE, &want);
        }
    }
    assert_int_equal(vfs_fault_files_open(&fault), 0);
    vfs_fault_release(&fault);
    free_outputs(&want);
    set_release(&set);
}

struct canceller {
    struct job *job;
    uint32_t reports; /* left until it cancels */
};

static void cancel_later(void *context, const struct job_progress *progress)
{
    struct canceller *c = context;

    (void)progress;
    if (c->reports-- == 0)
        job_cancel(c->job);
}

static void test_a_cancelled_job_goes_on_where_it_was(void **state)
{
    struct outputs want;
    struct set set;
    uint32_t cancelled = 0;

    (void)state;
    set_init(&set, KIND_CLUSTERS, METRIC_L2, ELEMENT_F32, 5000, 8);
    set_partition(&set);
    make(&set, &params, 2, true);
    read_outputs(&set, DEGREE, &want);
    for (uint32_t reports = 0; reports < 6; reports++) {
        struct canceller c = {.reports = reports};
        struct error err = ERROR_INIT;
        int rc;

        unmake();
        c.job = job_new(cancel_later, &c);
        assert_non_null(c.job);
        rc = make_on(vfs_posix(), &set, &params, 2, reports % 2, c.job, &err);
        if (rc < 0) {
            assert_int_equal(err.code, ERR_CANCELLED);
            cancelled++;
            assert_int_equal(make_on(vfs_posix(), &set, &params, 2, true, c.job, NULL), -1);
        }
        job_free(c.job);
        make(&set, &params, 3, reports % 2);
        check_same_outputs(&set, DEGREE, &want);
    }
    assert_true(cancelled >= 2);
    free_outputs(&want);
    set_release(&set);
}

static void test_killed_at_any_time_it_goes_on_to_the_same_bytes(void **state)
{
    struct outputs want;
    struct random random;
    struct set set;
    uint32_t killed = 0, finished = 0;

    (void)state;
    random_init(&random, SEED, 98);
    set_init(&set, KIND_CLUSTERS, METRIC_L2, ELEMENT_U8, 5000, 16);
    set_partition(&set);
    make(&set, &params, 1, true);
    read_outputs(&set, DEGREE, &want);
    unmake();
    while (finished < 2) {
        pid_t child = fork();
        int status;

        assert_true(child >= 0);
        if (child == 0)
            _exit(make_on(vfs_posix(), &set, &params, 1, finished, NULL, NULL) < 0);
        /* Longer with every attempt, so that it comes to an end on any machine. */
        usleep((useconds_t)random_below(&random, 100000 + 50000 * killed));
        kill(child, SIGKILL);
        assert_int_equal(waitpid(child, &status, 0), child);
        if (WIFSIGNALED(status)) {
            killed++;
            continue;
        }
        assert_int_equal(WEXITSTATUS(status), 0);
        check_same_outputs(&set, DEGREE, &want);
        unmake();
        finished++;
    }
    assert_true(killed > 0);
    free_outputs(&want);
    set_release(&set);
}

/* ---- damage ---- */

static void write_scratch(const char *name, const void *data, size_t bytes)
{
    char path[FILE_PATH_MAX];
    FILE *file;

    assert_int_equal(file_path_join(path, scratch, name, NULL), 0);
    file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(data, 1, bytes, file), bytes);
    assert_int_equal(fclose(file), 0);
}

/* All rows are drafted, none is finished. */
static void forget_finished(void)
{
    struct journal *journal = NULL;

    assert_int_equal(journal_open(vfs_posix(), folder, &journal, NULL), 0);
    manifest_remove(journal_state(journal), "graph.finished");
    assert_int_equal(journal_commit(journal, NULL), 0);
    journal_close(journal);
}

static void test_damage_to_what_an_interrupted_call_left_is_found(void **state)
{
    uint8_t *draft, *edges, *table;
    size_t draft_bytes, edges_bytes, table_bytes;
    struct error err = ERROR_INIT;
    struct outputs want;
    struct set set;

    (void)state;
    set_init(&set, KIND_CLUSTERS, METRIC_L2, ELEMENT_U8, 5000, 8);
    set_partition(&set);
    make(&set, &params, 2, true);
    read_outputs(&set, DEGREE, &want);
    draft = read_scratch("draft", &draft_bytes);
    edges = read_scratch("edges", &edges_bytes);
    table = read_scratch("edges.table", &table_bytes);
    for (int hold = 0; hold < 2; hold++) {
        struct {
            const char *name;
            uint8_t *data;
            size_t bytes;
            size_t at; /* whose value is damaged; or 0: cut */
            uint32_t value;
        } cases[] = {
            {"draft", draft, draft_bytes, 0, 0},
            {"edges", edges, edges_bytes, 0, 0},
            {"edges.table", table, table_bytes, 0, 0},
            {"draft", draft, draft_bytes, 34 * 4 * 4000, UINT32_MAX},
            {"draft", draft, draft_bytes, 34 * 4 * 4000, DEGREE + 1},
            {"draft", draft, draft_bytes, 34 * 4 * 4000 + 4, UINT32_MAX},
            {"draft", draft, draft_bytes, 34 * 4 * 4000 + 4, 5000},
            {"edges", edges, edges_bytes, 8, UINT32_MAX},
            {"edges", edges, edges_bytes, 12, 5000},
            {"edges.table", table, table_bytes, 16, UINT32_MAX},
            {"edges.table", table, table_bytes, 20, UINT32_MAX},
        };

        for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
            uint32_t saved = load_u32(cases[i].data + cases[i].at);

            if (cases[i].at)
                store_u32(cases[i].data + cases[i].at, cases[i].value);
            write_scratch(cases[i].name, cases[i].data, cases[i].bytes - !cases[i].at);
            error_clear(&err);
            forget_finished();
            if (make_on(vfs_posix(), &set, &params, 2, hold, NULL, &err) == 0)
                fail_msg("case %zu, %s: no error", i, cases[i].name);
            assert_int_equal(err.code, ERR_CORRUPT);
            assert_non_null(strstr(err.message, cases[i].name));
            store_u32(cases[i].data + cases[i].at, saved);
            write_scratch(cases[i].name, cases[i].data, cases[i].bytes);
        }
    }
    forget_finished();
    make(&set, &params, 2, true);
    check_same_outputs(&set, DEGREE, &want);
    free(draft);
    free(edges);
    free(table);
    free_outputs(&want);
    set_release(&set);
}

/* ---- how good ---- */

struct quality {
    struct row_store *store;
    struct row_space space;
    struct pool *pool;
};

static void quality_open(const struct set *set, struct quality *q)
{
    struct error err = ERROR_INIT;

    q->pool = new_pool(4);
    must(row_store_open(vfs_posix(), scratch, &set->shape, set->rows, &q->store, &err), &err);
    must(row_store_hold(q->store, q->pool, &err), &err);

    const struct vector_matrix matrix = row_store_matrix(q->store);

    must(row_space_init(&q->space, &matrix, &err), &err);
}

static void quality_close(struct quality *q)
{
    row_store_close(q->store);
    pool_free(q->pool);
}

/* The `k` nearest of all rows but `hidden`, into ids. */
static void nearest(const struct row_space *space, const uint8_t *to, uint32_t hidden, uint32_t k,
                    uint32_t *ids)
{
    struct candidates list;

    assert_int_equal(candidates_init(&list, k, NULL), 0);
    candidates_clear(&list, k);
    for (uint32_t i = 0; i < space->count; i++)
        if (i != hidden)
            candidates_insert(&list, row_space_distance(space, to, row_space_row(space, i)), i);
    for (uint32_t i = 0; i < k; i++)
        ids[i] = list.items[i].id;
    candidates_release(&list);
}

static uint32_t overlap(const uint32_t *a, const uint32_t *b, uint32_t count)
{
    uint32_t found = 0;

    for (uint32_t i = 0; i < count; i++)
        for (uint32_t j = 0; j < count; j++)
            found += a[i] == b[j];
    return found;
}

static void test_lists_hold_the_nearest_rows(void **state)
{
    static const enum element_type elements[] = {ELEMENT_F32, ELEMENT_U8};

    (void)state;
    for (int t = 0; t < 2; t++) {
        struct outputs out;
        struct quality q;
        struct set set;
        uint32_t right = 0;

        set_init(&set, KIND_CLUSTERS, METRIC_L2, elements[t], 20000, 32);
        set_partition(&set);
        make(&set, &params, 4, true);
        read_outputs(&set, DEGREE, &out);
        quality_open(&set, &q);
        for (uint32_t i = 0; i < 200; i++) {
            uint32_t row = i * 100 + i % 7, ids[10];

            nearest(&q.space, row_space_row(&q.space, row), row, 10, ids);
            right += overlap(ids, record_at(out.lists, row, LEAF_GRAPH_LIST_PLACES) + 1, 10);
        }
        print_message("%s: recall of the lists %.4f\n", element_name(elements[t]), right / 2000.0);
        assert_true(right >= 1800);
        quality_close(&q);
        free_outputs(&out);
        set_release(&set);
    }
}

#define QUERIES 300u
#define LISTS 7u

struct curve {
    double reads[LISTS]; /* rows expanded */
    double recall[LISTS];
};

/* Every walk begins at the nearest of every SEED_STEP-th row: on disk it does so at the nearest of
 * a cell's rows, which are as many. */
#define SEED_STEP 64u

static uint32_t seed_of(const struct quality *q, const uint8_t *query)
{
    float best = INFINITY;
    uint32_t seed = 0;

    for (uint32_t i = 0; i < q->space.count; i += SEED_STEP) {
        float distance = row_space_distance(&q->space, query, row_space_row(&q->space, i));

        if (distance < best) {
            best = distance;
            seed = i;
        }
    }
    return seed;
}

static void measure(const struct quality *q, struct graph *graph, const uint8_t *queries,
                    const uint32_t *truth, struct curve *out)
{
    static const uint32_t sizes[LISTS] = {10, 14, 20, 28, 40, 56, 80};
    struct search_scratch s;

    assert_int_equal(search_scratch_init(&s, 80, graph->max_degree, NULL), 0);
    for (uint32_t l = 0; l < LISTS; l++) {
        out->reads[l] = out->recall[l] = 0;
        for (uint32_t i = 0; i < QUERIES; i++) {
            uint32_t ids[10];

            graph->entry_point = seed_of(q, queries + i * q->space.row_bytes);
            vamana_search_run(&q->space, graph, queries + i * q->space.row_bytes, sizes[l], &s);
            for (uint32_t k = 0; k < 10; k++)
                ids[k] = s.list.items[k].id;
            out->reads[l] += (double)s.expanded_count / QUERIES;
            out->recall[l] += overlap(ids, truth + i * 10, 10) / (10.0 * QUERIES);
        }
    }
    search_scratch_release(&s);
}

static double recall_at(const struct curve *curve, double reads)
{
    for (uint32_t l = 1; l < LISTS; l++)
        if (reads <= curve->reads[l])
            return curve->recall[l - 1] + (curve->recall[l] - curve->recall[l - 1]) *
                                              (reads - curve->reads[l - 1]) /
                                              (curve->reads[l] - curve->reads[l - 1]);
    return curve->recall[LISTS - 1];
}

static void test_a_search_finds_as_much_as_in_a_graph_made_by_insertion(void **state)
{
    static const enum element_type elements[] = {ELEMENT_F32, ELEMENT_U8};

    (void)state;
    for (int t = 0; t < 2; t++) {
        const struct vamana_params insert = {DEGREE, 64, 1.2f, SEED};
        struct graph batch = {.max_degree = DEGREE}, *inserted = NULL;
        struct curve ours, theirs;
        struct outputs out;
        struct quality q;
        struct set set, all;
        uint8_t *queries;
        uint32_t *truth = malloc(QUERIES * 10 * sizeof *truth);
        struct error err = ERROR_INIT;

        set_init(&set, KIND_CLUSTERS, METRIC_L2, elements[t], 20000, 32);
        /* Of the same distribution: the rows that follow. */
        set_init(&all, KIND_CLUSTERS, METRIC_L2, elements[t], 20000 + QUERIES, 32);
        assert_memory_equal(all.data, set.data, 20000 * set.shape.raw_bytes);
        set_partition(&set);
        make(&set, &params, 4, true);
        check_sound(&set, DEGREE);
        read_outputs(&set, DEGREE, &out);
        quality_open(&set, &q);
        queries = file_buffer_alloc(QUERIES * set.shape.stride);
        batch.count = set.rows;
        batch.degrees = malloc(set.rows * 4);
        batch.neighbours = malloc(set.rows * DEGREE * 4);
        assert_true(queries && truth && batch.degrees && batch.neighbours);
        row_shape_convert(&set.shape, all.data + 20000 * set.shape.raw_bytes, QUERIES, queries);
        for (uint32_t i = 0; i < set.rows; i++) {
            const uint32_t *record = record_at(out.graph, i, DEGREE);

            batch.degrees[i] = record[0];
            memcpy(batch.neighbours + i * DEGREE, record + 1, DEGREE * 4);
        }
        for (uint32_t i = 0; i < QUERIES; i++)
            nearest(&q.space, queries + i * set.shape.stride, UINT32_MAX, 10, truth + i * 10);

        const struct vector_matrix matrix = row_store_matrix(q.store);

        must(vamana_build(&matrix, &insert, q.pool, NULL, &inserted, &err), &err);
        measure(&q, &batch, queries, truth, &ours);
        measure(&q, inserted, queries, truth, &theirs);
        for (uint32_t l = 0; l < LISTS; l++) {
            double wanted = recall_at(&theirs, ours.reads[l]);

            print_message("%s: %.1f rows expanded, recall %.4f; by insertion %.4f\n",
                          element_name(elements[t]), ours.reads[l], ours.recall[l], wanted);
            if (l > 0) /* the first is beyond the other's curve */
                assert_true(ours.recall[l] >= wanted - 0.01);
        }
        graph_free(inserted);
        free(batch.degrees);
        free(batch.neighbours);
        free(queries);
        free(truth);
        quality_close(&q);
        free_outputs(&out);
        set_release(&set);
        set_release(&all);
    }
}

/* ---- memory ---- */

static uint64_t heap_bytes(void)
{
    struct mallinfo2 info = mallinfo2();

    return info.uordblks + info.hblkhd;
}

struct heap_watch {
    _Atomic bool stop;
    uint64_t peak;
};

static void *watch_heap(void *context)
{
    struct heap_watch *watch = context;

    while (!atomic_load(&watch->stop)) {
        uint64_t bytes = heap_bytes();

        watch->peak = bytes > watch->peak ? bytes : watch->peak;
        usleep(200);
    }
    return NULL;
}

static void test_memory_is_what_was_planned(void **state)
{
    struct set set;

    (void)state;
    set_init(&set, KIND_CLUSTERS, METRIC_L2, ELEMENT_U8, 12000, 96);
    set_partition(&set);
    for (int i = 0; i < 4; i++) {
        bool held = i % 2;
        uint32_t workers = i < 2 ? 1 : 3;
        uint64_t planned = leaf_graph_memory_bytes(&set.shape, set.rows, &params, workers, held);
        struct heap_watch watch = {.peak = 0};
        struct row_store *store = NULL;
        struct journal *journal = NULL;
        struct error err = ERROR_INIT;
        struct pool *pool = new_pool(workers);
        pthread_t thread;
        uint64_t before;

        unmake();
        must(journal_open(vfs_posix(), folder, &journal, &err), &err);
        must(row_store_open(vfs_posix(), scratch, &set.shape, set.rows, &store, &err), &err);
        if (held)
            must(row_store_hold(store, pool, &err), &err);
        before = heap_bytes();
        assert_int_equal(
            leaf_graph_make(vfs_posix(), store, &params, planned - 1, journal, pool, NULL, &err),
            -1);
        assert_int_equal(err.code, ERR_BUDGET);
        error_clear(&err);
        assert_int_equal(pthread_create(&thread, NULL, watch_heap, &watch), 0);
        must(leaf_graph_make(vfs_posix(), store, &params, planned, journal, pool, NULL, &err),
             &err);
        atomic_store(&watch.stop, true);
        pthread_join(thread, NULL);
        row_store_close(store);
        journal_close(journal);
        pool_free(pool);
        if (heap_bytes() == 0 || watch.peak <= before)
            continue; /* under a sanitizer nobody counts */
        print_message("%u workers, rows %s: planned %.1f MB, taken %.1f MB\n", workers,
                      held ? "held" : "read", (double)planned / 1e6,
                      (double)(watch.peak - before) / 1e6);
        assert_true(watch.peak - before <= planned);
        assert_true(watch.peak - before >= planned * 6 / 10);
    }
    set_release(&set);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_threads_and_memory_change_no_byte),
        cmocka_unit_test(test_a_cancelled_job_goes_on_where_it_was),
        cmocka_unit_test(test_hostile_sets_make_sound_graphs),
        cmocka_unit_test(test_leaves_may_be_empty_or_hold_nearly_all),
        cmocka_unit_test(test_whatever_call_fails_the_next_attempt_gives_the_same_bytes),
        cmocka_unit_test(test_killed_at_any_time_it_goes_on_to_the_same_bytes),
        cmocka_unit_test(test_damage_to_what_an_interrupted_call_left_is_found),
        cmocka_unit_test(test_lists_hold_the_nearest_rows),
        cmocka_unit_test(test_a_search_finds_as_much_as_in_a_graph_made_by_insertion),
        cmocka_unit_test(test_memory_is_what_was_planned),
    };

    setenv("ANND_COMMIT_SECONDS", "0", 1);
#ifdef __SANITIZE_THREAD__ /* which takes forty times as long; the others add no thread to it */
    cmocka_set_test_filter("*threads*");
#endif
    return cmocka_run_group_tests_name("leaf_graph", tests, make_folder, remove_folder);
}
