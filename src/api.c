/* Every path of the contract has its line here: a handler, or a refusal that says so. What is not
 * in the table is a 404. */
#include "src/api.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "src/log.h"

#define V2 "/v2/vectordb/"

static void api_refuse(struct http_exchange *exchange)
{
    struct failure failure = {0};

    failure_set(&failure, FAILURE_UNIMPLEMENTED,
                "service unimplemented: %s is not supported by this read-only server",
                http_path(exchange));
    api_fail(exchange, &failure);
}

static void api_resource_groups_list(struct http_exchange *exchange)
{
    http_reply_static(exchange, 200, HTTP_JSON,
                      "{\"code\":0,\"data\":[\"__default_resource_group\"]}");
}

static void api_segments_describe(struct http_exchange *exchange)
{
    http_reply_static(exchange, 200, HTTP_JSON, "{\"code\":0,\"data\":{\"segmentInfos\":[]}}");
}

static void api_quotacenter_describe(struct http_exchange *exchange)
{
    http_reply_static(exchange, 200, HTTP_JSON, "{\"code\":0,\"data\":\"{}\"}");
}

#define REFUSED(path)                                                                              \
    {                                                                                              \
        HTTP_POST, V2 path, false, api_refuse                                                      \
    }

const struct http_route api_routes[] = {
    /* The busiest first: the table is searched from the top. */
    {HTTP_POST, V2 "entities/search", false, api_entities_search},
    {HTTP_POST, V2 "entities/get", false, api_entities_get},
    {HTTP_POST, V2 "collections/list", false, api_collections_list},
    {HTTP_POST, V2 "collections/has", false, api_collections_has},
    {HTTP_POST, V2 "collections/describe", false, api_collections_describe},
    {HTTP_POST, V2 "collections/get_stats", false, api_collections_get_stats},
    {HTTP_POST, V2 "collections/get_load_state", false, api_collections_get_load_state},
    {HTTP_POST, V2 "collections/load", false, api_collections_load},
    {HTTP_POST, V2 "collections/flush", false, api_collections_load},
    {HTTP_POST, V2 "indexes/list", false, api_indexes_list},
    {HTTP_POST, V2 "indexes/describe", false, api_indexes_describe},
    {HTTP_POST, V2 "partitions/list", false, api_partitions_list},
    {HTTP_POST, V2 "partitions/has", false, api_partitions_has},
    {HTTP_POST, V2 "aliases/list", false, api_aliases_list},
    {HTTP_POST, V2 "aliases/describe", false, api_aliases_describe},
    {HTTP_POST, V2 "databases/list", false, api_databases_list},
    {HTTP_POST, V2 "databases/describe", false, api_databases_describe},
    {HTTP_POST, V2 "resource_groups/list", false, api_resource_groups_list},
    {HTTP_POST, V2 "segments/describe", false, api_segments_describe},
    {HTTP_POST, V2 "quotacenter/describe", false, api_quotacenter_describe},
    {HTTP_GET, "/healthz", true, api_healthz},
    {HTTP_GET, "/api/v1/health", true, api_health},
    {HTTP_GET, "/metrics", true, api_metrics},

    REFUSED("collections/create"),
    REFUSED("collections/drop"),
    REFUSED("collections/rename"),
    REFUSED("collections/release"),
    REFUSED("collections/refresh_load"),
    REFUSED("collections/compact"),
    REFUSED("collections/get_compaction_state"),
    REFUSED("collections/alter_properties"),
    REFUSED("collections/drop_properties"),
    REFUSED("collections/truncate"),
    REFUSED("collections/fields/add"),
    REFUSED("collections/fields/alter_properties"),
    REFUSED("entities/insert"),
    REFUSED("entities/upsert"),
    REFUSED("entities/delete"),
    REFUSED("entities/query"),
    REFUSED("entities/hybrid_search"),
    REFUSED("entities/advanced_search"),
    REFUSED("indexes/create"),
    REFUSED("indexes/drop"),
    REFUSED("indexes/alter_properties"),
    REFUSED("indexes/drop_properties"),
    REFUSED("partitions/get_stats"),
    REFUSED("partitions/create"),
    REFUSED("partitions/drop"),
    REFUSED("partitions/load"),
    REFUSED("partitions/release"),
    REFUSED("aliases/create"),
    REFUSED("aliases/alter"),
    REFUSED("aliases/drop"),
    REFUSED("databases/create"),
    REFUSED("databases/drop"),
    REFUSED("databases/alter"),
    REFUSED("databases/alter_properties"),
    REFUSED("databases/drop_properties"),
    REFUSED("users/list"),
    REFUSED("users/describe"),
    REFUSED("users/create"),
    REFUSED("users/update_password"),
    REFUSED("users/drop"),
    REFUSED("users/grant_role"),
    REFUSED("users/revoke_role"),
    REFUSED("roles/list"),
    REFUSED("roles/describe"),
    REFUSED("roles/create"),
    REFUSED("roles/drop"),
    REFUSED("roles/grant_privilege"),
    REFUSED("roles/revoke_privilege"),
    REFUSED("roles/grant_privilege_v2"),
    REFUSED("roles/revoke_privilege_v2"),
    REFUSED("privilege_groups/list"),
    REFUSED("privilege_groups/create"),
    REFUSED("privilege_groups/drop"),
    REFUSED("privilege_groups/add_privileges_to_group"),
    REFUSED("privilege_groups/remove_privileges_from_group"),
    REFUSED("jobs/import/create"),
    REFUSED("jobs/import/list"),
    REFUSED("jobs/import/get_progress"),
    REFUSED("jobs/import/describe"),
    REFUSED("resource_groups/describe"),
    REFUSED("resource_groups/create"),
    REFUSED("resource_groups/drop"),
    REFUSED("resource_groups/alter"),
    REFUSED("resource_groups/transfer_replica"),
};

const uint32_t api_route_count = sizeof api_routes / sizeof api_routes[0];

struct service *api_service(struct http_exchange *exchange)
{
    return http_context(exchange);
}

void api_fail(struct http_exchange *exchange, const struct failure *failure)
{
    const struct failure_row *row = failure_row(failure->code);
    size_t bytes = 0;
    char *text = rest_write_failure(failure, &bytes);

    if (failure->code == FAILURE_BUSY)
        http_reply_header(exchange, "Retry-After", "1");
    if (text)
        http_reply(exchange, row->http_status, HTTP_JSON, text, bytes);
    else
        http_reply_static(exchange, 200, HTTP_JSON,
                          "{\"code\":3,\"message\":\"memory limit exceeded\"}");
}

void api_reply(struct http_exchange *exchange, struct json_writer *writer)
{
    struct failure failure = {0};
    struct error err = ERROR_INIT;
    char *text = NULL;
    size_t bytes = 0;

    if (json_writer_take(writer, &text, &bytes, &err) == 0) {
        json_writer_release(writer);
        http_reply(exchange, 200, HTTP_JSON, text, bytes);
        return;
    }
    json_writer_release(writer);
    if (err.code == ERR_BUDGET)
        failure_set(&failure, FAILURE_TOO_LARGE,
                    "parameter too large: the answer is limited to %zu bytes, lower limit or ask "
                    "for fewer outputFields",
                    REQUEST_ANSWER_BYTES_MAX);
    else
        api_failure_from_error(exchange, &err, &failure);
    api_fail(exchange, &failure);
}

void api_reply_done(struct http_exchange *exchange)
{
    http_reply_static(exchange, 200, HTTP_JSON, "{\"code\":0,\"data\":{}}");
}

void api_begin(struct json_writer *writer)
{
    json_writer_init(writer, REQUEST_ANSWER_BYTES_MAX);
    json_begin_object(writer);
    json_key(writer, "code");
    json_int64(writer, 0);
    json_key(writer, "data");
}

void api_end(struct http_exchange *exchange, struct json_writer *writer)
{
    json_end_object(writer);
    api_reply(exchange, writer);
}

void api_failure_from_error(struct http_exchange *exchange, const struct error *err,
                            struct failure *failure)
{
    static struct log_gate gate;

    failure_from_error(failure, err);
    if (err->code == ERR_CORRUPT || err->code == ERR_IO || err->code == ERR_INTERNAL ||
        err->code == ERR_NOMEM || err->code == ERR_PERMISSION)
        log_gated(&gate, 20, LOG_LEVEL_ERROR, "%s: %.*s", http_path(exchange),
                  (int)strcspn(err->message, "\n"), err->message);
}

int api_database(struct http_exchange *exchange, const char *named, const char **out,
                 struct failure *failure)
{
    *out = named;
    if (!*out || !**out)
        *out = http_header(exchange, "DB-Name");
    if (!*out || !**out)
        *out = REQUEST_DATABASE_DEFAULT;
    if (service_has_database(api_service(exchange), *out))
        return 0;
    return failure_set(failure, FAILURE_DATABASE_NOT_FOUND, "database not found[database=%.255s]",
                       *out);
}

int api_collection(struct http_exchange *exchange, const struct rest_target *target,
                   struct collection **out, struct failure *failure)
{
    struct collection *collection;
    const char *database;

    if (api_database(exchange, target->database, &database, failure) < 0)
        return -1;
    collection = service_find(api_service(exchange), database, target->collection);
    if (!collection)
        return failure_set(failure, FAILURE_COLLECTION_NOT_FOUND,
                           "can't find collection[database=%.255s][collection=%.255s]", database,
                           target->collection);
    if (!collection->index)
        return failure_set(failure, FAILURE_UNAVAILABLE,
                           "service unavailable: collection %.255s is damaged and was not opened, "
                           "the server's log says why",
                           collection->name);
    *out = collection;
    return 0;
}

bool api_int64_as_text(struct http_exchange *exchange)
{
    return !request_parse_bool(http_header(exchange, "Accept-Type-Allow-Int64"), true);
}
