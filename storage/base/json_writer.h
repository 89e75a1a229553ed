/* JSON writer: a text built in one growing buffer with a hard cap.
 *
 * Commas and colons are the writer's. Calls return nothing: the first failure (ERR_BUDGET past the
 * cap, ERR_NOMEM, ERR_INVALID for NaN or infinity, ERR_INTERNAL for calls that cannot nest) sticks,
 * later calls do nothing, and json_writer_finish() reports it. Output does not depend on the
 * locale. One thread per writer. */
#ifndef ANND_STORAGE_BASE_JSON_WRITER_H
#define ANND_STORAGE_BASE_JSON_WRITER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "storage/base/error.h"

#define JSON_WRITER_DEPTH_MAX 64u
#define JSON_FLOAT_TEXT_BYTES 32u /* enough for any float32, double or integer and a NUL */

/* All members are the writer's own. */
struct json_writer {
    char *text;
    size_t bytes;
    size_t capacity;
    size_t bytes_max;
    uint64_t objects; /* bit i: level i is an object */
    uint32_t depth;
    bool comma; /* a value stands before at this level */
    bool keyed; /* a key waits for its value */
    enum error_code code;
    const char *problem;
};

/* Allocates nothing yet. */
void json_writer_init(struct json_writer *writer, size_t bytes_max);
/* Frees the buffer; the writer may be initialised again. */
void json_writer_release(struct json_writer *writer);
/* Empties the writer and forgets its error; keeps the buffer. */
void json_writer_reset(struct json_writer *writer);

/* The first error, or the text: whole, NUL-terminated after *bytes bytes, the writer's until
 * release or reset. */
int json_writer_finish(struct json_writer *writer, const char **text, size_t *bytes,
                       struct error *err);
/* Moves the finished text to the caller, who free()s it. */
int json_writer_take(struct json_writer *writer, char **text, size_t *bytes, struct error *err);
bool json_writer_failed(const struct json_writer *writer);

void json_begin_object(struct json_writer *writer);
void json_end_object(struct json_writer *writer);
void json_begin_array(struct json_writer *writer);
void json_end_array(struct json_writer *writer);

/* Text with escapes where JSON wants them. Bytes that are not UTF-8 come out as U+FFFD, so that an
 * answer is valid JSON whatever it quotes. */
void json_key(struct json_writer *writer, const char *name);
void json_key_bytes(struct json_writer *writer, const char *name, size_t bytes);
void json_string(struct json_writer *writer, const char *text);
void json_string_bytes(struct json_writer *writer, const char *text, size_t bytes);
void json_int64(struct json_writer *writer, int64_t value);
void json_uint64(struct json_writer *writer, uint64_t value);
/* Digits in quotes, for clients whose numbers are doubles. */
void json_int64_string(struct json_writer *writer, int64_t value);
void json_bool(struct json_writer *writer, bool value);
void json_null(struct json_writer *writer);
/* The fewest digits that read back to the same float32 or double. */
void json_float(struct json_writer *writer, float value);
void json_double(struct json_writer *writer, double value);
void json_float_array(struct json_writer *writer, const float *values, size_t count);
/* One whole value that is JSON already, e.g. from json_raw_value(); not checked. */
void json_raw(struct json_writer *writer, const char *text, size_t bytes);
/* A string of `bytes` bytes in base64, standard alphabet with padding. */
void json_base64(struct json_writer *writer, const void *data, size_t bytes);

/* The number as json_float and json_double print it, NUL-terminated; returns its length.
 * value is finite. */
size_t json_format_float(float value, char out[JSON_FLOAT_TEXT_BYTES]);
size_t json_format_double(double value, char out[JSON_FLOAT_TEXT_BYTES]);

#endif
