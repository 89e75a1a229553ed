/* codec_rest: Milvus REST v2 JSON <-> the structs of request.h. One thread per call; everything
 * read is in the request's arena or borrowed from the body. */
#ifndef ANND_SRC_CODEC_REST_H
#define ANND_SRC_CODEC_REST_H

#include "index/element.h"
#include "src/request.h"
#include "storage/base/json_reader.h"
#include "storage/base/json_writer.h"

/* A value kept for later: whole and valid, not yet read. */
struct rest_value {
    bool given;
    const char *text; /* the body */
    size_t begin;
    size_t end;
};

enum rest_kind { REST_STRING, REST_INT32, REST_BOOL, REST_STRINGS, REST_VALUE };

/* One key of a request body: where its value goes. Keys match in any case unless `exact`; an exact
 * match wins. null leaves the default. */
struct rest_key {
    const char *name;
    const char *label; /* the name a missing-key message uses */
    enum rest_kind kind;
    size_t offset; /* of const char *, int32_t, bool, struct name_list, struct rest_value */
    bool required;
    bool exact;
};

/* Reads a body of one object into `out` by the table. FAILURE_JSON, FAILURE_MISSING. */
int rest_read(const char *body, size_t bytes, const struct rest_key *keys, uint32_t key_count,
              struct arena *arena, void *out, struct failure *failure);

/* Keys every call has. */
struct rest_target {
    const char *database; /* NULL: the header's, then default */
    const char *collection;
};

struct rest_search {
    struct rest_target target;
    struct search_request request;
    struct rest_value data;
    struct rest_value search_params;
    struct rest_value function_score;
    int32_t group_size;
    bool strict_group_size;
};

struct rest_get {
    struct rest_target target;
    struct get_request request;
    struct rest_value id;
};

int rest_read_target(const char *body, size_t bytes, bool collection_required, struct arena *arena,
                     struct rest_target *out, struct failure *failure);
/* The body, without what depends on the collection. */
int rest_read_search(const char *body, size_t bytes, struct arena *arena, struct rest_search *out,
                     struct failure *failure);
int rest_read_get(const char *body, size_t bytes, struct arena *arena, struct rest_get *out,
                  struct failure *failure);
/* searchParams, flat or under "params". */
int rest_read_search_params(const struct rest_value *value, struct arena *arena,
                            struct search_tuning *out, struct failure *failure);
/* The query vectors, as floats, for a field of this type and dimension. */
int rest_read_queries(const struct rest_value *value, enum field_type type, uint32_t dim,
                      struct arena *arena, struct search_request *out, struct failure *failure);
/* `id`: a scalar or an array of them, for a key field of this type. */
int rest_read_keys(const struct rest_value *value, enum field_type key_type, struct arena *arena,
                   struct get_request *out, struct failure *failure);
/* functionScore with functions in it is refused. */
int rest_check_function_score(const struct rest_value *value, struct failure *failure);

/* Answers. {"code":..,"message":..}: malloc'ed, never NULL except when memory is out. */
char *rest_write_failure(const struct failure *failure, size_t *bytes);

/* A vector as the wire shows it: numbers, or base64 of its bytes. `packed` holds element_bytes. */
void rest_write_vector(struct json_writer *writer, enum field_type type, enum element_type element,
                       uint32_t dim, const void *packed);
/* The text of an array field in its container, {"Data":{"LongData":{"data":[..]}}}. */
void rest_write_array(struct json_writer *writer, enum field_type element_type, const char *text,
                      size_t bytes);
/* {"Data":{"StringData":..}} from the schema's raw JSON. */
void rest_write_default(struct json_writer *writer, const struct schema_field *field);
void rest_write_int64(struct json_writer *writer, int64_t value, bool as_text);

#endif
