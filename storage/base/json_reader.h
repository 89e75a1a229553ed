/* JSON reader: a pull tokenizer over one complete text in memory.
 *
 * No tree, no recursion, no allocation but the bytes of strings that hold escapes. Strict RFC 8259:
 * UTF-8 is validated, unpaired surrogates, U+0000, raw control characters and bytes after the top
 * value are errors, nesting stops at JSON_DEPTH_MAX, a number at JSON_NUMBER_BYTES_MAX characters.
 * Every failure is ERR_INVALID with the byte position ("... at byte 17"), or ERR_BUDGET when the
 * arena is full; after one, every further call fails. Duplicate keys are the caller's matter.
 * One thread per reader; it may be copied to look ahead. Typical use:
 *
 *     json_reader_init(&r, text, bytes, &arena);
 *     if (json_object_begin(&r, err) < 0)
 *         return -1;
 *     while ((more = json_object_next(&r, &key, err)) > 0) {
 *         if (json_span_is(key, "limit")) {
 *             if (json_read_int64(&r, &limit, err) < 0)
 *                 return -1;
 *         } else if (json_skip_value(&r, err) < 0) {
 *             return -1;
 *         }
 *     }
 *     return more < 0 ? -1 : json_read_end(&r, err);
 */
#ifndef ANND_STORAGE_BASE_JSON_READER_H
#define ANND_STORAGE_BASE_JSON_READER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "storage/base/arena.h"
#include "storage/base/error.h"

#define JSON_DEPTH_MAX 32u
#define JSON_NUMBER_BYTES_MAX 1024u

enum json_type {
    JSON_BEGIN_OBJECT,
    JSON_END_OBJECT,
    JSON_BEGIN_ARRAY,
    JSON_END_ARRAY,
    JSON_KEY, /* its colon is consumed with it */
    JSON_STRING,
    JSON_NUMBER,
    JSON_TRUE,
    JSON_FALSE,
    JSON_NULL,
    JSON_END /* the text ended after one whole value */
};

/* Bytes in the reader's text or in its arena; not NUL-terminated. */
struct json_span {
    const char *at;
    size_t bytes;
};

struct json_token {
    enum json_type type;
    size_t offset;         /* of its first byte in the text */
    struct json_span raw;  /* as written, quotes included */
    struct json_span text; /* JSON_KEY, JSON_STRING: decoded UTF-8; else empty */
};

/* All members are the reader's own. */
struct json_reader {
    const char *text;
    size_t bytes;
    size_t position;
    struct arena *arena;
    char *pool; /* rest of the arena chunk that small strings share */
    size_t pool_bytes;
    uint32_t depth;
    uint32_t objects; /* bit i: level i is an object */
    uint8_t state;
};

/* Borrows text (which may hold any bytes and needs no NUL) and arena while tokens are in use.
 * arena may be NULL: then a key or string with a backslash is refused. */
void json_reader_init(struct json_reader *reader, const char *text, size_t bytes,
                      struct arena *arena);

/* The next token. After JSON_END: JSON_END again. */
int json_next(struct json_reader *reader, struct json_token *token, struct error *err);
/* The type of the next token, judged by its first byte, without taking it. */
int json_peek(struct json_reader *reader, enum json_type *type, struct error *err);

/* Take the begin of an object or array; anything else is an error. */
int json_object_begin(struct json_reader *reader, struct error *err);
int json_array_begin(struct json_reader *reader, struct error *err);
/* 1: *key is set and its value is next; 0: the object has ended; -1: error. */
int json_object_next(struct json_reader *reader, struct json_span *key, struct error *err);
/* 1: an element is next; 0: the array has ended; -1: error. */
int json_array_next(struct json_reader *reader, struct error *err);
/* Takes JSON_END. */
int json_read_end(struct json_reader *reader, struct error *err);

/* One value of the named type; anything else is an error. int64 takes an integer literal or a
 * string of decimal digits (as json_number_int64 and json_string_int64). */
int json_read_string(struct json_reader *reader, struct json_span *out, struct error *err);
int json_read_int64(struct json_reader *reader, int64_t *out, struct error *err);
int json_read_double(struct json_reader *reader, double *out, struct error *err);
int json_read_bool(struct json_reader *reader, bool *out, struct error *err);
/* Takes null and returns true; else takes nothing. */
bool json_read_null(struct json_reader *reader);

/* The next value of any type, validated whole but not decoded. */
int json_skip_value(struct json_reader *reader, struct error *err);
int json_raw_value(struct json_reader *reader, struct json_span *out, struct error *err);

/* The next value, an array of numbers, as float32, each rounded once from its decimal text (nearest
 * even). Numbers beyond float32's range and anything but numbers are errors, and so are more than
 * `max` of them; *count is how many there were. Too small a number becomes a subnormal or zero. */
int json_read_float_array(struct json_reader *reader, float *out, size_t max, size_t *count,
                          struct error *err);

/* From a JSON_NUMBER token. int64: exact; a fraction, an exponent, "-0" and overflow are refused.
 * double and float: correctly rounded whatever the locale; beyond the range is refused. */
int json_number_int64(const struct json_token *token, int64_t *out, struct error *err);
int json_number_double(const struct json_token *token, double *out, struct error *err);
int json_number_float(const struct json_token *token, float *out, struct error *err);
/* From a JSON_STRING token: digits with an optional minus; same rules, no leading zeros. */
int json_string_int64(const struct json_token *token, int64_t *out, struct error *err);

bool json_span_is(struct json_span span, const char *text);
/* "an object", "a number", ... for messages. */
const char *json_type_name(enum json_type type);
/* Length of the longest prefix that is well-formed UTF-8 (no surrogates, no overlong forms);
 * `bytes` when all is. U+0000 counts as well-formed here. */
size_t utf8_valid_bytes(const char *text, size_t bytes);
/* Standard alphabet, padding required, no white space. *out_bytes is set to the bytes decoded;
 * ERR_INVALID on other characters or when more than out_max come out. */
int json_base64_decode(struct json_span span, void *out, size_t out_max, size_t *out_bytes,
                       struct error *err);

#endif
