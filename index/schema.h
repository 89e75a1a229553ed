/* Schema: the fields of a collection, as the wire contract's schema object describes them.
 *
 * The same object is the `--schema` file of `annd build`, the `schema.json` of an index directory
 * and the source of `describe`. Plain data; immutable once parsed. */
#ifndef ANND_INDEX_SCHEMA_H
#define ANND_INDEX_SCHEMA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "storage/base/error.h"

#define SCHEMA_FIELD_MAX 64u
#define SCHEMA_NAME_MAX 255u
#define SCHEMA_VARCHAR_MAX 65535u
#define SCHEMA_BYTES_MAX 65536u /* of the JSON text */

enum field_type { /* the contract's numbers, section 16.1; also on disk */
                  FIELD_NONE = 0,
                  FIELD_BOOL = 1,
                  FIELD_INT8 = 2,
                  FIELD_INT16 = 3,
                  FIELD_INT32 = 4,
                  FIELD_INT64 = 5,
                  FIELD_FLOAT = 10,
                  FIELD_DOUBLE = 11,
                  FIELD_VARCHAR = 21,
                  FIELD_ARRAY = 22,
                  FIELD_JSON = 23,
                  FIELD_BINARY_VECTOR = 100,
                  FIELD_FLOAT_VECTOR = 101,
                  FIELD_FLOAT16_VECTOR = 102,
                  FIELD_BFLOAT16_VECTOR = 103,
                  FIELD_SPARSE_VECTOR = 104,
                  FIELD_INT8_VECTOR = 105
};

struct schema_field {
    char name[SCHEMA_NAME_MAX + 1];
    uint32_t id; /* from 100 in order of declaration; in stored records */
    enum field_type type;
    enum field_type element_type; /* FIELD_ARRAY only */
    uint32_t dim;                 /* vectors */
    uint32_t max_length;          /* VarChar, and Array of it; 0: none given */
    uint32_t max_capacity;        /* Array */
    bool primary;
    bool nullable;
    bool partition_key;
    bool clustering_key;
    bool auto_id;
    char *default_json; /* raw JSON of defaultValue, or NULL */
};

struct schema {
    struct schema_field *fields;
    uint32_t field_count;
    bool dynamic; /* keys that are no field are kept per row */
    char *description;
};

bool field_type_is_vector(enum field_type type);
/* "Int64", ... exactly as the contract spells them; NULL for unknown numbers. */
const char *field_type_name(enum field_type type);
int field_type_parse(const char *name, enum field_type *out, struct error *err);

/* {"autoID":..,"enableDynamicField":..,"fields":[{"fieldName":..,"dataType":..,...}]}: checks of
 * contract 5.1.5 that apply to a schema alone. ERR_INVALID names `where`, the field and the
 * finding. */
int schema_parse(const char *text, size_t bytes, const char *where, struct schema **out,
                 struct error *err);
/* id, vector and dynamic fields: what `annd build` takes without --schema. key_type is FIELD_INT64
 * or FIELD_VARCHAR. */
int schema_default(const char *key_field, enum field_type key_type, uint32_t key_length_max,
                   const char *vector_field, enum field_type vector_type, uint32_t dim,
                   struct schema **out, struct error *err);
/* Canonical JSON text, malloc'ed, NUL-terminated; parses back to an equal schema. */
int schema_print(const struct schema *schema, char **out, size_t *bytes, struct error *err);
void schema_free(struct schema *schema);

/* NULL when there is none. */
const struct schema_field *schema_find(const struct schema *schema, const char *name);
const struct schema_field *schema_find_id(const struct schema *schema, uint32_t id);
const struct schema_field *schema_key(const struct schema *schema);
/* The n-th vector field, NULL beyond the last. */
const struct schema_field *schema_vector(const struct schema *schema, uint32_t n);

#endif
