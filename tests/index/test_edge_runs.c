/* Checks index/edge_runs.c: every edge comes back once, in its range and in order, whatever was
 * flushed when; what is beyond a commit is forgotten; damage is found.
 *
 * edge_runs.c is included with small blocks and ranges, so that few edges fill many of them. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#define BLOCK_EDGES 32u
#define EDGE_RUNS_RANGE 100u
#include "index/edge_runs.c"

#include <errno.h>
#include <unistd.h>

#include "storage/base/random.h"
#include "tests/support/vfs_fault.h"

#define ROWS 950u
#define EDGES 20000u

static char base[200], path[256];

static int make_folder(void **state)
{
    const char *root = getenv("TMPDIR");

    (void)state;
    snprintf(base, sizeof base, "%s/annd-edges-XXXXXX", root ? root : "/var/tmp");
    if (!mkdtemp(base))
        return -1;
    snprintf(path, sizeof path, "%s/edges", base);
    return 0;
}

static int remove_folder(void **state)
{
    (void)state;
    return file_remove_all(vfs_posix(), base, NULL);
}

static struct edge *new_edges(void)
{
    struct edge *edges = malloc(EDGES * sizeof *edges);
    struct random random;

    assert_non_null(edges);
    random_init(&random, 7, 1);
    for (uint32_t i = 0; i < EDGES; i++) {
        edges[i].from = i * ROWS / EDGES;
        do /* most go to the first range, none to the third */
            edges[i].to = (uint32_t)random_below(&random, random_below(&random, 3) ? 100 : ROWS);
        while (edges[i].to == edges[i].from || edges[i].to / 100 == 2);
    }
    return edges;
}

struct expect {
    const struct edge *edges;
    uint32_t count; /* of all edges */
    uint32_t range;
    uint32_t next;
    uint32_t got;
};

static void compare(void *context, const struct edge *edges, uint32_t count)
{
    struct expect *e = context;

    for (uint32_t i = 0; i < count; i++) {
        while (e->next < e->count && e->edges[e->next].to / EDGE_RUNS_RANGE != e->range)
            e->next++;
        assert_true(e->next < e->count);
        assert_int_equal(edges[i].to, e->edges[e->next].to);
        assert_int_equal(edges[i].from, e->edges[e->next].from);
        e->next++;
        e->got++;
    }
}

/* All ranges hold the first `count` edges. */
static void check(const struct edge_runs *runs, const struct edge *edges, uint32_t count)
{
    struct error err = ERROR_INIT;
    uint32_t got = 0;

    assert_int_equal(edge_runs_range_count(runs), 10);
    for (uint32_t range = 0; range < 10; range++) {
        struct expect expect = {.edges = edges, .count = count, .range = range};

        if (edge_runs_read(runs, range, compare, &expect, &err) < 0)
            fail_msg("%s", err.message);
        assert_true(range != 2 || expect.got == 0);
        got += expect.got;
    }
    assert_int_equal(got, count);
}

static struct edge_runs *open_runs(struct vfs *vfs, uint64_t blocks, struct error *err)
{
    struct edge_runs *runs = NULL;

    if (edge_runs_open(vfs, path, ROWS, blocks, &runs, err) < 0)
        assert_null(runs);
    return runs;
}

static int add(struct edge_runs *runs, const struct edge *edges, uint32_t begin, uint32_t end,
               struct error *err)
{
    for (uint32_t i = begin; i < end; i++)
        if (edge_runs_add(runs, edges[i].to, edges[i].from, err) < 0)
            return -1;
    return 0;
}

static void test_every_edge_comes_back_once_in_its_range(void **state)
{
    struct edge *edges = new_edges();
    struct edge_runs *runs = open_runs(vfs_posix(), 0, NULL);
    uint64_t blocks;

    (void)state;
    assert_non_null(runs);
    assert_int_equal(edge_runs_flush(runs, &blocks, NULL), 0);
    assert_int_equal(blocks, 0);
    check(runs, edges, 0);
    assert_int_equal(add(runs, edges, 0, EDGES, NULL), 0);
    assert_int_equal(edge_runs_flush(runs, &blocks, NULL), 0);
    check(runs, edges, EDGES);
    edge_runs_close(runs);
    runs = open_runs(vfs_posix(), blocks, NULL);
    assert_non_null(runs);
    check(runs, edges, EDGES);
    edge_runs_close(runs);
    free(edges);
}

static void test_what_no_flush_spoke_of_is_forgotten(void **state)
{
    struct edge *edges = new_edges();
    uint64_t blocks = 0;
    uint32_t done = 0;

    (void)state;
    while (done < EDGES) {
        struct edge_runs *runs = open_runs(vfs_posix(), blocks, NULL);
        uint32_t until = done + 1 + done / 3;

        until = until < EDGES ? until : EDGES;
        assert_non_null(runs);
        check(runs, edges, done);
        assert_int_equal(add(runs, edges, done, until, NULL), 0);
        assert_int_equal(edge_runs_flush(runs, &blocks, NULL), 0);
        /* More, a part of which is written, and flushed without anyone being told. */
        assert_int_equal(add(runs, edges, until / 2, until, NULL), 0);
        if (done % 2) {
            uint64_t untold;

            assert_int_equal(edge_runs_flush(runs, &untold, NULL), 0);
        }
        edge_runs_close(runs);
        done = until;
    }
    struct edge_runs *runs = open_runs(vfs_posix(), blocks, NULL);

    assert_non_null(runs);
    check(runs, edges, EDGES);
    edge_runs_close(runs);
    /* A new one does not mind what stands there. */
    runs = open_runs(vfs_posix(), 0, NULL);
    assert_non_null(runs);
    check(runs, edges, 0);
    edge_runs_close(runs);
    free(edges);
}

static int run(struct vfs *vfs, const struct edge *edges, uint64_t *blocks, uint32_t *done,
               struct error *err)
{
    struct edge_runs *runs = open_runs(vfs, *blocks, err);
    int rc = runs ? 0 : -1;

    while (rc == 0 && *done < EDGES) {
        uint32_t until = *done + 4000 < EDGES ? *done + 4000 : EDGES;
        uint64_t flushed;

        rc = add(runs, edges, *done, until, err);
        if (rc == 0)
            rc = edge_runs_flush(runs, &flushed, err);
        if (rc == 0) {
            *blocks = flushed;
            *done = until;
        }
    }
    if (rc == 0)
        for (uint32_t range = 0; range < 10 && rc == 0; range++) {
            struct expect expect = {.edges = edges, .count = EDGES, .range = range};

            rc = edge_runs_read(runs, range, compare, &expect, err);
        }
    edge_runs_close(runs);
    return rc;
}

static void test_whatever_call_fails_the_next_attempt_goes_on(void **state)
{
    static const int errnos[] = {EIO, ENOSPC};
    struct edge *edges = new_edges();
    struct vfs_fault fault;
    uint64_t calls, blocks = 0;
    uint32_t done = 0;

    (void)state;
    vfs_fault_init(&fault, vfs_posix());
    assert_int_equal(run(&fault.vfs, edges, &blocks, &done, NULL), 0);
    calls = vfs_fault_calls(&fault, VFS_CALL_ANY);
    for (uint64_t nth = 1; nth <= calls; nth += 1 + calls / 100) {
        struct vfs_fault_plan plan = {.nth = nth, .for_ever = true, .errno_value = errnos[nth % 2]};
        struct error err = ERROR_INIT;
        struct edge_runs *runs;

        if (nth % 3 == 0) {
            plan.effect = VFS_EFFECT_TEAR_ERRNO;
            plan.call = VFS_CALL_WRITE;
            plan.nth = 1 + nth / 2;
        }
        blocks = done = 0;
        vfs_fault_plan(&fault, &plan);
        if (run(&fault.vfs, edges, &blocks, &done, &err) < 0) {
            assert_true(err.code == ERR_IO || err.code == ERR_NO_SPACE);
            assert_true(err.code == (plan.errno_value == EIO ? ERR_IO : ERR_NO_SPACE));
        } else { /* only closing was left to fail */
            assert_int_equal(done, EDGES);
        }
        vfs_fault_plan(&fault, NULL);
        error_clear(&err);
        if (run(&fault.vfs, edges, &blocks, &done, &err) < 0)
            fail_msg("after call %lu failed: %s", (unsigned long)nth, err.message);
        runs = open_runs(vfs_posix(), blocks, NULL);
        assert_non_null(runs);
        check(runs, edges, EDGES);
        edge_runs_close(runs);
    }
    assert_int_equal(vfs_fault_files_open(&fault), 0);
    vfs_fault_release(&fault);
    free(edges);
}

/* ---- damage ---- */

static void ignore(void *context, const struct edge *edges, uint32_t count)
{
    uint64_t *sum = context;

    for (uint32_t i = 0; i < count; i++) {
        assert_true(edges[i].to < ROWS && edges[i].from < ROWS);
        *sum += edges[i].to;
    }
}

static enum error_code read_code(uint64_t blocks)
{
    struct error err = ERROR_INIT;
    struct edge_runs *runs = open_runs(vfs_posix(), blocks, &err);
    uint64_t sum = 0;

    for (uint32_t range = 0; runs && range < 10; range++)
        if (edge_runs_read(runs, range, ignore, &sum, &err) < 0)
            break;
    edge_runs_close(runs);
    return err.code;
}

static void put(const char *name, const void *data, size_t bytes)
{
    FILE *file = fopen(name, "wb");

    assert_non_null(file);
    assert_int_equal(fwrite(data, 1, bytes, file), bytes);
    assert_int_equal(fclose(file), 0);
}

static void test_damage_is_found(void **state)
{
    struct edge *edges = new_edges();
    struct edge_runs *runs = open_runs(vfs_posix(), 0, NULL);
    uint8_t *file, *table;
    size_t file_bytes, table_bytes;
    char table_path[300];
    uint64_t blocks;

    (void)state;
    snprintf(table_path, sizeof table_path, "%s.table", path);
    assert_non_null(runs);
    assert_int_equal(add(runs, edges, 0, 1000, NULL), 0);
    assert_int_equal(edge_runs_flush(runs, &blocks, NULL), 0);
    edge_runs_close(runs);
    assert_int_equal(read_code(blocks), ERR_NONE);
    assert_int_equal(file_read_whole(vfs_posix(), path, 1 << 30, &file, &file_bytes, NULL), 0);
    assert_int_equal(file_read_whole(vfs_posix(), table_path, 1 << 30, &table, &table_bytes, NULL),
                     0);
    assert_int_equal(file_bytes, blocks * BLOCK_BYTES);
    assert_int_equal(table_bytes, blocks * sizeof(struct block_entry));
    assert_int_equal(read_code(blocks + 1), ERR_CORRUPT);
    put(table_path, table, table_bytes - 1);
    assert_int_equal(read_code(blocks), ERR_CORRUPT);
    put(table_path, table, 0);
    assert_int_equal(read_code(blocks), ERR_CORRUPT);
    put(table_path, table, table_bytes);
    put(path, file, file_bytes - 1);
    assert_int_equal(read_code(blocks), ERR_CORRUPT);
    put(path, file, file_bytes);
    assert_int_equal(read_code(blocks), ERR_NONE);
    for (size_t i = 0; i < table_bytes; i += 3) {
        table[i] ^= (uint8_t)(1u << i % 8);
        put(table_path, table, table_bytes);
        assert_int_equal(read_code(blocks), ERR_CORRUPT);
        table[i] ^= (uint8_t)(1u << i % 8);
    }
    put(table_path, table, table_bytes);
    for (size_t i = 0; i < 100; i++) { /* in the first edges of blocks: others may be unused */
        size_t at = i % blocks * BLOCK_BYTES + i % 8;

        file[at] ^= (uint8_t)(1u << i % 7);
        put(path, file, file_bytes);
        assert_int_equal(read_code(blocks), ERR_CORRUPT);
        file[at] ^= (uint8_t)(1u << i % 7);
    }
    put(path, file, file_bytes);
    assert_int_equal(read_code(blocks), ERR_NONE);
    free(file);
    free(table);
    free(edges);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_edge_comes_back_once_in_its_range),
        cmocka_unit_test(test_what_no_flush_spoke_of_is_forgotten),
        cmocka_unit_test(test_whatever_call_fails_the_next_attempt_goes_on),
        cmocka_unit_test(test_damage_is_found),
    };

    return cmocka_run_group_tests_name("edge_runs", tests, make_folder, remove_folder);
}
