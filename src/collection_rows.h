/* collection_rows: the stored values of rows, fetched in bursts, and rows found by key. */
#ifndef ANND_SRC_COLLECTION_ROWS_H
#define ANND_SRC_COLLECTION_ROWS_H

#include "index/index_directory.h"
#include "src/collection_search.h"
#include "src/request.h"
#include "storage/reader.h"

/* What was fetched for rows[0..count): records[i], and vectors[f] + i * element_bytes for vector
 * field f. Zeroed to begin with. */
struct row_set {
    struct rows_record *records; /* NULL: not asked for; .data NULL: the segment has none */
    uint8_t *vectors[INDEX_VECTOR_FIELD_MAX]; /* NULL: not asked for */
    uint64_t vector_bytes[INDEX_VECTOR_FIELD_MAX];
    uint8_t *storage[INDEX_SEGMENT_MAX]; /* of records, by segment */
    uint32_t storage_count;
};

/* Fetches what the plan needs. The reader is the calling thread's and idle. */
int collection_rows_fetch(const struct index_directory *index, struct reader *reader,
                          const struct result_row *rows, uint32_t count,
                          const struct output_plan *plan, struct row_set *out, struct error *err);
void row_set_release(struct row_set *set);

/* The key of a fetched row as text, for a VarChar key field: borrowed from the set. */
int collection_row_key(const struct schema *schema, const struct row_set *set, uint32_t i,
                       const char **text, uint32_t *bytes, struct error *err);

/* Rows of these keys in ascending order of key, in the arena; unknown keys are left out,
 * duplicates collapse. Sorts `keys`. */
int collection_rows_find(const struct index_directory *index, struct reader *reader,
                         struct request_key *keys, uint32_t key_count, struct arena *arena,
                         struct result_row **out, uint32_t *out_count, struct error *err);

#endif
