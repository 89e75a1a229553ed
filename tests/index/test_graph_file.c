/* Tests of index/graph_file.c: a graph comes back as it was or not at all, whatever part of the
 * file is damaged and whichever call fails. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "index/graph_file.h"
#include "storage/base/bytes.h"
#include "storage/base/random.h"
#include "storage/file.h"
#include "tests/support/vfs_fault.h"

#define SEED 20261121u
#define BLOCK 4096u
#define PAYLOAD 4092u

static char folder[256];
static char path[300];
static const uint8_t key[DIGEST_BYTES] = {1, 2, 3, 250};

static int make_folder(void **state)
{
    const char *base = getenv("TMPDIR");

    (void)state;
    snprintf(folder, sizeof folder, "%s/annd-graph-XXXXXX", base ? base : "/var/tmp");
    if (!mkdtemp(folder))
        return -1;
    snprintf(path, sizeof path, "%s/graph", folder);
    return 0;
}

static int remove_folder(void **state)
{
    (void)state;
    return file_remove_all(vfs_posix(), folder, NULL);
}

/* Row i has i % (max_degree + 1) neighbours, or as many as there are other rows. */
static struct graph *sample(uint32_t count, uint32_t max_degree)
{
    struct graph *graph = calloc(1, sizeof *graph);
    struct random random;

    assert_non_null(graph);
    *graph = (struct graph){.count = count, .max_degree = max_degree, .entry_point = count / 2};
    graph->degrees = calloc(count, sizeof *graph->degrees);
    graph->neighbours = calloc((size_t)count * max_degree, sizeof *graph->neighbours);
    assert_non_null(graph->degrees);
    assert_non_null(graph->neighbours);
    random_init(&random, SEED, count);
    for (uint32_t row = 0; row < count; row++) {
        uint32_t from = (uint32_t)random_below(&random, count);
        uint32_t degree = row % (max_degree + 1);

        for (uint32_t i = 0; i < count && graph->degrees[row] < degree; i++) {
            uint32_t to = (from + i) % count;

            if (to != row)
                graph->neighbours[(size_t)row * max_degree + graph->degrees[row]++] = to;
        }
    }
    return graph;
}

static void write_graph(const struct graph *graph)
{
    struct error err = ERROR_INIT;

    if (graph_file_write(vfs_posix(), path, graph, key, &err) < 0)
        fail_msg("%s", err.message);
}

static void assert_same(const struct graph *a, const struct graph *b)
{
    assert_int_equal(a->count, b->count);
    assert_int_equal(a->max_degree, b->max_degree);
    assert_int_equal(a->entry_point, b->entry_point);
    assert_memory_equal(a->degrees, b->degrees, a->count * sizeof *a->degrees);
    assert_memory_equal(a->neighbours, b->neighbours,
                        (size_t)a->count * a->max_degree * sizeof *a->neighbours);
}

/* ERR_NONE if the file holds exactly `want`. */
static enum error_code read_code(struct vfs *vfs, const struct graph *want)
{
    struct error err = ERROR_INIT;
    struct graph *graph = NULL;
    int rc = graph_file_read(vfs, path, key, &graph, &err);

    assert_int_equal(rc == 0, graph != NULL);
    assert_int_equal(rc == 0, err.code == ERR_NONE);
    if (graph)
        assert_same(graph, want);
    else
        assert_non_null(strstr(err.message, path));
    graph_free(graph);
    return err.code;
}

static void read_bytes(uint8_t **data, size_t *bytes)
{
    struct error err = ERROR_INIT;

    if (file_read_whole(vfs_posix(), path, 1 << 28, data, bytes, &err) < 0)
        fail_msg("%s", err.message);
}

/* Overwrites the file: without the syncs of publishing, since it is done some thousand times. */
static void put_bytes(const uint8_t *data, size_t bytes)
{
    FILE *file = fopen(path, "wb");

    assert_non_null(file);
    assert_int_equal(fwrite(data, 1, bytes, file), bytes);
    assert_int_equal(fclose(file), 0);
}

static void mend_block(uint8_t *data, uint64_t block)
{
    uint8_t number[8];
    uint32_t crc = crc32c(0, key, sizeof key);

    if (block == 0) {
        store_u32(data + 12, 0);
        store_u32(data + 12, crc32c(0, data, BLOCK));
        return;
    }
    store_u64(number, block);
    crc = crc32c(crc32c(crc, number, sizeof number), data + block * BLOCK, PAYLOAD);
    store_u32(data + block * BLOCK + PAYLOAD, crc);
}

static void test_graphs_of_many_sizes_come_back_as_they_were(void **state)
{
    static const uint32_t sizes[][2] = {{1, 1},    {2, 4},     {3, 256},  {2046, 1},
                                        {2047, 4}, {2048, 64}, {2049, 7}, {9000, 64}};

    (void)state;
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        struct graph *graph = sample(sizes[i][0], sizes[i][1]);

        write_graph(graph);
        assert_int_equal(read_code(vfs_posix(), graph), ERR_NONE);
        graph_free(graph);
    }
}

static void test_a_missing_file_is_not_found(void **state)
{
    struct error err = ERROR_INIT;
    struct graph *graph;

    (void)state;
    assert_int_equal(
        graph_file_read(vfs_posix(), "/var/tmp/annd-no-such-folder/graph", key, &graph, &err), -1);
    assert_int_equal(err.code, ERR_NOT_FOUND);
    assert_null(graph);
}

static void test_another_key_is_refused_and_both_are_named(void **state)
{
    struct graph *graph = sample(30, 4), *found;
    uint8_t other[DIGEST_BYTES] = {0xab, 0xcd};
    struct error err = ERROR_INIT;

    (void)state;
    write_graph(graph);
    assert_int_equal(graph_file_read(vfs_posix(), path, other, &found, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
    assert_non_null(strstr(err.message, "010203fa0000"));
    assert_non_null(strstr(err.message, "abcd0000"));
    assert_null(found);
    graph_free(graph);
}

static void test_no_damaged_byte_goes_unseen(void **state)
{
    struct graph *graph = sample(700, 4);
    size_t bytes;
    uint8_t *data;

    (void)state;
    write_graph(graph);
    read_bytes(&data, &bytes);
    assert_int_equal(bytes, 3 * BLOCK);
    for (size_t i = 0; i < bytes; i++) {
        uint8_t flip = (uint8_t)(1u << i % 8);

        data[i] ^= flip;
        put_bytes(data, bytes);
        if (read_code(vfs_posix(), graph) != ERR_CORRUPT)
            fail_msg("byte %zu", i);
        data[i] ^= flip;
    }
    put_bytes(data, bytes);
    assert_int_equal(read_code(vfs_posix(), graph), ERR_NONE);
    free(data);
    graph_free(graph);
}

static void test_a_file_cut_short_or_made_longer_is_corrupt(void **state)
{
    struct graph *graph = sample(700, 4);
    size_t bytes;
    uint8_t *data, *longer;

    (void)state;
    write_graph(graph);
    read_bytes(&data, &bytes);
    for (size_t cut = 0; cut < bytes; cut += cut % 100 == 0 ? 95 : 1) {
        put_bytes(data, cut);
        assert_int_equal(read_code(vfs_posix(), graph), ERR_CORRUPT);
    }
    longer = calloc(1, bytes + BLOCK);
    assert_non_null(longer);
    memcpy(longer, data, bytes);
    put_bytes(longer, bytes + 1);
    assert_int_equal(read_code(vfs_posix(), graph), ERR_CORRUPT);
    put_bytes(longer, bytes + BLOCK);
    assert_int_equal(read_code(vfs_posix(), graph), ERR_CORRUPT);
    free(longer);
    free(data);
    graph_free(graph);
}

static void test_a_block_in_another_place_is_corrupt(void **state)
{
    struct graph *graph = sample(3000, 4);
    uint8_t *data, held[BLOCK];
    size_t bytes;

    (void)state;
    write_graph(graph);
    read_bytes(&data, &bytes);
    assert_true(bytes >= 6 * BLOCK);
    memcpy(held, data + 3 * BLOCK, BLOCK);
    memcpy(data + 3 * BLOCK, data + 4 * BLOCK, BLOCK);
    memcpy(data + 4 * BLOCK, held, BLOCK);
    put_bytes(data, bytes);
    assert_int_equal(read_code(vfs_posix(), graph), ERR_CORRUPT);
    free(data);
    graph_free(graph);
}

/* Checksums right, numbers wrong: from a writer that is broken or hostile. */
static void test_impossible_numbers_are_corrupt_though_their_checksums_fit(void **state)
{
    static const struct {
        uint32_t at;
        uint32_t bytes;
        uint64_t value;
    } changes[] = {
        {16, 8, 7 * BLOCK},              /* length */
        {16, 8, UINT64_MAX},             /* */
        {24, 8, 1},                      /* edges */
        {24, 8, UINT64_MAX},             /* */
        {32, 4, 0},                      /* rows */
        {32, 4, UINT32_MAX},             /* */
        {32, 4, 699},                    /* */
        {36, 4, 0},                      /* degree */
        {36, 4, 3},                      /* */
        {36, 4, 257},                    /* */
        {40, 4, 700},                    /* entry point */
        {44, 4, 1},                      /* reserved */
        {80, 1, 1},                      /* header's zeros */
        {BLOCK - 1, 1, 1},               /* */
        {BLOCK, 2, 5},                   /* a degree */
        {BLOCK, 2, 1},                   /* the sum of degrees */
        {BLOCK + 1400, 4, 700},          /* row 1's neighbour: none such, */
        {BLOCK + 1400, 4, 1},            /* itself; */
        {2 * BLOCK + PAYLOAD - 1, 1, 9}, /* zeros at the end */
    };
    struct graph *graph = sample(700, 4);
    uint8_t *data, *work;
    size_t bytes;

    (void)state;
    write_graph(graph);
    read_bytes(&data, &bytes);
    assert_int_equal(bytes, 3 * BLOCK);
    work = malloc(bytes);
    assert_non_null(work);
    for (size_t i = 0; i < sizeof changes / sizeof changes[0]; i++) {
        memcpy(work, data, bytes);
        memcpy(work + changes[i].at, &changes[i].value, changes[i].bytes);
        mend_block(work, changes[i].at / BLOCK);
        put_bytes(work, bytes);
        if (read_code(vfs_posix(), graph) != ERR_CORRUPT)
            fail_msg("change %zu", i);
    }
    /* Row 2 names one row twice. */
    memcpy(work, data, bytes);
    memcpy(work + BLOCK + 1408, work + BLOCK + 1404, 4);
    mend_block(work, 1);
    put_bytes(work, bytes);
    assert_int_equal(read_code(vfs_posix(), graph), ERR_CORRUPT);
    free(work);
    free(data);
    graph_free(graph);
}

static void test_a_newer_version_is_unsupported(void **state)
{
    struct graph *graph = sample(10, 4);
    size_t bytes;
    uint8_t *data;

    (void)state;
    write_graph(graph);
    read_bytes(&data, &bytes);
    store_u32(data + 8, 2);
    mend_block(data, 0);
    put_bytes(data, bytes);
    assert_int_equal(read_code(vfs_posix(), graph), ERR_UNSUPPORTED);
    free(data);
    graph_free(graph);
}

static void test_graphs_that_could_not_be_read_are_not_written(void **state)
{
    struct error err = ERROR_INIT;

    (void)state;
    for (uint32_t wrong = 0; wrong < 5; wrong++) {
        struct graph *graph = sample(10, 4);

        if (wrong == 0)
            graph->entry_point = 10;
        else if (wrong == 1)
            graph->degrees[3] = 5;
        else if (wrong == 2)
            graph->neighbours[4 * 4] = 10;
        else if (wrong == 3)
            graph->neighbours[3 * 4] = 3;
        else
            graph->neighbours[3 * 4] = graph->neighbours[3 * 4 + 1];
        assert_int_equal(graph_file_write(vfs_posix(), path, graph, key, &err), -1);
        assert_int_equal(err.code, ERR_INVALID);
        error_clear(&err);
        graph_free(graph);
    }
}

static void test_whichever_call_fails_the_file_is_the_old_or_the_new(void **state)
{
    static const int errnos[] = {EIO, ENOSPC, EINTR, EACCES};
    struct graph *old = sample(500, 4), *new = sample(2000, 4);
    struct vfs_fault fault;
    uint64_t calls;

    (void)state;
    vfs_fault_init(&fault, vfs_posix());
    assert_int_equal(graph_file_write(&fault.vfs, path, new, key, NULL), 0);
    calls = vfs_fault_calls(&fault, VFS_CALL_ANY);
    assert_true(calls > 6);
    for (uint64_t nth = 1; nth <= calls; nth++) {
        for (size_t e = 0; e < sizeof errnos / sizeof errnos[0]; e++) {
            struct error err = ERROR_INIT;
            struct graph *found = NULL;
            int rc;

            vfs_fault_plan(&fault, NULL);
            write_graph(old);
            vfs_fault_plan(&fault, &(struct vfs_fault_plan){.nth = nth, .errno_value = errnos[e]});
            rc = graph_file_write(&fault.vfs, path, new, key, &err);
            assert_int_equal(rc == 0, err.code == ERR_NONE);
            vfs_fault_plan(&fault, NULL);
            assert_int_equal(graph_file_read(vfs_posix(), path, key, &found, NULL), 0);
            if (rc == 0)
                assert_int_equal(found->count, new->count);
            assert_same(found, found->count == old->count ? old : new);
            graph_free(found);
            assert_int_equal(vfs_fault_files_open(&fault), 0);
        }
    }
    vfs_fault_release(&fault);
    graph_free(old);
    graph_free(new);
}

static void test_short_reads_are_resumed_and_failed_ones_reported(void **state)
{
    struct graph *graph = sample(6000, 64);
    struct vfs_fault fault;
    uint64_t calls;

    (void)state;
    write_graph(graph);
    vfs_fault_init(&fault, vfs_posix());
    assert_int_equal(read_code(&fault.vfs, graph), ERR_NONE);
    calls = vfs_fault_calls(&fault, VFS_CALL_READ);
    assert_true(calls > 1);
    for (uint64_t nth = 1; nth <= calls; nth++) {
        struct vfs_fault_plan plan = {.call = VFS_CALL_READ, .nth = nth};

        plan.effect = VFS_EFFECT_SHORT;
        vfs_fault_plan(&fault, &plan);
        assert_int_equal(read_code(&fault.vfs, graph), ERR_NONE);
        plan.effect = VFS_EFFECT_ERRNO;
        plan.errno_value = EIO;
        vfs_fault_plan(&fault, &plan);
        assert_int_equal(read_code(&fault.vfs, graph), ERR_IO);
        plan.effect = VFS_EFFECT_FLIP;
        plan.bit = nth * 7919;
        vfs_fault_plan(&fault, &plan);
        assert_int_equal(read_code(&fault.vfs, graph), ERR_CORRUPT);
    }
    assert_int_equal(vfs_fault_files_open(&fault), 0);
    vfs_fault_release(&fault);
    graph_free(graph);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_graphs_of_many_sizes_come_back_as_they_were),
        cmocka_unit_test(test_a_missing_file_is_not_found),
        cmocka_unit_test(test_another_key_is_refused_and_both_are_named),
        cmocka_unit_test(test_no_damaged_byte_goes_unseen),
        cmocka_unit_test(test_a_file_cut_short_or_made_longer_is_corrupt),
        cmocka_unit_test(test_a_block_in_another_place_is_corrupt),
        cmocka_unit_test(test_impossible_numbers_are_corrupt_though_their_checksums_fit),
        cmocka_unit_test(test_a_newer_version_is_unsupported),
        cmocka_unit_test(test_graphs_that_could_not_be_read_are_not_written),
        cmocka_unit_test(test_whichever_call_fails_the_file_is_the_old_or_the_new),
        cmocka_unit_test(test_short_reads_are_resumed_and_failed_ones_reported),
    };

    return cmocka_run_group_tests_name("graph_file", tests, make_folder, remove_folder);
}
