/* Rows of an answer stand in the order of the answer, reads want to be grouped by segment:
 * positions of one segment are gathered, fetched in one burst, and scattered back. Almost always
 * there is one segment, and then gathering is a copy. */
#include "src/collection_rows.h"

#include <stdlib.h>
#include <string.h>

#include "storage/base/digest.h"

#define SAME_HASH_MAX 4u /* text keys that share a hash: one is usual, two would be news */

struct gathered {
    uint32_t *positions;
    uint32_t *places; /* of each position in the answer */
    struct rows_record *records;
    uint8_t *packed;
};

static void gathered_release(struct gathered *g)
{
    free(g->positions);
    free(g->places);
    free(g->records);
    free(g->packed);
}

static uint32_t gather(struct gathered *g, const struct result_row *rows, uint32_t count,
                       uint32_t segment)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i < count; i++) {
        if (rows[i].segment != segment)
            continue;
        g->positions[n] = rows[i].position;
        g->places[n++] = i;
    }
    return n;
}

static int fetch_records(const struct index_segment *segment, struct reader *reader,
                         struct gathered *g, uint32_t n, struct row_set *out, struct error *err)
{
    uint8_t *storage = NULL;

    if (!segment->rows)
        return 0;
    if (rows_fetch(segment->rows, reader, g->positions, n, g->records, &storage, err) < 0)
        return -1;
    out->storage[out->storage_count++] = storage;
    for (uint32_t i = 0; i < n; i++)
        out->records[g->places[i]] = g->records[i];
    return 0;
}

static int fetch_vectors(const struct disk_index *index, struct reader *reader, struct gathered *g,
                         uint32_t n, uint8_t *out, uint64_t bytes, struct error *err)
{
    uint8_t *grown = realloc(g->packed, (size_t)n * bytes);

    if (!grown)
        return error_set(err, ERR_NOMEM, "no memory for %u vectors", n);
    g->packed = grown;
    if (disk_index_vectors(index, reader, g->positions, n, g->packed, err) < 0)
        return -1;
    for (uint32_t i = 0; i < n; i++)
        memcpy(out + g->places[i] * bytes, g->packed + i * bytes, bytes);
    return 0;
}

int collection_rows_fetch(const struct index_directory *index, struct reader *reader,
                          const struct result_row *rows, uint32_t count,
                          const struct output_plan *plan, struct row_set *out, struct error *err)
{
    struct gathered g = {0};
    int rc = -1;

    memset(out, 0, sizeof *out);
    if (count == 0 || (!plan->records && !plan->vectors))
        return 0;
    g.positions = malloc(count * sizeof *g.positions);
    g.places = malloc(count * sizeof *g.places);
    g.records = malloc(count * sizeof *g.records);
    out->records = plan->records ? calloc(count, sizeof *out->records) : NULL;
    if (!g.positions || !g.places || !g.records || (plan->records && !out->records))
        goto nomem;
    for (uint32_t s = 0; s < index->segment_count; s++) {
        const struct index_segment *segment = &index->segments[s];
        const struct schema_field *field;
        uint32_t n = gather(&g, rows, count, s);

        if (n == 0)
            continue;
        if (plan->records && fetch_records(segment, reader, &g, n, out, err) < 0)
            goto done;
        for (uint32_t f = 0; (field = schema_vector(index->schema, f)) != NULL; f++) {
            const struct disk_index *vectors = f < segment->field_count ? segment->fields[f] : NULL;
            uint64_t bytes;

            if (!plan->fields[field - index->schema->fields])
                continue;
            if (!vectors) {
                error_set(err, ERR_INVALID, "field %s has no stored vectors", field->name);
                goto done;
            }
            bytes = element_bytes(vectors->element, vectors->dim);
            if (!out->vectors[f]) {
                out->vectors[f] = malloc((size_t)count * bytes);
                out->vector_bytes[f] = bytes;
            }
            if (!out->vectors[f])
                goto nomem;
            if (fetch_vectors(vectors, reader, &g, n, out->vectors[f], bytes, err) < 0)
                goto done;
        }
    }
    rc = 0;
    goto done;
nomem:
    error_set(err, ERR_NOMEM, "no memory for %u rows", count);
done:
    gathered_release(&g);
    return rc;
}

void row_set_release(struct row_set *set)
{
    for (uint32_t i = 0; i < set->storage_count; i++)
        free(set->storage[i]);
    for (uint32_t f = 0; f < INDEX_VECTOR_FIELD_MAX; f++)
        free(set->vectors[f]);
    free(set->records);
    memset(set, 0, sizeof *set);
}

/* The VarChar key of a record. */
static int record_key(const struct schema *schema, const struct rows_record *record,
                      const char **text, uint32_t *bytes, struct error *err)
{
    const struct schema_field *key = schema_key(schema);
    struct record_cursor cursor;
    struct value value;
    const char *name;
    uint32_t name_bytes;
    uint32_t id;
    int more = 0;

    if (!key || !record->data)
        return error_set(err, ERR_CORRUPT, "a row without its key");
    if (record_open(record->data, record->bytes, &cursor, err) < 0)
        return -1;
    while ((more = record_next(&cursor, &id, &name, &name_bytes, &value, err)) > 0) {
        if (id == key->id && value.type == VALUE_TEXT) {
            *text = value.text;
            *bytes = value.text_bytes;
            return 0;
        }
    }
    return more < 0 ? -1 : error_set(err, ERR_CORRUPT, "a row without its key");
}

int collection_row_key(const struct schema *schema, const struct row_set *set, uint32_t i,
                       const char **text, uint32_t *bytes, struct error *err)
{
    static const struct rows_record none;

    return record_key(schema, set->records ? &set->records[i] : &none, text, bytes, err);
}

static int compare_text(const struct request_key *a, const struct request_key *b)
{
    uint32_t shorter = a->text_bytes < b->text_bytes ? a->text_bytes : b->text_bytes;
    int order = shorter > 0 ? memcmp(a->text, b->text, shorter) : 0;

    if (order != 0)
        return order;
    return a->text_bytes < b->text_bytes ? -1 : a->text_bytes > b->text_bytes;
}

static int compare_keys(const void *left, const void *right)
{
    const struct request_key *a = left;
    const struct request_key *b = right;

    if (a->text)
        return compare_text(a, b);
    return a->number < b->number ? -1 : a->number > b->number;
}

/* Which of the positions under one hash has exactly this text; found_row.position is set. */
static int match_text(const struct index_directory *index, struct reader *reader, uint32_t segment,
                      const struct request_key *key, const uint32_t *positions, uint32_t count,
                      bool *matches, uint32_t *position, struct error *err)
{
    struct rows_record records[SAME_HASH_MAX];
    uint8_t *storage = NULL;
    int rc = -1;

    *matches = false;
    if (!index->segments[segment].rows)
        return error_set(err, ERR_CORRUPT, "a segment with text keys has no records");
    if (rows_fetch(index->segments[segment].rows, reader, positions, count, records, &storage,
                   err) < 0)
        return -1;
    for (uint32_t i = 0; i < count; i++) {
        const char *text;
        uint32_t bytes;

        if (record_key(index->schema, &records[i], &text, &bytes, err) < 0)
            goto done;
        if (bytes == key->text_bytes && memcmp(text, key->text, bytes) == 0) {
            *matches = true;
            *position = positions[i];
            break;
        }
    }
    rc = 0;
done:
    free(storage);
    return rc;
}

int collection_rows_find(const struct index_directory *index, struct reader *reader,
                         struct request_key *keys, uint32_t key_count, struct arena *arena,
                         struct result_row **out, uint32_t *out_count, struct error *err)
{
    uint32_t unique = 0;
    uint64_t *ordinals;
    uint32_t *positions;
    uint32_t *found;
    bool *known;
    struct result_row *rows;
    uint32_t n = 0;

    if (key_count > 1)
        qsort(keys, key_count, sizeof *keys, compare_keys);
    for (uint32_t i = 0; i < key_count; i++) {
        if (unique == 0 || compare_keys(&keys[unique - 1], &keys[i]) != 0)
            keys[unique++] = keys[i];
    }
    ordinals = arena_alloc(arena, unique * sizeof *ordinals);
    positions = arena_alloc(arena, unique * SAME_HASH_MAX * sizeof *positions);
    found = arena_alloc(arena, unique * sizeof *found);
    known = arena_alloc(arena, unique * sizeof *known);
    rows = arena_alloc(arena, unique * sizeof *rows);
    if (!ordinals || !positions || !found || !known || !rows)
        return error_set(err, ERR_BUDGET, "no memory for %u keys", unique);
    for (uint32_t i = 0; i < unique; i++)
        ordinals[i] = keys[i].text ? key_hash(keys[i].text, keys[i].text_bytes)
                                   : key_ordinal_int64(keys[i].number);
    /* The newest segment has the last word on a key. */
    for (uint32_t s = index->segment_count; s-- > 0 && unique > 0;) {
        if (!index->segments[s].keys)
            continue;
        if (keys_find(index->segments[s].keys, reader, ordinals, unique, SAME_HASH_MAX, positions,
                      found, err) < 0)
            return -1;
        for (uint32_t i = 0; i < unique; i++) {
            const uint32_t *at = positions + (size_t)i * SAME_HASH_MAX;
            bool matches = found[i] > 0;
            uint32_t position = at[0];

            if (known[i] || found[i] == 0)
                continue;
            if (keys[i].text &&
                match_text(index, reader, s, &keys[i], at, found[i], &matches, &position, err) < 0)
                return -1;
            if (!matches)
                continue;
            known[i] = true;
            rows[i] =
                (struct result_row){.segment = s, .position = position, .key = keys[i].number};
        }
    }
    for (uint32_t i = 0; i < unique; i++) {
        if (known[i])
            rows[n++] = rows[i];
    }
    *out = rows;
    *out_count = n;
    return 0;
}
