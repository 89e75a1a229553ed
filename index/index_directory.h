/* index_directory: what `annd build` makes and a data directory holds per collection: MANIFEST,
 * schema.json and one or more segments.
 *
 * Open, it is what a search needs: the schema, and per segment its disk indexes, rows and keys.
 * Immutable; any number of threads share it. */
#ifndef ANND_INDEX_INDEX_DIRECTORY_H
#define ANND_INDEX_INDEX_DIRECTORY_H

#include <stdint.h>

#include "index/disk_index.h"
#include "index/rows.h"
#include "index/schema.h"
#include "storage/base/job.h"

#define INDEX_SEGMENT_MAX 1024u
#define INDEX_VECTOR_FIELD_MAX 10u

struct index_segment {
    struct segment *segment;
    struct rows *rows; /* NULL: the segment has no records */
    struct keys *keys;
    uint32_t field_count;
    struct disk_index *fields[INDEX_VECTOR_FIELD_MAX]; /* in schema order of vector fields */
};

struct index_directory {
    char *path;
    struct manifest *manifest;
    struct schema *schema;
    struct index_segment *segments;
    uint32_t segment_count;
    uint64_t row_count;
    uint64_t memory_bytes; /* resident: codes, tables, pages, frame and fence tables */
};

/* memory_bytes is shared among segments in proportion to their needs (0: only what must be).
 * with_rows false leaves rows and keys closed (searching for ids alone). ERR_NOT_FOUND when `path`
 * is no index directory, ERR_CORRUPT, ERR_BUDGET, ERR_NOMEM. */
int index_directory_open(struct vfs *vfs, const char *path, uint64_t memory_bytes, bool with_rows,
                         struct index_directory **out, struct error *err);
void index_directory_close(struct index_directory *directory);

/* Writes schema.json and MANIFEST for segments already published in `path` (a new directory):
 * segment_names are directory names inside it. */
int index_directory_publish(struct vfs *vfs, const char *path, const struct schema *schema,
                            const char *const *segment_names, uint32_t segment_count,
                            struct error *err);

/* What a check found, counted; the first damage is in *err. */
struct index_check {
    uint64_t blocks;
    uint64_t nodes;
    uint64_t edges;
    uint64_t unreachable;
};

/* Every checksum, page structure, degree and id bound, reachability, keys against pages. 0: sound.
 * ERR_CORRUPT names the place. */
int index_directory_check(struct vfs *vfs, const char *path, struct job *job,
                          struct index_check *found, struct error *err);

/* Lists every file of an index directory (relative paths), for attach: malloc'ed, sorted; free with
 * file_names_free. */
int index_directory_files(struct vfs *vfs, const char *path, char ***names, uint32_t *count,
                          struct error *err);

#endif
