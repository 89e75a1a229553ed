/* Everything here is answered from memory, at once. */
#include <stdlib.h>
#include <string.h>

#include "src/api.h"
#include "storage/base/digest.h"

/* The body's target, its database found out and checked. Ends the exchange on failure. */
static int read_target(struct http_exchange *exchange, bool collection_required,
                       struct rest_target *target)
{
    struct failure failure = {0};
    size_t bytes;
    const char *body = http_body(exchange, &bytes);

    if (rest_read_target(body, bytes, collection_required, http_arena(exchange), target,
                         &failure) == 0 &&
        api_database(exchange, target->database, &target->database, &failure) == 0)
        return 0;
    api_fail(exchange, &failure);
    return -1;
}

/* The open collection; ends the exchange on failure. */
static struct collection *read_collection(struct http_exchange *exchange)
{
    struct failure failure = {0};
    struct collection *collection;
    struct rest_target target;

    if (read_target(exchange, true, &target) < 0)
        return NULL;
    if (api_collection(exchange, &target, &collection, &failure) == 0)
        return collection;
    api_fail(exchange, &failure);
    return NULL;
}

void api_collections_list(struct http_exchange *exchange)
{
    const struct service *service = api_service(exchange);
    struct rest_target target;
    struct json_writer writer;

    if (read_target(exchange, false, &target) < 0)
        return;
    api_begin(&writer);
    json_begin_array(&writer);
    for (uint32_t i = 0; i < service->collection_count; i++) {
        if (strcmp(service->collections[i].database, target.database) == 0)
            json_string(&writer, service->collections[i].name);
    }
    json_end_array(&writer);
    api_end(exchange, &writer);
}

void api_collections_has(struct http_exchange *exchange)
{
    struct rest_target target;

    if (read_target(exchange, true, &target) < 0)
        return;
    http_reply_static(exchange, 200, HTTP_JSON,
                      service_find(api_service(exchange), target.database, target.collection)
                          ? "{\"code\":0,\"data\":{\"has\":true}}"
                          : "{\"code\":0,\"data\":{\"has\":false}}");
}

static void write_param(struct json_writer *writer, const char *key, uint32_t value)
{
    json_begin_object(writer);
    json_key(writer, "key");
    json_string(writer, key);
    json_key(writer, "value");
    json_int64_string(writer, value);
    json_end_object(writer);
}

static void write_flag(struct json_writer *writer, const char *key, bool value)
{
    json_key(writer, key);
    json_bool(writer, value);
}

static void write_field(struct json_writer *writer, const struct schema_field *field)
{
    bool of_text = field->type == FIELD_VARCHAR ||
                   (field->type == FIELD_ARRAY && field->element_type == FIELD_VARCHAR);

    json_begin_object(writer);
    json_key(writer, "name");
    json_string(writer, field->name);
    json_key(writer, "id");
    json_int64(writer, field->id);
    json_key(writer, "type");
    json_string(writer, request_field_type(field));
    if (field->type == FIELD_ARRAY) {
        json_key(writer, "elementType");
        json_string(writer, field_type_name(field->element_type));
    }
    if (field->dim > 0 || field->max_capacity > 0 || (of_text && field->max_length > 0)) {
        json_key(writer, "params");
        json_begin_array(writer);
        if (field->dim > 0)
            write_param(writer, "dim", field->dim);
        if (of_text && field->max_length > 0)
            write_param(writer, "max_length", field->max_length);
        if (field->max_capacity > 0)
            write_param(writer, "max_capacity", field->max_capacity);
        json_end_array(writer);
    }
    write_flag(writer, "primaryKey", field->primary);
    write_flag(writer, "partitionKey", field->partition_key);
    write_flag(writer, "clusteringKey", field->clustering_key);
    write_flag(writer, "autoId", field->auto_id);
    write_flag(writer, "nullable", field->nullable);
    if (field->default_json && strcmp(field->default_json, "null") != 0) {
        json_key(writer, "defaultValue");
        rest_write_default(writer, field);
    }
    json_key(writer, "description");
    json_string(writer, "");
    json_end_object(writer);
}

/* The open index of a vector field, in the first segment that has one. */
static const struct disk_index *vector_index(const struct index_directory *index, uint32_t number)
{
    for (uint32_t i = 0; i < index->segment_count; i++) {
        if (number < index->segments[i].field_count && index->segments[i].fields[number])
            return index->segments[i].fields[number];
    }
    return NULL;
}

static const char *index_metric(const struct index_directory *index, uint32_t number)
{
    const struct disk_index *vectors = vector_index(index, number);

    return vectors ? metric_name(vectors->metric) : "COSINE";
}

void api_collections_describe(struct http_exchange *exchange)
{
    struct collection *collection = read_collection(exchange);
    const struct schema_field *field;
    const struct schema_field *key;
    const struct schema *schema;
    struct json_writer writer;

    if (!collection)
        return;
    schema = collection->index->schema;
    key = schema_key(schema);
    api_begin(&writer);
    json_begin_object(&writer);
    json_key(&writer, "collectionName");
    json_string(&writer, collection->name);
    json_key(&writer, "collectionID");
    json_uint64(&writer, collection->id);
    json_key(&writer, "description");
    json_string(&writer, *collection->description ? collection->description
                         : schema->description    ? schema->description
                                                  : "");
    write_flag(&writer, "autoId", key && key->auto_id);
    write_flag(&writer, "enableDynamicField", schema->dynamic);
    json_key(&writer, "shardsNum");
    json_int64(&writer, 1);
    json_key(&writer, "partitionsNum");
    json_int64(&writer, 1);
    json_key(&writer, "consistencyLevel");
    json_string(&writer, "Bounded");
    json_key(&writer, "load");
    json_string(&writer, "LoadStateLoaded");
    json_key(&writer, "aliases");
    json_begin_array(&writer);
    for (uint32_t i = 0; i < collection->alias_count; i++)
        json_string(&writer, collection->aliases[i]);
    json_end_array(&writer);
    json_key(&writer, "fields");
    json_begin_array(&writer);
    for (uint32_t i = 0; i < schema->field_count; i++)
        write_field(&writer, &schema->fields[i]);
    json_end_array(&writer);
    json_key(&writer, "functions");
    json_begin_array(&writer);
    json_end_array(&writer);
    json_key(&writer, "indexes");
    json_begin_array(&writer);
    for (uint32_t i = 0; (field = schema_vector(schema, i)) != NULL; i++) {
        json_begin_object(&writer);
        json_key(&writer, "indexName");
        json_string(&writer, field->name);
        json_key(&writer, "fieldName");
        json_string(&writer, field->name);
        json_key(&writer, "metricType");
        json_string(&writer, index_metric(collection->index, i));
        json_end_object(&writer);
    }
    json_end_array(&writer);
    json_key(&writer, "properties");
    json_begin_array(&writer);
    json_end_array(&writer);
    json_end_object(&writer);
    json_key(&writer, "message");
    json_string(&writer, "");
    api_end(exchange, &writer);
}

void api_collections_get_stats(struct http_exchange *exchange)
{
    struct collection *collection = read_collection(exchange);
    struct json_writer writer;

    if (!collection)
        return;
    api_begin(&writer);
    json_begin_object(&writer);
    json_key(&writer, "rowCount");
    json_uint64(&writer, collection->index->row_count);
    json_end_object(&writer);
    api_end(exchange, &writer);
}

void api_collections_get_load_state(struct http_exchange *exchange)
{
    const struct collection *collection;
    struct failure failure = {0};
    struct rest_target target;

    if (read_target(exchange, true, &target) < 0)
        return;
    collection = service_find(api_service(exchange), target.database, target.collection);
    if (!collection) {
        failure_set(&failure, FAILURE_COLLECTION_NOT_FOUND,
                    "collection not found[collection=%.255s]", target.collection);
        api_fail(exchange, &failure);
        return;
    }
    http_reply_static(exchange, 200, HTTP_JSON,
                      collection->index
                          ? "{\"code\":0,\"data\":{\"loadState\":\"LoadStateLoaded\","
                            "\"loadProgress\":100},\"message\":\"\"}"
                          : "{\"code\":0,\"data\":{\"loadState\":\"LoadStateNotLoad\"}}");
}

/* What is served is loaded and durable: loading and flushing it succeed by doing nothing. */
void api_collections_load(struct http_exchange *exchange)
{
    if (read_collection(exchange))
        api_reply_done(exchange);
}

void api_indexes_list(struct http_exchange *exchange)
{
    struct collection *collection = read_collection(exchange);
    const struct schema_field *field;
    struct json_writer writer;

    if (!collection)
        return;
    api_begin(&writer);
    json_begin_array(&writer);
    for (uint32_t i = 0; (field = schema_vector(collection->index->schema, i)) != NULL; i++)
        json_string(&writer, field->name);
    json_end_array(&writer);
    api_end(exchange, &writer);
}

struct named_target {
    struct rest_target target;
    const char *name;
};

/* A target and one more required name. Ends the exchange on failure. */
static struct collection *read_named(struct http_exchange *exchange, const char *key,
                                     const char *label, const char **name)
{
    const struct rest_key keys[] = {
        {"dbName", "DbName", REST_STRING, offsetof(struct named_target, target.database), false,
         false},
        {"collectionName", "CollectionName", REST_STRING,
         offsetof(struct named_target, target.collection), true, false},
        {key, label, REST_STRING, offsetof(struct named_target, name), true, false},
    };
    struct collection *collection;
    struct failure failure = {0};
    struct named_target named;
    size_t bytes;
    const char *body = http_body(exchange, &bytes);

    memset(&named, 0, sizeof named);
    if (rest_read(body, bytes, keys, 3, http_arena(exchange), &named, &failure) < 0 ||
        api_collection(exchange, &named.target, &collection, &failure) < 0) {
        api_fail(exchange, &failure);
        return NULL;
    }
    *name = named.name;
    return collection;
}

void api_indexes_describe(struct http_exchange *exchange)
{
    const char *name;
    struct collection *collection = read_named(exchange, "indexName", "IndexName", &name);
    const struct schema_field *field = NULL;
    struct failure failure = {0};
    struct json_writer writer;
    uint32_t i;

    if (!collection)
        return;
    for (i = 0; (field = schema_vector(collection->index->schema, i)) != NULL; i++) {
        if (strcmp(field->name, name) == 0)
            break;
    }
    if (!field) {
        failure_set(&failure, FAILURE_INDEX_NOT_FOUND, "index not found[indexName=%.255s]", name);
        api_fail(exchange, &failure);
        return;
    }
    api_begin(&writer);
    json_begin_array(&writer);
    json_begin_object(&writer);
    json_key(&writer, "indexName");
    json_string(&writer, field->name);
    json_key(&writer, "fieldName");
    json_string(&writer, field->name);
    json_key(&writer, "indexType");
    json_string(&writer, "DISKANN");
    json_key(&writer, "metricType");
    json_string(&writer, index_metric(collection->index, i));
    json_key(&writer, "totalRows");
    json_uint64(&writer, collection->index->row_count);
    json_key(&writer, "indexedRows");
    json_uint64(&writer, collection->index->row_count);
    json_key(&writer, "pendingRows");
    json_int64(&writer, 0);
    json_key(&writer, "indexState");
    json_string(&writer, "Finished");
    json_key(&writer, "failReason");
    json_string(&writer, "");
    json_end_object(&writer);
    json_end_array(&writer);
    api_end(exchange, &writer);
}

void api_partitions_list(struct http_exchange *exchange)
{
    if (read_collection(exchange))
        http_reply_static(exchange, 200, HTTP_JSON, "{\"code\":0,\"data\":[\"_default\"]}");
}

void api_partitions_has(struct http_exchange *exchange)
{
    const char *name;

    if (!read_named(exchange, "partitionName", "PartitionName", &name))
        return;
    http_reply_static(exchange, 200, HTTP_JSON,
                      strcmp(name, REQUEST_PARTITION_DEFAULT) == 0
                          ? "{\"code\":0,\"data\":{\"has\":true}}"
                          : "{\"code\":0,\"data\":{\"has\":false}}");
}

/* Of one collection, or of all in the database. */
void api_aliases_list(struct http_exchange *exchange)
{
    const struct service *service = api_service(exchange);
    struct failure failure = {0};
    struct collection *only = NULL;
    struct rest_target target;
    struct json_writer writer;

    if (read_target(exchange, false, &target) < 0)
        return;
    if (target.collection && *target.collection) {
        only = service_find(service, target.database, target.collection);
        if (!only) {
            failure_set(&failure, FAILURE_COLLECTION_NOT_FOUND,
                        "collection not found[database=%.255s][collection=%.255s]", target.database,
                        target.collection);
            api_fail(exchange, &failure);
            return;
        }
    }
    api_begin(&writer);
    json_begin_array(&writer);
    for (uint32_t i = 0; i < service->collection_count; i++) {
        const struct collection *collection = &service->collections[i];

        if ((only && only != collection) || strcmp(collection->database, target.database) != 0)
            continue;
        for (uint32_t a = 0; a < collection->alias_count; a++)
            json_string(&writer, collection->aliases[a]);
    }
    json_end_array(&writer);
    api_end(exchange, &writer);
}

void api_aliases_describe(struct http_exchange *exchange)
{
    static const struct rest_key keys[] = {
        {"dbName", "DbName", REST_STRING, offsetof(struct named_target, target.database), false,
         false},
        {"aliasName", "AliasName", REST_STRING, offsetof(struct named_target, name), true, false},
    };
    const struct collection *collection = NULL;
    struct failure failure = {0};
    struct named_target named;
    struct json_writer writer;
    const char *database = NULL;
    size_t bytes;
    const char *body = http_body(exchange, &bytes);

    memset(&named, 0, sizeof named);
    if (rest_read(body, bytes, keys, 2, http_arena(exchange), &named, &failure) < 0 ||
        api_database(exchange, named.target.database, &database, &failure) < 0) {
        api_fail(exchange, &failure);
        return;
    }
    collection = service_find(api_service(exchange), database, named.name);
    if (!collection || strcmp(collection->name, named.name) == 0) {
        failure_set(&failure, FAILURE_ALIAS_NOT_FOUND,
                    "alias not found[database=%.255s][alias=%.255s]", database, named.name);
        api_fail(exchange, &failure);
        return;
    }
    api_begin(&writer);
    json_begin_object(&writer);
    json_key(&writer, "dbName");
    json_string(&writer, database);
    json_key(&writer, "collectionName");
    json_string(&writer, collection->name);
    json_key(&writer, "aliasName");
    json_string(&writer, named.name);
    json_end_object(&writer);
    api_end(exchange, &writer);
}

void api_databases_list(struct http_exchange *exchange)
{
    const struct service *service = api_service(exchange);
    struct failure failure = {0};
    struct rest_target target;
    struct json_writer writer;
    size_t bytes;
    const char *body = http_body(exchange, &bytes);

    /* dbName is ignored here. */
    if (rest_read_target(body, bytes, false, http_arena(exchange), &target, &failure) < 0) {
        api_fail(exchange, &failure);
        return;
    }
    api_begin(&writer);
    json_begin_array(&writer);
    json_string(&writer, REQUEST_DATABASE_DEFAULT);
    /* Names are sorted by database. */
    for (uint32_t i = 0; i < service->name_count; i++) {
        const char *database = service->names[i].database;

        if (strcmp(database, REQUEST_DATABASE_DEFAULT) != 0 &&
            (i == 0 || strcmp(database, service->names[i - 1].database) != 0))
            json_string(&writer, database);
    }
    json_end_array(&writer);
    api_end(exchange, &writer);
}

void api_databases_describe(struct http_exchange *exchange)
{
    static const struct rest_key keys[] = {
        {"dbName", "DbName", REST_STRING, offsetof(struct rest_target, database), true, false},
    };
    struct failure failure = {0};
    struct rest_target target = {0};
    struct json_writer writer;
    const char *database;
    size_t bytes;
    const char *body = http_body(exchange, &bytes);

    if (rest_read(body, bytes, keys, 1, http_arena(exchange), &target, &failure) < 0 ||
        api_database(exchange, target.database, &database, &failure) < 0) {
        api_fail(exchange, &failure);
        return;
    }
    api_begin(&writer);
    json_begin_object(&writer);
    json_key(&writer, "dbName");
    json_string(&writer, database);
    json_key(&writer, "dbID");
    /* Databases are names here; the number only has to stay the same. */
    json_uint64(&writer, strcmp(database, REQUEST_DATABASE_DEFAULT) == 0
                             ? 1
                             : 2 + key_hash(database, strlen(database)) % (UINT64_C(1) << 52));
    json_key(&writer, "properties");
    json_begin_array(&writer);
    json_end_array(&writer);
    json_end_object(&writer);
    api_end(exchange, &writer);
}
