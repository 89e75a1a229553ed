/* index/rows: records and keys through a real segment, and sections that lie with valid checksums.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zstd.h>

#include "index/rows.h"
#include "storage/base/bytes.h"
#include "storage/file.h"

#define ROW_COUNT 20000u
#define RUN_ENTRIES 341u

static char folder[] = "/var/tmp/annd_test_rows_XXXXXX";
static char path[sizeof folder + 16];

struct opened {
    struct segment *segment;
    struct reader *reader;
};

static void must(int rc, const struct error *err)
{
    if (rc < 0)
        fail_msg("%s: %s", error_code_name(err->code), err->message);
}

static struct segment_writer *begin(const char *section, enum section_kind kind, uint64_t row_count)
{
    static const uint8_t id[DIGEST_BYTES] = {1, 2, 3};
    struct segment_writer *writer = NULL;
    struct error err = ERROR_INIT;

    must(file_remove_all(vfs_posix(), path, &err), &err);
    must(segment_writer_open(vfs_posix(), path, id, row_count, &writer, &err), &err);
    must(segment_writer_begin(writer, section, kind, FILE_BLOCK_BYTES, &err), &err);
    return writer;
}

static struct opened publish(struct segment_writer *writer, enum reader_backend backend)
{
    struct opened o = {NULL, NULL};
    struct error err = ERROR_INIT;

    must(segment_writer_end(writer, &err), &err);
    must(segment_writer_publish(writer, &err), &err);
    segment_writer_close(writer);
    must(segment_open(vfs_posix(), path, &o.segment, &err), &err);
    must(reader_open(backend, 8, &o.reader, &err), &err);
    return o;
}

static void release(struct opened *o)
{
    reader_close(o->reader);
    segment_close(o->segment);
}

/* Row r's record: its length and bytes follow from r alone. Some are empty, some fill a frame. */
static size_t record_make(uint32_t row, uint8_t *out)
{
    size_t bytes = row % 97 == 0 ? 0 : row % 120;

    if (row == 500)
        bytes = RECORD_BYTES_MAX;
    else if (row == 501 || row == ROW_COUNT - 1)
        bytes = 16380;
    else if (row == 7777)
        bytes = 20000;
    for (size_t i = 0; i < bytes; i++)
        out[i] = (uint8_t)(row + i * (row % 5) + (i * i >> 9));
    return bytes;
}

static struct opened rows_make(uint32_t count, enum reader_backend backend)
{
    struct segment_writer *writer = begin("rows", SECTION_ROWS, count);
    uint8_t *record = malloc(RECORD_BYTES_MAX);
    struct rows_writer *rows;
    struct error err = ERROR_INIT;

    must(rows_writer_new(writer, &rows, &err), &err);
    for (uint32_t row = 0; row < count; row++) {
        size_t bytes = record_make(row, record);

        must(rows_writer_append(rows, record, bytes, &err), &err);
    }
    must(rows_writer_finish(rows, &err), &err);
    rows_writer_free(rows);
    free(record);
    return publish(writer, backend);
}

static void fetch_and_compare(const struct rows *rows, struct reader *reader,
                              const uint32_t *positions, uint32_t count)
{
    struct rows_record *out = malloc(count * sizeof *out);
    uint8_t *expected = malloc(RECORD_BYTES_MAX), *storage;
    struct error err = ERROR_INIT;

    must(rows_fetch(rows, reader, positions, count, out, &storage, &err), &err);
    for (uint32_t i = 0; i < count; i++) {
        assert_int_equal(out[i].bytes, record_make(positions[i], expected));
        assert_memory_equal(out[i].data, expected, out[i].bytes);
    }
    free(storage);
    free(expected);
    free(out);
}

static void check_rows(enum reader_backend backend)
{
    struct opened o = rows_make(ROW_COUNT, backend);
    struct rows *rows;
    struct error err = ERROR_INIT;
    struct rows_record one;
    uint8_t *storage;
    uint32_t positions[700], beyond = ROW_COUNT;
    uint64_t random = 7;

    must(rows_open(o.segment, segment_find(o.segment, "rows"), &rows, &err), &err);
    assert_in_range(rows_memory_bytes(rows), 12 * 50, 12 * 200 + 200);
    for (uint32_t i = 0; i < 700; i++) /* any order, over more frames than the reader is deep */
        positions[i] =
            (uint32_t)((random = random * 6364136223846793005u + 1442695040888963407u) >> 33) %
            ROW_COUNT;
    positions[10] = positions[20] = positions[30] = 500; /* the largest, thrice */
    positions[11] = 0;
    positions[12] = ROW_COUNT - 1;
    positions[13] = 501;
    positions[14] = 499;
    fetch_and_compare(rows, o.reader, positions, 700);
    for (uint32_t first = 0; first < ROW_COUNT; first += 700) {
        uint32_t count = 0;

        while (count < 700 && first + count < ROW_COUNT) {
            positions[count] = first + count;
            count++;
        }
        fetch_and_compare(rows, o.reader, positions, count);
    }
    must(rows_fetch(rows, o.reader, NULL, 0, NULL, &storage, &err), &err);
    free(storage);
    assert_int_equal(rows_fetch(rows, o.reader, &beyond, 1, &one, &storage, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
    assert_null(storage);
    rows_close(rows);
    release(&o);
}

static void test_every_record_comes_back_through_pread(void **state)
{
    (void)state;
    check_rows(READER_PREAD);
}

static void test_every_record_comes_back_through_whatever_the_kernel_allows(void **state)
{
    (void)state;
    check_rows(READER_AUTO);
}

static void test_no_rows_and_one_row_are_fine(void **state)
{
    struct error err = ERROR_INIT;
    struct rows_record one;
    struct rows *rows;
    uint8_t *storage;
    uint32_t first = 0;

    (void)state;
    for (uint32_t count = 0; count < 2; count++) {
        struct opened o = rows_make(count, READER_PREAD);

        must(rows_open(o.segment, segment_find(o.segment, "rows"), &rows, &err), &err);
        assert_int_equal(rows_fetch(rows, o.reader, &first, 1, &one, &storage, &err),
                         count ? 0 : -1);
        error_clear(&err);
        free(storage);
        rows_close(rows);
        release(&o);
    }
    rows_close(NULL);
    keys_close(NULL);
    rows_writer_free(NULL);
}

static void test_the_bytes_depend_on_the_rows_alone(void **state)
{
    char file[FILE_PATH_MAX];
    uint8_t *a, *b;
    size_t a_bytes, b_bytes;
    struct error err = ERROR_INIT;
    struct opened o = rows_make(3000, READER_PREAD);

    (void)state;
    must(file_path_join(file, path, "rows", &err), &err);
    must(file_read_whole(vfs_posix(), file, 64u << 20, &a, &a_bytes, &err), &err);
    release(&o);
    o = rows_make(3000, READER_PREAD);
    must(file_read_whole(vfs_posix(), file, 64u << 20, &b, &b_bytes, &err), &err);
    release(&o);
    assert_int_equal(a_bytes, b_bytes);
    assert_memory_equal(a, b, a_bytes);
    free(a);
    free(b);
}

static void test_too_large_a_record_is_refused(void **state)
{
    struct segment_writer *writer = begin("rows", SECTION_ROWS, 1);
    uint8_t *record = calloc(1, RECORD_BYTES_MAX + 1);
    struct rows_writer *rows;
    struct error err = ERROR_INIT;

    (void)state;
    must(rows_writer_new(writer, &rows, &err), &err);
    assert_int_equal(rows_writer_append(rows, record, RECORD_BYTES_MAX + 1, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
    rows_writer_free(rows);
    segment_writer_close(writer);
    free(record);
}

/* ---- rows that lie ---- */

/* One frame with these raw bytes, and a table that may say anything. */
struct lie {
    uint32_t raw[4]; /* ends and content */
    uint32_t raw_bytes;
    uint64_t offset;
    uint32_t first_row;
    uint64_t table_offset_add;
    uint64_t frame_count;
    uint64_t row_count;
    bool garbage; /* instead of a zstd frame */
    bool opens;   /* rows_open still succeeds */
};

static void check_lie(const struct lie *lie)
{
    struct segment_writer *writer = begin("rows", SECTION_ROWS, 2);
    uint8_t frame[256], entry[12], tail[24];
    size_t bytes = ZSTD_compress(frame, sizeof frame, lie->raw, lie->raw_bytes, 3);
    struct error err = ERROR_INIT;
    struct rows *rows = NULL;
    struct rows_record out[2];
    uint8_t *storage = NULL;
    const uint32_t positions[2] = {1, 0};
    struct opened o;
    int rc;

    assert_false(ZSTD_isError(bytes));
    if (lie->garbage)
        memset(frame, 0x5a, bytes);
    must(segment_writer_append(writer, frame, bytes, &err), &err);
    store_u64(entry, lie->offset);
    store_u32(entry + 8, lie->first_row);
    must(segment_writer_append(writer, entry, sizeof entry, &err), &err);
    store_u64(tail, bytes + lie->table_offset_add);
    store_u64(tail + 8, lie->frame_count);
    store_u64(tail + 16, lie->row_count);
    must(segment_writer_append(writer, tail, sizeof tail, &err), &err);
    o = publish(writer, READER_PREAD);
    rc = rows_open(o.segment, segment_find(o.segment, "rows"), &rows, &err);
    assert_int_equal(rc, lie->opens ? 0 : -1);
    if (rc == 0)
        rc = rows_fetch(rows, o.reader, positions, 2, out, &storage, &err);
    assert_int_equal(rc, -1);
    assert_int_equal(err.code, ERR_CORRUPT);
    assert_null(storage);
    rows_close(rows);
    release(&o);
}

static void test_frames_and_tables_that_lie_are_corrupt(void **state)
{
    static const struct lie lies[] = {
        {{3, 4, 0, 0}, 12, 1, 0, 0, 1, 2, false, false}, /* does not begin at 0 */
        {{3, 4, 0, 0}, 12, 0, 1, 0, 1, 2, false, false}, /* nor at row 0 */
        {{3, 4, 0, 0}, 12, 0, 0, 1, 1, 2, false, false}, /* table not whole */
        {{3, 4, 0, 0}, 12, 0, 0, UINT64_MAX - 8, 1, 2, false, false},
        {{3, 4, 0, 0}, 12, 0, 0, 1u << 20, 1, 2, false, false}, /* beyond the payload */
        {{3, 4, 0, 0}, 12, 0, 0, 0, 2, 2, false, false},
        {{3, 4, 0, 0}, 12, 0, 0, 0, UINT64_MAX, 2, false, false},
        {{3, 4, 0, 0}, 12, 0, 0, 0, UINT64_MAX / 12 + 2, 2, false, false}, /* x 12 overflows to 1 */
        {{3, 4, 0, 0}, 12, 0, 0, 12, 0, 2, false, false},                  /* rows without frames */
        {{3, 4, 0, 0}, 12, 0, 0, 0, 1, 3, false, false}, /* not the segment's rows */
        {{3, 4, 0, 0}, 12, 0, 0, 0, 1, UINT64_MAX, false, false},
        {{3, 4, 0, 0}, 12, 0, 0, 0, 1, 0, false, false},
        {{3, 5, 0, 0}, 12, 0, 0, 0, 1, 2, false, true}, /* ends beyond the frame */
        {{4, 3, 0, 0}, 12, 0, 0, 0, 1, 2, false, true}, /* descending */
        {{3, 3, 0, 0}, 12, 0, 0, 0, 1, 2, false, true}, /* bytes left over */
        {{UINT32_MAX, 4, 0, 0}, 12, 0, 0, 0, 1, 2, false, true},
        {{3, 0, 0, 0}, 4, 0, 0, 0, 1, 2, false, true}, /* no room for the ends */
        {{3, 4, 0, 0}, 12, 0, 0, 0, 1, 2, true, true}, /* no zstd */
    };

    (void)state;
    for (size_t i = 0; i < sizeof lies / sizeof lies[0]; i++)
        check_lie(&lies[i]);
}

/* A small frame that decompresses to gigabytes, and frames without or with a wrong size. */
static void test_a_frame_cannot_make_us_allocate_more_than_a_record(void **state)
{
    size_t bomb_bytes = 64u << 20, room = ZSTD_compressBound(bomb_bytes);
    uint8_t *zeros = calloc(1, bomb_bytes), *frame = malloc(room);
    uint8_t entry[12] = {0}, tail[24];
    struct error err = ERROR_INIT;

    (void)state;
    for (int kind = 0; kind < 3; kind++) {
        struct segment_writer *writer = begin("rows", SECTION_ROWS, 1);
        ZSTD_CCtx *zstd = ZSTD_createCCtx();
        struct rows *rows = NULL;
        struct rows_record out;
        uint8_t *storage;
        const uint32_t position = 0;
        struct opened o;
        size_t bytes;

        if (kind == 1)
            ZSTD_CCtx_setParameter(zstd, ZSTD_c_contentSizeFlag, 0);
        bytes = ZSTD_compress2(zstd, frame, room, zeros, kind == 0 ? bomb_bytes : 4096);
        assert_false(ZSTD_isError(bytes));
        if (kind == 2)
            bytes -= 3; /* cut off */
        must(segment_writer_append(writer, frame, bytes, &err), &err);
        must(segment_writer_append(writer, entry, sizeof entry, &err), &err);
        store_u64(tail, bytes);
        store_u64(tail + 8, 1);
        store_u64(tail + 16, 1);
        must(segment_writer_append(writer, tail, sizeof tail, &err), &err);
        o = publish(writer, READER_PREAD);
        must(rows_open(o.segment, segment_find(o.segment, "rows"), &rows, &err), &err);
        assert_int_equal(rows_fetch(rows, o.reader, &position, 1, &out, &storage, &err), -1);
        assert_int_equal(err.code, ERR_CORRUPT);
        error_clear(&err);
        rows_close(rows);
        release(&o);
        ZSTD_freeCCtx(zstd);
    }
    free(zeros);
    free(frame);
}

/* ---- keys ---- */

static struct opened keys_make(const struct key_entry *entries, uint64_t count, uint64_t row_count)
{
    struct segment_writer *writer = begin("keys", SECTION_KEYS, row_count);
    struct error err = ERROR_INIT;

    must(keys_write(writer, entries, count, &err), &err);
    return publish(writer, READER_PREAD);
}

/* Looks for every ordinal near every entry and compares with a scan. */
static void check_keys(const struct key_entry *entries, uint32_t count, uint32_t positions_max)
{
    struct opened o = keys_make(entries, count, count);
    uint32_t sought = 3 * count + 2, at = 0;
    uint64_t *ordinals = malloc(sought * sizeof *ordinals);
    uint32_t *positions = malloc((size_t)sought * positions_max * sizeof *positions + 1);
    uint32_t *found = malloc(sought * sizeof *found);
    struct keys *keys;
    struct error err = ERROR_INIT;

    must(keys_open(o.segment, segment_find(o.segment, "keys"), &keys, &err), &err);
    assert_true(keys_memory_bytes(keys) >= (count + RUN_ENTRIES - 1) / RUN_ENTRIES * 8);
    for (uint32_t i = count; i-- > 0;) {
        ordinals[at++] = entries[i].ordinal;
        ordinals[at++] = entries[i].ordinal - 1;
        ordinals[at++] = entries[i].ordinal + 1;
    }
    ordinals[at++] = 0;
    ordinals[at++] = UINT64_MAX;
    must(keys_find(keys, o.reader, ordinals, sought, positions_max, positions, found, &err), &err);
    for (uint32_t i = 0; i < sought; i++) {
        uint32_t low = 0, high = count, expected = 0;

        while (low < high) {
            uint32_t middle = (low + high) / 2;

            if (entries[middle].ordinal < ordinals[i])
                low = middle + 1;
            else
                high = middle;
        }
        for (; low < count && entries[low].ordinal == ordinals[i] && expected < positions_max;
             low++, expected++)
            assert_int_equal(positions[(size_t)i * positions_max + expected],
                             entries[low].position);
        assert_int_equal(found[i], expected);
    }
    must(keys_find(keys, o.reader, NULL, 0, 1, NULL, NULL, &err), &err);
    keys_close(keys);
    release(&o);
    free(ordinals);
    free(positions);
    free(found);
}

static void test_each_key_is_found_and_no_other(void **state)
{
    static const uint32_t counts[] = {0, 1, 2, 340, 341, 342, 682, 683, 5000};
    struct key_entry *entries = malloc(5000 * sizeof *entries);

    (void)state;
    for (size_t n = 0; n < sizeof counts / sizeof counts[0]; n++) {
        for (uint32_t i = 0; i < counts[n]; i++)
            entries[i] = (struct key_entry){key_ordinal_int64((int64_t)i * 3 - 6000 + (i % 7 == 0)),
                                            counts[n] - 1 - i};
        check_keys(entries, counts[n], 1);
    }
    /* Far more runs than one batch holds. */
    free(entries);
    entries = malloc(900000 * sizeof *entries);
    for (uint32_t i = 0; i < 900000; i++)
        entries[i] = (struct key_entry){(uint64_t)i * 20496382304121ull, i};
    check_keys(entries, 900000, 1);
    free(entries);
}

static void test_equal_ordinals_are_found_across_fences(void **state)
{
    static const uint32_t lengths[] = {1, 5, 335, 1, 341, 342, 2, 1000, 3, 700, 341, 341, 1};
    static const uint32_t maxima[] = {1, 2, 340, 341, 342, 1001, 5000};
    struct key_entry entries[4096];
    uint32_t count = 0;

    (void)state;
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++)
        for (uint32_t k = 0; k < lengths[i]; k++, count++)
            entries[count] = (struct key_entry){10 + 2 * i, count};
    for (size_t i = 0; i < sizeof maxima / sizeof maxima[0]; i++)
        check_keys(entries, count, maxima[i] < 400 ? maxima[i] : 400 + maxima[i] % 601);
    check_keys(entries, 700, 1001);
}

static void test_signed_keys_keep_their_order(void **state)
{
    (void)state;
    assert_true(key_ordinal_int64(INT64_MIN) == 0);
    assert_true(key_ordinal_int64(-1) < key_ordinal_int64(0));
    assert_true(key_ordinal_int64(INT64_MAX) == UINT64_MAX);
}

static void test_unsorted_entries_are_refused(void **state)
{
    static const struct key_entry wrong[2][2] = {{{2, 0}, {1, 1}}, {{1, 1}, {1, 1}}};

    (void)state;
    for (int i = 0; i < 2; i++) {
        struct segment_writer *writer = begin("keys", SECTION_KEYS, 2);
        struct error err = ERROR_INIT;

        assert_int_equal(keys_write(writer, wrong[i], 2, &err), -1);
        assert_int_equal(err.code, ERR_INVALID);
        segment_writer_close(writer);
    }
}

/* Two entries, fences and tail as given. */
static void check_key_lie(const uint64_t *fences, uint32_t fences_written, uint64_t entry_count,
                          uint64_t fence_count, uint32_t position, bool opens)
{
    struct segment_writer *writer = begin("keys", SECTION_KEYS, 2);
    uint8_t entry[24], tail[16];
    struct error err = ERROR_INIT;
    struct keys *keys = NULL;
    const uint64_t ordinal = 5;
    uint32_t positions[4], found;
    struct opened o;
    int rc;

    store_u64(entry, 5);
    store_u32(entry + 8, position);
    store_u64(entry + 12, 6);
    store_u32(entry + 20, 1);
    must(segment_writer_append(writer, entry, sizeof entry, &err), &err);
    must(segment_writer_append(writer, fences, 8 * fences_written, &err), &err);
    store_u64(tail, entry_count);
    store_u64(tail + 8, fence_count);
    must(segment_writer_append(writer, tail, sizeof tail, &err), &err);
    o = publish(writer, READER_PREAD);
    rc = keys_open(o.segment, segment_find(o.segment, "keys"), &keys, &err);
    assert_int_equal(rc, opens ? 0 : -1);
    if (rc == 0)
        rc = keys_find(keys, o.reader, &ordinal, 1, 4, positions, &found, &err);
    assert_int_equal(rc, -1);
    assert_int_equal(err.code, ERR_CORRUPT);
    keys_close(keys);
    release(&o);
}

static void test_key_tables_that_lie_are_corrupt(void **state)
{
    static const uint64_t five[2] = {5, 4}, four[1] = {4};

    (void)state;
    check_key_lie(five, 1, 3, 1, 0, false); /* more keys than rows */
    check_key_lie(five, 1, 1, 1, 0, false); /* payload is longer */
    check_key_lie(five, 1, UINT64_MAX, 1, 0, false);
    check_key_lie(five, 1, 2, UINT64_MAX, 0, false);
    check_key_lie(five, 2, 2, 2, 0, false);
    check_key_lie(five, 0, 2, 0, 0, false);
    check_key_lie(four, 1, 2, 1, 0, true); /* the fence is not the first ordinal */
    check_key_lie(five, 1, 2, 1, 2, true); /* a row beyond the last */
}

static void test_a_section_too_short_for_its_tail_is_corrupt(void **state)
{
    (void)state;
    for (int i = 0; i < 2; i++) {
        struct segment_writer *writer = begin("x", i ? SECTION_KEYS : SECTION_ROWS, 0);
        struct error err = ERROR_INIT;
        struct rows *rows = NULL;
        struct keys *keys = NULL;
        struct opened o;

        must(segment_writer_append(writer, "short", 5, &err), &err);
        o = publish(writer, READER_PREAD);
        if (i)
            assert_int_equal(keys_open(o.segment, segment_find(o.segment, "x"), &keys, &err), -1);
        else
            assert_int_equal(rows_open(o.segment, segment_find(o.segment, "x"), &rows, &err), -1);
        assert_int_equal(err.code, ERR_CORRUPT);
        release(&o);
    }
}

static int folder_make(void **state)
{
    (void)state;
    if (!mkdtemp(folder))
        return -1;
    snprintf(path, sizeof path, "%s/segment", folder);
    return 0;
}

static int folder_remove(void **state)
{
    (void)state;
    return file_remove_all(vfs_posix(), folder, NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_record_comes_back_through_pread),
        cmocka_unit_test(test_every_record_comes_back_through_whatever_the_kernel_allows),
        cmocka_unit_test(test_no_rows_and_one_row_are_fine),
        cmocka_unit_test(test_the_bytes_depend_on_the_rows_alone),
        cmocka_unit_test(test_too_large_a_record_is_refused),
        cmocka_unit_test(test_frames_and_tables_that_lie_are_corrupt),
        cmocka_unit_test(test_a_frame_cannot_make_us_allocate_more_than_a_record),
        cmocka_unit_test(test_each_key_is_found_and_no_other),
        cmocka_unit_test(test_equal_ordinals_are_found_across_fences),
        cmocka_unit_test(test_signed_keys_keep_their_order),
        cmocka_unit_test(test_unsorted_entries_are_refused),
        cmocka_unit_test(test_key_tables_that_lie_are_corrupt),
        cmocka_unit_test(test_a_section_too_short_for_its_tail_is_corrupt),
    };

    return cmocka_run_group_tests_name("rows", tests, folder_make, folder_remove);
}
