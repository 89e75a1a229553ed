/* A body is walked once: a table says which keys a call knows, of what type, and where they go.
 * Values whose reading depends on the collection (vectors, keys) are only marked on that walk,
 * because the collection's name may come after them, and read when the collection is known. */
#include "src/codec_rest.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#define KEYS_MAX 32u
#define PARAMS_MAX 64u
#define COUNT(array) ((uint32_t)(sizeof(array) / sizeof((array)[0])))

static int fail_json(struct failure *failure, const struct error *err)
{
    if (err->code == ERR_BUDGET || err->code == ERR_NOMEM)
        return failure_set(failure, FAILURE_MEMORY, "memory limit exceeded");
    return failure_set(failure, FAILURE_JSON, "can only accept json format request, error: %s",
                       err->message);
}

static int fail_memory(struct failure *failure)
{
    return failure_set(failure, FAILURE_MEMORY, "memory limit exceeded");
}

/* NUL-terminated: JSON strings here cannot hold a NUL. */
static const char *span_text(struct arena *arena, struct json_span span)
{
    return arena_strndup(arena, span.at, span.bytes);
}

static int read_strings(struct json_reader *reader, struct arena *arena, struct name_list *out,
                        struct error *err)
{
    const char **names = NULL;
    uint32_t count = 0;
    uint32_t capacity = 0;
    struct json_span span;
    int more;

    if (json_array_begin(reader, err) < 0)
        return -1;
    while ((more = json_array_next(reader, err)) > 0) {
        if (count == REQUEST_NAMES_MAX)
            return error_set(err, ERR_INVALID, "more than %u names in an array", REQUEST_NAMES_MAX);
        if (count == capacity) {
            const char **grown;

            capacity = capacity ? capacity * 4 : 8;
            grown = arena_alloc(arena, capacity * sizeof *grown);
            if (!grown)
                return error_set(err, ERR_BUDGET, "no memory for names");
            if (count > 0)
                memcpy(grown, names, count * sizeof *grown);
            names = grown;
        }
        if (json_read_string(reader, &span, err) < 0)
            return -1;
        names[count] = span_text(arena, span);
        if (!names[count++])
            return error_set(err, ERR_BUDGET, "no memory for names");
    }
    *out = (struct name_list){.names = names, .count = count, .given = true};
    return more;
}

/* Strings of digits are no numbers here, unlike in rows. */
static int read_int32(struct json_reader *reader, int32_t *out, struct error *err)
{
    struct json_token token;
    int64_t value;

    if (json_next(reader, &token, err) < 0)
        return -1;
    if (token.type != JSON_NUMBER)
        return error_set(err, ERR_INVALID, "wanted an integer, found %s at byte %zu",
                         json_type_name(token.type), token.offset);
    if (json_number_int64(&token, &value, err) < 0)
        return -1;
    if (value < INT32_MIN || value > INT32_MAX)
        return error_set(err, ERR_INVALID, "wanted a 32-bit integer, found %lld at byte %zu",
                         (long long)value, token.offset);
    *out = (int32_t)value;
    return 0;
}

static int read_key(struct json_reader *reader, const struct rest_key *key, struct arena *arena,
                    void *out, bool *filled, struct error *err)
{
    char *place = (char *)out + key->offset;
    struct json_span span;

    switch (key->kind) {
    case REST_STRING: {
        const char *text;

        if (json_read_string(reader, &span, err) < 0)
            return -1;
        text = span_text(arena, span);
        if (!text)
            return error_set(err, ERR_BUDGET, "no memory for a string");
        memcpy(place, &text, sizeof text);
        *filled = span.bytes > 0;
        return 0;
    }
    case REST_INT32: {
        int32_t value = 0;

        if (read_int32(reader, &value, err) < 0)
            return -1;
        memcpy(place, &value, sizeof value);
        break;
    }
    case REST_BOOL: {
        bool value = false;

        if (json_read_bool(reader, &value, err) < 0)
            return -1;
        memcpy(place, &value, sizeof value);
        break;
    }
    case REST_STRINGS: {
        struct name_list list;

        if (read_strings(reader, arena, &list, err) < 0)
            return -1;
        memcpy(place, &list, sizeof list);
        break;
    }
    case REST_VALUE: {
        struct rest_value value = {.given = true, .text = reader->text};

        if (json_raw_value(reader, &span, err) < 0)
            return -1;
        value.begin = (size_t)(span.at - reader->text);
        value.end = value.begin + span.bytes;
        memcpy(place, &value, sizeof value);
        break;
    }
    }
    *filled = true;
    return 0;
}

static uint32_t find_key(struct json_span name, const struct rest_key *keys, uint32_t key_count,
                         bool *exactly)
{
    for (uint32_t i = 0; i < key_count; i++) {
        if (json_span_is(name, keys[i].name)) {
            *exactly = true;
            return i;
        }
    }
    *exactly = false;
    for (uint32_t i = 0; i < key_count; i++) {
        if (!keys[i].exact && strlen(keys[i].name) == name.bytes &&
            strncasecmp(keys[i].name, name.at, name.bytes) == 0)
            return i;
    }
    return key_count;
}

int rest_read(const char *body, size_t bytes, const struct rest_key *keys, uint32_t key_count,
              struct arena *arena, void *out, struct failure *failure)
{
    struct error err = ERROR_INIT;
    struct json_reader reader;
    struct json_span name;
    bool filled[KEYS_MAX] = {false};
    bool by_exact[KEYS_MAX] = {false};
    int more;

    if (bytes == 0)
        return failure_set(failure, FAILURE_JSON,
                           "can only accept json format request, the request body should be nil, "
                           "however {} is valid");
    json_reader_init(&reader, body, bytes, arena);
    if (json_object_begin(&reader, &err) < 0)
        return fail_json(failure, &err);
    while ((more = json_object_next(&reader, &name, &err)) > 0) {
        bool exactly;
        uint32_t i = find_key(name, keys, key_count, &exactly);

        if (i == key_count || (by_exact[i] && !exactly)) {
            if (json_skip_value(&reader, &err) < 0)
                return fail_json(failure, &err);
            continue;
        }
        if (json_read_null(&reader))
            continue;
        if (read_key(&reader, &keys[i], arena, out, &filled[i], &err) < 0) {
            error_prefix(&err, "%s", keys[i].name);
            return fail_json(failure, &err);
        }
        by_exact[i] = exactly;
    }
    if (more < 0 || json_read_end(&reader, &err) < 0)
        return fail_json(failure, &err);
    for (uint32_t i = 0; i < key_count; i++) {
        if (keys[i].required && !filled[i])
            return failure_set(failure, FAILURE_MISSING,
                               "missing required parameters, error: Key: 'Request.%s' Error:Field "
                               "validation for '%s' failed on the 'required' tag",
                               keys[i].label, keys[i].label);
    }
    return 0;
}

int rest_read_target(const char *body, size_t bytes, bool collection_required, struct arena *arena,
                     struct rest_target *out, struct failure *failure)
{
    const struct rest_key keys[] = {
        {"dbName", "DbName", REST_STRING, offsetof(struct rest_target, database), false, false},
        {"collectionName", "CollectionName", REST_STRING, offsetof(struct rest_target, collection),
         collection_required, false},
    };

    memset(out, 0, sizeof *out);
    return rest_read(body, bytes, keys, COUNT(keys), arena, out, failure);
}

int rest_read_search(const char *body, size_t bytes, struct arena *arena, struct rest_search *out,
                     struct failure *failure)
{
#define AT(member) offsetof(struct rest_search, member)
    static const struct rest_key keys[] = {
        {"dbName", "DbName", REST_STRING, AT(target.database), false, false},
        {"collectionName", "CollectionName", REST_STRING, AT(target.collection), true, false},
        {"data", "Data", REST_VALUE, AT(data), true, true},
        {"annsField", "AnnsField", REST_STRING, AT(request.anns_field), false, false},
        {"limit", "Limit", REST_INT32, AT(request.limit), false, false},
        {"offset", "Offset", REST_INT32, AT(request.offset), false, false},
        {"filter", "Filter", REST_STRING, AT(request.filter), false, false},
        {"outputFields", "OutputFields", REST_STRINGS, AT(request.output), false, false},
        {"searchParams", "SearchParams", REST_VALUE, AT(search_params), false, false},
        {"partitionNames", "PartitionNames", REST_STRINGS, AT(request.partitions), false, false},
        {"groupingField", "GroupByField", REST_STRING, AT(request.grouping_field), false, false},
        {"groupSize", "GroupSize", REST_INT32, AT(group_size), false, false},
        {"strictGroupSize", "StrictGroupSize", REST_BOOL, AT(strict_group_size), false, false},
        {"consistencyLevel", "ConsistencyLevel", REST_STRING, AT(request.consistency), false,
         false},
        {"functionScore", "FunctionScore", REST_VALUE, AT(function_score), false, false},
    };
#undef AT
    _Static_assert(COUNT(keys) <= KEYS_MAX, "rest_read counts keys in arrays of this size");

    memset(out, 0, sizeof *out);
    search_request_init(&out->request);
    return rest_read(body, bytes, keys, COUNT(keys), arena, out, failure);
}

int rest_read_get(const char *body, size_t bytes, struct arena *arena, struct rest_get *out,
                  struct failure *failure)
{
#define AT(member) offsetof(struct rest_get, member)
    static const struct rest_key keys[] = {
        {"dbName", "DbName", REST_STRING, AT(target.database), false, false},
        {"collectionName", "CollectionName", REST_STRING, AT(target.collection), true, false},
        {"id", "ID", REST_VALUE, AT(id), true, true},
        {"outputFields", "OutputFields", REST_STRINGS, AT(request.output), false, false},
        {"partitionNames", "PartitionNames", REST_STRINGS, AT(request.partitions), false, false},
        {"consistencyLevel", "ConsistencyLevel", REST_STRING, AT(request.consistency), false,
         false},
    };
#undef AT

    memset(out, 0, sizeof *out);
    get_request_init(&out->request);
    return rest_read(body, bytes, keys, COUNT(keys), arena, out, failure);
}

/* A reader of a marked value, which counts its bytes from the body's first. */
static void value_reader(const struct rest_value *value, struct arena *arena,
                         struct json_reader *reader)
{
    json_reader_init(reader, value->text, value->end, arena);
    reader->position = value->begin;
}

/* searchParams. */

struct param {
    struct json_span name;
    struct json_span raw;
    enum json_type type;
    bool nested;
};

struct params {
    struct param list[PARAMS_MAX];
    uint32_t count;
};

static struct json_span unquoted(struct json_span raw)
{
    if (raw.bytes >= 2 && raw.at[0] == '"')
        return (struct json_span){raw.at + 1, raw.bytes - 2};
    return raw;
}

static bool span_equal(struct json_span a, struct json_span b)
{
    return a.bytes == b.bytes && memcmp(a.at, b.at, a.bytes) == 0;
}

static int params_add(struct params *params, struct json_reader *reader, struct json_span name,
                      bool nested, struct error *err)
{
    struct param param = {.name = name, .nested = nested};
    struct param *place = NULL;

    if (json_peek(reader, &param.type, err) < 0 || json_raw_value(reader, &param.raw, err) < 0)
        return -1;
    if (param.type == JSON_NULL)
        return 0;
    /* The last of two equal keys counts. */
    for (uint32_t i = 0; i < params->count; i++) {
        if (params->list[i].nested == nested && span_equal(params->list[i].name, name))
            place = &params->list[i];
    }
    if (!place) {
        if (params->count == PARAMS_MAX)
            return error_set(err, ERR_INVALID, "searchParams: more than %u keys", PARAMS_MAX);
        place = &params->list[params->count++];
    }
    *place = param;
    return 0;
}

static int params_read(const struct rest_value *value, struct arena *arena, struct params *params,
                       struct failure *failure)
{
    struct error err = ERROR_INIT;
    struct json_reader reader;
    struct json_span name;
    enum json_type type;
    int more;

    value_reader(value, arena, &reader);
    if (json_object_begin(&reader, &err) < 0) {
        error_prefix(&err, "searchParams");
        return fail_json(failure, &err);
    }
    while ((more = json_object_next(&reader, &name, &err)) > 0) {
        if (!json_span_is(name, "params")) {
            if (params_add(params, &reader, name, false, &err) < 0)
                return fail_json(failure, &err);
            continue;
        }
        if (json_peek(&reader, &type, &err) < 0)
            return fail_json(failure, &err);
        if (type == JSON_NULL && json_read_null(&reader))
            continue;
        if (type != JSON_BEGIN_OBJECT)
            return failure_set(failure, FAILURE_INVALID_PARAMETER,
                               "searchParams.params must be a dict");
        if (json_object_begin(&reader, &err) < 0)
            return fail_json(failure, &err);
        while ((more = json_object_next(&reader, &name, &err)) > 0) {
            if (params_add(params, &reader, name, true, &err) < 0)
                return fail_json(failure, &err);
        }
        if (more < 0)
            return fail_json(failure, &err);
    }
    if (more < 0)
        return fail_json(failure, &err);
    for (uint32_t i = 0; i < params->count; i++) {
        for (uint32_t j = 0; j < params->count; j++) {
            const struct param *flat = &params->list[i];
            const struct param *nested = &params->list[j];

            if (!flat->nested && nested->nested && span_equal(flat->name, nested->name) &&
                !span_equal(unquoted(flat->raw), unquoted(nested->raw)))
                return failure_set(
                    failure, FAILURE_INVALID_PARAMETER,
                    "ambiguous parameter: %.*s, in search_param: %.*s, in "
                    "search_param.params: %.*s",
                    (int)(flat->name.bytes > 64 ? 64 : flat->name.bytes), flat->name.at,
                    (int)(flat->raw.bytes > 64 ? 64 : flat->raw.bytes), flat->raw.at,
                    (int)(nested->raw.bytes > 64 ? 64 : nested->raw.bytes), nested->raw.at);
        }
    }
    return 0;
}

static const struct param *params_find(const struct params *params, const char *name)
{
    for (uint32_t i = 0; i < params->count; i++) {
        if (json_span_is(params->list[i].name, name))
            return &params->list[i];
    }
    return NULL;
}

/* A number or a string of digits; 0 when absent. */
static int params_uint32(const struct params *params, const char *name, uint32_t min, uint32_t max,
                         uint32_t *out, struct failure *failure)
{
    const struct param *param = params_find(params, name);
    struct json_token token;
    int64_t value;
    int shown;

    if (!param)
        return 0;
    shown = (int)(param->raw.bytes > 64 ? 64 : param->raw.bytes);
    token = (struct json_token){.type = param->type, .raw = unquoted(param->raw)};
    token.text = token.raw;
    if ((param->type != JSON_NUMBER && param->type != JSON_STRING) || token.raw.bytes == 0 ||
        (param->type == JSON_NUMBER ? json_number_int64(&token, &value, NULL)
                                    : json_string_int64(&token, &value, NULL)) < 0)
        return failure_set(failure, FAILURE_INVALID_PARAMETER,
                           "Type conflict in json: param '%s' (%.*s) should be integer: invalid "
                           "parameter",
                           name, shown, param->raw.at);
    if (value < (int64_t)min || value > (int64_t)max)
        return failure_set(failure, FAILURE_INVALID_PARAMETER,
                           "Out of range in json: param '%s' (%.*s) should be in range [%u, %u]: "
                           "invalid parameter",
                           name, shown, param->raw.at, min, max);
    *out = (uint32_t)value;
    return 0;
}

/* A number or a string that holds one; stays as it is when absent. */
static int params_fraction(const struct params *params, const char *name, double min, double max,
                           double *out, struct failure *failure)
{
    const struct param *param = params_find(params, name);
    struct json_span raw;
    struct json_reader reader;
    double value;
    int shown;

    if (!param)
        return 0;
    shown = (int)(param->raw.bytes > 64 ? 64 : param->raw.bytes);
    raw = unquoted(param->raw);
    json_reader_init(&reader, raw.at, raw.bytes, NULL);
    if ((param->type != JSON_NUMBER && param->type != JSON_STRING) ||
        json_read_double(&reader, &value, NULL) < 0 || json_read_end(&reader, NULL) < 0)
        return failure_set(failure, FAILURE_INVALID_PARAMETER,
                           "Type conflict in json: param '%s' (%.*s) should be a number: invalid "
                           "parameter",
                           name, shown, param->raw.at);
    if (!(value >= min && value <= max))
        return failure_set(failure, FAILURE_INVALID_PARAMETER,
                           "Out of range in json: param '%s' (%.*s) should be in range [%g, %g]: "
                           "invalid parameter",
                           name, shown, param->raw.at, min, max);
    *out = value;
    return 0;
}

/* true or false, also in quotes. */
static int params_bool(const struct params *params, const char *name, bool *out,
                       struct failure *failure)
{
    const struct param *param = params_find(params, name);
    struct json_span raw;

    if (!param)
        return 0;
    raw = unquoted(param->raw);
    if (json_span_is(raw, "true") || json_span_is(raw, "false")) {
        *out = raw.at[0] == 't';
        return 0;
    }
    return failure_set(failure, FAILURE_INVALID_PARAMETER,
                       "Type conflict in json: param '%s' (%.*s) should be true or false: invalid "
                       "parameter",
                       name, (int)(param->raw.bytes > 64 ? 64 : param->raw.bytes), param->raw.at);
}

static int params_text(const struct params *params, const char *name, struct arena *arena,
                       const char **out, struct failure *failure)
{
    const struct param *param = params_find(params, name);

    if (!param)
        return 0;
    if (param->type != JSON_STRING)
        return failure_set(failure, FAILURE_INVALID_PARAMETER,
                           "Type conflict in json: param '%s' should be string: invalid parameter",
                           name);
    *out = span_text(arena, unquoted(param->raw));
    return *out ? 0 : fail_memory(failure);
}

int rest_read_search_params(const struct rest_value *value, struct arena *arena,
                            struct search_tuning *out, struct failure *failure)
{
    static const char *const ranges[] = {"radius", "range_filter"};
    static const char *const efforts[] = {"search_list", "ef", "nprobe", "level"};
    struct params params;
    uint32_t beam_width = 0;

    memset(out, 0, sizeof *out);
    if (!value->given)
        return 0;
    params.count = 0;
    if (params_read(value, arena, &params, failure) < 0 ||
        params_text(&params, "metric_type", arena, &out->metric_type, failure) < 0 ||
        params_text(&params, "group_by_field", arena, &out->group_by, failure) < 0 ||
        params_uint32(&params, "search_list", 1, INT32_MAX, &out->search_list, failure) < 0 ||
        params_uint32(&params, "ef", 1, INT32_MAX, &out->ef, failure) < 0 ||
        params_uint32(&params, "nprobe", 1, 65536, &out->nprobe, failure) < 0 ||
        params_uint32(&params, "level", 1, 10, &out->level, failure) < 0 ||
        params_uint32(&params, "beamwidth", 1, 128, &beam_width, failure) < 0 ||
        params_uint32(&params, "reads_max", 1, INT32_MAX, &out->reads_max, failure) < 0 ||
        params_fraction(&params, "recall_target", REQUEST_RECALL_MIN, REQUEST_RECALL_MAX,
                        &out->recall_target, failure) < 0 ||
        params_bool(&params, "exact_scores", &out->exact_scores, failure) < 0 ||
        params_bool(&params, "explain", &out->explain, failure) < 0)
        return -1;
    for (uint32_t i = 0; out->recall_target > 0 && i < COUNT(efforts); i++) {
        if (params_find(&params, efforts[i]))
            return failure_set(failure, FAILURE_INVALID_PARAMETER,
                               "recall_target and %s both say how far to search, give one of them: "
                               "invalid parameter",
                               efforts[i]);
    }
    out->beam_width = beam_width > REQUEST_BEAM_WIDTH_MAX ? REQUEST_BEAM_WIDTH_MAX : beam_width;
    for (uint32_t i = 0; i < COUNT(ranges); i++) {
        const struct param *param = params_find(&params, ranges[i]);

        if (!param)
            continue;
        if (param->type != JSON_NUMBER)
            return failure_set(failure, FAILURE_INVALID_PARAMETER,
                               "Type conflict in json: param '%s' should be a number: invalid "
                               "parameter",
                               ranges[i]);
        out->range = ranges[i];
    }
    return 0;
}

int rest_check_function_score(const struct rest_value *value, struct failure *failure)
{
    struct error err = ERROR_INIT;
    struct json_reader reader;
    struct json_span name;
    struct json_span raw;
    int more;

    if (!value->given)
        return 0;
    value_reader(value, NULL, &reader);
    if (json_object_begin(&reader, &err) < 0)
        return fail_json(failure, &err);
    while ((more = json_object_next(&reader, &name, &err)) > 0) {
        if (json_raw_value(&reader, &raw, &err) < 0)
            return fail_json(failure, &err);
        /* An empty array is two brackets with nothing but space between them. */
        if (json_span_is(name, "functions") && raw.at[0] == '[' &&
            raw.at[1 + strspn(raw.at + 1, " \t\r\n")] != ']')
            return failure_set(failure, FAILURE_INVALID_PARAMETER,
                               "functionScore is not supported: invalid parameter");
    }
    return more < 0 ? fail_json(failure, &err) : 0;
}

/* Vectors. */

static int fail_dimension(struct failure *failure, enum field_type type, uint32_t dim,
                          const char *what, size_t found)
{
    return failure_set(failure, FAILURE_JSON,
                       "can only accept json format request, error: dimension: %u, but length of "
                       "%s: %zu: invalid parameter[expected=%s][actual=%zu]",
                       dim, what, found, field_type_name(type), found);
}

static float half_to_float(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    uint32_t exponent = (half >> 10) & 31u;
    uint32_t mantissa = half & 0x3ffu;
    uint32_t bits;
    float out;

    if (exponent == 0) {
        out = ldexpf((float)mantissa, -24);
        return sign ? -out : out;
    }
    if (exponent == 31)
        bits = sign | 0x7f800000u | mantissa << 13;
    else
        bits = sign | (exponent + 112) << 23 | mantissa << 13;
    memcpy(&out, &bits, sizeof out);
    return out;
}

/* Half floats as base64 of dim little-endian 16-bit words. */
static int read_halves(struct json_reader *reader, enum field_type type, uint32_t dim,
                       struct arena *arena, float *out, struct failure *failure)
{
    struct error err = ERROR_INIT;
    struct json_span span;
    uint8_t *bytes = arena_alloc(arena, (size_t)dim * 2 + 3);
    size_t decoded = 0;

    if (!bytes)
        return fail_memory(failure);
    if (json_read_string(reader, &span, &err) < 0)
        return fail_json(failure, &err);
    if (span.bytes / 4 * 3 > (size_t)dim * 2 + 2)
        return fail_dimension(failure, type, dim, "bytes", span.bytes / 4 * 3);
    if (json_base64_decode(span, bytes, (size_t)dim * 2 + 3, &decoded, &err) < 0)
        return fail_json(failure, &err);
    if (decoded != (size_t)dim * 2)
        return fail_dimension(failure, type, dim, "bytes", decoded);
    for (uint32_t i = 0; i < dim; i++) {
        uint16_t half = (uint16_t)(bytes[2 * i] | bytes[2 * i + 1] << 8);

        if (type == FIELD_FLOAT16_VECTOR) {
            out[i] = half_to_float(half);
        } else {
            uint32_t bits = (uint32_t)half << 16;

            memcpy(&out[i], &bits, sizeof out[i]);
        }
        if (!isfinite(out[i]))
            return failure_set(failure, FAILURE_JSON,
                               "can only accept json format request, error: value %u of a vector "
                               "is not finite",
                               i);
    }
    return 0;
}

/* Elements of the array that is next; 0 when it is malformed. */
static size_t array_length(const struct json_reader *reader)
{
    struct json_reader ahead = *reader;
    size_t length = 0;
    int more;

    if (json_array_begin(&ahead, NULL) < 0)
        return 0;
    while ((more = json_array_next(&ahead, NULL)) > 0) {
        if (json_skip_value(&ahead, NULL) < 0)
            return 0;
        length++;
    }
    return more < 0 ? 0 : length;
}

static int read_vector(struct json_reader *reader, enum field_type type, uint32_t dim,
                       struct arena *arena, float *out, struct failure *failure)
{
    struct error err = ERROR_INIT;
    struct json_reader before;
    enum json_type next;
    size_t count = 0;

    if (json_peek(reader, &next, &err) < 0)
        return fail_json(failure, &err);
    if (next == JSON_STRING && (type == FIELD_FLOAT16_VECTOR || type == FIELD_BFLOAT16_VECTOR))
        return read_halves(reader, type, dim, arena, out, failure);
    if (next != JSON_BEGIN_ARRAY)
        return failure_set(failure, FAILURE_JSON,
                           "can only accept json format request, error: data must be an array of "
                           "vectors, found %s in it: invalid parameter[expected=%s][actual=%s]",
                           json_type_name(next), field_type_name(type), json_type_name(next));
    before = *reader;
    if (json_read_float_array(reader, out, (size_t)dim + 1, &count, &err) < 0) {
        size_t length = array_length(&before);

        /* Too long, or malformed? Only a vector that is both is named by its length alone. */
        if (length > dim)
            return fail_dimension(failure, type, dim, "[]float", length);
        return fail_json(failure, &err);
    }
    if (count != dim)
        return fail_dimension(failure, type, dim, "[]float", count);
    for (uint32_t i = 0; type == FIELD_INT8_VECTOR && i < dim; i++) {
        if (out[i] < -128 || out[i] > 127 || out[i] != truncf(out[i]))
            return failure_set(failure, FAILURE_JSON,
                               "can only accept json format request, error: value %u of an "
                               "Int8Vector is no integer from -128 to 127",
                               i);
    }
    return 0;
}

int rest_read_queries(const struct rest_value *value, enum field_type type, uint32_t dim,
                      struct arena *arena, struct search_request *out, struct failure *failure)
{
    struct error err = ERROR_INIT;
    struct json_reader reader;
    const float **queries = NULL;
    uint32_t capacity = 0;
    uint32_t count = 0;
    enum json_type next;
    int more;

    if (type == FIELD_BINARY_VECTOR || type == FIELD_SPARSE_VECTOR)
        return failure_set(failure, FAILURE_UNIMPLEMENTED,
                           "service unimplemented: search on %s is not supported by this server",
                           field_type_name(type));
    value_reader(value, arena, &reader);
    if (json_peek(&reader, &next, &err) < 0)
        return fail_json(failure, &err);
    if (next != JSON_BEGIN_ARRAY)
        return failure_set(failure, FAILURE_JSON,
                           "can only accept json format request, error: data must be an array of "
                           "vectors, found %s",
                           json_type_name(next));
    if (json_array_begin(&reader, &err) < 0)
        return fail_json(failure, &err);
    while ((more = json_array_next(&reader, &err)) > 0) {
        float *vector;

        if (count >= REQUEST_QUERY_MAX) {
            /* Counted on for the message. */
            if (json_skip_value(&reader, &err) < 0)
                return fail_json(failure, &err);
            count++;
            continue;
        }
        if (count == capacity) {
            const float **grown;

            capacity = capacity ? capacity * 4 : 8;
            grown = arena_alloc(arena, capacity * sizeof *grown);
            if (!grown)
                return fail_memory(failure);
            if (count > 0)
                memcpy(grown, queries, count * sizeof *grown);
            queries = grown;
        }
        vector = arena_alloc(arena, ((size_t)dim + 1) * sizeof *vector);
        if (!vector)
            return fail_memory(failure);
        if (read_vector(&reader, type, dim, arena, vector, failure) < 0)
            return -1;
        queries[count++] = vector;
    }
    if (more < 0)
        return fail_json(failure, &err);
    out->queries = queries;
    out->query_count = count;
    return 0;
}

/* Keys. */

static int fail_key(struct failure *failure)
{
    return failure_set(failure, FAILURE_BAD_KEY,
                       "please check the primary key and its' type can only in [int, string]");
}

static int read_one_key(struct json_reader *reader, enum field_type key_type,
                        struct request_key *out, struct failure *failure)
{
    struct error err = ERROR_INIT;
    struct json_token token;

    if (json_next(reader, &token, &err) < 0)
        return fail_json(failure, &err);
    if (token.type != JSON_NUMBER && token.type != JSON_STRING)
        return fail_key(failure);
    if (key_type == FIELD_INT64) {
        if ((token.type == JSON_NUMBER ? json_number_int64(&token, &out->number, &err)
                                       : json_string_int64(&token, &out->number, &err)) < 0)
            return fail_key(failure);
        return 0;
    }
    if (token.type == JSON_NUMBER) {
        out->text = token.raw.at;
        out->text_bytes = (uint32_t)token.raw.bytes;
        return 0;
    }
    if (token.text.bytes > SCHEMA_VARCHAR_MAX)
        return fail_key(failure);
    out->text = token.text.at;
    out->text_bytes = (uint32_t)token.text.bytes;
    return 0;
}

int rest_read_keys(const struct rest_value *value, enum field_type key_type, struct arena *arena,
                   struct get_request *out, struct failure *failure)
{
    struct error err = ERROR_INIT;
    struct json_reader reader;
    struct request_key *keys = NULL;
    uint32_t capacity = 0;
    uint32_t count = 0;
    enum json_type next;
    int more = 0;

    value_reader(value, arena, &reader);
    if (json_peek(&reader, &next, &err) < 0)
        return fail_json(failure, &err);
    if (next != JSON_BEGIN_ARRAY) {
        keys = arena_alloc(arena, sizeof *keys);
        if (!keys)
            return fail_memory(failure);
        out->keys = keys;
        out->key_count = 1;
        return read_one_key(&reader, key_type, keys, failure);
    }
    if (json_array_begin(&reader, &err) < 0)
        return fail_json(failure, &err);
    while ((more = json_array_next(&reader, &err)) > 0) {
        if (count == REQUEST_WINDOW_MAX)
            return failure_set(failure, FAILURE_OTHER,
                               "invalid max query result window, at most %d ids in one request",
                               REQUEST_WINDOW_MAX);
        if (count == capacity) {
            struct request_key *grown;

            capacity = capacity ? capacity * 4 : 16;
            grown = arena_alloc(arena, capacity * sizeof *grown);
            if (!grown)
                return fail_memory(failure);
            if (count > 0)
                memcpy(grown, keys, count * sizeof *grown);
            keys = grown;
        }
        if (read_one_key(&reader, key_type, &keys[count], failure) < 0)
            return -1;
        count++;
    }
    if (more < 0)
        return fail_json(failure, &err);
    out->keys = keys;
    out->key_count = count;
    return 0;
}

/* Answers. */

char *rest_write_failure(const struct failure *failure, size_t *bytes)
{
    struct json_writer writer;
    char *text = NULL;

    json_writer_init(&writer, 64 * 1024);
    json_begin_object(&writer);
    json_key(&writer, "code");
    json_int64(&writer, failure_row(failure->code)->milvus_code);
    json_key(&writer, "message");
    json_string(&writer, failure->message);
    json_end_object(&writer);
    if (json_writer_take(&writer, &text, bytes, NULL) < 0)
        text = NULL;
    json_writer_release(&writer);
    return text;
}

void rest_write_int64(struct json_writer *writer, int64_t value, bool as_text)
{
    if (as_text)
        json_int64_string(writer, value);
    else
        json_int64(writer, value);
}

void rest_write_vector(struct json_writer *writer, enum field_type type, enum element_type element,
                       uint32_t dim, const void *packed)
{
    if (type != FIELD_FLOAT_VECTOR) {
        json_base64(writer, packed, (size_t)element_bytes(element, dim));
        return;
    }
    if (element == ELEMENT_F32) {
        json_begin_array(writer);
        for (uint32_t i = 0; i < dim; i++) {
            float value;

            memcpy(&value, (const char *)packed + (size_t)i * sizeof value, sizeof value);
            json_float(writer, value);
        }
        json_end_array(writer);
        return;
    }
    /* A narrower store under a FloatVector: every value is a float. */
    json_begin_array(writer);
    for (uint32_t i = 0; i < dim; i++) {
        const uint8_t *bytes = packed;
        uint16_t half;
        uint32_t bits;
        float value;

        switch (element) {
        case ELEMENT_U8:
            json_int64(writer, bytes[i]);
            break;
        case ELEMENT_I8:
            json_int64(writer, (int8_t)bytes[i]);
            break;
        case ELEMENT_F16:
            memcpy(&half, bytes + 2 * (size_t)i, sizeof half);
            json_float(writer, half_to_float(half));
            break;
        default:
            memcpy(&half, bytes + 2 * (size_t)i, sizeof half);
            bits = (uint32_t)half << 16;
            memcpy(&value, &bits, sizeof value);
            json_float(writer, value);
            break;
        }
    }
    json_end_array(writer);
}

static const char *container_name(enum field_type type)
{
    switch (type) {
    case FIELD_BOOL:
        return "BoolData";
    case FIELD_INT8:
    case FIELD_INT16:
    case FIELD_INT32:
        return "IntData";
    case FIELD_INT64:
        return "LongData";
    case FIELD_FLOAT:
        return "FloatData";
    case FIELD_DOUBLE:
        return "DoubleData";
    default:
        return "StringData";
    }
}

void rest_write_array(struct json_writer *writer, enum field_type element_type, const char *text,
                      size_t bytes)
{
    size_t i = 0;

    while (i < bytes && strchr(" \t\r\n[", text[i]))
        i++;
    json_begin_object(writer);
    json_key(writer, "Data");
    json_begin_object(writer);
    json_key(writer, container_name(element_type));
    json_begin_object(writer);
    if (i < bytes && text[i] != ']') {
        json_key(writer, "data");
        json_raw(writer, text, bytes);
    }
    json_end_object(writer);
    json_end_object(writer);
    json_end_object(writer);
}

void rest_write_default(struct json_writer *writer, const struct schema_field *field)
{
    json_begin_object(writer);
    json_key(writer, "Data");
    json_begin_object(writer);
    json_key(writer, container_name(field->type));
    json_raw(writer, field->default_json, strlen(field->default_json));
    json_end_object(writer);
    json_end_object(writer);
}
