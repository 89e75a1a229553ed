/* How it works: one pass over the JSON text collects a token for every schema field and a list of
 * the dynamic keys; then the record is written in schema order, dynamic keys last in the order of
 * the text. Equal rows whose keys are ordered differently thus differ in their dynamic part only.
 * Keys are compared through a hash table once there are many of them, so that a hostile row costs
 * no more than an honest one of its size. A row without escapes and with few dynamic keys
 * allocates nothing but the record itself. */
#include "index/record.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "storage/base/arena.h"
#include "storage/base/bytes.h"
#include "storage/base/digest.h"
#include "storage/base/json_reader.h"
#include "storage/base/json_writer.h"

#define JSON_BYTES_MAX 65536u     /* of a JSON value, and of the dynamic part of a row */
#define TEXT_BYTES_MAX (4u << 20) /* of the whole row as JSON */
#define LIST_FIRST 32u            /* dynamic keys that need no arena */
#define RECORD_FIRST_BYTES 512u

/* ---- writing bytes ---- */

void record_release(struct record_buffer *buffer)
{
    free(buffer->data);
    *buffer = (struct record_buffer){NULL, 0, 0};
}

/* Room for `bytes` more, counted in already; NULL when the record would be too long. */
static uint8_t *extend(struct record_buffer *out, size_t bytes, struct error *err)
{
    size_t capacity = out->capacity < RECORD_FIRST_BYTES ? RECORD_FIRST_BYTES : out->capacity;
    uint8_t *data;

    if (bytes > RECORD_BYTES_MAX - out->bytes) {
        error_set(err, ERR_INVALID, "the row's values take more than %u bytes", RECORD_BYTES_MAX);
        return NULL;
    }
    if (out->bytes + bytes > out->capacity) {
        while (capacity < out->bytes + bytes)
            capacity *= 2;
        data = realloc(out->data, capacity);
        if (!data) {
            error_set(err, ERR_NOMEM, "no memory for a record of %zu bytes", out->bytes + bytes);
            return NULL;
        }
        out->data = data;
        out->capacity = capacity;
    }
    data = out->data + out->bytes;
    out->bytes += bytes;
    return data;
}

static int put_value(struct record_buffer *out, const struct value *value, struct error *err)
{
    static const uint8_t payload[] = {
        [VALUE_NULL] = 0,   [VALUE_BOOL] = 1, [VALUE_INT64] = 8,  [VALUE_FLOAT] = 4,
        [VALUE_DOUBLE] = 8, [VALUE_TEXT] = 4, [VALUE_NUMBER] = 4, [VALUE_JSON] = 4,
    };
    size_t text_bytes = value->type >= VALUE_TEXT ? value->text_bytes : 0;
    uint8_t *p = extend(out, 1u + payload[value->type] + text_bytes, err);

    if (!p)
        return -1;
    *p++ = (uint8_t)value->type;
    switch (value->type) {
    case VALUE_NULL:
        break;
    case VALUE_BOOL:
        *p = value->boolean;
        break;
    case VALUE_INT64:
        store_u64(p, (uint64_t)value->integer);
        break;
    case VALUE_FLOAT:
        store_f32(p, (float)value->real);
        break;
    case VALUE_DOUBLE:
        store_f64(p, value->real);
        break;
    case VALUE_TEXT:
    case VALUE_NUMBER:
    case VALUE_JSON:
        store_u32(p, value->text_bytes);
        if (text_bytes)
            memcpy(p + 4, value->text, text_bytes);
        break;
    }
    return 0;
}

static int put_field(struct record_buffer *out, uint32_t field_id, const struct value *value,
                     struct error *err)
{
    uint8_t *p = extend(out, 4, err);

    if (!p)
        return -1;
    store_u32(p, field_id);
    return put_value(out, value, err);
}

static int put_dynamic(struct record_buffer *out, struct json_span name, const struct value *value,
                       struct error *err)
{
    uint8_t *p = extend(out, 6 + name.bytes, err);

    if (!p)
        return -1;
    store_u32(p, 0);
    store_u16(p + 4, (uint16_t)name.bytes); /* the dynamic part's limit is below 64 KiB of name */
    if (name.bytes)
        memcpy(p + 6, name.at, name.bytes);
    return put_value(out, value, err);
}

/* ---- values of schema fields ---- */

static void set_text(struct value *value, enum value_type type, struct json_span text)
{
    value->type = type;
    value->text = text.at;
    value->text_bytes = (uint32_t)text.bytes; /* rows are shorter than 4 GiB */
}

static int refuse(const struct schema_field *field, const struct json_token *token,
                  struct error *err)
{
    return error_set(err, ERR_INVALID, "field %s: %.*s%s is no %s", field->name,
                     (int)(token->raw.bytes < 60 ? token->raw.bytes : 60), token->raw.at,
                     token->raw.bytes > 60 ? "..." : "", field_type_name(field->type));
}

/* A string's content as if it had been written without quotes. */
static struct json_token unquoted(const struct json_token *token)
{
    struct json_token number = *token;

    if (token->type == JSON_STRING) {
        number.type = JSON_NUMBER;
        number.raw = token->text;
    }
    return number;
}

static int bool_convert(const struct json_token *token, bool *out)
{
    static const char *const words[2][6] = {{"false", "False", "FALSE", "f", "F", "0"},
                                            {"true", "True", "TRUE", "t", "T", "1"}};
    double number;

    if (token->type == JSON_TRUE || token->type == JSON_FALSE) {
        *out = token->type == JSON_TRUE;
        return 0;
    }
    if (token->type == JSON_NUMBER && json_number_double(token, &number, NULL) == 0 &&
        (number == 0 || number == 1)) {
        *out = number == 1;
        return 0;
    }
    if (token->type == JSON_STRING)
        for (int i = 0; i < 12; i++)
            if (json_span_is(token->text, words[i / 6][i % 6])) {
                *out = i / 6;
                return 0;
            }
    return -1;
}

static bool fits(enum field_type type, int64_t integer)
{
    int64_t max = INT64_MAX >> (64 - (8u << (type - FIELD_INT8)));

    return integer <= max && integer >= -max - 1;
}

/* 5.0 is an Int32 but no Int64: the contract's rule, which keeps large keys exact. */
static int integer_convert(enum field_type type, const struct json_token *token, int64_t *out)
{
    double real;

    if (token->type == JSON_STRING)
        return json_string_int64(token, out, NULL) < 0 || !fits(type, *out) ? -1 : 0;
    if (token->type != JSON_NUMBER)
        return -1;
    if (json_number_int64(token, out, NULL) < 0) {
        if (type == FIELD_INT64 || json_number_double(token, &real, NULL) < 0 ||
            fabs(real) > INT32_MAX + 1.0 || real != (double)(int64_t)real)
            return -1;
        *out = (int64_t)real;
    }
    return fits(type, *out) ? 0 : -1;
}

static int real_convert(enum field_type type, const struct json_token *token, double *out)
{
    struct json_token number = unquoted(token);
    float single;

    if (type == FIELD_DOUBLE)
        return json_number_double(&number, out, NULL);
    if (json_number_float(&number, &single, NULL) < 0)
        return -1;
    *out = (double)single;
    return 0;
}

static int length_check(const struct schema_field *field, size_t bytes, struct error *err)
{
    if (field->max_length && bytes > field->max_length)
        return error_set(err, ERR_INVALID,
                         "length of varchar field %s exceeds max length, length: %zu, max length: "
                         "%u",
                         field->name, bytes, field->max_length);
    return 0;
}

/* True when text is one whole JSON value. */
static bool is_json(struct json_span text)
{
    struct json_reader reader;

    json_reader_init(&reader, text.at, text.bytes, NULL);
    return json_skip_value(&reader, NULL) == 0 && json_read_end(&reader, NULL) == 0;
}

static int json_convert(const struct schema_field *field, const struct json_token *token,
                        struct value *value, struct error *err)
{
    struct json_span text =
        token->type == JSON_STRING && is_json(token->text) ? token->text : token->raw;

    if (text.bytes > JSON_BYTES_MAX)
        return error_set(err, ERR_INVALID,
                         "the length (%zu) of json field (%s) exceeds max length (%u)", text.bytes,
                         field->name, JSON_BYTES_MAX);
    set_text(value, VALUE_JSON, text);
    return 0;
}

/* Elements are of exactly the element type: no number in a string, no 5.0 for an integer. */
static int element_check(const struct schema_field *field, const struct json_token *token,
                         struct error *err)
{
    int64_t integer;
    double real;
    bool good = false;

    switch (field->element_type) {
    case FIELD_BOOL:
        good = token->type == JSON_TRUE || token->type == JSON_FALSE;
        break;
    case FIELD_INT8:
    case FIELD_INT16:
    case FIELD_INT32:
    case FIELD_INT64:
        good = json_number_int64(token, &integer, NULL) == 0 && fits(field->element_type, integer);
        break;
    case FIELD_FLOAT:
    case FIELD_DOUBLE:
        good = token->type == JSON_NUMBER && real_convert(field->element_type, token, &real) == 0;
        break;
    case FIELD_VARCHAR:
        good = token->type == JSON_STRING;
        if (good && length_check(field, token->text.bytes, err) < 0)
            return -1;
        break;
    default:
        break;
    }
    if (good)
        return 0;
    return error_set(err, ERR_INVALID, "field %s: element %.*s%s is no %s", field->name,
                     (int)(token->raw.bytes < 60 ? token->raw.bytes : 60), token->raw.at,
                     token->raw.bytes > 60 ? "..." : "", field_type_name(field->element_type));
}

static int array_convert(const struct schema_field *field, const struct json_token *token,
                         struct arena *arena, struct value *value, struct error *err)
{
    struct json_reader reader;
    struct json_token element;
    uint32_t count = 0;
    int more;

    if (token->type != JSON_BEGIN_ARRAY)
        return refuse(field, token, err);
    json_reader_init(&reader, token->raw.at, token->raw.bytes, arena);
    if (json_array_begin(&reader, err) < 0)
        return -1;
    while ((more = json_array_next(&reader, err)) > 0) {
        if (json_next(&reader, &element, err) < 0 || element_check(field, &element, err) < 0)
            return -1;
        count++;
    }
    if (more < 0)
        return -1;
    if (count > field->max_capacity)
        return error_set(err, ERR_INVALID,
                         "the length (%u) of the array of field %s exceeds max capacity (%u)",
                         count, field->name, field->max_capacity);
    set_text(value, VALUE_JSON, token->raw);
    return 0;
}

static int convert(const struct schema_field *field, const struct json_token *token,
                   struct arena *arena, struct value *value, struct error *err)
{
    int rc = 0;

    switch (field->type) {
    case FIELD_BOOL:
        value->type = VALUE_BOOL;
        rc = bool_convert(token, &value->boolean);
        break;
    case FIELD_INT8:
    case FIELD_INT16:
    case FIELD_INT32:
    case FIELD_INT64:
        value->type = VALUE_INT64;
        rc = integer_convert(field->type, token, &value->integer);
        break;
    case FIELD_FLOAT:
    case FIELD_DOUBLE:
        value->type = field->type == FIELD_FLOAT ? VALUE_FLOAT : VALUE_DOUBLE;
        rc = real_convert(field->type, token, &value->real);
        break;
    case FIELD_VARCHAR:
        set_text(value, VALUE_TEXT, token->type == JSON_STRING ? token->text : token->raw);
        return length_check(field, value->text_bytes, err);
    case FIELD_JSON:
        return json_convert(field, token, value, err);
    case FIELD_ARRAY:
        return array_convert(field, token, arena, value, err);
    default:
        rc = -1;
    }
    return rc < 0 ? refuse(field, token, err) : 0;
}

/* The value of a field that is absent or null. */
static int absent_convert(const struct schema_field *field, struct arena *arena,
                          struct value *value, struct error *err)
{
    struct json_reader reader;
    struct json_token token;

    if (field->default_json) {
        json_reader_init(&reader, field->default_json, strlen(field->default_json), arena);
        if (json_next(&reader, &token, err) < 0)
            return -1;
        return convert(field, &token, arena, value, err);
    }
    if (field->nullable) {
        value->type = VALUE_NULL;
        return 0;
    }
    if (field->type == FIELD_VARCHAR) {
        set_text(value, VALUE_TEXT, (struct json_span){"", 0});
        return 0;
    }
    return error_set(err, ERR_INVALID, "field %s (%s) is missing and has no default", field->name,
                     field_type_name(field->type));
}

/* ---- dynamic keys ---- */

struct dynamic_entry {
    uint64_t hash;
    struct json_span key;
    struct json_token token;
};

/* Grows in the arena; `slots` is a table of entry numbers plus one, open addressing, once there are
 * more than LIST_FIRST entries. */
struct dynamic_list {
    struct dynamic_entry *entries;
    uint32_t count;
    uint32_t capacity;
    uint32_t *slots;
    uint64_t text_bytes; /* of the dynamic part as JSON */
    struct dynamic_entry first[LIST_FIRST];
};

static bool same_key(const struct dynamic_entry *entry, uint64_t hash, struct json_span key)
{
    return entry->hash == hash && entry->key.bytes == key.bytes &&
           memcmp(entry->key.at, key.at, key.bytes) == 0;
}

/* Puts entry `number` into the table of 2 x capacity slots, or finds its equal: false. */
static bool slot_take(struct dynamic_list *list, uint32_t number)
{
    const struct dynamic_entry *entry = &list->entries[number];
    uint32_t mask = 2 * list->capacity - 1;
    uint32_t at = (uint32_t)entry->hash & mask;

    for (; list->slots[at]; at = (at + 1) & mask)
        if (same_key(&list->entries[list->slots[at] - 1], entry->hash, entry->key))
            return false;
    list->slots[at] = number + 1;
    return true;
}

static int list_grow(struct dynamic_list *list, struct arena *arena, struct error *err)
{
    uint32_t capacity = 2 * list->capacity;
    struct dynamic_entry *entries = arena_alloc(arena, capacity * sizeof *entries);
    uint32_t *slots = arena_alloc(arena, 2 * (size_t)capacity * sizeof *slots);

    if (!entries || !slots)
        return error_set(err, ERR_NOMEM, "no memory for %u keys of one row", capacity);
    memcpy(entries, list->entries, list->count * sizeof *entries);
    list->entries = entries;
    list->capacity = capacity;
    list->slots = slots;
    for (uint32_t i = 0; i < list->count; i++)
        slot_take(list, i);
    return 0;
}

static int list_add(struct dynamic_list *list, struct json_span key, const struct json_token *token,
                    struct arena *arena, struct error *err)
{
    struct dynamic_entry *entry;
    bool twice = false;

    if (list->count == list->capacity && list_grow(list, arena, err) < 0)
        return -1;
    entry = &list->entries[list->count];
    *entry = (struct dynamic_entry){key_hash(key.at, key.bytes), key, *token};
    if (list->slots)
        twice = !slot_take(list, list->count);
    else
        for (uint32_t i = 0; i < list->count && !twice; i++)
            twice = same_key(&list->entries[i], entry->hash, key);
    if (twice)
        return error_set(err, ERR_INVALID, "field %.*s stands twice in the row",
                         (int)(key.bytes < 255 ? key.bytes : 255), key.at);
    list->count++;
    return 0;
}

static int number_convert(const struct json_token *token, struct json_span key, struct value *value,
                          struct error *err)
{
    char shortest[JSON_FLOAT_TEXT_BYTES];
    size_t bytes;

    if (json_number_int64(token, &value->integer, NULL) == 0) {
        value->type = VALUE_INT64;
        return 0;
    }
    if (json_number_double(token, &value->real, err) < 0)
        return error_prefix(err, "field %.*s", (int)(key.bytes < 255 ? key.bytes : 255), key.at);
    bytes = json_format_double(value->real, shortest);
    if (bytes == token->raw.bytes && memcmp(shortest, token->raw.at, bytes) == 0)
        value->type = VALUE_DOUBLE;
    else
        set_text(value, VALUE_NUMBER, token->raw);
    return 0;
}

static int dynamic_convert(const struct dynamic_entry *entry, struct value *value,
                           struct error *err)
{
    switch (entry->token.type) {
    case JSON_TRUE:
    case JSON_FALSE:
        value->type = VALUE_BOOL;
        value->boolean = entry->token.type == JSON_TRUE;
        return 0;
    case JSON_STRING:
        set_text(value, VALUE_TEXT, entry->token.text);
        return 0;
    case JSON_NUMBER:
        return number_convert(&entry->token, entry->key, value, err);
    default: /* whole objects and arrays */
        set_text(value, VALUE_JSON, entry->token.raw);
        return 0;
    }
}

/* ---- one row ---- */

struct row {
    const struct schema *schema;
    struct arena arena;
    bool seen[SCHEMA_FIELD_MAX];
    struct json_token fields[SCHEMA_FIELD_MAX]; /* JSON_NULL where the row says null */
    struct dynamic_list dynamic;
};

/* The next value whole: of an object or array the token has the type of its begin and all of the
 * raw text. */
static int value_take(struct json_reader *r, struct json_token *token, struct error *err)
{
    struct json_reader at_value = *r;
    enum json_type type;

    if (json_peek(r, &type, err) < 0)
        return -1;
    if (type != JSON_BEGIN_OBJECT && type != JSON_BEGIN_ARRAY)
        return json_next(r, token, err);
    if (json_next(&at_value, token, err) < 0)
        return -1;
    return json_raw_value(r, &token->raw, err);
}

/* The schema field of this name, or field_count. */
static uint32_t field_number(const struct schema *schema, struct json_span key)
{
    uint32_t i = 0;

    while (i < schema->field_count && !json_span_is(key, schema->fields[i].name))
        i++;
    return i;
}

static int dynamic_take(struct row *row, const struct json_token *key,
                        const struct json_token *value, struct error *err)
{
    int shown = (int)(key->text.bytes < 255 ? key->text.bytes : 255);

    if (!row->schema->dynamic)
        return error_set(err, ERR_INVALID,
                         "field %.*s is not in the schema: has pass more field without dynamic "
                         "schema, please check it",
                         shown, key->text.at);
    if (json_span_is(key->text, "$meta"))
        return error_set(err, ERR_INVALID,
                         "use the invalid field name($meta) when enable dynamicField");
    /* A null is not kept, but counting it too bounds the list of keys. */
    row->dynamic.text_bytes += key->raw.bytes + value->raw.bytes + 2; /* colon and comma */
    if (row->dynamic.text_bytes > JSON_BYTES_MAX)
        return error_set(err, ERR_INVALID,
                         "the length of the dynamic part exceeds max length (%u), at field %.*s",
                         JSON_BYTES_MAX, shown, key->text.at);
    return list_add(&row->dynamic, key->text, value, &row->arena, err);
}

static int row_read(struct row *row, const char *text, size_t bytes, struct error *err)
{
    const struct schema *schema = row->schema;
    struct json_reader reader;
    struct json_token key, value;
    int rc;

    json_reader_init(&reader, text, bytes, &row->arena);
    if (json_object_begin(&reader, err) < 0)
        return -1;
    while ((rc = json_next(&reader, &key, err)) == 0 && key.type == JSON_KEY) {
        uint32_t field = field_number(schema, key.text);

        if (value_take(&reader, &value, err) < 0)
            return -1;
        if (field == schema->field_count) {
            if (dynamic_take(row, &key, &value, err) < 0)
                return -1;
            continue;
        }
        if (row->seen[field])
            return error_set(err, ERR_INVALID, "field %s stands twice in the row",
                             schema->fields[field].name);
        if (field_type_is_vector(schema->fields[field].type))
            return error_set(err, ERR_INVALID,
                             "field %s is a vector: vectors do not come with the attributes",
                             schema->fields[field].name);
        row->seen[field] = true;
        row->fields[field] = value;
    }
    return rc < 0 ? -1 : json_read_end(&reader, err);
}

/* A text key that the caller did not give must stand in the row. */
static int key_put(const struct row *row, const struct schema_field *key, struct json_span text,
                   struct record_buffer *out, struct error *err)
{
    struct value value = {.type = VALUE_TEXT};
    const struct json_token *token = &row->fields[key - row->schema->fields];

    if (!text.at) {
        if (!row->seen[key - row->schema->fields] || token->type == JSON_NULL)
            return error_set(err, ERR_INVALID, "the key field %s is missing", key->name);
        if (convert(key, token, NULL, &value, err) < 0)
            return -1;
        return put_field(out, key->id, &value, err);
    }
    if (length_check(key, text.bytes, err) < 0)
        return -1;
    if (utf8_valid_bytes(text.at, text.bytes) != text.bytes || memchr(text.at, 0, text.bytes))
        return error_set(err, ERR_INVALID, "the key of field %s is not text in UTF-8", key->name);
    set_text(&value, VALUE_TEXT, text);
    return put_field(out, key->id, &value, err);
}

static int row_write(struct row *row, struct json_span key_text, struct record_buffer *out,
                     struct error *err)
{
    const struct schema_field *key = schema_key(row->schema);
    uint32_t count = 0;

    out->bytes = 0;
    if (!extend(out, 2, err))
        return -1;
    if (key && key->type == FIELD_VARCHAR) {
        if (key_put(row, key, key_text, out, err) < 0)
            return -1;
        count++;
    }
    for (uint32_t i = 0; i < row->schema->field_count; i++) {
        const struct schema_field *field = &row->schema->fields[i];
        struct value value = {.type = VALUE_NULL};
        int rc;

        if (field == key || field_type_is_vector(field->type))
            continue;
        if (row->seen[i] && row->fields[i].type != JSON_NULL)
            rc = convert(field, &row->fields[i], &row->arena, &value, err);
        else
            rc = absent_convert(field, &row->arena, &value, err);
        if (rc < 0 || put_field(out, field->id, &value, err) < 0)
            return -1;
        count++;
    }
    for (uint32_t i = 0; i < row->dynamic.count; i++) {
        const struct dynamic_entry *entry = &row->dynamic.entries[i];
        struct value value = {.type = VALUE_NULL};

        if (entry->token.type == JSON_NULL)
            continue; /* kept so far only to see a second one */
        if (dynamic_convert(entry, &value, err) < 0 ||
            put_dynamic(out, entry->key, &value, err) < 0)
            return -1;
        count++;
    }
    /* Every dynamic value takes 5 bytes of text at least, so 16 bits hold them all. */
    store_u16(out->data, (uint16_t)count);
    return 0;
}

int record_from_json(const struct schema *schema, const char *text, size_t bytes,
                     const char *varchar_key, size_t varchar_key_bytes, struct record_buffer *out,
                     struct error *err)
{
    struct row row;
    int rc = -1;

    if (bytes > TEXT_BYTES_MAX)
        return error_set(err, ERR_INVALID, "the row has %zu bytes of JSON, %u are allowed", bytes,
                         TEXT_BYTES_MAX);
    /* Field by field: the tokens are only looked at where `seen` says so. */
    row.schema = schema;
    memset(row.seen, 0, sizeof row.seen);
    row.dynamic.entries = row.dynamic.first;
    row.dynamic.count = 0;
    row.dynamic.capacity = LIST_FIRST;
    row.dynamic.slots = NULL;
    row.dynamic.text_bytes = 2;
    /* Decoded strings (twice where elements of arrays are looked at), and the lists of keys. */
    arena_init(&row.arena, 5 * (size_t)TEXT_BYTES_MAX);
    if (row_read(&row, text, bytes, err) < 0 ||
        row_write(&row, (struct json_span){varchar_key, varchar_key_bytes}, out, err) < 0)
        goto done;
    rc = 0;
done:
    arena_release(&row.arena);
    return rc;
}

/* ---- reading ---- */

static int fail_short(const struct record_cursor *cursor, struct error *err)
{
    return error_set(err, ERR_CORRUPT, "a record of %zu bytes ends inside a value at byte %zu",
                     cursor->bytes, cursor->offset);
}

/* `bytes` bytes from the cursor on, or NULL. */
static const uint8_t *take(struct record_cursor *cursor, size_t bytes, struct error *err)
{
    const uint8_t *at = cursor->data + cursor->offset;

    if (bytes > cursor->bytes - cursor->offset) {
        fail_short(cursor, err);
        return NULL;
    }
    cursor->offset += bytes;
    return at;
}

int record_open(const uint8_t *data, size_t bytes, struct record_cursor *cursor, struct error *err)
{
    *cursor = (struct record_cursor){.data = data, .bytes = bytes};
    if (bytes < 2)
        return fail_short(cursor, err);
    cursor->left = load_u16(data);
    cursor->offset = 2;
    return 0;
}

static int text_take(struct record_cursor *cursor, struct value *value, struct error *err)
{
    const uint8_t *p = take(cursor, 4, err);

    if (!p)
        return -1;
    value->text_bytes = load_u32(p);
    value->text = (const char *)take(cursor, value->text_bytes, err);
    if (!value->text)
        return -1;
    /* Numbers are printed as they stand, so one that is none must not get that far. */
    if (value->type == VALUE_NUMBER &&
        (value->text_bytes == 0 || strchr("{[\"tfn", value->text[0]) ||
         !is_json((struct json_span){value->text, value->text_bytes})))
        return error_set(err, ERR_CORRUPT, "a record holds a number that is none before byte %zu",
                         cursor->offset);
    return 0;
}

static int payload_take(struct record_cursor *cursor, struct value *value, struct error *err)
{
    const uint8_t *p;

    switch (value->type) {
    case VALUE_NULL:
        return 0;
    case VALUE_BOOL:
        p = take(cursor, 1, err);
        if (!p)
            return -1;
        if (*p > 1)
            return error_set(err, ERR_CORRUPT, "a record holds %u for a bool before byte %zu", *p,
                             cursor->offset);
        value->boolean = *p;
        return 0;
    case VALUE_INT64:
        p = take(cursor, 8, err);
        if (!p)
            return -1;
        value->integer = (int64_t)load_u64(p);
        return 0;
    case VALUE_FLOAT:
    case VALUE_DOUBLE:
        p = take(cursor, value->type == VALUE_FLOAT ? 4 : 8, err);
        if (!p)
            return -1;
        value->real = value->type == VALUE_FLOAT ? (double)load_f32(p) : load_f64(p);
        if (!isfinite(value->real))
            return error_set(err, ERR_CORRUPT,
                             "a record holds a number that is not finite before byte %zu",
                             cursor->offset);
        return 0;
    default:
        return text_take(cursor, value, err);
    }
}

int record_next(struct record_cursor *cursor, uint32_t *field_id, const char **name,
                uint32_t *name_bytes, struct value *value, struct error *err)
{
    const uint8_t *p;

    *name = NULL;
    *name_bytes = 0;
    *value = (struct value){.type = VALUE_NULL};
    if (cursor->left == 0) {
        if (cursor->offset != cursor->bytes)
            return error_set(err, ERR_CORRUPT, "a record of %zu bytes ends at byte %zu already",
                             cursor->bytes, cursor->offset);
        return 0;
    }
    p = take(cursor, 4, err);
    if (!p)
        return -1;
    *field_id = load_u32(p);
    if (*field_id == 0) {
        p = take(cursor, 2, err);
        if (!p)
            return -1;
        *name_bytes = load_u16(p);
        *name = (const char *)take(cursor, *name_bytes, err);
        if (!*name)
            return -1;
    }
    p = take(cursor, 1, err);
    if (!p)
        return -1;
    if (*p > VALUE_JSON)
        return error_set(err, ERR_CORRUPT, "a record holds a value of unknown type %u at byte %zu",
                         *p, cursor->offset - 1);
    value->type = (enum value_type) * p;
    if (payload_take(cursor, value, err) < 0)
        return -1;
    cursor->left--;
    return 1;
}
