/* MANIFEST entries: generation (storage/manifest.h), epoch, shard, schema.version, schema.bytes,
 * schema.crc32c, segment.count, and per segment segment.NNN.name, .rows, .lsn.min, .lsn.max. Names
 * are relative. The schema is text beside it, named with length and checksum. */
#include "index/index_directory.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "storage/base/bytes.h"
#include "storage/file.h"
#include "storage/journal.h"

#define MANIFEST_NAME "MANIFEST"
#define SCHEMA_NAME "schema.json"
#define CHECK_PAGES 256u

static int entry_u64(struct manifest *m, uint32_t segment, const char *name, uint64_t value,
                     struct error *err)
{
    char entry[64];

    snprintf(entry, sizeof entry, "segment.%03u.%s", segment, name);
    return manifest_set_u64(m, entry, value, err);
}

int index_directory_publish(struct vfs *vfs, const char *path, const struct schema *schema,
                            const char *const *segment_names, uint32_t segment_count,
                            struct error *err)
{
    char file[FILE_PATH_MAX];
    char *text = NULL;
    size_t bytes;
    int rc = -1;
    struct manifest *m = manifest_new(MANIFEST_INDEX);

    if (!m)
        return error_set(err, ERR_NOMEM, "no memory for a MANIFEST");
    /* Before the schema is replaced: an index that is there must stay as it is. */
    if (file_path_join(file, path, MANIFEST_NAME, err) < 0)
        goto done;
    if (file_exists(vfs, file)) {
        error_set(err, ERR_EXISTS, "%s is there already", file);
        goto done;
    }
    if (schema_print(schema, &text, &bytes, err) < 0 ||
        file_path_join(file, path, SCHEMA_NAME, err) < 0 ||
        file_publish(vfs, file, text, bytes, err) < 0)
        goto done;
    if (manifest_set_u64(m, "epoch", 1, err) < 0 || manifest_set_u64(m, "shard", 0, err) < 0 ||
        manifest_set_u64(m, "applied_lsn", 0, err) < 0 ||
        manifest_set_u64(m, "schema.version", 1, err) < 0 ||
        manifest_set_u64(m, "schema.bytes", bytes, err) < 0 ||
        manifest_set_u64(m, "schema.crc32c", crc32c(0, text, bytes), err) < 0 ||
        manifest_set_u64(m, "segment.count", segment_count, err) < 0)
        goto done;
    for (uint32_t i = 0; i < segment_count; i++) {
        char entry[64];
        struct segment *segment;

        if (file_path_join(file, path, segment_names[i], err) < 0 ||
            segment_open(vfs, file, &segment, err) < 0)
            goto done;
        uint64_t rows = segment_row_count(segment);

        segment_close(segment);
        snprintf(entry, sizeof entry, "segment.%03u.name", i);
        if (manifest_set_text(m, entry, segment_names[i], err) < 0 ||
            entry_u64(m, i, "rows", rows, err) < 0 || entry_u64(m, i, "lsn.min", 0, err) < 0 ||
            entry_u64(m, i, "lsn.max", 0, err) < 0)
            goto done;
    }
    if (file_path_join(file, path, MANIFEST_NAME, err) < 0)
        goto done;
    if (manifest_publish(vfs, file, 0, m, err) == MANIFEST_DONE)
        rc = 0;
done:
    manifest_free(m);
    free(text);
    return rc;
}

static int schema_load(struct index_directory *d, struct vfs *vfs, struct error *err)
{
    char file[FILE_PATH_MAX];
    uint8_t *text = NULL;
    size_t bytes;
    uint64_t wanted_bytes, wanted_crc;
    int rc = -1;

    if (manifest_get_u64_in(d->manifest, "schema.bytes", 2, SCHEMA_BYTES_MAX, &wanted_bytes, err) <
            0 ||
        manifest_get_u64_in(d->manifest, "schema.crc32c", 0, UINT32_MAX, &wanted_crc, err) < 0 ||
        file_path_join(file, d->path, SCHEMA_NAME, err) < 0 ||
        file_read_whole(vfs, file, SCHEMA_BYTES_MAX, &text, &bytes, err) < 0)
        return -1;
    if (bytes != wanted_bytes || crc32c(0, text, bytes) != wanted_crc) {
        error_set(err, ERR_CORRUPT,
                  "%s is damaged: %zu bytes with CRC %08x, MANIFEST says %llu bytes with CRC %08x",
                  file, bytes, crc32c(0, text, bytes), (unsigned long long)wanted_bytes,
                  (uint32_t)wanted_crc);
        goto done;
    }
    rc = schema_parse((const char *)text, bytes, file, &d->schema, err);
done:
    free(text);
    return rc;
}

/* Everything but memory: the manifest, the schema and the segments' headers. */
static int directory_load(struct vfs *vfs, const char *path, struct index_directory **out,
                          struct error *err)
{
    char file[FILE_PATH_MAX];
    struct vfs_stat stat;
    uint64_t count;
    int rc = -1;
    struct index_directory *d = calloc(1, sizeof *d);

    if (!d || !(d->path = strdup(path))) {
        free(d);
        return error_set(err, ERR_NOMEM, "no memory for an index directory");
    }
    if (file_path_join(file, path, MANIFEST_NAME, err) < 0)
        goto done;
    if (file_stat(vfs, file, &stat, err) < 0) {
        if (err->code != ERR_NOT_FOUND)
            goto done;
        error_clear(err);
        if (journal_exists(vfs, path)) {
            error_set(err, ERR_NOT_FOUND, "%s is an unfinished build, not an index yet", path);
            error_remedy(err, "annd resume %s goes on with it", path);
            goto done;
        }
        error_set(err, ERR_NOT_FOUND, "%s is not an index directory: it has no MANIFEST", path);
        error_remedy(err, "annd build INPUT --output %s makes one", path);
        goto done;
    }
    if (manifest_read(vfs, MANIFEST_INDEX, file, &d->manifest, err) < 0 ||
        schema_load(d, vfs, err) < 0 ||
        manifest_get_u64_in(d->manifest, "segment.count", 0, INDEX_SEGMENT_MAX, &count, err) < 0)
        goto done;
    d->segments = calloc(count ? count : 1, sizeof *d->segments);
    if (!d->segments) {
        error_set(err, ERR_NOMEM, "no memory for %llu segments", (unsigned long long)count);
        goto done;
    }
    for (uint32_t i = 0; i < count; i++) {
        char entry[64];
        const char *name;
        uint64_t rows, fields;

        snprintf(entry, sizeof entry, "segment.%03u.name", i);
        if (manifest_get_text(d->manifest, entry, &name, err) < 0)
            goto done;
        snprintf(entry, sizeof entry, "segment.%03u.rows", i);
        if (manifest_get_u64(d->manifest, entry, &rows, err) < 0)
            goto done;
        if (strchr(name, '/') || name[0] == '.') {
            error_set(err, ERR_CORRUPT, "%s names a segment '%.100s'", file, name);
            goto done;
        }
        char folder[FILE_PATH_MAX];

        if (file_path_join(folder, path, name, err) < 0 ||
            segment_open(vfs, folder, &d->segments[i].segment, err) < 0)
            goto done;
        d->segment_count = i + 1;
        if (segment_row_count(d->segments[i].segment) != rows) {
            error_set(err, ERR_CORRUPT, "%s has %llu rows, MANIFEST says %llu", folder,
                      (unsigned long long)segment_row_count(d->segments[i].segment),
                      (unsigned long long)rows);
            goto done;
        }
        if (manifest_get_u64_in(segment_manifest(d->segments[i].segment), "field.count", 1,
                                INDEX_VECTOR_FIELD_MAX, &fields, err) < 0)
            goto done;
        for (uint32_t f = 0; f < fields; f++)
            if (!schema_vector(d->schema, f)) {
                error_set(err, ERR_CORRUPT, "%s has %llu vector fields, the schema fewer", folder,
                          (unsigned long long)fields);
                goto done;
            }
        d->segments[i].field_count = (uint32_t)fields;
        d->row_count += rows;
    }
    *out = d;
    d = NULL; /* moved to the caller */
    rc = 0;
done:
    /* What the MANIFEST names and is not there is damage, not "no such index". */
    if (rc < 0 && d->manifest && err && err->code == ERR_NOT_FOUND)
        err->code = ERR_CORRUPT;
    index_directory_close(d);
    return rc;
}

static int segment_indexes_open(struct index_directory *d, struct index_segment *s,
                                uint64_t spare_per_row, struct error *err)
{
    for (uint32_t f = 0; f < s->field_count; f++) {
        uint64_t least;
        const struct schema_field *field = schema_vector(d->schema, f);

        if (disk_index_memory_min(s->segment, f, &least, err) < 0 ||
            disk_index_open(s->segment, f,
                            spare_per_row ? least + spare_per_row * segment_row_count(s->segment)
                                          : 0,
                            &s->fields[f], err) < 0)
            return -1;
        if (s->fields[f]->dim != field->dim)
            return error_set(err, ERR_CORRUPT, "%s has %u dimensions, field '%s' of the schema %u",
                             segment_path(s->segment), s->fields[f]->dim, field->name, field->dim);
        d->memory_bytes += s->fields[f]->memory_bytes;
    }
    return 0;
}

static int segment_rows_open(struct index_directory *d, struct index_segment *s, struct error *err)
{
    const struct segment_section *rows = segment_find(s->segment, "rows");
    const struct segment_section *keys = segment_find(s->segment, "keys");

    if (rows && rows_open(s->segment, rows, &s->rows, err) < 0)
        return -1;
    if (keys && keys_open(s->segment, keys, &s->keys, err) < 0)
        return -1;
    if (s->rows)
        d->memory_bytes += rows_memory_bytes(s->rows);
    if (s->keys)
        d->memory_bytes += keys_memory_bytes(s->keys);
    return 0;
}

int index_directory_open(struct vfs *vfs, const char *path, uint64_t memory_bytes, bool with_rows,
                         struct index_directory **out, struct error *err)
{
    struct index_directory *d;
    uint64_t least = 0, fields = 0, spare = 0;
    int rc = -1;

    if (directory_load(vfs, path, &d, err) < 0)
        return -1;
    for (uint32_t i = 0; with_rows && i < d->segment_count; i++)
        if (segment_rows_open(d, &d->segments[i], err) < 0)
            goto done;
    for (uint32_t i = 0; memory_bytes && i < d->segment_count; i++)
        for (uint32_t f = 0; f < d->segments[i].field_count; f++) {
            uint64_t bytes;

            if (disk_index_memory_min(d->segments[i].segment, f, &bytes, err) < 0)
                goto done;
            least += bytes;
            fields += segment_row_count(d->segments[i].segment);
        }
    least += d->memory_bytes;
    if (memory_bytes && memory_bytes < least) {
        error_set(err, ERR_BUDGET,
                  "%s needs %llu bytes of memory for codes and tables, %llu were granted", path,
                  (unsigned long long)least, (unsigned long long)memory_bytes);
        error_remedy(err, "grant more, or build with fewer --code-bytes");
        goto done;
    }
    /* One segment gets the spare to the byte; several share it by rows. */
    if (memory_bytes && d->segment_count == 1 && d->segments[0].field_count == 1) {
        struct index_segment *s = &d->segments[0];
        const struct schema_field *field = schema_vector(d->schema, 0);

        if (disk_index_open(s->segment, 0, memory_bytes - d->memory_bytes, &s->fields[0], err) < 0)
            goto done;
        if (s->fields[0]->dim != field->dim) {
            error_set(err, ERR_CORRUPT, "%s has %u dimensions, field '%s' of the schema %u", path,
                      s->fields[0]->dim, field->name, field->dim);
            goto done;
        }
        d->memory_bytes += s->fields[0]->memory_bytes;
    } else {
        spare = fields ? (memory_bytes - least) / fields : 0;
        for (uint32_t i = 0; i < d->segment_count; i++)
            if (segment_indexes_open(d, &d->segments[i], spare, err) < 0)
                goto done;
    }
    *out = d;
    d = NULL; /* moved to the caller */
    rc = 0;
done:
    index_directory_close(d);
    return rc;
}

void index_directory_close(struct index_directory *d)
{
    if (!d)
        return;
    for (uint32_t i = 0; d->segments && i < d->segment_count; i++) {
        struct index_segment *s = &d->segments[i];

        for (uint32_t f = 0; f < s->field_count; f++)
            disk_index_close(s->fields[f]);
        rows_close(s->rows);
        keys_close(s->keys);
        segment_close(s->segment);
    }
    free(d->segments);
    schema_free(d->schema);
    manifest_free(d->manifest);
    free(d->path);
    free(d);
}

/* ---- check ---- */

/* Reads all pages once: structure, bounds and the graph's edges; then follows edges from the entry
 * point. Memory: one bit a node and the adjacency's offsets are not kept; pages are read again in
 * the order the walk meets them, so the walk keeps a queue of positions and a seen bitmap. To spare
 * the reads, adjacency is kept in memory as it is decoded. */
struct adjacency {
    uint64_t *ends; /* row_count */
    uint32_t *edges;
    uint64_t count;
    uint64_t capacity;
};

static int adjacency_append(struct adjacency *a, const uint32_t *edges, uint32_t count,
                            struct error *err)
{
    if (a->count + count > a->capacity) {
        uint64_t capacity = a->capacity ? a->capacity * 2 : 1u << 16;
        uint32_t *grown;

        while (capacity < a->count + count)
            capacity *= 2;
        grown = realloc(a->edges, capacity * sizeof *grown);
        if (!grown)
            return error_set(err, ERR_NOMEM, "no memory for %llu edges",
                             (unsigned long long)capacity);
        a->edges = grown;
        a->capacity = capacity;
    }
    if (count)
        memcpy(a->edges + a->count, edges, count * sizeof *edges);
    a->count += count;
    return 0;
}

/* In-page neighbours are implied: a page that is reached reaches all its nodes. */
static int reachability(const struct disk_index *index, const struct adjacency *a,
                        struct index_check *found, struct error *err)
{
    uint64_t pages = index->format.page_count, head = 0, tail = 0, reached = 0;
    uint32_t *queue = malloc(pages * sizeof *queue);
    uint8_t *seen = calloc(pages, 1);
    int rc = -1;

    if (!queue || !seen) {
        error_set(err, ERR_NOMEM, "no memory to walk %llu pages", (unsigned long long)pages);
        goto done;
    }
    queue[tail++] = index->entry_point / index->format.capacity;
    seen[queue[0]] = 1;
    while (head < tail) {
        uint32_t page = queue[head++];
        uint64_t first = (uint64_t)page * index->format.capacity;
        uint32_t nodes = page_node_count(&index->format, page);

        reached += nodes;
        for (uint64_t e = first ? a->ends[first - 1] : 0; e < a->ends[first + nodes - 1]; e++) {
            uint32_t next = a->edges[e] / index->format.capacity;

            if (!seen[next]) {
                seen[next] = 1;
                queue[tail++] = next;
            }
        }
    }
    found->unreachable += index->row_count - reached;
    rc = 0;
done:
    free(queue);
    free(seen);
    return rc;
}

static int check_pages(const struct disk_index *index, struct job *job, struct index_check *found,
                       struct error *err)
{
    uint32_t payload = index->format.page_bytes - BLOCK_CRC_BYTES;
    uint8_t *pages = malloc((uint64_t)CHECK_PAGES * payload);
    struct adjacency a = {.ends = malloc(index->row_count * sizeof *a.ends)};
    int rc = -1;

    job_phase(job, "pages", index->format.page_count);
    if (!pages || !a.ends) {
        error_set(err, ERR_NOMEM, "no memory to check %u nodes", index->row_count);
        goto done;
    }
    for (uint64_t page = 0; page < index->format.page_count; page++) {
        struct page_view view;
        uint64_t in_run = page % CHECK_PAGES;

        if (in_run == 0) {
            uint64_t run = index->format.page_count - page;

            run = run < CHECK_PAGES ? run : CHECK_PAGES;
            if (segment_read(index->segment, index->pages, page * payload, run * payload, pages,
                             err) < 0 ||
                job_advance(job, run, err) < 0)
                goto done;
        }
        if (page_view_open(&index->format, page, pages + in_run * payload, &view, err) < 0) {
            error_prefix(err, "%s", index->pages->path);
            goto done;
        }
        for (uint32_t slot = 0; slot < view.node_count; slot++) {
            uint32_t edges[PAGE_DEGREE_MAX], count;

            if (page_view_neighbours(&view, slot, edges, &count, err) < 0) {
                error_prefix(err, "%s", index->pages->path);
                goto done;
            }
            if (count > index->max_degree) {
                error_set(err, ERR_CORRUPT, "%s: node %llu has %u edges, at most %u are allowed",
                          index->pages->path, (unsigned long long)(view.first + slot), count,
                          index->max_degree);
                goto done;
            }
            if (adjacency_append(&a, edges, count, err) < 0)
                goto done;
            a.ends[view.first + slot] = a.count;
            found->nodes++;
            found->edges += count;
        }
    }
    rc = reachability(index, &a, found, err);
done:
    free(pages);
    free(a.ends);
    free(a.edges);
    return rc;
}

/* Every int64 key on a page is found under `keys` at its own position. */
static int check_keys(const struct index_segment *s, struct job *job, struct error *err)
{
    const struct disk_index *index = s->fields[0];
    uint32_t positions[CHECK_PAGES], found[CHECK_PAGES], at[CHECK_PAGES];
    int64_t keys[CHECK_PAGES];
    uint64_t ordinals[CHECK_PAGES];
    struct reader *reader = NULL;
    int rc = -1;

    if (!s->keys || !index->format.holds_keys)
        return 0;
    job_phase(job, "keys", index->row_count);
    if (reader_open(READER_PREAD, CHECK_PAGES, &reader, err) < 0)
        return -1;
    /* All of a small index, an even sample of a large one: the sections' checksums vouch for the
     * bytes, this for their agreement. */
    uint32_t step = index->row_count / 100000 + 1;

    for (uint64_t first = 0; first < index->row_count; first += (uint64_t)CHECK_PAGES * step) {
        uint32_t count = 0;

        for (uint64_t p = first; p < index->row_count && count < CHECK_PAGES; p += step)
            positions[count++] = (uint32_t)p;
        if (disk_index_keys(index, reader, positions, count, keys, err) < 0)
            goto done;
        for (uint32_t i = 0; i < count; i++)
            ordinals[i] = key_ordinal_int64(keys[i]);
        if (keys_find(s->keys, reader, ordinals, count, 1, at, found, err) < 0)
            goto done;
        for (uint32_t i = 0; i < count; i++)
            if (found[i] != 1 || at[i] != positions[i]) {
                error_set(err, ERR_CORRUPT, "%s: key %lld of row position %u is not in `keys`",
                          segment_path(s->segment), (long long)keys[i], positions[i]);
                goto done;
            }
        if (job_advance(job, (uint64_t)count * step, err) < 0)
            goto done;
    }
    rc = 0;
done:
    reader_close(reader);
    return rc;
}

int index_directory_check(struct vfs *vfs, const char *path, struct job *job,
                          struct index_check *found, struct error *err)
{
    struct index_directory *d;
    int rc = -1;

    memset(found, 0, sizeof *found);
    if (directory_load(vfs, path, &d, err) < 0)
        return -1;
    for (uint32_t i = 0; i < d->segment_count; i++) {
        if (segment_check(d->segments[i].segment, job, err) < 0)
            goto done;
        for (uint32_t n = 0; n < segment_section_count(d->segments[i].segment); n++)
            found->blocks += segment_section_at(d->segments[i].segment, n)->block_count;
    }
    for (uint32_t i = 0; i < d->segment_count; i++) {
        struct index_segment *s = &d->segments[i];

        if (segment_indexes_open(d, s, 0, err) < 0 || segment_rows_open(d, s, err) < 0)
            goto done;
        for (uint32_t f = 0; f < s->field_count; f++)
            if (check_pages(s->fields[f], job, found, err) < 0)
                goto done;
        if (check_keys(s, job, err) < 0)
            goto done;
    }
    if (found->unreachable) {
        error_set(err, ERR_CORRUPT, "%s: %llu of %llu nodes cannot be reached from the entry point",
                  path, (unsigned long long)found->unreachable, (unsigned long long)d->row_count);
        goto done;
    }
    job_finish(job);
    rc = 0;
done:
    index_directory_close(d);
    return rc;
}

static int compare_names(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

int index_directory_files(struct vfs *vfs, const char *path, char ***names, uint32_t *count,
                          struct error *err)
{
    struct index_directory *d;
    uint32_t n = 0, capacity = 2;
    char **list = NULL;
    int rc = -1;

    if (directory_load(vfs, path, &d, err) < 0)
        return -1;
    for (uint32_t i = 0; i < d->segment_count; i++)
        capacity += 1 + segment_section_count(d->segments[i].segment);
    list = calloc(capacity, sizeof *list);
    if (!list || !(list[n++] = strdup(MANIFEST_NAME)) || !(list[n++] = strdup(SCHEMA_NAME)))
        goto nomem;
    for (uint32_t i = 0; i < d->segment_count; i++) {
        const char *folder = strrchr(segment_path(d->segments[i].segment), '/') + 1;

        for (uint32_t k = 0; k <= segment_section_count(d->segments[i].segment); k++) {
            const char *file = k == 0 ? "segment.manifest"
                                      : segment_section_at(d->segments[i].segment, k - 1)->name;

            if (asprintf(&list[n], "%s/%s", folder, file) < 0) {
                list[n] = NULL;
                goto nomem;
            }
            n++;
        }
    }
    qsort(list, n, sizeof *list, compare_names);
    *names = list;
    *count = n;
    list = NULL; /* moved to the caller */
    rc = 0;
    goto done;
nomem:
    error_set(err, ERR_NOMEM, "no memory for the list of %s", path);
done:
    if (list)
        file_names_free(list, n);
    index_directory_close(d);
    return rc;
}
