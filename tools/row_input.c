/* The schema decides what a key is. Without one, a text file whose every line is a whole number in
 * its shortest form (no +, no leading zero) makes an Int64 key, any other a VarChar key. */
#include "tools/row_input.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "index/vector_file.h"
#include "storage/base/bytes.h"
#include "storage/base/json_reader.h"
#include "storage/file.h"

#define KEYS_BYTES_MAX (UINT64_C(1) << 36)
#define READ_BYTES (1u << 20)
#define LINE_BYTES_MAX (2u << 20)

struct scratch {
    struct vfs_file *file;
    char path[FILE_PATH_MAX];
    uint64_t *ends; /* rows */
    uint64_t bytes;
    uint8_t *pending; /* written in runs */
    size_t pending_bytes;
};

/* ---- scratch ---- */

static int scratch_open(struct row_input *input, const char *folder, uint64_t rows,
                        struct error *err)
{
    struct scratch *s = calloc(1, sizeof *s);

    if (!s)
        return error_set(err, ERR_NOMEM, "no memory for a scratch file");
    input->scratch = s;
    if (file_path_join(s->path, folder, "attributes.scratch", err) < 0 ||
        file_remove_all(vfs_posix(), s->path, err) < 0)
        return -1;
    s->file = file_open(vfs_posix(), s->path, VFS_WRITE | VFS_CREATE, err);
    if (!s->file)
        return -1;
    vfs_posix()->unlink(vfs_posix(), s->path); /* gone with the process, however it ends */
    s->ends = malloc(rows * sizeof *s->ends);
    s->pending = malloc(READ_BYTES + RECORD_BYTES_MAX);
    if (!s->ends || !s->pending)
        return error_set(err, ERR_NOMEM, "no memory for the records of %" PRIu64 " rows", rows);
    input->memory_bytes += rows * sizeof *s->ends + READ_BYTES + RECORD_BYTES_MAX;
    return 0;
}

static int scratch_flush(struct scratch *s, struct error *err)
{
    uint64_t at = s->bytes - s->pending_bytes;

    if (file_write_full(s->file, s->path, s->pending, s->pending_bytes, at, err) < 0)
        return -1;
    s->pending_bytes = 0;
    return 0;
}

static int scratch_append(struct scratch *s, uint64_t row, const struct record_buffer *record,
                          struct error *err)
{
    if (record->bytes > RECORD_BYTES_MAX)
        return error_set(err, ERR_INVALID, "the record takes %zu bytes; at most %u are kept",
                         record->bytes, RECORD_BYTES_MAX);
    memcpy(s->pending + s->pending_bytes, record->data, record->bytes);
    s->pending_bytes += record->bytes;
    s->bytes += record->bytes;
    s->ends[row] = s->bytes;
    return s->pending_bytes >= READ_BYTES ? scratch_flush(s, err) : 0;
}

static int scratch_record(void *context, uint64_t row, struct record_buffer *out, struct error *err)
{
    struct scratch *s = context;
    uint64_t begin = row ? s->ends[row - 1] : 0;
    size_t bytes = s->ends[row] - begin;

    if (bytes > out->capacity) {
        uint8_t *grown = realloc(out->data, bytes);

        if (!grown)
            return error_set(err, ERR_NOMEM, "no memory for a record of %zu bytes", bytes);
        out->data = grown;
        out->capacity = bytes;
    }
    out->bytes = bytes;
    return file_read_exact(s->file, s->path, out->data, bytes, begin, err);
}

/* ---- keys ---- */

static bool parse_int64(const char *text, int64_t *out)
{
    char *end;
    char back[32];

    errno = 0;
    *out = strtoll(text, &end, 10);
    if (errno || end == text || *end)
        return false;
    snprintf(back, sizeof back, "%" PRId64, *out);
    return !strcmp(back, text);
}

static int keys_read_npy(const char *path, uint64_t rows, struct row_input *out, struct error *err)
{
    struct npy_keys *keys = NULL;
    int rc = -1;

    if (npy_keys_open(vfs_posix(), path, &keys, err) < 0)
        return -1;
    if (npy_keys_count(keys) != rows) {
        error_set(err, ERR_INVALID, "%s has %" PRIu64 " keys, the input has %" PRIu64 " rows", path,
                  npy_keys_count(keys), rows);
        goto done;
    }
    out->int64_keys = malloc(rows * sizeof *out->int64_keys);
    if (!out->int64_keys) {
        error_set(err, ERR_NOMEM, "no memory for %" PRIu64 " keys", rows);
        goto done;
    }
    rc = npy_keys_read(keys, 0, rows, out->int64_keys, err);
done:
    npy_keys_close(keys);
    return rc;
}

static int keys_read_text(const char *path, uint64_t rows, struct row_input *out,
                          size_t *length_max, struct error *err)
{
    uint8_t *text;
    size_t bytes;
    uint64_t row = 0;

    if (file_read_whole(vfs_posix(), path, KEYS_BYTES_MAX, &text, &bytes, err) < 0)
        return -1;
    out->text = (char *)text;
    out->memory_bytes += bytes + rows * sizeof *out->text_keys;
    out->text_keys = malloc(rows * sizeof *out->text_keys);
    if (!out->text_keys)
        return error_set(err, ERR_NOMEM, "no memory for %" PRIu64 " keys", rows);
    for (char *line = out->text, *end = out->text + bytes; line < end; row++) {
        char *newline = memchr(line, '\n', (size_t)(end - line));
        size_t length = (size_t)((newline ? newline : end) - line);

        if (length && line[length - 1] == '\r')
            length--;
        if (memchr(line, 0, length) || utf8_valid_bytes(line, length) != length)
            return error_set(err, ERR_INVALID, "%s line %" PRIu64 " is not UTF-8 text", path,
                             row + 1);
        if (!length || length > SCHEMA_VARCHAR_MAX)
            return error_set(err, ERR_INVALID,
                             "%s line %" PRIu64 ": a key takes 1 to %u bytes, found %zu", path,
                             row + 1, SCHEMA_VARCHAR_MAX, length);
        if (row < rows)
            out->text_keys[row] = line;
        *length_max = length > *length_max ? length : *length_max;
        line[length] = 0;
        line = newline ? newline + 1 : end;
    }
    if (row != rows)
        return error_set(err, ERR_INVALID,
                         "%s has %" PRIu64 " lines, the input has %" PRIu64 " rows", path, row,
                         rows);
    return 0;
}

/* Turns text keys into numbers: all of them, or (when the schema does not demand it) none. */
static int keys_as_int64(const char *path, uint64_t rows, bool demanded, struct row_input *out,
                         struct error *err)
{
    int64_t *keys = malloc(rows * sizeof *keys);

    if (!keys)
        return error_set(err, ERR_NOMEM, "no memory for %" PRIu64 " keys", rows);
    for (uint64_t i = 0; i < rows; i++)
        if (!parse_int64(out->text_keys[i], &keys[i])) {
            free(keys);
            return demanded ? error_set(err, ERR_INVALID,
                                        "%s line %" PRIu64 ": '%.60s' is no int64, which the "
                                        "schema's key is",
                                        path, i + 1, out->text_keys[i])
                            : 0;
        }
    free(out->text_keys);
    free(out->text);
    out->text_keys = NULL;
    out->text = NULL;
    out->int64_keys = keys;
    return 0;
}

/* ---- attributes ---- */

/* Calls for each line of the file; `line` is NUL-free and without its end. */
static int attributes_read(const char *path, uint64_t rows, struct row_input *out, struct job *job,
                           struct error *err)
{
    struct vfs_file *file = file_open(vfs_posix(), path, VFS_READ, err);
    char *buffer = malloc(LINE_BYTES_MAX + READ_BYTES);
    struct record_buffer record = {0};
    uint64_t offset = 0, row = 0;
    size_t held = 0, got = 1;
    int rc = -1;

    job_phase(job, "attributes", rows);
    if (!file || !buffer) {
        error_set(err, ERR_NOMEM, "no memory to read %s", path);
        goto done;
    }
    while (got || held) {
        char *line = buffer, *newline;

        if (got) {
            int code = vfs_posix()->pread(file, buffer + held, READ_BYTES, offset, &got);

            if (code < 0) {
                error_set_errno(err, -code, "reading %s at byte %" PRIu64 " failed", path, offset);
                goto done;
            }
            offset += got;
            held += got;
        }
        while ((newline = memchr(line, '\n', held)) || (!got && held)) {
            size_t length = newline ? (size_t)(newline - line) : held;
            size_t taken = newline ? length + 1 : held;
            const char *key = out->text_keys && row < rows ? out->text_keys[row] : NULL;

            if (row == rows) {
                error_set(err, ERR_INVALID, "%s has more lines than the input's %" PRIu64 " rows",
                          path, rows);
                goto done;
            }
            if (record_from_json(out->schema, line, length, key, key ? strlen(key) : 0, &record,
                                 err) < 0 ||
                scratch_append(out->scratch, row, &record, err) < 0) {
                error_prefix(err, "%s line %" PRIu64, path, row + 1);
                goto done;
            }
            line += taken;
            held -= taken;
            if (++row % 1024 == 0 && job_advance(job, 1024, err) < 0)
                goto done;
        }
        memmove(buffer, line, held);
        if (held > LINE_BYTES_MAX - 1) {
            error_set(err, ERR_INVALID, "%s line %" PRIu64 " is longer than %u bytes", path,
                      row + 1, LINE_BYTES_MAX);
            goto done;
        }
    }
    if (row != rows) {
        error_set(err, ERR_INVALID, "%s has %" PRIu64 " lines, the input has %" PRIu64 " rows",
                  path, row, rows);
        goto done;
    }
    rc = scratch_flush(out->scratch, err);
done:
    record_release(&record);
    free(buffer);
    file_close(file, path, NULL);
    return rc;
}

/* Text keys without attributes still need a record each: it is where the key's text is kept. */
static int keys_record(void *context, uint64_t row, struct record_buffer *out, struct error *err)
{
    const struct row_input *input = context;
    const char *key = input->text_keys[row];

    return record_from_json(input->schema, "{}", 2, key, strlen(key), out, err);
}

/* ---- the whole ---- */

static int schema_make(const struct row_input_files *files, uint32_t dim, enum element_type type,
                       uint32_t key_length_max, struct row_input *out, struct error *err)
{
    enum field_type vector_type = type == ELEMENT_I8 ? FIELD_INT8_VECTOR : FIELD_FLOAT_VECTOR;
    uint8_t *text = NULL;
    size_t bytes;
    int rc;

    if (!files->schema)
        return schema_default(files->key_field ? files->key_field : "id",
                              out->text_keys ? FIELD_VARCHAR : FIELD_INT64, key_length_max,
                              files->vector_field ? files->vector_field : "vector", vector_type,
                              dim, &out->schema, err);
    if (file_read_whole(vfs_posix(), files->schema, SCHEMA_BYTES_MAX, &text, &bytes, err) < 0)
        return -1;
    rc = schema_parse((const char *)text, bytes, files->schema, &out->schema, err);
    free(text);
    if (rc < 0)
        return -1;
    const struct schema_field *vector = schema_vector(out->schema, 0);
    const struct schema_field *key = schema_key(out->schema);

    if (!vector || schema_vector(out->schema, 1))
        return error_set(err, ERR_INVALID,
                         "%s: an index is built over one vector field, the "
                         "schema has %s",
                         files->schema, vector ? "several" : "none");
    if (vector->dim != dim || vector->type != vector_type)
        return error_set(err, ERR_INVALID,
                         "%s: field '%s' is %s of %u dimensions, the input needs %s of %u",
                         files->schema, vector->name, field_type_name(vector->type), vector->dim,
                         field_type_name(vector_type), dim);
    if ((files->key_field && strcmp(files->key_field, key->name)) ||
        (files->vector_field && strcmp(files->vector_field, vector->name)))
        return error_set(err, ERR_INVALID,
                         "%s names key '%s' and vector '%s'; --key-field and --vector-field say "
                         "otherwise",
                         files->schema, key->name, vector->name);
    return 0;
}

static int digest_inputs(struct row_input *out, const struct row_input_files *files, uint64_t rows,
                         struct error *err)
{
    struct digest *digest = digest_new();
    char *text = NULL;
    size_t bytes;

    if (!digest || schema_print(out->schema, &text, &bytes, err) < 0) {
        if (digest)
            digest_finish(digest, out->rows.digest);
        return error_set(err, ERR_NOMEM, "no memory for a digest");
    }
    digest_update(digest, text, bytes);
    if (out->int64_keys)
        digest_update(digest, out->int64_keys, rows * sizeof *out->int64_keys);
    for (uint64_t i = 0; out->text_keys && i < rows; i++)
        digest_update(digest, out->text_keys[i], strlen(out->text_keys[i]) + 1);
    if (files->attributes) {
        uint8_t *block = out->scratch->pending;

        for (uint64_t at = 0; at < out->scratch->bytes; at += READ_BYTES) {
            uint64_t left = out->scratch->bytes - at;
            size_t run = left < READ_BYTES ? left : READ_BYTES;

            if (file_read_exact(out->scratch->file, out->scratch->path, block, run, at, err) < 0)
                break;
            digest_update(digest, block, run);
        }
    }
    digest_finish(digest, out->rows.digest);
    free(text);
    return err->code ? -1 : 0;
}

int row_input_open(const struct row_input_files *files, uint64_t rows, uint32_t dim,
                   enum element_type type, const char *folder, struct job *job,
                   struct row_input *out, struct error *err)
{
    size_t length_max = 0;

    *out = (struct row_input){0};
    if (files->keys) {
        size_t n = strlen(files->keys);
        bool npy = n > 4 && !strcasecmp(files->keys + n - 4, ".npy");

        if ((npy ? keys_read_npy(files->keys, rows, out, err)
                 : keys_read_text(files->keys, rows, out, &length_max, err)) < 0)
            return -1;
        if (out->text_keys && !files->schema &&
            keys_as_int64(files->keys, rows, false, out, err) < 0)
            return -1;
    }
    if (schema_make(files, dim, type, SCHEMA_VARCHAR_MAX, out, err) < 0)
        return -1;
    const struct schema_field *key = schema_key(out->schema);

    if (out->text_keys && key->type == FIELD_INT64 &&
        keys_as_int64(files->keys, rows, true, out, err) < 0)
        return -1;
    if (!out->text_keys && key->type == FIELD_VARCHAR)
        return error_set(err, ERR_INVALID,
                         "key field '%s' is VarChar; --keys must name a text file with its values",
                         key->name);
    if (out->text_keys && length_max > key->max_length)
        return error_set(err, ERR_INVALID, "%s has a key of %zu bytes, field '%s' takes %u",
                         files->keys, length_max, key->name, key->max_length);
    if (out->int64_keys)
        out->memory_bytes += rows * sizeof *out->int64_keys;
    if (files->attributes && (scratch_open(out, folder, rows, err) < 0 ||
                              attributes_read(files->attributes, rows, out, job, err) < 0))
        return -1;
    out->rows.schema = out->schema;
    out->rows.int64_keys = out->int64_keys;
    out->rows.text_keys = (const char *const *)out->text_keys;
    if (files->attributes) {
        out->rows.record = scratch_record;
        out->rows.context = out->scratch;
    } else if (out->text_keys) {
        out->rows.record = keys_record;
        out->rows.context = out;
    }
    return digest_inputs(out, files, rows, err);
}

void row_input_release(struct row_input *input)
{
    if (input->scratch) {
        file_close(input->scratch->file, input->scratch->path, NULL);
        free(input->scratch->ends);
        free(input->scratch->pending);
        free(input->scratch);
    }
    schema_free(input->schema);
    free(input->int64_keys);
    free(input->text_keys);
    free(input->text);
    *input = (struct row_input){0};
}
