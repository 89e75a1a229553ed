/* Checks index/vector_file.c, index/vector_source.c and index/truth_file.c. */
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

#include "index/truth_file.h"
#include "index/vector_file.h"
#include "index/vector_source.h"
#include "storage/base/bytes.h"
#include "storage/base/random.h"
#include "storage/file.h"
#include "tests/support/vfs_fault.h"

static char folder[64];

static int setup(void **state)
{
    (void)state;
    strcpy(folder, "/var/tmp/annd-vectors-XXXXXX");
    return mkdtemp(folder) ? 0 : -1;
}

static int teardown(void **state)
{
    (void)state;
    return file_remove_all(vfs_posix(), folder, NULL);
}

/* "folder/name", valid until the next call but three. */
static const char *path_of(const char *name)
{
    static char paths[4][128];
    static unsigned turn;
    char *path = paths[turn++ % 4];

    snprintf(path, sizeof paths[0], "%s/%s", folder, name);
    return path;
}

static const char *write_bytes(const char *name, const void *data, size_t bytes)
{
    const char *path = path_of(name);
    FILE *file = fopen(path, "wb");

    assert_non_null(file);
    assert_int_equal(fwrite(data, 1, bytes, file), bytes);
    assert_int_equal(fclose(file), 0);
    return path;
}

/* A .npy of this version and dictionary, padded as NumPy pads, then the data. */
static const char *write_npy(const char *name, int version, const char *dictionary,
                             const void *data, size_t data_bytes)
{
    uint8_t bytes[4096] = "\x93NUMPY";
    size_t start = version == 1 ? 10 : 12;
    size_t header = align_up(start + strlen(dictionary) + 1, 64) - start;

    bytes[6] = (uint8_t)version;
    store_u32(bytes + 8, (uint32_t)header);
    memset(bytes + start, ' ', header);
    memcpy(bytes + start, dictionary, strlen(dictionary));
    bytes[start + header - 1] = '\n';
    assert_true(start + header + data_bytes <= sizeof bytes);
    if (data_bytes)
        memcpy(bytes + start + header, data, data_bytes);
    return write_bytes(name, bytes, start + header + data_bytes);
}

static void expect_refused(const char *path, const char *message)
{
    struct error err = ERROR_INIT;
    struct vector_file *file = NULL;

    if (vector_file_open(vfs_posix(), path, &file, &err) == 0)
        fail_msg("%s was accepted", path);
    assert_null(file);
    if (err.code != ERR_INVALID)
        fail_msg("%s: %s %s", path, error_code_name(err.code), err.message);
    if (!strstr(err.message, message) || !strstr(err.message, path))
        fail_msg("wanted \"%s\", found \"%s\"", message, err.message);
}

static struct vector_source *open_source(const char *path, enum element_type type, uint64_t rows,
                                         uint32_t dim)
{
    struct error err = ERROR_INIT;
    struct vector_source *source = NULL;

    if (vector_source_open(vfs_posix(), path, &source, &err) < 0)
        fail_msg("%s", err.message);
    assert_int_equal(vector_source_type(source), type);
    assert_int_equal(vector_source_rows(source), rows);
    assert_int_equal(vector_source_dim(source), dim);
    assert_int_equal(vector_source_row_bytes(source), element_bytes(type, dim));
    assert_string_equal(vector_source_name(source), path);
    return source;
}

/* Reads every range of the source and compares it with `values`, all rows as float. */
static void expect_rows(const struct vector_source *source, const float *values)
{
    uint64_t rows = vector_source_rows(source);
    uint32_t dim = vector_source_dim(source), row_bytes = vector_source_row_bytes(source);
    struct error err = ERROR_INIT;
    uint8_t *all = malloc(rows * row_bytes);

    assert_int_equal(vector_source_read(source, 0, rows, all, &err), 0);
    assert_int_equal(vector_source_check(source, all, 0, rows, &err), 0);
    for (uint64_t first = 0; first <= rows; first++) {
        for (uint64_t count = 0; count <= rows - first; count++) {
            /* exact sizes, for the sanitizer */
            uint8_t *raw = malloc(count * row_bytes + (count == 0));
            float *out = malloc(count * dim * sizeof *out + (count == 0));

            assert_int_equal(vector_source_read(source, first, count, raw, &err), 0);
            assert_memory_equal(raw, all + first * row_bytes, count * row_bytes);
            assert_int_equal(vector_source_read_f32(source, first, count, out, &err), 0);
            for (uint64_t i = 0; i < count * dim; i++)
                assert_true(out[i] == values[first * dim + i]);
            free(raw);
            free(out);
        }
    }
    assert_int_equal(vector_source_read(source, rows, 1, all, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
    error_clear(&err);
    assert_int_equal(vector_source_read(source, 1, UINT64_MAX, all, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
    error_clear(&err);
    assert_int_equal(vector_source_read_f32(source, 1, UINT64_MAX, (float *)(void *)all, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
    free(all);
}

static const float values_f32[6] = {1.5f, -2, 0, 1e30f, -0.25f, 7};
static const uint8_t values_u8[6] = {0, 1, 127, 128, 254, 255};
static const int8_t values_i8[6] = {0, 1, 127, -128, -1, -2};

static void to_float(enum element_type type, float out[6])
{
    for (int i = 0; i < 6; i++)
        out[i] = type == ELEMENT_F32  ? values_f32[i]
                 : type == ELEMENT_U8 ? (float)values_u8[i]
                                      : (float)values_i8[i];
}

static const void *values_of(enum element_type type)
{
    return type == ELEMENT_F32  ? (const void *)values_f32
           : type == ELEMENT_U8 ? (const void *)values_u8
                                : (const void *)values_i8;
}

static void test_bin_files_read_as_they_were_written(void **state)
{
    static const struct {
        const char *name;
        enum element_type type;
    } cases[] = {{"a.fbin", ELEMENT_F32}, {"A.U8BIN", ELEMENT_U8}, {"a.i8bin", ELEMENT_I8}};

    (void)state;
    for (size_t i = 0; i < 3; i++) {
        uint64_t bytes = element_bytes(cases[i].type, 6);
        uint8_t file[64];
        float values[6];

        store_u32(file, 3);
        store_u32(file + 4, 2);
        memcpy(file + 8, values_of(cases[i].type), bytes);
        struct vector_source *source =
            open_source(write_bytes(cases[i].name, file, 8 + bytes), cases[i].type, 3, 2);
        to_float(cases[i].type, values);
        expect_rows(source, values);
        vector_source_close(source);
    }
}

static void test_vecs_files_read_without_their_repeated_dimensions(void **state)
{
    uint8_t file[64];
    float values[6];

    (void)state;
    for (int row = 0; row < 3; row++) {
        store_u32(file + 12 * row, 2);
        memcpy(file + 12 * row + 4, values_f32 + 2 * row, 8);
    }
    struct vector_source *source = open_source(write_bytes("a.fvecs", file, 36), ELEMENT_F32, 3, 2);
    expect_rows(source, values_f32);
    vector_source_close(source);

    for (int row = 0; row < 2; row++) {
        store_u32(file + 7 * row, 3);
        memcpy(file + 7 * row + 4, values_u8 + 3 * row, 3);
    }
    source = open_source(write_bytes("a.bvecs", file, 14), ELEMENT_U8, 2, 3);
    to_float(ELEMENT_U8, values);
    expect_rows(source, values);
    vector_source_close(source);
}

static void test_npy_files_of_every_version_and_type_read(void **state)
{
    static const struct {
        int version;
        const char *dictionary;
        enum element_type type;
    } cases[] = {
        {1, "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 2), }", ELEMENT_F32},
        {2, "{'descr': '|u1', 'fortran_order': False, 'shape': (3, 2), }", ELEMENT_U8},
        {3, "{'descr': '|i1', 'fortran_order': False, 'shape': (3, 2), }", ELEMENT_I8},
        {1, "{\"shape\":(3L,2L),\"fortran_order\":False,\"descr\":\"<f4\"}", ELEMENT_F32},
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        float values[6];
        struct vector_source *source =
            open_source(write_npy("a.npy", cases[i].version, cases[i].dictionary,
                                  values_of(cases[i].type), element_bytes(cases[i].type, 6)),
                        cases[i].type, 3, 2);

        to_float(cases[i].type, values);
        expect_rows(source, values);
        vector_source_close(source);
    }
}

static void test_halves_become_the_same_floats(void **state)
{
    static const uint16_t halves[6] = {0x3c00, 0xc000, 0x0001, 0x83ff, 0x7bff, 0x8000};
    static const uint16_t brains[6] = {0x3f80, 0xc000, 0x0001, 0x7f7f, 0x8000, 0x3eaa};
    static const float half_values[6] = {1, -2, 0x1p-24f, -0x3ffp-24f, 65504, -0.0f};
    static const float brain_values[6] = {1, -2, 0x1p-133f, 0x1.fep127f, -0.0f, 0x1.54p-2f};
    static const uint16_t infinite[4] = {0, 0, 0, 0x7c00};
    struct error err = ERROR_INIT;
    struct vector_source *source;

    (void)state;
    source = open_source(write_npy("h.npy", 1,
                                   "{'descr': '<f2', 'fortran_order': False, 'shape': (2, 3), }",
                                   halves, 12),
                         ELEMENT_F16, 2, 3);
    expect_rows(source, half_values);
    vector_source_close(source);

    assert_int_equal(vector_source_open_memory(brains, ELEMENT_BF16, 2, 3, "brains", &source, &err),
                     0);
    expect_rows(source, brain_values);
    vector_source_close(source);

    assert_int_equal(
        vector_source_open_memory(infinite, ELEMENT_F16, 2, 2, "halves", &source, &err), 0);
    assert_int_equal(vector_source_check(source, infinite, 10, 2, &err), -1);
    assert_string_equal(err.message, "halves: row 11 has NaN or infinity in dimension 1");
    vector_source_close(source);
}

static void test_wrong_lengths_name_wanted_and_found_bytes(void **state)
{
    uint8_t file[64] = {0};

    (void)state;
    store_u32(file, 3);
    store_u32(file + 4, 2);
    expect_refused(write_bytes("x.fbin", file, 0), "the header takes 8 bytes, the file has 0");
    expect_refused(write_bytes("x.fbin", file, 7), "the header takes 8 bytes, the file has 7");
    expect_refused(write_bytes("x.fbin", file, 8), "need a file of 32 bytes, found 8");
    expect_refused(write_bytes("x.fbin", file, 31), "3 rows of 2 x f32 need a file of 32 bytes, "
                                                    "found 31");
    expect_refused(write_bytes("x.fbin", file, 31), "its last 1 bytes are missing");
    expect_refused(write_bytes("x.fbin", file, 33), "1 bytes follow the last row");
    expect_refused(write_bytes("x.u8bin", file, 13), "need a file of 14 bytes, found 13");
}

static void test_counts_of_zero_or_beyond_any_file_are_refused(void **state)
{
    uint8_t file[64] = {0};

    (void)state;
    store_u32(file + 4, 2);
    expect_refused(write_bytes("x.fbin", file, 8), "0 rows of dimension 2");
    store_u32(file, 2);
    store_u32(file + 4, 0);
    expect_refused(write_bytes("x.fbin", file, 8), "2 rows of dimension 0");
    store_u32(file, UINT32_MAX);
    store_u32(file + 4, UINT32_MAX);
    expect_refused(write_bytes("x.fbin", file, 64), "at most 65536");
    store_u32(file + 4, 65536);
    expect_refused(write_bytes("x.fbin", file, 64), "need a file of 1125899906580488 bytes");

    expect_refused(write_npy("x.npy", 1,
                             "{'descr': '<f4', 'fortran_order': False, "
                             "'shape': (18446744073709551615, 65536), }",
                             file, 64),
                   "more than any file");
    expect_refused(write_npy("x.npy", 1,
                             "{'descr': '<f4', 'fortran_order': False, "
                             "'shape': (4611686018427387904, 4), }",
                             file, 64),
                   "more than any file");
    expect_refused(write_npy("x.npy", 1,
                             "{'descr': '<f4', 'fortran_order': False, "
                             "'shape': (18446744073709551616, 4), }",
                             file, 64),
                   "the .npy header is not");
    expect_refused(write_npy("x.npy", 1,
                             "{'descr': '<f4', 'fortran_order': False, 'shape': (0, 4), }", file,
                             0),
                   "0 rows of dimension 4");
    expect_refused(write_npy("x.npy", 1,
                             "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 4294967297), }",
                             file, 4),
                   "dimension 4294967297");
}

static void test_a_vecs_row_of_another_dimension_is_named(void **state)
{
    struct error err = ERROR_INIT;
    struct vector_file *f;
    uint8_t file[64] = {0}, rows[64];

    (void)state;
    for (int row = 0; row < 4; row++)
        store_u32(file + 12 * row, 2);
    store_u32(file + 24, 3);
    /* As many bytes as four rows: found when it is read. */
    assert_int_equal(vector_file_open(vfs_posix(), write_bytes("x.fvecs", file, 48), &f, &err), 0);
    assert_int_equal(vector_file_read(f, 0, 2, rows, &err), 0);
    assert_int_equal(vector_file_read(f, 3, 1, rows, &err), 0);
    assert_int_equal(vector_file_read(f, 1, 3, rows, &err), -1);
    assert_non_null(
        strstr(err.message, "row 2 says dimension 3 where the first row says 2, at byte 24"));
    vector_file_close(f);
    /* No whole number of rows: found at once. */
    expect_refused(write_bytes("x.fvecs", file, 52), "row 2 says dimension 3");
    store_u32(file + 24, 2);
    expect_refused(write_bytes("x.fvecs", file, 46),
                   "rows of 12 bytes (dimension 2) fill 48 bytes, "
                   "found 46");
    expect_refused(write_bytes("x.fvecs", file, 2), "takes 4 bytes, the file has 2");
    expect_refused(write_bytes("x.fvecs", file, 11), "the first row takes 12 bytes");
    store_u32(file, 0);
    expect_refused(write_bytes("x.fvecs", file, 48), "the first row says dimension 0");
    store_u32(file, UINT32_MAX);
    expect_refused(write_bytes("x.bvecs", file, 48), "the first row says dimension 4294967295");
}

static void test_hostile_npy_headers_are_refused(void **state)
{
    static const struct {
        const char *dictionary, *message;
    } cases[] = {
        {"", "the .npy header is not"},
        {"{", "the .npy header is not"},
        {"{}", "the .npy header is not"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (3, 2), } x", "the .npy header"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (3, 2", "the .npy header"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (3, -2), }", "the .npy header"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': 6, }", "the .npy header"},
        {"{'descr': '<f4', 'fortran_order': False, }", "the .npy header"},
        {"{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': (3, 2), }",
         "the .npy header"},
        {"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3, 2), }",
         "structured types"},
        {"{'descr': '<f4<f4<f4<f4<f4<f4', 'fortran_order': False, 'shape': (3, 2), }",
         "the .npy header"},
        {"{'descr': '<f4', 'fortran_order': True, 'shape': (3, 2), }", "Fortran order"},
        {"{'descr': '<f8', 'fortran_order': False, 'shape': (3, 2), }", "elements of type '<f8'"},
        {"{'descr': '>f4', 'fortran_order': False, 'shape': (3, 2), }", "elements of type '>f4'"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (6,), }", "an array of 1 dimensions"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (), }", "an array of 0 dimensions"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (3, 2, 1), }",
         "an array of 3 dimensions"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (4, 2), }", "bytes, found"},
    };
    uint8_t file[64] = "\x93NUMPY";

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        expect_refused(write_npy("x.npy", 1, cases[i].dictionary, values_f32, 24),
                       cases[i].message);
    expect_refused(write_bytes("x.npy", file, 0), "takes 12 bytes, the file has 0");
    expect_refused(write_bytes("x.npy", file, 12), "version 0.0");
    file[6] = 4;
    expect_refused(write_bytes("x.npy", file, 12), "version 4.0");
    file[6] = 1;
    store_u16(file + 8, 65535);
    expect_refused(write_bytes("x.npy", file, 64), "the header takes 65545 bytes");
    file[6] = 2;
    store_u32(file + 8, UINT32_MAX);
    expect_refused(write_bytes("x.npy", file, 64), "header of 4294967295 bytes");
    expect_refused(write_bytes("x.npy", "PK\3\4..........", 14), "not an .npy file");
    expect_refused(write_bytes("x.hdf5", file, 64), "wanted .fbin");
}

static void test_a_missing_file_is_err_not_found(void **state)
{
    struct error err = ERROR_INIT;
    struct vector_source *source = NULL;

    (void)state;
    assert_int_equal(vector_source_open(vfs_posix(), path_of("none.fbin"), &source, &err), -1);
    assert_int_equal(err.code, ERR_NOT_FOUND);
}

static void test_nan_and_infinity_are_named_by_row_and_dimension(void **state)
{
    float rows[4][3] = {{0}};
    struct error err = ERROR_INIT;
    struct vector_source *source;

    (void)state;
    assert_int_equal(vector_check_finite(rows[0], 100, 4, 3, &err), 0);
    rows[2][1] = NAN;
    rows[3][0] = INFINITY;
    assert_int_equal(vector_check_finite(rows[0], 100, 4, 3, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
    assert_string_equal(err.message, "row 102 has NaN in dimension 1");
    error_clear(&err);
    rows[2][1] = 3.4028235e38f;
    assert_int_equal(vector_check_finite(rows[0], 100, 4, 3, &err), -1);
    assert_string_equal(err.message, "row 103 has infinity in dimension 0");
    error_clear(&err);

    assert_int_equal(vector_source_open_memory(rows, ELEMENT_F32, 4, 3, "memory", &source, &err),
                     0);
    assert_int_equal(vector_source_check(source, rows, 0, 4, &err), -1);
    assert_string_equal(err.message, "memory: row 3 has infinity in dimension 0");
    vector_source_close(source);
}

static void test_a_memory_source_reads_like_a_file(void **state)
{
    struct error err = ERROR_INIT;
    struct vector_source *source;
    float values[6];

    (void)state;
    assert_int_equal(
        vector_source_open_memory(values_i8, ELEMENT_I8, 2, 3, "memory", &source, &err), 0);
    to_float(ELEMENT_I8, values);
    expect_rows(source, values);
    vector_source_close(source);
    assert_int_equal(vector_source_open_memory(values_i8, ELEMENT_I8, 0, 3, "m", &source, &err),
                     -1);
    assert_int_equal(vector_source_open_memory(values_i8, 99, 1, 3, "m", &source, &err), -1);
    assert_int_equal(vector_source_open_memory(values_i8, ELEMENT_I8, 1, 0, "m", &source, &err),
                     -1);
    assert_int_equal(err.code, ERR_INVALID);
}

static void test_written_files_read_back_and_appear_only_at_the_end(void **state)
{
    enum { ROWS = 5000, DIM = 100 }; /* more than one write block */
    struct error err = ERROR_INIT;
    float *rows = malloc(ROWS * DIM * sizeof *rows), *back = malloc(ROWS * DIM * sizeof *rows);
    const char *path = path_of("w.fbin"), *aside = path_of("w.fbin.tmp");
    struct vector_writer *writer;
    struct random random;

    (void)state;
    random_init(&random, 7, 0);
    for (int i = 0; i < ROWS * DIM; i++)
        rows[i] = random_float(&random);
    write_bytes("w.fbin", "old", 3);
    write_bytes("w.fbin.tmp", "left over", 9);

    assert_int_equal(vector_writer_open(vfs_posix(), path, ELEMENT_F32, DIM, &writer, &err), 0);
    for (uint64_t done = 0; done < ROWS;) {
        uint64_t n = 1 + random_below(&random, 700);

        if (n > ROWS - done)
            n = ROWS - done;
        assert_int_equal(vector_writer_append(writer, rows + done * DIM, n, &err), 0);
        done += n;
    }
    struct vfs_stat stat;
    assert_int_equal(file_stat(vfs_posix(), path, &stat, &err), 0);
    assert_int_equal(stat.bytes, 3);
    expect_refused(path, "takes 8 bytes"); /* still the old one */
    if (vector_writer_close(writer, &err) < 0)
        fail_msg("%s", err.message);
    assert_false(file_exists(vfs_posix(), aside));
    struct vector_source *source = open_source(path, ELEMENT_F32, ROWS, DIM);
    assert_int_equal(vector_source_read(source, 0, ROWS, back, &err), 0);
    assert_memory_equal(rows, back, ROWS * DIM * sizeof *rows);
    vector_source_close(source);

    assert_int_equal(vector_writer_open(vfs_posix(), path, ELEMENT_F32, 4, &writer, &err), 0);
    assert_int_equal(vector_writer_append(writer, rows, 1, &err), 0);
    vector_writer_abort(writer);
    assert_false(file_exists(vfs_posix(), aside));
    source = open_source(path, ELEMENT_F32, ROWS, DIM);
    vector_source_close(source);

    assert_int_equal(vector_writer_open(vfs_posix(), path, ELEMENT_F32, 4, &writer, &err), 0);
    assert_int_equal(vector_writer_close(writer, &err), -1);
    assert_non_null(strstr(err.message, "no rows to write"));
    error_clear(&err);
    assert_int_equal(vector_writer_open(vfs_posix(), path, ELEMENT_U8, 4, &writer, &err), -1);
    assert_non_null(strstr(err.message, "named .u8bin"));
    error_clear(&err);
    assert_int_equal(
        vector_writer_open(vfs_posix(), path_of("w.npy"), ELEMENT_F32, 4, &writer, &err), -1);
    assert_int_equal(vector_writer_open(vfs_posix(), path, ELEMENT_F32, 0, &writer, &err), -1);
    free(rows);
    free(back);
}

static int write_once(struct vfs *vfs, const char *path, struct error *err)
{
    struct vector_writer *writer;
    uint8_t row[8] = {1, 2, 3, 4, 5, 6, 7, 8};

    if (vector_writer_open(vfs, path, ELEMENT_U8, 8, &writer, err) < 0)
        return -1;
    if (vector_writer_append(writer, row, 1, err) < 0) {
        vector_writer_abort(writer);
        return -1;
    }
    return vector_writer_close(writer, err);
}

static void test_a_failed_write_leaves_the_old_file_whole(void **state)
{
    const char *path = path_of("f.u8bin");
    struct vfs_fault fault;
    struct error err = ERROR_INIT;
    uint64_t calls;

    (void)state;
    vfs_fault_init(&fault, vfs_posix());
    vfs_fault_plan(&fault, NULL);
    assert_int_equal(write_once(&fault.vfs, path, &err), 0);
    calls = vfs_fault_calls(&fault, VFS_CALL_ANY);
    assert_true(calls >= 6);
    for (uint64_t nth = 1; nth <= calls; nth++) {
        struct vfs_fault_plan plan = {.nth = nth, .errno_value = EIO};
        struct vector_source *source;

        error_clear(&err);
        vfs_fault_plan(&fault, &plan);
        if (write_once(&fault.vfs, path, &err) < 0)
            assert_true(err.code != ERR_NONE);
        vfs_fault_plan(&fault, NULL);
        source = open_source(path, ELEMENT_U8, 1, 8);
        vector_source_close(source);
    }
    assert_int_equal(vfs_fault_files_open(&fault), 0);
    vfs_fault_release(&fault);
}

static void test_failed_reads_are_errors_and_leak_no_file(void **state)
{
    struct vfs_fault fault;
    struct error err = ERROR_INIT;
    struct vector_source *source;
    uint8_t file[64] = {0}, row[64];

    (void)state;
    for (int i = 0; i < 4; i++)
        store_u32(file + 12 * i, 2);
    const char *path = write_bytes("e.fvecs", file, 48);
    vfs_fault_init(&fault, vfs_posix());
    for (uint64_t nth = 1; nth <= 4; nth++) {
        struct vfs_fault_plan plan = {.nth = nth, .errno_value = EIO};
        int rc;

        error_clear(&err);
        vfs_fault_plan(&fault, &plan);
        source = NULL;
        rc = vector_source_open(&fault.vfs, path, &source, &err);
        if (rc == 0)
            rc = vector_source_read(source, 0, 4, row, &err);
        assert_int_equal(rc, -1);
        assert_int_equal(err.code, ERR_IO);
        vector_source_close(source);
    }
    assert_int_equal(vfs_fault_files_open(&fault), 0);
    vfs_fault_release(&fault);
}

static void expect_keys(const char *descr, const void *data, size_t bytes, const int64_t want[3])
{
    struct error err = ERROR_INIT;
    struct npy_keys *keys;
    char dictionary[128];
    int64_t out[3];

    snprintf(dictionary, sizeof dictionary,
             "{'descr': '%s', 'fortran_order': False, 'shape': (3,), }", descr);
    if (npy_keys_open(vfs_posix(), write_npy("k.npy", 1, dictionary, data, bytes), &keys, &err) < 0)
        fail_msg("%s", err.message);
    assert_int_equal(npy_keys_count(keys), 3);
    assert_int_equal(npy_keys_read(keys, 0, 3, out, &err), 0);
    assert_memory_equal(out, want, sizeof out);
    assert_int_equal(npy_keys_read(keys, 1, 2, out, &err), 0);
    assert_memory_equal(out, want + 1, 16);
    assert_int_equal(npy_keys_read(keys, 1, 3, out, &err), -1);
    npy_keys_close(keys);
}

static void test_keys_read_from_npy_of_every_integer_type(void **state)
{
    static const int64_t wide[3] = {INT64_MIN, -1, INT64_MAX};
    static const int64_t large[3] = {0, 1, INT64_MAX};
    static const int32_t narrow[3] = {INT32_MIN, -1, INT32_MAX};
    static const uint32_t unsigned_narrow[3] = {0, 1, UINT32_MAX};
    static const uint64_t too_large[3] = {0, 1, UINT64_MAX};
    struct error err = ERROR_INIT;
    struct npy_keys *keys;
    int64_t out[3];

    (void)state;
    expect_keys("<i8", wide, 24, wide);
    expect_keys("<u8", large, 24, large);
    expect_keys("<i4", narrow, 12, (const int64_t[]){INT32_MIN, -1, INT32_MAX});
    expect_keys("<u4", unsigned_narrow, 12, (const int64_t[]){0, 1, UINT32_MAX});

    static const char u8[] = "{'descr': '<u8', 'fortran_order': False, 'shape': (3,), }";
    assert_int_equal(
        npy_keys_open(vfs_posix(), write_npy("k.npy", 1, u8, too_large, 24), &keys, &err), 0);
    assert_int_equal(npy_keys_read(keys, 0, 3, out, &err), -1);
    assert_non_null(strstr(err.message, "key 18446744073709551615 of row 2 does not fit int64"));
    npy_keys_close(keys);
    error_clear(&err);
    assert_int_equal(
        npy_keys_open(vfs_posix(), write_npy("k.npy", 1, u8, too_large, 23), &keys, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
    error_clear(&err);
    static const char f8[] = "{'descr': '<f8', 'fortran_order': False, 'shape': (3,), }";
    assert_int_equal(
        npy_keys_open(vfs_posix(), write_npy("k.npy", 1, f8, too_large, 24), &keys, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
}

static void test_truth_files_read_back_and_hostile_ones_are_refused(void **state)
{
    uint32_t ids[6] = {0, 1, 2, 3, 4, 5};
    float distances[6] = {0, 1, 2, 0.5f, 1e30f, INFINITY};
    struct truth truth = {2, 3, ids, distances}, back;
    struct error err = ERROR_INIT;
    const char *path = path_of("t.gt.bin");
    uint8_t file[128] = {0};

    (void)state;
    assert_int_equal(truth_file_write(vfs_posix(), path, &truth, &err), 0);
    assert_int_equal(truth_file_read(vfs_posix(), path, 6, &back, &err), 0);
    assert_int_equal(back.query_count, 2);
    assert_int_equal(back.k, 3);
    assert_memory_equal(back.ids, ids, sizeof ids);
    assert_memory_equal(back.distances, distances, sizeof distances);
    truth_release(&back);
    truth_release(&back);

    assert_int_equal(truth_file_read(vfs_posix(), path, 5, &back, &err), -1);
    assert_non_null(strstr(err.message, "neighbour 3 of query 1 is row 5, the base has 5 rows"));
    error_clear(&err);
    distances[4] = NAN;
    assert_int_equal(truth_file_write(vfs_posix(), path, &truth, &err), 0);
    assert_int_equal(truth_file_read(vfs_posix(), path, 0, &back, &err), -1);
    assert_non_null(strstr(err.message, "neighbour 2 of query 1 is NaN"));
    error_clear(&err);
    truth.k = 0;
    assert_int_equal(truth_file_write(vfs_posix(), path, &truth, &err), -1);

    static const struct {
        uint32_t query_count, k;
        size_t bytes;
        const char *message;
    } cases[] = {{2, 3, 7, "takes 8 bytes, the file has 7"},
                 {2, 3, 55, "need a file of 56 bytes, found 55"},
                 {2, 3, 57, "need a file of 56 bytes, found 57"},
                 {0, 3, 8, "0 queries"},
                 {2, 0, 8, "0 neighbours"},
                 {UINT32_MAX, UINT32_MAX, 64, "more than any file"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        store_u32(file, cases[i].query_count);
        store_u32(file + 4, cases[i].k);
        error_clear(&err);
        assert_int_equal(truth_file_read(vfs_posix(), write_bytes("x.gt.bin", file, cases[i].bytes),
                                         0, &back, &err),
                         -1);
        assert_int_equal(err.code, ERR_INVALID);
        if (!strstr(err.message, cases[i].message))
            fail_msg("wanted \"%s\", found \"%s\"", cases[i].message, err.message);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bin_files_read_as_they_were_written),
        cmocka_unit_test(test_vecs_files_read_without_their_repeated_dimensions),
        cmocka_unit_test(test_npy_files_of_every_version_and_type_read),
        cmocka_unit_test(test_halves_become_the_same_floats),
        cmocka_unit_test(test_wrong_lengths_name_wanted_and_found_bytes),
        cmocka_unit_test(test_counts_of_zero_or_beyond_any_file_are_refused),
        cmocka_unit_test(test_a_vecs_row_of_another_dimension_is_named),
        cmocka_unit_test(test_hostile_npy_headers_are_refused),
        cmocka_unit_test(test_a_missing_file_is_err_not_found),
        cmocka_unit_test(test_nan_and_infinity_are_named_by_row_and_dimension),
        cmocka_unit_test(test_a_memory_source_reads_like_a_file),
        cmocka_unit_test(test_written_files_read_back_and_appear_only_at_the_end),
        cmocka_unit_test(test_a_failed_write_leaves_the_old_file_whole),
        cmocka_unit_test(test_failed_reads_are_errors_and_leak_no_file),
        cmocka_unit_test(test_keys_read_from_npy_of_every_integer_type),
        cmocka_unit_test(test_truth_files_read_back_and_hostile_ones_are_refused),
    };

    return cmocka_run_group_tests_name("vector_source", tests, setup, teardown);
}
