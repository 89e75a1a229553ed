/* Checks are functions of their own because the contract fixes their order (1.7, 6.6), and the
 * order is the API's to follow. Messages are the contract's; clients match parts of some. */
#include "src/request.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "storage/base/json_reader.h"

static const struct failure_row failure_rows[FAILURE_COUNT] = {
    /* gRPC numbers: 1 cancelled, 4 deadline exceeded, 8 resource exhausted, 12 unimplemented, 13
     * internal, 14 unavailable; business errors travel inside an OK. */
    [FAILURE_NONE] = {0, 200, 0},
    [FAILURE_NOT_READY] = {1, 200, 0},
    [FAILURE_UNAVAILABLE] = {2, 200, 0},
    [FAILURE_MEMORY] = {3, 200, 0},
    [FAILURE_BUSY] = {4, 429, 8},
    [FAILURE_INTERNAL] = {5, 200, 0},
    [FAILURE_DISK_FULL] = {7, 200, 0},
    [FAILURE_UNIMPLEMENTED] = {10, 200, 12},
    [FAILURE_COLLECTION_NOT_FOUND] = {100, 200, 0},
    [FAILURE_COLLECTION_NOT_LOADED] = {101, 200, 0},
    [FAILURE_PARTITION_NOT_FOUND] = {200, 200, 0},
    [FAILURE_INDEX_NOT_FOUND] = {700, 200, 0},
    [FAILURE_DATABASE_NOT_FOUND] = {800, 200, 0},
    [FAILURE_IO] = {1001, 200, 0},
    [FAILURE_INVALID_PARAMETER] = {1100, 200, 0},
    [FAILURE_TOO_LARGE] = {1102, 200, 0},
    [FAILURE_ALIAS_NOT_FOUND] = {1600, 200, 0},
    [FAILURE_FIELD_NOT_FOUND] = {1700, 200, 0},
    [FAILURE_JSON] = {1801, 200, 0},
    [FAILURE_MISSING] = {1802, 200, 0},
    [FAILURE_BAD_KEY] = {1806, 200, 0},
    [FAILURE_CANCELLED] = {10000, 200, 1},
    [FAILURE_TIMEOUT] = {10001, 408, 4},
    [FAILURE_OTHER] = {65535, 200, 0},
};

/* What each code of the layers below is to a client. */
static const struct {
    enum failure_code code;
    const char *text; /* NULL: the error's own message is fit to be shown */
} error_rows[ERR_COUNT] = {
    [ERR_INVALID] = {FAILURE_INVALID_PARAMETER, NULL},
    [ERR_NOT_FOUND] = {FAILURE_INVALID_PARAMETER, NULL},
    [ERR_EXISTS] = {FAILURE_OTHER, NULL},
    [ERR_CORRUPT] =
        {FAILURE_UNAVAILABLE,
         "service unavailable: stored data failed a check, the server's log says where"},
    [ERR_UNSUPPORTED] = {FAILURE_UNIMPLEMENTED, "service unimplemented"},
    [ERR_IO] = {FAILURE_IO, "IO failed: a read failed, the server's log says where"},
    [ERR_NO_SPACE] = {FAILURE_DISK_FULL, "disk limit exceeded"},
    [ERR_PERMISSION] = {FAILURE_IO, "IO failed: the server may not read its data"},
    [ERR_BUSY] = {FAILURE_BUSY, "too many concurrent requests, queue is full"},
    [ERR_NOMEM] = {FAILURE_MEMORY, "memory limit exceeded"},
    [ERR_BUDGET] = {FAILURE_MEMORY, "memory limit exceeded"},
    [ERR_CANCELLED] = {FAILURE_CANCELLED, "context canceled"},
    [ERR_TIMEOUT] = {FAILURE_TIMEOUT, "request timeout"},
    [ERR_CONFLICT] = {FAILURE_INTERNAL, "service internal error"},
    [ERR_INTERNAL] = {FAILURE_INTERNAL, "service internal error"},
};

const struct failure_row *failure_row(enum failure_code code)
{
    return &failure_rows[code < FAILURE_COUNT ? code : FAILURE_INTERNAL];
}

int failure_set(struct failure *failure, enum failure_code code, const char *format, ...)
{
    va_list args;

    if (failure->code != FAILURE_NONE)
        return -1;
    failure->code = code;
    va_start(args, format);
    vsnprintf(failure->message, sizeof failure->message, format, args);
    va_end(args);
    return -1;
}

int failure_from_error(struct failure *failure, const struct error *err)
{
    enum error_code code = err->code > ERR_NONE && err->code < ERR_COUNT ? err->code : ERR_INTERNAL;

    if (error_rows[code].text)
        return failure_set(failure, error_rows[code].code, "%s", error_rows[code].text);
    return failure_set(failure, error_rows[code].code, "%.*s", (int)strcspn(err->message, "\n"),
                       err->message);
}

void search_request_init(struct search_request *request)
{
    memset(request, 0, sizeof *request);
    request->limit = REQUEST_LIMIT_DEFAULT;
}

void get_request_init(struct get_request *request)
{
    memset(request, 0, sizeof *request);
}

int request_check_consistency(const char *level, struct failure *failure)
{
    static const char *const levels[] = {"Strong", "Session", "Bounded", "Eventually",
                                         "Customized"};

    if (!level || !*level)
        return 0;
    for (size_t i = 0; i < sizeof levels / sizeof levels[0]; i++) {
        if (strcmp(level, levels[i]) == 0)
            return 0;
    }
    return failure_set(failure, FAILURE_INVALID_PARAMETER,
                       "consistencyLevel can only be [Strong, Session, Bounded, Eventually, "
                       "Customized], default: Bounded, err:invalid consistency level: %.100s",
                       level);
}

int request_check_window(const struct search_request *request, struct failure *failure)
{
    int64_t window = (int64_t)request->offset + request->limit;

    if (request->query_count < 1 || request->query_count > REQUEST_QUERY_MAX)
        return failure_set(failure, FAILURE_OTHER,
                           "nq [%u] is invalid, nq (number of search vector per search request) "
                           "should be in range [1, %d], but got %u",
                           request->query_count, REQUEST_QUERY_MAX, request->query_count);
    if (request->limit < 1 || request->limit > REQUEST_WINDOW_MAX)
        return failure_set(failure, FAILURE_OTHER,
                           "topk [%d] is invalid, it should be in range [1, %d], but got %d",
                           request->limit, REQUEST_WINDOW_MAX, request->limit);
    if (request->offset < 0 || request->offset > REQUEST_WINDOW_MAX)
        return failure_set(failure, FAILURE_OTHER,
                           "offset [%d] is invalid, it should be in range [1, %d], but got %d",
                           request->offset, REQUEST_WINDOW_MAX, request->offset);
    if (window > REQUEST_WINDOW_MAX)
        return failure_set(failure, FAILURE_OTHER,
                           "offset+topk [%lld] is invalid, it should be in range [1, %d], but got "
                           "%lld",
                           (long long)window, REQUEST_WINDOW_MAX, (long long)window);
    if (window * request->query_count > REQUEST_RESULTS_MAX)
        return failure_set(failure, FAILURE_OTHER,
                           "nq x (offset+topk) [%lld] is invalid, it should be at most %d: send "
                           "fewer vectors in one request",
                           (long long)(window * request->query_count), REQUEST_RESULTS_MAX);
    return 0;
}

int request_check_partitions(const struct name_list *partitions, struct failure *failure)
{
    for (uint32_t i = 0; i < partitions->count; i++) {
        if (strcmp(partitions->names[i], REQUEST_PARTITION_DEFAULT) != 0)
            return failure_set(failure, FAILURE_OTHER, "partition name %.255s not found",
                               partitions->names[i]);
    }
    return 0;
}

int request_check_supported(const struct search_request *request, struct failure *failure)
{
    const char *group =
        request->grouping_field ? request->grouping_field : request->tuning.group_by;

    if (request->filter && request->filter[strspn(request->filter, " \t\r\n")] != '\0')
        return failure_set(failure, FAILURE_UNIMPLEMENTED,
                           "service unimplemented: filter is not supported by this read-only "
                           "server");
    if (group && *group)
        return failure_set(failure, FAILURE_UNIMPLEMENTED,
                           "service unimplemented: groupingField is not supported by this "
                           "read-only server");
    if (request->tuning.range)
        return failure_set(failure, FAILURE_UNIMPLEMENTED,
                           "service unimplemented: range search (%s) is not supported by this "
                           "read-only server",
                           request->tuning.range);
    return 0;
}

int request_vector_field(const struct schema *schema, const char *anns_field, uint32_t *number,
                         struct failure *failure)
{
    const struct schema_field *field;
    char names[512];
    size_t length = 0;

    if (anns_field && *anns_field) {
        for (uint32_t i = 0; (field = schema_vector(schema, i)) != NULL; i++) {
            if (strcmp(field->name, anns_field) == 0) {
                *number = i;
                return 0;
            }
        }
        return failure_set(failure, FAILURE_JSON,
                           "can only accept json format request, error: cannot find a vector field "
                           "named: %.255s",
                           anns_field);
    }
    if (!schema_vector(schema, 0))
        return failure_set(failure, FAILURE_JSON,
                           "can only accept json format request, error: the collection has no "
                           "vector field");
    if (schema_vector(schema, 1)) {
        names[0] = '\0';
        for (uint32_t i = 0; (field = schema_vector(schema, i)) != NULL; i++) {
            int wrote =
                snprintf(names + length, sizeof names - length, "%s%s", i ? ", " : "", field->name);

            if (wrote < 0 || (size_t)wrote >= sizeof names - length)
                break;
            length += (size_t)wrote;
        }
        return failure_set(failure, FAILURE_JSON,
                           "can only accept json format request, error: search without annsField, "
                           "but already found multiple vector fields: [%s,,,]",
                           names);
    }
    *number = 0;
    return 0;
}

int request_check_metric(const struct search_tuning *tuning, enum metric metric,
                         struct failure *failure)
{
    if (!tuning->metric_type || !*tuning->metric_type ||
        strcmp(tuning->metric_type, metric_name(metric)) == 0)
        return 0;
    return failure_set(failure, FAILURE_INVALID_PARAMETER,
                       "metric type not match: invalid parameter[expected=%s][actual=%.100s]",
                       metric_name(metric), tuning->metric_type);
}

void request_search_effort(const struct search_tuning *tuning, uint32_t topk, bool calibrated,
                           struct search_effort *out)
{
    static const double levels[] = {0.90, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.995};
    uint32_t level_max = sizeof levels / sizeof levels[0];
    uint64_t list;

    *out = (struct search_effort){.given_by = "default"};
    if (tuning->recall_target > 0) {
        out->given_by = "recall_target";
        out->recall_target = tuning->recall_target;
        return;
    }
    if (tuning->search_list) {
        out->given_by = "search_list";
        list = tuning->search_list;
    } else if (tuning->ef) {
        out->given_by = "ef";
        list = tuning->ef;
    } else if (tuning->nprobe) {
        out->given_by = "nprobe";
        list = 4 * (uint64_t)tuning->nprobe;
    } else if (tuning->level) {
        out->given_by = "level";
        out->recall_target = levels[(tuning->level < level_max ? tuning->level : level_max) - 1];
        return;
    } else if (calibrated) {
        out->recall_target = REQUEST_RECALL_DEFAULT;
        return;
    } else {
        list = 2 * (uint64_t)topk > 100 ? 2 * (uint64_t)topk : 100;
    }
    if (list < topk)
        list = topk;
    out->search_list = list > SEARCH_LIST_MAX ? SEARCH_LIST_MAX : (uint32_t)list;
}

static void plan_field(const struct schema *schema, const struct schema_field *field,
                       struct output_plan *plan)
{
    plan->fields[field - schema->fields] = true;
    if (field_type_is_vector(field->type))
        plan->vectors = true;
    else if (!field->primary || field->type == FIELD_VARCHAR)
        plan->records = true;
}

static int plan_name(const struct schema *schema, const char *name, struct arena *arena,
                     struct output_plan *plan, struct failure *failure)
{
    const struct schema_field *field = schema_find(schema, name);
    const char *bracket = strchr(name, '[');
    size_t bytes = strlen(name);

    if (strcmp(name, "*") == 0) {
        for (uint32_t i = 0; i < schema->field_count; i++)
            plan_field(schema, &schema->fields[i], plan);
        plan->all_dynamic = schema->dynamic;
        plan->records |= schema->dynamic;
        return 0;
    }
    if (field) {
        plan_field(schema, field, plan);
        return 0;
    }
    if (!schema->dynamic)
        return failure_set(failure, FAILURE_OTHER, "field %.255s not exist", name);
    if (strcmp(name, "$meta") == 0) {
        plan->all_dynamic = true;
        plan->records = true;
        return 0;
    }
    if (bytes > 9 && strncmp(name, "$meta[", 6) == 0 && name[bytes - 1] == ']' &&
        (name[6] == '"' || name[6] == '\'') && name[bytes - 2] == name[6]) {
        name = arena_strndup(arena, name + 7, bytes - 9);
        if (!name)
            return failure_set(failure, FAILURE_MEMORY, "memory limit exceeded");
    } else if (bracket) {
        char base[SCHEMA_NAME_MAX + 1];
        size_t base_bytes = (size_t)(bracket - name);

        if (base_bytes < sizeof base) {
            memcpy(base, name, base_bytes);
            base[base_bytes] = '\0';
            if (schema_find(schema, base))
                return failure_set(failure, FAILURE_OTHER,
                                   "not support getting subkeys of json field yet: field %.255s",
                                   name);
        }
    }
    plan->dynamic[plan->dynamic_count++] = name;
    plan->records = true;
    return 0;
}

int output_plan_make(const struct schema *schema, const struct name_list *names, bool all,
                     struct arena *arena, struct output_plan *plan, struct failure *failure)
{
    const struct schema_field *key = schema_key(schema);

    memset(plan, 0, sizeof *plan);
    plan->dynamic = arena_alloc(arena, ((size_t)names->count + 1) * sizeof *plan->dynamic);
    if (!plan->dynamic)
        return failure_set(failure, FAILURE_MEMORY, "memory limit exceeded");
    if (key)
        plan_field(schema, key, plan);
    if (all && !names->given)
        return plan_name(schema, "*", arena, plan, failure);
    for (uint32_t i = 0; i < names->count; i++) {
        const char *name = names->names[i] + strspn(names->names[i], " \t\r\n");
        size_t bytes = strlen(name);

        while (bytes > 0 && strchr(" \t\r\n", name[bytes - 1]))
            bytes--;
        if (name[bytes] != '\0')
            name = arena_strndup(arena, name, bytes);
        if (!name)
            return failure_set(failure, FAILURE_MEMORY, "memory limit exceeded");
        if (plan_name(schema, name, arena, plan, failure) < 0)
            return -1;
    }
    return 0;
}

const char *request_field_type(const struct schema_field *field)
{
    const char *name = field_type_name(field->type);

    return name ? name : "None";
}

bool request_parse_bool(const char *text, bool otherwise)
{
    static const char *const yes[] = {"1", "t", "T", "TRUE", "true", "True"};
    static const char *const no[] = {"0", "f", "F", "FALSE", "false", "False"};

    for (size_t i = 0; text && i < sizeof yes / sizeof yes[0]; i++) {
        if (strcmp(text, yes[i]) == 0)
            return true;
        if (strcmp(text, no[i]) == 0)
            return false;
    }
    return otherwise;
}
