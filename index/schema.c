/* How it works: the text is read once into fields and what was said about them (struct statement),
 * because the keys of a field object come in any order; each field is then checked as a whole, and
 * the schema after its last field. Keys are matched without regard to case, as the wire contract
 * wants, and one key given twice is refused: a file that says two things is a mistake.
 *
 * A default value is kept as canonical JSON of the field's own type (an integer field's 5.7 as 5),
 * so that printing and parsing again changes nothing. */
#include "index/schema.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "storage/base/arena.h"
#include "storage/base/json_reader.h"
#include "storage/base/json_writer.h"

#define VECTOR_FIELD_MAX 4u
#define KEYS_MAX 64u /* in one object of the text */
#define DIM_MAX 32768u
#define BINARY_DIM_MAX 262144u
#define CAPACITY_MAX 4096u
#define FIRST_FIELD_ID 100u

/* ---- types ---- */

static const struct {
    enum field_type type;
    const char *name;
} types[] = {
    {FIELD_BOOL, "Bool"},
    {FIELD_INT8, "Int8"},
    {FIELD_INT16, "Int16"},
    {FIELD_INT32, "Int32"},
    {FIELD_INT64, "Int64"},
    {FIELD_FLOAT, "Float"},
    {FIELD_DOUBLE, "Double"},
    {FIELD_VARCHAR, "VarChar"},
    {FIELD_ARRAY, "Array"},
    {FIELD_JSON, "JSON"},
    {FIELD_BINARY_VECTOR, "BinaryVector"},
    {FIELD_FLOAT_VECTOR, "FloatVector"},
    {FIELD_FLOAT16_VECTOR, "Float16Vector"},
    {FIELD_BFLOAT16_VECTOR, "BFloat16Vector"},
    {FIELD_SPARSE_VECTOR, "SparseFloatVector"},
    {FIELD_INT8_VECTOR, "Int8Vector"},
};

#define TYPE_COUNT (sizeof types / sizeof types[0])

bool field_type_is_vector(enum field_type type)
{
    return type >= FIELD_BINARY_VECTOR && type <= FIELD_INT8_VECTOR;
}

const char *field_type_name(enum field_type type)
{
    for (size_t i = 0; i < TYPE_COUNT; i++)
        if (types[i].type == type)
            return types[i].name;
    return NULL;
}

static char lower(char c)
{
    return c >= 'A' && c <= 'Z' ? (char)(c - 'A' + 'a') : c;
}

/* Levenshtein distance without regard to case; texts are shorter than 32 bytes. */
static unsigned edit_distance(const char *a, const char *b)
{
    unsigned row[32];
    size_t bytes = strlen(b);

    for (size_t j = 0; j <= bytes; j++)
        row[j] = (unsigned)j;
    for (size_t i = 0; a[i]; i++) {
        unsigned corner = row[0];

        row[0] = (unsigned)i + 1;
        for (size_t j = 0; j < bytes; j++) {
            unsigned cost = corner + (lower(a[i]) != lower(b[j]));

            corner = row[j + 1];
            if (row[j] + 1 < cost)
                cost = row[j] + 1;
            if (row[j + 1] + 1 < cost)
                cost = row[j + 1] + 1;
            row[j + 1] = cost;
        }
    }
    return row[bytes];
}

static const char *nearest_type(const char *name)
{
    const char *nearest = NULL;
    unsigned best = 5; /* farther than that is no misspelling */

    if (strcasecmp(name, "String") == 0)
        return "VarChar";
    if (strlen(name) >= 32)
        return NULL;
    for (size_t i = 0; i < TYPE_COUNT; i++) {
        unsigned distance = edit_distance(name, types[i].name);

        if (distance < best) {
            best = distance;
            nearest = types[i].name;
        }
    }
    return nearest;
}

int field_type_parse(const char *name, enum field_type *out, struct error *err)
{
    const char *nearest;

    for (size_t i = 0; i < TYPE_COUNT; i++)
        if (strcmp(types[i].name, name) == 0) {
            *out = types[i].type;
            return 0;
        }
    nearest = nearest_type(name);
    return error_set(err, ERR_INVALID, "data type %.100s is invalid(case sensitive)%s%s%s", name,
                     nearest ? ", did you mean " : "", nearest ? nearest : "", nearest ? "?" : "");
}

/* ---- keys of the text ---- */

struct seen_keys {
    struct json_span keys[KEYS_MAX];
    uint32_t count;
};

static bool span_is_folded(struct json_span span, const char *text)
{
    return span.bytes == strlen(text) && strncasecmp(span.at, text, span.bytes) == 0;
}

static int key_take(struct seen_keys *seen, struct json_span key, struct error *err)
{
    for (uint32_t i = 0; i < seen->count; i++)
        if (seen->keys[i].bytes == key.bytes &&
            strncasecmp(seen->keys[i].at, key.at, key.bytes) == 0)
            return error_set(err, ERR_INVALID, "key '%.*s' stands twice",
                             (int)(key.bytes < 100 ? key.bytes : 100), key.at);
    if (seen->count == KEYS_MAX)
        return error_set(err, ERR_INVALID, "more than %u keys in one object", KEYS_MAX);
    seen->keys[seen->count++] = key;
    return 0;
}

/* null keeps *out, like an absent key. */
static int bool_read(struct json_reader *r, const char *key, bool *out, struct error *err)
{
    if (json_read_null(r))
        return 0;
    if (json_read_bool(r, out, err) < 0)
        return error_prefix(err, "%s", key);
    return 0;
}

/* A string that is not to be empty when given; null is absent. Owned by the reader's arena. */
static int string_read(struct json_reader *r, const char *key, struct json_span *out,
                       struct error *err)
{
    if (json_read_null(r))
        return 0;
    if (json_read_string(r, out, err) < 0)
        return error_prefix(err, "%s", key);
    return 0;
}

static int text_copy(struct json_span span, char **out, struct error *err)
{
    *out = malloc(span.bytes + 1);
    if (!*out)
        return error_set(err, ERR_NOMEM, "no memory for %zu bytes of the schema", span.bytes);
    if (span.bytes)
        memcpy(*out, span.at, span.bytes);
    (*out)[span.bytes] = '\0';
    return 0;
}

/* ---- one field ---- */

struct type_param {
    bool given;
    int64_t value;
};

/* What the text says about a field, before it is believed. */
struct statement {
    struct json_span type;
    struct json_span element_type;
    struct json_span default_value; /* raw */
    struct type_param dim;
    struct type_param max_length;
    struct type_param max_capacity;
};

static int type_param_read(struct json_reader *r, const char *name, struct type_param *param,
                           struct error *err)
{
    struct json_token token;
    int rc = -1;

    if (json_next(r, &token, err) < 0)
        return -1;
    if (token.type == JSON_NULL)
        return 0;
    if (token.type == JSON_NUMBER)
        rc = json_number_int64(&token, &param->value, NULL);
    else if (token.type == JSON_STRING)
        rc = json_string_int64(&token, &param->value, NULL);
    if (rc < 0)
        return error_set(err, ERR_INVALID, "type param `%s` is %.*s, wanted a whole number", name,
                         (int)(token.raw.bytes < 40 ? token.raw.bytes : 40), token.raw.at);
    param->given = true;
    return 0;
}

static int type_params_read(struct json_reader *r, struct statement *said, struct error *err)
{
    struct seen_keys seen = {.count = 0};
    struct json_span key;
    int more;

    if (json_read_null(r))
        return 0;
    if (json_object_begin(r, err) < 0)
        return error_prefix(err, "elementTypeParams");
    while ((more = json_object_next(r, &key, err)) > 0) {
        int rc;

        if (key_take(&seen, key, err) < 0)
            return -1;
        if (json_span_is(key, "dim"))
            rc = type_param_read(r, "dim", &said->dim, err);
        else if (json_span_is(key, "max_length"))
            rc = type_param_read(r, "max_length", &said->max_length, err);
        else if (json_span_is(key, "max_capacity"))
            rc = type_param_read(r, "max_capacity", &said->max_capacity, err);
        else
            rc = json_skip_value(r, err);
        if (rc < 0)
            return -1;
    }
    return more;
}

static int name_take(struct schema_field *field, struct json_span name, struct error *err)
{
    while (name.bytes && strchr(" \t\r\n", name.at[0])) {
        name.at++;
        name.bytes--;
    }
    while (name.bytes && strchr(" \t\r\n", name.at[name.bytes - 1]))
        name.bytes--;
    if (name.bytes > SCHEMA_NAME_MAX)
        return error_set(err, ERR_INVALID,
                         "Invalid field name: %.40s.... the length of a field name must be less "
                         "than %u characters",
                         name.at, SCHEMA_NAME_MAX);
    if (name.bytes)
        memcpy(field->name, name.at, name.bytes);
    field->name[name.bytes] = '\0';
    return 0;
}

static int field_read(struct json_reader *r, struct schema_field *field, struct statement *said,
                      struct error *err)
{
    struct seen_keys seen = {.count = 0};
    struct json_span key, name = {NULL, 0};
    int more;

    if (json_object_begin(r, err) < 0)
        return -1;
    while ((more = json_object_next(r, &key, err)) > 0) {
        int rc;

        if (key_take(&seen, key, err) < 0)
            return -1;
        if (span_is_folded(key, "fieldName")) {
            rc = string_read(r, "fieldName", &name, err);
            if (rc == 0)
                rc = name_take(field, name, err);
        } else if (span_is_folded(key, "dataType"))
            rc = string_read(r, "dataType", &said->type, err);
        else if (span_is_folded(key, "elementDataType"))
            rc = string_read(r, "elementDataType", &said->element_type, err);
        else if (span_is_folded(key, "isPrimary"))
            rc = bool_read(r, "isPrimary", &field->primary, err);
        else if (span_is_folded(key, "isPartitionKey"))
            rc = bool_read(r, "isPartitionKey", &field->partition_key, err);
        else if (span_is_folded(key, "isClusteringKey"))
            rc = bool_read(r, "isClusteringKey", &field->clustering_key, err);
        else if (span_is_folded(key, "nullable"))
            rc = bool_read(r, "nullable", &field->nullable, err);
        else if (span_is_folded(key, "defaultValue"))
            rc = json_read_null(r) ? 0 : json_raw_value(r, &said->default_value, err);
        else if (span_is_folded(key, "elementTypeParams"))
            rc = type_params_read(r, said, err);
        else
            rc = json_skip_value(r, err);
        if (rc < 0)
            return -1;
    }
    return more;
}

static bool name_is_reserved(const char *name)
{
    static const char *const reserved[] = {
        "$meta",
        "like",
        "exists",
        "and",
        "or",
        "not",
        "in",
        "json_contains",
        "json_contains_all",
        "json_contains_any",
        "array_contains",
        "array_contains_all",
        "array_contains_any",
        "array_length",
        "true",
        "false",
        "text_match",
        "phrase_match",
        "random_sample",
    };

    if (strcmp(name, "True") == 0 || strcmp(name, "False") == 0)
        return true;
    for (size_t i = 0; i < sizeof reserved / sizeof reserved[0]; i++) {
        const char *a = name, *b = reserved[i];
        bool as_is = strcmp(a, b) == 0, upper = true;

        for (; *a && *b; a++, b++)
            if (*a != (*b >= 'a' && *b <= 'z' ? *b - 'a' + 'A' : *b))
                upper = false;
        if (as_is || (upper && !*a && !*b))
            return true;
    }
    return false;
}

static bool is_name_start(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
}

static int name_check(const char *name, struct error *err)
{
    if (!name[0])
        return error_set(err, ERR_INVALID, "field name should not be empty");
    if (name_is_reserved(name))
        return error_set(err, ERR_INVALID, "Invalid field name: %s. it is a reserved word", name);
    if (!is_name_start(name[0]))
        return error_set(err, ERR_INVALID,
                         "Invalid field name: %s. the first character of a field name must be an "
                         "underscore or letter",
                         name);
    for (const char *c = name; *c; c++)
        if (!is_name_start(*c) && !(*c >= '0' && *c <= '9'))
            return error_set(err, ERR_INVALID,
                             "Invalid field name: %s. a field name can only contain numbers, "
                             "letters and underscores",
                             name);
    return 0;
}

static int type_take(struct json_span span, const char *key, enum field_type *out,
                     struct error *err)
{
    char name[101];

    if (!span.at)
        return error_set(err, ERR_INVALID, "%s is missing", key);
    snprintf(name, sizeof name, "%.*s", (int)(span.bytes < 100 ? span.bytes : 100), span.at);
    return field_type_parse(name, out, err);
}

static int dim_take(struct schema_field *field, const struct type_param *dim, struct error *err)
{
    uint32_t dim_max = field->type == FIELD_BINARY_VECTOR ? BINARY_DIM_MAX : DIM_MAX;

    if (field->type == FIELD_SPARSE_VECTOR) {
        if (dim->given)
            return error_set(err, ERR_INVALID, "dim should not be specified for sparse vector");
        return 0;
    }
    if (!dim->given)
        return error_set(err, ERR_INVALID,
                         "dimension is not defined in field type params, check type param `dim`");
    if (dim->value < 2 || dim->value > dim_max)
        return error_set(err, ERR_INVALID,
                         "invalid dimension: %" PRId64 ". should be in range 2 ~ %u", dim->value,
                         dim_max);
    if (field->type == FIELD_BINARY_VECTOR && dim->value % 8 != 0)
        return error_set(err, ERR_INVALID,
                         "invalid dimension: %" PRId64
                         ". binary vector dimension should be multiple of 8",
                         dim->value);
    field->dim = (uint32_t)dim->value;
    return 0;
}

static int max_length_take(struct schema_field *field, const struct type_param *length,
                           struct error *err)
{
    if (!length->given)
        return error_set(err, ERR_INVALID, "type param(max_length) should be specified");
    if (length->value < 1 || length->value > SCHEMA_VARCHAR_MAX)
        return error_set(err, ERR_INVALID,
                         "the maximum length should be in (0, %u], but got %" PRId64 " instead",
                         SCHEMA_VARCHAR_MAX, length->value);
    field->max_length = (uint32_t)length->value;
    return 0;
}

static int array_take(struct schema_field *field, const struct statement *said, struct error *err)
{
    if (type_take(said->element_type, "elementDataType", &field->element_type, err) < 0)
        return error_prefix(err, "element type");
    if (field_type_is_vector(field->element_type) || field->element_type == FIELD_ARRAY ||
        field->element_type == FIELD_JSON)
        return error_set(err, ERR_INVALID, "element type %s is not supported",
                         field_type_name(field->element_type));
    if (!said->max_capacity.given)
        return error_set(err, ERR_INVALID, "type param(max_capacity) should be specified");
    if (said->max_capacity.value < 1 || said->max_capacity.value > CAPACITY_MAX)
        return error_set(err, ERR_INVALID,
                         "the maximum capacity should be in (0, %u], but got %" PRId64 " instead",
                         CAPACITY_MAX, said->max_capacity.value);
    field->max_capacity = (uint32_t)said->max_capacity.value;
    return field->element_type == FIELD_VARCHAR ? max_length_take(field, &said->max_length, err)
                                                : 0;
}

/* An integer default; a fraction is cut off, as the contract says. */
static int default_integer(const struct schema_field *field, const struct json_token *token,
                           int64_t *out, struct error *err)
{
    int64_t max = INT64_MAX >> (64 - (8u << (field->type - FIELD_INT8)));
    double real;

    if (json_number_int64(token, out, NULL) < 0) {
        if (json_number_double(token, &real, err) < 0)
            return -1;
        if (!(fabs(real) < 0x1p63))
            goto beyond;
        *out = (int64_t)real;
    }
    if (*out <= max && *out >= -max - 1)
        return 0;
beyond:
    return error_set(err, ERR_INVALID, "%.*s is out of the range of %s",
                     (int)(token->raw.bytes < 40 ? token->raw.bytes : 40), token->raw.at,
                     field_type_name(field->type));
}

static int default_put(const struct schema_field *field, const struct json_token *token,
                       struct json_writer *w, struct error *err)
{
    int64_t integer;
    double real;
    float single;

    switch (field->type) {
    case FIELD_BOOL:
        if (token->type != JSON_TRUE && token->type != JSON_FALSE)
            break;
        json_bool(w, token->type == JSON_TRUE);
        return 0;
    case FIELD_INT8:
    case FIELD_INT16:
    case FIELD_INT32:
    case FIELD_INT64:
        if (token->type != JSON_NUMBER)
            break;
        if (default_integer(field, token, &integer, err) < 0)
            return -1;
        json_int64(w, integer);
        return 0;
    case FIELD_FLOAT:
        if (token->type != JSON_NUMBER)
            break;
        if (json_number_float(token, &single, err) < 0)
            return -1;
        json_float(w, single);
        return 0;
    case FIELD_DOUBLE:
        if (token->type != JSON_NUMBER)
            break;
        if (json_number_double(token, &real, err) < 0)
            return -1;
        json_double(w, real);
        return 0;
    case FIELD_VARCHAR:
        if (token->type != JSON_STRING)
            break;
        if (token->text.bytes > field->max_length)
            return error_set(err, ERR_INVALID, "%zu bytes are longer than max_length %u",
                             token->text.bytes, field->max_length);
        json_string_bytes(w, token->text.at, token->text.bytes);
        return 0;
    default:
        return error_set(err, ERR_INVALID, "type %s takes none", field_type_name(field->type));
    }
    return error_set(err, ERR_INVALID, "found %s, which is no %s", json_type_name(token->type),
                     field_type_name(field->type));
}

static int default_take(struct schema_field *field, struct json_span raw, struct arena *arena,
                        struct error *err)
{
    struct json_reader reader;
    struct json_token token;
    struct json_writer writer;
    size_t bytes;
    int rc = -1;

    json_writer_init(&writer, SCHEMA_BYTES_MAX);
    json_reader_init(&reader, raw.at, raw.bytes, arena);
    if (json_next(&reader, &token, err) < 0 || default_put(field, &token, &writer, err) < 0 ||
        json_writer_take(&writer, &field->default_json, &bytes, err) < 0)
        goto done;
    rc = 0;
done:
    json_writer_release(&writer);
    return rc < 0 ? error_prefix(err, "convert defaultValue fail, err") : 0;
}

static int roles_check(const struct schema_field *field, bool has_default, struct error *err)
{
    bool key_type = field->type == FIELD_INT64 || field->type == FIELD_VARCHAR;

    if (field->primary && !key_type)
        return error_set(err, ERR_INVALID,
                         "the data type of primary key should be Int64 or VarChar, found %s",
                         field_type_name(field->type));
    if (field->primary && field->nullable)
        return error_set(err, ERR_INVALID, "primary field not support null");
    if (field->primary && has_default)
        return error_set(err, ERR_INVALID, "primary field not support default_value");
    if (field->partition_key && field->primary)
        return error_set(err, ERR_INVALID,
                         "partition key field should not be the primary key field");
    if (field->partition_key && !key_type)
        return error_set(err, ERR_INVALID,
                         "the data type of partition key should be Int64 or VarChar, found %s",
                         field_type_name(field->type));
    if (field->partition_key && field->nullable)
        return error_set(err, ERR_INVALID, "partition key field not support nullable");
    if (field->nullable && field_type_is_vector(field->type))
        return error_set(err, ERR_INVALID, "vector type not support null, type:%s",
                         field_type_name(field->type));
    return 0;
}

static int field_check(struct schema_field *field, const struct statement *said,
                       struct arena *arena, struct error *err)
{
    int rc = 0;

    if (name_check(field->name, err) < 0 ||
        type_take(said->type, "dataType", &field->type, err) < 0)
        return -1;
    if (roles_check(field, said->default_value.at != NULL, err) < 0)
        return -1;
    if (field_type_is_vector(field->type))
        rc = dim_take(field, &said->dim, err);
    else if (field->type == FIELD_VARCHAR)
        rc = max_length_take(field, &said->max_length, err);
    else if (field->type == FIELD_ARRAY)
        rc = array_take(field, said, err);
    if (rc == 0 && said->default_value.at)
        rc = default_take(field, said->default_value, arena, err);
    return rc;
}

/* ---- the whole ---- */

static struct schema *schema_new(struct error *err)
{
    struct schema *schema = calloc(1, sizeof *schema);

    if (schema) {
        schema->fields = calloc(SCHEMA_FIELD_MAX, sizeof *schema->fields);
        schema->description = calloc(1, 1);
    }
    if (!schema || !schema->fields || !schema->description) {
        schema_free(schema);
        error_set(err, ERR_NOMEM, "no memory for a schema");
        return NULL;
    }
    return schema;
}

void schema_free(struct schema *schema)
{
    if (!schema)
        return;
    for (uint32_t i = 0; i < schema->field_count; i++)
        free(schema->fields[i].default_json);
    free(schema->fields);
    free(schema->description);
    free(schema);
}

static int fields_read(struct json_reader *r, struct schema *schema, struct error *err)
{
    int more;

    if (json_read_null(r))
        return 0;
    if (json_array_begin(r, err) < 0)
        return error_prefix(err, "fields");
    while ((more = json_array_next(r, err)) > 0) {
        struct statement said = {.dim = {false, 0}};
        struct schema_field *field;

        if (schema->field_count == SCHEMA_FIELD_MAX)
            return error_set(err, ERR_INVALID, "maximum field's number should be limited to %u",
                             SCHEMA_FIELD_MAX);
        field = &schema->fields[schema->field_count];
        field->id = FIRST_FIELD_ID + schema->field_count;
        schema->field_count++; /* schema_free looks at it from here on */
        if (field_read(r, field, &said, err) < 0 || field_check(field, &said, r->arena, err) < 0) {
            if (field->name[0])
                return error_prefix(err, "field %s", field->name);
            return error_prefix(err, "fields[%u]", schema->field_count - 1);
        }
    }
    return more;
}

static int functions_refuse(struct json_reader *r, struct error *err)
{
    int more;

    if (json_read_null(r))
        return 0;
    if (json_array_begin(r, err) < 0)
        return error_prefix(err, "functions");
    more = json_array_next(r, err);
    return more > 0 ? error_set(err, ERR_INVALID, "functions are not supported") : more;
}

static int schema_read(struct json_reader *r, struct schema *schema, bool *auto_id,
                       struct error *err)
{
    struct seen_keys seen = {.count = 0};
    struct json_span key, description = {NULL, 0};
    int more;

    if (json_object_begin(r, err) < 0)
        return -1;
    while ((more = json_object_next(r, &key, err)) > 0) {
        int rc;

        if (key_take(&seen, key, err) < 0)
            return -1;
        if (span_is_folded(key, "autoID"))
            rc = bool_read(r, "autoID", auto_id, err);
        else if (span_is_folded(key, "enableDynamicField"))
            rc = bool_read(r, "enableDynamicField", &schema->dynamic, err);
        else if (span_is_folded(key, "description"))
            rc = string_read(r, "description", &description, err);
        else if (span_is_folded(key, "fields"))
            rc = fields_read(r, schema, err);
        else if (span_is_folded(key, "functions"))
            rc = functions_refuse(r, err);
        else
            rc = json_skip_value(r, err);
        if (rc < 0)
            return -1;
    }
    if (more < 0 || json_read_end(r, err) < 0)
        return -1;
    if (description.bytes) {
        free(schema->description);
        return text_copy(description, &schema->description, err);
    }
    return 0;
}

/* What only shows over all fields. */
static int schema_check(struct schema *schema, bool auto_id, struct error *err)
{
    uint32_t vectors = 0, keys = 0, partition_keys = 0;

    for (uint32_t i = 0; i < schema->field_count; i++) {
        struct schema_field *field = &schema->fields[i];

        for (uint32_t j = 0; j < i; j++)
            if (strcmp(schema->fields[j].name, field->name) == 0)
                return error_set(err, ERR_INVALID, "duplicated field name %s", field->name);
        vectors += field_type_is_vector(field->type);
        partition_keys += field->partition_key;
        keys += field->primary;
        if (field->primary && keys > 1)
            return error_set(err, ERR_INVALID,
                             "there are more than one primary key, the second is field %s",
                             field->name);
        if (field->partition_key && partition_keys > 1)
            return error_set(err, ERR_INVALID,
                             "there are more than one partition key, the second is field %s",
                             field->name);
        field->auto_id = field->primary && auto_id;
    }
    if (keys == 0)
        return error_set(err, ERR_INVALID, "primary key is not specified");
    if (vectors == 0)
        return error_set(err, ERR_INVALID, "schema does not contain vector field");
    if (vectors > VECTOR_FIELD_MAX)
        return error_set(err, ERR_INVALID, "maximum vector field's number should be limited to %u",
                         VECTOR_FIELD_MAX);
    return 0;
}

int schema_parse(const char *text, size_t bytes, const char *where, struct schema **out,
                 struct error *err)
{
    struct error local = ERROR_INIT;
    struct json_reader reader;
    struct arena arena;
    struct schema *schema = NULL;
    bool auto_id = false;
    int rc = -1;

    /* Decoded strings are no longer than the text; the rest is the arena's rounding. */
    arena_init(&arena, 4 * SCHEMA_BYTES_MAX);
    *out = NULL;
    if (bytes > SCHEMA_BYTES_MAX) {
        error_set(&local, ERR_INVALID, "the schema has %zu bytes, %u are allowed", bytes,
                  SCHEMA_BYTES_MAX);
        goto done;
    }
    schema = schema_new(&local);
    if (!schema)
        goto done;
    json_reader_init(&reader, text, bytes, &arena);
    if (schema_read(&reader, schema, &auto_id, &local) < 0 ||
        schema_check(schema, auto_id, &local) < 0)
        goto done;
    *out = schema;
    schema = NULL;
    rc = 0;
done:
    if (rc < 0)
        error_set(err, local.code, "%.200s: %s", where, local.message);
    schema_free(schema);
    arena_release(&arena);
    return rc;
}

static int default_field(struct schema *schema, const char *name, enum field_type type,
                         struct error *err)
{
    struct schema_field *field = &schema->fields[schema->field_count];

    if (name_take(field, (struct json_span){name, strlen(name)}, err) < 0 ||
        name_check(field->name, err) < 0)
        return -1;
    field->id = FIRST_FIELD_ID + schema->field_count;
    field->type = type;
    schema->field_count++;
    return 0;
}

int schema_default(const char *key_field, enum field_type key_type, uint32_t key_length_max,
                   const char *vector_field, enum field_type vector_type, uint32_t dim,
                   struct schema **out, struct error *err)
{
    struct type_param length = {true, key_length_max}, dim_param = {true, dim};
    struct schema *schema = schema_new(err);
    int rc = -1;

    *out = NULL;
    if (!schema)
        return -1;
    if (!field_type_is_vector(vector_type)) {
        error_set(err, ERR_INVALID, "type %d of field %.255s is no vector", (int)vector_type,
                  vector_field);
        goto done;
    }
    if (default_field(schema, key_field, key_type, err) < 0 ||
        default_field(schema, vector_field, vector_type, err) < 0)
        goto done;
    schema->dynamic = true;
    schema->fields[0].primary = true;
    if (vector_type == FIELD_SPARSE_VECTOR)
        dim_param.given = false;
    if (!field_type_name(key_type)) {
        error_set(err, ERR_INVALID, "key type %d is unknown", (int)key_type);
        goto done;
    }
    if (roles_check(&schema->fields[0], false, err) < 0 ||
        (key_type == FIELD_VARCHAR && max_length_take(&schema->fields[0], &length, err) < 0)) {
        error_prefix(err, "field %s", schema->fields[0].name);
        goto done;
    }
    if (dim_take(&schema->fields[1], &dim_param, err) < 0) {
        error_prefix(err, "field %s", schema->fields[1].name);
        goto done;
    }
    if (schema_check(schema, false, err) < 0)
        goto done;
    *out = schema;
    schema = NULL;
    rc = 0;
done:
    schema_free(schema);
    return rc;
}

/* ---- printing ---- */

static void print_flag(struct json_writer *w, const char *key, bool value)
{
    if (!value)
        return;
    json_key(w, key);
    json_bool(w, true);
}

/* As text: that is how the contract stores and reports them. */
static void print_param(struct json_writer *w, const char *key, uint32_t value)
{
    if (!value)
        return;
    json_key(w, key);
    json_int64_string(w, value);
}

static void print_field(struct json_writer *w, const struct schema_field *field)
{
    json_begin_object(w);
    json_key(w, "fieldName");
    json_string(w, field->name);
    json_key(w, "dataType");
    json_string(w, field_type_name(field->type));
    if (field->type == FIELD_ARRAY) {
        json_key(w, "elementDataType");
        json_string(w, field_type_name(field->element_type));
    }
    print_flag(w, "isPrimary", field->primary);
    print_flag(w, "isPartitionKey", field->partition_key);
    print_flag(w, "isClusteringKey", field->clustering_key);
    print_flag(w, "nullable", field->nullable);
    if (field->default_json) {
        json_key(w, "defaultValue");
        json_raw(w, field->default_json, strlen(field->default_json));
    }
    if (field->dim || field->max_length || field->max_capacity) {
        json_key(w, "elementTypeParams");
        json_begin_object(w);
        print_param(w, "dim", field->dim);
        print_param(w, "max_length", field->max_length);
        print_param(w, "max_capacity", field->max_capacity);
        json_end_object(w);
    }
    json_end_object(w);
}

int schema_print(const struct schema *schema, char **out, size_t *bytes, struct error *err)
{
    const struct schema_field *key = schema_key(schema);
    struct json_writer writer;
    int rc;

    /* What is printed must be small enough to be read again. */
    json_writer_init(&writer, SCHEMA_BYTES_MAX);
    json_begin_object(&writer);
    json_key(&writer, "autoID");
    json_bool(&writer, key && key->auto_id);
    if (schema->description && schema->description[0]) {
        json_key(&writer, "description");
        json_string(&writer, schema->description);
    }
    json_key(&writer, "enableDynamicField");
    json_bool(&writer, schema->dynamic);
    json_key(&writer, "fields");
    json_begin_array(&writer);
    for (uint32_t i = 0; i < schema->field_count; i++)
        print_field(&writer, &schema->fields[i]);
    json_end_array(&writer);
    json_end_object(&writer);
    rc = json_writer_take(&writer, out, bytes, err);
    json_writer_release(&writer);
    return rc;
}

/* ---- finding ---- */

const struct schema_field *schema_find(const struct schema *schema, const char *name)
{
    for (uint32_t i = 0; i < schema->field_count; i++)
        if (strcmp(schema->fields[i].name, name) == 0)
            return &schema->fields[i];
    return NULL;
}

const struct schema_field *schema_find_id(const struct schema *schema, uint32_t id)
{
    for (uint32_t i = 0; i < schema->field_count; i++)
        if (schema->fields[i].id == id)
            return &schema->fields[i];
    return NULL;
}

const struct schema_field *schema_key(const struct schema *schema)
{
    for (uint32_t i = 0; i < schema->field_count; i++)
        if (schema->fields[i].primary)
            return &schema->fields[i];
    return NULL;
}

const struct schema_field *schema_vector(const struct schema *schema, uint32_t n)
{
    for (uint32_t i = 0; i < schema->field_count; i++)
        if (field_type_is_vector(schema->fields[i].type) && n-- == 0)
            return &schema->fields[i];
    return NULL;
}
