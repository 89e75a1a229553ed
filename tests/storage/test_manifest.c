/* Checks storage/manifest.c: the codec refuses whatever an encoder would not have written, and
 * publishing leaves the old file or the new one, whole, whichever call fails. */
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
#include <unistd.h>

#include "storage/base/bytes.h"
#include "storage/file.h"
#include "storage/manifest.h"
#include "tests/support/vfs_fault.h"

static char folder[256];

static int make_folder(void **state)
{
    const char *base = getenv("TMPDIR");

    (void)state;
    snprintf(folder, sizeof folder, "%s/annd-manifest-XXXXXX", base ? base : "/var/tmp");
    return mkdtemp(folder) ? 0 : -1;
}

static int remove_folder(void **state)
{
    (void)state;
    return file_remove_all(vfs_posix(), folder, NULL);
}

static struct manifest *sample(void)
{
    struct manifest *manifest = manifest_new(MANIFEST_INDEX);

    assert_non_null(manifest);
    assert_int_equal(manifest_set_u64(manifest, "rows", 123456789012345u, NULL), 0);
    assert_int_equal(manifest_set_f64(manifest, "alpha", 1.25, NULL), 0);
    assert_int_equal(manifest_set_text(manifest, "metric", "l2", NULL), 0);
    assert_int_equal(manifest_set_text(manifest, "empty", "", NULL), 0);
    assert_int_equal(manifest_set_bytes(manifest, "id", "\0\1\2\377", 4, NULL), 0);
    assert_int_equal(manifest_set_bytes(manifest, "z/none", NULL, 0, NULL), 0);
    return manifest;
}

static void encode(const struct manifest *manifest, uint8_t **data, size_t *bytes)
{
    struct error err = ERROR_INIT;

    if (manifest_encode(manifest, data, bytes, &err) < 0)
        fail_msg("%s", err.message);
}

/* Makes the CRC right again, so that the check behind it is reached. */
static void mend_crc(uint8_t *data, size_t bytes)
{
    store_u32(data + 12, 0);
    store_u32(data + 12, crc32c(0, data, bytes));
}

static enum error_code decode_code(const uint8_t *data, size_t bytes)
{
    struct manifest *manifest = NULL;
    struct error err = ERROR_INIT;
    /* A copy of exactly this size, for the address sanitizer to guard. */
    uint8_t *copy = malloc(bytes ? bytes : 1);
    int rc;

    memcpy(copy, data, bytes);
    rc = manifest_decode(MANIFEST_INDEX, copy, bytes, "sample", &manifest, &err);
    free(copy);
    assert_int_equal(rc == 0, manifest != NULL);
    assert_int_equal(rc == 0, err.code == ERR_NONE);
    manifest_free(manifest);
    return err.code;
}

static void test_values_come_back_as_they_were_set(void **state)
{
    struct manifest *manifest = sample(), *again = NULL;
    struct error err = ERROR_INIT;
    const uint8_t *id;
    const char *text;
    uint8_t *data;
    uint64_t rows;
    double alpha;
    size_t bytes;

    (void)state;
    encode(manifest, &data, &bytes);
    assert_int_equal(manifest_decode(MANIFEST_INDEX, data, bytes, "sample", &again, &err), 0);
    assert_int_equal(manifest_count(again), 6);
    assert_int_equal(manifest_get_u64(again, "rows", &rows, &err), 0);
    assert_int_equal(rows, 123456789012345u);
    assert_int_equal(manifest_get_f64(again, "alpha", &alpha, &err), 0);
    assert_true(alpha == 1.25);
    assert_int_equal(manifest_get_text(again, "metric", &text, &err), 0);
    assert_string_equal(text, "l2");
    assert_int_equal(manifest_get_text(again, "empty", &text, &err), 0);
    assert_string_equal(text, "");
    assert_int_equal(manifest_get_bytes(again, "id", &id, &bytes, &err), 0);
    assert_int_equal(bytes, 4);
    assert_memory_equal(id, "\0\1\2\377", 4);
    assert_int_equal(manifest_get_bytes(again, "z/none", &id, &bytes, &err), 0);
    assert_int_equal(bytes, 0);
    free(data);
    manifest_free(manifest);
    manifest_free(again);
}

static void test_equal_contents_are_equal_bytes(void **state)
{
    struct manifest *a = sample(), *b = manifest_new(MANIFEST_INDEX);
    uint8_t *data_a, *data_b;
    size_t bytes_a, bytes_b;

    (void)state;
    manifest_set_bytes(b, "z/none", "gone", 4, NULL);
    manifest_set_bytes(b, "id", "\0\1\2\377", 4, NULL);
    manifest_set_text(b, "removed", "x", NULL);
    manifest_set_text(b, "empty", "", NULL);
    manifest_set_u64(b, "metric", 3, NULL);
    manifest_set_text(b, "metric", "l2", NULL);
    manifest_set_u64(b, "rows", 123456789012345u, NULL);
    manifest_set_f64(b, "alpha", 1.25, NULL);
    manifest_set_bytes(b, "z/none", NULL, 0, NULL);
    manifest_remove(b, "removed");
    manifest_remove(b, "never there");
    encode(a, &data_a, &bytes_a);
    encode(b, &data_b, &bytes_b);
    assert_int_equal(bytes_a, bytes_b);
    assert_memory_equal(data_a, data_b, bytes_a);
    free(data_a);
    free(data_b);
    manifest_free(a);
    manifest_free(b);
}

static void test_names_outside_the_alphabet_are_refused(void **state)
{
    struct manifest *manifest = manifest_new(MANIFEST_INDEX);
    char name[MANIFEST_NAME_MAX + 2];
    const char *bad[] = {"", "A", "a b", "a\n", "\303\244", "a:b"};

    (void)state;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct error err = ERROR_INIT;

        assert_int_equal(manifest_set_u64(manifest, bad[i], 1, &err), -1);
        assert_int_equal(err.code, ERR_INVALID);
    }
    memset(name, 'a', sizeof name);
    name[MANIFEST_NAME_MAX] = 0;
    assert_int_equal(manifest_set_u64(manifest, name, 1, NULL), 0);
    name[MANIFEST_NAME_MAX] = 'a';
    name[MANIFEST_NAME_MAX + 1] = 0;
    assert_int_equal(manifest_set_u64(manifest, name, 1, NULL), -1);
    assert_int_equal(manifest_count(manifest), 1);
    manifest_free(manifest);
}

static void test_wrong_type_missing_entry_and_range_say_what_is_wrong(void **state)
{
    struct manifest *manifest = sample();
    struct error err = ERROR_INIT;
    uint64_t value = 7;
    double number;

    (void)state;
    assert_int_equal(manifest_get_f64(manifest, "rows", &number, &err), -1);
    assert_int_equal(err.code, ERR_CORRUPT);
    assert_non_null(strstr(err.message, "rows"));
    error_clear(&err);
    assert_int_equal(manifest_get_u64(manifest, "row", &value, &err), -1);
    assert_non_null(strstr(err.message, "row is missing"));
    error_clear(&err);
    assert_int_equal(manifest_get_u64_in(manifest, "rows", 0, 10, &value, &err), -1);
    assert_int_equal(err.code, ERR_CORRUPT);
    assert_int_equal(value, 7);
    assert_int_equal(
        manifest_get_u64_in(manifest, "rows", 123456789012345u, 123456789012345u, &value, NULL), 0);
    manifest_free(manifest);
}

static void test_listing_prints_every_type(void **state)
{
    static const char *const wanted[][2] = {{"alpha", "1.25"},           {"empty", ""},
                                            {"id", "000102ff"},          {"metric", "l2"},
                                            {"rows", "123456789012345"}, {"z/none", ""}};
    struct manifest *manifest = sample();
    char out[64];

    (void)state;
    for (uint32_t i = 0; i < 6; i++) {
        assert_string_equal(manifest_entry(manifest, i, out, sizeof out), wanted[i][0]);
        assert_string_equal(out, wanted[i][1]);
    }
    assert_null(manifest_entry(manifest, 6, out, sizeof out));
    assert_string_equal(manifest_entry(manifest, 2, out, 4), "id");
    assert_string_equal(out, "00");
    assert_string_equal(manifest_entry(manifest, 4, out, 4), "rows");
    assert_string_equal(out, "123");
    manifest_free(manifest);
}

static void test_every_flipped_bit_is_found(void **state)
{
    struct manifest *manifest = sample();
    uint8_t *data;
    size_t bytes;

    (void)state;
    encode(manifest, &data, &bytes);
    assert_int_equal(decode_code(data, bytes), ERR_NONE);
    for (size_t bit = 0; bit < bytes * 8; bit++) {
        enum error_code code;

        data[bit / 8] ^= (uint8_t)(1u << bit % 8);
        code = decode_code(data, bytes);
        if (code != ERR_CORRUPT && code != ERR_UNSUPPORTED)
            fail_msg("bit %zu flipped gives %s", bit, error_code_name(code));
        data[bit / 8] ^= (uint8_t)(1u << bit % 8);
    }
    free(data);
    manifest_free(manifest);
}

static void test_every_flipped_bit_behind_a_right_crc_is_an_answer_not_a_crash(void **state)
{
    struct manifest *manifest = sample();
    uint8_t *data, *copy;
    size_t bytes;

    (void)state;
    encode(manifest, &data, &bytes);
    copy = malloc(bytes);
    for (size_t bit = 0; bit < bytes * 8; bit++) {
        enum error_code code;

        memcpy(copy, data, bytes);
        copy[bit / 8] ^= (uint8_t)(1u << bit % 8);
        mend_crc(copy, bytes);
        code = decode_code(copy, bytes);
        /* Values and names may change unseen; structure may not. */
        if (code != ERR_NONE && code != ERR_CORRUPT && code != ERR_UNSUPPORTED)
            fail_msg("bit %zu flipped gives %s", bit, error_code_name(code));
        if ((bit / 8 < 12 || (bit / 8 >= 16 && bit / 8 < 28) || (bit / 8 >= 32 && bit / 8 < 64)) &&
            code == ERR_NONE)
            fail_msg("bit %zu of the header flipped is taken", bit);
    }
    free(copy);
    free(data);
    manifest_free(manifest);
}

static void test_every_truncation_and_an_extension_are_found(void **state)
{
    struct manifest *manifest = sample();
    uint8_t *data, *copy;
    size_t bytes;

    (void)state;
    encode(manifest, &data, &bytes);
    for (size_t i = 0; i < bytes; i++)
        assert_int_equal(decode_code(data, i), ERR_CORRUPT);
    copy = calloc(1, bytes + 8);
    memcpy(copy, data, bytes);
    assert_int_equal(decode_code(copy, bytes + 8), ERR_CORRUPT);
    /* Also when the header goes along with it. */
    store_u64(copy + 16, bytes + 8);
    mend_crc(copy, bytes + 8);
    assert_int_equal(decode_code(copy, bytes + 8), ERR_CORRUPT);
    for (size_t i = 64; i < bytes; i++) {
        memcpy(copy, data, i);
        store_u64(copy + 16, i);
        mend_crc(copy, i);
        assert_int_equal(decode_code(copy, i), ERR_CORRUPT);
    }
    free(copy);
    free(data);
    manifest_free(manifest);
}

static void test_hostile_counts_and_lengths_are_refused(void **state)
{
    struct manifest *manifest = sample();
    uint8_t *data;
    size_t bytes;

    (void)state;
    encode(manifest, &data, &bytes);
    for (int i = 0; i < 4; i++) {
        static const uint32_t counts[] = {0, 5, 7, UINT32_MAX};

        store_u32(data + 32, counts[i]);
        mend_crc(data, bytes);
        assert_int_equal(decode_code(data, bytes), ERR_CORRUPT);
    }
    store_u32(data + 32, 6);
    store_u32(data + 64 + 4, UINT32_MAX); /* value bytes of the first entry */
    mend_crc(data, bytes);
    assert_int_equal(decode_code(data, bytes), ERR_CORRUPT);
    store_u32(data + 64 + 4, 8);
    store_u16(data + 64, UINT16_MAX);
    mend_crc(data, bytes);
    assert_int_equal(decode_code(data, bytes), ERR_CORRUPT);
    free(data);
    manifest_free(manifest);
}

static void test_unordered_and_doubled_names_are_refused(void **state)
{
    static const char *const pairs[][2] = {{"b", "a"}, {"a", "a"}};

    (void)state;
    for (int p = 0; p < 2; p++) {
        uint8_t data[64 + 2 * 9] = "ANNDIDXM";
        uint8_t *at = data + 64;

        store_u32(data + 8, 1);
        store_u64(data + 16, sizeof data);
        store_u32(data + 32, 2);
        for (int i = 0; i < 2; i++, at += 9) {
            store_u16(at, 1);
            at[2] = 4;
            at[8] = (uint8_t)pairs[p][i][0];
        }
        mend_crc(data, sizeof data);
        assert_int_equal(decode_code(data, sizeof data), ERR_CORRUPT);
    }
}

static void test_text_with_a_zero_inside_is_refused(void **state)
{
    struct manifest *manifest = manifest_new(MANIFEST_INDEX);
    uint8_t *data;
    size_t bytes;

    (void)state;
    manifest_set_text(manifest, "t", "abc", NULL);
    encode(manifest, &data, &bytes);
    data[bytes - 2] = 0;
    mend_crc(data, bytes);
    assert_int_equal(decode_code(data, bytes), ERR_CORRUPT);
    free(data);
    manifest_free(manifest);
}

static void test_another_kind_and_unknown_features_are_refused(void **state)
{
    struct manifest *manifest = sample(), *again = NULL;
    struct error err = ERROR_INIT;
    uint8_t *data, *rewritten;
    size_t bytes;

    (void)state;
    encode(manifest, &data, &bytes);
    assert_int_equal(manifest_decode(MANIFEST_DATA, data, bytes, "x", &again, &err), -1);
    assert_int_equal(err.code, ERR_CORRUPT);
    store_u32(data + 24, 1);
    mend_crc(data, bytes);
    assert_int_equal(decode_code(data, bytes), ERR_UNSUPPORTED);
    store_u32(data + 24, 0);
    store_u32(data + 8, 2);
    mend_crc(data, bytes);
    assert_int_equal(decode_code(data, bytes), ERR_UNSUPPORTED);
    store_u32(data + 8, 1);
    /* Compatible features are kept as they were. */
    store_u32(data + 28, 0xdead);
    mend_crc(data, bytes);
    assert_int_equal(manifest_decode(MANIFEST_INDEX, data, bytes, "x", &again, NULL), 0);
    encode(again, &rewritten, &bytes);
    assert_memory_equal(data, rewritten, bytes);
    free(rewritten);
    free(data);
    manifest_free(again);
    manifest_free(manifest);
}

static uint64_t generation_at(const char *path)
{
    struct manifest *manifest = NULL;
    struct error err = ERROR_INIT;
    uint64_t generation = 0;

    if (manifest_read(vfs_posix(), MANIFEST_INDEX, path, &manifest, &err) < 0 ||
        manifest_get_u64(manifest, "generation", &generation, &err) < 0)
        fail_msg("%s", err.message);
    manifest_free(manifest);
    return generation;
}

static void test_publish_counts_generations_and_keeps_the_one_before(void **state)
{
    struct manifest *manifest = sample();
    char path[300], before[310];
    struct error err = ERROR_INIT;
    uint64_t parent;

    (void)state;
    snprintf(path, sizeof path, "%s/generations", folder);
    snprintf(before, sizeof before, "%s.1", path);
    for (uint64_t i = 0; i < 3; i++) {
        if (manifest_publish(vfs_posix(), path, i, manifest, &err) != MANIFEST_DONE)
            fail_msg("%s", err.message);
        assert_int_equal(generation_at(path), i + 1);
        assert_int_equal(manifest_get_u64(manifest, "generation.parent", &parent, NULL), 0);
        assert_int_equal(parent, i);
    }
    assert_int_equal(generation_at(before), 2);
    manifest_free(manifest);
}

static void test_publish_over_another_generation_is_a_conflict_and_changes_nothing(void **state)
{
    struct manifest *manifest = sample();
    struct error err = ERROR_INIT;
    char path[300], before[310];

    (void)state;
    snprintf(path, sizeof path, "%s/conflict", folder);
    snprintf(before, sizeof before, "%s.1", path);
    assert_int_equal(manifest_publish(vfs_posix(), path, 1, manifest, &err), MANIFEST_CONFLICT);
    assert_int_equal(err.code, ERR_CONFLICT);
    assert_false(file_exists(vfs_posix(), path));
    assert_int_equal(manifest_publish(vfs_posix(), path, 0, manifest, NULL), MANIFEST_DONE);
    assert_int_equal(manifest_publish(vfs_posix(), path, 0, manifest, NULL), MANIFEST_CONFLICT);
    assert_int_equal(manifest_publish(vfs_posix(), path, 2, manifest, NULL), MANIFEST_CONFLICT);
    assert_int_equal(generation_at(path), 1);
    assert_false(file_exists(vfs_posix(), before));
    manifest_free(manifest);
}

static void test_publish_never_replaces_a_file_it_cannot_read(void **state)
{
    struct manifest *manifest = sample();
    struct error err = ERROR_INIT;
    char path[300];
    uint8_t *data;
    size_t bytes;

    (void)state;
    snprintf(path, sizeof path, "%s/damaged", folder);
    assert_int_equal(file_publish(vfs_posix(), path, "garbage", 7, NULL), 0);
    assert_int_equal(manifest_publish(vfs_posix(), path, 0, manifest, &err), MANIFEST_UNKNOWN);
    assert_int_equal(err.code, ERR_CORRUPT);
    assert_int_equal(file_read_whole(vfs_posix(), path, 100, &data, &bytes, NULL), 0);
    assert_string_equal((char *)data, "garbage");
    free(data);
    manifest_free(manifest);
}

static void sweep(const struct vfs_fault_plan *kind, const char *name)
{
    struct manifest *manifest = sample();
    struct vfs_fault fault;
    char path[300];
    uint64_t generation = 1, calls = 1;

    snprintf(path, sizeof path, "%s/%s", folder, name);
    vfs_fault_init(&fault, vfs_posix());
    assert_int_equal(manifest_publish(&fault.vfs, path, 0, manifest, NULL), MANIFEST_DONE);
    vfs_fault_plan(&fault, NULL);
    assert_int_equal(manifest_publish(&fault.vfs, path, 1, manifest, NULL), MANIFEST_DONE);
    calls = vfs_fault_calls(&fault, kind->call);
    assert_true(calls > 0);
    generation = 2;
    for (uint64_t nth = 1; nth <= calls; nth++) {
        struct vfs_fault_plan plan = *kind;
        enum manifest_outcome outcome;
        uint64_t found;

        plan.nth = nth;
        vfs_fault_plan(&fault, &plan);
        outcome = manifest_publish(&fault.vfs, path, generation, manifest, NULL);
        found = generation_at(path); /* whole, whatever happened */
        if (outcome == MANIFEST_DONE)
            assert_int_equal(found, generation + 1);
        else if (outcome == MANIFEST_CONFLICT)
            assert_int_equal(found, generation);
        else
            assert_true(found == generation || found == generation + 1);
        generation = found;
    }
    vfs_fault_plan(&fault, NULL);
    assert_int_equal(manifest_publish(&fault.vfs, path, generation, manifest, NULL), MANIFEST_DONE);
    assert_int_equal(vfs_fault_files_open(&fault), 0);
    vfs_fault_release(&fault);
    manifest_free(manifest);
}

static void test_publish_leaves_old_or_new_whichever_call_fails(void **state)
{
    (void)state;
    sweep(&(struct vfs_fault_plan){.errno_value = EIO}, "sweep-eio");
    sweep(&(struct vfs_fault_plan){.errno_value = ENOSPC}, "sweep-enospc");
    sweep(&(struct vfs_fault_plan){.call = VFS_CALL_WRITE, .effect = VFS_EFFECT_SHORT},
          "sweep-short");
    sweep(&(struct vfs_fault_plan){.call = VFS_CALL_WRITE,
                                   .effect = VFS_EFFECT_TEAR_ERRNO,
                                   .errno_value = EIO},
          "sweep-tear");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_values_come_back_as_they_were_set),
        cmocka_unit_test(test_equal_contents_are_equal_bytes),
        cmocka_unit_test(test_names_outside_the_alphabet_are_refused),
        cmocka_unit_test(test_wrong_type_missing_entry_and_range_say_what_is_wrong),
        cmocka_unit_test(test_listing_prints_every_type),
        cmocka_unit_test(test_every_flipped_bit_is_found),
        cmocka_unit_test(test_every_flipped_bit_behind_a_right_crc_is_an_answer_not_a_crash),
        cmocka_unit_test(test_every_truncation_and_an_extension_are_found),
        cmocka_unit_test(test_hostile_counts_and_lengths_are_refused),
        cmocka_unit_test(test_unordered_and_doubled_names_are_refused),
        cmocka_unit_test(test_text_with_a_zero_inside_is_refused),
        cmocka_unit_test(test_another_kind_and_unknown_features_are_refused),
        cmocka_unit_test(test_publish_counts_generations_and_keeps_the_one_before),
        cmocka_unit_test(test_publish_over_another_generation_is_a_conflict_and_changes_nothing),
        cmocka_unit_test(test_publish_never_replaces_a_file_it_cannot_read),
        cmocka_unit_test(test_publish_leaves_old_or_new_whichever_call_fails),
    };

    return cmocka_run_group_tests_name("manifest", tests, make_folder, remove_folder);
}
