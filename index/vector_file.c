/* How it works: opening reads the header into the one shape all formats share (offset of row 0,
 * bytes from row to row) and then compares the length that shape implies with the file's, in
 * checked arithmetic, so that everything after it can trust rows, dim and offsets. The dimension
 * that .fvecs and .bvecs repeat before each row is checked as rows are read: doing it on open would
 * read the file twice. */
#include "index/vector_file.h"

#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "storage/base/bytes.h"
#include "storage/file.h"

#define BIN_HEADER_BYTES 8u
#define ROW_PREFIX_BYTES 4u
#define NPY_HEADER_BYTES_MAX 65536u
#define SCRATCH_BYTES (1u << 20)
#define DIAGNOSE_ROWS_MAX 200000u /* how far a wrong .fvecs is read to name the bad row */

static const struct {
    const char *suffix;
    enum element_type type;
} formats[VECTOR_FORMAT_COUNT] = {
    [VECTOR_FBIN] = {".fbin", ELEMENT_F32},  [VECTOR_U8BIN] = {".u8bin", ELEMENT_U8},
    [VECTOR_I8BIN] = {".i8bin", ELEMENT_I8}, [VECTOR_FVECS] = {".fvecs", ELEMENT_F32},
    [VECTOR_BVECS] = {".bvecs", ELEMENT_U8}, [VECTOR_NPY] = {".npy", 0},
};

static bool has_suffix(const char *path, const char *suffix)
{
    size_t n = strlen(path), m = strlen(suffix);

    return n >= m && strcasecmp(path + n - m, suffix) == 0;
}

int vector_format_of_path(const char *path, enum vector_format *out, struct error *err)
{
    for (int i = 0; i < VECTOR_FORMAT_COUNT; i++) {
        if (has_suffix(path, formats[i].suffix)) {
            *out = (enum vector_format)i;
            return 0;
        }
    }
    return error_set(err, ERR_INVALID,
                     "%s: the name does not say its format: wanted .fbin, .u8bin, .i8bin, .fvecs, "
                     ".bvecs or .npy",
                     path);
}

/* ---- headers ---- */

/* The shape is in place: is the file as long as it says? */
static int check_shape(struct vector_file *f, uint64_t file_bytes, struct error *err)
{
    uint64_t bytes;

    if (!f->rows || !f->dim)
        return error_set(err, ERR_INVALID,
                         "%s: the header says %" PRIu64 " rows of dimension %u; "
                         "a vector file has at least one of each",
                         f->path, f->rows, f->dim);
    if (f->dim > VECTOR_FILE_DIM_MAX) {
        error_set(err, ERR_INVALID, "%s: the header says dimension %u, at most %u is possible",
                  f->path, f->dim, VECTOR_FILE_DIM_MAX);
        error_remedy(err, "check that the file is of the format its name says");
        return -1;
    }
    f->row_bytes = (uint32_t)element_bytes(f->type, f->dim);
    f->stride_bytes = f->row_bytes;
    if (!size_mul(f->rows, f->stride_bytes, &bytes) || !size_add(bytes, f->data_offset, &bytes))
        return error_set(err, ERR_INVALID,
                         "%s: the header says %" PRIu64 " rows of %u bytes, more than any file "
                         "holds",
                         f->path, f->rows, f->row_bytes);
    if (bytes == file_bytes)
        return 0;
    error_set(err, ERR_INVALID,
              "%s: %" PRIu64 " rows of %u x %s need a file of %" PRIu64 " bytes, found %" PRIu64,
              f->path, f->rows, f->dim, element_name(f->type), bytes, file_bytes);
    if (file_bytes < bytes)
        error_remedy(err, "copy or download the file again: its last %" PRIu64 " bytes are missing",
                     bytes - file_bytes);
    else
        error_remedy(err,
                     "check that the file is of the format its name says: %" PRIu64
                     " bytes follow the last row",
                     file_bytes - bytes);
    return -1;
}

static int too_short(const char *path, const char *what, uint64_t wanted, uint64_t found,
                     struct error *err)
{
    error_set(err, ERR_INVALID, "%s: %s takes %" PRIu64 " bytes, the file has %" PRIu64, path, what,
              wanted, found);
    error_remedy(err, found ? "copy or download the file again" : "the file is empty");
    return -1;
}

static int open_bin(struct vector_file *f, uint64_t file_bytes, struct error *err)
{
    uint8_t header[BIN_HEADER_BYTES];

    if (file_bytes < sizeof header)
        return too_short(f->path, "the header", sizeof header, file_bytes, err);
    if (file_read_exact(f->file, f->path, header, sizeof header, 0, err) < 0)
        return -1;
    f->type = formats[f->format].type;
    f->rows = load_u32(header);
    f->dim = load_u32(header + 4);
    f->data_offset = sizeof header;
    return check_shape(f, file_bytes, err);
}

/* Reports row `row`, whose repeated dimension is not the first row's. */
static int bad_row(const struct vector_file *f, uint64_t row, uint32_t dim, struct error *err)
{
    error_set(err, ERR_INVALID,
              "%s: row %" PRIu64 " says dimension %u where the first row says %u, at byte %" PRIu64,
              f->path, row, dim, f->dim, row * f->stride_bytes);
    error_remedy(err, "all rows of the file must have one dimension; if they have, the file is "
                      "damaged there");
    return -1;
}

/* The file is no whole number of rows: find the row that is to blame, as far as it is cheap. */
static int diagnose_vecs(const struct vector_file *f, uint64_t file_bytes, struct error *err)
{
    uint64_t whole = file_bytes / f->stride_bytes;
    uint64_t rest = file_bytes % f->stride_bytes;
    uint8_t prefix[ROW_PREFIX_BYTES];

    for (uint64_t row = 1; row <= whole && row <= DIAGNOSE_ROWS_MAX; row++) {
        uint64_t offset = row * f->stride_bytes;

        if (file_bytes - offset < sizeof prefix)
            break;
        if (file_read_exact(f->file, f->path, prefix, sizeof prefix, offset, err) < 0)
            return -1;
        if (load_u32(prefix) != f->dim)
            return bad_row(f, row, load_u32(prefix), err);
    }
    error_set(err, ERR_INVALID,
              "%s: rows of %u bytes (dimension %u) fill %" PRIu64 " bytes, found %" PRIu64, f->path,
              f->stride_bytes, f->dim, file_bytes - rest + f->stride_bytes, file_bytes);
    error_remedy(err,
                 "copy or download the file again: its last row, %" PRIu64 ", has only %" PRIu64
                 " bytes",
                 whole, rest);
    return -1;
}

static int open_vecs(struct vector_file *f, uint64_t file_bytes, struct error *err)
{
    uint8_t prefix[ROW_PREFIX_BYTES];

    if (file_bytes < sizeof prefix)
        return too_short(f->path, "the first row's dimension", sizeof prefix, file_bytes, err);
    if (file_read_exact(f->file, f->path, prefix, sizeof prefix, 0, err) < 0)
        return -1;
    f->type = formats[f->format].type;
    f->dim = load_u32(prefix);
    if (!f->dim || f->dim > VECTOR_FILE_DIM_MAX) {
        error_set(err, ERR_INVALID, "%s: the first row says dimension %u, possible is 1 to %u",
                  f->path, f->dim, VECTOR_FILE_DIM_MAX);
        error_remedy(err, "check that the file is of the format its name says");
        return -1;
    }
    f->row_bytes = (uint32_t)element_bytes(f->type, f->dim);
    f->stride_bytes = f->row_bytes + ROW_PREFIX_BYTES;
    f->data_offset = ROW_PREFIX_BYTES;
    f->rows = file_bytes / f->stride_bytes;
    if (!f->rows)
        return too_short(f->path, "the first row", f->stride_bytes, file_bytes, err);
    if (file_bytes % f->stride_bytes)
        return diagnose_vecs(f, file_bytes, err);
    return 0;
}

/* ---- .npy ---- */

struct npy {
    char descr[16];
    bool fortran;
    uint32_t dims; /* of shape */
    uint64_t shape[2];
    uint64_t data_offset;
};

/* A cursor over the header's Python dictionary; `at` may reach `end`, never pass it. */
struct cursor {
    const char *at;
    const char *end;
};

static void skip_space(struct cursor *c)
{
    while (c->at < c->end && (*c->at == ' ' || *c->at == '\n' || *c->at == '\t'))
        c->at++;
}

static bool take(struct cursor *c, const char *text)
{
    size_t n = strlen(text);

    skip_space(c);
    if ((size_t)(c->end - c->at) < n || memcmp(c->at, text, n) != 0)
        return false;
    c->at += n;
    return true;
}

static bool take_quoted(struct cursor *c, char *out, size_t out_bytes)
{
    size_t n = 0;
    char quote;

    skip_space(c);
    if (c->at == c->end || (*c->at != '\'' && *c->at != '"'))
        return false;
    quote = *c->at++;
    while (c->at < c->end && *c->at != quote && n + 1 < out_bytes)
        out[n++] = *c->at++;
    out[n] = 0;
    return c->at < c->end && *c->at++ == quote;
}

static bool take_number(struct cursor *c, uint64_t *out)
{
    const char *start;
    uint64_t value = 0;

    skip_space(c);
    start = c->at;
    while (c->at < c->end && *c->at >= '0' && *c->at <= '9') {
        if (!size_mul(value, 10, &value) || !size_add(value, (uint64_t)(*c->at - '0'), &value))
            return false;
        c->at++;
    }
    if (c->at == start)
        return false;
    take(c, "L"); /* long integers of Python 2 */
    *out = value;
    return true;
}

/* "(3, 4)" and "(3,)"; more dimensions are counted, not kept. */
static bool take_shape(struct cursor *c, struct npy *npy)
{
    if (!take(c, "("))
        return false;
    while (!take(c, ")")) {
        uint64_t value;

        if (!take_number(c, &value))
            return false;
        if (npy->dims < 2)
            npy->shape[npy->dims] = value;
        npy->dims++;
        if (take(c, ","))
            continue;
        if (!take(c, ")"))
            return false;
        break;
    }
    return true;
}

static bool parse_dictionary(struct cursor *c, struct npy *npy)
{
    bool descr = false, order = false, shape = false;
    char key[16];

    if (!take(c, "{"))
        return false;
    while (!take(c, "}")) {
        if (!take_quoted(c, key, sizeof key) || !take(c, ":"))
            return false;
        if (!strcmp(key, "descr") && !descr) {
            if (!take_quoted(c, npy->descr, sizeof npy->descr))
                return false;
            descr = true;
        } else if (!strcmp(key, "fortran_order") && !order) {
            npy->fortran = take(c, "True");
            if (!npy->fortran && !take(c, "False"))
                return false;
            order = true;
        } else if (!strcmp(key, "shape") && !shape) {
            if (!take_shape(c, npy))
                return false;
            shape = true;
        } else {
            return false;
        }
        if (take(c, ","))
            continue;
        if (!take(c, "}"))
            return false;
        break;
    }
    skip_space(c);
    return descr && order && shape && c->at == c->end;
}

static int npy_header(struct vfs_file *file, const char *path, uint64_t file_bytes, struct npy *npy,
                      struct error *err)
{
    uint8_t start[12];
    uint32_t start_bytes, header_bytes;
    struct cursor cursor;
    char *header = NULL;
    int rc = -1;

    *npy = (struct npy){0};
    if (file_bytes < sizeof start)
        return too_short(path, "the header", sizeof start, file_bytes, err);
    if (file_read_exact(file, path, start, sizeof start, 0, err) < 0)
        return -1;
    if (memcmp(start, "\x93NUMPY", 6) != 0) {
        error_set(err, ERR_INVALID, "%s: not an .npy file: it does not start with \\x93NUMPY",
                  path);
        error_remedy(err, "save the array with numpy.save(); an .npz archive must be unpacked");
        return -1;
    }
    if (start[6] < 1 || start[6] > 3 || start[7] != 0)
        return error_set(err, ERR_INVALID, "%s: .npy version %u.%u, known are 1.0, 2.0 and 3.0",
                         path, start[6], start[7]);
    start_bytes = start[6] == 1 ? 10 : 12;
    header_bytes = start[6] == 1 ? load_u16(start + 8) : load_u32(start + 8);
    if (header_bytes > NPY_HEADER_BYTES_MAX)
        return error_set(err, ERR_INVALID, "%s: an .npy header of %u bytes, at most %u is possible",
                         path, header_bytes, NPY_HEADER_BYTES_MAX);
    npy->data_offset = start_bytes + header_bytes;
    if (npy->data_offset > file_bytes)
        return too_short(path, "the header", npy->data_offset, file_bytes, err);
    header = malloc(header_bytes + 1);
    if (!header) {
        error_set(err, ERR_NOMEM, "%s: no memory for the header", path);
        goto done;
    }
    if (file_read_exact(file, path, header, header_bytes, start_bytes, err) < 0)
        goto done;
    cursor = (struct cursor){header, header + header_bytes};
    if (!parse_dictionary(&cursor, npy)) {
        error_set(err, ERR_INVALID,
                  "%s: the .npy header is not {'descr': '...', 'fortran_order': ..., 'shape': "
                  "(...)} from byte %td on",
                  path, start_bytes + (cursor.at - header));
        error_remedy(err, "save the array with numpy.save(); structured types are not vectors");
        goto done;
    }
    rc = 0;
done:
    free(header);
    return rc;
}

/* 'f4' of '<f4', and of '|u1' and so on: the byte order of single bytes means nothing. */
static bool descr_is(const struct npy *npy, const char *type)
{
    const char *d = npy->descr;

    if (*d == '<' || *d == '=' || (*d == '|' && type[1] == '1') || (*d == '>' && type[1] == '1'))
        d++;
    return !strcmp(d, type);
}

static int open_npy(struct vector_file *f, uint64_t file_bytes, struct error *err)
{
    struct npy npy;

    if (npy_header(f->file, f->path, file_bytes, &npy, err) < 0)
        return -1;
    if (descr_is(&npy, "f4"))
        f->type = ELEMENT_F32;
    else if (descr_is(&npy, "f2"))
        f->type = ELEMENT_F16;
    else if (descr_is(&npy, "u1"))
        f->type = ELEMENT_U8;
    else if (descr_is(&npy, "i1"))
        f->type = ELEMENT_I8;
    else {
        error_set(err, ERR_INVALID,
                  "%s: elements of type '%s', wanted '<f4', '<f2', '|u1' or '|i1'", f->path,
                  npy.descr);
        error_remedy(err, "convert it: numpy.save(path, array.astype('<f4'))");
        return -1;
    }
    if (npy.dims != 2) {
        error_set(err, ERR_INVALID, "%s: an array of %u dimensions, wanted 2: rows x dim", f->path,
                  npy.dims);
        error_remedy(err, "reshape it: numpy.save(path, array.reshape(-1, dim))");
        return -1;
    }
    if (npy.fortran) {
        error_set(err, ERR_INVALID, "%s: the array is stored column by column (Fortran order)",
                  f->path);
        error_remedy(err, "convert it: numpy.save(path, numpy.ascontiguousarray(array))");
        return -1;
    }
    if (npy.shape[1] > VECTOR_FILE_DIM_MAX)
        return error_set(err, ERR_INVALID,
                         "%s: the header says dimension %" PRIu64 ", at most %u is possible",
                         f->path, npy.shape[1], VECTOR_FILE_DIM_MAX);
    f->rows = npy.shape[0];
    f->dim = (uint32_t)npy.shape[1];
    f->data_offset = npy.data_offset;
    return check_shape(f, file_bytes, err);
}

/* ---- open and read ---- */

int vector_file_open(struct vfs *vfs, const char *path, struct vector_file **out, struct error *err)
{
    struct vector_file *f = calloc(1, sizeof *f);
    uint64_t file_bytes;
    int rc = -1;

    if (!f || !(f->path = strdup(path))) {
        error_set(err, ERR_NOMEM, "%s: no memory to open it", path);
        goto done;
    }
    if (vector_format_of_path(path, &f->format, err) < 0)
        goto done;
    f->file = file_open(vfs, path, VFS_READ, err);
    if (!f->file || file_size(f->file, path, &file_bytes, err) < 0)
        goto done;
    switch (f->format) {
    case VECTOR_FVECS:
    case VECTOR_BVECS:
        rc = open_vecs(f, file_bytes, err);
        break;
    case VECTOR_NPY:
        rc = open_npy(f, file_bytes, err);
        break;
    default:
        rc = open_bin(f, file_bytes, err);
        break;
    }
    if (rc < 0)
        goto done;
    *out = f;
    f = NULL; /* moved to the caller */
done:
    vector_file_close(f);
    return rc;
}

void vector_file_close(struct vector_file *file)
{
    if (!file)
        return;
    file_close(file->file, file->path, NULL);
    free(file->path);
    free(file);
}

static int check_range(const char *path, uint64_t first, uint64_t count, uint64_t rows,
                       struct error *err)
{
    if (first > rows || count > rows - first)
        return error_set(err, ERR_INVALID,
                         "%s: rows %" PRIu64 " to %" PRIu64 " wanted, it has %" PRIu64, path, first,
                         first + count, rows);
    return 0;
}

/* Rows with a dimension before each: through a scratch block, checked and closed up. */
static int read_vecs(const struct vector_file *f, uint64_t first, uint64_t count, uint8_t *out,
                     struct error *err)
{
    uint64_t block = SCRATCH_BYTES / f->stride_bytes;
    uint8_t *scratch;
    int rc = -1;

    if (!block)
        block = 1;
    if (block > count)
        block = count;
    scratch = malloc(block * f->stride_bytes);
    if (!scratch) {
        error_set(err, ERR_NOMEM, "%s: no memory to read rows", f->path);
        goto done;
    }
    while (count) {
        uint64_t n = count < block ? count : block;

        if (file_read_exact(f->file, f->path, scratch, n * f->stride_bytes, first * f->stride_bytes,
                            err) < 0)
            goto done;
        for (uint64_t i = 0; i < n; i++) {
            const uint8_t *row = scratch + i * f->stride_bytes;

            if (load_u32(row) != f->dim) {
                bad_row(f, first + i, load_u32(row), err);
                goto done;
            }
            memcpy(out, row + ROW_PREFIX_BYTES, f->row_bytes);
            out += f->row_bytes;
        }
        first += n;
        count -= n;
    }
    rc = 0;
done:
    free(scratch);
    return rc;
}

int vector_file_read(const struct vector_file *file, uint64_t first_row, uint64_t count, void *out,
                     struct error *err)
{
    if (check_range(file->path, first_row, count, file->rows, err) < 0)
        return -1;
    if (!count)
        return 0;
    if (file->stride_bytes != file->row_bytes)
        return read_vecs(file, first_row, count, out, err);
    /* No overflow: check_shape() has computed rows x row_bytes. */
    return file_read_exact(file->file, file->path, out, count * file->row_bytes,
                           file->data_offset + first_row * file->row_bytes, err);
}

/* ---- keys ---- */

struct npy_keys {
    struct vfs_file *file;
    char *path;
    uint64_t count;
    uint64_t data_offset;
    uint32_t key_bytes;
    bool is_signed;
};

int npy_keys_open(struct vfs *vfs, const char *path, struct npy_keys **out, struct error *err)
{
    struct npy_keys *keys = calloc(1, sizeof *keys);
    uint64_t file_bytes, bytes;
    struct npy npy;
    int rc = -1;

    if (!keys || !(keys->path = strdup(path))) {
        error_set(err, ERR_NOMEM, "%s: no memory to open it", path);
        goto done;
    }
    keys->file = file_open(vfs, path, VFS_READ, err);
    if (!keys->file || file_size(keys->file, path, &file_bytes, err) < 0 ||
        npy_header(keys->file, path, file_bytes, &npy, err) < 0)
        goto done;
    keys->key_bytes = descr_is(&npy, "i8") || descr_is(&npy, "u8")   ? 8
                      : descr_is(&npy, "i4") || descr_is(&npy, "u4") ? 4
                                                                     : 0;
    keys->is_signed = descr_is(&npy, "i8") || descr_is(&npy, "i4");
    if (!keys->key_bytes || npy.dims != 1) {
        error_set(err, ERR_INVALID,
                  "%s: an array of %u dimensions of '%s', keys are 1 dimension of '<i8'", path,
                  npy.dims, npy.descr);
        error_remedy(err, "convert it: numpy.save(path, array.ravel().astype('<i8'))");
        goto done;
    }
    keys->count = npy.shape[0];
    keys->data_offset = npy.data_offset;
    if (!keys->count) {
        error_set(err, ERR_INVALID, "%s: the array is empty", path);
        goto done;
    }
    if (!size_mul(keys->count, keys->key_bytes, &bytes) ||
        !size_add(bytes, keys->data_offset, &bytes)) {
        error_set(err, ERR_INVALID,
                  "%s: the header says %" PRIu64 " keys, more than any file holds", path,
                  keys->count);
        goto done;
    }
    if (bytes != file_bytes) {
        error_set(err, ERR_INVALID,
                  "%s: %" PRIu64 " keys of '%s' need a file of %" PRIu64 " bytes, found %" PRIu64,
                  path, keys->count, npy.descr, bytes, file_bytes);
        error_remedy(err, "save or copy the file again");
        goto done;
    }
    *out = keys;
    keys = NULL; /* moved to the caller */
    rc = 0;
done:
    npy_keys_close(keys);
    return rc;
}

void npy_keys_close(struct npy_keys *keys)
{
    if (!keys)
        return;
    file_close(keys->file, keys->path, NULL);
    free(keys->path);
    free(keys);
}

uint64_t npy_keys_count(const struct npy_keys *keys)
{
    return keys->count;
}

int npy_keys_read(const struct npy_keys *keys, uint64_t first, uint64_t count, int64_t *out,
                  struct error *err)
{
    uint8_t *raw = (uint8_t *)out;

    if (check_range(keys->path, first, count, keys->count, err) < 0)
        return -1;
    if (!count)
        return 0;
    /* Narrow keys are read into the upper half of out and widened from the front: the write at i
     * ends at 8(i+1), the unread ones start at 4(count + i + 1), which is not before it. */
    if (keys->key_bytes == 4)
        raw += 4 * count;
    if (file_read_exact(keys->file, keys->path, raw, count * keys->key_bytes,
                        keys->data_offset + first * keys->key_bytes, err) < 0)
        return -1;
    for (uint64_t i = 0; i < count; i++) {
        if (keys->key_bytes == 4) {
            uint32_t key = load_u32(raw + 4 * i);

            out[i] = keys->is_signed ? (int64_t)(int32_t)key : (int64_t)key;
        } else if (!keys->is_signed && out[i] < 0) {
            return error_set(err, ERR_INVALID,
                             "%s: key %" PRIu64 " of row %" PRIu64 " does not fit int64",
                             keys->path, (uint64_t)out[i], first + i);
        }
    }
    return 0;
}

/* ---- writer ---- */

struct vector_writer {
    struct vfs *vfs;
    struct vfs_file *file;
    char *path;
    char *aside; /* path.tmp */
    uint8_t *buffer;
    size_t buffer_used;
    uint64_t written; /* bytes of the file so far, header included */
    uint64_t rows;
    uint32_t dim;
    uint32_t row_bytes;
    bool failed; /* an append did not get all its rows out */
};

int vector_writer_open(struct vfs *vfs, const char *path, enum element_type type, uint32_t dim,
                       struct vector_writer **out, struct error *err)
{
    struct vector_writer *w = NULL;
    enum vector_format format = VECTOR_FBIN;
    int rc = -1;

    if (vector_format_of_path(path, &format, err) < 0)
        goto done;
    if (format > VECTOR_I8BIN || formats[format].type != type) {
        error_set(err, ERR_INVALID, "%s: vectors of %s are written to a file named %s", path,
                  element_name(type),
                  type == ELEMENT_F32  ? ".fbin"
                  : type == ELEMENT_U8 ? ".u8bin"
                  : type == ELEMENT_I8 ? ".i8bin"
                                       : "otherwise, no format here has that type");
        goto done;
    }
    if (!dim || dim > VECTOR_FILE_DIM_MAX) {
        error_set(err, ERR_INVALID, "%s: dimension %u, possible is 1 to %u", path, dim,
                  VECTOR_FILE_DIM_MAX);
        goto done;
    }
    w = calloc(1, sizeof *w);
    if (w) {
        w->path = strdup(path);
        w->aside = malloc(strlen(path) + sizeof ".tmp");
        w->buffer = malloc(SCRATCH_BYTES);
    }
    if (!w || !w->path || !w->aside || !w->buffer) {
        error_set(err, ERR_NOMEM, "%s: no memory to write it", path);
        goto done;
    }
    strcpy(stpcpy(w->aside, path), ".tmp");
    w->dim = dim;
    w->row_bytes = (uint32_t)element_bytes(type, dim);
    vfs->unlink(vfs, w->aside); /* left by a run that was interrupted, or not there */
    w->file = file_open(vfs, w->aside, VFS_WRITE | VFS_CREATE, err);
    if (!w->file)
        goto done;
    w->vfs = vfs;                           /* from here on the .tmp is ours to remove */
    memset(w->buffer, 0, BIN_HEADER_BYTES); /* counts of zero: no reader takes a torso for whole */
    w->buffer_used = BIN_HEADER_BYTES;
    *out = w;
    w = NULL; /* moved to the caller */
    rc = 0;
done:
    vector_writer_abort(w);
    return rc;
}

static int flush(struct vector_writer *w, struct error *err)
{
    if (file_write_full(w->file, w->aside, w->buffer, w->buffer_used, w->written, err) < 0)
        return -1;
    w->written += w->buffer_used;
    w->buffer_used = 0;
    return 0;
}

int vector_writer_append(struct vector_writer *writer, const void *rows, uint64_t count,
                         struct error *err)
{
    const uint8_t *p = rows;
    uint64_t bytes;

    if (count > UINT32_MAX - writer->rows)
        return error_set(err, ERR_INVALID, "%s: the format counts rows up to %u", writer->path,
                         UINT32_MAX);
    bytes = count * writer->row_bytes; /* below 2^32 x 2^18 */
    while (bytes) {
        size_t n = SCRATCH_BYTES - writer->buffer_used;

        if (n > bytes)
            n = (size_t)bytes;
        memcpy(writer->buffer + writer->buffer_used, p, n);
        writer->buffer_used += n;
        p += n;
        bytes -= n;
        if (writer->buffer_used == SCRATCH_BYTES && flush(writer, err) < 0) {
            writer->failed = true;
            return -1;
        }
    }
    writer->rows += count;
    return 0;
}

int vector_writer_close(struct vector_writer *writer, struct error *err)
{
    char folder[FILE_PATH_MAX];
    uint8_t header[BIN_HEADER_BYTES];
    struct vfs_file *file;
    int rc = -1;

    if (writer->failed || !writer->rows) {
        error_set(err, writer->failed ? ERR_IO : ERR_INVALID, "%s: %s", writer->path,
                  writer->failed ? "not written, a row before was lost" : "no rows to write");
        goto done;
    }
    store_u32(header, (uint32_t)writer->rows);
    store_u32(header + 4, writer->dim);
    if (flush(writer, err) < 0 ||
        file_write_full(writer->file, writer->aside, header, sizeof header, 0, err) < 0 ||
        file_sync(writer->file, writer->aside, err) < 0)
        goto done;
    file = writer->file;
    writer->file = NULL; /* closed whatever close says */
    if (file_close(file, writer->aside, err) < 0 ||
        file_rename(writer->vfs, writer->aside, writer->path, err) < 0)
        goto done;
    file_path_folder(folder, writer->path);
    if (file_dirsync(writer->vfs, folder, err) < 0)
        goto done;
    rc = 0;
done:
    vector_writer_abort(writer); /* after the rename there is no .tmp left to remove */
    return rc;
}

void vector_writer_abort(struct vector_writer *writer)
{
    if (!writer)
        return;
    file_close(writer->file, writer->aside, NULL);
    if (writer->aside && writer->vfs)
        writer->vfs->unlink(writer->vfs, writer->aside);
    free(writer->path);
    free(writer->aside);
    free(writer->buffer);
    free(writer);
}
