/* Checks index/graph_store.c: records come back as written, damage is found, and after
 * graph_store_connect() every row is reached from the entry point, whatever the graph was and
 * wherever an earlier call stopped.
 *
 * graph_store.c is included with small blocks, so that few rows make many passes. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#define READ_PLACES 16u
#include "index/graph_store.c"

#include <errno.h>
#include <stdio.h>
#include <unistd.h>

#include "storage/base/bytes.h"
#include "storage/base/random.h"
#include "tests/support/vfs_fault.h"

#define ROWS_MAX 20000u
#define DIM 2u

static char base[200], folder[256], scratch[300];

static int make_folder(void **state)
{
    const char *root = getenv("TMPDIR");

    (void)state;
    snprintf(base, sizeof base, "%s/annd-graph-XXXXXX", root ? root : "/var/tmp");
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

/* ---- a graph and its rows ---- */

struct fixture {
    uint32_t count;
    uint32_t max_degree;
    uint32_t leaf_rows; /* every third leaf is empty, unless they are of one row */
    uint32_t *records;  /* count of them */
    struct row_shape shape;
};

static void fixture_init(struct fixture *f, uint32_t count, uint32_t max_degree, uint32_t leaf_rows)
{
    *f = (struct fixture){.count = count, .max_degree = max_degree, .leaf_rows = leaf_rows};
    f->records = calloc(count, graph_record_words(max_degree) * sizeof *f->records);
    assert_non_null(f->records);
    row_shape_init(&f->shape, METRIC_L2, ELEMENT_U8, DIM);
}

static uint32_t *record_of(const struct fixture *f, uint32_t place)
{
    return f->records + (uint64_t)place * graph_record_words(f->max_degree);
}

static uint64_t graph_bytes(const struct fixture *f)
{
    return f->count * (uint64_t)graph_record_words(f->max_degree) * sizeof(uint32_t);
}

static void add_edge(struct fixture *f, uint32_t from, uint32_t to)
{
    uint32_t *record = record_of(f, from);

    assert_true(record[0] < f->max_degree && from != to);
    record[1 + record[0]++] = to;
}

/* A row's vector: places count along both dimensions, so that the mean is in the middle; with
 * `middle` that row and no other is the mean. */
static void write_store(const struct fixture *f, uint32_t middle)
{
    uint32_t leaves = (f->count + f->leaf_rows - 1) / f->leaf_rows * 3 / 2 + 1, leaf = 0;
    uint32_t *begins = calloc(leaves + 1, sizeof *begins);
    float *centroids = calloc(leaves * DIM, sizeof *centroids);
    uint64_t bytes = row_store_record_bytes(&f->shape);
    uint8_t *rows = malloc(f->count * bytes);
    char path[FILE_PATH_MAX];
    struct error err = ERROR_INIT;

    assert_true(begins && centroids && rows);
    for (uint32_t i = 0; i < f->count; i++) {
        memset(rows + i * bytes, i == middle ? 100 : i % 2 ? 80 : 120, DIM);
        store_u32(rows + i * bytes + DIM, row_store_crc(&f->shape, i, rows + i * bytes));
    }
    for (uint32_t at = 0; at < f->count; leaf++) {
        begins[leaf] = at;
        centroids[leaf * DIM] = centroids[leaf * DIM + 1] = 100;
        if (leaf % 3 != 1 || f->leaf_rows == 1)
            at = at + f->leaf_rows < f->count ? at + f->leaf_rows : f->count;
    }
    assert_true(leaf <= leaves);
    begins[leaf] = f->count;
    /* The middle row's leaf is the nearest to the mean. */
    for (uint32_t i = 0; i < leaf; i++)
        if (middle < begins[i] || middle >= begins[i + 1])
            centroids[i * DIM] += i % 2 ? 10 : -10;
    assert_int_equal(file_path_join(path, scratch, "rows", NULL), 0);
    if (row_store_write_leaves(vfs_posix(), scratch, &f->shape, f->count, leaf, begins, centroids,
                               &err) < 0 ||
        file_publish(vfs_posix(), path, rows, f->count * bytes, &err) < 0)
        fail_msg("%s", err.message);
    free(begins);
    free(centroids);
    free(rows);
}

/* The folder with a job in it, the rows, and the graph as the scratch file. */
static void begin(const struct fixture *f, uint32_t middle)
{
    struct manifest *asked = manifest_new(MANIFEST_JOB);
    struct journal *journal = NULL;
    struct graph_store *graph = NULL;
    struct error err = ERROR_INIT;
    char path[FILE_PATH_MAX];

    assert_non_null(asked);
    assert_int_equal(file_remove_all(vfs_posix(), folder, NULL), 0);
    if (journal_create(vfs_posix(), folder, asked, &journal, &err) < 0 ||
        journal_scratch_path(journal, "x", path, &err) < 0 ||
        graph_store_open(vfs_posix(), journal, "graph", f->count, f->max_degree, true, &graph,
                         &err) < 0 ||
        graph_store_write(graph, 0, f->count, f->records, &err) < 0)
        fail_msg("%s", err.message);
    graph_store_close(graph);
    journal_close(journal);
    manifest_free(asked);
    write_store(f, middle);
}

struct outcome {
    uint32_t entry_point;
    uint64_t linked;
};

static int connect_on(struct vfs *vfs, const struct fixture *f, struct job *job,
                      struct outcome *out, struct error *err)
{
    struct row_store *store = NULL;
    struct journal *journal = NULL;
    struct graph_store *graph = NULL;
    int rc = -1;

    if (journal_open(vfs, folder, &journal, err) < 0 ||
        row_store_open(vfs, scratch, &f->shape, f->count, &store, err) < 0 ||
        graph_store_open(vfs, journal, "graph", f->count, f->max_degree, false, &graph, err) < 0)
        goto done;
    rc = graph_store_connect(graph, store, journal, NULL, job, &out->linked, err);
    out->entry_point = graph->entry_point;
done:
    graph_store_close(graph);
    row_store_close(store);
    journal_close(journal);
    return rc;
}

static uint32_t *read_graph(const struct fixture *f)
{
    char path[FILE_PATH_MAX];
    uint8_t *data;
    size_t bytes;

    assert_int_equal(file_path_join(path, scratch, "graph", NULL), 0);
    assert_int_equal(file_read_whole(vfs_posix(), path, 1u << 30, &data, &bytes, NULL), 0);
    assert_int_equal(bytes, graph_bytes(f));
    return (uint32_t *)(void *)data;
}

/* How many rows the entry point reaches. */
static uint32_t reached(const struct fixture *f, const uint32_t *records, uint32_t entry)
{
    uint32_t *queue = malloc(f->count * sizeof *queue), head = 0, count = 0;
    uint8_t *seen = calloc(f->count, 1);

    assert_true(queue && seen);
    queue[count++] = entry;
    seen[entry] = 1;
    while (head < count) {
        const uint32_t *record =
            records + (uint64_t)queue[head++] * graph_record_words(f->max_degree);

        for (uint32_t e = 1; e <= record[0]; e++) {
            if (!seen[record[e]]) {
                seen[record[e]] = 1;
                queue[count++] = record[e];
            }
        }
    }
    free(queue);
    free(seen);
    return count;
}

static void check_graph(const struct fixture *f, const uint32_t *records, uint32_t entry)
{
    uint32_t *mark = malloc(f->count * sizeof *mark);

    assert_non_null(mark);
    memset(mark, 0xff, f->count * sizeof *mark);
    for (uint32_t i = 0; i < f->count; i++) {
        const uint32_t *record = records + (uint64_t)i * graph_record_words(f->max_degree);

        assert_true(record[0] <= f->max_degree);
        for (uint32_t e = 1; e <= f->max_degree; e++) {
            if (e > record[0]) {
                assert_int_equal(record[e], 0);
                continue;
            }
            assert_true(record[e] < f->count && record[e] != i);
            assert_int_not_equal(mark[record[e]], i);
            mark[record[e]] = i;
        }
    }
    assert_int_equal(reached(f, records, entry), f->count);
    free(mark);
}

/* Connects the fixture's graph and checks the result. Returns how many rows were linked. */
static uint64_t check_connects(const struct fixture *f, uint32_t middle)
{
    struct error err = ERROR_INIT;
    struct outcome out, again;
    uint32_t *records, *after;

    begin(f, middle);
    if (connect_on(vfs_posix(), f, NULL, &out, &err) < 0)
        fail_msg("%s", err.message);
    assert_int_equal(out.entry_point, middle);
    records = read_graph(f);
    check_graph(f, records, out.entry_point);
    /* Once more: all is done. */
    if (connect_on(vfs_posix(), f, NULL, &again, &err) < 0)
        fail_msg("%s", err.message);
    assert_int_equal(again.entry_point, out.entry_point);
    assert_int_equal(again.linked, out.linked);
    after = read_graph(f);
    assert_memory_equal(after, records, graph_bytes(f));
    free(records);
    free(after);
    return out.linked;
}

/* ---- the file ---- */

static void put(const char *path, const void *data, size_t bytes)
{
    FILE *file = fopen(path, "wb");

    assert_non_null(file);
    assert_int_equal(fwrite(data, 1, bytes, file), bytes);
    assert_int_equal(fclose(file), 0);
}

static void test_records_come_back_as_written_and_damage_is_found(void **state)
{
    struct graph_store *graph = NULL;
    struct journal *journal = NULL;
    struct error err = ERROR_INIT;
    char path[FILE_PATH_MAX];
    struct outcome out;
    struct fixture f;
    uint32_t *records;
    uint8_t *data;

    (void)state;
    fixture_init(&f, 50, 4, 10);
    for (uint32_t i = 0; i < 50; i++)
        for (uint32_t e = 0; e < i % 5; e++)
            add_edge(&f, i, (i + e + 1) % 50);
    begin(&f, 0);
    records = malloc(graph_bytes(&f));
    assert_non_null(records);
    assert_int_equal(journal_open(vfs_posix(), folder, &journal, NULL), 0);
    assert_int_equal(graph_store_open(vfs_posix(), journal, "graph", 50, 4, false, &graph, NULL),
                     0);
    assert_int_equal(graph_store_read(graph, 0, 50, records, &err), 0);
    assert_memory_equal(records, f.records, graph_bytes(&f));
    assert_int_equal(graph_store_read(graph, 49, 1, records, &err), 0);
    assert_memory_equal(records, record_of(&f, 49), graph_record_words(4) * 4);
    assert_int_equal(graph_store_read(graph, 49, 2, records, &err), -1);
    assert_int_equal(err.code, ERR_CORRUPT);
    for (int i = 0; i < 3; i++) {
        uint32_t damaged[6];

        memcpy(damaged, record_of(&f, 33), sizeof damaged);
        if (i < 2)
            damaged[0] = i ? UINT32_MAX : 5;
        else
            damaged[damaged[0]] = 50;
        assert_int_equal(graph_store_write(graph, 33, 1, damaged, NULL), 0);
        error_clear(&err);
        assert_int_equal(graph_store_read(graph, 30, 10, records, &err), -1);
        assert_int_equal(err.code, ERR_CORRUPT);
        assert_non_null(strstr(err.message, "row 33"));
    }
    graph_store_close(graph);
    journal_close(journal);
    /* Any bit. */
    data = (uint8_t *)read_graph(&f);
    assert_int_equal(file_path_join(path, scratch, "graph", NULL), 0);
    for (uint32_t i = 0; i < 10; i++) {
        uint32_t at = (20 + i) * 24 + i;

        memcpy(data + 33 * 24, record_of(&f, 33), 24);
        data[at] ^= (uint8_t)(1u << i % 8);
        put(path, data, graph_bytes(&f));
        error_clear(&err);
        assert_int_equal(connect_on(vfs_posix(), &f, NULL, &out, &err), -1);
        assert_int_equal(err.code, ERR_CORRUPT);
        data[at] ^= (uint8_t)(1u << i % 8);
    }
    /* A record in another's place. */
    memcpy(data + 20 * 24, data + 25 * 24, 24);
    put(path, data, graph_bytes(&f));
    free(data);
    error_clear(&err);
    assert_int_equal(connect_on(vfs_posix(), &f, NULL, &out, &err), -1);
    assert_int_equal(err.code, ERR_CORRUPT);
    free(records);
    free(f.records);
}

static void test_a_graph_in_memory_is_written_with_its_entry_point(void **state)
{
    struct graph_store *store = NULL;
    struct journal *journal = NULL;
    struct error err = ERROR_INIT;
    struct graph graph = {.count = 100, .max_degree = 4, .entry_point = 17};
    struct fixture f;
    uint32_t *records;

    (void)state;
    fixture_init(&f, 100, 6, 10);
    graph.degrees = malloc(100 * 4);
    graph.neighbours = malloc(100 * 4 * 4);
    records = malloc(graph_bytes(&f));
    assert_true(graph.degrees && graph.neighbours && records);
    for (uint32_t i = 0; i < 400; i++)
        graph.neighbours[i] = (i / 4 + 1 + i % 4) % 100;
    for (uint32_t i = 0; i < 100; i++)
        graph.degrees[i] = i % 5;
    begin(&f, 0);
    assert_int_equal(journal_open(vfs_posix(), folder, &journal, NULL), 0);
    assert_int_equal(graph_store_open(vfs_posix(), journal, "graph", 100, 6, true, &store, &err),
                     0);
    assert_int_equal(graph_store_fill(store, &graph, &err), 0);
    assert_int_equal(store->entry_point, 17);
    assert_int_equal(graph_store_read(store, 0, 100, records, &err), 0);
    for (uint32_t i = 0; i < 100; i++) {
        assert_int_equal(records[i * graph_record_words(6)], i % 5);
        assert_memory_equal(records + i * graph_record_words(6) + 1, graph.neighbours + i * 4,
                            i % 5 * 4);
    }
    graph_store_close(store);
    journal_close(journal);
    free(graph.degrees);
    free(graph.neighbours);
    free(records);
    free(f.records);
}

/* ---- connectivity ---- */

static void test_rows_without_any_edge_are_all_linked(void **state)
{
    static const uint32_t counts[] = {1, 2, 6, 7, 100, 999};

    (void)state;
    for (size_t c = 0; c < sizeof counts / sizeof counts[0]; c++) {
        /* Leaves of one row, some, all; the entry point first, in the middle, last. */
        for (uint32_t leaf_rows = 1; leaf_rows <= 1000; leaf_rows *= 10) {
            for (uint32_t at = 0; at < 3; at++) {
                struct fixture f;

                fixture_init(&f, counts[c], 4, leaf_rows);
                assert_int_equal(check_connects(&f, (counts[c] - 1) * at / 2), counts[c] - 1);
                free(f.records);
            }
        }
    }
}

static void test_a_connected_graph_is_left_as_it_is(void **state)
{
    struct fixture f;
    uint32_t *records;

    (void)state;
    /* One chain against the order of places: a step of it a pass, were it not for blocks. */
    fixture_init(&f, 3000, 4, 100);
    for (uint32_t i = 1; i < 3000; i++)
        add_edge(&f, i, i - 1);
    assert_int_equal(check_connects(&f, 2999), 0);
    records = read_graph(&f);
    assert_memory_equal(records, f.records, graph_bytes(&f));
    free(records);
    free(f.records);
}

static void test_rows_full_of_tree_edges_keep_them(void **state)
{
    struct fixture f;

    (void)state;
    /* A full tree over the first 5/6 of all rows; the rest point at its root and at inner nodes,
     * which have nothing to spare, and some of them hang together. */
    fixture_init(&f, 6000, 4, 128);
    for (uint32_t i = 1; i < 5000; i++)
        add_edge(&f, (i - 1) / 4, i);
    for (uint32_t i = 5000; i < 6000; i++) {
        add_edge(&f, i, 0);
        add_edge(&f, i, 1 + i % 999);
        if (i % 10)
            add_edge(&f, i, i - 1);
    }
    assert_int_equal(check_connects(&f, 0), 1000);
    free(f.records);
}

static void test_edges_nothing_hangs_on_give_way(void **state)
{
    struct random random;
    struct fixture f;

    (void)state;
    /* Full rows in cliques of five: links have to take edges' places. */
    fixture_init(&f, 2000, 4, 50);
    for (uint32_t i = 0; i < 2000; i++)
        for (uint32_t e = 1; e < 5; e++)
            add_edge(&f, i, i / 5 * 5 + (i + e) % 5);
    assert_int_equal(check_connects(&f, 1003), 399);
    free(f.records);
    /* Random edges among few rows, which point at nothing else. */
    random_init(&random, 1, 2);
    fixture_init(&f, 5000, 8, 64);
    for (uint32_t i = 0; i < 5000; i++)
        for (uint32_t e = 0; e < 8; e++) {
            uint32_t to = (uint32_t)random_below(&random, 50) * 8 + e;

            if (to != i)
                add_edge(&f, i, to);
        }
    assert_true(check_connects(&f, 4999) >= 4500);
    free(f.records);
}

static void test_many_lost_rows_take_no_time_each(void **state)
{
    struct fixture f;

    (void)state;
    /* Copies of one vector: all point at the first, in one leaf. */
    fixture_init(&f, ROWS_MAX, 4, ROWS_MAX);
    for (uint32_t i = 1; i < ROWS_MAX; i++)
        add_edge(&f, i, 0);
    for (uint32_t i = 1; i < 5; i++)
        add_edge(&f, 0, i);
    assert_int_equal(check_connects(&f, 0), ROWS_MAX - 5);
    free(f.records);
}

/* ---- interruptions ---- */

static void cliques(struct fixture *f)
{
    fixture_init(f, 300, 4, 20);
    for (uint32_t i = 0; i < 300; i++)
        for (uint32_t e = 1; e < 5; e++)
            add_edge(f, i, i / 5 * 5 + (i + e) % 5);
}

static void test_whatever_call_fails_the_next_attempt_gives_the_same_graph(void **state)
{
    static const enum vfs_effect effects[] = {VFS_EFFECT_ERRNO, VFS_EFFECT_TEAR_ERRNO};
    struct vfs_fault fault;
    struct outcome want, got;
    struct fixture f;
    uint32_t *wanted;
    uint64_t calls;

    (void)state;
    cliques(&f);
    vfs_fault_init(&fault, vfs_posix());
    begin(&f, 150);
    vfs_fault_plan(&fault, NULL);
    assert_int_equal(connect_on(&fault.vfs, &f, NULL, &want, NULL), 0);
    calls = vfs_fault_calls(&fault, VFS_CALL_ANY);
    wanted = read_graph(&f);
    check_graph(&f, wanted, want.entry_point);
    for (int e = 0; e < 2; e++) {
        for (uint64_t nth = 1; nth <= calls; nth += 1 + calls / 60) {
            const struct vfs_fault_plan plan = {.nth = nth,
                                                .for_ever = true,
                                                .effect = effects[e],
                                                .call = e ? VFS_CALL_WRITE : VFS_CALL_ANY,
                                                .errno_value = EIO};
            struct error err = ERROR_INIT;
            uint32_t *records;

            begin(&f, 150);
            vfs_fault_plan(&fault, &plan);
            if (connect_on(&fault.vfs, &f, NULL, &got, &err) == 0 && vfs_fault_fired(&fault) == 0)
                break;
            vfs_fault_plan(&fault, NULL);
            error_clear(&err);
            if (connect_on(&fault.vfs, &f, NULL, &got, &err) < 0)
                fail_msg("after call %lu failed: %s", (unsigned long)nth, err.message);
            assert_int_equal(got.linked, want.linked);
            assert_int_equal(got.entry_point, want.entry_point);
            records = read_graph(&f);
            assert_memory_equal(records, wanted, graph_bytes(&f));
            free(records);
        }
    }
    assert_int_equal(vfs_fault_files_open(&fault), 0);
    vfs_fault_release(&fault);
    free(wanted);
    free(f.records);
}

static void test_a_cancelled_job_stops_and_goes_on(void **state)
{
    struct job *job = job_new(NULL, NULL);
    struct error err = ERROR_INIT;
    struct outcome out;
    struct fixture f;
    uint32_t *records;

    (void)state;
    assert_non_null(job);
    cliques(&f);
    begin(&f, 150);
    job_cancel(job);
    assert_int_equal(connect_on(vfs_posix(), &f, job, &out, &err), -1);
    assert_int_equal(err.code, ERR_CANCELLED);
    error_clear(&err);
    assert_int_equal(connect_on(vfs_posix(), &f, NULL, &out, &err), 0);
    records = read_graph(&f);
    check_graph(&f, records, out.entry_point);
    free(records);
    job_free(job);
    free(f.records);
}

static void test_damaged_patches_never_reach_the_graph(void **state)
{
    char path[FILE_PATH_MAX];
    struct error err = ERROR_INIT;
    struct outcome out;
    struct fixture f;
    uint32_t *records, *wanted;
    uint8_t *data;
    size_t bytes;

    (void)state;
    cliques(&f);
    begin(&f, 150);
    assert_int_equal(connect_on(vfs_posix(), &f, NULL, &out, &err), 0);
    wanted = read_graph(&f);
    assert_int_equal(file_path_join(path, scratch, "patches", NULL), 0);
    assert_int_equal(file_read_whole(vfs_posix(), path, 1u << 30, &data, &bytes, NULL), 0);
    for (size_t at = 0; at < bytes; at += 4) {
        uint32_t saved = load_u32(data + at);

        store_u32(data + at, 300); /* a place, a degree or a neighbour that cannot be */
        put(path, data, bytes);
        error_clear(&err);
        assert_int_equal(connect_on(vfs_posix(), &f, NULL, &out, &err), -1);
        assert_int_equal(err.code, ERR_CORRUPT);
        store_u32(data + at, saved);
    }
    put(path, data, bytes - 1);
    error_clear(&err);
    assert_int_equal(connect_on(vfs_posix(), &f, NULL, &out, &err), -1);
    assert_int_equal(err.code, ERR_CORRUPT);
    records = read_graph(&f);
    assert_memory_equal(records, wanted, graph_bytes(&f));
    free(records);
    free(wanted);
    free(data);
    free(f.records);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_records_come_back_as_written_and_damage_is_found),
        cmocka_unit_test(test_a_graph_in_memory_is_written_with_its_entry_point),
        cmocka_unit_test(test_rows_without_any_edge_are_all_linked),
        cmocka_unit_test(test_a_connected_graph_is_left_as_it_is),
        cmocka_unit_test(test_rows_full_of_tree_edges_keep_them),
        cmocka_unit_test(test_edges_nothing_hangs_on_give_way),
        cmocka_unit_test(test_many_lost_rows_take_no_time_each),
        cmocka_unit_test(test_whatever_call_fails_the_next_attempt_gives_the_same_graph),
        cmocka_unit_test(test_a_cancelled_job_stops_and_goes_on),
        cmocka_unit_test(test_damaged_patches_never_reach_the_graph),
    };

    return cmocka_run_group_tests_name("graph_store", tests, make_folder, remove_folder);
}
