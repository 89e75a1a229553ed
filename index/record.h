/* Record: the stored scalar values of one row, typed, in a compact byte form.
 *
 * Holds every schema field but vectors and an int64 key (which stands on the page), and the
 * dynamic keys. Numbers keep their type; a dynamic number that is neither an int64 nor exactly a
 * double keeps its text. Layout: u16 value count, then per value
 *   u32 field id (0: dynamic, then u16 name bytes and the name), u8 value type, payload:
 *   bool u8; int64 8; float 4; double 8; text, number and json: u32 bytes and the bytes. */
#ifndef ANND_INDEX_RECORD_H
#define ANND_INDEX_RECORD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "index/schema.h"
#include "storage/base/error.h"

#define RECORD_BYTES_MAX (1u << 20)

enum value_type {
    VALUE_NULL = 0,
    VALUE_BOOL = 1,
    VALUE_INT64 = 2, /* also Int8..Int32 fields */
    VALUE_FLOAT = 3,
    VALUE_DOUBLE = 4,
    VALUE_TEXT = 5,   /* UTF-8 */
    VALUE_NUMBER = 6, /* JSON number kept as text */
    VALUE_JSON = 7    /* JSON text of a JSON field, an Array field, or a dynamic object or array */
};

struct value {
    enum value_type type;
    bool boolean;
    int64_t integer;
    double real;      /* VALUE_FLOAT and VALUE_DOUBLE */
    const char *text; /* borrowed, not NUL-terminated */
    uint32_t text_bytes;
};

/* Growing bytes of one record; zero-initialise, then record_release. Reused between rows. */
struct record_buffer {
    uint8_t *data;
    size_t bytes;
    size_t capacity;
};

void record_release(struct record_buffer *buffer);

/* One JSON object (an `--attributes` line) to a record: schema fields are converted and checked as
 * contract 6.1.1 says (a missing nullable or defaulted field too), other keys become dynamic or,
 * with dynamic off, ERR_INVALID. The key field and vector fields must not be in it unless the key
 * repeats `key`: pass key text or NULL. The VarChar key, if any, is stored first. Errors name the
 * field; the caller prefixes file and line. */
int record_from_json(const struct schema *schema, const char *text, size_t bytes,
                     const char *varchar_key, size_t varchar_key_bytes, struct record_buffer *out,
                     struct error *err);

/* Walks a record. ERR_CORRUPT when bytes do not hold what they say. */
struct record_cursor {
    const uint8_t *data;
    size_t bytes;
    size_t offset;
    uint32_t left;
};

int record_open(const uint8_t *data, size_t bytes, struct record_cursor *cursor, struct error *err);
/* 1: a value; *field_id is 0 for dynamic keys, then *name (borrowed) is set. 0: the end. -1: error.
 */
int record_next(struct record_cursor *cursor, uint32_t *field_id, const char **name,
                uint32_t *name_bytes, struct value *value, struct error *err);

#endif
