/* manifest: a small, canonical, checksummed list of named values.
 *
 * One codec serves every control file: a segment's `segment.manifest`, the MANIFEST of an index or
 * collection, the MANIFEST of a data directory, the record and the state of a long job. Entries are
 * sorted by name, so equal contents are equal bytes; entries a reader does not know are kept and
 * written back. Layout, little-endian:
 *
 *   00-07  magic, one per kind of file, e.g. "ANNDSEGM"
 *   08-11  format version; readers refuse one they do not know
 *   12-15  CRC-32C of the whole file, this field as zero
 *   16-23  file bytes
 *   24-27  incompatible features: an unknown bit refuses the file
 *   28-31  compatible features: unknown bits are ignored
 *   32-35  entry count
 *   36-63  reserved, zero and checked
 *   then per entry: u16 name bytes, u8 type, u8 zero, u32 value bytes, name, value
 *
 * Not thread-safe; a finished manifest may be read by any number of threads. */
#ifndef ANND_STORAGE_MANIFEST_H
#define ANND_STORAGE_MANIFEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "storage/base/error.h"
#include "storage/vfs.h"

#define MANIFEST_BYTES_MAX (16u << 20)
#define MANIFEST_NAME_MAX 512u

enum manifest_kind {
    MANIFEST_SEGMENT, /* "ANNDSEGM", segment.manifest */
    MANIFEST_INDEX,   /* "ANNDIDXM", MANIFEST of an index directory or a collection */
    MANIFEST_DATA,    /* "ANNDDATM", MANIFEST of a data directory */
    MANIFEST_JOB      /* "ANNDJOBM", build.job and build.state of an unfinished job */
};

struct manifest;

/* An empty one; NULL when memory is out. */
struct manifest *manifest_new(enum manifest_kind kind);
void manifest_free(struct manifest *manifest);

/* Set or replace. Names are [a-z0-9._/-]; ERR_INVALID otherwise, ERR_NOMEM. */
int manifest_set_u64(struct manifest *manifest, const char *name, uint64_t value,
                     struct error *err);
int manifest_set_f64(struct manifest *manifest, const char *name, double value, struct error *err);
int manifest_set_text(struct manifest *manifest, const char *name, const char *text,
                      struct error *err);
int manifest_set_bytes(struct manifest *manifest, const char *name, const void *data, size_t bytes,
                       struct error *err);
void manifest_remove(struct manifest *manifest, const char *name);

/* ERR_CORRUPT naming the file and the entry when it is missing or of another type. Text and bytes
 * are borrowed from the manifest; text is NUL-terminated without a NUL inside. */
int manifest_get_u64(const struct manifest *manifest, const char *name, uint64_t *value,
                     struct error *err);
/* As above, and ERR_CORRUPT when the value lies outside [min, max]. */
int manifest_get_u64_in(const struct manifest *manifest, const char *name, uint64_t min,
                        uint64_t max, uint64_t *value, struct error *err);
int manifest_get_f64(const struct manifest *manifest, const char *name, double *value,
                     struct error *err);
int manifest_get_text(const struct manifest *manifest, const char *name, const char **text,
                      struct error *err);
int manifest_get_bytes(const struct manifest *manifest, const char *name, const uint8_t **data,
                       size_t *bytes, struct error *err);
bool manifest_has(const struct manifest *manifest, const char *name);

/* Entries in order, for listings: name, and the value printed as text into out. */
uint32_t manifest_count(const struct manifest *manifest);
const char *manifest_entry(const struct manifest *manifest, uint32_t i, char *out,
                           size_t out_bytes);

/* Canonical bytes, malloc'ed. */
int manifest_encode(const struct manifest *manifest, uint8_t **out, size_t *bytes,
                    struct error *err);
/* `where` names the source in errors; copied. ERR_CORRUPT, ERR_UNSUPPORTED, ERR_NOMEM. */
int manifest_decode(enum manifest_kind kind, const uint8_t *data, size_t bytes, const char *where,
                    struct manifest **out, struct error *err);
int manifest_read(struct vfs *vfs, enum manifest_kind kind, const char *path, struct manifest **out,
                  struct error *err);

enum manifest_outcome {
    MANIFEST_DONE,     /* durable */
    MANIFEST_CONFLICT, /* the file's generation is not the expected one: nothing changed */
    MANIFEST_UNKNOWN   /* failed on the way: old or new, a later read tells */
};

/* Publishes `path` if the one there has entry "generation" == expected (0: no file there). The
 * manifest's own "generation" is set to expected + 1 and "generation.parent" to expected. The one
 * before is kept as path.1. */
enum manifest_outcome manifest_publish(struct vfs *vfs, const char *path,
                                       uint64_t expected_generation, struct manifest *manifest,
                                       struct error *err);

#endif
